"""Type1: the IOMMU of x86 and of most other machines. One IOVA space for all groups of a container.

    with vfio.open_device("0000:06:0d.0") as device:
        with device.iommu.map(vfio.DmaBuffer(1 << 20), iova=0) as dma:
            ...

Kernel document: "VFIO - Virtual Function I/O", section "VFIO Usage Example".  Source: drivers/vfio/vfio_iommu_type1.c.

What is mapped is unmapped as a whole.  Version 2 refuses a range that cuts a mapping; version 1, which old programs need,
unmaps all of a mapping whose first byte is in the range, and nothing of one whose first byte is not.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from vfio import errors, info, uapi
from vfio.dma import Dma, DmaBuffer, DmaMemory
from vfio.iommu.dirty import DirtyPages, bitmap_bytes
from vfio.iommu.model import Iommu
from vfio.iova import IovaAllocator

if TYPE_CHECKING:
    from vfio.container import Container

_READ, _WRITE = uapi.VFIO_DMA_MAP_FLAG_READ, uapi.VFIO_DMA_MAP_FLAG_WRITE
_LARGEST_BITMAP = 1 << 28


class Type1Info(NamedTuple):
    """VFIO_IOMMU_GET_INFO; sizes in bytes."""

    page_sizes: tuple[int, ...]
    """Of the IOMMU; addresses and lengths are multiples of the smallest."""
    ranges: tuple[tuple[int, int], ...]
    """First and last IOVA of the ranges that can be mapped, ascending."""
    available: int | None
    """How many more mappings there may be; None where the kernel (before 5.10) does not say."""
    dirty_page_sizes: tuple[int, ...]
    """What a bit of a bitmap of dirty pages can stand for; empty where dirty pages cannot be tracked."""
    largest_bitmap: int
    """Most bytes of such a bitmap."""


class Type1(Iommu):
    """Type1, version 1."""

    name: ClassVar[str] = "Type1"
    extension: ClassVar[int] = uapi.VFIO_TYPE1_IOMMU

    def __init__(self, container: Container) -> None:
        super().__init__(container)
        self._live: dict[int, Dma] = {}
        self._slots: dict[int, Type1Slot] = {}
        self._look()

    @classmethod
    def explain_refusal(cls, container: Container, error: OSError) -> tuple[str, str]:
        if error.errno == errno.ENODEV:
            return "the kernel has no such IOMMU model", "modprobe vfio_iommu_type1 (not on POWER)"
        if error.errno == errno.EPERM:
            return (
                "the host cannot keep devices from sending each other's interrupts",
                "intremap=on for the IOMMU; or, if the user is trusted: vfio_iommu_type1 allow_unsafe_interrupts=1",
            )
        return "", ""

    def explain_attach(self, error: OSError) -> tuple[str, str]:
        own = "use a container of its own"
        why = {
            errno.EBUSY: ("the memory of a mapping is about to move", "tell its new_address first"),
            errno.EINVAL: ("what is mapped is at addresses that are reserved for the group's devices", own),
            errno.EPERM: self.explain_refusal(self.container, error),
        }
        return why.get(error.errno or 0, ("", ""))

    # --- what there is ---

    def _look(self) -> None:
        """See what can be mapped now: every group that comes or goes may change that."""
        found = self.info
        self._page_sizes, self._ranges = found.page_sizes, found.ranges
        self.page_size = found.page_sizes[0]
        """The smallest page of the IOMMU, bytes."""
        self._free = IovaAllocator.of_ranges((start, end + 1) for start, end in found.ranges)
        for dma in self._live.values():
            self._free.reserve(dma.iova, dma.length)

    @property
    def iommu(self) -> Type1:
        """Itself: what its mappings belong to."""
        return self

    @property
    def info(self) -> Type1Info:
        """What the kernel says now."""
        what = f"{self.name} does not answer GET_INFO"
        found = info.get(self.backend, self.container.fd, uapi.VFIO_IOMMU_GET_INFO, uapi.vfio_iommu_type1_info, what)
        sizes = found.iova_pgsizes if found.flags & uapi.VFIO_IOMMU_INFO_PGSIZES else self.backend.page_size
        ranges: tuple[tuple[int, int], ...] = ((0, (1 << 64) - 1),)
        available, dirty, largest = None, 0, 0
        first = found.cap_offset if found.flags & uapi.VFIO_IOMMU_INFO_CAPS else 0
        for capability in info.chain(found, first, what):
            data = bytes(capability.data)
            if capability.id == uapi.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE:
                ranges = _ranges(data)
            elif capability.id == uapi.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL:
                available = uapi.from_buffer(uapi.vfio_iommu_type1_info_dma_avail, data).avail
            elif capability.id == uapi.VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION:
                migration = uapi.from_buffer(uapi.vfio_iommu_type1_info_cap_migration, data)
                dirty, largest = migration.pgsize_bitmap, migration.max_dirty_bitmap_size
        return Type1Info(_powers(sizes), ranges, available, _powers(dirty), largest)

    @property
    def mapped(self) -> list[Dma]:
        """What is mapped, in the order in which it was."""
        return list(self._live.values())

    # --- mapping ---

    def map(self, memory: DmaMemory, iova: int | None = None, *, read: bool = True, write: bool = True) -> Dma:
        """Let devices reach `memory`, at `iova` or at the lowest free range but 0; closing the result unmaps.

        The memory is pinned and charged to locked memory.  Raises `errors.Misaligned`, `errors.AlreadyMapped`,
        `errors.NoSpace`, `errors.LockedMemoryLimit`, or `errors.CallFailed`: EINVAL for an IOVA outside the ranges of
        `info`, EFAULT for memory that is not there or (with `write`) read-only, ENOSPC past the kernel's limit of
        mappings.  On failure nothing of it stays mapped.
        """
        if not (read or write):
            raise ValueError("a mapping that the device may neither read nor write is no mapping")
        address, length = memory.address, memory.length
        if length <= 0 or (address | length | (iova or 0)) % self.page_size:
            values = f"address {address:#x}, length {length:#x}" + ("" if iova is None else f", IOVA {iova:#x}")
            raise errors.Misaligned("cannot map", values, self.page_size, "the IOMMU's pages")
        with self.lock:
            start = self._reserve(memory, iova)
            slot = Type1Slot(self, start, address, length, (_READ if read else 0) | (_WRITE if write else 0))
            try:
                slot.map_again()
            except BaseException:
                self._free.free(start, length)
                raise
            self._slots[start] = slot
            self._live[start] = memory.dma = dma = Dma(self, slot, memory, None)
            return dma

    def unmap(self, dma: Dma, slot: object = None) -> None:
        """Unmap what `map` returned; the same as closing it."""
        with self.lock:
            if self._live.get(dma.iova) is dma:
                self._unmap(dma.iova, dma.length)
                self._forget(dma)

    def unmap_range(self, iova: int, length: int) -> int:
        """Unmap all that is mapped in a range; how many bytes that were.

        Raises `errors.CallFailed` with EINVAL where the range cuts a mapping (version 2), `errors.Misaligned`.
        Version 1 unmaps all of a mapping whose first byte is in the range, unless the range begins inside another.
        """
        self._check_range(iova, length, f"cannot unmap IOVA {errors.span(iova, length)}")
        with self.lock:
            done = self._unmap(iova, length)
            if done:
                for dma in self.mapped:
                    if iova <= dma.iova < iova + length:
                        self._forget(dma)
            return done

    def unmap_all(self) -> int:
        """Unmap everything in one call; how many bytes that were."""
        with self.lock:
            done = self._unmap(0, 0, uapi.VFIO_DMA_UNMAP_FLAG_ALL)
            for dma in self.mapped:
                self._forget(dma)
            return done

    # --- memory that moves (live update of a virtual machine monitor) ---

    def suspend_addresses(self, dma: Dma | None = None) -> int:
        """The memory of `dma`, or of all mappings, is about to get another address: devices go on reaching it.

        How many bytes are concerned.  Until `new_address` has told the new one, no group can be attached.  Raises
        `errors.CallFailed` with EINVAL for a mapping that is suspended already.
        """
        flags = uapi.VFIO_DMA_UNMAP_FLAG_VADDR
        with self.lock:
            if dma is None:
                return self._unmap(0, 0, flags | uapi.VFIO_DMA_UNMAP_FLAG_ALL)
            self._check_own(dma)
            return self._unmap(dma.iova, dma.length, flags)

    def new_address(self, dma: Dma, memory: DmaMemory) -> None:
        """The memory of `dma`, which was suspended, is at the address of `memory` now: the same pages, as in another
        mapping of the same file.

        It is charged to the process that says so.  Raises `errors.CallFailed` with EINVAL for a mapping that is not
        suspended, `errors.Closed` for one that is gone, `errors.LockedMemoryLimit`.
        """
        if memory.length != dma.length:
            raise ValueError(f"{memory.length} bytes cannot take the place of {dma.length}")
        with self.lock:
            self._check_own(dma)
            slot = Type1Slot(self, dma.iova, memory.address, dma.length, uapi.VFIO_DMA_MAP_FLAG_VADDR)
            slot.map_again()
            self._slots[dma.iova].moved(memory.address)
            dma.memory.dma, dma.memory, memory.dma = None, memory, dma

    # --- dirty pages ---

    @contextmanager
    def tracking(self) -> Iterator[None]:
        """Track dirty pages while the block runs.  Raises `errors.CallFailed` with EACCES (version 1)."""
        self.start_tracking()
        try:
            yield
        finally:
            self.stop_tracking()

    def start_tracking(self) -> None:
        """Begin to track which pages devices write; harmless while that is so."""
        self._dirty(uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_START, "cannot track dirty pages")

    def stop_tracking(self) -> None:
        """Track no more."""
        self._dirty(uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP, "cannot stop tracking dirty pages")

    def dirty_pages(self, iova: int, length: int) -> DirtyPages:
        """The pages of this range that may have been written since this was last asked.

        Where the hardware cannot tell, they are all the pages that are mapped.  Raises `errors.CallFailed` with EINVAL
        while nothing is tracked, or where the range cuts a mapping.
        """
        what = f"cannot get the dirty pages of IOVA {errors.span(iova, length)}"
        self._check_range(iova, length, what)
        with self._bitmap(length, what) as bitmap:
            asked = struct.pack(
                "=2Q3Q", iova, length, self.page_size, bitmap_bytes(length, self.page_size), bitmap.address
            )
            argument = uapi.vfio_iommu_type1_dirty_bitmap.sized(
                uapi.sizeof(uapi.vfio_iommu_type1_dirty_bitmap) + len(asked),
                flags=uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP,
                data=asked,
            )
            self._call(uapi.VFIO_IOMMU_DIRTY_PAGES, argument, what, "nothing is tracked, or the range cuts a mapping")
            return self._dirty_pages(iova, length, bitmap)

    def unmap_dirty(self, dma: Dma) -> DirtyPages:
        """Unmap, and tell which of its pages may have been written since that was last asked.

        Raises `errors.CallFailed` with EINVAL while nothing is tracked, `errors.Closed` for a mapping that is gone.
        """
        what = f"cannot unmap IOVA {errors.span(dma.iova, dma.length)}"
        with self.lock:
            self._check_own(dma)
            iova, length = dma.iova, dma.length
            with self._bitmap(length, what) as bitmap:
                asked = struct.pack("=3Q", self.page_size, bitmap_bytes(length, self.page_size), bitmap.address)
                argument = uapi.vfio_iommu_type1_dma_unmap.sized(
                    uapi.sizeof(uapi.vfio_iommu_type1_dma_unmap) + len(asked),
                    flags=uapi.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP,
                    iova=iova,
                    size=length,
                    data=asked,
                )
                self._call(uapi.VFIO_IOMMU_UNMAP_DMA, argument, what, "nothing is tracked")
                self._forget(dma)
                return self._dirty_pages(iova, length, bitmap)

    # --- for the container ---

    def check_detach(self) -> None:
        """What is mapped stays for the groups that stay."""

    def joined(self) -> None:
        self._look()

    def remap(self) -> None:
        """Nothing was emptied, but more may be free."""
        self._look()

    def gone(self) -> None:
        for dma in self.mapped:
            self._forget(dma)

    def close(self) -> None:
        with self.lock:
            for dma in reversed(self.mapped):
                dma.close()

    # --- how ---

    def _check_own(self, dma: Dma) -> None:
        if self._live.get(dma.iova) is not dma:
            raise errors.Closed("mapping")

    def _check_range(self, iova: int, length: int, what: str) -> None:
        if iova < 0 or length <= 0 or iova + length > 1 << 64:
            raise errors.CallFailed(errno.EINVAL, what, "a range has at least one page, and is below 2**64")
        if (iova | length) % self.page_size:
            values = f"IOVA {iova:#x}, length {length:#x}"
            raise errors.Misaligned(what, values, self.page_size, "the IOMMU's pages")

    def _reserve(self, memory: DmaMemory, iova: int | None) -> int:
        length = memory.length
        what = f"cannot map {errors.size(length)}"
        if iova is None:
            # At a multiple of the memory's own page the IOMMU can have large pages too.
            own = memory.page_size if isinstance(memory, DmaBuffer) else self.page_size
            fitting = [page for page in self._page_sizes if page <= min(own, length)]
            for alignment in dict.fromkeys((*fitting[-1:], self.page_size)):
                if (found := self._free.allocate(length, alignment)) is not None:
                    return found
            raise errors.NoSpace(what, length, self._free.largest, "unmap something")
        if not any(start <= iova and iova + length - 1 <= end for start, end in self._ranges):
            shown = ", ".join(f"{start:#x}..{end:#x}" for start, end in self._ranges)
            raise errors.CallFailed(
                errno.EINVAL,
                what,
                f"IOVA {errors.span(iova, length)} is in none of the ranges {shown}",
                "leave iova out",
            )
        if not self._free.reserve(iova, length):
            raise errors.AlreadyMapped(what, iova, length)
        return iova

    def _forget(self, dma: Dma) -> None:
        del self._live[dma.iova], self._slots[dma.iova]
        self._free.free(dma.iova, dma.length)
        dma.gone()

    def _unmap(self, iova: int, length: int, flags: int = 0) -> int:
        argument = uapi.vfio_iommu_type1_dma_unmap(iova=iova, size=length, flags=flags)
        if flags & uapi.VFIO_DMA_UNMAP_FLAG_VADDR:
            what, rule = "cannot suspend", "it is suspended already"
        else:
            what, rule = "cannot unmap", "it cuts a mapping"
        what += " everything" if flags & uapi.VFIO_DMA_UNMAP_FLAG_ALL else f" IOVA {errors.span(iova, length)}"
        self._call(uapi.VFIO_IOMMU_UNMAP_DMA, argument, what, rule)
        return argument.size

    def _bitmap(self, length: int, what: str) -> DmaBuffer:
        """Memory for a bitmap, which the kernel fills by its address."""
        if bitmap_bytes(length, self.page_size) > _LARGEST_BITMAP:
            raise errors.CallFailed(errno.EINVAL, what, f"{errors.size(length)} are more than one bitmap can tell")
        return DmaBuffer(bitmap_bytes(length, self.page_size), backend=self.backend)

    def _dirty_pages(self, iova: int, length: int, bitmap: DmaBuffer) -> DirtyPages:
        return DirtyPages(iova, length, self.page_size, bitmap[: bitmap_bytes(length, self.page_size)])

    def _dirty(self, flag: int, what: str) -> None:
        argument = uapi.vfio_iommu_type1_dirty_bitmap(flags=flag)
        self._call(uapi.VFIO_IOMMU_DIRTY_PAGES, argument, what, "")

    def _call(self, request: int, argument: uapi.Struct, what: str, rule: str) -> None:
        try:
            self.backend.ioctl(self.container.fd, request, uapi.buffer(argument))
        except OSError as error:
            why = {errno.EINVAL: rule, errno.EACCES: "version 1 does not track dirty pages"}
            raise errors.CallFailed(error.errno or errno.EIO, what, why.get(error.errno or 0, "")) from error

    def map_error(self, error: OSError, address: int, iova: int, length: int, moves: bool) -> errors.VfioError:
        """What a failed MAP means; `moves`: of memory that has another address now."""
        what = f"cannot map {errors.size(length)} at {address:#x} to IOVA {iova:#x}"
        number = error.errno or errno.EIO
        if number == errno.EEXIST:
            return errors.AlreadyMapped(what, iova, length)
        if number == errno.ENOMEM:
            account = self.backend.locked()
            if not account.unlimited and account.limit is not None and account.locked + length > account.limit:
                return errors.LockedMemoryLimit(what, length, account.locked, account.limit)
            return errors.CallFailed(number, what, "the host has no memory for it")
        why = {
            errno.EFAULT: ("some of the memory is not there, or is read-only", "map read-only memory with write=False"),
            errno.ENOSPC: (
                "the container has as many mappings as it may",
                "modprobe vfio_iommu_type1 dma_entry_limit=N",
            ),
            errno.EINVAL: ("the kernel does not take this range", "iommu.info.ranges are those that it takes"),
        }
        if moves:
            why = {errno.EINVAL: ("the mapping is not suspended", "suspend_addresses(dma), before the memory moves")}
        return errors.CallFailed(number, what, *why.get(number, ("", "")))


class Type1v2(Type1):
    """Type1, version 2."""

    name: ClassVar[str] = "Type1v2"
    extension: ClassVar[int] = uapi.VFIO_TYPE1v2_IOMMU


class Type1Slot:
    """A range of IOVA and what is mapped there; for `Dma`."""

    __slots__ = ("_argument", "_call", "_iommu", "iova", "length")

    def __init__(self, iommu: Type1, iova: int, address: int, length: int, flags: int) -> None:
        self._iommu = iommu
        self.iova = iova
        self.length = length
        self._argument = uapi.vfio_iommu_type1_dma_map(flags=flags, vaddr=address, iova=iova, size=length)
        self._call: Callable[[], int] = iommu.backend.prepare(
            iommu.container.fd, uapi.VFIO_IOMMU_MAP_DMA, uapi.buffer(self._argument)
        )

    def map_again(self) -> None:
        try:
            self._call()
        except OSError as error:
            moves = bool(self._argument.flags & uapi.VFIO_DMA_MAP_FLAG_VADDR)
            raise self._iommu.map_error(error, self._argument.vaddr, self.iova, self.length, moves) from error

    def moved(self, address: int) -> None:
        self._argument.vaddr = address


def _ranges(data: bytes) -> tuple[tuple[int, int], ...]:
    head = uapi.from_buffer(uapi.vfio_iommu_type1_info_cap_iova_range, data)
    first = uapi.sizeof(uapi.vfio_iommu_type1_info_cap_iova_range)
    found = uapi.array_from_buffer(uapi.vfio_iova_range, data, first, head.nr_iovas)
    return tuple((each.start, each.end) for each in found)


def _powers(mask: int) -> tuple[int, ...]:
    return tuple(1 << shift for shift in range(64) if mask >> shift & 1)
