"""Memory registered in advance, of one process.  (arch/powerpc/mm/book3s64/iommu_api.c)

Regions belong to the address space, not to a container: what one container registered, all containers of the process
may map, and a region goes when the last of its holders lets go, unless something is still mapped from it.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vfio.fake.kernel_error import fail

if TYPE_CHECKING:
    from vfio.fake.process import Process

_CHUNK = 1 << 21  # pages that the kernel pins at a time; what it returns counts within the last such piece


class Region:
    """A registered range of addresses: pinned, and charged to locked memory."""

    def __init__(self, start: int, end: int, page_shift: int, large: list[tuple[int, int, int]]) -> None:
        self.start = start
        self.end = end
        self.page_shift = page_shift
        """The largest IOMMU page (as a power of two) that may be mapped from it."""
        self.large = large
        """The hugetlb ranges in it when it was registered: start, end, page size; sorted."""
        self.holders = 1
        """Containers that hold it.  One more than there are: it leaked."""
        self.mapped = 0
        """TCEs that point into it."""

    def __repr__(self) -> str:
        return f"<Region {self.start:#x}-{self.end:#x}, {self.holders} holders, {self.mapped} TCEs>"

    def backed(self, address: int, page_size: int) -> int:
        """How many pages of `page_size` bytes from `address` on lie in real pages that are at least as large."""
        at = address
        for start, end, page in self.large:
            if start <= at < end and page >= page_size:
                at += (end - at) // page_size * page_size
        return (min(at, self.end) - address) // page_size


class Registrations:
    """The regions of one process, sorted by address."""

    def __init__(self, process: Process, machine_memory: int) -> None:
        self.process = process
        self.leaked_pages = 0
        """Host pages charged for TCE tables that were never made: they stay charged until the process ends."""
        self._page_size = process.memory.page_size
        self._machine_memory = machine_memory
        self._starts: list[int] = []
        self._regions: list[Region] = []

    def __iter__(self) -> Iterator[Region]:
        return iter(self._regions)

    def find(self, start: int, length: int) -> Region | None:
        """The region of exactly this range, in bytes."""
        i = bisect_left(self._starts, start)
        if i < len(self._starts) and self._starts[i] == start and self._regions[i].end == start + length:
            return self._regions[i]
        return None

    def containing(self, address: int) -> Region | None:
        """The region that the byte at `address` is in."""
        i = bisect_right(self._starts, address) - 1
        return self._regions[i] if i >= 0 and address < self._regions[i].end else None

    def new(self, start: int, length: int) -> Region | int:
        """Register a range, in whole host pages; its one holder is the caller.

        Returns a count of pages, and registers nothing, where the range has a hole behind its first pages.  Raises
        ENOMEM past RLIMIT_MEMLOCK and for size 0, EFAULT where the first page cannot be pinned, EINVAL for a range
        that overlaps a region.
        """
        memory, pages = self.process.memory, length // self._page_size
        if pages:
            self.process.charge(pages)
        try:
            pinned = memory.pinnable(start, length) // self._page_size if pages else 0
            if pinned < pages:
                # The list of pages, 8 bytes each, comes before the pages: a range that is absurd for the machine
                # fails there.  What the process really has is never absurd here.
                if pages * 8 >= self._machine_memory:
                    raise fail(errno.ENOMEM)
                if not pinned % _CHUNK:
                    raise fail(errno.EFAULT)
                self.process.uncharge(pages)
                return pinned % _CHUNK
            if not pages:
                raise fail(errno.ENOMEM)
            if self._overlap(start, start + length):
                raise fail(errno.EINVAL)
        except OSError:
            self.process.uncharge(pages)
            raise
        large = memory.large_areas(start, length)
        region = Region(start, start + length, self._usable_shift(start, length, large), large)
        i = bisect_left(self._starts, start)
        self._starts.insert(i, start)
        self._regions.insert(i, region)
        return region

    def put(self, region: Region) -> None:
        """Let go of a region; the last to do so unpins it.  EBUSY, and still held, while something maps it."""
        if region.holders == 1 and region.mapped:
            raise fail(errno.EBUSY)
        region.holders -= 1
        if region.holders:
            return
        i = bisect_left(self._starts, region.start)
        del self._starts[i], self._regions[i]
        self.process.uncharge((region.end - region.start) // self._page_size)

    def usable(self, address: int, page_size: int, pages: int) -> tuple[int, int]:
        """How many of the `pages` IOMMU pages from `address` on may be mapped, and the errno of the first that may not.

        A page has to lie in one region, be no larger than what the region offers (EINVAL), and no larger than the real
        page behind it (EPERM).
        """
        good = 0
        while good < pages:
            at = address + good * page_size
            region = self.containing(at)
            if region is None or at + page_size > region.end or page_size > 1 << region.page_shift:
                return good, errno.EINVAL
            here = min((region.end - at) // page_size, pages - good)
            if page_size > self._page_size:
                backed = min(region.backed(at, page_size), here)
                if backed < here:
                    return good + backed, errno.EPERM
            good += here
        return good, 0

    def mapped(self, address: int, length: int, pages: int) -> None:
        """Entries of `length` // `pages` bytes each, from `address` on, were mapped; unmapped, for a negative count."""
        size = length // abs(pages)
        sign = 1 if pages > 0 else -1
        end = address + length
        while address < end:
            region = self.containing(address)
            assert region is not None, "a region is not freed while it is mapped"
            here = min(region.end, end) - address
            region.mapped += sign * (here // size)
            address += here

    def _overlap(self, start: int, end: int) -> bool:
        i = bisect_left(self._starts, end) - 1
        return i >= 0 and self._regions[i].end > start

    def _usable_shift(self, start: int, length: int, large: list[tuple[int, int, int]]) -> int:
        """The largest IOMMU page of a region: hugetlb pages count from the first one on, even for what follows them."""
        if not large or large[0][0] > start:
            return self._page_size.bit_length() - 1
        together = start | length
        natural = (together & -together).bit_length() - 1
        return min(natural, *(page.bit_length() - 1 for _start, _end, page in large))
