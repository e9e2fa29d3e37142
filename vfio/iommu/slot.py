"""Slot: a range of IOVA with its MAP and UNMAP prepared, so that doing them again costs little more than the calls."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfio import errors, uapi

if TYPE_CHECKING:
    from vfio.iommu.window import DmaWindow

READ, WRITE = uapi.VFIO_DMA_MAP_FLAG_READ, uapi.VFIO_DMA_MAP_FLAG_WRITE


class Slot:
    """`length` bytes of IOVA from `iova`, inside `window` and checked to be.

    The structs of both calls are filled once and kept; `map` changes the address only.
    """

    __slots__ = ("_argument", "_call_map", "_call_unmap", "iova", "length", "reusable", "window")

    def __init__(self, window: DmaWindow, iova: int, length: int, flags: int = READ | WRITE) -> None:
        self.window = window
        self.iova = iova
        self.length = length
        self.reusable = iova != 0 and flags == READ | WRITE
        """Whether any mapping of this length may have it next."""
        self._argument = uapi.vfio_iommu_type1_dma_map(flags=flags, iova=iova, size=length)
        unmap = uapi.vfio_iommu_type1_dma_unmap(iova=iova, size=length)
        prepare, fd = window.iommu.backend.prepare, window.iommu.container.fd
        self._call_map = prepare(fd, uapi.VFIO_IOMMU_MAP_DMA, uapi.buffer(self._argument))
        self._call_unmap = prepare(fd, uapi.VFIO_IOMMU_UNMAP_DMA, uapi.buffer(unmap))

    def map(self, address: int) -> None:
        """Map the memory at `address`, in place of what was mapped."""
        self._argument.vaddr = address
        self.map_again()

    def map_again(self) -> None:
        """Map what was mapped last."""
        try:
            if not self._call_map():
                return
        except OSError as error:
            raise self.window.iommu.map_error(
                self.window, error, self._argument.vaddr, self.iova, self.length
            ) from error
        raise self._not_done("map")

    def unmap(self) -> None:
        """Unmap; the kernel takes no offence where nothing is mapped."""
        try:
            if not self._call_unmap():
                return
        except OSError as error:
            raise self.window.iommu.unmap_error(self.window, error, self.iova, self.length) from error
        raise self._not_done("unmap")

    def _not_done(self, verb: str) -> errors.VfioError:
        """The kernel answers +1 for an IOVA that is not a multiple of the window's page."""
        return errors.UnexpectedAnswer(
            errno.EINVAL,
            f"cannot {verb} IOVA {errors.span(self.iova, self.length)} in {self.window}",
            "the kernel answered with a positive number, and did nothing",
        )
