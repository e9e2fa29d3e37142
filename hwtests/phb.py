"""Freezing a PE for real: the freeze bits of an emulated PHB4 or PHB5, written by root through /dev/mem.

QEMU freezes no PE by itself.  But the freeze state of its PHB4 is a table that software can write, and firmware and
kernel read it back: from then on they behave as for a real freeze.  Only MMIO, DMA and interrupts go on: QEMU does not
look at the table.  (skiboot: include/phb4-regs.h.)
"""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

_ADDRESS, _DATA = 0x220, 0x228  # PHB_IODA_ADDR and PHB_IODA_DATA0: select an entry of a table, and access it
_PESTA, _PESTB, _PEEV = 7, 8, 20
_STOPPED = 1 << 63
_REGISTERS = 0x1000  # bytes to map

HALVES = {"none": (False, False), "mmio": (True, False), "dma": (False, True), "both": (True, True)}
"""What is frozen, as `vfio.fake.pe.Freeze` names it: MMIO, DMA."""


class Phb:
    """The freeze table of one PHB; `domain` is its PCI domain."""

    def __init__(self, domain: int) -> None:
        self._fd = os.open("/dev/mem", os.O_RDWR | os.O_SYNC)
        self._mmap = mmap.mmap(self._fd, _REGISTERS, offset=_registers(domain))
        self._words = memoryview(self._mmap).cast("Q")

    def freeze(self, number: int, what: str = "both") -> None:
        """Freeze PE `number`, or a half of it; "none" thaws it behind the kernel's back."""
        mmio, dma = HALVES[what]
        self._write(_PESTA, number, _STOPPED if mmio else 0)
        self._write(_PESTB, number, _STOPPED if dma else 0)
        # The bit stays: firmware looks at a PE's own state only where it is set.
        self._write(_PEEV, number // 64, self._read(_PEEV, number // 64) | 1 << 63 - number % 64)

    def frozen(self, number: int) -> str:
        """What of PE `number` is frozen."""
        found = bool(self._read(_PESTA, number) & _STOPPED), bool(self._read(_PESTB, number) & _STOPPED)
        return next(name for name, halves in HALVES.items() if halves == found)

    def close(self) -> None:
        self._words.release()
        self._mmap.close()
        os.close(self._fd)

    def _read(self, table: int, index: int) -> int:
        self._select(table, index)
        return _swapped(self._words[_DATA // 8])

    def _write(self, table: int, index: int, value: int) -> None:
        self._select(table, index)
        self._words[_DATA // 8] = _swapped(value)

    def _select(self, table: int, index: int) -> None:
        self._words[_ADDRESS // 8] = _swapped(table << 48 | index)


def _registers(domain: int) -> int:
    """Address of the registers of the PHB with that PCI domain, which is its number to the firmware."""
    for node in Path("/proc/device-tree").glob("pciex@*"):
        if int.from_bytes((node / "ibm,opal-phbid").read_bytes(), "big") == domain:
            return int.from_bytes((node / "reg").read_bytes()[:8], "big")
    raise LookupError(f"no PHB for PCI domain {domain:04x} in the device tree")


def _swapped(value: int) -> int:
    """Between the CPU's order and the registers', which are big-endian."""
    return int.from_bytes(value.to_bytes(8, "big"), sys.byteorder)
