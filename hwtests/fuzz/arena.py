"""The memory of a program: its buffers, room for the arguments of ioctls, and addresses at which something is wrong.

What lies where must not be luck, or two runs of a program would differ. So all of it but hugetlb pages is in one range
that is far larger than what is used of it, laid out alike in every run, and cannot be touched between the parts. Pages
of hugetlb memory have to be apart, and have a page of their own kind, that cannot be touched, on either side.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import zlib
from collections.abc import Iterable

from hwtests.fuzz.program import Buffer
from vfio.backend import Backend, Memory

_PROTECTION = {"none": 0, "read": mmap.PROT_READ, "write": mmap.PROT_READ | mmap.PROT_WRITE}
_KERNEL = 0xC000000000000000
_PATTERN = 8191  # bytes, a prime: no two pages of a buffer are alike
_MARGIN = 8 << 30  # bytes before the first part and behind the last, more than any program adds to an address of one
_GAP = 4  # pages between two parts
_ROOM = 5  # pages
_FILLER = b"\xaa"

# Python 3.11 has no name for it; PowerPC and SPARC have another number than the rest.
_MAP_NORESERVE = 0x40 if os.uname().machine.startswith(("ppc", "sparc")) else 0x4000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _protect(address: int, length: int, what: str) -> None:
    if _libc.mprotect(address, length, _PROTECTION[what]):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def hugetlb_pages(buffer: Buffer) -> int:
    """How many pages a buffer of hugetlb memory takes: its own, and the one on either side."""
    return buffer.size // buffer.page_size + 2


class Arena:
    """Memory of one run of a program. Everything stays where it is until `close`."""

    def __init__(self, backend: Backend, page_size: int, buffers: Iterable[Buffer]) -> None:
        self._page = page_size
        self.buffers = list(buffers)
        gap = _GAP * page_size
        ordinary = sum(buffer.size + gap for buffer in self.buffers if not buffer.page_size)
        length = 2 * _MARGIN + ordinary + _ROOM * page_size
        # Shared and not reserved: untouched it costs nothing, and no huge page is put behind it by itself.
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._mmap = mmap.mmap(-1, length + page_size, flags=flags)
        self._whole = memoryview(self._mmap)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._mmap))
        self._start, self._end = start, start + len(self._mmap)
        _protect(start, len(self._mmap), "none")
        self._hugetlb: list[Memory] = []
        self._views: list[memoryview] = []
        self._bases: list[int] = []
        at = start + -start % page_size + _MARGIN
        for number, buffer in enumerate(self.buffers):
            if buffer.page_size:
                self._add(number, *self._allocate(backend, buffer))
            else:
                self._add(number, at, self._part(at, buffer.size))
                at += buffer.size + gap
        # Two pages for arguments (a name may be too long for one), then no access, read-only, no access.
        self._room, self._room_view = at, self._part(at, _ROOM * page_size)
        for page in (2, 4):
            _protect(at + page * page_size, page_size, "none")

    def _part(self, address: int, length: int) -> memoryview:
        """A part of the range, from now on to be read and written."""
        _protect(address, length, "write")
        return self._whole[address - self._start : address - self._start + length]

    def _allocate(self, backend: Backend, buffer: Buffer) -> tuple[int, memoryview]:
        around = buffer.page_size
        memory = backend.allocate(hugetlb_pages(buffer) * around, around)
        self._hugetlb.append(memory)
        base = memory.address + around
        _protect(memory.address, around, "none")
        _protect(base + buffer.size, around, "none")
        return base, memory.view[around : around + buffer.size]

    def _add(self, number: int, base: int, view: memoryview) -> None:
        size = self.buffers[number].size
        pattern = random.Random(number).randbytes(_PATTERN)
        view[:] = (pattern * (size // _PATTERN + 1))[:size]
        self._views.append(view)
        self._bases.append(base)
        for page, what in self.buffers[number].holes:
            _protect(base + page * self._page, self._page, what)

    def address(self, buffer: int, offset: int) -> int:
        """The address `offset` bytes into a buffer; wraps at 64 bits as a C program's would."""
        return (self._bases[buffer] + offset) & ((1 << 64) - 1)

    def certain(self, buffer: int, offset: int) -> bool:
        """Whether every run of the program finds the same at that address."""
        size, page = self.buffers[buffer].size, self.buffers[buffer].page_size
        if page:
            return -page <= offset < size + page
        return self._start <= self._bases[buffer] + offset < self._end - self._page

    def bad(self, name: str) -> int:
        """An address at which a kernel finds nothing: "null", "low", "hole" (no access), "kernel"; or "end-8": there are 8
        bytes, all ones, before a page that cannot be touched."""
        if name.startswith("end-"):
            return self.place(b"\xff" * int(name[4:]), "end")
        return {
            "null": 0,
            "low": 8,
            "hole": self._room + 2 * self._page,
            "readonly": self._room + 3 * self._page,
            "kernel": _KERNEL,
        }[name]

    # --- arguments ---

    def place(self, payload: bytes, how: str) -> int:
        """Put the argument of an ioctl where the kernel is to find it: at the start of a page ("address"), with its last
        byte at the end of one before a page that cannot be touched ("end"), or in a read-only one ("readonly"). Nothing
        is left there of the argument before it."""
        first, pages = (3, 1) if how == "readonly" else (0, 2)
        start, length = first * self._page, pages * self._page
        _protect(self._room + start, length, "write")
        self._room_view[start : start + length] = _FILLER * length
        if how == "end":
            start += length - len(payload)
        self._room_view[start : start + len(payload)] = payload
        if how == "readonly":
            _protect(self._room + start, length, "read")
        return self._room + start

    def placed(self, address: int, length: int) -> bytes:
        """What is there now."""
        start = address - self._room
        return bytes(self._room_view[start : start + length])

    # --- buffers ---

    def find(self, address: int) -> tuple[int, int] | None:
        """The buffer with this address, and the offset in it; what is around a buffer belongs to none."""
        for number, (base, buffer) in enumerate(zip(self._bases, self.buffers, strict=True)):
            if base <= address < base + buffer.size:
                return number, address - base
        return None

    def known(self, address: int, length: int = 1) -> bool:
        """Whether it is certain what is there: the range, hugetlb memory and what is around it, or nothing at all."""
        places = [(0, 1 << 16), (self._start, self._end), (1 << 62, 1 << 64)]
        places += [(memory.address, memory.address + memory.length) for memory in self._hugetlb]
        return any(start <= address and address + length <= end for start, end in places)

    def sound(self, address: int, length: int) -> bool:
        """Whether all of that range is one buffer's, present and writable."""
        found = self.find(address)
        if found is None:
            return False
        buffer = self.buffers[found[0]]
        end = found[1] + length
        holes = (page * self._page for page, _ in buffer.holes)
        return end <= buffer.size and not any(hole < end and found[1] < hole + self._page for hole in holes)

    def checksums(self) -> list[int]:
        """One number for the contents of each buffer, pages without access left out."""
        return [self._checksum(*each) for each in zip(self._views, self.buffers, strict=True)]

    def _checksum(self, view: memoryview, buffer: Buffer) -> int:
        total, start = 0, 0
        for page in [*sorted(page for page, what in buffer.holes if what == "none"), buffer.size // self._page]:
            total = zlib.crc32(view[start : page * self._page], total)
            start = (page + 1) * self._page
        return total

    def close(self) -> None:
        """Give everything back."""
        while self._views:
            self._views.pop().release()
        for memory in self._hugetlb:
            memory.close()
        self._hugetlb.clear()
        self._room_view.release()
        self._whole.release()
        self._mmap.close()
