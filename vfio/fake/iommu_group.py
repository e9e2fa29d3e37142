"""IOMMU groups: devices that only together can be kept from the rest, and who owns their DMA.  (drivers/iommu/iommu.c)"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfio.fake.kernel_error import fail

if TYPE_CHECKING:
    from vfio.fake.pci import PciDevice
    from vfio.fake.table_group import TableGroup


class IommuGroup:
    """A group: /sys/kernel/iommu_groups/N."""

    def __init__(
        self,
        number: int,
        name: str,
        devices: list[PciDevice] | None = None,
        table_group: TableGroup | None = None,
    ) -> None:
        self.number = number
        self.name = name
        """As sysfs shows it: domain0-pefd; empty where it shows none."""
        self.devices: list[PciDevice] = [] if devices is None else devices
        self.table_group = table_group
        """Its windows; None where the platform has none to give."""
        self.domain_type = "DMA"
        """Of the domain that the host uses the group with, where it can be chosen: DMA, DMA-FQ or identity."""
        self.dma_owner: object | None = None
        """Who claimed the DMA of the whole group: a VFIO group, while it is in a container."""

    @property
    def reserved(self) -> list[tuple[int, int]]:
        """First and last IOVA of what firmware uses its devices for, on a PC."""
        return [each for pci in self.devices for each in pci.machine.topology.device(pci.address).reserved]

    def blockers(self) -> list[PciDevice]:
        """The devices whose drivers do DMA through the kernel: with one of them the group is not viable."""
        return [device for device in self.devices if device.machine.driver_core.on_host_driver(device.address)]

    @property
    def dma_claimed(self) -> bool:
        """Whether somebody, a driver of the host's or a user, has the DMA of the group."""
        return self.dma_owner is not None or bool(self.blockers())

    def claim_dma_owner(self, owner: object) -> None:
        """Take the group's DMA from the host; EPERM while somebody has it."""
        if self.dma_claimed:
            raise fail(errno.EPERM)
        self.dma_owner = owner
        if self.table_group:
            self.table_group.take_ownership()

    def release_dma_owner(self) -> None:
        """Give the group's DMA back to the host, which makes its own windows again."""
        self.dma_owner = None
        if self.table_group:
            self.table_group.release_ownership()

    def use_default_domain(self, driver: str) -> None:
        """`driver` is about to bind to a device of the group; EBUSY if it does DMA and a user owns the group."""
        if not self.devices[0].machine.driver_core.drivers[driver].host_dma:
            return
        if self.dma_owner is not None:
            raise fail(errno.EBUSY)
        if self.table_group:
            self.table_group.used_by_host()
