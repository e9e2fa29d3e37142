"""PEs (partitionable endpoints): what the hardware isolates, translates the DMA of, and freezes on an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vfio.fake import error_injection
from vfio.fake.eeh_pe import EehPe
from vfio.fake.iommu_group import IommuGroup
from vfio.fake.pamu import PamuGroup
from vfio.fake.table_group import Ioda1TableGroup, Ioda2TableGroup, PseriesTableGroup, TableGroup
from vfio.fake.tce import TCE_READ, TCE_WRITE
from vfio.fake.type1_mappings import Type1Group

if TYPE_CHECKING:
    from vfio.fake.eeh_pe import Freeze
    from vfio.fake.machine import Machine
    from vfio.fake.pci import PciDevice
    from vfio.fake.tce import TceTable
    from vfio.topology import Phb


class DmaFault(NamedTuple):
    """A DMA of a device that led nowhere."""

    address: int
    """Bus address, bytes."""
    length: int
    write: bool
    """Whether the device wrote."""
    reason: str


class MemoryGone(RuntimeError):
    """A device reached memory that its process has unmapped.

    A real device would still reach the pages that were there: they are pinned.  The model has only the process's own
    memory, so it reads zeros and drops writes, and a strict machine says so.  Unmap the IOVA before giving the memory
    back.
    """


class Pe:
    """A PE, as what translates the DMA of its devices; `eeh` is what EEH knows of it."""

    def __init__(
        self, machine: Machine, number: int, phb: Phb, group: IommuGroup, table_group: TableGroup, eeh: EehPe
    ) -> None:
        self.machine = machine
        self.number = number
        self.phb = phb
        self.group = group
        self.table_group = table_group
        self.eeh = eeh
        self.dma_faults: list[DmaFault] = []
        """What devices of the PE could not reach, oldest first."""

    def __repr__(self) -> str:
        return f"<Pe {self.phb.domain:04x}:{self.number:x} of group {self.group.number}>"

    @property
    def devices(self) -> list[PciDevice]:
        return self.group.devices

    @property
    def freeze(self) -> Freeze:
        """What of it is frozen."""
        return self.eeh.freeze

    @freeze.setter
    def freeze(self, what: Freeze) -> None:
        self.eeh.freeze = what

    @property
    def blocked(self) -> bool:
        """Whether a reset keeps configuration space out of reach."""
        return self.eeh.blocked

    # --- DMA ---

    def dma_read(self, address: int, length: int) -> bytes:
        """What a device of the PE reads at a bus address: zeros where no window, entry or permission lets it."""
        found, done = [], 0
        while done < length:
            if not self._dma_works(address + done, length - done, write=False):
                found.append(bytes(length - done))
                break
            target, here = self._translate(address + done, length - done, TCE_READ)
            found.append(self._load(target, here, address + done) if target else bytes(here))
            done += here
        return found[0] if len(found) == 1 else b"".join(found)

    def dma_write(self, address: int, data: bytes) -> None:
        """A device of the PE writes at a bus address: dropped where no window, entry or permission lets it."""
        view, at = memoryview(data), 0
        while at < len(data) and self._dma_works(address + at, len(data) - at, write=True):
            target, here = self._translate(address + at, len(data) - at, TCE_WRITE)
            if target:
                table, place = target
                assert table.memory is not None
                try:
                    table.memory.write(place, bytes(view[at : at + here]))
                except OSError:
                    self._gone(address + at, here, place, write=True)
            at += here

    def message_arrives(self, vector: int) -> bool:
        """Whether the IOMMU lets message `vector` of a device through."""
        if self.table_group.carries(vector):
            return True
        self._refuse(DmaFault(0, 4, True, f"no window maps the MSI bank of message {vector}"))
        return False

    def _dma_works(self, address: int, length: int, write: bool) -> bool:
        if self.eeh.stops_dma:
            self._fault(DmaFault(address, length, write, "the PE is frozen"))
            return False
        if error_injection.hit(self.eeh, "dma", write, address):
            self._fault(DmaFault(address, length, write, "an injected error"))
            return False
        return True

    def _translate(self, address: int, length: int, needed: int) -> tuple[tuple[TceTable, int] | None, int]:
        """Where the bytes from a bus address on are, or None; and how many of them that goes for."""
        write = needed == TCE_WRITE
        table = self.table_group.find(address)
        if table is None:
            here = min(length, 4096 - address % 4096)
            self._refuse(DmaFault(address, here, write, "no window has this address"))
            return None, here
        found = table.translate(address)
        if found is not None and found.permission & needed:
            return (table, found.address), min(length, found.length)
        here = min(length, found.length if found else table.page_size - address % table.page_size)
        reason = "nothing is mapped there" if found is None else f"mapped without {'write' if write else 'read'} access"
        self._refuse(DmaFault(address, here, write, reason))
        return None, here

    def _load(self, target: tuple[TceTable, int], length: int, address: int) -> bytes:
        table, place = target
        assert table.memory is not None
        try:
            return table.memory.read(place, length)
        except OSError:
            self._gone(address, length, place, write=False)
            return bytes(length)

    def _gone(self, address: int, length: int, place: int, write: bool) -> None:
        self._fault(DmaFault(address, length, write, "the process has unmapped the memory"))
        if self.machine.strict:
            raise MemoryGone(
                f"a device of PE {self.number:#x} {'writes' if write else 'reads'} {length} bytes at IOVA "
                f"{address:#x}, mapped to {place:#x}, which the process has unmapped (or made read-only) since: unmap "
                "the IOVA first, or say strict=0 to have it read zeros and drop writes"
            )

    def _refuse(self, fault: DmaFault) -> None:
        """The TCE tables do not let the device there: that freezes the PE."""
        self._fault(fault)
        if self.machine.freezes:
            self.machine.eeh.hardware_error(self.eeh)

    def _fault(self, fault: DmaFault) -> None:
        """Note a fault; one that continues the last one makes that one longer."""
        last = self.dma_faults[-1] if self.dma_faults else None
        if last and last[2:] == fault[2:] and last.address + last.length == fault.address:
            self.dma_faults[-1] = last._replace(length=last.length + fault.length)
        else:
            self.dma_faults.append(fault)


def make_pe(machine: Machine, phb: Phb, number: int | None, group: int) -> Pe:
    """The PE `number` (None: the platform shows none) below `phb`, with its IOMMU group; both join the machine."""
    table_group = _table_group(machine, group)
    pe_number = 0 if number is None else number
    name = "" if isinstance(table_group, (Type1Group, PamuGroup)) else f"domain{phb.domain}-pe{pe_number:x}"
    iommu_group = IommuGroup(group, name, table_group=table_group)
    # What the platform does not number is a PE of its own.
    eeh = EehPe(machine, phb.domain, 0) if number is None else machine.eeh.pe(phb.domain, number)
    pe = Pe(machine, pe_number, phb, iommu_group, table_group, eeh)
    machine.iommu_groups[group] = iommu_group
    machine.pes.append(pe)
    return pe


def _table_group(machine: Machine, group: int) -> TableGroup:
    topology = machine.topology
    kind: type[TableGroup] = Ioda2TableGroup
    if topology.iommu.ranges:
        kind = Type1Group
    elif topology.iommu.pamu:
        kind = PamuGroup
    elif topology.platform.name == "pSeries":
        kind = PseriesTableGroup
    elif not topology.iommu.dynamic_windows:
        kind = Ioda1TableGroup
    return kind(topology.iommu, topology.default_window(group), machine.page_size)
