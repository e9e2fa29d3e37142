"""DMA window: a range of IOVA that devices may reach, and the TCE table behind it."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfio import errors, uapi
from vfio.closing import Closing
from vfio.dma import Dma, HasAddress, MemoryRange
from vfio.iova import IovaAllocator

if TYPE_CHECKING:
    from vfio.iommu.registration import Region
    from vfio.iommu.spapr import Spapr

_READ, _WRITE = uapi.VFIO_DMA_MAP_FLAG_READ, uapi.VFIO_DMA_MAP_FLAG_WRITE


class DmaWindow(Closing):
    """A DMA window of a sPAPR container: `size` bytes of IOVA from `start`, in pages of `page_size` bytes.

    Every mapping is checked against the window before the kernel is asked: real kernels overwrite their own memory when a
    MAP runs past a window's end, and POWER8 hosts hang when the first page of a MAP at IOVA 0 fails.
    """

    def __init__(self, iommu: Spapr, start: int, size: int, page_size: int, levels: int, default: bool) -> None:
        self.iommu = iommu
        self.start = start
        self.size = size
        self.page_size = page_size
        self.levels = levels
        self.default = default
        """Whether it is the 32-bit window that the platform gives by default; the kernel makes it when first used."""
        self._free: IovaAllocator | None = IovaAllocator(start, size)
        self._live: dict[int, tuple[Dma, Region | None, int]] = {}
        self._mappers: list[Mapper] = []
        backend, fd = iommu.backend, iommu.container.fd
        self._map_arg = uapi.vfio_iommu_type1_dma_map()
        self._map_call = backend.prepare(fd, uapi.VFIO_IOMMU_MAP_DMA, uapi.buffer(self._map_arg))
        self._unmap_arg = uapi.vfio_iommu_type1_dma_unmap()
        self._unmap_call = backend.prepare(fd, uapi.VFIO_IOMMU_UNMAP_DMA, uapi.buffer(self._unmap_arg))

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
        return [dma for dma, _, _ in self._live.values()]

    def map(self, memory: HasAddress, iova: int | None = None, *, read: bool = True, write: bool = True) -> Dma:
        """Map `memory` at `iova`, or at the lowest free IOVA but 0; closing the result unmaps it.

        Address, length and IOVA are bytes, multiples of the window's page.  `read` and `write` are the device's rights;
        POWER hardware lets a device read whatever it may write.

        Raises `errors.Misaligned`, `errors.OutsideWindow`, `errors.AlreadyMapped`, `errors.NoSpace`; with v2
        `errors.NotRegistered` and `errors.PageTooLarge`; with v1 `errors.NotEnabled`; `errors.LockedMemoryLimit` where
        the table of the default window is charged and may not be.  On failure nothing of it stays mapped.
        """
        if not (read or write):
            raise ValueError("a mapping that the device may neither read nor write is no mapping")
        flags = (_READ if read else 0) | (_WRITE if write else 0)
        address, length = memory.address, memory.length
        with self.iommu.lock:
            iova = self._reserve(address, length, iova)
            try:
                region = self.iommu.claim(self, memory)
                try:
                    self._map(address, iova, length, flags)
                except BaseException:
                    self.iommu.unclaim(region)
                    raise
            except BaseException:
                self._allocator.free(iova, length)
                raise
            dma = Dma(memory, iova, length, self._unmap_dma)
            self._live[iova] = (dma, region, flags)
            return dma

    def mapper(self, memory: HasAddress, slots: int, length: int | None = None) -> Mapper:
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
            for mapper in reversed(self._mappers[:]):
                mapper.close()
            for dma in reversed(self.mapped):
                dma.close()

    # --- what the IOMMU needs ---

    def gone(self) -> None:
        """The kernel has destroyed the window."""
        for dma, region, _ in self._live.values():
            self.iommu.unclaim(region)
            dma.gone()
        self._live.clear()
        for mapper in self._mappers[:]:
            mapper.gone()
        self._free = None

    def remap(self) -> None:
        """Map again what is mapped, in the same order: the kernel has emptied the table."""
        for dma, _, flags in self._live.values():
            self._map(dma.address, dma.iova, dma.length, flags)

    @property
    def has_mappers(self) -> bool:
        return bool(self._mappers)

    # --- how ---

    @property
    def _allocator(self) -> IovaAllocator:
        if self._free is None:
            raise errors.Closed(f"{self}")
        return self._free

    def _reserve(self, address: int, length: int, iova: int | None) -> int:
        """Check the three numbers and take the IOVA range."""
        page = self.page_size
        free = self._allocator
        if length <= 0 or (address | length | (iova or 0)) & (page - 1):
            raise errors.Misaligned(
                f"cannot map in {self}",
                f"address {address:#x}, length {length:#x}" + ("" if iova is None else f", IOVA {iova:#x}"),
                page,
                "the window's pages",
            )
        if iova is None:
            found = free.allocate(length, page)
            if found is None:
                raise errors.NoSpace(f"cannot map in {self}", length, free.largest)
            return found
        if iova < self.start or iova + length > self.end:
            raise errors.OutsideWindow(f"cannot map in {self}", iova, length, [str(self)])
        if not free.reserve(iova, length):
            raise errors.AlreadyMapped(f"cannot map in {self}", iova, length)
        return iova

    def _map(self, address: int, iova: int, length: int, flags: int) -> None:
        arg = self._map_arg
        arg.flags, arg.vaddr, arg.iova, arg.size = flags, address, iova, length
        try:
            answer = self._map_call()
        except OSError as error:
            raise self.iommu.map_error(self, error, address, iova, length) from error
        if answer:
            raise self._not_done("map", answer, iova, length)

    def _unmap(self, iova: int, length: int) -> None:
        arg = self._unmap_arg
        arg.iova, arg.size = iova, length
        try:
            answer = self._unmap_call()
        except OSError as error:
            raise self.iommu.unmap_error(self, error, iova, length) from error
        if answer:
            raise self._not_done("unmap", answer, iova, length)

    def _unmap_dma(self, dma: Dma) -> None:
        with self.iommu.lock:
            if self._live.get(dma.iova, (None,))[0] is not dma:
                raise errors.NotMapped(f"cannot unmap from {self}", dma.iova, dma.length)
            self._unmap(dma.iova, dma.length)
            _, region, _ = self._live.pop(dma.iova)
            self.iommu.unclaim(region)
            self._allocator.free(dma.iova, dma.length)

    def _not_done(self, verb: str, answer: int, iova: int, length: int) -> errors.VfioError:
        """The kernel answers +1 for an IOVA that is not a multiple of the window's page: nothing was done."""
        return errors.UnexpectedAnswer(
            errno.EINVAL,
            f"cannot {verb} IOVA {errors.span(iova, length)} in {self}",
            f"the kernel answered {answer}, and did nothing",
        )

    def __str__(self) -> str:
        kind = "default window" if self.default else "window"
        return f"{kind} {errors.span(self.start, self.size)} ({errors.size(self.size)} in pages of {errors.size(self.page_size)})"

    def __repr__(self) -> str:
        return f"<DmaWindow {self}{', closed' if self.closed else ''}>"


