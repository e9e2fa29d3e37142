"""Steps on the Type1 IOMMU: what can be mapped, mappings, memory that moves, dirty pages."""

from __future__ import annotations

from hwtests.fuzz.generate_iommu import Act, IommuSteps
from hwtests.fuzz.picture import Container, Dma
from hwtests.fuzz.program import Operand
from vfio import uapi

_READ, _WRITE, _NEW = uapi.VFIO_DMA_MAP_FLAG_READ, uapi.VFIO_DMA_MAP_FLAG_WRITE, uapi.VFIO_DMA_MAP_FLAG_VADDR
_BITMAP, _ALL, _SUSPEND = (
    uapi.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP,
    uapi.VFIO_DMA_UNMAP_FLAG_ALL,
    uapi.VFIO_DMA_UNMAP_FLAG_VADDR,
)
_START, _STOP, _GET = (
    uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_START,
    uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP,
    uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP,
)
_BASE = 0x100000
"""IOVA above which most mappings are, close together."""
_ROOM = 256 - 24
"""Bytes behind the struct of GET_INFO: more than its capabilities take."""


class Type1Steps(IommuSteps):
    """Adds steps on the containers of a picture."""

    def acts(self) -> list[tuple[Act, int]]:
        return [
            (self.get_info, 5),
            (self.map, 34),
            (self.unmap, 22),
            (self.unmap_all, 2),
            (self.suspend, 5),
            (self.new_address, 7),
            (self.track, 6),
            (self.dirty_pages, 9),
            (self.unmap_dirty, 5),
        ]

    def beginning(self, version: int) -> list[Act]:
        return [self.track] if version == uapi.VFIO_TYPE1v2_IOMMU and self._rng.random() < 0.3 else []

    def get_info(self, container: Container) -> None:
        rng = self._rng
        struct: dict[str, Operand] = {}
        if rng.random() < 0.4:
            struct["argsz"] = rng.choice((15, 16, 20, 23, 24, 48, 88, 111, 112, 120, 128))
        if rng.random() < 0.1:
            struct |= {"flags": 0xFFFFFFFF, "cap_offset": 0x55555555, "pad": 0x66666666}
        self._call(container, "VFIO_IOMMU_GET_INFO", struct, tail="aa" * _ROOM)

    # --- mappings ---

    def map(self, container: Container) -> tuple[int, int]:
        rng = self._rng
        memory = self._range()
        size, iova = memory.size, self._iova(memory.size)
        if rng.random() < 0.1:
            size += self.picture.facts.page_size * rng.choice((1, 2, 16))
        flags = rng.choice((_READ | _WRITE,) * 6 + (_READ, _READ, _WRITE, 0, _NEW, _NEW | _READ, 8))
        vaddr: Operand = ["buffer", memory.buffer, memory.offset]
        struct: dict[str, Operand] = {"flags": flags, "vaddr": vaddr, "iova": iova, "size": size}
        if rng.random() < 0.08:
            self._nearly(struct)
        self._call(container, "VFIO_IOMMU_MAP_DMA", struct)
        if container.enabled and self.picture.intact:
            container.mapped.append((iova, size))
            free = not any(each.iova < iova + size and iova < each.iova + each.size for each in container.live)
            if free and size and 0 < flags < _NEW and self.picture.registrable(memory):
                container.live.append(Dma(iova, size, vaddr))
        return iova, size

    def unmap(self, container: Container) -> None:
        rng, page, live = self._rng, self.picture.facts.page_size, container.live
        kind = rng.random()
        if live and kind < 0.5:
            found = rng.choice(live)
            iova, size = found.iova, found.size
        elif live and kind < 0.65:  # several at once, and what is between them
            one, other = rng.choice(live), rng.choice(live)
            iova = min(one.iova, other.iova)
            size = max(one.iova + one.size, other.iova + other.size) - iova
        elif live and kind < 0.85:  # a cut through one
            found = rng.choice(live)
            iova = found.iova + page * rng.choice((0, 1, -1))
            size = max(page, found.size + page * rng.choice((-1, 1, 0)))
        else:
            size = page * rng.choice((1, 1, 2, 4, 16, 1 << 10, 1 << 28))
            iova = self._iova(size)
        struct: dict[str, Operand] = {"iova": max(0, iova), "size": size}
        if rng.random() < 0.08:
            self._nearly(struct)
        self._call(container, "VFIO_IOMMU_UNMAP_DMA", struct)
        self._gone(container, iova, size)

    def unmap_all(self, container: Container) -> None:
        rng = self._rng
        struct: dict[str, Operand] = {"flags": _ALL, "iova": 0, "size": 0}
        if rng.random() < 0.3:
            struct |= {rng.choice(("iova", "size")): rng.choice((4096, 1, (1 << 64) - 1, (1 << 64) - 4096))}
        self._call(container, "VFIO_IOMMU_UNMAP_DMA", struct)
        if self.picture.intact and struct["iova"] == struct["size"] == 0:
            container.live.clear()

    def _gone(self, container: Container, iova: int, size: int) -> None:
        """An UNMAP succeeded, if it cut nothing."""
        inside = [each for each in container.live if iova < each.iova + each.size and each.iova < iova + size]
        whole = all(iova <= each.iova and each.iova + each.size <= iova + size for each in inside)
        if self.picture.intact and whole:
            container.live = [each for each in container.live if each not in inside]

    def _nearly(self, struct: dict[str, Operand]) -> None:
        """Make one operand a bit wrong."""
        name = self._rng.choice([name for name in ("vaddr", "iova", "size") if name in struct])
        page = self.picture.facts.page_size
        if self._rng.random() < 0.4:
            struct[name] = self._rng.choice((0, 1 << 39, 1 << 63, (1 << 64) - page, (1 << 64) - 1, 1 << 47))
        else:
            struct[name] = self.picture.nearly(struct[name])

    def _iova(self, size: int) -> int:
        """An IOVA: mostly where others are; at an end of what can be mapped; or anywhere."""
        rng, facts = self._rng, self.picture.facts
        page, kind = facts.page_size, rng.random()
        if kind < 0.75:
            return _BASE + page * rng.randrange(40)
        if kind < 0.85:
            return page * rng.randrange(3)
        if kind < 0.95:
            start, end = rng.choice(facts.ranges)
            return max(0, rng.choice((start, start - page, end + 1 - size, end + 1 - page, end + 1)))
        return page * rng.randrange(1 << 52)

    # --- memory that moves ---

    def suspend(self, container: Container) -> None:
        rng = self._rng
        struct: dict[str, Operand]
        if container.live and rng.random() < 0.8:
            found = rng.choice(container.live)
            struct = {"flags": _SUSPEND, "iova": found.iova, "size": found.size}
        else:
            struct = {"flags": _SUSPEND | _ALL, "iova": 0, "size": 0}
        self._call(container, "VFIO_IOMMU_UNMAP_DMA", struct)

    def new_address(self, container: Container) -> None:
        rng, page = self._rng, self.picture.facts.page_size
        if not container.live:
            self.suspend(container)
            return
        found = rng.choice(container.live)
        if rng.random() < 0.6:
            self._call(container, "VFIO_IOMMU_UNMAP_DMA", {"flags": _SUSPEND, "iova": found.iova, "size": found.size})
        struct: dict[str, Operand] = {
            "flags": _NEW,
            "vaddr": found.vaddr if rng.random() < 0.9 else self.picture.nearly(found.vaddr),
            "iova": found.iova + (page * rng.choice((1, -1)) if rng.random() < 0.1 else 0),
            "size": found.size + (page if rng.random() < 0.1 else 0),
        }
        self._call(container, "VFIO_IOMMU_MAP_DMA", struct)

    # --- dirty pages ---

    def track(self, container: Container) -> None:
        flags = self._rng.choice((_START, _START, _START, _STOP, 0, _START | _STOP, _START | _GET, 8))
        self._call(container, "VFIO_IOMMU_DIRTY_PAGES", {"flags": flags})

    def dirty_pages(self, container: Container) -> None:
        rng, page = self._rng, self.picture.facts.page_size
        if container.live and rng.random() < 0.8:
            one, other = rng.choice(container.live), rng.choice(container.live)
            if rng.random() < 0.5:
                other = one
            iova = min(one.iova, other.iova)
            size = max(one.iova + one.size, other.iova + other.size) - iova
            if rng.random() < 0.3:
                before = page * rng.choice((1, 3, 64, 65))
                iova, size = max(0, iova - before), size + before
        else:
            size = page * rng.choice((1, 4, 40, 64, 1024))
            iova = self._iova(size)
        self.picture.ioctl(
            self.picture.step_of(container),
            "VFIO_IOMMU_DIRTY_PAGES",
            {"flags": _GET},
            wide=[iova, size, *self._bitmap(size)],
        )

    def unmap_dirty(self, container: Container) -> None:
        rng = self._rng
        if container.live and rng.random() < 0.9:
            found = rng.choice(container.live)
            iova, size = found.iova, found.size
        else:
            size = self.picture.facts.page_size * rng.choice((1, 8, 64))
            iova = self._iova(size)
        flags = _BITMAP if rng.random() < 0.9 else _BITMAP | rng.choice((_ALL, _SUSPEND))
        self.picture.ioctl(
            self.picture.step_of(container),
            "VFIO_IOMMU_UNMAP_DMA",
            {"flags": flags, "iova": iova, "size": size},
            wide=self._bitmap(size),
        )
        if flags == _BITMAP:
            self._gone(container, iova, size)

    def _bitmap(self, size: int) -> list[Operand]:
        """A bitmap for that many bytes, in a buffer: bytes that a bit stands for, its own bytes, its address."""
        rng, page = self._rng, self.picture.facts.page_size
        length = max(1, -(-(size // page) // 64)) * 8
        if rng.random() < 0.12:
            length = rng.choice((0, 1, length - 1, length + 8, 4096, 1 << 28, (1 << 28) + 8, 1 << 63))
        if rng.random() < 0.08:
            page = rng.choice((0, 1, 512, 2 * page, 1 << 21, page + 1, (1 << 64) - page))
        number = rng.randrange(len(self.picture.buffers))
        offset = 8 * rng.randrange(self.picture.buffers[number].size // 8)
        return [page, length, ["buffer", number, offset + (rng.randrange(8) if rng.random() < 0.1 else 0)]]
