"""What would hurt a kernel with sPAPR TCE.

The rules are pessimistic: a window that existed once may exist now, memory that was let go of by any container is not
registered any more.
"""

from __future__ import annotations

from dataclasses import dataclass

from hwtests.fuzz.arena import Arena
from hwtests.fuzz.facts import Facts
from hwtests.fuzz.guard_iommu import ANYBODY, IommuRules, u32, u64
from vfio import uapi

_RESETS = (uapi.VFIO_EEH_PE_RESET_DEACTIVATE, uapi.VFIO_EEH_PE_RESET_HOT, uapi.VFIO_EEH_PE_RESET_FUNDAMENTAL)


@dataclass(frozen=True)
class _Window:
    start: int
    size: int  # bytes, as asked for
    shift: int
    reach: int  # bytes from the start that its table can hold, at the most


class SpaprRules(IommuRules):
    """Of one run of a program."""

    def __init__(self, facts: Facts, arena: Arena) -> None:
        super().__init__(facts, arena)
        # The default window appears by itself.
        self._windows = [self._window(facts.window_start, facts.window_size, 12, 1)]
        self._registered: set[tuple[int, int]] = set()
        self._second_version = False
        self._created: list[_Window] = []  # and not removed

    def refuse(self, n: int, payload: bytes) -> str:
        match n:
            case 13:
                return self._map(u64(payload, 8), u64(payload, 16), u64(payload, 24))
            case 14:
                return self._unmap(u64(payload, 8), u64(payload, 16))
            case 17:
                return self._register(u64(payload, 8), u64(payload, 16))
            case 19:
                return self._create(u32(payload, 8), u64(payload, 16), u32(payload, 24))
            case 21 if u32(payload, 8) in _RESETS:
                return "an EEH reset takes seconds"
        return ""

    def dma(self, iova: int, length: int) -> str:
        # Behind the end of a table QEMU finds its beginning: every window that may be there has to hold the range.
        here = [window for window in self._windows if window.start <= iova < window.start + window.reach]
        if not here or any(iova + length > window.start + window.size for window in here):
            return "outside of a window QEMU does not do what hardware does"
        return ""

    def observe(self, n: int | None, payload: bytes, value: int, after: bytes) -> None:
        match n:
            case 2:
                self._second_version |= value == uapi.VFIO_SPAPR_TCE_v2_IOMMU
            case 17:
                self._registered.add((u64(payload, 8), u64(payload, 16)))
            case 18:
                self._registered.discard((u64(payload, 8), u64(payload, 16)))
            case 19:
                shift, size, levels = u32(payload, 8), u64(payload, 16), u32(payload, 24)
                lost = after == payload[: len(after)]  # it may be at either place
                for start in (self.facts.window_start, self.facts.second_window) if lost else (u64(after, 32),):
                    self._windows.append(self._window(start, size, shift, levels))
                    self._created.append(self._windows[-1])
            case 20:
                at = u64(payload, 8)
                self._created = [each for each in self._created if not each.start <= at < each.start + each.size]

    def closed(self) -> None:
        self._registered.clear()

    def _window(self, start: int, size: int, shift: int, levels: int) -> _Window:
        page = self.facts.page_size
        entries = max(1, size >> shift)
        per_level = max(-(-(entries - 1).bit_length() // max(1, levels)), (page // 8).bit_length() - 1)
        return _Window(start, size, shift, max(size, 1 << min(63, per_level * levels + shift)))

    def _runs_past(self, iova: int, size: int) -> str:
        for window in self._windows:
            inside = window.start <= iova < window.start + window.reach
            if inside and size > 1 << window.shift and iova + size > window.start + window.size:
                return "past the end of a window: the kernel does not look"
        return ""

    def _map(self, vaddr: int, iova: int, size: int) -> str:
        if why := self._runs_past(iova, size):
            return why
        if not self.arena.known(vaddr):
            return ANYBODY
        if iova == 0 and not self._first_page_succeeds(vaddr, size):
            return "a MAP whose first page fails, at IOVA 0, hangs PHB3"
        return ""

    def _unmap(self, iova: int, size: int) -> str:
        return self._runs_past(iova, size) or (
            "an UNMAP of nothing at IOVA 0 hangs PHB3" if iova == 0 and size == 0 else ""
        )

    def _first_page_succeeds(self, vaddr: int, size: int) -> bool:
        largest = max(1 << window.shift for window in self._windows if window.start == 0)
        if size < largest or not self.arena.sound(vaddr, largest):
            return False
        if not self._second_version:
            return True
        found = self.arena.find(vaddr)
        page = found and self.arena.buffers[found[0]].page_size
        return (page or self.facts.page_size) >= largest and any(
            start <= vaddr and vaddr + largest <= start + length and not (page and (start | length) & (page - 1))
            for start, length in self._registered
        )

    def _register(self, vaddr: int, size: int) -> str:
        if not self.arena.known(vaddr):
            return ANYBODY
        if 1 << 32 < size < 1 << 52:
            return "the kernel would try to allocate a list of all these pages"
        return ""

    def _create(self, shift: int, size: int, levels: int) -> str:
        known = shift < 64 and bool(self.facts.page_sizes >> shift & 1)
        power = size and not size & (size - 1)
        if not known or not power or levels > 5 or (levels == 0 and self.facts.bare_metal):
            return ""
        if not self.facts.bare_metal:  # where the number of levels is hardly looked at
            if levels > 1:
                return ""
            if self._created:
                return "a second window that the firmware refuses blacklists the device"
            return "" if 4 <= size.bit_length() - 1 - shift <= 18 else "a window that the firmware may refuse"
        entries = max(0, size.bit_length() - 1 - shift)
        level = max(-(-entries // levels), (self.facts.page_size // 8).bit_length() - 1)  # log2 of its entries
        if entries > 22 and level <= 21:
            return "to clear so many entries takes seconds"
        return "whether a table of that size can be allocated is luck" if 19 < level <= 21 else ""
