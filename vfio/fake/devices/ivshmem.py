"""QEMU's ivshmem-plain: a BAR of plain memory, and four registers that do nothing without a peer.

Specification: docs/specs/ivshmem-spec.rst of QEMU.  BAR 0 has the registers, 4 bytes each: interrupt mask (0x0),
interrupt status (0x4, cleared by a read), IV position (0x8, read-only), doorbell (0xc, write-only).  BAR 2, 64-bit and
prefetchable, is the memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfio.fake.devices.model import PciModel
from vfio.fake.devices.plain_memory import PlainMemory

if TYPE_CHECKING:
    from vfio import topology

_REGISTERS, _MEMORY = 0, 2
_MASK, _STATUS = 0x0, 0x4


class Ivshmem(PciModel):
    """The device.  The property ``size`` is that of the memory in bytes, a power of two (1 MiB where none is said)."""

    revision = 1

    def __init__(self, device: topology.Device) -> None:
        super().__init__(device)
        size = int(self.properties.get("size", "0x100000"), 0)
        self.add_bar(_REGISTERS, 0x100)
        self.add_bar(_MEMORY, size, bits64=True, prefetch=True)
        self.memory[_MEMORY] = PlainMemory(size)
        self.reset()

    def reset(self) -> None:
        """Of the registers; memory keeps what is in it."""
        self._mask = self._status = 0

    def bar_read(self, bar: int, offset: int, width: int) -> int:
        if bar != _REGISTERS:
            return super().bar_read(bar, offset, width)
        if offset == _STATUS:
            found, self._status = self._status, 0
            return found
        return self._mask if offset == _MASK else 0

    def bar_write(self, bar: int, offset: int, width: int, value: int) -> None:
        if bar != _REGISTERS:
            super().bar_write(bar, offset, width, value)
        elif offset == _MASK:
            self._mask = value
        elif offset == _STATUS:
            self._status = value
