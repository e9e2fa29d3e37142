"""Which descriptors an ioctl names: the one it is made on, and those in its argument."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

from vfio import uapi
from vfio.fake.memory import AddressSpace

_MOST = 4000
"""Descriptors in an argument that are looked at: no interrupt index and no reset has more."""
_IRQ_DATA = uapi.offsetof(uapi.vfio_irq_set, "data")
_RESET_FDS = uapi.offsetof(uapi.vfio_pci_hot_reset, "group_fds")
_IOEVENTFD = uapi.offsetof(uapi.vfio_device_ioeventfd, "fd")
_FEATURE_DATA = uapi.sizeof(uapi.vfio_device_feature)
_WAKEUP = uapi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP

_Read = Callable[[int, int], bytes]


def named_by(fd: int, request: int, arg: int | bytes) -> list[int]:
    """The descriptor `fd`, and those that the argument (bytes, or their address) names: each once, none negative.

    Requests of a container and of a device share numbers.  What follows from the wrong reading is a descriptor too
    many, which nobody looks at.
    """
    find = _FINDERS.get(request)
    if find is None:
        return [fd] if fd >= 0 else []
    try:
        found = find(_reader(arg))
    except (OSError, struct.error):  # the argument cannot be read, as the kernel will find too
        found = ()
    return [each for each in dict.fromkeys((fd, *found)) if each >= 0]


def _reader(arg: int | bytes) -> _Read:
    if isinstance(arg, bytes):
        return lambda offset, length: arg[offset : offset + length]
    memory = AddressSpace(os.getpid(), 4096)
    return lambda offset, length: memory.read((arg + offset) & (1 << 64) - 1, length)


def _number(read: _Read, offset: int) -> int:
    found: int = struct.unpack("=i", read(offset, 4))[0]
    return found


def _array(read: _Read, offset: int, count: int) -> tuple[int, ...]:
    if not 0 < count <= _MOST:
        return ()
    return struct.unpack(f"={count}i", read(offset, 4 * count))


def _of_container(read: _Read) -> tuple[int, ...]:
    return (_number(read, 0),)


def _of_interrupts(read: _Read) -> tuple[int, ...]:
    _argsz, flags, _index, _start, count = struct.unpack("=5I", read(0, 20))
    return _array(read, _IRQ_DATA, count) if flags & uapi.VFIO_IRQ_SET_DATA_EVENTFD else ()


def _of_reset(read: _Read) -> tuple[int, ...]:
    """The request is VFIO_IOMMU_MAP_DMA too, whose flags are not 0."""
    argsz, flags, count = struct.unpack("=3I", read(0, 12))
    return _array(read, _RESET_FDS, count) if flags == 0 and argsz >= _RESET_FDS + 4 * count else ()


def _of_ioeventfd(read: _Read) -> tuple[int, ...]:
    return (_number(read, _IOEVENTFD),)


def _of_feature(read: _Read) -> tuple[int, ...]:
    """The request is VFIO_IOMMU_SPAPR_REGISTER_MEMORY too, whose flags are 0."""
    feature = _number(read, 4) & uapi.VFIO_DEVICE_FEATURE_MASK
    return (_number(read, _FEATURE_DATA),) if feature == _WAKEUP else ()


_FINDERS: dict[int, Callable[[_Read], tuple[int, ...]]] = {
    uapi.VFIO_GROUP_SET_CONTAINER: _of_container,
    uapi.VFIO_DEVICE_SET_IRQS: _of_interrupts,
    uapi.VFIO_DEVICE_PCI_HOT_RESET: _of_reset,
    uapi.VFIO_DEVICE_IOEVENTFD: _of_ioeventfd,
    uapi.VFIO_DEVICE_FEATURE: _of_feature,
}
