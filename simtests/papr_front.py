"""The PAPR front end on a fake, and what its tests call things."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import vfio
from vfio import assign, papr
from vfio.fake.backend import FakeBackend
from vfio.papr import Opcode

EDU, TESTDEV = "0000:01:00.0", "0000:01:00.1"
RAM, PAGE = 8 << 20, 4096
READ, WRITE, BOTH = papr.TCE_READ, papr.TCE_WRITE, papr.TCE_READ | papr.TCE_WRITE
LOW, HIGH = 0x80000000, 0x80000001
"""LIOBNs of the default window and of the next."""
BUID = (0x08000000, 0x20000000)
WINDOW = 1 << 59
"""Where the second window begins."""
LIST = RAM - PAGE
"""Guest address of a list of TCEs."""
MAP, UNMAP = "VFIO_IOMMU_MAP_DMA", "VFIO_IOMMU_UNMAP_DMA"

QUERY, CREATE = "ibm,query-pe-dma-window", "ibm,create-pe-dma-window"
REMOVE, RESET = "ibm,remove-pe-dma-window", "ibm,reset-pe-dma-window"
STATE, OPTION, INFO = "ibm,read-slot-reset-state2", "ibm,set-eeh-option", "ibm,get-config-addr-info2"
SLOT_RESET, CONFIGURE, DETAIL = "ibm,set-slot-reset", "ibm,configure-pe", "ibm,slot-error-detail"

ADDRESSED = [(QUERY, (), 5), (CREATE, (12, 23), 4), (RESET, (), 1), (OPTION, (1,), 1), (INFO, (0,), 2)]
ADDRESSED += [(STATE, (), 4), (SLOT_RESET, (0,), 1), (CONFIGURE, (), 1), (DETAIL, (0, 0, LIST, PAGE, 1), 1)]
"""Calls for a device or a PE: their arguments behind its address, how many words they answer."""


class Front:
    """A machine, a device of it, and a PHB for a guest of 8 MiB."""

    def __init__(self, url: str = "fake:power8", ram: int = RAM, page_size: int | None = None) -> None:
        backend = vfio.open_backend(url)
        assert isinstance(backend, FakeBackend)
        self.backend = backend
        self.address = EDU if "power8" in url else self._edu()
        assign.bind([self.address], backend=backend, whole_group=True)
        self.device = vfio.open_device(self.address, backend)
        self.ram = vfio.DmaBuffer(ram, page_size, backend=backend)
        self.phb = papr.Phb(self.device.group.container, papr.GuestMemory(self.ram))
        self.where = self.phb.add(self.device)

    def _edu(self) -> str:
        return next(d.address for d in self.backend.machine.topology.devices if d.model == "edu")

    def hcall(self, opcode: int, *arguments: int) -> tuple[int, ...]:
        return self.phb.hcall(opcode, *arguments)

    def rtas(self, name: str, *arguments: int, results: int = 1) -> list[int]:
        return self.phb.rtas(name, *arguments, results=results)

    def put(self, ioba: int, tce: int, liobn: int = LOW) -> int:
        return self.hcall(Opcode.H_PUT_TCE, liobn, ioba, tce)[0]

    def get(self, ioba: int, liobn: int = LOW) -> tuple[int, ...]:
        return self.hcall(Opcode.H_GET_TCE, liobn, ioba)

    def put_list(self, ioba: int, tces: list[int], liobn: int = LOW) -> int:
        self.ram[LIST : LIST + 8 * len(tces)] = struct.pack(f">{len(tces)}Q", *tces)
        return self.hcall(Opcode.H_PUT_TCE_INDIRECT, liobn, ioba, LIST, len(tces))[0]

    def stuff(self, ioba: int, tce: int, count: int, liobn: int = LOW) -> int:
        return self.hcall(Opcode.H_STUFF_TCE, liobn, ioba, tce, count)[0]

    def create(self, page_shift: int, window_shift: int) -> list[int]:
        return self.rtas(CREATE, self.where, *BUID, page_shift, window_shift, results=4)

    def entry(self, ioba: int) -> tuple[int, int] | None:
        """What the hardware has there: offset in the guest's memory, permission."""
        tables = self.backend.machine.iommu_groups[self.device.group.number].table_group
        table = tables.find(ioba) if tables else None
        found = table and table.translate(ioba)
        return found and (found.address - self.ram.address, found.permission)

    def calls(self, what: str) -> int:
        return self.backend.machine.hooks.calls[what]


def fresh() -> Iterator[Front]:
    """For a fixture: one that has to be closed without a trace."""
    made = Front()
    yield made
    made.phb.close()
    made.device.close()
    assert made.backend.leaks() == []
