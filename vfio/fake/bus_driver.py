"""The interface between the VFIO core and a bus driver: Documentation/driver-api/vfio.rst, "VFIO bus driver API".

A bus driver has a device bound to it, and gives it to users by registering it with the core: the kernel's
vfio_register_group_dev(), vfio_add_group_dev() in that document's time.  The core then calls the driver's operations
with the data that was registered.  A driver of your own, for a device that already is in a group::

    class Mailbox(VfioDeviceOps):
        def read(self, data, process, count, pos):
            return bytes(data[pos : pos + count])

        def write(self, data, process, buf, pos):
            data[pos : pos + len(buf)] = buf
            return len(buf)

    machine.vfio.register_device(pci, Mailbox(), bytearray(4096))

What is not overridden answers as the core does for a driver without that operation.  A failing operation raises
`fail(errno)`; what a caller's bad address raises (EFAULT) passes through.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from vfio.backend import Mapping
from vfio.fake.kernel_error import fail

if TYPE_CHECKING:
    from vfio.fake.process import Process
    from vfio.fake.user import Argument


class VfioDeviceOps:
    """What a bus driver does for the core; `data` is what was registered with the device."""

    name = "vfio-user"

    def open(self, data: Any, process: Process) -> None:
        """A descriptor of the device is about to be made."""

    def release(self, data: Any) -> None:
        """A descriptor of the device, and every mapping made with it, is gone."""

    def read(self, data: Any, process: Process, count: int, pos: int) -> bytes:
        """pread: up to `count` bytes from position `pos` of the device file."""
        raise fail(errno.EINVAL)

    def write(self, data: Any, process: Process, buf: bytes, pos: int) -> int:
        """pwrite: how many of the bytes were written at `pos`."""
        raise fail(errno.EINVAL)

    def ioctl(self, data: Any, process: Process, n: int | None, argument: Argument) -> int:
        """The request VFIO_BASE + `n` (None: no VFIO request of this machine)."""
        raise fail(errno.EINVAL)

    def mmap(self, data: Any, process: Process, length: int, offset: int, prot: int) -> Mapping:
        """Map `length` bytes (more than 0) from byte `offset` (a multiple of the page) of the device file."""
        raise fail(errno.EINVAL)

    def match(self, data: Any, name: str) -> int | None:
        """Whether the string that a user gave GET_DEVICE_FD means this device: 1 yes, 0 no, None to have the core
        compare names.  A string that means it but asks for what cannot be raises."""
        return None

    def request(self, data: Any, count: int) -> None:
        """The host wants the device back; asked for the `count`-th time, from 0 on."""
