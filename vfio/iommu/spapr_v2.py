"""sPAPR TCE version 2: memory is registered once and mapped often, in up to two windows of the process's choice."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar

from vfio import errors, uapi
from vfio.closing import Closing
from vfio.dma import Dma, DmaMemory, backing_page_size
from vfio.iommu import registration, tce
from vfio.iommu.spapr import Spapr, no_module, platform_name
from vfio.iommu.window import DmaWindow

if TYPE_CHECKING:
    from vfio.container import Container


class SpaprTceV2(Spapr):
    """sPAPR TCE v2: memory is registered, then mapped in up to two windows shared by all groups of the container."""

    name: ClassVar[str] = "sPAPR TCE v2"
    extension: ClassVar[int] = uapi.VFIO_SPAPR_TCE_v2_IOMMU

    def __init__(self, container: Container) -> None:
        super().__init__(container)
        self._book = registration.of(self.backend)
        self._book.windows.update(self._windows)
        self._enabled = False  # the kernel enables the container with its first registration, for good

    @classmethod
    def explain_refusal(cls, container: Container, error: OSError) -> tuple[str, str]:
        if error.errno == errno.EINVAL:
            name = platform_name(container.backend)
            return f"{name} has no Dynamic DMA Windows", "use v1: vfio.SpaprTce"
        return no_module(error)

    # --- memory ---

    def register(self, memory: DmaMemory) -> Registration:
        """Pin `memory` and charge it to locked memory, so that it can be mapped; closing the result undoes it.

        Address and length are bytes, multiples of the host page.  Raises `errors.Misaligned`,
        `errors.LockedMemoryLimit`; `errors.CallFailed` with EBUSY for a range that is registered here already, EINVAL
        for one that overlaps another registration of this process, EFAULT for memory that cannot be pinned;
        `errors.UnexpectedAnswer` (EFAULT) for a range with a hole.
        """
        address, length = memory.address, memory.length
        what = f"cannot register {errors.size(length)} at {address:#x}"
        if length <= 0 or (address | length) & (self.backend.page_size - 1):
            values = f"address {address:#x}, length {length:#x}"
            raise errors.Misaligned(what, values, self.backend.page_size, "host pages")
        page = min(backing_page_size(self.backend, memory), (address | length) & -(address | length))
        with self.lock, self._book.lock:
            region = self._book.overlapping(address, length)
            if region and (region.address, region.length) != (address, length):
                raise errors.CallFailed(errno.EINVAL, what, f"it overlaps {region.text}, which is registered")
            if region and self in region.holders:
                raise errors.CallFailed(errno.EBUSY, what, "it is registered already", "keep one registration of it")
            argument = uapi.vfio_iommu_spapr_register_memory(vaddr=address, size=length)
            try:
                request = uapi.VFIO_IOMMU_SPAPR_REGISTER_MEMORY
                answer = self.backend.ioctl(self.container.fd, request, uapi.buffer(argument))
            except OSError as error:
                raise self._register_error(what, error, length) from error
            if answer > 0:
                raise errors.UnexpectedAnswer(
                    errno.EFAULT,
                    what,
                    f"only its first {answer} page(s) could be pinned: the next is not there or is read-only",
                )
            if region is None:
                region = registration.Region(address, length, page)
                self._book.add(region)
            region.holders.add(self)
            self._enabled = True
            return Registration(self, region)

    def unregister(self, region: registration.Region) -> None:
        """What closing a `Registration` does.  Raises `errors.StillMapped` while some container maps the memory."""
        with self.lock, self._book.lock:
            if self not in region.holders:
                return
            what = f"cannot unregister {errors.size(region.length)} at {region.address:#x}"
            if len(region.holders) == 1:
                region.withdraw()  # no mapping begins from here on, so counting them is final
                if mapped := self._book.uses(region):
                    region.reinstate()
                    raise errors.StillMapped(what, mapped)
            argument = uapi.vfio_iommu_spapr_register_memory(vaddr=region.address, size=region.length)
            try:
                self.backend.ioctl(self.container.fd, uapi.VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY, uapi.buffer(argument))
            except OSError as error:
                region.reinstate()
                raise errors.CallFailed(error.errno or errno.EIO, what) from error
            self._book.release(region, self)

    def map(self, memory: DmaMemory, iova: int | None = None, *, read: bool = True, write: bool = True) -> Dma:
        """Map `memory` in the window that has `iova`, or in the first with room.

        Memory that is not registered is registered for as long as it is mapped.  Raises what `register` and
        `DmaWindow.map` raise; on failure nothing stays registered.
        """
        with self.lock:
            known = self._book.find(memory.address, memory.length)
            registered = None if known and self._enabled else self.register(memory)
            try:
                dma = self.map_somewhere(memory, iova, read, write)
            except BaseException:
                if registered:
                    registered.close()
                raise
            if registered:
                dma.on_unmapped(registered.close)
            return dma

    def claim(self, window: DmaWindow, memory: DmaMemory, user: registration.User) -> registration.Region:
        what = f"cannot map {errors.size(memory.length)} at {memory.address:#x}"
        with self._book.lock:
            region = self._book.find(memory.address, memory.length)
            if region is None or not self._enabled:
                raise errors.NotRegistered(what, memory.address, memory.length)
            if region.page_size < window.page_size:
                raise errors.PageTooLarge(what, window.page_size, region.page_size)
            user.region = region
            return region

    # --- windows ---

    def create_window(self, size: int, page_size: int | None = None, levels: int | None = None) -> DmaWindow:
        """Create a DMA window of `size` bytes (a power of two); the platform chooses where.

        `page_size` in bytes is one of `info.page_sizes` (default: the host page, or the next that there is); `levels` of the
        TCE table default to the fewest that work.  While the default window is in place the new one is far above 4 GiB;
        after it was removed the next one begins at IOVA 0.

        Raises `errors.NoFreeWindow`, `errors.BadWindow`, `errors.LockedMemoryLimit` (the table is charged),
        `errors.CallFailed` with what the platform said.  What would be refused after it was charged is not tried.
        """
        with self.lock:
            windows = self.windows
            if self.info.max_windows and len(windows) >= self.info.max_windows:
                raise errors.NoFreeWindow([str(window) for window in windows], self.info.max_windows)
            page = self._page_size(page_size)
            shape = tce.shape(size, page, levels, self.backend.page_size, self.info.levels)
            self._check_firmware(size)
            argument = uapi.vfio_iommu_spapr_tce_create(
                page_shift=page.bit_length() - 1, window_size=size, levels=shape.levels
            )
            try:
                self.backend.ioctl(self.container.fd, uapi.VFIO_IOMMU_SPAPR_TCE_CREATE, uapi.buffer(argument))
            except OSError as error:
                raise self._create_error(error, shape, windows) from error
            window = DmaWindow(self, argument.start_addr, size, page, shape.levels, default=False)
            self._windows.append(window)
            self._book.windows.add(window)
            return window

    @property
    def default_window(self) -> DmaWindow | None:
        """The platform's 32-bit window; None after it was removed."""
        return next((window for window in self.windows if window.default), None)

    def remove_window(self, window: DmaWindow) -> None:
        argument = uapi.vfio_iommu_spapr_tce_remove(start_addr=window.start)
        try:
            self.backend.ioctl(self.container.fd, uapi.VFIO_IOMMU_SPAPR_TCE_REMOVE, uapi.buffer(argument))
        except OSError as error:
            raise errors.CallFailed(error.errno or errno.EIO, f"cannot remove the {window}") from error

    def gone(self) -> None:
        super().gone()
        with self._book.lock:
            for region in self._book.held_by(self):
                self._book.release(region, self)

    def close(self) -> None:
        with self.lock:
            super().close()
            for window in reversed(self.windows):
                if not window.default:
                    window.close()
            for region in reversed(self._book.held_by(self)):
                self.unregister(region)

    def map_error(self, window: DmaWindow, error: OSError, address: int, iova: int, length: int) -> errors.VfioError:
        if error.errno == errno.EPERM and not self._enabled:
            return errors.NotRegistered(f"cannot map in {window}", address, length)
        if error.errno in (errno.EINVAL, errno.EPERM):
            what = f"cannot map {errors.size(length)} at {address:#x} to IOVA {iova:#x} in {window}"
            why = f"the kernel found smaller pages behind the memory than the window's {errors.size(window.page_size)}"
            return errors.PageTooLarge(what, window.page_size, self.backend.page_size, why)
        return super().map_error(window, error, address, iova, length)

    def _page_size(self, asked: int | None) -> int:
        sizes = self.info.page_sizes
        names = ", ".join(errors.size(page) for page in sizes)
        if asked is None:
            return next((page for page in sizes if page >= self.backend.page_size), sizes[-1])
        if asked not in sizes:
            raise errors.BadWindow(f"the platform has no pages of {errors.size(asked)}", f"page sizes: {names}")
        return asked

    def _check_firmware(self, size: int) -> None:
        """A PAPR guest's firmware refuses a window larger than memory, and the kernel keeps the charge of what it refused."""
        if self.info.levels != 1:
            return
        for line in self.backend.read_text("/proc/meminfo").splitlines():
            if line.startswith("MemTotal:"):
                memory = int(line.split()[1]) * 1024
                if size > 1 << (memory - 1).bit_length():
                    raise errors.BadWindow(
                        f"{errors.size(size)} are more than this partition's memory, which its firmware refuses",
                        f"size={1 << (memory - 1).bit_length():#x} or less",
                    )

    def _create_error(self, error: OSError, shape: tce.Shape, windows: list[DmaWindow]) -> errors.VfioError:
        what = (
            f"cannot create a DMA window of {errors.size(shape.window_size)} in pages of {errors.size(shape.page_size)}"
        )
        if error.errno == errno.ENOSPC:
            return errors.NoFreeWindow([str(window) for window in windows], self.info.max_windows)
        if error.errno == errno.ENOMEM:
            papr = shape.window_size // shape.page_size * tce.TCE
            return self._no_memory(what, papr if self.info.levels == 1 else shape.charged)
        why, remedy = "", ""
        if error.errno == errno.ENODEV and self.info.levels == 1:
            why = "the firmware refused a window of this device before, and the kernel does not try again"
            remedy = "reboot the partition"
        elif error.errno == errno.EPERM and self.info.levels == 1 and len(self.container.groups) > 1:
            why, remedy = "windows of a PAPR guest serve one group only", "use a container a group"
        return errors.CallFailed(error.errno or errno.EIO, what, why, remedy)

    def _register_error(self, what: str, error: OSError, length: int) -> errors.VfioError:
        if error.errno == errno.ENOMEM:
            return self._no_memory(what, length)
        why = ""
        if error.errno == errno.EFAULT:
            why = "the memory is not there, is read-only, or is device memory"
        elif error.errno == errno.EINVAL:
            why = "it overlaps memory that is registered, or that leaked from an earlier registration"
        elif error.errno == errno.EPERM:
            why = "the container belongs to another process"
        return errors.CallFailed(error.errno or errno.EIO, what, why)


class Registration(Closing):
    """Memory that is registered; closing it unregisters, and refuses while the memory is mapped."""

    def __init__(self, iommu: SpaprTceV2, region: registration.Region) -> None:
        self._iommu = iommu
        self._region = region
        self.address = region.address
        self.length = region.length

    @property
    def mapped(self) -> int:
        """How many mappings of this process point into it."""
        return registration.of(self._iommu.backend).uses(self._region)

    def close(self) -> None:
        """Unregister; harmless when done before.  Raises `errors.StillMapped`."""
        self._iommu.unregister(self._region)

    def __repr__(self) -> str:
        return f"<Registration {errors.span(self.address, self.length)}, {self.mapped} mapped>"
