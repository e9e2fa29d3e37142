"""vfio-pci by raw calls at the seam: nothing between a case and the kernel's answer.

`outcome` makes a call and returns what came of it: the result, or the name of the errno.  So a table of cases reads
``assert outcome(...) == "EINVAL"``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from vfio import sysfs, uapi
from vfio.backend import Backend, Mapping

T = TypeVar("T")

VFIO_PCI = "/sys/bus/pci/drivers/vfio-pci"
PROBE = "/sys/bus/pci/drivers_probe"
NOWHERE = 0xFFFF_FFFF_FFFF_F000
"""An address that no process has."""
COMMAND, MEMORY, MASTER, INTX_OFF = 4, 2, 4, 0x400
"""The command register of configuration space, and its bits for memory decode, bus master and INTx disable."""
CONFIG = uapi.VFIO_PCI_CONFIG_REGION_INDEX


def outcome(call: Callable[..., T], *arguments: Any) -> T | str:
    """What the call returns, or the name of its errno."""
    try:
        return call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def file_range(index: int, offset: int = 0) -> int:
    """Where a region's bytes are in the file of a device."""
    return index << 40 | offset


class RawDevice:
    """A device that is on vfio-pci, opened through a container of its own: three descriptors, and calls on them."""

    def __init__(self, backend: Backend, address: str, iommu: int | None = None) -> None:
        self.backend, self.address = backend, address
        self.container = backend.open("/dev/vfio/vfio", os.O_RDWR)
        name = "noiommu-" if iommu == uapi.VFIO_NOIOMMU_IOMMU else ""
        self.group = backend.open(f"/dev/vfio/{name}{group_number(backend, address)}", os.O_RDWR)
        backend.ioctl(self.group, uapi.VFIO_GROUP_SET_CONTAINER, int32(self.container))
        self._set_iommu(iommu)
        self.fd = self.open_again()
        self._descriptors = [self.container, self.group, self.fd]

    def _set_iommu(self, iommu: int | None) -> None:
        """That one; or sPAPR v2, or Type1v2 where nobody has that."""
        if iommu is not None:
            self.backend.ioctl(self.container, uapi.VFIO_SET_IOMMU, iommu)
            return
        try:
            self.backend.ioctl(self.container, uapi.VFIO_SET_IOMMU, uapi.VFIO_SPAPR_TCE_v2_IOMMU)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            self.backend.ioctl(self.container, uapi.VFIO_SET_IOMMU, uapi.VFIO_TYPE1v2_IOMMU)

    def open_again(self) -> int:
        """One more descriptor of the device."""
        return self.backend.ioctl(self.group, uapi.VFIO_GROUP_GET_DEVICE_FD, bytearray(self.address.encode() + b"\0"))

    def ioctl(self, request: int, argument: uapi.Struct | bytearray | int = 0) -> int | str:
        """What came of an ioctl on the device."""
        plain = uapi.buffer(argument) if isinstance(argument, uapi.Struct) else argument
        return outcome(self.backend.ioctl, self.fd, request, plain)

    def region(self, index: int) -> uapi.vfio_region_info:
        """The region's info; raises OSError."""
        info = uapi.vfio_region_info(index=index)
        self.backend.ioctl(self.fd, uapi.VFIO_DEVICE_GET_REGION_INFO, uapi.buffer(info))
        return info

    def irq(self, index: int) -> tuple[int, int]:
        """Count and flags of an interrupt index; raises OSError."""
        info = uapi.vfio_irq_info(index=index)
        self.backend.ioctl(self.fd, uapi.VFIO_DEVICE_GET_IRQ_INFO, uapi.buffer(info))
        return info.count, info.flags

    def set_irqs(self, index: int, flags: int, start: int = 0, count: int = 0, data: bytes = b"") -> int | str:
        """What came of VFIO_DEVICE_SET_IRQS."""
        argument = uapi.vfio_irq_set.sized(20 + len(data), index=index, flags=flags, start=start, count=count)
        raw = uapi.buffer(argument)
        raw[20:] = data
        return outcome(self.backend.ioctl, self.fd, uapi.VFIO_DEVICE_SET_IRQS, raw)

    def read(self, index: int, offset: int, count: int) -> bytes | str:
        """What came of a read of a region."""
        return outcome(self.backend.pread, self.fd, count, file_range(index, offset))

    def write(self, index: int, offset: int, data: bytes) -> int | str:
        """What came of a write to a region."""
        return outcome(self.backend.pwrite, self.fd, data, file_range(index, offset))

    def config(self, offset: int, count: int) -> int:
        """A value of configuration space."""
        data = self.backend.pread(self.fd, count, file_range(CONFIG, offset))
        return int.from_bytes(data, "little")

    def set_config(self, offset: int, count: int, value: int) -> None:
        """Write a value of configuration space."""
        data = value.to_bytes(count, "little")
        self.backend.pwrite(self.fd, data, file_range(CONFIG, offset))

    def capability(self, wanted: int) -> int:
        """Offset of a capability; 0 where the device has none such."""
        return {identity: at for at, identity in self.capabilities()}.get(wanted, 0)

    def capabilities(self) -> list[tuple[int, int]]:
        """(offset, identity) of each capability, as the list of the virtual configuration space has them."""
        found, at = [], self.config(0x34, 1)
        while at:
            found.append((at, self.config(at, 1)))
            at = self.config(at + 1, 1)
        return found

    def map(self, index: int, length: int, offset: int = 0, prot: int = 3) -> Mapping | str:
        """What came of mapping a region."""
        return outcome(self.backend.mmap, self.fd, length, file_range(index, offset), prot)

    def close(self) -> None:
        """Close the descriptors, the device first."""
        while self._descriptors:
            self.backend.close(self._descriptors.pop())


