"""What a virtual machine monitor does with VFIO on behalf of a pseries guest: hypercalls and RTAS calls become VFIO calls.

    from vfio import papr

    memory = papr.GuestMemory(vfio.DmaBuffer(1 << 30))  # guest addresses 0 .. 1 GiB
    with papr.Phb(device.group.container, memory) as phb:
        where = phb.add(device)
        phb.rtas("ibm,query-pe-dma-window", where, phb.buid >> 32, phb.buid & 0xFFFFFFFF, results=5)
        phb.hcall(papr.Opcode.H_PUT_TCE, phb.liobns[0], ioba, guest_address | papr.TCE_READ | papr.TCE_WRITE)
        direct = papr.Guest(phb).enable_ddw(where)  # or let the guest's side be played, as Linux plays it

A guest is never told of an exception: whatever it passes is answered with a code of PAPR (`Hcall`, `Rtas`), and what it
may not do changes nothing.  Memory that it has no TCE for is out of its devices' reach.  RTAS calls go by their names
(`Phb.rtas`), or as a guest makes them, by a block in its memory with a token of `Phb.tokens` (`Opcode.H_RTAS`).

Kernel document: "VFIO - Virtual Function I/O", section "PPC64 sPAPR implementation note"; sources are named in `hcalls`,
`rtas` and `guest`.
"""

from vfio.papr.guest import DirectDma, Guest, Refused
from vfio.papr.memory import Block, GuestMemory
from vfio.papr.numbers import (
    TCE_READ,
    TCE_WRITE,
    EehOption,
    Hcall,
    LogKind,
    Opcode,
    PeInfo,
    PeMode,
    Rtas,
    SlotReset,
)
from vfio.papr.phb import Phb

__all__ = [
    "TCE_READ",
    "TCE_WRITE",
    "Block",
    "DirectDma",
    "EehOption",
    "Guest",
    "GuestMemory",
    "Hcall",
    "LogKind",
    "Opcode",
    "PeInfo",
    "PeMode",
    "Phb",
    "Refused",
    "Rtas",
    "SlotReset",
]
