"""Memory that this process registered with sPAPR v2 kernels.

Registrations belong to the address space, not to a container: what one container registered, another may map.  So the
book is kept a process, too, and it counts what the kernel does not tell: memory that is unregistered while a TCE still
points at it stays pinned, and charged, until the process ends.  Source: arch/powerpc/mm/book3s64/iommu_api.c.
"""

from __future__ import annotations

import os
import threading
import weakref
from bisect import bisect_right
from typing import TYPE_CHECKING, Protocol

from vfio import errors
from vfio.backend import Backend
from vfio.dma import DmaMemory

if TYPE_CHECKING:
    from vfio.iommu.window import DmaWindow


class User(Protocol):
    """A mapping, or whatever else points into registered memory."""

    region: Region | None
    memory: DmaMemory


class Region:
    """A registered range of the address space, in bytes."""

    def __init__(self, address: int, length: int, page_size: int) -> None:
        self.address = address
        self.length = length
        self.page_size = page_size
        """The largest window page that fits it: of the pages behind it, and of its own alignment."""
        self.holders: set[object] = set()
        """The IOMMUs that registered it; the kernel unpins it with the last."""
        self._end = address + length

    @property
    def text(self) -> str:
        return errors.span(self.address, self.length)

    def holds(self, address: int, length: int) -> bool:
        """Whether all of this range is registered memory of the region now."""
        return self.address <= address and address + length <= self._end

    def used_by(self, user: User) -> bool:
        """Whether `user` points into it; withdrawn or not.

        A mapping that is about to be made notes the region of the one before, and looks only then whether it is its own.
        """
        return user.region is self and self.address <= user.memory.address < self.address + self.length

    def withdraw(self) -> None:
        """From now on it holds nothing."""
        self._end = self.address

    def reinstate(self) -> None:
        """Undo `withdraw`."""
        self._end = self.address + self.length


class Registrations:
    """All registrations of one address space, none overlapping another."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.windows: weakref.WeakSet[DmaWindow] = weakref.WeakSet()
        """Where memory is mapped."""
        self._starts: list[int] = []
        self._regions: list[Region] = []

    def find(self, address: int, length: int) -> Region | None:
        """The region that holds all of this range."""
        n = bisect_right(self._starts, address) - 1
        if n >= 0 and self._regions[n].holds(address, length):
            return self._regions[n]
        return None

    def uses(self, region: Region) -> int:
        """How many mappings of this process point into `region`, whichever container they are in."""
        return sum(window.uses(region) for window in list(self.windows))

    def overlapping(self, address: int, length: int) -> Region | None:
        """The first region that shares a byte with this range."""
        n = bisect_right(self._starts, address) - 1
        for region in self._regions[max(n, 0) : max(n, 0) + 2]:
            if region.address < address + length and address < region.address + region.length:
                return region
        return None

    def add(self, region: Region) -> None:
        n = bisect_right(self._starts, region.address)
        self._starts.insert(n, region.address)
        self._regions.insert(n, region)

    def release(self, region: Region, holder: object) -> None:
        """`holder` has unregistered `region`."""
        region.holders.discard(holder)
        if not region.holders and region in self._regions:
            region.withdraw()
            n = self._regions.index(region)
            del self._starts[n], self._regions[n]

    def held_by(self, holder: object) -> list[Region]:
        return [region for region in self._regions if holder in region.holders]


_books: weakref.WeakKeyDictionary[Backend, Registrations] = weakref.WeakKeyDictionary()
_pid = os.getpid()


def of(backend: Backend) -> Registrations:
    """The registrations of this process with the kernel behind `backend`."""
    global _pid
    if _pid != os.getpid():  # a forked child has an address space of its own, and nothing registered in it
        _books.clear()
        _pid = os.getpid()
    return _books.setdefault(backend.unwrapped(), Registrations())
