"""What the core asks of an IOMMU driver: the kernel's struct vfio_iommu_driver_ops.  (drivers/vfio/vfio.h)"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vfio.fake.core import VfioCore
    from vfio.fake.iommu_group import IommuGroup
    from vfio.fake.machine import Machine
    from vfio.fake.process import Process
    from vfio.fake.user import Argument


class IommuDriver(Protocol):
    """One instance: what a container has between SET_IOMMU and the detaching of its last group."""

    @staticmethod
    def check_extension(machine: Machine, extension: int) -> int:
        """VFIO_CHECK_EXTENSION: more than 0 for what this driver has."""

    @classmethod
    def open(cls, core: VfioCore, kind: int) -> IommuDriver:
        """An instance of the type that SET_IOMMU names."""

    def release(self) -> None:
        """The container has no group any more."""

    def attach_group(self, group: IommuGroup) -> None:
        """Let a group use what is mapped; raises what the kernel answers, with nothing changed."""

    def detach_group(self, group: IommuGroup) -> None:
        """Take what is mapped from a group."""

    def ioctl(self, process: Process, n: int | None, argument: Argument) -> int:
        """The request VFIO_BASE + `n`, which the core does not know itself."""
