"""Where a host puts the BARs of its functions, and how it numbers their interrupts: as real hosts of the lab did."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfio.fake import devices

if TYPE_CHECKING:
    from vfio import topology
    from vfio.fake.machine import Machine

_FIRST_INTERRUPT = {"POWER8": 30, "POWER9": 38, "POWER10": 38}
_MEMORY = {"POWER8": 0x3FF8000000000, "POWER9": 0x600C000000000, "POWER10": 0x600C000000000}
_PSERIES_MEMORY, _WINDOW, _BUS_START, _IO_START = 0x200080000000, 0x80000000, 0x80000000, 0x1000


def place_bars(machine: Machine, phb: topology.Phb) -> dict[str, dict[int, tuple[int, int, bool]]]:
    """Where the host puts the BARs below a PHB: by address and index, the CPU address, the address on the bus, and
    whether it is aligned to more than its size.

    The largest come first; powernv gives every BAR pages of its own (pnv_pci_default_alignment), and has no I/O
    ports to give.
    """
    powernv = machine.topology.platform.name == "PowerNV"
    base = _MEMORY.get(machine.topology.platform.cpu, _MEMORY["POWER8"]) if powernv else _PSERIES_MEMORY
    base += phb.index * _WINDOW
    places: dict[str, dict[int, tuple[int, int, bool]]] = {device.address: {} for device in phb.functions}
    bars = [(device.address, bar) for device in phb.functions for bar in devices.make_model(device).bars]
    memory = io = 0
    for address, bar in sorted(bars, key=lambda pair: -pair[1].size):
        if not bar.io:
            align = max(bar.size, machine.page_size) if powernv else bar.size
            memory = -(-memory // align) * align
            places[address][bar.index] = base + memory, _BUS_START + memory, align > bar.size
            memory += bar.size
        elif not powernv:
            io = -(-io // bar.size) * bar.size
            places[address][bar.index] = _IO_START + io, _IO_START + io, False
            io += bar.size
    return places


def interrupt_number(machine: Machine, address: str) -> int:
    """A number of the host's for the line: one a slot, counted from what real hosts of the kind begin with."""
    slots = []
    for phb in machine.topology.phbs:
        for device in phb.devices:
            slot = device.address.rpartition(".")[0]
            if slot not in slots:
                slots.append(slot)
    platform = machine.topology.platform
    first = _FIRST_INTERRUPT.get(platform.cpu, 16) if platform.name == "PowerNV" else 18
    slot = address.rpartition(".")[0]
    return first + (slots.index(slot) if slot in slots else len(slots))
