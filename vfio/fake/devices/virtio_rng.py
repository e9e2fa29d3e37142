"""An endpoint of the shape of QEMU's virtio-rng-pci: capabilities of its vendor's, a prefetchable 64-bit BAR, MSI-X, resets
by function level and by power state, no engine.

Layout: Virtual I/O Device (VIRTIO) Version 1.1, 4.1.4; where things are, as QEMU 7.2 has them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfio.fake import registers as reg
from vfio.fake.devices.model import PciModel

if TYPE_CHECKING:
    from vfio import topology

_COMMON, _NOTIFY, _ISR, _DEVICE, _ACCESS = range(1, 6)
_STRUCTURES = ((0x84, _COMMON), (0x94, _ISR), (0xA4, _DEVICE), (0xB4, _NOTIFY))
"""Where each capability is, and what it says is in BAR 4, a page after the one before."""
_ACCESS_CAPABILITY = 0xC8
_BAR, _PAGE = 4, 0x1000
_REPORTED = 0xE
"""Device control: the errors of which firmware wants to hear."""
_FEATURES = 0x3000_0000
"""What the device offers: indirect descriptors, and event indexes."""


class VirtioRng(PciModel):
    """Two vectors.  Of its registers it has the features alone; stores are dropped."""

    config_size = reg.EXPRESS_SIZE
    revision = 1
    interrupt_pin = 1

    def __init__(self, device: topology.Device) -> None:
        super().__init__(device)
        self.add_bar(1, _PAGE)
        self.add_bar(_BAR, 4 * _PAGE, bits64=True, prefetch=True)
        self.registers.add_express(0x40, flr=True)
        self.registers.field(0x40 + reg.EXP_DEVCTL, 2, _REPORTED, reg.EXP_DEVCTL_FLR | 0xF)
        self.registers.add_pm(0x7C, capabilities=0x0003)
        for page, (at, kind) in enumerate(_STRUCTURES):
            length = 20 if kind == _NOTIFY else 16
            self.registers.add_capability(reg.CAP_VENDOR, at, length)
            self.registers.field(at + 2, 2, length | kind << 8)
            self.registers.field(at + 4, 4, _BAR)
            self.registers.field(at + 8, 8, page * _PAGE | _PAGE << 32)
        self.registers.field(0xC4, 4, 4)  # bytes between two doorbells
        self.registers.add_capability(reg.CAP_VENDOR, _ACCESS_CAPABILITY, 20)
        self.registers.field(_ACCESS_CAPABILITY + 2, 2, 20 | _ACCESS << 8)
        self.registers.field(_ACCESS_CAPABILITY + 4, 1, 0, 0xFF)  # BAR, offset, length and data of an access to a BAR
        self.registers.field(_ACCESS_CAPABILITY + 8, 12, 0, (1 << 96) - 1)
        self.registers.add_msix(0xDC, vectors=2, bar=1, table=0, pba=0x800)

    def bar_read(self, bar: int, offset: int, width: int) -> int:
        if bar != _BAR:
            return 0
        if offset // _PAGE == _STRUCTURES.index((0xA4, _DEVICE)):
            return (1 << 8 * width) - 1  # it has nothing to configure
        registers = bytes(4) + _FEATURES.to_bytes(4, "little")
        return int.from_bytes(registers[offset : offset + width], "little")
