"""The driver of groups without an IOMMU: nothing can be mapped.  (drivers/vfio/container.c)

From the kernel's source alone: the lab's kernels are built without it.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfio import uapi
from vfio.fake.kernel_error import fail

if TYPE_CHECKING:
    from vfio.fake.core import VfioCore
    from vfio.fake.iommu_group import IommuGroup
    from vfio.fake.machine import Machine
    from vfio.fake.process import Process
    from vfio.fake.user import Argument


class NoIommuDriver:
    """One instance."""

    def __init__(self) -> None:
        self.groups: list[IommuGroup] = []

    @staticmethod
    def check_extension(machine: Machine, extension: int) -> int:
        return int(machine.vfio.noiommu and extension == uapi.VFIO_NOIOMMU_IOMMU)

    @classmethod
    def open(cls, core: VfioCore, kind: int) -> NoIommuDriver:
        return cls()

    def release(self) -> None:
        """Nothing was mapped."""

    def attach_group(self, group: IommuGroup) -> None:
        self.groups.insert(0, group)

    def detach_group(self, group: IommuGroup) -> None:
        self.groups.remove(group)

    def ioctl(self, process: Process, n: int | None, argument: Argument) -> int:
        raise fail(errno.ENOTTY)
