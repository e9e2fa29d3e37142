"""QEMU's educational device: a register that inverts, one that computes factorials, a DMA engine, interrupts.

Specification: docs/specs/edu.rst of QEMU; answers were compared with QEMU 7.2's.  Its registers have the byte order of
the machine's architecture, so they are big-endian on every PowerPC.  Transfers and factorials are done at once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from vfio.fake.devices.model import PciModel
from vfio.fake.kernel_error import KernelWouldBeHurt

if TYPE_CHECKING:
    from vfio import topology

_ID, _LIVENESS, _FACTORIAL, _STATUS = 0x00, 0x04, 0x08, 0x20
_IRQ_STATUS, _IRQ_RAISE, _IRQ_ACK = 0x24, 0x60, 0x64
_DMA_SOURCE, _DMA_DESTINATION, _DMA_COUNT, _DMA_COMMAND = 0x80, 0x88, 0x90, 0x98
_DMA_REGISTERS = (_DMA_SOURCE, _DMA_DESTINATION, _DMA_COUNT, _DMA_COMMAND)

_VERSION = 0x010000ED
_INTERRUPT_WHEN_COMPUTED, _COMPUTED = 0x80, 0x001
_RUN, _TO_MEMORY, _INTERRUPT_WHEN_DONE, _DONE = 1, 2, 4, 0x100
_BUFFER, _BUFFER_SIZE = 0x40000, 4096


class Edu(PciModel):
    """The device.  The property ``dma_mask`` is the address bits that its engine has (28 of them where none is said)."""

    revision = 0x10
    interrupt_pin = 1

    def __init__(self, device: topology.Device) -> None:
        super().__init__(device)
        self.add_bar(0, 1 << 20)
        self.registers.add_msi(0x40)
        self.dma_mask = int(self.properties.get("dma_mask", "0xfffffff"), 0)
        self.buffer = bytearray(_BUFFER_SIZE)
        """The device's own memory, which the engine sees at 0x40000."""
        self.inverted = self.factorial = self.status = self.interrupt_status = 0
        self.dma = dict.fromkeys(_DMA_REGISTERS, 0)

    def reset(self) -> None:
        """QEMU's edu forgets nothing in a reset; only its interrupt line falls."""

    def bar_read(self, bar: int, offset: int, width: int) -> int:
        if width < 4:
            return 0  # no such access: nothing answers
        ones = (1 << 8 * width) - 1
        if offset < 0x80 and width != 4:
            return ones
        registers = {
            _ID: _VERSION,
            _LIVENESS: self.inverted,
            _FACTORIAL: self.factorial,
            _STATUS: self.status,
            _IRQ_STATUS: self.interrupt_status,
            **self.dma,
        }
        return self._ordered(registers.get(offset, ones) & ones, width)

    def bar_write(self, bar: int, offset: int, width: int, value: int) -> None:
        if width < 4 or (offset < 0x80 and width != 4):
            return
        value = self._ordered(value, width)
        if offset == _LIVENESS:
            self.inverted = ~value & 0xFFFF_FFFF
        elif offset == _FACTORIAL:
            self._compute(value)
        elif offset == _STATUS:
            self.status = value & _INTERRUPT_WHEN_COMPUTED
        elif offset == _IRQ_RAISE:
            self._raise(value)
        elif offset == _IRQ_ACK:
            self._acknowledge(value)
        elif offset in (_DMA_SOURCE, _DMA_DESTINATION, _DMA_COUNT):
            self.dma[offset] = value
        elif offset == _DMA_COMMAND and value & _RUN:
            self.dma[offset] = value
            self._transfer()

    def _compute(self, n: int) -> None:
        self.factorial = math.factorial(n) & 0xFFFF_FFFF if n < 34 else 0  # 34! is a multiple of 2**32
        if self.status & _INTERRUPT_WHEN_COMPUTED:
            self._raise(_COMPUTED)

    def _transfer(self) -> None:
        command, count = self.dma[_DMA_COMMAND], self.dma[_DMA_COUNT]
        local = self.dma[_DMA_SOURCE if command & _TO_MEMORY else _DMA_DESTINATION] - _BUFFER
        # QEMU 7.2 wants the transfer to end before the buffer does.
        if local < 0 or count == 0 or local + count >= _BUFFER_SIZE:
            raise KernelWouldBeHurt(
                f"{self.pci.address}: a DMA of {count} bytes at {local + _BUFFER:#x} of the edu, whose memory is "
                f"{_BUFFER:#x}..{_BUFFER + _BUFFER_SIZE - 2:#x}: QEMU ends the whole machine. Transfer 1 to "
                f"{_BUFFER_SIZE - 1} bytes"
            )
        if command & _TO_MEMORY:
            address = self.dma[_DMA_DESTINATION] & self.dma_mask
            self.dma_write(address, bytes(self.buffer[local : local + count]))
        else:
            self.buffer[local : local + count] = self.dma_read(self.dma[_DMA_SOURCE] & self.dma_mask, count)
        self.dma[_DMA_COMMAND] &= ~_RUN
        if command & _INTERRUPT_WHEN_DONE:
            self._raise(_DONE)

    def _raise(self, bits: int) -> None:
        self.interrupt_status |= bits
        if self.interrupt_status:
            if self.msi_enabled:
                self.raise_msi(0)
            else:
                self.raise_intx(True)

    def _acknowledge(self, bits: int) -> None:
        self.interrupt_status &= ~bits
        if not self.interrupt_status and not self.msi_enabled:
            self.raise_intx(False)

    def _ordered(self, value: int, width: int) -> int:
        """Between the register and the little-endian bus."""
        order = "little" if self.pci.machine.topology.platform.name == "PC" else "big"
        return int.from_bytes(value.to_bytes(width, "little"), order)  # type: ignore[arg-type]
