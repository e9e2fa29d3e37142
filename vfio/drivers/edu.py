"""QEMU's educational device: a register that inverts, one that computes factorials, a DMA engine, interrupts.

Specification: docs/specs/edu.rst of QEMU.  Registers are in BAR 0, little-endian on most machines and big-endian under
QEMU's big-endian targets, which includes every ppc64 guest; the identification register tells which.  Below 0x80 only
32-bit accesses work.
"""

from __future__ import annotations

import errno
import time

from vfio import errors
from vfio.device import BAR0, Device
from vfio.region import ByteOrder, Region

_ID, _LIVENESS, _FACTORIAL, _STATUS = 0x00, 0x04, 0x08, 0x20
_IRQ_STATUS, _IRQ_RAISE, _IRQ_ACK = 0x24, 0x60, 0x64
_DMA_SOURCE, _DMA_DESTINATION, _DMA_COUNT, _DMA_COMMAND = 0x80, 0x88, 0x90, 0x98

_MAGIC, _MAGIC_MASK = 0x010000ED, 0x0000FFFF
_BUSY = 1
_ALL_ONES = 0xFFFF_FFFF
_RUN, _TO_MEMORY, _INTERRUPT_WHEN_DONE = 1, 2, 4
_BUFFER = 0x40000
"""Where the DMA engine sees the device's own memory."""


class Edu:
    """An edu device with its DMA engine on.  Raises `errors.CallFailed` where the device is none."""

    ID = (0x1234, 0x11E8)
    """PCI vendor and device."""
    capacity = 4095
    """Bytes that can be transferred: the device has one more, which QEMU 7.2 ends the whole machine for."""
    DONE = 0x100
    """Interrupt status of a finished transfer."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.bar: Region = device.region(BAR0)
        orders: tuple[ByteOrder, ...] = ("little", "big")
        for order in orders:
            self.bar.byteorder = order
            if self.bar.read32(_ID) & _MAGIC_MASK == _MAGIC & _MAGIC_MASK:
                break
        else:
            seen = self.bar.read32(_ID)
            raise errors.CallFailed(
                errno.ENODEV, f"{device.address} is no edu", f"its identification register reads {seen:#x}"
            )
        device.enable_bus_master()

    def identify(self) -> str:
        version = self.bar.read32(_ID)
        return f"edu {version >> 24}.{version >> 16 & 0xFF}, registers {self.bar.byteorder}-endian"

    def invert(self, value: int) -> int:
        """What the device makes of a 32-bit value: its complement."""
        self.bar.write32(_LIVENESS, value)
        return self.bar.read32(_LIVENESS)

    def factorial(self, n: int, timeout: float = 5.0) -> int:
        """n!, modulo 2**32, computed by the device.  Raises `errors.TimedOut` after `timeout` seconds."""
        self.bar.write32(_FACTORIAL, n)
        self._wait(_STATUS, _BUSY, timeout, "factorial")
        return self.bar.read32(_FACTORIAL)

    def load(self, iova: int, length: int, *, interrupt: bool = False, timeout: float = 5.0) -> None:
        """DMA `length` bytes from `iova` into the device.

        Raises ValueError for more bytes than the device has, `errors.TimedOut` after `timeout` seconds; with `interrupt`
        it returns at once, and the device interrupts with status `DONE`.
        """
        self._transfer(iova, _BUFFER, length, _RUN, interrupt, timeout)

    def store(self, iova: int, length: int, *, interrupt: bool = False, timeout: float = 5.0) -> None:
        """DMA `length` bytes from the device to `iova`; as `load`."""
        self._transfer(_BUFFER, iova, length, _RUN | _TO_MEMORY, interrupt, timeout)

    def interrupt(self, status: int = 1) -> None:
        """Interrupt, with the bits of `status` added to the interrupt status."""
        self.bar.write32(_IRQ_RAISE, status)

    @property
    def interrupt_status(self) -> int:
        """The interrupts that are not acknowledged."""
        return self.bar.read32(_IRQ_STATUS)

    def acknowledge(self) -> None:
        """Acknowledge all interrupts; the INTx line falls."""
        self.bar.write32(_IRQ_ACK, self.interrupt_status)

    def _transfer(
        self, source: int, destination: int, length: int, command: int, interrupt: bool, timeout: float
    ) -> None:
        if not 0 < length <= self.capacity:
            # QEMU ends the machine at a transfer that leaves the device's memory.
            raise ValueError(f"a transfer of {length} bytes: 1 to {self.capacity} are possible")
        self.bar.write64(_DMA_SOURCE, source)
        self.bar.write64(_DMA_DESTINATION, destination)
        self.bar.write64(_DMA_COUNT, length)
        self.bar.doorbell64(_DMA_COMMAND, command | (_INTERRUPT_WHEN_DONE if interrupt else 0))
        if not interrupt:
            self._wait(_DMA_COMMAND, _RUN, timeout, "DMA")

    def _wait(self, register: int, busy: int, timeout: float, what: str) -> None:
        end = time.monotonic() + timeout
        while (value := self.bar.read32(register)) & busy:
            if value == _ALL_ONES:
                raise errors.DeviceFrozen(self.device.address)
            if time.monotonic() > end:
                raise errors.TimedOut(f"{what} of {self.device.address}", timeout)
            time.sleep(0.002)
