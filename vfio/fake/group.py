"""VFIO groups: /dev/vfio/N.  (drivers/vfio/group.c)"""

from __future__ import annotations

import errno
import sys
from typing import TYPE_CHECKING

from vfio import uapi
from vfio.fake.container import ContainerFile
from vfio.fake.device_file import DeviceFile
from vfio.fake.file import File
from vfio.fake.kernel_error import fail

if TYPE_CHECKING:
    from vfio.fake.container import Container
    from vfio.fake.core import VfioCore
    from vfio.fake.device_file import VfioDevice
    from vfio.fake.iommu_group import IommuGroup
    from vfio.fake.process import Process
    from vfio.fake.user import Argument

_GET_STATUS = uapi.VFIO_GROUP_GET_STATUS - uapi.VFIO_GET_API_VERSION
_SET_CONTAINER = uapi.VFIO_GROUP_SET_CONTAINER - uapi.VFIO_GET_API_VERSION
_UNSET_CONTAINER = uapi.VFIO_GROUP_UNSET_CONTAINER - uapi.VFIO_GET_API_VERSION
_GET_DEVICE_FD = uapi.VFIO_GROUP_GET_DEVICE_FD - uapi.VFIO_GET_API_VERSION

_READ_WRITE = 6
_NATIVE = sys.byteorder


class VfioGroup:
    """A group with a device that a VFIO driver has; `uid`, `gid` and `mode` are those of its node, /dev/vfio/N."""

    def __init__(self, core: VfioCore, iommu_group: IommuGroup, minor: int) -> None:
        self.core = core
        self.number = iommu_group.number
        self.iommu_group: IommuGroup | None = iommu_group
        """None once its last device has left: what still has the group open gets ENODEV."""
        self.minor = minor
        self.noiommu = False
        """Whether it was made for a device without an IOMMU; then CAP_SYS_RAWIO is needed to use it."""
        self.uid = 0
        self.gid = 0
        self.mode = 0o600
        self.devices: list[VfioDevice] = []
        """Those that can be opened, newest first."""
        self.drivers = 0
        """How many devices keep the group alive; one that is being removed still does."""
        self.container: Container | None = None
        self.container_users = 0
        """1 for being in a container, and 1 more for each device that is open."""
        self.opened_file: GroupFile | None = None

    @property
    def node(self) -> str:
        """The name of its node in /dev/vfio."""
        return f"{'noiommu-' if self.noiommu else ''}{self.number}"

    @property
    def claimed(self) -> IommuGroup:
        """The IOMMU group; ENODEV once it is gone."""
        if self.iommu_group is None:
            raise fail(errno.ENODEV)
        return self.iommu_group

    def open(self, process: Process) -> GroupFile:
        """Open the node: EACCES by its mode, EBUSY while it is open (duplicates of one file do not count)."""
        if not process.may(_READ_WRITE, self.uid, self.gid, self.mode):
            raise fail(errno.EACCES)
        self.check_allowed(process)
        if self.opened_file:
            raise fail(errno.EBUSY)
        self.opened_file = GroupFile(self)
        return self.opened_file

    def check_allowed(self, process: Process) -> None:
        """EPERM for a process that may not reach all of the machine: without an IOMMU, the device can."""
        if self.noiommu and not process.sys_rawio:
            raise fail(errno.EPERM)

    def set_container(self, process: Process, file: File | None) -> None:
        """VFIO_GROUP_SET_CONTAINER; `file` is None for one that is not the model's."""
        if self.container:
            raise fail(errno.EINVAL)
        if self.iommu_group is None:
            raise fail(errno.ENODEV)
        if not isinstance(file, ContainerFile):
            raise fail(errno.EBADFD)
        self.check_allowed(process)
        file.container.attach_group(self)

    def unset_container(self) -> None:
        """VFIO_GROUP_UNSET_CONTAINER: EINVAL without one, EBUSY while a device is open."""
        if not self.container:
            raise fail(errno.EINVAL)
        if self.container_users != 1:
            raise fail(errno.EBUSY)
        self.container.detach_group(self)

    def use_container(self, process: Process) -> None:
        """A device is about to be opened: EINVAL without a container that has an IOMMU set."""
        if not self.container or not self.container.iommu or not self.opened_file:
            raise fail(errno.EINVAL)
        self.check_allowed(process)
        self.opened_file.get()
        self.container_users += 1

    def unuse_container(self) -> None:
        """A device was closed, or could not be opened."""
        file = self.opened_file
        assert file is not None
        self.container_users -= 1
        file.put()

    def find(self, name: str) -> VfioDevice:
        """The device that a string given to GET_DEVICE_FD means; ENODEV, or what the driver has against it."""
        for device in self.devices:
            matches = device.ops.match(device.data, name)
            if matches or (matches is None and name == device.pci.address):
                return device
        raise fail(errno.ENODEV)

    def closed(self) -> None:
        """The group's file is released; no device is open."""
        if self.container:
            self.container.detach_group(self)
        self.opened_file = None
        if self.iommu_group is None:
            self.core.free_minor(self)

    def revoke(self) -> None:
        """The last device left: the node goes, and the group leaves its container at once."""
        if self.container:
            self.container.detach_group(self)
        self.iommu_group = None
        if not self.opened_file:
            self.core.free_minor(self)


class GroupFile(File):
    """An open /dev/vfio/N."""

    def __init__(self, group: VfioGroup) -> None:
        super().__init__()
        self.group = group
        self.link = f"/dev/vfio/{group.node}"

    def release(self) -> None:
        self.group.closed()

    def ioctl(self, process: Process, n: int | None, argument: Argument) -> int:
        group = self.group
        if n == _GET_STATUS:
            return self._get_status(argument)
        if n == _SET_CONTAINER:
            number = int.from_bytes(argument.copy_in(4), _NATIVE, signed=True)
            group.set_container(process, process.lookup(number))
            return 0
        if n == _UNSET_CONTAINER:
            group.unset_container()
            return 0
        if n == _GET_DEVICE_FD:
            return self._get_device_fd(process, argument)
        raise fail(errno.ENOTTY)

    def _get_status(self, argument: Argument) -> int:
        status = argument.read(uapi.vfio_group_status)
        iommu_group = self.group.claimed
        status.flags = 0
        if self.group.container:
            status.flags = uapi.VFIO_GROUP_FLAGS_CONTAINER_SET | uapi.VFIO_GROUP_FLAGS_VIABLE
        elif not iommu_group.dma_claimed:
            status.flags = uapi.VFIO_GROUP_FLAGS_VIABLE
        argument.copy_out(bytes(uapi.buffer(status)))
        return 0

    def _get_device_fd(self, process: Process, argument: Argument) -> int:
        name = argument.string(self.group.core.machine.page_size)
        device = self.group.find(name)
        file = DeviceFile(device)
        fd = process.install(file)
        try:
            file.open(process)
        except BaseException:
            process.close(fd)
            raise
        return fd
