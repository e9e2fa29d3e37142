"""Bitmaps of dirty pages, as the Type1 driver hands them to a process.  (drivers/vfio/vfio_iommu_type1.c)

Hardware that cannot tell which pages it wrote makes every page of every mapping dirty each time.  The bits of a mapping
that does not begin at a multiple of 64 pages of the range are shifted, together with what is beside them in the 64-bit
words at both ends; what that leaves in the words is the kernel's, to the bit.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from vfio import uapi
from vfio.fake.kernel_error import fail

if TYPE_CHECKING:
    from vfio.fake.process import Process
    from vfio.fake.type1_mappings import Mapping
    from vfio.fake.user import Argument

LARGEST_BITMAP = 1 << 28
"""Bytes."""

_SIZE = uapi.sizeof(uapi.vfio_bitmap)
_HIGHEST_USER = 1 << 56
"""No address of a process is above, with five levels of page tables."""
_PAGES, _BYTES, _DATA = slice(0, 8), slice(8, 16), slice(16, 24)


class Request(NamedTuple):
    """struct vfio_bitmap: bytes for each bit, bytes of the bitmap, where it is."""

    page: int
    size: int
    data: int

    @classmethod
    def read(cls, argument: Argument, offset: int) -> Request:
        """The struct at `offset` of an ioctl's argument; EFAULT."""
        data = argument.copy_in(_SIZE, offset)
        return cls(*(int.from_bytes(data[part], "little") for part in (_PAGES, _BYTES, _DATA)))

    def check(self, size: int) -> None:
        """EINVAL for a bitmap that does not fit `size` bytes of IOVA, or that no process can have."""
        pages = size >> ((self.page & -self.page).bit_length() - 1) if self.page else size
        if self.data + self.size > _HIGHEST_USER or not pages or not self.size:
            raise fail(errno.EINVAL)
        if self.size > LARGEST_BITMAP or self.size < _bytes_for(pages):
            raise fail(errno.EINVAL)

    def report(self, process: Process, mapping: Mapping, base: int) -> None:
        """Write the bits of a mapping, all of them set, into the bitmap of a range that begins at `base`."""
        bits = mapping.size // self.page
        words, shift = divmod((mapping.iova - base) // self.page, 64)
        at = self.data + 8 * words
        mapping.dirty |= (1 << bits) - 1
        length = _bytes_for(bits + shift)
        if shift:
            mapping.dirty = (mapping.dirty << shift) & ((1 << 8 * length) - 1)
            mapping.dirty |= int.from_bytes(process.memory.read(at, 8), "little")
        shown = mapping.dirty & ((1 << 8 * length) - 1)
        process.memory.write(at, shown.to_bytes(length, "little"))


def _bytes_for(pages: int) -> int:
    """Bitmaps are whole words of 64 bits."""
    return -(-pages // 64) * 8
