"""What both versions of the sPAPR TCE IOMMU of POWER share: windows, and what is mapped in them.

Kernel document: "VFIO - Virtual Function I/O", section "PPC64 sPAPR implementation note".  Source:
drivers/vfio/vfio_iommu_spapr_tce.c.

Version 1 has one group a container and one window, and pins memory at each MAP; ENABLE charges the whole window to
locked memory.  Version 2 registers memory first, which pins and charges it once; MAP then only writes TCEs, in up to
two windows whose size, page size and table levels the process chooses.
"""

from __future__ import annotations

import errno
import re
from abc import abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from vfio import errors, uapi
from vfio.backend import Backend
from vfio.dma import Dma, DmaMemory
from vfio.iommu import registration, tce
from vfio.iommu.mapper import Mapper
from vfio.iommu.model import Iommu
from vfio.iommu.window import DmaWindow

if TYPE_CHECKING:
    from vfio.container import Container

_DEFAULT_PAGE = 4096  # the default window has 4 KiB pages everywhere
_DEFAULT_LEVELS = 1


class SpaprInfo(NamedTuple):
    """VFIO_IOMMU_SPAPR_TCE_GET_INFO; sizes in bytes."""

    window_start: int
    """IOVA at which the default window begins."""
    window_size: int
    page_sizes: tuple[int, ...]
    """Page sizes that a window can have; empty without Dynamic DMA Windows."""
    max_windows: int
    """How many windows there can be at a time; 0 without Dynamic DMA Windows."""
    levels: int
    """How many levels a TCE table can have; 1 is a PAPR guest, whose windows the firmware makes."""


