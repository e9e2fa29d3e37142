"""Region: a BAR, configuration space, or whatever else a device lets one read and write.

A register access is exactly as wide as its name says: a 32-bit register is read by one 32-bit load where the region
can be mapped, and by one 4-byte ``pread`` where it cannot (the kernel then makes one access of that width).
"""

from __future__ import annotations

import errno
import sys
from bisect import bisect_right
from typing import TYPE_CHECKING, Literal, NamedTuple

from vfio import errors, info, uapi
from vfio.backend import Mapping

if TYPE_CHECKING:
    from vfio.device import Device

ByteOrder = Literal["little", "big"]

_PROT_READ, _PROT_WRITE = 1, 2
_NAMES = {
    **{uapi.VFIO_PCI_BAR0_REGION_INDEX + n: f"BAR{n}" for n in range(6)},
    uapi.VFIO_PCI_ROM_REGION_INDEX: "ROM",
    uapi.VFIO_PCI_CONFIG_REGION_INDEX: "CONFIG",
    uapi.VFIO_PCI_VGA_REGION_INDEX: "VGA",
}


class Area(NamedTuple):
    """A part of a region that may be mapped, in bytes from the region's start."""

    offset: int
    size: int


class Region:
    """A region of an open device; made by `Device.region`.

    `byteorder` is the device's: PCI registers are little-endian unless a driver knows better, and may set it.  Mapped
    accesses are neither atomic with nor ordered against stores to ordinary memory on POWER: ring a doorbell with
    `doorbell32` or `doorbell64`.

    A mapped access while memory decoding is off, or in D3hot, ends the process with SIGBUS: the kernel has no other
    answer for it.
    """

    _words: memoryview
    """The mapping in 32-bit words; exists only while a plain index into it is a right answer of `read32`."""

    def __init__(self, device: Device, index: int) -> None:
        self.device = device
        self.index = index
        self._byteorder: ByteOrder = "little"
        self._mappings: list[tuple[Area, Mapping]] | None = None
        if not 0 <= index < device.info.num_regions:
            raise errors.NoSuchRegion(
                f"{device.address} has no region {index}", f"its regions are 0 to {device.info.num_regions - 1}"
            )
        try:
            found = info.get(
                device.backend,
                device.fd,
                uapi.VFIO_DEVICE_GET_REGION_INFO,
                uapi.vfio_region_info,
                f"cannot get the info of region {index} of {device.address}",
                index=index,
            )
        except errors.CallFailed as error:
            if error.errno == errno.EINVAL:
                raise errors.NoSuchRegion(
                    f"{device.address} has no region {index} ({self.name})", "the kernel refuses this index"
                ) from error
            raise
        self.size: int = found.size
        """Length in bytes; 0 where the region is not implemented."""
        self.flags: int = found.flags
        """VFIO_REGION_INFO_FLAG_*."""
        self.file_offset: int = found.offset
        """Where the region begins in the device's file."""
        self.capabilities: tuple[info.Capability, ...] = ()
        if found.flags & uapi.VFIO_REGION_INFO_FLAG_CAPS:
            self.capabilities = tuple(info.chain(found, found.cap_offset, f"{self}"))

    @property
    def name(self) -> str:
        """BAR0…BAR5, ROM, CONFIG, VGA, or ``region N``."""
        return _NAMES.get(self.index, f"region {self.index}")

    @property
    def byteorder(self) -> ByteOrder:
        """The order of the bytes in the device's registers."""
        return self._byteorder

    @byteorder.setter
    def byteorder(self, order: ByteOrder) -> None:
        self.close()  # how a register is read is decided when the region is mapped
        self._byteorder = order

    @property
    def readable(self) -> bool:
        return bool(self.flags & uapi.VFIO_REGION_INFO_FLAG_READ)

    @property
    def writable(self) -> bool:
        return bool(self.flags & uapi.VFIO_REGION_INFO_FLAG_WRITE)

    @property
    def mappable(self) -> list[Area]:
        """The parts that may be mapped: all of it, those of the sparse-mmap capability, or none."""
        if not self.flags & uapi.VFIO_REGION_INFO_FLAG_MMAP or not self.size:
            return []
        for capability in self.capabilities:
            if capability.id == uapi.VFIO_REGION_INFO_CAP_SPARSE_MMAP:
                sparse = uapi.from_buffer(uapi.vfio_region_info_cap_sparse_mmap, bytes(capability.data))
                first = uapi.sizeof(uapi.vfio_region_info_cap_sparse_mmap)
                item = uapi.vfio_region_sparse_mmap_area
                areas = uapi.array_from_buffer(item, bytes(capability.data), first, sparse.nr_areas)
                return sorted(Area(area.offset, area.size) for area in areas if area.size)
        return [Area(0, self.size)]

    # --- one register ---

    def read8(self, offset: int) -> int:
        """One 8-bit read at `offset` (bytes).  Raises `errors.OutsideRegion` for a bad offset, OSError from the kernel."""
        return self._read(offset, 1)

    def read16(self, offset: int) -> int:
        """One 16-bit read at `offset` (bytes, a multiple of 2)."""
        return self._read(offset, 2)

    def read32(self, offset: int) -> int:
        """One 32-bit read at `offset` (bytes, a multiple of 4)."""
        # The whole cost of a register read is here: the plain case is decided before anything is called.
        if not offset & 3 and offset >= 0:
            try:
                return self._words[offset >> 2]
            except (AttributeError, IndexError):
                pass
        return self._read(offset, 4)

    def read64(self, offset: int) -> int:
        """One 64-bit read at `offset` (bytes, a multiple of 8)."""
        return self._read(offset, 8)

    def write8(self, offset: int, value: int) -> None:
        """One 8-bit write at `offset` (bytes)."""
        self._write(offset, 1, value)

    def write16(self, offset: int, value: int) -> None:
        """One 16-bit write at `offset` (bytes, a multiple of 2)."""
        self._write(offset, 2, value)

    def write32(self, offset: int, value: int) -> None:
        """One 32-bit write at `offset` (bytes, a multiple of 4)."""
        self._write(offset, 4, value)

    def write64(self, offset: int, value: int) -> None:
        """One 64-bit write at `offset` (bytes, a multiple of 8)."""
        self._write(offset, 8, value)

    def doorbell32(self, offset: int, value: int) -> None:
        """Write a 32-bit register after all that this thread stored to memory before it.

        The store is made by the kernel, which puts a full barrier before it (``sync`` on POWER).  Use it for the register
        that tells a device to look at memory: a plain `write32` may overtake the stores that filled the buffer.
        """
        self._doorbell(offset, 4, value)

    def doorbell64(self, offset: int, value: int) -> None:
        """`doorbell32` for a 64-bit register."""
        self._doorbell(offset, 8, value)

    # --- many ---

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`, as the device lays them out, by the widest aligned accesses up to 32 bits.

        Raises `errors.OutsideRegion` where the range leaves the region.
        """
        self._check_range(offset, length, "read")
        if mapping := self._mapping_of(offset, length):
            area, mapped = mapping
            pieces = _pieces(offset - area.offset, length)
            return b"".join(mapped.load(at, width).to_bytes(width, sys.byteorder) for at, width in pieces)
        return self._pread(offset, length)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes at `offset`, by the widest aligned accesses up to 32 bits, in the order of their addresses."""
        data = bytes(data)
        self._check_range(offset, len(data), "write")
        if mapping := self._mapping_of(offset, len(data)):
            area, mapped = mapping
            start = offset - area.offset
            for at, width in _pieces(start, len(data)):
                mapped.store(at, width, int.from_bytes(data[at - start : at - start + width], sys.byteorder))
            return
        self._pwrite(offset, data)

    def view(self, width: int = 4) -> memoryview:
        """The whole mapped region as a memoryview of items of `width` bytes, in the CPU's byte order.

        The fastest way to a register, for hot loops: ``view[offset // width]`` is one access.  It is released when the
        region is closed.  Raises `errors.NoSuchRegion` (ENODEV) where the region cannot be mapped as a whole, or where
        the backend makes each access a call.
        """
        mappings = self._mapped()
        view = mappings[0][1].view(width) if len(mappings) == 1 and mappings[0][0] == Area(0, self.size) else None
        if view is None:
            raise errors.NoSuchRegion(f"{self} has no view", "it cannot be mapped as a whole", errno.ENODEV)
        return view

    def close(self) -> None:
        """Unmap; the next access maps again, while the device is open."""
        self.__dict__.pop("_words", None)
        mappings, self._mappings = self._mappings or [], None
        for _, mapping in mappings:
            mapping.close()

    # --- how ---

    def _mapped(self) -> list[tuple[Area, Mapping]]:
        if self._mappings is None:
            fd = self.device.fd
            prot = (_PROT_READ if self.readable else 0) | (_PROT_WRITE if self.writable else 0)
            found = []
            try:
                for area in self.mappable:
                    where = self.file_offset + area.offset
                    found.append((area, self.device.backend.mmap(fd, area.size, where, prot)))
            except OSError as error:
                for _, mapping in found:
                    mapping.close()
                raise errors.CallFailed(error.errno or errno.EIO, f"cannot map {self}") from error
            self._mappings = found
            if len(found) == 1 and found[0][0].offset == 0 and self._byteorder == sys.byteorder:
                words = found[0][1].view(4)
                if words is not None:
                    self._words = words
        return self._mappings

    def _mapping_of(self, offset: int, length: int) -> tuple[Area, Mapping] | None:
        mappings = self._mapped()
        n = bisect_right(mappings, offset, key=lambda mapping: mapping[0].offset) - 1
        if n >= 0:
            area = mappings[n][0]
            if offset + length <= area.offset + area.size:
                return mappings[n]
        return None

    def _read(self, offset: int, width: int) -> int:
        self._check_register(offset, width, "read")
        if mapping := self._mapping_of(offset, width):
            area, mapped = mapping
            return self._ordered(mapped.load(offset - area.offset, width), width)
        return int.from_bytes(self._pread(offset, width), self.byteorder)

    def _write(self, offset: int, width: int, value: int) -> None:
        self._check_register(offset, width, "write")
        if mapping := self._mapping_of(offset, width):
            area, mapped = mapping
            mapped.store(offset - area.offset, width, self._ordered(value, width))
        else:
            self._pwrite(offset, value.to_bytes(width, self.byteorder))

    def _doorbell(self, offset: int, width: int, value: int) -> None:
        self._check_register(offset, width, "write")
        self._pwrite(offset, value.to_bytes(width, self.byteorder))

    def _ordered(self, value: int, width: int) -> int:
        """`value` turned from the CPU's byte order into the device's, or back."""
        if self._byteorder == sys.byteorder or width == 1:
            return value
        return int.from_bytes(value.to_bytes(width, "little"), "big")

    def _pread(self, offset: int, length: int) -> bytes:
        try:
            data = self.device.backend.pread(self.device.fd, length, self.file_offset + offset)
        except OSError as error:
            raise self._access_error(error, "read", offset, length) from error
        if len(data) != length:
            raise errors.CallFailed(errno.EIO, f"short read of {self}", f"{len(data)} of {length} bytes at {offset:#x}")
        return data

    def _pwrite(self, offset: int, data: bytes) -> None:
        try:
            count = self.device.backend.pwrite(self.device.fd, data, self.file_offset + offset)
        except OSError as error:
            raise self._access_error(error, "write", offset, len(data)) from error
        if count != len(data):
            raise errors.CallFailed(errno.EIO, f"short write of {self}", f"{count} of {len(data)} bytes at {offset:#x}")

    def _access_error(self, error: OSError, verb: str, offset: int, length: int) -> errors.VfioError:
        why = remedy = ""
        if error.errno == errno.EIO and self.index < uapi.VFIO_PCI_ROM_REGION_INDEX:
            why = "memory decoding is off, or the device is in D3hot"
            remedy = "set bit 1 of the command register, and the power state to D0, in configuration space"
        elif error.errno == errno.ENODEV:
            why = "the device is gone, or its PE is held in EEH reset"
        return errors.CallFailed(
            error.errno or errno.EIO, f"cannot {verb} {length} bytes at {offset:#x} of {self}", why, remedy
        )

    def _check_register(self, offset: int, width: int, verb: str) -> None:
        self._check_range(offset, width, verb)
        if offset % width:
            raise errors.OutsideRegion(
                f"cannot {verb} {self}", offset, width, self.size, f"offset {offset:#x} is not a multiple of {width}"
            )

    def _check_range(self, offset: int, length: int, verb: str) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise errors.OutsideRegion(f"cannot {verb} {self}", offset, length, self.size)

    def __str__(self) -> str:
        return f"{self.name} of {self.device.address}"

    def __repr__(self) -> str:
        return f"<Region {self}, {errors.size(self.size)}>"


def _pieces(offset: int, length: int) -> list[tuple[int, int]]:
    """A range of bytes as (offset, width) of naturally aligned accesses of at most 4 bytes."""
    pieces = []
    end = offset + length
    while offset < end:
        width = 4
        while offset % width or offset + width > end:
            width //= 2
        pieces.append((offset, width))
        offset += width
    return pieces
