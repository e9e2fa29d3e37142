"""A plain endpoint: memory behind a BAR, doorbells that interrupt, an engine that copies over DMA, MSI-X, and a
function level reset.  No QEMU counterpart: for tests that want more than edu has.

BAR 0, 64-bit, little-endian, byte offsets; accesses of 4 or 8 bytes:

    0x000  R    0x0001_FA4E, which tells the device
    0x008  W    doorbell: send message n
    0x010  RW   bus address        0x018  RW  length, 1 to 4096 bytes
    0x020  W    1: copy from bus address to the buffer; 2: from the buffer to the bus address
    0x1000 RW   the buffer, 4096 bytes
    0x2000      MSI-X table, 0x3000 pending bits

A topology may say other BARs and another MSI-X table, as a captured one does: other BARs read zero and keep nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfio.fake import registers as reg
from vfio.fake.devices.model import PciModel

if TYPE_CHECKING:
    from vfio import topology

_ID, _DOORBELL, _ADDRESS, _LENGTH, _COPY = 0x000, 0x008, 0x010, 0x018, 0x020
_BUFFER, _BUFFER_SIZE = 0x1000, 0x1000
_MAGIC = 0x0001_FA4E


class Endpoint(PciModel):
    """The device.  The property ``vectors`` is how many MSI-X vectors it has, 1 to 256 (8 where none is said)."""

    config_size = reg.EXPRESS_SIZE
    revision = 1
    interrupt_pin = 1

    def __init__(self, device: topology.Device) -> None:
        super().__init__(device)
        self.add_bar(0, 0x4000, bits64=True)
        self.registers.add_pm(0x60, capabilities=0x0003, control=reg.PM_NO_SOFT_RESET)
        self.registers.add_express(0x80, flr=True)
        vectors = int(self.properties.get("vectors", "8"), 0)
        self.registers.add_msix(0x40, vectors=vectors, bar=0, table=0x2000, pba=0x3000)
        self.reset()

    def reset(self) -> None:
        self.address = self.length = 0
        self.buffer = bytearray(_BUFFER_SIZE)

    def bar_read(self, bar: int, offset: int, width: int) -> int:
        if bar:
            return 0
        if _BUFFER <= offset < _BUFFER + _BUFFER_SIZE:
            start = offset - _BUFFER
            return int.from_bytes(self.buffer[start : start + width], "little")
        return {_ID: _MAGIC, _ADDRESS: self.address, _LENGTH: self.length}.get(offset, 0) if width >= 4 else 0

    def bar_write(self, bar: int, offset: int, width: int, value: int) -> None:
        if bar:
            return
        if _BUFFER <= offset < _BUFFER + _BUFFER_SIZE:
            start = offset - _BUFFER
            self.buffer[start : start + width] = value.to_bytes(width, "little")
        elif width < 4:
            return
        elif offset == _DOORBELL and value < self.vectors:
            self.raise_msi(value)
        elif offset == _ADDRESS:
            self.address = value
        elif offset == _LENGTH:
            self.length = min(value, _BUFFER_SIZE)
        elif offset == _COPY and value == 1:
            self.buffer[: self.length] = self.dma_read(self.address, self.length)
        elif offset == _COPY and value == 2:
            self.dma_write(self.address, bytes(self.buffer[: self.length]))
