"""An endpoint of the shape of QEMU's e1000e, an 82574L: four BARs, MSI, MSI-X, AER, reset by power state, no engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfio.fake import registers as reg
from vfio.fake.devices.model import PciModel

if TYPE_CHECKING:
    from vfio import topology

_FLASH_BAR, _IO_BAR, _MSIX_BAR = 1, 2, 3
_POWER_ON = {
    0x00: 0x140241,  # device control
    0x08: 0x80283,  # device status
    0x10: 0x300,  # EEPROM control
    0x14: 0x2,
    0x38: 0x8100,  # VLAN type
    0x40: 0x12005452,  # MAC address 52:54:00:12:34:56
    0x44: 0x80005634,
}
"""Registers of BAR 0 after power-on; all others are 0."""


class E1000e(PciModel):
    """Five vectors.  BAR 0 shows the registers of an idle device; stores to it are dropped."""

    config_size = reg.EXPRESS_SIZE
    interrupt_pin = 1
    subsystem = (0x8086, 0)

    def __init__(self, device: topology.Device) -> None:
        super().__init__(device)
        registers = self.registers
        self.add_bar(0, 0x20000)
        self.add_bar(_FLASH_BAR, 0x20000)
        self.add_bar(_IO_BAR, 0x20, io=True)
        self.add_bar(_MSIX_BAR, 0x4000)
        registers.add_msix(0xA0, vectors=5, bar=_MSIX_BAR, table=0, pba=0x2000)
        registers.add_express(0xE0, version=1)
        registers.add_msi(0xD0)
        registers.add_pm(0xC8, capabilities=0x0022, writable=0x1F03)
        registers.add_aer(0x100)
        registers.add_extended(reg.EXT_CAP_DSN, 1, 0x140, 12)
        registers.field(0x144, 8, 0x52_54_00_FF_FF_12_34_56)  # the MAC address as a serial number
        self._io_address = 0

    def bar_read(self, bar: int, offset: int, width: int) -> int:
        if bar == 0:
            word = _POWER_ON.get(offset & ~3, 0)
            return word | _POWER_ON.get(offset + 4, 0) << 32 if width == 8 else word
        if bar == _IO_BAR and offset == 0:
            return self._io_address
        return 0

    def bar_write(self, bar: int, offset: int, width: int, value: int) -> None:
        if bar == _IO_BAR and offset == 0:
            self._io_address = value & 0xFFFF_FFFF

    def reset(self) -> None:
        self._io_address = 0
