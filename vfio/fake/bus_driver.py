"""The interface between the VFIO core and a bus driver: Documentation/driver-api/vfio.rst, "VFIO bus driver API".

A bus driver has a device bound to it, and gives it to users by registering it with the core: the kernel's
vfio_register_group_dev(), vfio_add_group_dev() in that document's time.  The core then calls the driver's operations
with the data that was registered.  A device of your own, with all that the library asks of one, in 30 lines::

    import errno
    from vfio import uapi
    from vfio.fake.bus_driver import VfioDeviceOps
    from vfio.fake.kernel_error import fail

    INFO, REGION_INFO, RESET = (
        request - uapi.VFIO_GET_API_VERSION
        for request in (uapi.VFIO_DEVICE_GET_INFO, uapi.VFIO_DEVICE_GET_REGION_INFO, uapi.VFIO_DEVICE_RESET)
    )

    class Mailbox(VfioDeviceOps):
        def read(self, data, process, count, pos):
            return bytes(data[pos : pos + count])

        def write(self, data, process, buf, pos):
            data[pos : pos + len(buf)] = buf
            return len(buf)

        def ioctl(self, data, process, n, argument):
            if n == RESET:
                data[:] = bytes(len(data))
                return 0
            if n not in (INFO, REGION_INFO):
                raise fail(errno.ENOTTY)
            info = argument.read(uapi.vfio_device_info if n == INFO else uapi.vfio_region_info)
            if n == INFO:
                info.flags, info.num_regions, info.num_irqs = uapi.VFIO_DEVICE_FLAGS_RESET, 1, 0
            elif info.index:
                raise fail(errno.EINVAL)
            else:
                info.flags = uapi.VFIO_REGION_INFO_FLAG_READ | uapi.VFIO_REGION_INFO_FLAG_WRITE
                info.offset, info.size = 0, len(data)
            argument.copy_out(bytes(uapi.buffer(info)))
            return 0

It is registered for a device that is in a group, and that no driver has; from then on users open it as any other::

    pci = backend.machine.device("0000:01:00.0")
    backend.machine.vfio.register_device(pci, Mailbox(), bytearray(4096))
    with vfio.Container(backend) as container, vfio.Group(pci.group.number, backend) as group:
        container.attach(group)
        container.choose_iommu()
        with group.device("0000:01:00.0") as device:
            device.region(0).write32(16, 0x600DCAFE)

(Hardware of your own, below vfio-pci and with DMA, is a `vfio.fake.devices.PciModel`.)

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
