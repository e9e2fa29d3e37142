"""Which IOVA ranges of one address range are free: first fit, all in bytes."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable


class IovaAllocator:
    """The free ranges of ``start .. start + length``, or of several such ranges, sorted and never touching each other.

    IOVA 0 is never handed out by `allocate`: too many devices and drivers take an address of 0 for none.  It can be
    reserved by name.
    """

    def __init__(self, start: int, length: int) -> None:
        self._starts = [start]
        self._ends = [start + length]

    @classmethod
    def of_ranges(cls, ranges: Iterable[tuple[int, int]]) -> IovaAllocator:
        """All of these ranges are free: start and first byte behind the end, ascending and not touching each other."""
        made = cls(0, 0)
        made._starts, made._ends = (list(each) for each in zip(*ranges, strict=True))
        return made

    def allocate(self, length: int, alignment: int) -> int | None:
        """Take the lowest free range of `length` bytes that begins at a multiple of `alignment`; None if there is none."""
        for start, end in zip(self._starts, self._ends, strict=True):
            at = -(-max(start, 1) // alignment) * alignment
            if at + length <= end:
                self.reserve(at, length)
                return at
        return None

    def reserve(self, start: int, length: int) -> bool:
        """Take exactly this range; False, and nothing taken, if a byte of it is in use or outside."""
        end = start + length
        n = bisect_right(self._starts, start) - 1
        if n < 0 or self._ends[n] < end:
            return False
        free_start, free_end = self._starts[n], self._ends[n]
        left = [free_start] if free_start < start else []
        right = [end] if end < free_end else []
        self._starts[n : n + 1] = left + right
        self._ends[n : n + 1] = ([start] if left else []) + ([free_end] if right else [])
        return True

    def free(self, start: int, length: int) -> None:
        """Give back a range that was taken whole."""
        end = start + length
        n = bisect_left(self._starts, start)
        joins_left = n > 0 and self._ends[n - 1] == start
        joins_right = n < len(self._starts) and self._starts[n] == end
        if joins_left and joins_right:
            self._ends[n - 1] = self._ends[n]
            del self._starts[n], self._ends[n]
        elif joins_left:
            self._ends[n - 1] = end
        elif joins_right:
            self._starts[n] = start
        else:
            self._starts.insert(n, start)
            self._ends.insert(n, end)

    @property
    def largest(self) -> int:
        """Length of the largest free range."""
        return max((end - start for start, end in zip(self._starts, self._ends, strict=True)), default=0)
