"""Device: the file that VFIO_GROUP_GET_DEVICE_FD gives, and what it tells of itself."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from vfio import errors, info, reset, uapi
from vfio.closing import Closing
from vfio.irq import Irq
from vfio.region import Region

if TYPE_CHECKING:
    from vfio.group import Group
    from vfio.iommu.model import Iommu
    from vfio.pci import ConfigSpace

BAR0, BAR1, BAR2, BAR3, BAR4, BAR5 = range(uapi.VFIO_PCI_BAR0_REGION_INDEX, uapi.VFIO_PCI_BAR5_REGION_INDEX + 1)
ROM = uapi.VFIO_PCI_ROM_REGION_INDEX
CONFIG = uapi.VFIO_PCI_CONFIG_REGION_INDEX


class DeviceInfo(NamedTuple):
    """VFIO_DEVICE_GET_INFO."""

    flags: int
    """VFIO_DEVICE_FLAGS_*: RESET, PCI…"""
    num_regions: int
    num_irqs: int
    capabilities: tuple[info.Capability, ...]


class Device(Closing):
    """An open device: regions, interrupts, reset.  Made by `Group.device` or `vfio.open_device`."""

    def __init__(self, group: Group, address: str, fd: int) -> None:
        self.group = group
        self.address = address
        self.backend = group.backend
        self._fd: int | None = fd
        self._regions: dict[int, Region] = {}
        self._irqs: dict[int, Irq] = {}
        found = info.get(
            self.backend, fd, uapi.VFIO_DEVICE_GET_INFO, uapi.vfio_device_info, f"cannot get the info of {address}"
        )
        caps: tuple[info.Capability, ...] = ()
        if found.flags & uapi.VFIO_DEVICE_FLAGS_CAPS:
            caps = tuple(info.chain(found, found.cap_offset, f"info of {address}"))
        self.info = DeviceInfo(found.flags, found.num_regions, found.num_irqs, caps)

    @property
    def fd(self) -> int:
        """The file descriptor; raises `errors.Closed` after `close`."""
        if self._fd is None:
            raise errors.Closed(f"device {self.address}")
        return self._fd

    @property
    def closed(self) -> bool:
        return self._fd is None

    @property
    def iommu(self) -> Iommu:
        """The IOMMU of the device's container."""
        container = self.group.container
        if container is None or container.iommu is None:
            raise errors.Closed(f"IOMMU of {self.address}")
        return container.iommu

    def region(self, index: int) -> Region:
        """The region `index` (``BAR0``…``BAR5``, ``ROM``, ``CONFIG``, or a device-specific one).

        Raises `errors.NoSuchRegion` for an index that the device does not have.  A region of size 0 is one that is
        not implemented.
        """
        if index not in self._regions:
            self._regions[index] = Region(self, index)
        return self._regions[index]

    def regions(self) -> list[Region]:
        """All regions that have a size, in the order of their indexes."""
        found = []
        for index in range(self.info.num_regions):
            try:
                region = self.region(index)
            except errors.NoSuchRegion:
                continue  # the VGA index of a device without VGA is refused by the kernel
            if region.size:
                found.append(region)
        return found

    @cached_property
    def config(self) -> Region:
        """PCI configuration space."""
        return self.region(CONFIG)

    @cached_property
    def pci(self) -> ConfigSpace:
        """The same, decoded: ``device.pci.command.bus_master = True``."""
        from vfio.pci import ConfigSpace  # 10 ms of tables that few programs look at

        return ConfigSpace(self.config)

    def irq(self, index: int) -> Irq:
        """The interrupt index (``uapi.VFIO_PCI_*_IRQ_INDEX``); raises `errors.NoInterrupt` where there is none."""
        if index not in self._irqs:
            self._irqs[index] = Irq(self, index)
        return self._irqs[index]

    def irqs(self) -> list[Irq]:
        """All interrupt indexes that have an interrupt."""
        found = []
        for index in range(self.info.num_irqs):
            try:
                irq = self.irq(index)
            except errors.NoInterrupt:
                continue  # ERR is refused on a device that is not PCI Express
            if irq.count:
                found.append(irq)
        return found

    @property
    def intx(self) -> Irq:
        """The PCI line interrupt; masked by the kernel whenever it fires, `Irq.unmask` lets the next one through."""
        return self.irq(uapi.VFIO_PCI_INTX_IRQ_INDEX)

    @property
    def msi(self) -> Irq:
        return self.irq(uapi.VFIO_PCI_MSI_IRQ_INDEX)

    @property
    def msix(self) -> Irq:
        return self.irq(uapi.VFIO_PCI_MSIX_IRQ_INDEX)

    @property
    def err(self) -> Irq:
        """Signalled when the host reports an error of the device."""
        return self.irq(uapi.VFIO_PCI_ERR_IRQ_INDEX)

    @property
    def req(self) -> Irq:
        """Signalled when the host asks for the device back."""
        return self.irq(uapi.VFIO_PCI_REQ_IRQ_INDEX)

    @property
    def can_reset(self) -> bool:
        """Whether `reset` works: the device has a function reset, or its bus can be reset alone."""
        return bool(self.info.flags & uapi.VFIO_DEVICE_FLAGS_RESET)

    def reset(self) -> None:
        """Reset the function (VFIO_DEVICE_RESET); its configuration space is saved and restored around it.

        Raises `errors.CallFailed`: EINVAL where no function reset works, EAGAIN while somebody else holds the device.
        """
        try:
            self.backend.ioctl(self.fd, uapi.VFIO_DEVICE_RESET)
        except OSError as error:
            why = "it has no function reset, and its bus cannot be reset alone" if error.errno == errno.EINVAL else ""
            raise errors.CallFailed(error.errno or errno.EIO, f"cannot reset {self.address}", why) from error

    def hot_reset_info(self) -> list[errors.Affected]:
        """The devices that `hot_reset` resets, this one among them; as `vfio.reset.affected`."""
        return reset.affected(self)

    def hot_reset(self, groups: Iterable[Group] | None = None) -> None:
        """Reset the device's slot or bus, for whoever holds the groups of all devices on it: `vfio.reset.hot_reset`."""
        reset.hot_reset(self, groups)

    def enable_bus_master(self, on: bool = True) -> None:
        """Let the device start DMA (PCI command register, bit 2).  The kernel clears it when a device is opened."""
        command = self.config.read16(4)
        self.config.write16(4, command | 4 if on else command & ~4)

    def close(self) -> None:
        """Disable its interrupts, unmap its regions, and close.  The kernel resets the device with its last file."""
        if self._fd is None:
            return
        for irq in self._irqs.values():
            irq.close()
        for region in self._regions.values():
            region.close()
        fd, self._fd = self._fd, None
        self.backend.close(fd)
        self.group.left(self)

    def __repr__(self) -> str:
        return f"<Device {self.address}>"
