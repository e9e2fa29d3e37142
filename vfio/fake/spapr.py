"""The sPAPR TCE IOMMU driver, versions 1 and 2.  (drivers/vfio/vfio_iommu_spapr_tce.c)

Version 1 charges the whole default window when it is enabled and pins pages as they are mapped.  Version 2 maps
memory that was registered before, and can create and remove windows.
"""

from __future__ import annotations

import errno
import functools
from contextlib import suppress
from typing import TYPE_CHECKING, cast

from vfio import uapi
from vfio.fake import eeh
from vfio.fake.kernel_error import KernelWouldBeHurt, fail
from vfio.fake.registration import Region, Registrations
from vfio.fake.table_group import SLOTS, TableGroup, shifted_one
from vfio.fake.tce import TCE_READ, TCE_WRITE, TceTable

if TYPE_CHECKING:
    from collections.abc import Callable

    from vfio.fake.core import VfioCore
    from vfio.fake.iommu_group import IommuGroup
    from vfio.fake.machine import Machine
    from vfio.fake.process import Process
    from vfio.fake.user import Argument

_U64 = (1 << 64) - 1
_SHIFT_4K = 12
_INFO_MINSZ = uapi.offsetof(uapi.vfio_iommu_spapr_tce_info, "dma32_window_size") + 4
_INFO_DDWSZ = uapi.sizeof(uapi.vfio_iommu_spapr_tce_info)
_READ, _WRITE = uapi.VFIO_DMA_MAP_FLAG_READ, uapi.VFIO_DMA_MAP_FLAG_WRITE
_TCE_BITS = {_READ: TCE_READ, _WRITE: TCE_WRITE, _READ | _WRITE: TCE_READ | TCE_WRITE}


