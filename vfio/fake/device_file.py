"""Devices that a VFIO driver offers, and their files.  (drivers/vfio/vfio_main.c)"""

from __future__ import annotations

import copy
import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vfio.backend import Mapping
from vfio.fake.file import File
from vfio.fake.kernel_error import fail
from vfio.fake.kernel_log import WARNING

if TYPE_CHECKING:
    from vfio.fake.bus_driver import VfioDeviceOps
    from vfio.fake.group import VfioGroup
    from vfio.fake.pci import PciDevice
    from vfio.fake.process import Process
    from vfio.fake.user import Argument


class VfioDevice:
    """A device that a bus driver registered: its operations, and what they are to be called with."""

    def __init__(self, group: VfioGroup, pci: PciDevice, ops: VfioDeviceOps, data: Any, index: int) -> None:
        self.group = group
        self.pci = pci
        self.ops = ops
        self.data = data
        self.index = index
        """Of /sys/class/vfio-dev/vfioN."""
        self.open_count = 0
        self.files: list[DeviceFile] = []
        """Open files, and those that mappings keep open."""
        self.when_closed: Callable[[], None] | None = None
        """Called when the last of them is gone."""

    def open(self, process: Process) -> None:
        """One more file; the first enables the device."""
        if self.open_count == 0:
            self.group.use_container(process)
            try:
                self.ops.open(self.data, process)
            except BaseException:
                self.group.unuse_container()
                raise
        elif not self.group.container:
            raise fail(errno.EINVAL)
        self.open_count += 1

    def close(self) -> None:
        """One file less; the last disables the device."""
        if self.open_count == 1:
            try:
                self.ops.release(self.data)
            finally:
                self.group.unuse_container()
        self.open_count -= 1


class DeviceFile(File):
    """An open device.  Its operations are those of the bus driver."""

    link = "anon_inode:[vfio-device]"

    def __init__(self, device: VfioDevice) -> None:
        super().__init__()
        self.device = device
        self._open = False

    def open(self, process: Process) -> None:
        self.device.open(process)
        self._open = True
        self.device.files.append(self)
        if self.device.group.noiommu:
            machine, address = self.device.pci.machine, self.device.pci.address
            who = f"{machine.driver_core.host.command(process)[0].rpartition('/')[2][:15]}:{process.pid}"
            machine.log.write(WARNING, f"vfio-pci {address}: vfio-noiommu device opened by user ({who})")

    def release(self) -> None:
        if not self._open:
            return
        self.device.files.remove(self)
        self.device.close()
        if not self.device.files and self.device.when_closed:
            self.device.when_closed()

    def ioctl(self, process: Process, n: int | None, argument: Argument) -> int:
        return self.device.ops.ioctl(self.device.data, process, n, argument)

    def pread(self, process: Process, length: int, offset: int) -> bytes:
        return self.device.ops.read(self.device.data, process, length, offset)

    def pwrite(self, process: Process, data: bytes, offset: int) -> int:
        return self.device.ops.write(self.device.data, process, data, offset)

    def mmap(self, process: Process, length: int, offset: int, prot: int) -> Mapping:
        device = self.device
        mapping = HeldMapping(self, process, device.ops.mmap(device.data, process, length, offset, prot))
        device.group.core.mappings.setdefault(process, []).append(mapping)
        return mapping


class HeldMapping(Mapping):
    """A mapping of a device's region: it keeps the file open, whatever happens to the descriptor."""

    def __init__(self, file: DeviceFile, process: Process, inner: Mapping) -> None:
        self.length = inner.length
        self.load = inner.load  # type: ignore[method-assign]
        self.store = inner.store  # type: ignore[method-assign]
        self.file = file
        self._process, self._inner = process, inner
        self._closed = False
        file.get()

    def load(self, offset: int, width: int) -> int:
        return self._inner.load(offset, width)

    def store(self, offset: int, width: int, value: int) -> None:
        self._inner.store(offset, width, value)

    def view(self, width: int) -> memoryview | None:
        return self._inner.view(width)

    def backing(self) -> tuple[int, int] | None:
        """A file with the memory, and an offset there, which another process can map; None where it cannot."""
        found: tuple[int, int] | None = self._inner.backing() if hasattr(self._inner, "backing") else None
        return found

    def inherit(self, child: Process) -> HeldMapping:
        """The mapping that a forked child has of the same memory."""
        mapping = HeldMapping(self.file, child, copy.copy(self._inner))
        self.file.device.group.core.mappings.setdefault(child, []).append(mapping)
        return mapping

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        mappings = self.file.device.group.core.mappings
        mappings[self._process].remove(self)
        if not mappings[self._process]:
            del mappings[self._process]
        self._inner.close()
        self.file.put()
