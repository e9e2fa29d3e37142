"""The IOMMU of Freescale's P4080, the PAMU, and a VFIO driver for it.  No kernel ever merged one: this is a model alone.

A domain has an aperture of bus addresses, cut into windows of one size, and each enabled window leads to one physically
contiguous piece of memory, which may be smaller than the window.  Sources: the request for comments "vfio API changes
needed for powerpc", and the patches that were posted in 2013 (vfio_iommu_fsl_pamu.c), on whose rules and errnos the
answers here are modelled.  They dropped the errors of attributes and MSI banks and returned 0: so does a machine whose
`PamuHardware.returns_zero` is set (``fake:p4080?pamu_errno=0``).
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from vfio import uapi
from vfio.fake.kernel_error import fail
from vfio.fake.table_group import TableGroup
from vfio.fake.tce import TCE_READ, TCE_WRITE, TceTable
from vfio.iommu import pamu_abi as abi

if TYPE_CHECKING:
    from vfio.fake.core import VfioCore
    from vfio.fake.iommu_group import IommuGroup
    from vfio.fake.machine import Machine
    from vfio.fake.memory import AddressSpace
    from vfio.fake.process import Process
    from vfio.fake.user import Argument
    from vfio.topology import Pamu

PAGE = 4096
"""The smallest mapping, and the size of an MSI bank."""
_SHIFT = 12
_U64 = (1 << 64) - 1
_READ, _WRITE = uapi.VFIO_DMA_MAP_FLAG_READ, uapi.VFIO_DMA_MAP_FLAG_WRITE
_MOST_WINDOWS = 256
_CACHES = (1, 2, 3)
_order = sys.byteorder


class MsiBank:
    """A page of the interrupt controller's to which devices write their messages."""

    def __init__(self, address: int) -> None:
        self.address = address
        """Physical."""
        self.written: list[tuple[int, bytes]] = []
        """What devices wrote by DMA: offset in the page, and the bytes."""

    def read(self, address: int, length: int) -> bytes:
        return bytes(length)

    def write(self, address: int, data: bytes) -> None:
        self.written.append((address - self.address, data))


class PamuHardware:
    """What a machine has of it."""

    def __init__(self, described: Pamu) -> None:
        self.last_address = (1 << described.aperture_bits) - 1
        self.windows = described.windows
        self.cpus = described.cpus
        self.banks = [MsiBank(address) for address in described.msi_banks]
        self.returns_zero = False
        """As the driver of 2013: GET_ATTR, SET_ATTR, MAP_MSI_BANK and UNMAP_MSI_BANK return 0 for what they refuse."""


class Window(NamedTuple):
    """An enabled window."""

    table: TceTable
    bank: MsiBank | None
    """None for memory."""


class Mapping(NamedTuple):
    """What a process mapped, in bytes."""

    iova: int
    vaddr: int
    size: int
    flags: int


class PamuGroup(TableGroup):
    """What translates the DMA of one device: the domain that its group is attached to."""

    domain: PamuDomain | None = None

    def get_table_size(self, page_shift: int, window_size: int, levels: int) -> int:
        raise NotImplementedError("a PAMU has no TCE tables")

    create_table = get_table_size  # type: ignore[assignment]

    def find(self, address: int) -> TceTable | None:
        return self.domain.find(address) if self.domain else None

    def carries(self, vector: int) -> bool:
        return self.host_owned or (self.domain is not None and self.domain.carries(vector))


