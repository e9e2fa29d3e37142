"""Memory that a program of the modelled machine asks for.  It is the program's own, whoever has the machine."""

from __future__ import annotations

import os
from mmap import MAP_ANONYMOUS, MAP_SHARED, PAGESIZE, mmap
from typing import Protocol

from vfio.backend import Memory

# Python 3.11 has no name for it; PowerPC and SPARC have another number than the rest.
_MAP_NORESERVE = 0x40 if os.uname().machine.startswith(("ppc", "sparc")) else 0x4000


class LargePages(Protocol):
    """Who keeps account of the memory that counts as hugetlb pages."""

    def add_large(self, address: int, length: int, page: int) -> None: ...

    def remove_large(self, address: int) -> None: ...


class FakeMemory(Memory):
    """Ordinary memory that counts as having the page size that was asked for, and is aligned to it."""

    def __init__(self, space: LargePages, length: int, page_size: int) -> None:
        self.length = length
        self.page_size = page_size
        self._space = space
        # mmap aligns to the real page only, so there is room for moving up to the next boundary.
        room = page_size - PAGESIZE if page_size > PAGESIZE else 0
        # Not reserved: memory of the size of a whole machine's costs nothing until it is touched.
        self._mmap = mmap(-1, length + room, flags=MAP_SHARED | MAP_ANONYMOUS | _MAP_NORESERVE)
        with memoryview(self._mmap) as whole:
            start = address_of(whole)
            skip = -start % page_size
            self._view = whole[skip : skip + length]
        self.address = start + skip
        space.add_large(self.address, length, page_size)

    @property
    def view(self) -> memoryview:
        return self._view

    def close(self) -> None:
        if not self._mmap.closed:
            self._space.remove_large(self.address)
            self._view.release()
            self._mmap.close()


def address_of(view: memoryview) -> int:
    """Where the bytes of a view are in this process."""
    from ctypes import addressof, c_char

    return addressof(c_char.from_buffer(view))
