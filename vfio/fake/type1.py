"""The Type1 IOMMU driver, versions 1 and 2: x86, and most of the world.  (drivers/vfio/vfio_iommu_type1.c)

A mapping pins and charges its memory, and is then one thing: version 2 unmaps it as a whole or not at all, version 1 makes
of a request for its first byte one for all of it, and of any other part nothing.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, cast

from vfio import uapi
from vfio.fake import type1_dirty as dirty
from vfio.fake.kernel_error import fail
from vfio.fake.type1_mappings import Mapping, Mappings, Type1Group

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio.fake.core import VfioCore
    from vfio.fake.iommu_group import IommuGroup
    from vfio.fake.machine import Machine
    from vfio.fake.process import Process
    from vfio.fake.user import Argument

ENTRY_LIMIT = 65535
"""Mappings of a container, unless the module's parameter dma_entry_limit says otherwise."""

_U64 = (1 << 64) - 1
_NESTING = uapi.VFIO_TYPE1_NESTING_IOMMU
_TYPES = (uapi.VFIO_TYPE1_IOMMU, uapi.VFIO_TYPE1v2_IOMMU)
_READ, _WRITE, _VADDR = uapi.VFIO_DMA_MAP_FLAG_READ, uapi.VFIO_DMA_MAP_FLAG_WRITE, uapi.VFIO_DMA_MAP_FLAG_VADDR
_GET_BITMAP, _ALL = uapi.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP, uapi.VFIO_DMA_UNMAP_FLAG_ALL
_UNMAP_VADDR = uapi.VFIO_DMA_UNMAP_FLAG_VADDR
_START, _STOP = uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_START, uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP
_GET = uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP
_INFO_SIZE = uapi.sizeof(uapi.vfio_iommu_type1_info)
_INFO_MINSZ = uapi.offsetof(uapi.vfio_iommu_type1_info, "iova_pgsizes") + 8
_UNMAP_SIZE = uapi.sizeof(uapi.vfio_iommu_type1_dma_unmap)
_DIRTY_SIZE = uapi.sizeof(uapi.vfio_iommu_type1_dirty_bitmap)
_BITMAP_SIZE = uapi.sizeof(uapi.vfio_bitmap)
_GET_SIZE = uapi.sizeof(uapi.vfio_iommu_type1_dirty_bitmap_get)


