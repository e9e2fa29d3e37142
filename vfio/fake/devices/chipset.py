"""Functions of QEMU's Q35 chipset, as VFIO and sysfs meet them: identity, BARs, capabilities; no engine.

Their own registers behind the header and the capabilities read as zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vfio.fake import registers as reg
from vfio.fake.devices.model import PciModel

if TYPE_CHECKING:
    from vfio import topology

_CAP_SATA = 0x12


class HostBridge(PciModel):
    """What stands for the host itself on its bus."""


class IsaBridge(PciModel):
    """The bridge to what is left of the ISA bus, the first of several functions."""

    def __init__(self, device: topology.Device) -> None:
        super().__init__(device)
        self.registers.field(reg.HEADER_TYPE, 1, 0x80)


class Ahci(PciModel):
    """A SATA controller without a disk."""

    interrupt_pin = 1

    def __init__(self, device: topology.Device) -> None:
        super().__init__(device)
        self.registers.field(reg.HEADER_TYPE, 1, 0x80)
        self.add_bar(4, 0x20, io=True)
        self.add_bar(5, 0x1000)
        self.registers.add_capability(_CAP_SATA, 0xA8, 8)
        self.registers.field(0xAA, 2, 0x0010)
        self.registers.field(0xAC, 4, 0x0048)
        self.registers.add_msi(0x80)


class SmBus(PciModel):
    """A controller of the system management bus."""

    interrupt_pin = 1
    bars_at: Mapping[int, int] = {4: 0x700}

    def __init__(self, device: topology.Device) -> None:
        super().__init__(device)
        self.registers.field(reg.HEADER_TYPE, 1, 0x80)
        self.add_bar(4, 0x40, io=True)
