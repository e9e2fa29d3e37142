"""Which pages of a range of IOVA devices may have written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class DirtyPages:
    """A bitmap of the pages of ``iova .. iova + length``: bit n of it, the lowest of a byte first, is that of page n."""

    iova: int  # bytes
    length: int  # bytes
    page_size: int  # bytes for each bit
    bitmap: bytes

    def __contains__(self, iova: object) -> bool:
        """Whether the page of this IOVA is dirty."""
        if not isinstance(iova, int) or not 0 <= iova - self.iova < self.length:
            return False
        page = (iova - self.iova) // self.page_size
        return bool(self.bitmap[page // 8] >> page % 8 & 1)

    @property
    def pages(self) -> Iterator[int]:
        """The IOVA of every page that is dirty."""
        for at, byte in enumerate(self.bitmap):
            if byte:  # of a sparse bitmap only few are looked at more closely
                for page in range(8 * at, min(8 * at + 8, self.length // self.page_size)):
                    if byte >> page % 8 & 1:
                        yield self.iova + page * self.page_size

    @property
    def count(self) -> int:
        """How many pages are dirty."""
        pages = (1 << self.length // self.page_size) - 1
        return (int.from_bytes(self.bitmap, "little") & pages).bit_count()


def bitmap_bytes(length: int, page_size: int) -> int:
    """Bytes of a bitmap for so many bytes of IOVA: whole 64-bit words."""
    return -(-length // page_size // 64) * 8
