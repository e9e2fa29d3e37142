"""sPAPR TCE version 1: one group a container, one window, memory pinned at each MAP."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar, NoReturn

from vfio import errors, uapi
from vfio.dma import Dma, DmaMemory
from vfio.iommu.registration import User
from vfio.iommu.spapr import Spapr, no_module, platform_name
from vfio.iommu.window import DmaWindow

if TYPE_CHECKING:
    from vfio.container import Container


class SpaprTce(Spapr):
    """sPAPR TCE v1: one group, one window of 4 KiB pages, `enable` before anything is mapped."""

    name: ClassVar[str] = "sPAPR TCE v1"
    extension: ClassVar[int] = uapi.VFIO_SPAPR_TCE_IOMMU

    def __init__(self, container: Container) -> None:
        super().__init__(container)
        self._enabled = False

    @classmethod
    def explain_refusal(cls, container: Container, error: OSError) -> tuple[str, str]:
        if error.errno == errno.EBUSY and len(container.groups) > 1:
            return (
                f"it takes one group a container, and there are {len(container.groups)}",
                "use v2, or a container a group",
            )
        return no_module(error)

    def enable(self) -> None:
        """Allow mapping.  Charges the size of the whole window (commonly 1 or 2 GiB) to locked memory.

        Raises `errors.LockedMemoryLimit`; `errors.CallFailed` with EBUSY when it is enabled, EPERM where the platform
        has no 32-bit window.
        """
        what = f"cannot enable {self.name}"
        with self.lock:
            try:
                self.backend.ioctl(self.container.fd, uapi.VFIO_IOMMU_ENABLE)
            except OSError as error:
                if error.errno == errno.ENOMEM:
                    raise self._no_memory(what, self.info.window_size) from error
                why = {errno.EBUSY: "it is enabled already", errno.EPERM: "the platform has no 32-bit DMA window"}
                raise errors.CallFailed(error.errno or errno.EIO, what, why.get(error.errno or 0, "")) from error
            self._enabled = True

    def disable(self) -> None:
        """Unmap what is mapped, and give back what `enable` charged; harmless when it is not enabled.

        The kernel itself would leave mappings in place, reachable by devices, when it is disabled.
        """
        with self.lock:
            if self._enabled:
                super().close()
                self.backend.ioctl(self.container.fd, uapi.VFIO_IOMMU_DISABLE)
                self._enabled = False

    @property
    def enabled(self) -> bool:
        return self._enabled

    def map(self, memory: DmaMemory, iova: int | None = None, *, read: bool = True, write: bool = True) -> Dma:
        """`DmaWindow.map` in the window; enables the container first where that is still to be done."""
        with self.lock:
            if not self._enabled:
                self.enable()
            return self.map_somewhere(memory, iova, read, write)

    def claim(self, window: DmaWindow, memory: DmaMemory, user: User) -> None:
        """v1 pins at MAP, writable whatever the flags.  A first page that fails at IOVA 0 hangs POWER8: fill it in now."""
        what = f"cannot map {errors.size(memory.length)} at {memory.address:#x}"
        if not self._enabled:
            raise errors.NotEnabled(what)
        try:
            self.backend.populate(memory.address, memory.length)
        except OSError as error:
            why = "some of the memory is not there, is read-only, or is device memory"
            raise errors.CallFailed(errno.EFAULT, what, why) from error

    def create_window(self, size: int, page_size: int | None = None, levels: int | None = None) -> NoReturn:
        """Raises `errors.CallFailed` (ENOTTY), which says whether it is the platform that has no dynamic windows, or v1."""
        raise self._one_window(f"cannot create a DMA window of {errors.size(size)}")

    def register(self, memory: DmaMemory) -> NoReturn:
        """Raises `errors.CallFailed` (ENOTTY), as `create_window`: memory is registered for dynamic windows."""
        raise self._one_window(f"cannot register {errors.size(memory.length)}", "iommu.map(memory) pins it")

    def remove_window(self, window: DmaWindow) -> None:
        raise self._one_window(f"cannot remove the {window}")

    def _one_window(
        self, what: str, remedy: str = "map in the window that there is: iommu.map(memory)"
    ) -> errors.VfioError:
        """What needs a dynamic window was asked for."""
        name = platform_name(self.backend)
        no_windows = f"{name} has no Dynamic DMA Windows"
        if "IODA1" in name or any(no_windows in text for text in self.passed_over):
            why = f"{no_windows}, and {self.name} has its one window only"
            return errors.CallFailed(errno.ENOTTY, what, why, remedy)
        return errors.CallFailed(errno.ENOTTY, what, f"{self.name} has the one window of {name}", "use v2")

    def close(self) -> None:
        with self.lock:
            super().close()
            self.disable()
