"""TCE tables: what a device's addresses mean.  (arch/powerpc/platforms/powernv/pci-ioda-tce.c)

A TCE (translation control entry) maps one IOMMU page: the page's address, and below it two permission bits.  Entry 0
is no mapping.  The model keeps runs of entries that continue one another, not entries.
"""

from __future__ import annotations

from typing import NamedTuple

from vfio.fake.extents import Extents, Released
from vfio.fake.memory import AddressSpace

TCE_READ = 1
TCE_WRITE = 2


class Translation(NamedTuple):
    """Where a bus address leads."""

    address: int
    """In the memory of the process whose table it is."""
    length: int
    """How many bytes from there on follow one another."""
    permission: int
    """TCE_READ | TCE_WRITE."""


class TceTable:
    """The table of one DMA window.

    `start` is the window's bus address in bytes, `entries` how many TCEs the table has (which can be more than the
    window that was asked for needs), `level_entries` how many of them one table of the lowest level has,
    `allocated_size` the bytes that locked memory is charged with for it.
    """

    def __init__(
        self,
        *,
        start: int,
        page_shift: int,
        entries: int,
        levels: int = 1,
        level_entries: int = 0,
        allocated_size: int = 0,
    ) -> None:
        self.start = start
        self.page_shift = page_shift
        self.page_size = 1 << page_shift
        self.first = start >> page_shift
        """The number of the first entry: bus address / page size, not an index."""
        self.end = self.first + entries
        """The number behind the last entry."""
        self.entries = entries
        self.levels = levels
        self.level_entries = level_entries or entries
        self.allocated_size = allocated_size
        self.memory: AddressSpace | None = None
        """The memory that the entries point to."""
        self.released: Released | None = None
        """Hears of the entries that are replaced or cleared."""
        self.extents = Extents(self.page_size)
        self._leaves = Extents(0)
        """The tables of the lowest level that exist, by their number; a table, once made, stays."""

    @property
    def size(self) -> int:
        """Bytes of bus addresses that the table translates."""
        return self.entries << self.page_shift

    def contains(self, address: int) -> bool:
        """Whether the bus address is in the window."""
        return self.first <= address >> self.page_shift < self.end

    def write(self, first: int, pages: int, tce: int) -> None:
        """Set `pages` entries from the number `first` on: to `tce`, and each next one to the page behind it."""
        last = first + pages
        self.extents.remove(first, last, self.released)
        self.extents.insert(first, last, tce)
        if self.levels > 1:
            self._make_leaves((first - self.first) // self.level_entries, (last - 1 - self.first) // self.level_entries)

    def clear(self, first: int, pages: int) -> None:
        """Clear `pages` entries from the number `first` on, as far as they are there."""
        self.extents.remove(first, first + pages, self.released)

    def clear_all(self) -> None:
        self.extents.remove(self.first, self.end, self.released)

    def translate(self, address: int) -> Translation | None:
        """What the table makes of a bus address; None for an entry that is not there."""
        found = self.extents.find(address >> self.page_shift)
        if found is None:
            return None
        offset = address - (found.start << self.page_shift)
        length = ((found.end - found.start) << self.page_shift) - offset
        return Translation((found.value & ~(TCE_READ | TCE_WRITE)) + offset, length, found.value & 3)

    @property
    def tables(self) -> int:
        """How many tables exist, the top level included; those below are made when a mapping first needs them."""
        count = 1
        level = [(leaf.start, leaf.end) for leaf in self._leaves]
        for _ in range(self.levels - 1):
            count += sum(end - start for start, end in level)
            above: list[tuple[int, int]] = []
            for start, end in level:
                start, end = start // self.level_entries, (end - 1) // self.level_entries + 1
                if above and start < above[-1][1]:
                    start = above.pop()[0]
                above.append((start, end))
            level = above
        return count

    def _make_leaves(self, first: int, last: int) -> None:
        found = self._leaves.find(first)
        if found is None or found.end <= last:
            self._leaves.remove(first, last + 1)
            self._leaves.insert(first, last + 1, 0)
