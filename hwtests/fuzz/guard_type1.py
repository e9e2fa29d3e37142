"""What is not done to a kernel with Type1: nothing of it hurts, but both kernels must know what there is in memory."""

from __future__ import annotations

from hwtests.fuzz.arena import Arena
from hwtests.fuzz.facts import Facts
from hwtests.fuzz.guard_iommu import ANYBODY, IommuRules, u32, u64
from vfio import uapi

_MESSAGES = range(0xFEE00000, 0xFEF00000)
"""Where a device's write is an interrupt."""


class Type1Rules(IommuRules):
    """Of one run of a program."""

    def __init__(self, facts: Facts, arena: Arena) -> None:
        super().__init__(facts, arena)
        self._mapped: dict[int, int] = {}  # by IOVA: the address of the memory
        self._moved = False

    def refuse(self, n: int, payload: bytes) -> str:
        flags = u32(payload, 4)
        match n:
            case 13 if not self.arena.known(u64(payload, 8)):
                return ANYBODY
            case 14 if flags & uapi.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP:
                return self._bitmap(u64(payload, 16), u64(payload, 40))
            case 17 if flags & uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP:
                return self._bitmap(u64(payload, 16), u64(payload, 40))
        return ""

    def _bitmap(self, size: int, address: int) -> str:
        """The kernel writes a bit for each page, whatever the size of the bitmap."""
        length = (size // self.facts.page_size + 63) // 64 * 8
        return "" if self.arena.known(address, min(length, 1 << 30)) else ANYBODY

    def dma(self, iova: int, length: int) -> str:
        if self._moved:
            return "devices still reach memory where it was"
        if iova < _MESSAGES.stop and _MESSAGES.start < iova + length:
            return "a write there is an interrupt"
        return ""

    def observe(self, n: int | None, payload: bytes, value: int, after: bytes) -> None:
        if n != 13:
            return
        vaddr, iova = u64(payload, 8), u64(payload, 16)
        if u32(payload, 4) & uapi.VFIO_DMA_MAP_FLAG_VADDR:
            self._moved |= self._mapped.get(iova) != vaddr
        else:
            self._mapped[iova] = vaddr

    def closed(self) -> None:
        """What is mapped is known by its IOVA alone: a later mapping there takes its place."""
