"""The memory of a modelled process.  It is real memory of a real process, and it is never touched unsafely.

Whatever address a program gives, a read or a write of it is made by the real kernel (``process_vm_readv``), which
answers EFAULT where there is nothing, rather than by the interpreter, which would crash.
"""

from __future__ import annotations

import ctypes
import errno
import os
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from mmap import PAGESIZE
from typing import NamedTuple

from vfio.fake.kernel_error import fail

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
_NOBODY = -1
_POPULATE = 1 << 20
"""So many bytes are filled in to see whether they are there; of more, the list of areas is read, which touches none."""


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class Area(NamedTuple):
    """A range of addresses, and whether it can be read, or written."""

    start: int
    end: int
    readable: bool
    writable: bool
    of_file: bool
    """Mapped from a file, which may be shorter than the range."""


class AddressSpace:
    """Memory of the process `pid`, in host pages of `page_size` bytes (which need not be those of the real host)."""

    def __init__(self, pid: int, page_size: int) -> None:
        self.pid = pid
        self.page_size = page_size
        self._large: dict[int, tuple[int, int]] = {}

    def read(self, address: int, length: int) -> bytes:
        """`length` bytes; EFAULT if one of them is not there."""
        data = ctypes.create_string_buffer(length)
        self._transfer(_libc.process_vm_readv, ctypes.addressof(data), address, length)
        return data.raw

    def write(self, address: int, data: bytes) -> None:
        """Write `data`; EFAULT if a byte of it is not there or read-only (what comes before that may be written)."""
        copy = ctypes.create_string_buffer(data, len(data))
        self._transfer(_libc.process_vm_writev, ctypes.addressof(copy), address, len(data))

    def pinnable(self, address: int, length: int, *, write: bool = True) -> int:
        """How many bytes from `address` on are there and writable (readable, without `write`), in whole host pages; at
        most `length`."""
        advice = _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ
        if length <= _POPULATE and self.pid == os.getpid() and not _libc.madvise(address, length, advice):
            return length // self.page_size * self.page_size
        at, end = address, address + length
        for area in self._areas(at, end):
            if area.start <= at < area.end:
                if not (area.writable if write else area.readable):
                    break
                before, at = at, min(area.end, end)
                if area.of_file and not self._is_there(at - 1):
                    # Pages behind the end of the file are not there; those before it all are.
                    pages = range(before, at, PAGESIZE)
                    at = pages[0] + bisect_left(pages, True, key=lambda page: not self._is_there(page)) * PAGESIZE
                    break
            if at >= end:
                break
        return (at - address) // self.page_size * self.page_size

    def backing_page(self, address: int) -> int:
        """Size in bytes of the page behind `address`: a hugetlb page, or a host page."""
        for start, (end, page) in self._large.items():
            if start <= address < end:
                return page
        return self.page_size

    def add_large(self, address: int, length: int, page: int) -> None:
        """This range counts as hugetlb pages of `page` bytes from now on, if they are larger than the host's."""
        if page > self.page_size:
            self._large[address] = (address + length, page)

    def remove_large(self, address: int) -> None:
        """The range from `address` is no more."""
        self._large.pop(address, None)

    def large_areas(self, address: int, length: int) -> list[tuple[int, int, int]]:
        """The hugetlb ranges (start, end, page size) that share a byte with this range, sorted."""
        return sorted(
            (start, end, page)
            for start, (end, page) in self._large.items()
            if start < address + length and address < end
        )

    def end(self) -> None:
        """The process is no more.  Its number may be another's soon, whose memory is never touched."""
        self.pid = _NOBODY
        self._large.clear()

    def inherit(self, parent: AddressSpace) -> None:
        """A forked child has what its parent had, where the parent had it."""
        self._large.update(parent._large)

    def _is_there(self, address: int) -> bool:
        try:
            self.read(address, 1)
        except OSError:
            return False
        return True

    def _areas(self, first: int, last: int) -> Iterator[Area]:
        """Those that share a byte with this range, ascending."""
        with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{self.pid}/maps", "rb") as file:
            for line in file:
                span, rights, _offset, _device, inode, *name = line.split(maxsplit=5)
                start, end = (int(text, 16) for text in span.split(b"-"))
                if start >= last:
                    return
                if end > first:
                    special = bool(name) and name[0].startswith(b"[v")
                    readable, writable = rights.startswith(b"r"), rights.startswith(b"rw")
                    yield Area(start, end, readable and not special, writable and not special, inode != b"0")

    def _transfer(self, call: object, local: int, remote: int, length: int) -> None:
        if not length:
            return
        if remote + length > 1 << 64:
            raise fail(errno.EFAULT)
        here, there = _Vector(local, length), _Vector(remote, length)
        done = call(self.pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)  # type: ignore[operator]
        if done == length:
            return
        number = ctypes.get_errno() if done < 0 else errno.EFAULT
        raise fail(errno.EFAULT if number in (errno.ENOMEM, errno.ESRCH) else number)
