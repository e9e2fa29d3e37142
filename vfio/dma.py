"""Memory for devices: buffers, the size of the pages behind an address, and memory that is mapped."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from vfio import errors
from vfio.backend import Backend, Memory, default
from vfio.closing import Closing

if TYPE_CHECKING:
    from vfio.iommu.registration import Region
    from vfio.iommu.slot import Slot
    from vfio.iommu.type1 import Type1, Type1Slot
    from vfio.iommu.window import DmaWindow


class DmaMemory:
    """Memory of this process that can be mapped: an address and a length, in bytes."""

    address: int
    length: int
    dma: Dma | None = None
    """Where it is mapped (the newest mapping); None if it is not."""


class DmaBuffer(Closing, DmaMemory):
    """Zeroed memory made for DMA: `length` bytes, rounded up to whole pages and aligned to them.

    `page_size` asks for hugetlb pages of that many bytes; a DMA window with large pages needs them.  It can be used like
    a bytearray (``buffer[0:4] = …``) and by anything that takes a buffer (``memoryview(buffer.view)``).

    Raises `errors.CallFailed` (ENOMEM, EINVAL) where the host has no such pages free.
    """

    def __init__(self, length: int, page_size: int | None = None, backend: Backend | None = None) -> None:
        self.backend = backend or default()
        page = page_size or self.backend.page_size
        if length <= 0 or page & (page - 1):
            raise ValueError(
                f"a buffer of {length} bytes in pages of {page} bytes: both must be positive, pages a power of 2"
            )
        self.length = -(-length // page) * page
        self.page_size = page
        try:
            self._memory: Memory | None = self.backend.allocate(self.length, page_size)
        except OSError as error:
            raise _no_pages(error, self.length, page, page_size is None) from error
        self.address = self._memory.address

    @property
    def view(self) -> memoryview:
        """The bytes; raises `errors.Closed` after `close`."""
        if self._memory is None:
            raise errors.Closed("DMA buffer")
        return self._memory.view

    @property
    def iova(self) -> int:
        """Where a device finds the buffer; raises `errors.NotMapped` while it is not mapped."""
        if self.dma is None:
            raise errors.NotMapped("the buffer has no IOVA", self.address, self.length)
        return self.dma.iova

    def __getitem__(self, index: slice) -> bytes:
        return bytes(self.view[index])

    def __setitem__(self, index: slice, data: bytes | bytearray | memoryview) -> None:
        self.view[index] = data

    def __len__(self) -> int:
        return self.length

    def close(self) -> None:
        """Give the memory back.  Raises `errors.StillMapped` while a device can reach it."""
        if self.dma is not None:
            raise errors.StillMapped(f"cannot free the buffer at {self.address:#x}", 1)
        if self._memory is not None:
            memory, self._memory = self._memory, None
            memory.close()

    def __repr__(self) -> str:
        where = f", IOVA {self.dma.iova:#x}" if self.dma else ""
        return f"<DmaBuffer {errors.size(self.length)} at {self.address:#x}{where}>"


def _no_pages(error: OSError, length: int, page: int, ordinary: bool) -> errors.CallFailed:
    number = error.errno or 0
    what = f"cannot allocate {errors.size(length)} in pages of {errors.size(page)}"
    if ordinary:
        return errors.CallFailed(number, what)
    if number == errno.EINVAL:
        return errors.CallFailed(number, what, "this kernel has no hugetlb pages of that size")
    return errors.CallFailed(
        number,
        what,
        "not enough hugetlb pages of that size are free",
        f"as root: echo {length // page} > /sys/kernel/mm/hugepages/hugepages-{page // 1024}kB/nr_hugepages"
        f"  (or at boot: hugepagesz={page // 1024}K hugepages={length // page})",
    )


class MemoryRange(DmaMemory):
    """Memory of this process by its bare address: `length` bytes, in pages of the size that they really have."""

    def __init__(self, address: int, length: int) -> None:
        self.address = address
        self.length = length

    def __repr__(self) -> str:
        return f"<MemoryRange {errors.span(self.address, self.length)}>"


class Dma(Closing):
    """Memory that is mapped for DMA; closing it unmaps it.  Reads and writes like a bytearray.  Made by `Iommu.map`."""

    __slots__ = ("_afterwards", "_slot", "_unmapped", "memory", "region", "window")

    def __init__(
        self, window: DmaWindow | Type1, slot: Slot | Type1Slot, memory: DmaMemory, region: Region | None
    ) -> None:
        self.window = window
        self.memory = memory
        self.region = region
        self._slot = slot
        self._unmapped = False
        self._afterwards: Callable[[], None] | None = None

    @property
    def iova(self) -> int:
        """Where devices find it, in bytes."""
        return self._slot.iova

    @property
    def length(self) -> int:
        return self._slot.length

    @property
    def mapped(self) -> bool:
        return not self._unmapped

    @property
    def view(self) -> memoryview:
        """The bytes of a `DmaBuffer`; raises TypeError for memory that is known by its bare address only."""
        if not isinstance(self.memory, DmaBuffer):
            raise TypeError(f"{self.memory!r} is known by its address only: keep a view of it yourself")
        return self.memory.view

    def __getitem__(self, index: slice) -> bytes:
        return bytes(self.view[index])

    def __setitem__(self, index: slice, data: bytes | bytearray | memoryview) -> None:
        self.view[index] = data

    def __len__(self) -> int:
        return self._slot.length

    def close(self) -> None:
        """Unmap; harmless when it is unmapped already.  The memory itself stays."""
        if not self._unmapped:
            self.window.unmap(self, cast(Any, self._slot))  # of the kind that it made
            if self._afterwards is not None:
                self._afterwards()

    def on_unmapped(self, afterwards: Callable[[], None]) -> None:
        """Call `afterwards` when it has been unmapped by `close`."""
        self._afterwards = afterwards

    def remap(self) -> None:
        """Map it again, at the same place: something has emptied the table."""
        self._slot.map_again()

    def gone(self) -> None:
        """The mapping is no more, however that came."""
        self._unmapped = True
        if self.memory.dma is self:
            self.memory.dma = None

    def __repr__(self) -> str:
        return f"<Dma IOVA {errors.span(self.iova, self.length)}{'' if self.mapped else ', unmapped'}>"


_AREA = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


def backing_page_size(backend: Backend, memory: DmaMemory) -> int:
    """Size in bytes of the smallest page behind `memory`: hugetlb pages count as what they are, all else as host pages.

    The kernel takes no larger one in a DMA window, transparent huge pages included.
    """
    if isinstance(memory, DmaBuffer):
        return memory.page_size
    smallest = None
    inside = False
    for line in backend.read_text(f"/proc/{os.getpid()}/smaps").splitlines():
        if match := _AREA.match(line):
            start, end = (int(group, 16) for group in match.groups())
            inside = start < memory.address + memory.length and memory.address < end
        elif inside and line.startswith("KernelPageSize:"):
            page = int(line.split()[1]) * 1024
            smallest = page if smallest is None else min(smallest, page)
    return smallest or backend.page_size
