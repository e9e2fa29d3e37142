"""What is mapped in a Type1 container: ranges of IOVA that never overlap, in order."""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from vfio import uapi
from vfio.fake.kernel_error import fail
from vfio.fake.table_group import TableGroup
from vfio.fake.tce import Translation

if TYPE_CHECKING:
    from vfio.fake.memory import AddressSpace
    from vfio.fake.process import Process
    from vfio.fake.tce import TceTable
    from vfio.fake.type1 import Type1


class Mapping:
    """A mapping (struct vfio_dma)."""

    __slots__ = ("_reach", "access", "dirty", "invalid", "iova", "process", "size", "vaddr")

    def __init__(self, process: Process, iova: int, size: int, vaddr: int, access: int) -> None:
        self.process = process
        """Whose memory it is, and who is charged."""
        self.iova = iova
        self.size = size
        self.vaddr = vaddr
        self.access = access
        """VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE."""
        # An IOMMU lets no device read what it may only write; that of the lab's QEMU does.
        self._reach = access | uapi.VFIO_DMA_MAP_FLAG_READ if process.machine.imitates_qemu else access
        self.invalid = False
        """Whether `vaddr` is about to be replaced."""
        self.dirty = 0
        """The bitmap: bit n is that of page n."""

    @property
    def end(self) -> int:
        return self.iova + self.size

    # --- as what translates the DMA of a PE ---

    page_size = 4096

    @property
    def memory(self) -> AddressSpace:
        return self.process.memory

    def translate(self, address: int) -> Translation | None:
        """Where a device's access to an IOVA of the mapping goes."""
        offset = address - self.iova
        return Translation(self.vaddr + offset, self.size - offset, self._reach)

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        access = ("r" if self.access & 1 else "") + ("w" if self.access & 2 else "")
        return {"iova": self.iova, "size": self.size, "vaddr": self.vaddr, "access": access, "invalid": self.invalid}


class Mappings:
    """The mappings of a container."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._sorted: list[Mapping] = []

    def __iter__(self) -> Iterator[Mapping]:
        return iter(self._sorted)

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, mapping: Mapping) -> None:
        place = bisect_left(self._starts, mapping.iova)
        self._starts.insert(place, mapping.iova)
        self._sorted.insert(place, mapping)

    def remove(self, mapping: Mapping) -> None:
        place = bisect_left(self._starts, mapping.iova)
        del self._starts[place], self._sorted[place]

    def at(self, address: int) -> Mapping | None:
        """The mapping that an IOVA is in."""
        place = bisect_right(self._starts, address) - 1
        return self._sorted[place] if place >= 0 and address < self._sorted[place].end else None

    def touching(self, start: int, size: int) -> list[Mapping]:
        """The mappings that share a byte with a range, in order."""
        first = max(bisect_right(self._starts, start) - 1, 0)
        last = bisect_left(self._starts, start + size)
        return [mapping for mapping in self._sorted[first:last] if mapping.end > start]

    def cut_by(self, start: int, size: int) -> bool:
        """Whether a mapping is partly in a range and partly outside."""
        first, last = self.at(start), self.at(start + size - 1)
        return bool((first and first.iova != start) or (last and last.end != start + size))


class Type1Group(TableGroup):
    """The group's place in a domain: without windows, and without any address before a container gives it some."""

    domain: Type1 | None = None

    def get_table_size(self, page_shift: int, window_size: int, levels: int) -> int:
        return 0

    def create_table(self, number: int, page_shift: int, window_size: int, levels: int) -> TceTable:
        raise fail(errno.EINVAL)

    def find(self, address: int) -> TceTable | None:
        """The mapping that an IOVA is in, which translates as a table does."""
        return cast("TceTable | None", self.domain.mappings.at(address)) if self.domain else None
