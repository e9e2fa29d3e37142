"""Raw calls of Type1, said briefly; answers are the kernel's numbers, as in `raw`."""

from __future__ import annotations

import struct

from simtests.conformance.raw import Container
from vfio import uapi

TYPE1, TYPE1_V2, NESTING = uapi.VFIO_TYPE1_IOMMU, uapi.VFIO_TYPE1v2_IOMMU, uapi.VFIO_TYPE1_NESTING_IOMMU
PAGE = 4096
MAP_VADDR = uapi.VFIO_DMA_MAP_FLAG_VADDR
GET_BITMAP, ALL, VADDR = (
    uapi.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP,
    uapi.VFIO_DMA_UNMAP_FLAG_ALL,
    uapi.VFIO_DMA_UNMAP_FLAG_VADDR,
)
START, STOP, GET = (
    uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_START,
    uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP,
    uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP,
)
UNTOUCHED = 0xAAAA_AAAA_AAAA_0000
"""Size of an unmap that the kernel refused."""


def unmap(container: Container, iova: int, size: int, flags: int = 0) -> tuple[int, int]:
    """What the kernel answers, and the size that it leaves in the struct."""
    argument = uapi.vfio_iommu_type1_dma_unmap(iova=iova, size=size, flags=flags)
    return container.ioctl(uapi.VFIO_IOMMU_UNMAP_DMA, uapi.buffer(argument)), argument.size


def unmap_dirty(
    container: Container,
    iova: int,
    size: int,
    data: int,
    bitmap: int,
    page: int = PAGE,
    flags: int = GET_BITMAP,
    argsz: int = 48,
) -> tuple[int, int]:
    """UNMAP with a bitmap of `bitmap` bytes at `data`."""
    buffer = bytearray(struct.pack("=2I5Q", argsz, flags, iova, size, page, bitmap, data))
    answer = container.ioctl(uapi.VFIO_IOMMU_UNMAP_DMA, buffer)
    return answer, int.from_bytes(buffer[16:24], "little")


def dirty(container: Container, flags: int, argsz: int = 8) -> int:
    return container.ioctl(uapi.VFIO_IOMMU_DIRTY_PAGES, bytearray(struct.pack("=2I", argsz, flags)))


def get_dirty(
    container: Container, iova: int, size: int, data: int, bitmap: int, page: int = PAGE, argsz: int = 48
) -> int:
    """GET_BITMAP into `bitmap` bytes at `data`."""
    buffer = bytearray(struct.pack("=2I5Q", argsz, GET, iova, size, page, bitmap, data))
    return container.ioctl(uapi.VFIO_IOMMU_DIRTY_PAGES, buffer)


def available(container: Container) -> int:
    """How many more mappings there may be."""
    buffer = bytearray(struct.pack("=I", 256).ljust(256, b"\0"))
    assert container.ioctl(uapi.VFIO_IOMMU_GET_INFO, buffer) == 0
    at = int.from_bytes(buffer[16:20], "little")
    while int.from_bytes(buffer[at : at + 2], "little") != uapi.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL:
        at = int.from_bytes(buffer[at + 4 : at + 8], "little")
        assert at
    return int.from_bytes(buffer[at + 8 : at + 12], "little")
