"""One DMA window of a guest: the table that the guest believes in, and the VFIO calls that make it true."""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

from vfio import errors
from vfio.dma import DmaMemory
from vfio.iommu.mapper import Mapper
from vfio.iommu.slot import Slot
from vfio.iommu.window import DmaWindow
from vfio.papr.memory import GuestMemory
from vfio.papr.numbers import TCE_BYTES, TCE_READ, TCE_WRITE

_PERMISSIONS = TCE_READ | TCE_WRITE
_CHUNK = 1 << 16
_EMPTY = memoryview(bytes(_CHUNK * TCE_BYTES)).cast("Q")
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0)


class BadTce(ValueError):
    """A TCE that points to no memory of the guest, or not to the beginning of a page."""


class Run(NamedTuple):
    """Entries that one VFIO call can set: `pages` of them from the number `first` on."""

    first: int
    pages: int
    tce: int
    """The first of them; the next ones point to the pages behind it.  0: they are cleared."""


class TceTable:
    """The guest's side of a `DmaWindow`, all of whose IOVA it takes.

    Entries are numbered from 0.  The shadow holds what the guest put, so that reading it asks nobody; VFIO is told of runs
    of entries, not of entries.  Raises what `DmaWindow.mapper` does; `errors.AlreadyMapped` where something is mapped.
    """

    def __init__(self, liobn: int, window: DmaWindow, memory: GuestMemory) -> None:
        self.liobn = liobn
        self.window = window
        self.memory = memory
        self.entries = window.size // window.page_size
        self._used = (self.entries, 0)
        # Zeroes that cost nothing until they are written: a window can have billions of entries.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        self._shadow = memoryview(mmap.mmap(-1, self.entries * TCE_BYTES, flags=flags)).cast("Q")
        with window.iommu.lock:
            window.reserve(window.size, window.start)
            self.claims: list[_Claim] = []
            try:
                for block in memory.blocks:
                    self.claims.append(_Claim(self, block.buffer))
                # Not entry 0: nothing is gained by it, and POWER8 hosts have had accidents there.
                window.settle(self._slot(min(1, self.entries - 1), 1))
            except BaseException:
                self._let_go()
                raise

    def get(self, entry: int) -> int:
        """What the guest put there."""
        return self._shadow[entry]

    @property
    def closed(self) -> bool:
        return not self.claims

    def put(self, first: int, tces: Sequence[int]) -> None:
        """Set entries from the number `first` on.

        Raises BadTce before anything is changed, `errors.Closed` when the window is gone.  Where the kernel fails,
        OSError: the runs before are set, the one that failed is cleared, those behind it are as they were.
        """
        runs = list(self._runs(first, tces))
        for run in runs:
            if run.tce:
                self._check(run)
        at = 0
        with self._in_step():
            for run in runs:
                self._set(run, tces[at : at + run.pages])
                at += run.pages

    def stuff(self, first: int, tce: int, count: int) -> None:
        """Set `count` entries to the same `tce`, which lets no device through.  Raises as `put`."""
        with self._in_step():
            self._unmap(first, count)
            if tce:
                self._widen(first, count)
            else:  # what was never used is zero already
                end = min(first + count, self._used[1])
                first = max(first, self._used[0])
                count = end - first
            self._fill(first, count, tce)

    def clear(self) -> None:
        """Clear all entries."""
        first, end = self._used
        self.stuff(first, 0, end - first)
        self._used = (self.entries, 0)

    def remap(self) -> None:
        """Map again all that the guest has put there: the kernel has emptied the table.

        Raises the first error of the kernel, after trying all of it; what could not be mapped is cleared, so that the
        guest that asks for it finds it gone.
        """
        failed: OSError | None = None
        with self._in_step():
            first, end = self._used
            for start in range(first, end, _CHUNK):
                tces = self._shadow[start : min(start + _CHUNK, end)]
                if tces == _EMPTY[: len(tces)]:
                    continue
                for run in self._runs(start, tces.tolist()):
                    try:
                        if run.tce:
                            self._map_or_clear(run)
                    except OSError as error:
                        failed = failed or error
        if failed:
            raise failed

    def close(self) -> None:
        """Clear it, and give the window back; harmless when done before."""
        with self.window.iommu.lock:
            if self.claims:
                if not self.window.closed:
                    self.clear()
                self._let_go()

    def gone(self) -> None:
        """The kernel has destroyed the window."""
        if self.claims:
            self._let_go()

    # --- how ---

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """What is done here to the kernel's table and to the shadow is one step for `remap`, which reads the one into the
        other when a group leaves, in whatever thread that is."""
        with self.window.iommu.lock:
            if self.closed:
                raise errors.Closed(f"{self.window}")
            yield

    def _runs(self, first: int, tces: Sequence[int]) -> Iterator[Run]:
        page, start = self.window.page_size, 0
        for n in range(1, len(tces) + 1):
            head = tces[start]
            follows = n < len(tces) and (
                tces[n] == head + (n - start) * page if head & _PERMISSIONS else not tces[n] & _PERMISSIONS
            )
            if not follows:
                yield Run(first + start, n - start, head if head & _PERMISSIONS else 0)
                start = n

    def _check(self, run: Run) -> None:
        address, page = run.tce & ~_PERMISSIONS, self.window.page_size
        if address & (page - 1):
            raise BadTce(f"TCE {run.tce:#x} is not the address of a page of {page:#x} bytes")
        try:
            pieces = list(self.memory.pieces(address, run.pages * page))
        except LookupError as error:
            raise BadTce(f"TCE {run.tce:#x}: {error}") from None
        if any((host | length) & (page - 1) for host, length in pieces):
            raise BadTce(f"TCE {run.tce:#x} is a page in two blocks of memory")

    def _set(self, run: Run, tces: Sequence[int]) -> None:
        if run.tce:
            self._widen(run.first, run.pages)
            self._map_or_clear(run)
        else:
            self._unmap(run.first, run.pages)
            if any(tces):
                self._widen(run.first, run.pages)
        for n, tce in enumerate(tces, run.first):
            self._shadow[n] = tce

    def _unmap(self, first: int, count: int) -> None:
        """Let no device through; nothing is asked about entries that no guest has used."""
        first, end = max(first, self._used[0]), min(first + count, self._used[1])
        if first < end:
            self._slot(first, end - first).unmap()

    def _fill(self, first: int, count: int, tce: int) -> None:
        for start in range(first, first + count, _CHUNK):
            n = min(_CHUNK, first + count - start)
            self._shadow[start : start + n] = memoryview(array("Q", [tce]) * n)

    def _widen(self, first: int, count: int) -> None:
        self._used = (min(self._used[0], first), max(self._used[1], first + count))

    def _map_or_clear(self, run: Run) -> None:
        try:
            self._map(run)
        except OSError:
            self._abandon(run)
            raise

    def _map(self, run: Run) -> None:
        entry = run.first
        for host, length in self.memory.pieces(run.tce & ~_PERMISSIONS, run.pages * self.window.page_size):
            count = length // self.window.page_size
            self._slot(entry, count, run.tce & _PERMISSIONS).map(host)
            entry += count

    def _abandon(self, run: Run) -> None:
        """A MAP failed: the kernel has cleared some of the run, and none of it is to be left."""
        try:
            self._slot(run.first, run.pages).unmap()
        finally:
            self._fill(run.first, run.pages, 0)

    def _slot(self, entry: int, count: int, permissions: int = _PERMISSIONS) -> Slot:
        page = self.window.page_size  # the permissions of a TCE and the flags of MAP are the same bits
        return Slot(self.window, self.window.start + entry * page, count * page, permissions)

    def _let_go(self) -> None:
        for claim in self.claims:
            if claim in self.window.mappers:
                self.window.mappers.remove(claim)
        self.claims.clear()
        if not self.window.closed:
            self.window.allocator.free(self.window.start, self.window.size)


class _Claim(Mapper):
    """The window's note that the guest may have mapped a block of memory, which stays registered meanwhile."""

    restorable: ClassVar[bool] = True

    def __init__(self, table: TceTable, memory: DmaMemory) -> None:
        self.window = table.window
        self.memory = memory
        self.region = None
        self._table = table
        self._slots = ()
        self.window.iommu.claim(self.window, memory, self)
        self.window.mappers.append(self)

    def remap(self) -> None:
        if self._table.claims[0] is self:  # once for all of its blocks
            self._table.remap()

    def close(self) -> None:
        self._table.close()

    def gone(self) -> None:
        self._table.gone()
