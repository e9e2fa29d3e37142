"""BARs, the expansion ROM and the VGA ranges by pread and pwrite, by mmap, and by ioeventfd.  (vfio_pci_rdwr.c)"""

from __future__ import annotations

import errno
import sys
from typing import TYPE_CHECKING, NamedTuple

from vfio import uapi
from vfio.backend import Mapping
from vfio.fake import registers as reg
from vfio.fake.eventfd import VirqFd
from vfio.fake.fault import BusError, SegmentationFault
from vfio.fake.kernel_error import KernelWouldBeHurt, fail
from vfio.fake.pci import BARS, ROM

if TYPE_CHECKING:
    from vfio.fake.pci import Bar
    from vfio.fake.process import Process
    from vfio.fake.user import Argument
    from vfio.fake.vfio_pci_device import VfioPciDevice

OFFSET_SHIFT = 40
"""A region begins at its index shifted by this, in the device file."""

_PROT_WRITE = 2
_MAX_IOEVENTFDS = 1000
_SIGNATURE = b"\x55\xaa"


class _Write(NamedTuple):
    """What an ioeventfd writes, and where."""

    bar: int
    offset: int
    data: int
    width: int


class Bars:
    """The BARs of one opened device."""

    def __init__(self, vdev: VfioPciDevice) -> None:
        self._vdev = vdev
        self._pci = vdev.pci
        self._ioeventfds: dict[_Write, VirqFd] = {}

    def bar(self, index: int) -> Bar | None:
        """A BAR that the host has assigned; None for any other."""
        bar = self._pci.bars.get(index)
        return bar if bar and bar.start else None

    def mappable(self, index: int) -> bool:
        """Whether a memory BAR can be mapped: it fills pages, or nothing else is in the pages that it begins."""
        bar = self.bar(index)
        if bar is None or bar.io or index == ROM:
            return False
        page = self._pci.machine.page_size
        if bar.size >= page:
            return True
        if bar.start % page:
            return False
        return not any(
            other is not bar and other.start and bar.start <= other.start < bar.start + page
            for device in self._pci.machine.driver_core.devices.values()
            for other in device.bars.values()
            if not other.io
        )

    @property
    def msix_bar(self) -> int:
        """Index of the BAR with the MSI-X table; -1 without one."""
        at = self._pci.registers.find(reg.CAP_MSIX)
        return self._pci.registers.get(at + reg.MSIX_TABLE, 4) & 7 if at else -1

    def rom_size(self) -> int:
        """Bytes of the ROM's BAR; 0 where there is none, or its image has no signature."""
        bar = self.bar(ROM)
        return bar.size if bar and self._pci.model.rom()[:2] == _SIGNATURE else 0

    # --- pread, pwrite ---

    def read(self, index: int, offset: int, count: int) -> bytes:
        """EINVAL outside, EIO while memory is not decoded; short at the end of the BAR."""
        bar, count = self._span(index, offset, count)
        if index == ROM:
            return self._read_rom(bar, offset, count)
        found = b""
        while len(found) < count:
            at = offset + len(found)
            width, hidden = self._piece(bar, at, count - len(found))
            if hidden:
                found += b"\xff" * width
                continue
            self._want_memory(bar)
            found += self._pci.bar_read(index, at, width).to_bytes(width, "little")
        return found

    def write(self, index: int, offset: int, data: bytes) -> int:
        """As `read`; returns how many bytes were written."""
        if index == ROM:
            raise fail(errno.EINVAL)
        bar, count = self._span(index, offset, len(data))
        done = 0
        while done < count:
            width, hidden = self._piece(bar, offset + done, count - done)
            if not hidden:
                self._want_memory(bar)
                value = int.from_bytes(data[done : done + width], "little")
                self._pci.bar_write(index, offset + done, width, value)
            done += width
        return done

    def _span(self, index: int, offset: int, count: int) -> tuple[Bar, int]:
        bar = self.bar(index)
        if bar is None or offset >= bar.size:
            raise fail(errno.EINVAL)
        return bar, min(count, bar.size - offset)

    def _piece(self, bar: Bar, at: int, count: int) -> tuple[int, bool]:
        """How many bytes to access next, and whether they are the MSI-X table's, which no user reaches like this."""
        table = self._table(bar.index)
        if at in table:
            return min(count, table.stop - at), True
        if at < table.start:
            count = min(count, table.start - at)
        return next(width for width in (8, 4, 2, 1) if width <= count and at % width == 0), False

    def _table(self, index: int) -> range:
        at = self._pci.registers.find(reg.CAP_MSIX) if index == self.msix_bar else 0
        if not at:
            return range(0)
        start = self._pci.registers.get(at + reg.MSIX_TABLE, 4) & ~7
        return range(start, start + 16 * self._pci.model.vectors)

    def _want_memory(self, bar: Bar) -> None:
        if not bar.io and not self._vdev.memory_enabled:
            raise fail(errno.EIO)

    def _read_rom(self, bar: Bar, offset: int, count: int) -> bytes:
        image = self._pci.model.rom()
        if image[:2] != _SIGNATURE or not self._pci.command & reg.COMMAND_MEMORY:
            raise fail(errno.ENOMEM)
        return image[offset : offset + count].ljust(count, b"\xff")

    # --- mmap ---

    def mmap(self, index: int, offset: int, length: int, prot: int) -> Mapping:
        """Map a BAR: EINVAL for what cannot be mapped, and past its end in whole pages."""
        if not self.mappable(index):
            raise fail(errno.EINVAL)
        page = self._pci.machine.page_size
        if offset + -(-length // page) * page > -(-self._pci.bars[index].size // page) * page:
            raise fail(errno.EINVAL)
        return BarMapping(self._vdev, index, offset, length, prot)

    # --- ioeventfd ---

    def ioeventfd(self, process: Process, argument: Argument) -> int:
        """VFIO_DEVICE_IOEVENTFD."""
        wanted = argument.read(uapi.vfio_device_ioeventfd, 28)
        width = wanted.flags
        if width & ~0xF or width.bit_count() != 1 or wanted.fd < -1:
            raise fail(errno.EINVAL)
        if wanted.offset >> 63:
            return self._negative_ioeventfd(wanted.offset)
        index, offset = wanted.offset >> OFFSET_SHIFT, wanted.offset & (1 << OFFSET_SHIFT) - 1
        bar = self.bar(index) if index < BARS else None
        if bar is None or offset + width > bar.size:
            raise fail(errno.EINVAL)
        table = self._table(index)
        if len(table) and offset < table.stop and offset + width > table.start:
            raise fail(errno.EINVAL)
        if width == 8 and self._pci.machine.kernel >= (7, 2):
            raise fail(errno.EINVAL)
        write = _Write(index, offset, wanted.data, width)
        if write in self._ioeventfds:
            if wanted.fd >= 0:
                raise fail(errno.EEXIST)
            self._ioeventfds.pop(write).put()
            return 0
        if wanted.fd < 0:
            raise fail(errno.ENODEV)
        if len(self._ioeventfds) >= _MAX_IOEVENTFDS:
            raise fail(errno.ENOSPC)
        self._ioeventfds[write] = self._pci.machine.virqfds.listen(process, wanted.fd, lambda: self._fire(write))
        return 0

    def _negative_ioeventfd(self, offset: int) -> int:
        """The kernel takes such an offset for negative, and finds the BAR in front of its list of BARs."""
        if self._pci.machine.strict:
            raise KernelWouldBeHurt(
                f"VFIO_DEVICE_IOEVENTFD at offset {offset:#x}: the kernel takes it for negative, and would write to "
                f"wherever a BAR of index {(offset >> OFFSET_SHIFT) - (1 << 64 - OFFSET_SHIFT)} seems to be; say "
                "(index << 40) + an offset inside of that BAR"
            )
        return 0

    def _fire(self, write: _Write) -> None:
        if self._pci.bars[write.bar].io or self._vdev.memory_enabled:
            self._pci.bar_write(write.bar, write.offset, write.width, write.data & (1 << 8 * write.width) - 1)

    def close(self) -> None:
        """The last descriptor of the device is gone."""
        for listener in self._ioeventfds.values():
            listener.put()
        self._ioeventfds.clear()


class BarMapping(Mapping):
    """A mapped BAR: each access reaches the device, with exactly its width."""

    def __init__(self, vdev: VfioPciDevice, index: int, start: int, length: int, prot: int) -> None:
        self.length = length
        self._vdev, self._index, self._start, self._prot = vdev, index, start, prot
        self._closed = False

    def load(self, offset: int, width: int) -> int:
        self._touch(offset, width, "load")
        value = self._vdev.pci.bar_read(self._index, self._start + offset, width)
        return int.from_bytes(value.to_bytes(width, "little"), sys.byteorder)

    def store(self, offset: int, width: int, value: int) -> None:
        if not self._prot & _PROT_WRITE:
            raise SegmentationFault(f"{self._where(offset)}: a store to a mapping without PROT_WRITE")
        self._touch(offset, width, "store")
        value = int.from_bytes(value.to_bytes(width, sys.byteorder), "little")
        self._vdev.pci.bar_write(self._index, self._start + offset, width, value)

    def backing(self) -> tuple[int, int] | None:
        """A file with the memory, and where in it the mapping begins; None where an access is more than memory."""
        memory = self._vdev.pci.model.memory.get(self._index)
        if memory is None or self._start + self.length > memory.size:
            return None
        return memory.fileno(), self._start

    def close(self) -> None:
        self._closed = True

    def _touch(self, offset: int, width: int, what: str) -> None:
        if self._closed:
            raise SegmentationFault(f"{self._where(offset)}: a {what} after the mapping was closed")
        if width not in (1, 2, 4, 8) or offset % width or not 0 <= offset <= self.length - width:
            raise IndexError(
                f"{self._where(offset)}: a {what} of {width} bytes; the mapping has {self.length}, and takes 1, 2, 4 "
                "or 8 at a multiple of that"
            )
        if reason := self._vdev.unmapped_because:
            raise BusError(f"{self._where(offset)}: SIGBUS at a {what}: {reason}")

    def _where(self, offset: int) -> str:
        return f"{self._vdev.pci.address} BAR {self._index}, byte {self._start + offset:#x}"
