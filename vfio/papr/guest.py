"""The guest's side, as pseries Linux has it: a driver for `Phb`, and how to read what a guest does.

Source: enable_ddw, tce_buildmulti_pSeriesLP and tce_freemulti_pSeriesLP in arch/powerpc/platforms/pseries/iommu.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from vfio.iova import IovaAllocator
from vfio.papr.numbers import LIST_BYTES, MAX_INDIRECT, TCE_READ, TCE_WRITE, Hcall, Opcode, Rtas, page_shifts
from vfio.papr.phb import Phb

_BITS_32 = (1 << 32) - 1
_DEFAULT_PAGE = 4096


class DirectDma(NamedTuple):
    """A window in which all of the guest's memory is mapped, and stays so."""

    liobn: int
    start: int
    """Bus address of the window, which is that of guest address 0."""
    page_size: int
    size: int

    def address(self, guest_address: int) -> int:
        """Where a device finds a guest address: no call is made for it."""
        return self.start + guest_address

    def reached(self, dma_mask: int) -> bool:
        """Whether a device with this mask can address all of it."""
        return self.start + self.size - 1 <= dma_mask


class Refused(OSError):
    """The hypervisor answered a guest's call with an error."""

    def __init__(self, call: str, status: int) -> None:
        super().__init__(f"{call} answered {status}")
        self.status = status


class Guest:
    """A guest behind `phb`.  `list_page` is the guest address of 4 KiB that it keeps for lists of TCEs (default: its last)."""

    def __init__(self, phb: Phb, list_page: int | None = None) -> None:
        self.phb = phb
        self._list = phb.memory.end - LIST_BYTES if list_page is None else list_page
        self._where = (phb.buid >> 32, phb.buid & _BITS_32)
        self._default = phb.liobns[0]
        window = phb.tables[self._default].window  # in a real guest: the property ibm,dma-window of its device tree
        self._bus = IovaAllocator(window.start, window.size)
        self._direct: DirectDma | None = None

    # --- 64-bit devices ---

    def enable_ddw(self, device: int, dma_mask: int = (1 << 64) - 1) -> DirectDma | None:
        """Switch the device at a configuration address to direct DMA.

        Asks what windows there can be, creates one with the biggest pages, and maps all memory in it; the next devices
        share it.  None where the device stays on the default window: its DMA mask has no more than 32 bits or does not
        reach that far, there is no free window, or something was refused, after which nothing of the window is left.
        """
        if dma_mask <= _BITS_32:
            return None
        if self._direct is not None:
            return self._direct if self._direct.reached(dma_mask) else None
        status, available, _, mask, _ = self.phb.rtas("ibm,query-pe-dma-window", device, *self._where, results=5)
        shifts = page_shifts(mask)
        if status or not available or not shifts:
            return None
        page_shift = shifts[-1]
        window_shift = max((self.phb.memory.end - 1).bit_length(), page_shift)
        status, liobn, high, low = self.phb.rtas(
            "ibm,create-pe-dma-window", device, *self._where, page_shift, window_shift, results=4
        )
        if status:
            return None
        direct = DirectDma(liobn, high << 32 | low, 1 << page_shift, 1 << window_shift)
        # A device that cannot reach the window has no use for it.
        if not direct.reached(dma_mask) or not self._map_all(direct):
            self.disable_ddw(direct)
            return None
        self._direct = direct
        return direct

    def disable_ddw(self, direct: DirectDma) -> None:
        """Clear the window and remove it.  Raises Refused."""
        self._stuff(direct.liobn, direct.start, direct.size // direct.page_size, direct.page_size)
        (status,) = self.phb.rtas("ibm,remove-pe-dma-window", direct.liobn, results=1)
        if status != Rtas.SUCCESS:
            raise Refused("ibm,remove-pe-dma-window", status)
        self._direct = None

    # --- 32-bit devices ---

    def map(self, guest_address: int, length: int) -> int:
        """Map some memory in the default window; its bus address.  Multiples of 4 KiB.

        Raises Refused; MemoryError where the window is full.
        """
        ioba = self._bus.allocate(length, _DEFAULT_PAGE)
        if ioba is None:
            raise MemoryError(f"no room for {length:#x} bytes in the default window")
        try:
            self._put(self._default, ioba, guest_address, length // _DEFAULT_PAGE, _DEFAULT_PAGE)
        except Refused:
            self.unmap(ioba, length)
            raise
        return ioba

    def unmap(self, ioba: int, length: int) -> None:
        """Undo `map`."""
        self._stuff(self._default, ioba, length // _DEFAULT_PAGE, _DEFAULT_PAGE)
        self._bus.free(ioba, length)

    # --- how ---

    def _map_all(self, direct: DirectDma) -> bool:
        try:
            for block in self.phb.memory.blocks:
                pages = block.buffer.length // direct.page_size
                self._put(direct.liobn, direct.address(block.start), block.start, pages, direct.page_size)
        except Refused:
            return False
        return True

    def _put(self, liobn: int, ioba: int, address: int, pages: int, page_size: int) -> None:
        for first, count in _batches(pages):
            start = address + first * page_size | TCE_READ | TCE_WRITE
            tces = struct.pack(f">{count}Q", *range(start, start + count * page_size, page_size))
            self.phb.memory.write(self._list, tces)
            (code,) = self.phb.hcall(Opcode.H_PUT_TCE_INDIRECT, liobn, ioba + first * page_size, self._list, count)
            if code != Hcall.SUCCESS:
                raise Refused("H_PUT_TCE_INDIRECT", code)

    def _stuff(self, liobn: int, ioba: int, pages: int, page_size: int) -> None:
        for first, count in _batches(pages):
            (code,) = self.phb.hcall(Opcode.H_STUFF_TCE, liobn, ioba + first * page_size, 0, count)
            if code != Hcall.SUCCESS:
                raise Refused("H_STUFF_TCE", code)


def _batches(pages: int) -> Iterator[tuple[int, int]]:
    for first in range(0, pages, MAX_INDIRECT):
        yield first, min(MAX_INDIRECT, pages - first)
