"""DMA window: a range of IOVA that devices may reach, and the TCE table behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfio import errors
from vfio.closing import Closing
from vfio.dma import Dma, DmaMemory
from vfio.iommu.mapper import Mapper
from vfio.iommu.slot import READ, WRITE, Slot
from vfio.iova import IovaAllocator

if TYPE_CHECKING:
    from vfio.iommu.registration import Region, User
    from vfio.iommu.spapr import Spapr

_IDLE = 64
"""How many unmapped slots of one length are kept ready."""


class DmaWindow(Closing):
    """A DMA window of a sPAPR container: `size` bytes of IOVA from `start`, in pages of `page_size` bytes.

    Every mapping is checked against the window before the kernel is asked: real kernels overwrite their own memory when
    a MAP runs past a window's end, and POWER8 hosts hang when the first page of a MAP at IOVA 0 fails.
    """

    def __init__(self, iommu: Spapr, start: int, size: int, page_size: int, levels: int, default: bool) -> None:
        self.iommu = iommu
        self.start = start
        self.size = size
        self.page_size = page_size
        self.levels = levels
        self.default = default
        """Whether it is the 32-bit window that the platform gives by default; the kernel makes it when first used."""
        self.mappers: list[Mapper] = []
        self._free: IovaAllocator | None = IovaAllocator(start, size)
        # Mapping is kept fast by what follows: slots that were unmapped wait here for the next mapping of their length,
        # and the region of the last mapping is looked at first. Each step is atomic under the interpreter's lock.
        self._idle: dict[int, list[Slot]] = {}
        self._live: dict[int, Dma] = {}
        self._last: Region | None = None
        self._offset_mask = page_size - 1
        self._settled = not default

    @property
    def end(self) -> int:
        """The first IOVA behind the window."""
        return self.start + self.size

    @property
    def closed(self) -> bool:
        return self._free is None

    @property
    def mapped(self) -> list[Dma]:
        """What is mapped, in the order in which it was."""
        return list(self._live.values())

    @property
    def largest_free(self) -> int:
        """Length in bytes of the largest range of IOVA that is free."""
        with self.iommu.lock:
            self._let_go_of_idle()
            return self.allocator.largest

    def map(self, memory: DmaMemory, iova: int | None = None, *, read: bool = True, write: bool = True) -> Dma:
        """Map `memory` at `iova`, or wherever there is room but not at 0; closing the result unmaps it.

        Address, length and IOVA are bytes, multiples of the window's page.  `read` and `write` are the device's rights;
        POWER hardware lets a device read whatever it may write.

        Raises `errors.Misaligned`, `errors.OutsideWindow`, `errors.AlreadyMapped`, `errors.NoSpace`; with v2
        `errors.NotRegistered` and `errors.PageTooLarge`; with v1 `errors.NotEnabled`; `errors.LockedMemoryLimit` where
        the table of the default window is charged and may not be.  On failure nothing of it stays mapped.
        """
        address, length = memory.address, memory.length
        if address & self._offset_mask or not (read or write):
            raise self._bad_request(address, length, iova)
        if iova is None and read and write:
            try:
                slot = self._idle[length].pop()
            except LookupError:
                slot = self._take(length, None)
        else:
            slot = self._take(length, iova, (READ if read else 0) | (WRITE if write else 0))
        region = self._last
        self._live[slot.iova] = dma = Dma(self, slot, memory, region)
        try:
            # The mapping is in the list before its region is looked at; who unregisters does it the other way round.
            if region is None or not region.holds(address, length):
                region = self.iommu.claim(self, memory, dma)
                self.settle(slot)
                self._last = region
            slot.map(address)
        except BaseException:
            self._forget(dma, slot)
            raise
        memory.dma = dma
        return dma

    def mapper(self, memory: DmaMemory, slots: int, length: int | None = None) -> Mapper:
        """Prepare to map pieces of `memory` again and again, fast; see `Mapper`.

        `slots` is how many pieces can be mapped at a time, `length` the bytes of one (default: one page of the window).
        """
        return Mapper(self, memory, slots, length or self.page_size)

    def close(self) -> None:
        """Unmap what is mapped and remove the window from the container (v2; v1 keeps its only window)."""
        with self.iommu.lock:
            if self._free is None:
                return
            self.unmap_all()
            self.iommu.remove_window(self)
            self.gone()

    def unmap_all(self) -> None:
        """Unmap everything, newest first."""
        with self.iommu.lock:
            for mapper in reversed(self.mappers[:]):
                mapper.close()
            for dma in reversed(self.mapped):
                dma.close()

    # --- for the IOMMU, its mappings and its mappers ---

    @property
    def allocator(self) -> IovaAllocator:
        """The free IOVA; raises `errors.Closed` when the window is."""
        if self._free is None:
            raise errors.Closed(f"{self}")
        return self._free

    def settle(self, slot: Slot) -> None:
        """See to it that the kernel has made the window, by unmapping the still empty `slot`.

        The kernel makes the default window when it is first used, and two threads that use it first together make it
        twice: on pseries it then follows a null pointer, on powernv it loses one of the tables with what is mapped.
        """
        if not self._settled:
            with self.iommu.lock:
                if not self._settled:
                    slot.unmap()
                    self._settled = True

    def unmap(self, dma: Dma, slot: Slot) -> None:
        """What closing a mapping does."""
        slot.unmap()
        self._forget(dma, slot)

    def reserve(self, length: int, iova: int | None) -> int:
        """Take a range of IOVA: `iova`, or any but 0; the lock is held."""
        if length <= 0 or (length | (iova or 0)) & self._offset_mask:
            raise self._bad_request(0, length, iova)
        free = self.allocator
        if iova is None:
            found = free.allocate(length, self.page_size)
            if found is None:
                self._let_go_of_idle()
                found = free.allocate(length, self.page_size)
            if found is None:
                raise errors.NoSpace(f"cannot map in {self}", length, free.largest)
            return found
        if iova < self.start or iova + length > self.end:
            raise errors.OutsideWindow(f"cannot map in {self}", iova, length, [str(self)])
        if not free.reserve(iova, length):
            self._let_go_of_idle()
            if not free.reserve(iova, length):
                raise errors.AlreadyMapped(f"cannot map in {self}", iova, length)
        return iova

    def gone(self) -> None:
        """The kernel has destroyed the window."""
        for mapper in self.mappers[:]:
            mapper.gone()
        for dma in self.mapped:
            dma.gone()
        self._live.clear()
        self._idle.clear()
        self._free = None

    def uses(self, region: Region) -> int:
        """How many mappings point into `region`."""
        users: list[User] = [*self._live.values(), *self.mappers]
        return sum(region.used_by(user) for user in users)

    # --- how ---

    def _take(self, length: int, iova: int | None, flags: int = READ | WRITE) -> Slot:
        with self.iommu.lock:
            return Slot(self, self.reserve(length, iova), length, flags)

    def _forget(self, dma: Dma, slot: Slot) -> None:
        """The slot is unmapped: it is kept for the next mapping of its length, or its IOVA is free."""
        del self._live[slot.iova]
        dma.gone()
        if slot.reusable:
            idle = self._idle.get(slot.length)
            if idle is None:
                idle = self._idle.setdefault(slot.length, [])
            if len(idle) < _IDLE:
                idle.append(slot)
                return
        with self.iommu.lock:
            self.allocator.free(slot.iova, slot.length)

    def _let_go_of_idle(self) -> None:
        for idle in self._idle.values():
            while idle:
                slot = idle.pop()
                self.allocator.free(slot.iova, slot.length)

    def _bad_request(self, address: int, length: int, iova: int | None) -> Exception:
        if not (address | length | (iova or 0)) & self._offset_mask and length > 0:
            return ValueError("a mapping that the device may neither read nor write is no mapping")
        values = f"address {address:#x}, length {length:#x}" + ("" if iova is None else f", IOVA {iova:#x}")
        return errors.Misaligned(f"cannot map in {self}", values, self.page_size, "the window's pages")

    def __str__(self) -> str:
        kind = "default window" if self.default else "window"
        pages = f"{errors.size(self.size)} in pages of {errors.size(self.page_size)}"
        return f"{kind} {errors.span(self.start, self.size)} ({pages})"

    def __repr__(self) -> str:
        return f"<DmaWindow {self}{', closed' if self.closed else ''}>"
