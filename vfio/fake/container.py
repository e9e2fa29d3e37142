"""Containers: what groups are put into to share an IOMMU driver's instance.  (drivers/vfio/container.c)"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfio import uapi
from vfio.fake.file import File
from vfio.fake.kernel_error import fail
from vfio.fake.noiommu import NoIommuDriver
from vfio.fake.type1 import Type1

if TYPE_CHECKING:
    from vfio.fake.core import VfioCore
    from vfio.fake.group import VfioGroup
    from vfio.fake.iommu_driver import IommuDriver
    from vfio.fake.process import Process
    from vfio.fake.user import Argument

_GET_API_VERSION = 0
_CHECK_EXTENSION = uapi.VFIO_CHECK_EXTENSION - uapi.VFIO_GET_API_VERSION
_SET_IOMMU = uapi.VFIO_SET_IOMMU - uapi.VFIO_GET_API_VERSION


class Container:
    """A container.  It lives as long as it is open or has a group."""

    def __init__(self, core: VfioCore, number: int, opener: Process) -> None:
        self.core = core
        self.number = number
        """For people: containers are counted from 0 since boot."""
        self.opener = opener
        self.groups: list[VfioGroup] = []
        """Newest first."""
        self.noiommu = False
        """Whether its groups have no IOMMU."""
        self.iommu: IommuDriver | None = None
        """The IOMMU driver's instance, between SET_IOMMU and the detaching of the last group."""
        self._references = 1
        core.containers.append(self)

    def get(self) -> None:
        self._references += 1

    def put(self) -> None:
        self._references -= 1
        if not self._references:
            self.core.containers.remove(self)

    def check_extension(self, extension: int) -> int:
        """VFIO_CHECK_EXTENSION: asks every driver until an instance of one is set."""
        if isinstance(self.iommu, Type1):
            return self.iommu.extension(extension)
        if self.iommu:
            return self.iommu.check_extension(self.core.machine, extension)
        return next(
            (
                answer
                for driver in self._drivers(self.noiommu if self.groups else None)
                if (answer := driver.check_extension(self.core.machine, extension))
            ),
            0,
        )

    def _drivers(self, noiommu: bool | None) -> list[type[IommuDriver]]:
        """Those that may drive a container with, or without, an IOMMU; None for one that can still become either."""
        real = [] if noiommu else self.core.iommu_drivers
        return [*real, *([] if noiommu is False else [NoIommuDriver])]

    def set_iommu(self, process: Process, kind: int) -> None:
        """VFIO_SET_IOMMU.  The errno of the last driver that claims the type, or ENODEV if none does."""
        if not self.groups or self.iommu:
            raise fail(errno.EINVAL)
        error = fail(errno.ENODEV)
        for driver in self._drivers(self.noiommu):
            if driver.check_extension(self.core.machine, kind) <= 0:
                continue
            try:
                if driver is NoIommuDriver and not process.sys_rawio:
                    raise fail(errno.EPERM)
                instance = driver.open(self.core, kind)
            except OSError as refused:
                error = refused
                continue
            try:
                for group in self.groups:
                    instance.attach_group(group.claimed)
            except OSError as refused:
                instance.release()
                error = refused
                continue
            self.iommu = instance
            return
        raise error

    def attach_group(self, group: VfioGroup) -> None:
        """Take a group in: its DMA is the user's from now on.  EPERM if the group is not viable."""
        iommu_group = group.claimed
        if self.groups and self.noiommu != group.noiommu:
            raise fail(errno.EPERM)
        if not group.noiommu:
            iommu_group.claim_dma_owner(group)
        if self.iommu:
            try:
                self.iommu.attach_group(iommu_group)
            except OSError:
                iommu_group.release_dma_owner()
                raise
        self.noiommu = group.noiommu
        group.container, group.container_users = self, 1
        self.groups.insert(0, group)
        self.get()

    def detach_group(self, group: VfioGroup) -> None:
        """Let a group go: its DMA is the host's again.  With the last one the driver's instance ends."""
        if self.iommu:
            self.iommu.detach_group(group.claimed)
        group.claimed.release_dma_owner()
        group.container, group.container_users = None, 0
        self.groups.remove(group)
        if self.iommu and not self.groups:
            self.iommu.release()
            self.iommu = None
        self.put()


class ContainerFile(File):
    """An open /dev/vfio/vfio."""

    link = "/dev/vfio/vfio"

    def __init__(self, container: Container) -> None:
        super().__init__()
        self.container = container

    def release(self) -> None:
        self.container.put()

    def ioctl(self, process: Process, n: int | None, argument: Argument) -> int:
        iommu = self.container.iommu
        if n == _GET_API_VERSION:
            return uapi.VFIO_API_VERSION
        if n == _CHECK_EXTENSION:
            return self.container.check_extension(argument.value)
        if n == _SET_IOMMU:
            self.container.set_iommu(process, argument.value)
            return 0
        if iommu is None:
            raise fail(errno.EINVAL)
        return iommu.ioctl(process, n, argument)
