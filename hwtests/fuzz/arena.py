"""The memory of a program: its buffers, room for the arguments of ioctls, and addresses at which something is wrong."""

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

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _protect(address: int, length: int, what: str) -> None:
    if _libc.mprotect(address, length, _PROTECTION[what]):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Arena:
    """Memory of one run of a program. Everything stays where it is until `close`."""

    def __init__(self, backend: Backend, page_size: int, buffers: Iterable[Buffer]) -> None:
        self._page = page_size
        self._memory: list[Memory] = []
        self.buffers = list(buffers)
        self._views: list[memoryview] = []
        self._bases: list[int] = []
        for number, buffer in enumerate(self.buffers):
            self._add(backend, number, buffer)
        # Two pages for arguments (a name may be too long for one), then no access, read-only, no access.
        self._room = backend.allocate(5 * page_size)
        for page in (2, 4):
            _protect(self._room.address + page * page_size, page_size, "none")

    def _add(self, backend: Backend, number: int, buffer: Buffer) -> None:
        around = 0 if buffer.page_size else self._page
        memory = backend.allocate(buffer.size + 2 * around, buffer.page_size or None)
        self._memory.append(memory)
        view = memory.view[around : around + buffer.size]
        pattern = random.Random(number).randbytes(_PATTERN)
        view[:] = (pattern * (buffer.size // _PATTERN + 1))[: buffer.size]
        base = memory.address + around
        self._views.append(view)
        self._bases.append(base)
        if around:
            _protect(memory.address, around, "none")
            _protect(base + buffer.size, around, "none")
        for page, what in buffer.holes:
            _protect(base + page * self._page, self._page, what)

    def address(self, buffer: int, offset: int) -> int:
        """The address `offset` bytes into a buffer; wraps at 64 bits as a C program's would."""
        return (self._bases[buffer] + offset) & ((1 << 64) - 1)

    def bad(self, name: str) -> int:
        """An address at which a kernel finds nothing: "null", "low", "hole" (no access), "kernel", or the first byte of
        an unreadable page less what `name` says ("end-8")."""
        if name.startswith("end-"):
            return self._room.address + 2 * self._page - int(name[4:])
        return {
            "null": 0,
            "low": 8,
            "hole": self._room.address + 2 * self._page,
            "readonly": self._room.address + 3 * self._page,
            "kernel": _KERNEL,
        }[name]

    # --- arguments ---

    def place(self, payload: bytes, how: str) -> int:
        """Put the argument of an ioctl where the kernel is to find it: at the start of a page ("address"), with its last
        byte at the end of one before a page that cannot be touched ("end"), or in a read-only one ("readonly")."""
        if how == "readonly":
            start = 3 * self._page
            _protect(self._room.address + start, self._page, "write")
            self._room.view[start : start + len(payload)] = payload
            _protect(self._room.address + start, self._page, "read")
        else:
            start = 2 * self._page - len(payload) if how == "end" else 0
            self._room.view[start : start + len(payload)] = payload
        return self._room.address + start

    def placed(self, address: int, length: int) -> bytes:
        """What is there now."""
        start = address - self._room.address
        return bytes(self._room.view[start : start + length])

    # --- buffers ---

    def find(self, address: int) -> tuple[int, int] | None:
        """The buffer with this address, and the offset in it; the pages around a buffer belong to none."""
        for number, (base, buffer) in enumerate(zip(self._bases, self.buffers, strict=True)):
            if base <= address < base + buffer.size:
                return number, address - base
        return None

    def known(self, address: int) -> bool:
        """Whether it is certain what is there: a buffer, the untouchable page around one, or nothing at all."""
        around = (0 if buffer.page_size else self._page for buffer in self.buffers)
        places = [
            (base - page, base + buffer.size + page)
            for base, buffer, page in zip(self._bases, self.buffers, around, strict=True)
        ]
        room = self._room.address
        places += [(0, 1 << 16), (room + 2 * self._page, room + 3 * self._page), (1 << 62, 1 << 64)]
        return any(start <= address < end for start, end in places)

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
        for memory in (*self._memory, self._room):
            memory.close()
        self._memory.clear()