class SpaprTce:
    """One instance: what a container has between SET_IOMMU and the detaching of its last group."""

    name = "iommu-vfio-powerpc"

    def __init__(self, core: VfioCore, version: int) -> None:
        self.core = core
        self.machine = core.machine
        self.version = version
        """1 or 2."""
        self.owner: Process | None = None
        """The process whose address space is mapped and charged; no other may call."""
        self.enabled = False
        self.default_window_pending = False
        self.tables: list[TceTable | None] = [None] * SLOTS
        self.groups: list[IommuGroup] = []
        """Newest first."""
        self.regions: list[Region] = []
        """Registered through this container."""
        self.enabled_pages = 0
        """Host pages that ENABLE charged."""
        self._registrations: Registrations
        """Of the owner."""
        requests: dict[int, Callable[[Process, Argument], int]] = {
            uapi.VFIO_IOMMU_SPAPR_TCE_GET_INFO: self._get_info,
            uapi.VFIO_IOMMU_MAP_DMA: self._map,
            uapi.VFIO_IOMMU_UNMAP_DMA: self._unmap,
            uapi.VFIO_EEH_PE_OP: self._eeh_pe_op,
        }
        if version == 1:
            requests[uapi.VFIO_IOMMU_ENABLE] = self._enable
            requests[uapi.VFIO_IOMMU_DISABLE] = self._disable
        else:
            requests[uapi.VFIO_IOMMU_SPAPR_REGISTER_MEMORY] = self._register
            requests[uapi.VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY] = self._unregister
            requests[uapi.VFIO_IOMMU_SPAPR_TCE_CREATE] = self._create
            requests[uapi.VFIO_IOMMU_SPAPR_TCE_REMOVE] = self._remove
        self._requests = {request - uapi.VFIO_GET_API_VERSION: handler for request, handler in requests.items()}

    @staticmethod
    def check_extension(machine: Machine, extension: int) -> int:
        """VFIO_CHECK_EXTENSION: 1 for what this driver has, else 0."""
        if extension == uapi.VFIO_EEH:
            return int(machine.topology.platform.eeh)
        return int(extension in (uapi.VFIO_SPAPR_TCE_IOMMU, uapi.VFIO_SPAPR_TCE_v2_IOMMU))

    @classmethod
    def open(cls, core: VfioCore, kind: int) -> SpaprTce:
        """An instance of the type that SET_IOMMU names; EINVAL for an extension that is no type."""
        if kind not in (uapi.VFIO_SPAPR_TCE_IOMMU, uapi.VFIO_SPAPR_TCE_v2_IOMMU):
            raise fail(errno.EINVAL)
        return cls(core, 1 if kind == uapi.VFIO_SPAPR_TCE_IOMMU else 2)

    def release(self) -> None:
        """The container has no group any more: windows, registrations and what was charged are given back."""
        for group in list(self.groups):
            self.detach_group(group)
        for slot, table in enumerate(self.tables):
            if table is not None:
                self._free_table(table)
                self.tables[slot] = None
        for region in self.regions:
            with suppress(OSError):  # mapped through another container: it leaks, and the kernel warns
                self._registrations.put(region)
        self.regions.clear()
        self._close_account()

    # --- groups ---

    def attach_group(self, group: IommuGroup) -> None:
        """Let a group use the windows; raises what the kernel answers, with nothing changed."""
        table_group = group.table_group
        if table_group is None:
            raise fail(errno.ENODEV)
        if self.version == 2 and not table_group.max_dynamic_windows:
            raise fail(errno.EINVAL)
        if self.version == 1 and self.groups:
            raise fail(errno.EBUSY)
        if group in self.groups:
            raise fail(errno.EBUSY)
        if any(type(other.table_group) is not type(table_group) for other in self.groups):
            raise fail(errno.EPERM)
        try:
            for slot, table in enumerate(self.tables):
                if table is not None:
                    table_group.set_window(slot, table)
        except OSError:
            for slot in range(SLOTS):
                table_group.unset_window(slot)
            raise
        finally:
            if not self.groups and self.tables[0] is None:
                self.default_window_pending = True
        self.groups.insert(0, group)

    def detach_group(self, group: IommuGroup) -> None:
        """Take the windows from a group.  Every entry of every window is cleared, for all groups."""
        self.groups.remove(group)
        for slot, table in enumerate(self.tables):
            if table is not None:
                table.clear_all()
                cast(TableGroup, group.table_group).unset_window(slot)

    # --- requests ---

    def ioctl(self, process: Process, n: int | None, argument: Argument) -> int:
        """The request VFIO_BASE + `n`, which the core does not know itself."""
        if self.owner is not None and self.owner is not process:
            raise fail(errno.EPERM)
        handler = self._requests.get(-1 if n is None else n)
        if handler is None:
            raise fail(errno.ENOTTY)
        return handler(process, argument)

    def _get_info(self, process: Process, argument: Argument) -> int:
        table_group = self._first_group(errno.ENXIO)
        info = argument.read(uapi.vfio_iommu_spapr_tce_info, _INFO_MINSZ)
        info.flags = 0
        info.dma32_window_start = table_group.tce32_start
        info.dma32_window_size = table_group.tce32_size
        if self.version == 2 and table_group.max_dynamic_windows:
            info.flags = uapi.VFIO_IOMMU_SPAPR_INFO_DDW
            info.ddw.pgsizes = table_group.page_sizes
            info.ddw.max_dynamic_windows_supported = table_group.max_dynamic_windows
            info.ddw.levels = table_group.max_levels
        size = _INFO_DDWSZ if info.argsz >= _INFO_DDWSZ else _INFO_MINSZ
        argument.copy_out(bytes(uapi.buffer(info)[:size]))
        return 0

    def _enable(self, process: Process, argument: Argument) -> int:
        if self.enabled:
            raise fail(errno.EBUSY)
        table_group = self._first_group(errno.ENODEV)
        if not table_group.tce32_size:
            raise fail(errno.EPERM)
        self._own(process)
        pages = table_group.tce32_size // self.machine.page_size
        process.charge(pages)
        self.enabled_pages = pages
        self.enabled = True
        return 0

    def _disable(self, process: Process, argument: Argument) -> int:
        self._close_account()
        return 0

    def _close_account(self) -> None:
        """Give back what ENABLE charged.  Mappings stay."""
        if self.enabled:
            self.enabled = False
            cast("Process", self.owner).uncharge(self.enabled_pages)
            self.enabled_pages = 0

    # --- registration (v2) ---

    def _register(self, process: Process, argument: Argument) -> int:
        self._own(process)
        param = argument.read(uapi.vfio_iommu_spapr_register_memory)
        if param.flags:
            raise fail(errno.EINVAL)
        vaddr, size = param.vaddr, param.size
        if (vaddr | size) % self.machine.page_size or (vaddr + size) & _U64 < vaddr:
            raise fail(errno.EINVAL)
        region = self._registrations.find(vaddr, size)
        if region is None:
            new = self._registrations.new(vaddr, size)
            if isinstance(new, int):
                return new
            region = new
        elif region in self.regions:
            raise fail(errno.EBUSY)
        else:
            region.holders += 1
        self.regions.append(region)
        self.enabled = True
        return 0

    def _unregister(self, process: Process, argument: Argument) -> int:
        if self.owner is None:
            raise fail(errno.EPERM)
        param = argument.read(uapi.vfio_iommu_spapr_register_memory)
        if param.flags:
            raise fail(errno.EINVAL)
        if (param.vaddr | param.size) % self.machine.page_size:
            raise fail(errno.EINVAL)
        region = self._registrations.find(param.vaddr, param.size)
        if region is None or region not in self.regions:
            raise fail(errno.ENOENT)
        self.regions.remove(region)
        # EBUSY while it is mapped: the kernel forgets whose it was, and does not say so; it is never unpinned.
        with suppress(OSError):
            self._registrations.put(region)
        return 0

    # --- MAP and UNMAP ---

    def _map(self, process: Process, argument: Argument) -> int:
        if not self.enabled:
            raise fail(errno.EPERM)
        param = argument.read(uapi.vfio_iommu_type1_dma_map)
        flags = param.flags
        if flags & ~(_READ | _WRITE):
            raise fail(errno.EINVAL)
        if self.default_window_pending:
            self._create_default_window()
        iova, vaddr, size = param.iova, param.vaddr, param.size
        table = self._find_table(iova)
        if table is None:
            raise fail(errno.ENXIO)
        mask = table.page_size - 1
        if (size | vaddr) & mask:
            raise fail(errno.EINVAL)
        if not flags:
            raise fail(errno.EINVAL)
        if iova & mask:
            return 1
        first, pages = iova >> table.page_shift, size >> table.page_shift
        good, number = self._usable(vaddr, table.page_size, pages)
        inside = min(good, table.end - first)
        if self.machine.strict:
            self._check_harmless("MAP", table, first, good, pages, bool(number))
        if number:
            # The entries before the bad page were written, and are cleared: what they replaced is lost.
            table.clear(first, inside)
            raise fail(number)
        if inside:
            bits = _TCE_BITS[flags]
            if bits == TCE_WRITE and self._first_group(errno.ENODEV).write_includes_read:
                bits |= TCE_READ
            table.write(first, inside, vaddr | bits)
            if self.version == 2:
                self._registrations.mapped(vaddr, inside << table.page_shift, inside)
        return 0

    def _unmap(self, process: Process, argument: Argument) -> int:
        if not self.enabled:
            raise fail(errno.EPERM)
        param = argument.read(uapi.vfio_iommu_type1_dma_unmap, 24)
        if param.flags:
            raise fail(errno.EINVAL)
        if self.default_window_pending:
            self._create_default_window()
        iova, size = param.iova, param.size
        table = self._find_table(iova)
        if table is None:
            raise fail(errno.ENXIO)
        mask = table.page_size - 1
        if size & mask:
            raise fail(errno.EINVAL)
        if iova & mask:
            return 1
        first, pages = iova >> table.page_shift, size >> table.page_shift
        if first + pages > table.end and self.machine.kernel >= (7, 0):
            return 1
        if self.machine.strict:
            self._check_harmless("UNMAP", table, first, pages, pages, False)
        table.clear(first, min(pages, table.end - first))
        return 0

    def _usable(self, vaddr: int, page_size: int, pages: int) -> tuple[int, int]:
        """How many of the pages from `vaddr` on can be mapped, and the errno for the next one, or 0."""
        if self.version == 2:
            return self._registrations.usable(vaddr, page_size, pages)
        if not pages:
            return 0, 0
        # v1 pins what it maps, for writing whatever the flags say.
        into_page = vaddr % self.machine.page_size
        host_page = self.machine.page_size
        length = -(-(into_page + pages * page_size) // host_page) * host_page
        pinned = cast("Process", self.owner).memory.pinnable(vaddr - into_page, length)
        good = min(max(pinned - into_page, 0) // page_size, pages)
        return good, errno.EFAULT if good < pages else 0

    def _check_harmless(self, call: str, table: TceTable, first: int, good: int, pages: int, fails: bool) -> None:
        """Raise for a call that would corrupt or hang a real kernel of this kind, before it does anything."""
        inside = table.end - first
        # The table of several levels is walked for the first page outside as well, before that page is looked at.
        if good > inside or (fails and good == inside and table.levels > 1):
            raise KernelWouldBeHurt(
                f"{call} of {pages} pages at IOVA {first << table.page_shift:#x} runs past the end of the window "
                f"{table.start:#x}..{table.end << table.page_shift:#x}: this kernel does not notice, and would "
                "overwrite what lies behind the TCE table; keep the whole range inside the window"
            )
        if first == 0 and good == 0 and self._is_phb3:
            why = "whose first page cannot be mapped" if fails else "of size 0"
            raise KernelWouldBeHurt(
                f"{call} {why} at IOVA 0: a POWER8 host (PHB3) would loop in its TCE invalidation for ever; "
                "use another IOVA, or check the memory first"
            )

    @property
    def _is_phb3(self) -> bool:
        platform = self.machine.topology.platform
        return platform.name == "PowerNV" and platform.cpu == "POWER8"

    # --- windows ---

    def _create(self, process: Process, argument: Argument) -> int:
        self._own(process)
        self._first_group(errno.ENXIO)
        create = argument.read(uapi.vfio_iommu_spapr_tce_create)
        if create.flags:
            raise fail(errno.EINVAL)
        if self.default_window_pending:
            self._create_default_window()
        create.start_addr = self._create_window(create.page_shift, create.window_size, create.levels)
        argument.copy_out(bytes(uapi.buffer(create)))
        return 0

    def _remove(self, process: Process, argument: Argument) -> int:
        self._own(process)
        self._first_group(errno.ENXIO)
        remove = argument.read(uapi.vfio_iommu_spapr_tce_remove)
        if remove.flags:
            raise fail(errno.EINVAL)
        if self.default_window_pending and not remove.start_addr:
            self.default_window_pending = False
            return 0
        # Any address in the window will do.
        table = self._find_table(remove.start_addr)
        if table is None:
            raise fail(errno.EINVAL)
        slot = self.tables.index(table)
        table.clear_all()
        for group in self.groups:
            cast(TableGroup, group.table_group).unset_window(slot)
        self._free_table(table)
        self.tables[slot] = None
        return 0

    def _create_default_window(self) -> None:
        table_group = self._first_group(errno.ENODEV)
        self._create_window(_SHIFT_4K, table_group.tce32_size, 1)
        self.default_window_pending = False

    def _create_window(self, page_shift: int, window_size: int, levels: int) -> int:
        """Make a window in the first free slot of all groups; returns its bus address."""
        if None not in self.tables:
            raise fail(errno.ENOSPC)
        slot = self.tables.index(None)
        table_group = self._first_group(errno.EFAULT)
        if not table_group.page_sizes & shifted_one(page_shift):
            raise fail(errno.EINVAL)
        table = self._create_table(table_group, slot, page_shift, window_size, levels)
        try:
            for group in self.groups:
                cast(TableGroup, group.table_group).set_window(slot, table)
        except OSError:
            for group in self.groups:
                cast(TableGroup, group.table_group).unset_window(slot)
            self._free_table(table)
            raise
        self.tables[slot] = table
        return table.start

    def _create_table(
        self, table_group: TableGroup, slot: int, page_shift: int, window_size: int, levels: int
    ) -> TceTable:
        size = table_group.get_table_size(page_shift, window_size, levels)
        if not size:
            raise fail(errno.EINVAL)
        owner, pages = cast("Process", self.owner), size // self.machine.page_size
        if pages:
            owner.charge(pages)
        try:
            table = table_group.create_table(slot, page_shift, window_size, levels)
        except OSError:
            # The kernel does not take the charge back.
            self._registrations.leaked_pages += pages
            raise
        table.memory = owner.memory
        if self.version == 2:
            table.released = functools.partial(self._unuse, table.page_size)
        return table

    def _unuse(self, page_size: int, tce: int, pages: int) -> None:
        """Entries of pages of `page_size` bytes were cleared or replaced."""
        self._registrations.mapped(tce & ~(TCE_READ | TCE_WRITE), pages * page_size, -pages)

    def _free_table(self, table: TceTable) -> None:
        cast("Process", self.owner).uncharge(table.allocated_size // self.machine.page_size)

    def _find_table(self, address: int) -> TceTable | None:
        for table in self.tables:
            if table is not None and table.contains(address):
                return table
        return None

    # --- EEH ---

    def _eeh_pe_op(self, process: Process, argument: Argument) -> int:
        """Ask the groups, newest first, until one answers something else than 0."""
        for group in self.groups:
            result = eeh.pe_op(self.core.eeh_pe(group), argument)
            if result:
                return result
        return 0

    # --- how ---

    def _first_group(self, number: int) -> TableGroup:
        """The table group that was attached last, which speaks for all; raises `number` without one."""
        if not self.groups or self.groups[0].table_group is None:
            raise fail(number)
        return self.groups[0].table_group

    def _own(self, process: Process) -> None:
        """The caller's address space is what is mapped from now on."""
        if self.owner is None:
            self.owner = process
            self._registrations = self.core.registrations(process)
