"""PCI drivers, and which devices they match.  (drivers/pci/pci-driver.c)"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from vfio.fake.kernel_error import fail

if TYPE_CHECKING:
    from vfio.fake.pci import PciDevice

ANY = 0xFFFF_FFFF
_U32 = 0xFFFF_FFFF
_ALL_CLASS = 0xFF_FFFF


class DeviceId(NamedTuple):
    """What a driver takes: `ANY` matches all, and of the class only the bits of the mask count."""

    vendor: int
    device: int
    subvendor: int = ANY
    subdevice: int = ANY
    device_class: int = 0
    class_mask: int = 0

    def matches(self, identity: DeviceId) -> bool:
        """Whether a device of this identity is meant."""
        return (
            all(own in (ANY, its) for own, its in zip(self[:4], identity[:4], strict=True))
            and not (self.device_class ^ identity.device_class) & self.class_mask
        )


def of_class(device_class: int) -> DeviceId:
    """All devices of a class (24 bits)."""
    return DeviceId(ANY, ANY, device_class=device_class, class_mask=_ALL_CLASS)


@dataclass
class Driver:
    """A driver that is registered with the PCI bus."""

    name: str
    ids: tuple[DeviceId, ...] = ()
    dynamic_ids: list[DeviceId] = field(default_factory=list)
    """Added through new_id."""
    vfio: bool = False
    """vfio-pci, or a variant of it."""
    managed_dma: bool = False
    """It leaves DMA to the user of the group: the kernel's driver_managed_dma, which VFIO drivers have too."""
    knows_its_own: bool = False
    """Its probe fails (ENODEV) for devices that none of its ids is for."""

    @property
    def module(self) -> str:
        """Its name in /sys/module."""
        return self.name.replace("-", "_")

    @property
    def host_dma(self) -> bool:
        """Whether it does DMA for the host, which keeps a group from being viable."""
        return not (self.managed_dma or self.vfio)

    def matches(self, device: PciDevice) -> bool:
        """Whether it may have the device.  An override names the only driver that may, and matches by itself."""
        if device.driver_override is not None:
            return device.driver_override == self.name
        return self.takes(identity(device))

    def takes(self, identity: DeviceId) -> bool:
        """Whether one of its ids matches."""
        return any(each.matches(identity) for each in (*self.dynamic_ids, *self.ids))

    def add_id(self, text: str) -> None:
        """A write to new_id: EINVAL for fewer than two numbers, EEXIST for what the driver takes already."""
        numbers = _numbers(text, 7)
        if len(numbers) < 2:
            raise fail(errno.EINVAL)
        if len(numbers) == 7:  # with driver data, which has to be that of an id of the driver's, if it has any
            if self.has_table and numbers[6]:
                raise fail(errno.EINVAL)
        else:
            vendor, device, subvendor, subdevice, kind, *_ = *numbers, *(ANY, ANY, 0, 0)[len(numbers) - 2 :]
            low = 0xFFFF  # these registers have 16 bits
            if self.takes(DeviceId(vendor & low, device & low, subvendor & low, subdevice & low, kind)):
                raise fail(errno.EEXIST)
        self.dynamic_ids.append(_device_id(numbers))

    def remove_id(self, text: str) -> None:
        """A write to remove_id: EINVAL for fewer than two numbers, ENODEV for an id that was not added."""
        numbers = _numbers(text, 6)
        if len(numbers) < 2:
            raise fail(errno.EINVAL)
        asked = _device_id(numbers)
        for known in self.dynamic_ids:
            if (
                known[:2] == asked[:2]
                and asked.subvendor in (ANY, known.subvendor)
                and asked.subdevice in (ANY, known.subdevice)
                and not (known.device_class ^ asked.device_class) & asked.class_mask
            ):
                self.dynamic_ids.remove(known)
                return
        raise fail(errno.ENODEV)

    @property
    def has_table(self) -> bool:
        """Whether the driver was built with ids; vfio-pci's only count together with an override."""
        return bool(self.ids) or self.vfio


def identity(device: PciDevice) -> DeviceId:
    """What ids are held against."""
    return DeviceId(device.vendor, device.device, device.subsystem_vendor, device.subsystem_device, device.device_class)


def _device_id(numbers: list[int]) -> DeviceId:
    return DeviceId(*numbers[:6])


def _numbers(text: str, most: int) -> list[int]:
    """Up to `most` hexadecimal numbers, as the kernel's sscanf reads them: low 32 bits, ended by what is none."""
    found: list[int] = []
    rest = text
    while len(found) < most and (match := re.match(r"\s*(?:0[xX](?=[0-9a-fA-F]))?([0-9a-fA-F]+)", rest)):
        found.append(int(match[1], 16) & _U32)
        rest = rest[match.end() :]
    return found


KNOWN = {
    driver.name: driver
    for driver in (
        Driver("pci-stub", managed_dma=True),
        Driver("pcieport", (of_class(0x060400), of_class(0x060401)), managed_dma=True),
        Driver("shpchp", managed_dma=True),
        Driver("nvme", (DeviceId(0x1B36, 0x0010), of_class(0x010802))),
        Driver("e1000e", (DeviceId(0x8086, 0x10D3),)),
        Driver("tg3", (DeviceId(0x14E4, 0x1657),)),
        Driver("virtio-pci", (DeviceId(0x1AF4, ANY),), knows_its_own=True),
    )
}
"""Drivers that can be loaded by their name alone."""

BUILT_IN = ("virtio-pci",)
"""Those of them that Debian's POWER kernels always have."""
