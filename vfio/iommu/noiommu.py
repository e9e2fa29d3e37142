"""No IOMMU at all: a device of a host without one, in its group ``/dev/vfio/noiommu-N``.

Nothing keeps such a device from the host's memory.  The kernel has this mode for drivers in user space that are trusted as
the kernel is: root turns it on (module parameter enable_unsafe_noiommu_mode of vfio), CAP_SYS_RAWIO is needed to use it, and
the kernel is tainted by it.  `vfio bind` does not do it for anybody; by hand it is

    echo Y > /sys/module/vfio/parameters/enable_unsafe_noiommu_mode
    echo vfio-pci > /sys/bus/pci/devices/ADDRESS/driver_override
    echo ADDRESS > /sys/bus/pci/drivers_probe

and from then on `open_device` opens it, with a warning.  Source: drivers/vfio/container.c, group.c.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar, NoReturn

from vfio import errors, uapi
from vfio.iommu.model import Iommu

if TYPE_CHECKING:
    from vfio.dma import Dma, DmaMemory


class UnsafeWarning(UserWarning):
    """A device was opened that no IOMMU keeps from the host's memory."""


WARNING = (
    "group {number} has no IOMMU (/dev/vfio/noiommu-{number}): its device can read and write all memory of the host, "
    "whatever this program maps; a wrong address given to it corrupts the kernel. Use it only for a driver that is "
    "trusted as the kernel is, and never to give a device to a virtual machine"
)


class NoIommu(Iommu):
    """The IOMMU that is not there: registers and interrupts work, and nothing can be mapped."""

    name: ClassVar[str] = "no-IOMMU"
    extension: ClassVar[int] = uapi.VFIO_NOIOMMU_IOMMU

    def map(self, memory: DmaMemory, iova: int | None = None, *, read: bool = True, write: bool = True) -> Dma:
        """Raises `errors.CallFailed` with ENOTTY: the device takes physical addresses, and reaches all of them."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise errors.CallFailed(
            errno.ENOTTY,
            "cannot map memory for DMA",
            "there is no IOMMU, and the device takes physical addresses",
            "turn on the host's IOMMU (intel_iommu=on, amd_iommu=on, iommu.passthrough=0) and bind the device again",
        )

    def check_detach(self) -> None:
        """Nothing is mapped."""

    def remap(self) -> None:
        """Nothing is mapped."""

    def gone(self) -> None:
        """Nothing is mapped."""

    def close(self) -> None:
        """Nothing is mapped."""