class PamuDomain:
    """One instance: what a container has between SET_IOMMU and the detaching of its last group."""

    name = "iommu-vfio-fsl-pamu"
    described = "Freescale PAMU"

    def __init__(self, core: VfioCore, hardware: PamuHardware) -> None:
        self.core = core
        self.hardware = hardware
        self.groups: list[IommuGroup] = []
        self.first, self.last = 0, hardware.last_address
        """The aperture."""
        self.count = hardware.windows
        self.windows: dict[int, Window] = {}
        """The enabled ones, by number."""
        self.mappings: list[Mapping] = []
        self.stash: tuple[int, int] | None = None
        self.enabled = False
        """Whether the devices may do DMA: from the first MAP_DMA to the UNMAP_DMA of the last mapping."""
        self._geometry_set = self._windows_set = False
        self._banks: dict[int, int] = {}  # by IOVA: the window
        self._charged: list[tuple[Process, int]] = []
        checked: dict[int, Callable[[Process, Argument], int]] = {
            abi.VFIO_IOMMU_PAMU_GET_ATTR: self._get_attr,
            abi.VFIO_IOMMU_PAMU_SET_ATTR: self._set_attr,
            abi.VFIO_IOMMU_PAMU_MAP_MSI_BANK: self._map_bank,
            abi.VFIO_IOMMU_PAMU_UNMAP_MSI_BANK: self._unmap_bank,
        }
        others: dict[int, Callable[[Process, Argument], int]] = {
            uapi.VFIO_IOMMU_MAP_DMA: self._map,
            uapi.VFIO_IOMMU_UNMAP_DMA: self._unmap,
            abi.VFIO_IOMMU_PAMU_GET_MSI_BANK_COUNT: lambda process, argument: len(hardware.banks),
        }
        first = uapi.VFIO_GET_API_VERSION
        self._requests = {request - first: handler for request, handler in (checked | others).items()}
        self._swallows = {request - first for request in checked}

    @staticmethod
    def check_extension(machine: Machine, extension: int) -> int:
        """VFIO_CHECK_EXTENSION: 1 for what this driver has, else 0."""
        return int(extension == abi.VFIO_FSL_PAMU_IOMMU)

    @classmethod
    def open(cls, core: VfioCore, kind: int) -> PamuDomain:
        return cls(core, cast(PamuHardware, core.machine.pamu))

    def release(self) -> None:
        """The container has no group any more."""
        for group in list(self.groups):
            self.detach_group(group)
        self.windows.clear()
        self.mappings.clear()
        for process, pages in self._charged:
            process.uncharge(pages)
        self._charged.clear()

    # --- groups ---

    def attach_group(self, group: IommuGroup) -> None:
        """Several groups may share a domain; EINVAL for one that is in."""
        if group in self.groups:
            raise fail(errno.EINVAL)
        if not isinstance(group.table_group, PamuGroup):
            raise fail(errno.ENODEV)
        group.table_group.domain = self
        self.groups.insert(0, group)

    def detach_group(self, group: IommuGroup) -> None:
        """The others keep what is mapped."""
        self.groups.remove(group)
        cast(PamuGroup, group.table_group).domain = None

    # --- what the hardware does ---

    @property
    def window_size(self) -> int:
        return (self.last - self.first + 1) // self.count

    def find(self, address: int) -> TceTable | None:
        """What translates a bus address; None outside the aperture, the enabled windows, and what they map."""
        if not self.enabled or not self.first <= address <= self.last:
            return None
        window = self.windows.get((address - self.first) // self.window_size)
        return window.table if window and window.table.contains(address) else None

    def carries(self, vector: int) -> bool:
        """Whether message `vector` finds its bank.  The host deals vectors out to the banks in turn."""
        banks = self.hardware.banks
        bank = banks[vector % len(banks)] if banks else None
        return self.enabled and any(window.bank is bank for window in self.windows.values())

    # --- requests ---

    def ioctl(self, process: Process, n: int | None, argument: Argument) -> int:
        """The request VFIO_BASE + `n`, which the core does not know itself; ENOTTY for what is none of PAMU's."""
        handler = self._requests.get(-1 if n is None else n)
        if handler is None:
            raise fail(errno.ENOTTY)
        return handler(process, argument)

    def _read(self, argument: Argument, size: int) -> bytes:
        data = argument.copy_in(size)
        if int.from_bytes(data[:4], _order) < size:
            raise fail(errno.EINVAL)
        return data

    def _answer(self, number: int) -> int:
        """What comes of a rule that was broken, after the struct was read."""
        if self.hardware.returns_zero:
            return 0
        raise fail(number)

    def _get_attr(self, process: Process, argument: Argument) -> int:
        data = self._read(argument, abi.ATTR_SIZE)
        _argsz, flags, kind = abi.HEADER.unpack_from(data)
        if flags:
            return self._answer(errno.EINVAL)
        if kind == abi.ATTR_GEOMETRY:
            body = abi.GEOMETRY.pack(self.first, self.last)
        elif kind == abi.ATTR_WINDOWS:
            body = abi.WINDOWS.pack(self.count)
        elif kind == abi.ATTR_STASH:
            body = abi.STASH.pack(*(self.stash or (0, 0)))
        else:
            return self._answer(errno.EINVAL)
        argument.copy_out(body, abi.HEADER.size)
        return 0

    def _set_attr(self, process: Process, argument: Argument) -> int:
        data = self._read(argument, abi.ATTR_SIZE)
        _argsz, flags, kind = abi.HEADER.unpack_from(data)
        body = data[abi.HEADER.size :]
        setters: dict[int, tuple[Any, Callable[..., int]]] = {
            abi.ATTR_GEOMETRY: (abi.GEOMETRY, self._set_geometry),
            abi.ATTR_WINDOWS: (abi.WINDOWS, self._set_windows),
            abi.ATTR_STASH: (abi.STASH, self._set_stash),
        }
        if flags or kind not in setters:
            return self._answer(errno.EINVAL)
        layout, setter = setters[kind]
        number = setter(*layout.unpack_from(body))
        return self._answer(number) if number else 0

    def _set_geometry(self, first: int, last: int) -> int:
        size = last - first + 1
        if self.enabled:
            return errno.EBUSY
        if size < PAGE or size.bit_count() != 1 or first % size or last > self.hardware.last_address:
            return errno.EINVAL
        self.first, self.last = first, last
        self._geometry_set, self._windows_set = True, False
        self._drop_windows()
        return 0

    def _set_windows(self, count: int) -> int:
        if count > _MOST_WINDOWS:
            return errno.EINVAL
        if self.enabled:
            return errno.EBUSY
        too_small = count and (self.last - self.first + 1) // count < PAGE
        if not self._geometry_set or count > self.hardware.windows or count.bit_count() != 1 or too_small:
            return errno.EINVAL
        self.count, self._windows_set = count, True
        self._drop_windows()
        return 0

    def _set_stash(self, cpu: int, cache: int) -> int:
        if cpu >= self.hardware.cpus or cache not in _CACHES:
            return errno.EINVAL
        self.stash = cpu, cache
        return 0

    def _drop_windows(self) -> None:
        self.windows.clear()
        self._banks.clear()

    # --- memory ---

    def _map(self, process: Process, argument: Argument) -> int:
        param = argument.read(uapi.vfio_iommu_type1_dma_map)
        flags, iova, vaddr, size = param.flags, param.iova, param.vaddr, param.size
        if flags & ~(_READ | _WRITE) or not flags:
            raise fail(errno.EINVAL)
        if size < PAGE or (iova | vaddr | size) % PAGE or iova + size > _U64 or vaddr + size > _U64:
            raise fail(errno.EINVAL)
        if any(each.iova < iova + size and iova < each.iova + each.size for each in self.mappings):
            raise fail(errno.EBUSY)
        pages = size // self.core.machine.page_size
        process.charge(pages)
        done: list[int] = []
        try:
            self._check_place(iova, size)
            if process.memory.pinnable(vaddr, size) < size:
                raise fail(errno.EFAULT)
            for offset in range(0, size, self.window_size):
                done.append(self._enable(iova + offset, vaddr + offset, self.window_size, flags, process.memory))
        except OSError:
            for number in done:
                del self.windows[number]
            process.uncharge(pages)
            raise
        self._charged.append((process, pages))
        self.mappings.append(Mapping(iova, vaddr, size, flags))
        self.enabled = True
        return 0

    def _check_place(self, iova: int, size: int) -> None:
        """Whole windows of the aperture: ENODEV before there are windows, else EINVAL."""
        if not self._windows_set:
            raise fail(errno.ENODEV)
        if iova < self.first or iova + size - 1 > self.last or (iova | size) % self.window_size:
            raise fail(errno.EINVAL)

    def _enable(self, iova: int, address: int, size: int, flags: int, memory: AddressSpace | MsiBank) -> int:
        """Enable the window of `iova`, for `size` bytes that are in one piece at `address`."""
        number = (iova - self.first) // self.window_size
        if number in self.windows:
            raise fail(errno.EBUSY)
        bank = memory if isinstance(memory, MsiBank) else None
        if not isinstance(memory, MsiBank) and (address % size or memory.backing_page(address) < size):
            raise fail(errno.EFAULT)  # physically it is in pieces, or not aligned to its size
        start = self.first + number * self.window_size
        table = TceTable(start=start, page_shift=_SHIFT, entries=size >> _SHIFT)
        table.memory = cast("AddressSpace", memory)
        bits = (TCE_READ if flags & _READ else 0) | (TCE_WRITE if flags & _WRITE else 0)
        table.write(table.first, table.entries, address | bits)
        self.windows[number] = Window(table, bank)
        return number

    def _unmap(self, process: Process, argument: Argument) -> int:
        param = argument.read(uapi.vfio_iommu_type1_dma_unmap, 24)
        first, end = param.iova, param.iova + param.size
        if param.flags or end > _U64:
            raise fail(errno.EINVAL)
        touched = [each for each in self.mappings if each.iova < end and first < each.iova + each.size]
        if touched and (first - self.first | end - self.first) % self.window_size:
            raise fail(errno.EINVAL)  # a window is enabled whole, or not at all
        for each in touched:
            self.mappings.remove(each)
            last = each.iova + each.size
            for start, stop in ((each.iova, first), (end, last)):
                if start < stop:
                    self.mappings.append(Mapping(start, each.vaddr + start - each.iova, stop - start, each.flags))
            gone = range(max(first, each.iova), min(end, last), self.window_size)
            for iova in gone:
                del self.windows[(iova - self.first) // self.window_size]
            self._uncharge(len(gone) * self.window_size // self.core.machine.page_size)
        if not self.mappings:
            self.enabled = False
        return 0

    def _uncharge(self, pages: int) -> None:
        """Give back pages, of those that were charged last."""
        while pages:
            process, charged = self._charged.pop()
            here = min(pages, charged)
            process.uncharge(here)
            pages -= here
            if charged > here:
                self._charged.append((process, charged - here))

    # --- MSI banks ---

    def _map_bank(self, process: Process, argument: Argument) -> int:
        _argsz, flags, index, iova = abi.MSI_BANK_MAP.unpack(self._read(argument, abi.MSI_BANK_MAP.size))
        if flags & ~(_READ | _WRITE) or not flags:
            return self._answer(errno.EINVAL)
        if index >= len(self.hardware.banks):
            return self._answer(errno.ENODEV)
        try:
            self._check_place(iova - iova % self.window_size if self.first <= iova else iova, self.window_size)
            bank = self.hardware.banks[index]
            self._banks[iova] = self._enable(iova, bank.address, PAGE, flags, bank)
        except OSError as error:
            return self._answer(error.errno or errno.EIO)
        return 0

    def _unmap_bank(self, process: Process, argument: Argument) -> int:
        _argsz, flags, iova = abi.MSI_BANK_UNMAP.unpack(self._read(argument, abi.MSI_BANK_UNMAP.size))
        if flags or iova not in self._banks:
            return self._answer(errno.EINVAL)
        del self.windows[self._banks.pop(iova)]
        return 0

    # --- looking in ---

    @property
    def tables(self) -> list[TceTable]:
        """What its enabled windows map."""
        return [window.table for _number, window in sorted(self.windows.items())]

    def describe(self) -> dict[str, Any]:
        """All of it, as plain data."""
        return {
            "iommu": self.described,
            "enabled": self.enabled,
            "aperture": (self.first, self.last),
            "window_count": self.count,
            "stash": self.stash,
            "windows": [
                {
                    "number": number,
                    "iova": window.table.start,
                    "size": window.table.size,
                    "msi_bank": self.hardware.banks.index(window.bank) if window.bank else None,
                }
                for number, window in sorted(self.windows.items())
            ],
        }
