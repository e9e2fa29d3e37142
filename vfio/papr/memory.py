"""The memory of a guest: which of its addresses lead where in this process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from vfio import errors
from vfio.dma import DmaBuffer


class Block(NamedTuple):
    """Guest addresses from `start` on, backed by a buffer."""

    start: int
    buffer: DmaBuffer

    @property
    def end(self) -> int:
        return self.start + self.buffer.length


class GuestMemory:
    """Blocks of RAM, each at an address of the guest (bytes); one block from 0 on is the usual guest.

    Raises ValueError for blocks that overlap, or that do not begin at a multiple of 4 KiB.
    """

    def __init__(self, *blocks: DmaBuffer | tuple[int, DmaBuffer]) -> None:
        placed = [Block(*block) if isinstance(block, tuple) else Block(0, block) for block in blocks]
        self.blocks = sorted(placed, key=lambda block: block.start)
        if not self.blocks:
            raise ValueError("a guest has at least one block of memory")
        for block, following in zip(self.blocks, self.blocks[1:], strict=False):
            if block.end > following.start:
                ranges = [errors.span(each.start, each.buffer.length) for each in (block, following)]
                raise ValueError(f"blocks of guest memory overlap: {ranges[0]} and {ranges[1]}")
        for block in self.blocks:
            if block.start < 0 or block.start & 4095:
                raise ValueError(f"a block at {block.start:#x}: it must be a multiple of 4 KiB")

    @property
    def end(self) -> int:
        """The first address behind all of it."""
        return self.blocks[-1].end

    @property
    def page_size(self) -> int:
        """The largest page, in bytes, that all of it can be mapped in: of the pages behind it, and of its placement."""
        sizes = []
        for block in self.blocks:
            placed = block.start | block.buffer.address | block.buffer.length
            sizes.append(min(block.buffer.page_size, placed & -placed))
        return min(sizes)

    def pieces(self, address: int, length: int) -> Iterator[tuple[int, int]]:
        """Where these guest addresses are in this process: address and length, a piece a block.

        Raises LookupError where some of it is no memory of the guest.
        """
        while length > 0:
            block = next((block for block in self.blocks if block.start <= address < block.end), None)
            if block is None:
                raise LookupError(f"guest address {address:#x} is no memory")
            here = min(length, block.end - address)
            yield block.buffer.address + address - block.start, here
            address, length = address + here, length - here

    def read(self, address: int, length: int) -> bytes:
        """Bytes of one block.  Raises LookupError where they are not memory."""
        block = self._holding(address, length)
        return block.buffer[address - block.start : address - block.start + length]

    def write(self, address: int, data: bytes) -> None:
        """As `read`."""
        block = self._holding(address, len(data))
        block.buffer[address - block.start : address - block.start + len(data)] = data

    def _holding(self, address: int, length: int) -> Block:
        for block in self.blocks:
            if block.start <= address and address + length <= block.end:
                return block
        raise LookupError(f"guest addresses {errors.span(address, length)} are no memory")
