"""Memory with holes and rights, which the seam has no calls for: ranges of the process that runs the cases."""

from __future__ import annotations

import ctypes
import mmap
import os

NONE, READ, WRITE = 0, mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE

_FIXED = 0x10  # MAP_FIXED
_HUGETLB, _HUGE_SHIFT = 0x40000, 26
_MADV_HUGEPAGE, _MADV_NOHUGEPAGE = 14, 15
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Area:
    """`pages` pages of `page_size` bytes of ordinary private memory, at a multiple of `alignment` bytes."""

    def __init__(self, pages: int, page_size: int, alignment: int | None = None) -> None:
        self.page_size, self.length = page_size, pages * page_size
        self._room = self.length + (alignment or page_size)
        self._start = _map(0, self._room, WRITE, 0)
        self.address = self._start + -self._start % (alignment or page_size)

    def hole(self, page: int, pages: int = 1) -> None:
        """Unmap these pages."""
        assert _libc.munmap(self._at(page), pages * self.page_size) == 0

    def fill(self, page: int, pages: int = 1) -> None:
        """Map new pages, of zeros, at this place."""
        _map(self._at(page), pages * self.page_size, WRITE, _FIXED)

    def protect(self, page: int, rights: int, pages: int = 1) -> None:
        assert _libc.mprotect(self._at(page), pages * self.page_size, rights) == 0

    def transparent(self) -> None:
        """Ask for transparent huge pages, and touch them all."""
        _libc.madvise(self.address, self.length, _MADV_HUGEPAGE)
        for offset in range(0, self.length, self.page_size):
            self.write(offset, b"x")

    def file(self, page: int, pages: int, length: int) -> None:
        """Map a new file of `length` bytes over these pages."""
        fd = os.memfd_create("conformance")
        try:
            os.truncate(fd, length)
            found = _libc.mmap(self._at(page), pages * self.page_size, WRITE, mmap.MAP_SHARED | _FIXED, fd, 0)
            assert found == self._at(page)
        finally:
            os.close(fd)

    def write(self, offset: int, data: bytes) -> None:
        ctypes.memmove(self.address + offset, data, len(data))

    def read(self, offset: int, length: int) -> bytes:
        return ctypes.string_at(self.address + offset, length)

    def close(self) -> None:
        _libc.munmap(self._start, self._room)

    def _at(self, page: int) -> int:
        return self.address + page * self.page_size


def halves(huge_half: int, size: int) -> int:
    """Map two pieces of `size` bytes side by side, one a hugetlb page and the other ordinary pages; their address.

    On POWER's hash MMU the two kinds do not share a slice of 256 MiB, so that they meet at its end.
    """
    meeting = 0x3000_0000 if huge_half == 0 else 0x4000_0000
    for half, address in ((0, meeting - size), (1, meeting)):
        flags = _HUGETLB | size.bit_length() - 1 << _HUGE_SHIFT if half == huge_half else 0
        _map(address, size, WRITE, _FIXED | flags)
        _libc.madvise(address, size, _MADV_NOHUGEPAGE)
    return meeting - size


def unmap(address: int, length: int) -> None:
    _libc.munmap(address, length)


def _map(address: int, length: int, rights: int, flags: int) -> int:
    found: int = _libc.mmap(address, length, rights, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags, -1, 0)
    assert found not in (None, ctypes.c_void_p(-1).value), "no memory"
    return found