class Mapper(Closing):
    """Maps pieces of one buffer into slots of one IOVA range, for hot loops.

    Everything is checked when it is made: the range, the memory, the registration.  A call then fills two fields of a
    struct that it keeps and makes the ioctl.  Use one for each thread.

        with window.mapper(buffer, slots=32) as mapper:
            mapper.map(slot, piece)        # IOVA mapper.iovas[slot] -> memory mapper.addresses[piece]
            mapper.unmap(slot)
    """

    def __init__(self, window: DmaWindow, memory: HasAddress, slots: int, length: int) -> None:
        if slots < 1:
            raise ValueError(f"{slots} slots: at least one is needed")
        self.window = window
        self.memory = memory
        with window.iommu.lock:
            whole = MemoryRange(memory.address, memory.length // length * length)
            if memory.length < length:
                raise errors.Misaligned(f"cannot map in {window}", f"length {memory.length:#x}", length, "pieces")
            start = window._reserve(whole.address, slots * length, None)
            try:
                self._region = window.iommu.claim(window, memory)
            except BaseException:
                window._allocator.free(start, slots * length)
                raise
            window._mappers.append(self)
        self.iovas = range(start, start + slots * length, length)
        """The IOVA of each slot."""
        self.addresses = range(whole.address, whole.address + whole.length, length)
        """The address of each piece of the memory."""
        backend, fd = window.iommu.backend, window.iommu.container.fd
        self._map_arg = uapi.vfio_iommu_type1_dma_map(flags=_READ | _WRITE, size=length)
        self._map_call = backend.prepare(fd, uapi.VFIO_IOMMU_MAP_DMA, uapi.buffer(self._map_arg))
        self._unmap_arg = uapi.vfio_iommu_type1_dma_unmap(size=length)
        self._unmap_call = backend.prepare(fd, uapi.VFIO_IOMMU_UNMAP_DMA, uapi.buffer(self._unmap_arg))
        self._open = True

    def map(self, slot: int, piece: int) -> None:
        """Map the piece number `piece` of the memory into `slot`, in place of what was there.

        Raises IndexError for a slot or a piece that there is not, and what `DmaWindow.map` raises from the kernel.
        """
        arg = self._map_arg
        arg.iova = self.iovas[slot]
        arg.vaddr = self.addresses[piece]
        try:
            if not self._map_call():
                return
        except OSError as error:
            raise self.window.iommu.map_error(self.window, error, arg.vaddr, arg.iova, arg.size) from error
        raise self.window._not_done("map", 1, arg.iova, arg.size)

    def unmap(self, slot: int) -> None:
        """Unmap `slot`; harmless when nothing is mapped there."""
        arg = self._unmap_arg
        arg.iova = self.iovas[slot]
        try:
            if not self._unmap_call():
                return
        except OSError as error:
            raise self.window.iommu.unmap_error(self.window, error, arg.iova, arg.size) from error
        raise self.window._not_done("unmap", 1, arg.iova, arg.size)

    def close(self) -> None:
        """Unmap all slots and give the IOVA range back."""
        with self.window.iommu.lock:
            if not self._open:
                return
            length = self.iovas.stop - self.iovas.start
            self.window._unmap(self.iovas.start, length)
            self.window._allocator.free(self.iovas.start, length)
            self.gone()

    def gone(self) -> None:
        """The window is no more."""
        self._open = False
        self.iovas = range(0)  # a late call finds no slot
        self.window.iommu.unclaim(self._region)
        self.window._mappers.remove(self)
