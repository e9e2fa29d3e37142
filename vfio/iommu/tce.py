"""Size and shape of TCE tables: what the kernel will charge for a DMA window, and whether it can build it.

A table has one 8-byte TCE (translation control entry) for each page of its window, in one to five levels of equal size.
The kernel charges the process for the table before it looks at the shape, and keeps the charge when the shape turns
out to be impossible; so the shape is checked here first.  Source: arch/powerpc/platforms/powernv/pci-ioda-tce.c,
arch/powerpc/platforms/pseries/iommu.c.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from vfio import errors

TCE = 8
"""Bytes of one entry."""
MAX_LEVELS = 5
LARGEST_LEVEL = 16 << 20
"""Bytes of the largest level that the kernel's page allocator gives in one piece, with 4 KiB and 64 KiB pages alike."""
_ADDRESS_BITS = 55
"""The levels together must index fewer bits than this."""


class Shape(NamedTuple):
    """A TCE table: window size and page size in bytes (powers of two), number of levels, host page size in bytes."""

    window_size: int
    page_size: int
    levels: int
    host_page: int

    @property
    def _level_shift(self) -> int:
        entries_shift = self.window_size.bit_length() - self.page_size.bit_length()
        return max(-(-entries_shift // self.levels) + 3, self.host_page.bit_length() - 1)

    @property
    def level_bytes(self) -> int:
        """Bytes of one level's piece, which the kernel allocates contiguously."""
        return 1 << self._level_shift

    @property
    def charged(self) -> int:
        """Bytes of locked memory that powernv charges: hardware table and user-space view, all levels filled."""
        table = max(4096, self.window_size // self.page_size * TCE)
        level, total = self.level_bytes, 0
        for _ in range(self.levels):
            total += -(-table // level) * level
            table = max(table // level * TCE, level)
        return 2 * total

    @property
    def problem(self) -> str:
        """Why the kernel cannot build this table; empty if it can."""
        if not 1 <= self.levels <= MAX_LEVELS:
            return f"{self.levels} levels; 1 to {MAX_LEVELS} are possible"
        if (self._level_shift - 3) * self.levels + self.page_size.bit_length() - 1 >= _ADDRESS_BITS:
            return (
                f"{self.levels} levels of {errors.size(self.level_bytes)} over pages of {errors.size(self.page_size)} "
                f"index {_ADDRESS_BITS} address bits or more"
            )
        if self.level_bytes > LARGEST_LEVEL:
            return (
                f"with {self.levels} level(s) each is {errors.size(self.level_bytes)}, and the kernel cannot allocate more "
                f"than {errors.size(LARGEST_LEVEL)} in one piece"
            )
        return ""


def shape(window_size: int, page_size: int, levels: int | None, host_page: int, max_levels: int) -> Shape:
    """The shape asked for, or with `levels` None the one with the fewest levels that the kernel can build.

    Raises `errors.BadWindow`, before anything is charged, where the kernel cannot build it.
    """
    if window_size <= 0 or window_size & (window_size - 1):
        raise errors.BadWindow(
            f"its size of {window_size:#x} bytes is not a power of two",
            f"round it up to {1 << window_size.bit_length():#x}",
        )
    if window_size < page_size:
        raise errors.BadWindow(
            f"{errors.size(window_size)} are less than one page of {errors.size(page_size)}", "make it larger"
        )
    candidates = [Shape(window_size, page_size, n, host_page) for n in range(1, max_levels + 1)]
    possible = [candidate for candidate in candidates if not candidate.problem]
    if levels is None:
        if not possible:
            raise errors.BadWindow(candidates[-1].problem, "make the window smaller or its pages larger")
        return possible[0]
    if levels > max_levels:
        raise errors.BadWindow(f"{levels} levels; the platform has {max_levels}", f"levels={max_levels} or fewer")
    asked = Shape(window_size, page_size, levels, host_page)
    if asked.problem:
        working = ", ".join(str(candidate.levels) for candidate in possible)
        raise errors.BadWindow(
            asked.problem, f"levels={working} works" if working else "make the window smaller or its pages larger"
        )
    return asked


class Planned(NamedTuple):
    """A window that could be created; sizes in bytes."""

    page_size: int
    levels: int
    table: int
    """Of the table that the hardware reads, all levels filled; 0 where there can be none."""
    charged: int
    """Locked memory that creating it is charged."""
    problem: str
    """Why it cannot be; empty if it can."""


def plan(
    window_size: int, page_sizes: Iterable[int], max_levels: int, host_page: int, memory: int | None = None
) -> list[Planned]:
    """Every window of `window_size` bytes (a power of two) of a platform, by page size and number of levels.

    `max_levels` 1 is a PAPR guest, whose firmware makes the table and, where its `memory` in bytes is given, none for a
    window larger than that.
    """
    found = []
    for page in page_sizes:
        for levels in range(1, max_levels + 1):
            if window_size < page:
                problem = f"{errors.size(window_size)} are less than one page of {errors.size(page)}"
                found.append(Planned(page, levels, 0, 0, problem))
            elif max_levels == 1:
                table = window_size // page * TCE
                small = memory is not None and window_size > 1 << (memory - 1).bit_length()
                problem = "the firmware refuses more than this partition's memory" if small else ""
                found.append(Planned(page, levels, table, table, problem))
            else:
                planned = Shape(window_size, page, levels, host_page)
                # Half of what is charged is the view that the kernel keeps for the process.
                found.append(Planned(page, levels, planned.charged // 2, planned.charged, planned.problem))
    return found
