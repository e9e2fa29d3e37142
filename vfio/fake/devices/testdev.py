"""QEMU's pci-testdev: a memory BAR and an I/O BAR that count the writes of a selected test.  No interrupt.

Specification: docs/specs/pci-testdev.rst of QEMU.  Writing a test's number, 0 to 2, to byte 0 selects it; then the BAR
shows its description (number, width, offset, data, count, name), and matching writes at that offset are counted.  The
memory BAR was compared with QEMU 7.2's; no host at hand reaches the I/O BAR.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from vfio.fake.devices.model import PciModel

if TYPE_CHECKING:
    from vfio import topology

_MEMORY_SIZE, _IO_SIZE = 2048, 128
_SPACES = (("mmio", _MEMORY_SIZE), ("portio", _IO_SIZE))
_TESTS = (("no-eventfd", 0xFA), ("wildcard-eventfd", 0xCE), ("datamatch-eventfd", 0xFA))
"""The tests of each BAR, and the byte that each writes."""
_NO_EVENTFD, _WILDCARD = 0, 1


class TestDevice(PciModel):
    """The device.  Bytes are accessed one by one, whatever the width of an access."""

    __test__ = False  # its name is QEMU's; it is no case of pytest's

    def __init__(self, device: topology.Device) -> None:
        super().__init__(device)
        self.add_bar(0, 2 * _MEMORY_SIZE)
        self.add_bar(1, 2 * _IO_SIZE, io=True)
        self.reset()

    def reset(self) -> None:
        self._selected: tuple[int, int] | None = None  # BAR and test
        self._count = 0

    def bar_read(self, bar: int, offset: int, width: int) -> int:
        return int.from_bytes(self._description()[offset : offset + width], "little")

    def bar_write(self, bar: int, offset: int, width: int, value: int) -> None:
        if width == 1 and self._eventfd_takes(bar, offset, value):
            return
        for at, byte in enumerate(value.to_bytes(width, "little"), start=offset):
            self._write_byte(bar, at, byte)

    def _write_byte(self, bar: int, offset: int, value: int) -> None:
        if offset == 0:
            self.reset()
            if value < len(_TESTS):
                self._selected = (bar, value)
        elif self._selected and self._selected[0] == bar and offset == self._offset():
            test = self._selected[1]
            if test == _WILDCARD or value == _TESTS[test][1]:
                self._count += 1

    def _eventfd_takes(self, bar: int, offset: int, value: int) -> bool:
        """Tests 1 and 2 have an eventfd that swallows just the write that it is for."""
        if not self._selected or self._selected[0] != bar or offset != self._offset():
            return False
        test = self._selected[1]
        return test == _WILDCARD or (test != _NO_EVENTFD and value == _TESTS[test][1])

    def _offset(self) -> int:
        """Where the selected test writes."""
        bar, test = self._selected or (0, 0)
        return _SPACES[bar][1] + bar * len(_TESTS) + test

    def _description(self) -> bytes:
        if not self._selected:
            return b""
        bar, test = self._selected
        name, data = _TESTS[test]
        text = f"{_SPACES[bar][0]}-{name}".encode()
        return struct.pack("<BBHIIi", test, 1, 0, self._offset(), data, self._count) + text
