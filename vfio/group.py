"""Group: /dev/vfio/N, the smallest set of devices that the IOMMU can isolate."""

from __future__ import annotations

import errno
import os
import warnings
from typing import TYPE_CHECKING, TypeVar, overload

from vfio import address as addresses
from vfio import diagnose, errors, holders, sysfs, uapi
from vfio.backend import Backend, default
from vfio.closing import Closing
from vfio.device import Device
from vfio.iommu.noiommu import WARNING, UnsafeWarning

if TYPE_CHECKING:
    from vfio.container import Container


D = TypeVar("D", bound=Device)


class Group(Closing):
    """An open group.  Only one process can have it open.

    A group without an IOMMU is opened with a `vfio.iommu.noiommu.UnsafeWarning`.

    Raises `errors.Busy` (EBUSY, with the process that has it), `errors.AccessDenied`, `errors.NotBound` (no device of it
    is on a VFIO driver), or `errors.CallFailed` with ENOENT where no such group is.
    """

    def __init__(self, number: int, backend: Backend | None = None) -> None:
        self.backend = backend or default()
        self.number = number
        self.container: Container | None = None
        self._devices: set[Device] = set()
        self._fd: int | None = None
        self.unprotected = False
        """Whether there is no IOMMU that keeps its device from the host's memory."""
        try:
            self._fd = self._open()
        except OSError as error:
            raise self._open_error(error) from error

    def _open(self) -> int:
        try:
            return self.backend.open(sysfs.node(self.number), os.O_RDWR)
        except FileNotFoundError:
            unsafe = sysfs.node(self.number, unprotected=True)
            if not self.backend.exists(unsafe):
                raise
        fd = self.backend.open(unsafe, os.O_RDWR)
        self.unprotected = True
        warnings.warn(WARNING.format(number=self.number), UnsafeWarning, stacklevel=4)
        return fd

    @property
    def fd(self) -> int:
        """The file descriptor; raises `errors.Closed` after `close`."""
        if self._fd is None:
            raise errors.Closed(f"group {self.number}")
        return self._fd

    @property
    def status(self) -> int:
        """VFIO_GROUP_FLAGS_* (VIABLE, CONTAINER_SET); ENODEV once all its devices have left VFIO."""
        status = uapi.vfio_group_status()
        try:
            self.backend.ioctl(self.fd, uapi.VFIO_GROUP_GET_STATUS, uapi.buffer(status))
        except OSError as error:
            raise errors.CallFailed(
                error.errno or errno.EIO, f"cannot get the status of group {self.number}"
            ) from error
        return status.flags

    @property
    def viable(self) -> bool:
        """Whether no device of the group is used by a driver of the host."""
        return bool(self.status & uapi.VFIO_GROUP_FLAGS_VIABLE)

    @overload
    def device(self, address: str) -> Device: ...
    @overload
    def device(self, address: str, kind: type[D]) -> D: ...
    def device(self, address: str, kind: type[Device] = Device) -> Device:
        """Open a device of the group.  It is reset by that, where it can be.

        The group must be in a container that has its IOMMU.  Raises `errors.NotBound` or `errors.NoSuchDevice`
        (ENODEV), or `errors.CallFailed`: EINVAL without container or IOMMU, EAGAIN while somebody else resets it,
        ENODEV while its PE is held in EEH reset.
        """
        address = addresses.parse(address)
        try:
            fd = self.backend.ioctl(self.fd, uapi.VFIO_GROUP_GET_DEVICE_FD, bytearray(address.encode() + b"\0"))
        except OSError as error:
            raise self._device_error(address, error) from error
        try:
            device = kind(self, address, fd)
        except BaseException:
            self.backend.close(fd)
            raise
        self._devices.add(device)
        return device

    @property
    def devices(self) -> list[Device]:
        """Its open devices, in the order of their addresses."""
        return sorted(self._devices, key=lambda device: device.address)

    def left(self, device: Device) -> None:
        """`device` was closed; the kernel lets go of a closed group with its last device."""
        self._devices.discard(device)
        self._release()

    def close(self) -> None:
        """Close.  The kernel keeps the group, and its container, while a device of it is open."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        self.backend.close(fd)
        self._release()

    def _release(self) -> None:
        if self._fd is None and not self._devices and self.container:
            self.container.forget(self)

    def _open_error(self, error: OSError) -> errors.VfioError:
        unprotected, what = sysfs.unprotected(self.backend, self.number), f"cannot open group {self.number}"
        node = sysfs.node(self.number, unprotected)
        if error.errno == errno.EPERM and unprotected:
            why = "it has no IOMMU, and only a process with CAP_SYS_RAWIO may use such a group"
            return errors.CallFailed(errno.EPERM, what, why, "run it as root, or turn on the host's IOMMU")
        if error.errno == errno.EBUSY:
            return errors.Busy(what, holders.of(self.backend, node))
        if error.errno == errno.ENOENT:
            members = sysfs.group_devices(self.backend, self.number)
            if not members:
                return errors.CallFailed(errno.ENOENT, what, "there is no such group", "vfio list shows the groups")
            first = next((member for member in members if not member.is_bridge), members[0])
            return errors.NotBound(first.address, first.driver, errno.ENOENT)
        return diagnose.open_error(self.backend, node, error)

    def _device_error(self, address: str, error: OSError) -> errors.VfioError:
        number = error.errno or errno.EIO
        what = f"cannot open device {address}"
        if number == errno.ENODEV:
            try:
                device = sysfs.device(self.backend, address)
            except errors.NoSuchDevice as absent:
                return absent
            if device.group != self.number:
                return errors.CallFailed(
                    number, what, f"it is in group {device.group}, not in group {self.number}", f"Group({device.group})"
                )
            if not device.on_vfio:
                return errors.NotBound(address, device.driver)
            return errors.CallFailed(number, what, "the device is going away, or its PE is held in EEH reset")
        if number == errno.EINVAL:
            if self.container is None:
                return errors.CallFailed(number, what, "its group is in no container", "container.attach(group) first")
            if self.container.iommu is None:
                return errors.CallFailed(number, what, "the container has no IOMMU", "container.choose_iommu() first")
        if number == errno.EAGAIN:
            return errors.CallFailed(number, what, "another process is resetting it", "try again")
        return errors.CallFailed(number, what)

    def __repr__(self) -> str:
        return f"<Group {self.number}>"
