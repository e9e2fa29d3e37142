"""The vfio-pci driver: it takes PCI functions from the host and gives them to users.  (vfio_pci.c, vfio_pci_core.c)"""

from __future__ import annotations

import errno
import re
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from vfio import uapi
from vfio.backend import Mapping
from vfio.fake import registers as reg
from vfio.fake import reset
from vfio.fake.bars import OFFSET_SHIFT
from vfio.fake.bus_driver import VfioDeviceOps
from vfio.fake.eventfd import EventFd
from vfio.fake.interrupts import COUNT as IRQS
from vfio.fake.interrupts import ERR
from vfio.fake.kernel_error import fail
from vfio.fake.pci import BARS, ROM
from vfio.fake.vfio_pci_device import VfioPciDevice

if TYPE_CHECKING:
    from vfio.fake.machine import Machine
    from vfio.fake.pci import PciDevice
    from vfio.fake.process import Process
    from vfio.fake.user import Argument

CONFIG, VGA, REGIONS = 7, 8, 9
"""Region indexes of a PCI device, and how many there are."""

_INFO_MINSZ = 16
_SHADOW = (1 << OFFSET_SHIFT) - 1
_RW = uapi.VFIO_REGION_INFO_FLAG_READ | uapi.VFIO_REGION_INFO_FLAG_WRITE
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_TOKEN = "vf_token="

_ATOMIC_BITS = 0x380
"""Device capabilities 2: completes atomic operations of 32, 64 and 128 bits."""


def probe(machine: Machine, pci: PciDevice) -> None:
    """The driver core binds the driver to a function.  EINVAL for a bridge and for a function without a group."""
    if pci.is_bridge or (pci.group is None and not machine.vfio.noiommu):
        raise fail(errno.EINVAL)
    pci.vfio = VfioPciDevice(pci)
    try:
        pci.set_power_state(0)
        machine.vfio.register_device(pci, OPS, pci.vfio)
    except OSError:
        pci.vfio = None
        raise
    pci.set_power_state(3)  # nobody uses it


def remove(machine: Machine, pci: PciDevice) -> None:
    """The driver core takes the driver from the function; waits for its users."""
    machine.vfio.unregister_device(pci, machine.driver_core.caller)
    pci.vfio = None
    pci.set_power_state(0)


def error_detected(pci: PciDevice) -> None:
    """The host's error handling found the function in error (vfio_pci_core_aer_err_detected): its user is told."""
    if pci.vfio and pci.vfio.users:
        pci.vfio.interrupts.signal(ERR)


class VfioPciOps(VfioDeviceOps):
    """What the driver does for the core."""

    name = "vfio-pci"

    def open(self, data: VfioPciDevice, process: Process) -> None:
        data.open()

    def release(self, data: VfioPciDevice) -> None:
        data.close()

    def read(self, data: VfioPciDevice, process: Process, count: int, pos: int) -> bytes:
        if not count:
            return b""
        index, offset = _region(pos)
        data.touch()
        try:
            if index == CONFIG:
                return data.config.read(offset, count)
            if index == VGA:
                raise fail(errno.EINVAL)  # no POWER host maps the legacy ranges
            return data.bars.read(index, offset, count)
        finally:
            data.rest()

    def write(self, data: VfioPciDevice, process: Process, buf: bytes, pos: int) -> int:
        if not buf:
            return 0
        index, offset = _region(pos)
        data.touch()
        try:
            if index == CONFIG:
                return data.config.write(offset, buf)
            if index == VGA:
                raise fail(errno.EINVAL)
            return data.bars.write(index, offset, buf)
        finally:
            data.rest()

    def ioctl(self, data: VfioPciDevice, process: Process, n: int | None, argument: Argument) -> int:
        handlers: dict[int, Callable[[], int]] = {
            7: lambda: _info(data, argument),
            8: lambda: _region_info(data, argument),
            9: lambda: data.interrupts.info(argument),
            10: lambda: data.interrupts.set(process, argument),
            11: data.reset,
            12: lambda: reset.hot_reset_info(data.pci, argument),
            13: lambda: reset.hot_reset(data.pci, process, argument),
            16: lambda: data.bars.ioeventfd(process, argument),
            17: lambda: _feature(data, process, argument),
        }
        data.touch()
        try:
            if n not in handlers:
                raise fail(errno.ENOTTY)
            return handlers[n]()
        finally:
            data.rest()

    def mmap(self, data: VfioPciDevice, process: Process, length: int, offset: int, prot: int) -> Mapping:
        index, start = _region(offset)
        if index >= ROM:
            raise fail(errno.EINVAL)
        return data.bars.mmap(index, start, length, prot)

    def match(self, data: VfioPciDevice, name: str) -> int:
        """vfio_pci_core_match(): the address, then options; the only one is a VF token, which only SR-IOV takes."""
        address = data.pci.address
        if not name.startswith(address) or name[len(address) : len(address) + 1] not in ("", " "):
            return 0
        rest, token = name[len(address) :].lstrip(" "), ""
        while rest:
            if token or not rest.startswith(_TOKEN) or not _UUID.match(rest, len(_TOKEN)):
                raise fail(errno.EINVAL)
            token, rest = rest[len(_TOKEN) :][:36], rest[len(_TOKEN) + 36 :].lstrip(" ")
        if token:
            raise fail(errno.EINVAL)  # the device is neither a PF nor a VF
        return 1

    def request(self, data: VfioPciDevice, count: int) -> None:
        data.request()