class Spapr(Iommu):
    """What both versions share: the windows, and what is mapped in them."""

    def explain_attach(self, error: OSError) -> tuple[str, str]:
        why = {
            errno.EPERM: "its windows cannot be shared with the groups that are in",
            errno.EBUSY: f"{self.name} takes one group a container",
        }.get(error.errno or 0, "")
        return why, "use a container of its own" if why else ""

    def __init__(self, container: Container) -> None:
        super().__init__(container)
        found = uapi.vfio_iommu_spapr_tce_info()
        try:
            self.backend.ioctl(container.fd, uapi.VFIO_IOMMU_SPAPR_TCE_GET_INFO, uapi.buffer(found))
        except OSError as error:
            raise errors.CallFailed(error.errno or errno.EIO, f"{self.name} does not answer GET_INFO") from error
        masks = found.ddw.pgsizes if found.flags & uapi.VFIO_IOMMU_SPAPR_INFO_DDW else 0
        self.info = SpaprInfo(
            found.dma32_window_start,
            found.dma32_window_size,
            tuple(1 << shift for shift in range(64) if masks >> shift & 1),
            found.ddw.max_dynamic_windows_supported if masks else 0,
            found.ddw.levels if masks else 0,
        )
        start, size = self.info.window_start, self.info.window_size
        default = DmaWindow(self, start, size, _DEFAULT_PAGE, _DEFAULT_LEVELS, default=True)
        self._windows: list[DmaWindow] = [default] if size else []

    @property
    def windows(self) -> list[DmaWindow]:
        """The windows that memory can be mapped in, the default one first."""
        return [window for window in self._windows if not window.closed]

    @abstractmethod
    def claim(self, window: DmaWindow, memory: DmaMemory, user: registration.User) -> registration.Region | None:
        """Make sure that MAP of `memory` in `window` will find every page, and note that `user` points there."""

    @abstractmethod
    def remove_window(self, window: DmaWindow) -> None:
        """Take the window from the container."""

    def map_somewhere(self, memory: DmaMemory, iova: int | None, read: bool, write: bool) -> Dma:
        """Map in the window that has `iova`, or in the first that has room."""
        windows, full = self.windows, None
        for window in windows:
            if iova is None:
                try:
                    return window.map(memory, read=read, write=write)
                except errors.NoSpace as error:
                    full = error
            elif window.start <= iova < window.end:
                return window.map(memory, iova, read=read, write=write)
        if full:
            raise full
        what = f"cannot map {errors.size(memory.length)}"
        raise errors.OutsideWindow(what, iova or 0, memory.length, [str(window) for window in windows])

    def map_error(self, window: DmaWindow, error: OSError, address: int, iova: int, length: int) -> errors.VfioError:
        """What a failed MAP means."""
        what = f"cannot map {errors.size(length)} at {address:#x} to IOVA {iova:#x} in {window}"
        if error.errno == errno.ENXIO:
            return errors.OutsideWindow(what, iova, length, [str(window) for window in self.windows])
        if error.errno == errno.ENOMEM:
            return self._no_memory(what, self._charge(window))
        if error.errno == errno.EFAULT:
            return errors.CallFailed(
                error.errno, what, "some of the memory is not there, is read-only, or is device memory"
            )
        if error.errno == errno.EPERM:
            return errors.CallFailed(error.errno, what, "the kernel does not let this process map in this container")
        return errors.CallFailed(error.errno or errno.EIO, what)

    def unmap_error(self, window: DmaWindow, error: OSError, iova: int, length: int) -> errors.VfioError:
        """What a failed UNMAP means."""
        what = f"cannot unmap IOVA {errors.span(iova, length)} in {window}"
        if error.errno == errno.EPERM:
            return errors.CallFailed(error.errno, what, "the container belongs to another process, or is not enabled")
        if error.errno == errno.ENOMEM:
            return self._no_memory(f"cannot use the {window}", self._charge(window))
        return errors.CallFailed(error.errno or errno.EIO, what)

    def check_detach(self) -> None:
        for window in self.windows:
            lost = [mapper for mapper in window.mappers if not mapper.restorable]
            if lost:
                raise errors.StillMapped("cannot detach a group: that empties the windows", len(lost))

    def remap(self) -> None:
        failed: OSError | None = None
        for window in self.windows:
            users: list[Dma | Mapper] = [*window.mapped, *window.mappers]
            for each in users:
                try:
                    each.remap()
                except OSError as error:  # no reason to leave the rest out of reach
                    failed = failed or error
        if failed:
            raise failed

    def gone(self) -> None:
        for window in self.windows:
            window.gone()

    def close(self) -> None:
        for window in reversed(self.windows):
            window.unmap_all()

    def _no_memory(self, what: str, needed: int) -> errors.VfioError:
        account = self.backend.locked()
        if account.unlimited or account.limit is None or account.locked + needed <= account.limit:
            return errors.CallFailed(errno.ENOMEM, what, "the host has no memory for it")
        return errors.LockedMemoryLimit(what, needed, account.locked, account.limit)

    def _charge(self, window: DmaWindow) -> int:
        """Bytes of locked memory that the window's table costs."""
        if self.info.levels == 1:
            return window.size // window.page_size * tce.TCE
        return tce.Shape(window.size, window.page_size, window.levels, self.backend.page_size).charged


class Platform(NamedTuple):
    """A POWER host."""

    cpu: str
    """For example POWER8."""
    name: str
    """PowerNV, pSeries; POWER where it is not told."""


def platform(backend: Backend) -> Platform | None:
    """What /proc/cpuinfo calls this host; None where it is no POWER."""
    try:
        lines = backend.read_text("/proc/cpuinfo").splitlines()
    except OSError:
        return None
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    cpu = re.match(r"POWER\d+", found.get("cpu", ""))
    return Platform(cpu[0], found.get("platform", "POWER")) if cpu else None


def platform_name(backend: Backend) -> str:
    """The platform, for messages; POWER7's bridges are IODA1, which has no dynamic windows."""
    found = platform(backend)
    if found is None:
        return "this platform"
    ioda1 = ", IODA1" if found == ("POWER7", "PowerNV") else ""
    return f"{found.cpu} ({found.name}{ioda1})"


def no_module(error: OSError) -> tuple[str, str]:
    """Why SET_IOMMU said ENODEV."""
    if error.errno == errno.ENODEV:
        return "the kernel has no such IOMMU model", "modprobe vfio_iommu_spapr_tce (POWER only)"
    return "", ""
