"""Sorted runs of table entries: what a map of any size costs is one run.

A run is three 64-bit numbers in arrays of a few hundred runs each, so that a million scattered pages take some 25 MB
and finding, adding or removing one takes two bisections and a short move of memory.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from typing import NamedTuple

_MOST = 1024  # runs in a block before it is cut in two

Released = Callable[[int, int], None]
"""What hears of entries that go: the value of the first of a run, and how many they are."""


class Extent(NamedTuple):
    """The entries `start` up to, but not including, `end`; `value` is that of the first."""

    start: int
    end: int
    value: int


class _Block:
    __slots__ = ("ends", "starts", "values")

    def __init__(self, starts: array[int], ends: array[int], values: array[int]) -> None:
        self.starts, self.ends, self.values = starts, ends, values


class Extents:
    """Runs of entries that do not overlap.  The value grows by `step` from one entry of a run to the next."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.covered = 0
        """How many entries there are in all runs."""
        self._firsts: list[int] = []
        self._blocks: list[_Block] = []

    def __len__(self) -> int:
        return sum(len(block.starts) for block in self._blocks)

    def __iter__(self) -> Iterator[Extent]:
        for block in self._blocks:
            yield from map(Extent, block.starts, block.ends, block.values)

    def find(self, entry: int) -> Extent | None:
        """The run that `entry` is in."""
        b = bisect_right(self._firsts, entry) - 1
        if b < 0:
            return None
        block = self._blocks[b]
        i = bisect_right(block.starts, entry) - 1
        if entry >= block.ends[i]:
            return None
        return Extent(block.starts[i], block.ends[i], block.values[i])

    def remove(self, first: int, last: int, released: Released | None = None) -> None:
        """Take the entries from `first` up to, but not including, `last` away, as far as there are any.

        `released` hears of each run, or piece of a run, that goes.
        """
        if first >= last:
            return
        firsts, blocks = self._firsts, self._blocks
        b = max(bisect_right(firsts, first) - 1, 0)
        while b < len(blocks) and firsts[b] < last:
            block = blocks[b]
            starts, ends, values = block.starts, block.ends, block.values
            low = bisect_right(ends, first)
            high = bisect_left(starts, last, low)
            if low == high:
                b += 1
                continue
            self._tell(block, low, high, first, last, released)
            keep: list[Extent] = []
            if starts[low] < first:
                keep.append(Extent(starts[low], first, values[low]))
            if ends[high - 1] > last:
                moved = (last - starts[high - 1]) * self.step
                keep.append(Extent(last, ends[high - 1], values[high - 1] + moved))
            if keep:
                starts[low:high] = array("Q", [run.start for run in keep])
                ends[low:high] = array("Q", [run.end for run in keep])
                values[low:high] = array("Q", [run.value for run in keep])
            else:
                del starts[low:high], ends[low:high], values[low:high]
            if starts:
                firsts[b] = starts[0]
                b += 1
            else:
                del firsts[b], blocks[b]

    def insert(self, first: int, last: int, value: int) -> None:
        """Add a run where there is none yet; it is joined to its neighbours where it continues them."""
        self.covered += last - first
        if not self._blocks:
            self._firsts.append(first)
            self._blocks.append(_Block(array("Q", (first,)), array("Q", (last,)), array("Q", (value,))))
            return
        b = max(bisect_right(self._firsts, first) - 1, 0)
        block = self._blocks[b]
        starts, ends, values = block.starts, block.ends, block.values
        i = bisect_right(starts, first)
        left = i > 0 and ends[i - 1] == first and values[i - 1] + (first - starts[i - 1]) * self.step == value
        right = i < len(starts) and starts[i] == last and value + (last - first) * self.step == values[i]
        if left and right:
            ends[i - 1] = ends[i]
            del starts[i], ends[i], values[i]
        elif left:
            ends[i - 1] = last
        elif right:
            starts[i], values[i] = first, value
        else:
            starts.insert(i, first)
            ends.insert(i, last)
            values.insert(i, value)
            if len(starts) > _MOST:
                self._split(b)
        self._firsts[b] = starts[0]

    def _split(self, b: int) -> None:
        block = self._blocks[b]
        half = len(block.starts) // 2
        # Slices are exact copies: what an array has spare at its end does not add up over thousands of blocks.
        low = _Block(block.starts[:half], block.ends[:half], block.values[:half])
        high = _Block(block.starts[half:], block.ends[half:], block.values[half:])
        self._blocks[b : b + 1] = [low, high]
        self._firsts[b : b + 1] = [low.starts[0], high.starts[0]]

    def _tell(self, block: _Block, low: int, high: int, first: int, last: int, released: Released | None) -> None:
        """Count what is about to go, and tell who wants to know."""
        for i in range(low, high):
            start, end, value = block.starts[i], block.ends[i], block.values[i]
            if start < first:
                value += (first - start) * self.step
                start = first
            end = min(end, last)
            self.covered -= end - start
            if released:
                released(value, end - start)