class Type1:
    """One instance: what a container has between SET_IOMMU and the detaching of its last group."""

    name = "vfio-iommu-type1"
    entry_limit = ENTRY_LIMIT

    def __init__(self, core: VfioCore, kind: int) -> None:
        self.core = core
        self.machine = core.machine
        self.v2 = kind != uapi.VFIO_TYPE1_IOMMU
        self.nesting = kind == _NESTING
        self.groups: list[IommuGroup] = []
        """Newest first."""
        self.mappings = Mappings()
        self.available = self.entry_limit
        """How many more mappings there may be."""
        self.tracking = False
        """Whether dirty pages are tracked."""
        self.page_sizes = core.machine.topology.iommu.page_sizes
        self.page = self.page_sizes & -self.page_sizes
        requests: dict[int, Callable[[Process, Argument], int]] = {
            uapi.VFIO_IOMMU_GET_INFO: self._get_info,
            uapi.VFIO_IOMMU_MAP_DMA: self._map,
            uapi.VFIO_IOMMU_UNMAP_DMA: self._unmap,
            uapi.VFIO_IOMMU_DIRTY_PAGES: self._dirty_pages,
        }
        self._requests = {request - uapi.VFIO_GET_API_VERSION: handler for request, handler in requests.items()}

    @staticmethod
    def check_extension(machine: Machine, extension: int) -> int:
        """VFIO_CHECK_EXTENSION, as long as no instance is set: 1 for what this driver has, else 0."""
        return int(extension in (*_TYPES, uapi.VFIO_UNMAP_ALL) or (extension == _NESTING and machine.kernel < (7, 2)))

    @classmethod
    def open(cls, core: VfioCore, kind: int) -> Type1:
        """An instance of the type that SET_IOMMU names; EINVAL for an extension that is no type."""
        if kind not in (*_TYPES, _NESTING):
            raise fail(errno.EINVAL)
        return cls(core, kind)

    def extension(self, extension: int) -> int:
        """VFIO_CHECK_EXTENSION of a container with this instance."""
        return 1 if extension == uapi.VFIO_UPDATE_VADDR else self.check_extension(self.machine, extension)

    def release(self) -> None:
        """The container has no group any more: everything is unmapped and given back."""
        for group in list(self.groups):
            self.detach_group(group)
        for mapping in list(self.mappings):
            self._remove(mapping)

    # --- groups ---

    def attach_group(self, group: IommuGroup) -> None:
        """Let a group use the mappings."""
        if any(mapping.invalid for mapping in self.mappings):
            raise fail(errno.EBUSY)
        if self.nesting:  # which no hardware of the model has
            raise fail(errno.EINVAL)
        if any(self.mappings.touching(start, end + 1 - start) for start, end in group.reserved):
            raise fail(errno.EINVAL)
        if not self.machine.topology.iommu.remaps_interrupts:  # allow_unsafe_interrupts is not on
            raise fail(errno.EPERM)
        cast(Type1Group, group.table_group).domain = self
        self.groups.insert(0, group)

    def detach_group(self, group: IommuGroup) -> None:
        """The group reaches nothing any more; what is mapped stays for the others."""
        cast(Type1Group, group.table_group).domain = None
        self.groups.remove(group)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """First and last IOVA of what can be mapped: nothing that is reserved for a group."""
        found = list(self.machine.topology.iommu.ranges)
        for start, end in (each for group in self.groups for each in group.reserved):
            found = [
                piece
                for first, last in found
                for piece in ((first, min(last, start - 1)), (max(first, end + 1), last))
                if piece[0] <= piece[1]
            ]
        return found

    # --- requests ---

    def ioctl(self, process: Process, n: int | None, argument: Argument) -> int:
        """The request VFIO_BASE + `n`, which the core does not know itself."""
        handler = self._requests.get(-1 if n is None else n)
        if handler is None:
            raise fail(errno.ENOTTY)
        return handler(process, argument)

    @property
    def _wraps(self) -> OSError:
        return fail(errno.EOVERFLOW if self.machine.kernel >= (7, 2) else errno.EINVAL)

    def _get_info(self, process: Process, argument: Argument) -> int:
        info = argument.read(uapi.vfio_iommu_type1_info, _INFO_MINSZ)
        shown = min(info.argsz, _INFO_SIZE)
        info.flags = uapi.VFIO_IOMMU_INFO_PGSIZES | uapi.VFIO_IOMMU_INFO_CAPS
        info.iova_pgsizes = self.page_sizes
        chain = self._capabilities()
        if info.argsz < _INFO_SIZE + len(chain):
            info.argsz = _INFO_SIZE + len(chain)
        else:
            argument.copy_out(chain, _INFO_SIZE)
            info.cap_offset = _INFO_SIZE
        argument.copy_out(bytes(uapi.buffer(info)[:shown]))
        return 0

    def _capabilities(self) -> bytes:
        """Migration, mappings left, ranges; each says where in the struct the next one is."""
        ranges = self.ranges
        iova = uapi.vfio_iommu_type1_info_cap_iova_range.sized(
            uapi.sizeof(uapi.vfio_iommu_type1_info_cap_iova_range) + 16 * len(ranges), nr_iovas=len(ranges)
        )
        for place, (start, end) in enumerate(ranges):
            iova.iova_ranges[place].start, iova.iova_ranges[place].end = start, end
        capabilities: list[tuple[int, Any]] = [
            (
                uapi.VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION,
                uapi.vfio_iommu_type1_info_cap_migration(
                    pgsize_bitmap=self.page, max_dirty_bitmap_size=dirty.LARGEST_BITMAP
                ),
            ),
            (uapi.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, uapi.vfio_iommu_type1_info_dma_avail(avail=self.available)),
            (uapi.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, iova),
        ]
        chain = b""
        for place, (number, struct) in enumerate(capabilities):
            struct.header.id, struct.header.version = number, 1
            size = -(-len(uapi.buffer(struct)) // 8) * 8
            if place + 1 < len(capabilities):
                struct.header.next = _INFO_SIZE + len(chain) + size
            chain += bytes(uapi.buffer(struct)).ljust(size, b"\0")
        return chain

    def _map(self, process: Process, argument: Argument) -> int:
        param = argument.read(uapi.vfio_iommu_type1_dma_map)
        iova, vaddr, size, flags = param.iova, param.vaddr, param.size, param.flags
        access = flags & (_READ | _WRITE)
        if flags & ~(_READ | _WRITE | _VADDR) or bool(access) == bool(flags & _VADDR):
            raise fail(errno.EINVAL)
        if not size or (size | iova | vaddr) % self.page:
            raise fail(errno.EINVAL)
        if max(iova, vaddr) + size - 1 > _U64:
            raise self._wraps
        there = self.mappings.touching(iova, size)
        if flags & _VADDR:
            self._new_vaddr(process, there, iova, vaddr, size)
            return 0
        if there:
            raise fail(errno.EEXIST)
        if not self.available:
            raise fail(errno.ENOSPC)
        if not any(start <= iova and iova + size - 1 <= end for start, end in self.ranges):
            raise fail(errno.EINVAL)
        self._pin(process, vaddr, size, access)
        self.mappings.add(Mapping(process, iova, size, vaddr, access))
        self.available -= 1
        return 0

    def _pin(self, process: Process, vaddr: int, size: int, access: int) -> None:
        """Pin and charge page after page: the first that cannot be pinned is EFAULT, past the limit is ENOMEM."""
        page, memory = self.machine.page_size, process.memory
        pinned = memory.pinnable(vaddr, size, write=bool(access & _WRITE)) // page
        process.charge(pinned)
        if pinned < size // page:
            process.uncharge(pinned)
            raise fail(errno.EFAULT)

    @staticmethod
    def _new_vaddr(process: Process, there: list[Mapping], iova: int, vaddr: int, size: int) -> None:
        """The memory of a mapping is at another address now, of another process perhaps."""
        if not there:
            raise fail(errno.ENOENT)
        mapping = there[0]
        if not mapping.invalid or (mapping.iova, mapping.size) != (iova, size):
            raise fail(errno.EINVAL)
        if mapping.process is not process:
            pages = size // process.machine.page_size
            process.charge(pages)
            mapping.process.uncharge(pages)
            mapping.process = process
        mapping.vaddr, mapping.invalid = vaddr, False

    def _remove(self, mapping: Mapping) -> None:
        self.mappings.remove(mapping)
        mapping.process.uncharge(mapping.size // self.machine.page_size)
        self.available += 1

    def _unmap(self, process: Process, argument: Argument) -> int:
        param = argument.read(uapi.vfio_iommu_type1_dma_unmap, _UNMAP_SIZE)
        iova, size, flags = param.iova, param.size, param.flags
        if flags & ~(_GET_BITMAP | _ALL | _UNMAP_VADDR):
            raise fail(errno.EINVAL)
        bitmap = None
        if flags & _GET_BITMAP:
            if flags & (_ALL | _UNMAP_VADDR) or param.argsz < _UNMAP_SIZE + _BITMAP_SIZE:
                raise fail(errno.EINVAL)
            bitmap = dirty.Request.read(argument, _UNMAP_SIZE)
            bitmap.check(size)
        if iova % self.page:
            raise fail(errno.EINVAL)
        if flags & _ALL:
            if iova or size:
                raise fail(errno.EINVAL)
            size = _U64
        elif not size or size % self.page:
            raise fail(errno.EINVAL)
        elif iova + size - 1 > _U64:
            raise self._wraps
        if bitmap and (not self.tracking or bitmap.page != self.page):
            raise fail(errno.EINVAL)
        if self.v2 and not flags & _ALL and self.mappings.cut_by(iova, size):
            raise fail(errno.EINVAL)
        inside = self.mappings.touching(iova, size)
        if not self.v2 and inside and inside[0].iova < iova:
            inside = []
        if flags & _UNMAP_VADDR:
            param.size = self._invalidate(inside)
        else:
            param.size = 0
            for mapping in inside:
                if bitmap:
                    bitmap.report(process, mapping, iova)
                param.size += mapping.size
                self._remove(mapping)
        argument.copy_out(bytes(uapi.buffer(param)[:_UNMAP_SIZE]))
        return 0

    @staticmethod
    def _invalidate(inside: list[Mapping]) -> int:
        """The addresses of these mappings are about to change; how many bytes they have.  One that is invalid already
        makes all those before it valid again."""
        for place, mapping in enumerate(inside):
            if mapping.invalid:
                for before in inside[:place]:
                    before.invalid = False
                raise fail(errno.EINVAL)
            mapping.invalid = True
        return sum(mapping.size for mapping in inside)

    def _dirty_pages(self, process: Process, argument: Argument) -> int:
        if not self.v2:
            raise fail(errno.EACCES)
        param = argument.read(uapi.vfio_iommu_type1_dirty_bitmap, _DIRTY_SIZE)
        if param.flags == _START:
            self.tracking = True
        elif param.flags == _STOP:
            self.tracking = False
            for mapping in self.mappings:
                mapping.dirty = 0
        elif param.flags == _GET:
            if param.argsz < _DIRTY_SIZE + _GET_SIZE:
                raise fail(errno.EINVAL)
            self._get_bitmap(process, argument)
        else:
            raise fail(errno.EINVAL)
        return 0

    def _get_bitmap(self, process: Process, argument: Argument) -> None:
        data = argument.copy_in(_GET_SIZE, _DIRTY_SIZE)
        asked = uapi.from_buffer(uapi.vfio_iommu_type1_dirty_bitmap_get, data)
        iova, size = asked.iova, asked.size
        bitmap = dirty.Request.read(argument, _DIRTY_SIZE + _GET_SIZE - _BITMAP_SIZE)
        if iova + size > _U64:
            raise self._wraps
        bitmap.check(size)
        if bitmap.page != self.page or iova % self.page or not size or size % self.page:
            raise fail(errno.EINVAL)
        if not self.tracking or self.mappings.cut_by(iova, size):
            raise fail(errno.EINVAL)
        for mapping in self.mappings.touching(iova, size):
            bitmap.report(process, mapping, iova)
            mapping.dirty &= ~((1 << mapping.size // self.page) - 1)

    # --- looking in ---

    def describe(self) -> dict[str, Any]:
        """What is mapped, as plain data."""
        return {
            "iommu": f"Type1{'v2' if self.v2 else ''}",
            "tracking": self.tracking,
            "available": self.available,
            "mappings": [mapping.describe() for mapping in self.mappings],
        }

    def held(self) -> list[str]:
        """What is mapped, in words."""
        return [f"IOVA {mapping.iova:#x}, {mapping.size} bytes mapped" for mapping in self.mappings]
