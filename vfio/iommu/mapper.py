"""Mapper: pieces of one buffer, mapped into slots of one IOVA range, in hot loops."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vfio import errors
from vfio.closing import Closing
from vfio.dma import DmaMemory
from vfio.iommu.slot import Slot

if TYPE_CHECKING:
    from vfio.iommu.registration import Region
    from vfio.iommu.window import DmaWindow


class Mapper(Closing):
    """Maps pieces of a buffer into slots; all that can be checked is checked when it is made.

        with window.mapper(buffer, slots=32) as mapper:
            mapper.map(slot, piece)        # IOVA mapper.iovas[slot] -> memory mapper.addresses[piece]
            mapper.unmap(slot)

    Made by `DmaWindow.mapper`.  Use one for each thread.
    """

    restorable: ClassVar[bool] = False
    """Whether it knows what it has mapped, so that `remap` can map it again; keeping that would cost each `map`."""

    def __init__(self, window: DmaWindow, memory: DmaMemory, slots: int, length: int) -> None:
        if slots < 1:
            raise ValueError(f"{slots} slots: at least one is needed")
        if (memory.address | length) & (window.page_size - 1) or not 0 < length <= memory.length:
            values = f"address {memory.address:#x}, pieces of {length:#x} of {memory.length:#x} bytes"
            raise errors.Misaligned(f"cannot map in {window}", values, window.page_size, "the window's pages")
        self.window = window
        self.memory = memory
        self.region: Region | None = None
        with window.iommu.lock:
            start = window.reserve(slots * length, None)
            window.mappers.append(self)
            try:
                window.iommu.claim(window, memory, self)
                self._whole = Slot(window, start, slots * length)
                window.settle(self._whole)
            except BaseException:
                window.mappers.remove(self)
                window.allocator.free(start, slots * length)
                raise
        self.iovas = range(start, start + slots * length, length)
        """The IOVA of each slot."""
        self.addresses = range(memory.address, memory.address + memory.length // length * length, length)
        """The address of each piece of the memory."""
        self._slots = tuple(Slot(window, iova, length) for iova in self.iovas)

    def map(self, slot: int, piece: int) -> None:
        """Map the piece number `piece` of the memory into `slot`, in place of what was there.

        Raises IndexError for a slot or a piece that there is not, and what `DmaWindow.map` raises from the kernel.
        """
        self._slots[slot].map(self.addresses[piece])

    def unmap(self, slot: int) -> None:
        """Unmap `slot`; harmless when nothing is mapped there."""
        self._slots[slot].unmap()

    def remap(self) -> None:
        """Where it is `restorable`, map again what it has mapped: the kernel has emptied the table."""

    def close(self) -> None:
        """Unmap all slots and give the IOVA range back."""
        with self.window.iommu.lock:
            if self in self.window.mappers:
                self._whole.unmap()
                self.window.allocator.free(self._whole.iova, self._whole.length)
                self.gone()

    def gone(self) -> None:
        """The window is no more."""
        self.window.mappers.remove(self)
        self._slots = ()  # a late call finds no slot