@contextmanager
def opened(backend: Backend, address: str) -> Iterator[RawDevice]:
    """The device that is on vfio-pci, open."""
    device = RawDevice(backend, address)
    try:
        yield device
    finally:
        device.close()


@contextmanager
def on_vfio(backend: Backend, address: str) -> Iterator[str]:
    """The device on vfio-pci, by its override; afterwards on no driver."""
    override = sysfs.path(address, "driver_override")
    backend.write_text(override, "vfio-pci\n")
    try:
        backend.write_text(PROBE, address)
        yield address
    finally:
        backend.write_text(override, "\n")
        with suppress(OSError):
            backend.write_text(f"{VFIO_PCI}/unbind", address)


@contextmanager
def eventfds(count: int = 1) -> Iterator[list[int]]:
    """Eventfds that do not block."""
    fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(count)]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def signals(fd: int, wait: float = 2.0) -> int:
    """How often the eventfd was signalled since it was last read; waits up to `wait` seconds for the first."""
    if not select.select([fd], [], [], wait)[0]:
        return 0
    return os.eventfd_read(fd)


@contextmanager
def closed_descriptor() -> Iterator[int]:
    """The number of a descriptor that nobody has open."""
    fd = os.dup(0)
    os.close(fd)
    yield fd


@contextmanager
def half_readable(backend: Backend, data: bytes) -> Iterator[int]:
    """The address of `data`, of which the byte behind the last cannot be read."""
    page = backend.page_size
    libc = ctypes.CDLL(None, use_errno=True)
    with backend.allocate(2 * page) as memory:
        memory.view[page - len(data) : page] = data
        behind = ctypes.c_void_p(memory.address + page)
        assert libc.mprotect(behind, page, 0) == 0
        try:
            yield memory.address + page - len(data)
        finally:
            libc.mprotect(behind, page, 3)


def endpoint_address(target: Any) -> str:
    """The machine's PCI Express device with MSI-X and a function reset: a disk, or a network card."""
    return str(next(each.address for each in target.topology.devices if {"flr", "pm"} & set(each.reset)))


def spare_address(target: Any) -> str:
    """A device whose vendor and device numbers no other device of the machine has."""
    devices = list(target.topology.devices)
    ids = [(each.vendor, each.device) for each in devices]
    found = [each.address for each, own in zip(devices, ids, strict=True) if ids.count(own) == 1]
    return str(next((address for address in found if address != endpoint_address(target)), found[0]))


def group_number(backend: Backend, address: str) -> int:
    """The group of a device."""
    return int(os.path.basename(backend.readlink(sysfs.path(address, "iommu_group"))))


def int32(*values: int) -> bytearray:
    """Signed 32-bit values, as a buffer for an ioctl."""
    return bytearray(b"".join(value.to_bytes(4, "little", signed=True) for value in values))


class EduRegisters:
    """Registers of QEMU's edu (docs/specs/edu.rst), through the file of the device, 32 bits at a time."""

    LIVENESS, STATUS, RAISE, ACKNOWLEDGE = 0x04, 0x24, 0x60, 0x64

    def __init__(self, device: RawDevice) -> None:
        self._device = device
        self.byteorder: Any = "big" if device.read(0, 0, 4) == b"\x01\x00\x00\xed" else "little"

    def __getitem__(self, register: int) -> int:
        data = self._device.read(0, register, 4)
        assert isinstance(data, bytes), data
        return int.from_bytes(data, self.byteorder)

    def __setitem__(self, register: int, value: int) -> None:
        assert self._device.write(0, register, value.to_bytes(4, self.byteorder)) == 4

    def raise_line(self) -> None:
        """Interrupt: a message if MSI is enabled, else the INTx line rises and stays up."""
        self[self.RAISE] = 1

    def lower_line(self) -> None:
        """Acknowledge all interrupts; the line falls."""
        self[self.ACKNOWLEDGE] = self[self.STATUS]