OPS = VfioPciOps()


def _region(pos: int) -> tuple[int, int]:
    """Region and byte of a position in the device file; EINVAL for a region that no device has."""
    index = pos >> OFFSET_SHIFT
    if not 0 <= index < REGIONS:
        raise fail(errno.EINVAL)
    return index, pos & _SHADOW


def _info(data: VfioPciDevice, argument: Argument) -> int:
    """VFIO_DEVICE_GET_INFO."""
    info = argument.read(uapi.vfio_device_info, _INFO_MINSZ)
    size = min(info.argsz, uapi.sizeof(uapi.vfio_device_info))
    info.flags = uapi.VFIO_DEVICE_FLAGS_PCI | (uapi.VFIO_DEVICE_FLAGS_RESET if data.reset_works else 0)
    info.num_regions, info.num_irqs = REGIONS, IRQS
    if caps := _atomic_capability(data.pci):
        info.flags |= uapi.VFIO_DEVICE_FLAGS_CAPS
        info.cap_offset = _add_capabilities(info, caps, argument)
    argument.copy_out(bytes(uapi.buffer(info))[:size])
    return 0


def _region_info(data: VfioPciDevice, argument: Argument) -> int:
    """VFIO_DEVICE_GET_REGION_INFO."""
    info = argument.read(uapi.vfio_region_info)
    index, bars = info.index, data.bars
    if index >= REGIONS or index == VGA:
        raise fail(errno.EINVAL)
    info.offset, info.flags, info.size, info_cap = index << OFFSET_SHIFT, 0, 0, b""
    if index == CONFIG:
        info.size, info.flags = data.pci.config_size, _RW
    elif index == ROM:
        info.size = bars.rom_size()
        info.flags = uapi.VFIO_REGION_INFO_FLAG_READ if info.size else 0
    elif index < BARS and (bar := bars.bar(index)):
        info.size, info.flags = bar.size, _RW
        if bars.mappable(index):
            info.flags |= uapi.VFIO_REGION_INFO_FLAG_MMAP
            if index == bars.msix_bar:
                info_cap = struct.pack("=HHI", uapi.VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, 1, 0)
    if info_cap:
        info.flags |= uapi.VFIO_REGION_INFO_FLAG_CAPS
        info.cap_offset = _add_capabilities(info, info_cap, argument)
    argument.copy_out(bytes(uapi.buffer(info)))
    return 0


def _add_capabilities(info: uapi.vfio_device_info | uapi.vfio_region_info, chain: bytes, argument: Argument) -> int:
    """Put a capability chain behind `info`, and return where; 0, with argsz raised, where it has no room."""
    size = uapi.sizeof(info)
    if info.argsz < size + len(chain):
        info.argsz = size + len(chain)
        return 0
    argument.copy_out(chain, size)
    return size


def _atomic_capability(pci: PciDevice) -> bytes:
    """Which atomic operations of the root port the device can use (VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP)."""
    able = _ATOMIC_BITS
    for function in (pci, pci.parent):
        express = function.registers.find(reg.CAP_EXPRESS) if function else 0
        able &= function.registers.get(express + 0x24, 4) if function and express else 0
    return struct.pack("=HHII", uapi.VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP, 1, 0, able >> 7) if able else b""


# --- VFIO_DEVICE_FEATURE ---

_GET, _SET, _PROBE = uapi.VFIO_DEVICE_FEATURE_GET, uapi.VFIO_DEVICE_FEATURE_SET, uapi.VFIO_DEVICE_FEATURE_PROBE
_NUMBER = 0xFFFF
_LOW_POWER, _LOW_POWER_WAKEUP, _LOW_POWER_EXIT, _PRECOPY_INFO_V2 = 3, 4, 5, 12


def _feature(data: VfioPciDevice, process: Process, argument: Argument) -> int:
    header = argument.read(uapi.vfio_device_feature)
    flags, size = header.flags, header.argsz - 8
    if flags & ~(_NUMBER | _GET | _SET | _PROBE):
        raise fail(errno.EINVAL)
    if not flags & _PROBE and flags & _GET and flags & _SET:
        raise fail(errno.EINVAL)
    number = flags & _NUMBER
    if number == _PRECOPY_INFO_V2 and data.pci.machine.kernel >= (7, 2):
        raise fail(errno.EINVAL)
    if number not in (_LOW_POWER, _LOW_POWER_WAKEUP, _LOW_POWER_EXIT):
        raise fail(errno.ENOTTY)
    needed = 8 if number == _LOW_POWER_WAKEUP else 0
    if flags & _GET:
        raise fail(errno.EINVAL)
    if flags & _PROBE:
        return 0
    if not flags & _SET or size < needed:
        raise fail(errno.EINVAL)
    if number == _LOW_POWER_EXIT:
        data.leave_low_power()
        return 0
    wakeup = None
    if number == _LOW_POWER_WAKEUP:
        fd, _ = struct.unpack("=iI", argument.copy_in(8, 8))
        if fd < 0:
            raise fail(errno.EINVAL)
        wakeup = EventFd(process, fd)
    try:
        data.enter_low_power(wakeup)
    except OSError:
        if wakeup:
            wakeup.put()
        raise
    return 0
