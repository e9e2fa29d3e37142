"""Table groups: how a platform makes TCE tables and gives them to the hardware of a PE.

- powernv from POWER8 on (`Ioda2TableGroup`, arch/powerpc/platforms/powernv/pci-ioda.c): tables of up to five levels in
  two windows, at 0 and at 1 << 59.
- pseries (`PseriesTableGroup`, arch/powerpc/platforms/pseries/iommu.c): the firmware makes windows, of one level.
- POWER7 (`Ioda1TableGroup`): the one window that the PE was given at boot, and no other.  From the kernel's documents
  alone: no such kernel was at hand.

The arithmetic is the kernel's own, with its 32-bit wrap-arounds and POWER's shifts, which look at seven bits of their
count: sizes that make no sense get the answers that they get there.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from vfio.fake.kernel_error import fail
from vfio.fake.tce import TceTable

if TYPE_CHECKING:
    from vfio.topology import Iommu, Window

SLOTS = 2
"""Windows that a PE can have (IOMMU_TABLE_GROUP_MAX_TABLES)."""

_MAX_LEVELS = 5
_TCE_SHIFT = 3  # a TCE has 8 bytes
_LARGEST_LEVEL = 24  # one level's table is contiguous, and 16 MiB is the most that the kernel allocates in one piece
_LARGEST_BLOCK = 1 << 37  # TCEs, as QEMU's firmware answers when it is asked for the largest block
_U32 = (1 << 32) - 1
_U64 = (1 << 64) - 1


def shifted_one(count: int) -> int:
    """``1UL << count`` as POWER computes it."""
    count &= 127
    return 1 << count if count < 64 else 0


class TableGroup(ABC):
    """The windows of one PE: `window` is its default one, `page_size` is the host's, in bytes."""

    write_includes_read = True
    """Whether a device may read what it may write: powernv sets both bits in the entry (pnv_tce_xchg)."""

    def __init__(self, iommu: Iommu, window: Window, page_size: int) -> None:
        self.tce32_start = window.start
        self.tce32_size = window.size
        self.page_sizes = iommu.page_sizes
        self.max_dynamic_windows = iommu.windows
        self.max_levels = iommu.levels
        self.second_start = iommu.second_window_start
        """Bus address of a window beside the default one."""
        self.page_shift = page_size.bit_length() - 1
        """Of the host."""
        self.tables: list[TceTable | None] = [None] * SLOTS
        """What the hardware uses: VFIO's tables; the host's own are not modelled."""
        self.host_owned = True
        """Whether the host's own window and, on powernv, its bypass window are there."""

    @abstractmethod
    def get_table_size(self, page_shift: int, window_size: int, levels: int) -> int:
        """Bytes that locked memory is charged with for such a table; 0 for a geometry that cannot be."""

    @abstractmethod
    def create_table(self, number: int, page_shift: int, window_size: int, levels: int) -> TceTable:
        """Make a table for the window in slot `number`, which is not charged here."""

    def set_window(self, number: int, table: TceTable) -> None:
        """Let the PE translate by `table`."""
        self.tables[number] = table

    def unset_window(self, number: int) -> None:
        """Take the window in slot `number` from the PE."""
        self.tables[number] = None

    def take_ownership(self) -> None:
        """The host removes its own windows: the PE can reach nothing from now on."""
        self.host_owned = False

    def release_ownership(self) -> None:
        """The host makes its own windows again."""
        self.host_owned = True

    def used_by_host(self) -> None:  # noqa: B027  most platforms do not mind
        """A driver of the host's began to do DMA."""

    def carries(self, vector: int) -> bool:
        """Whether a device's message `vector` reaches the interrupt controller: on POWER it passes beside the windows."""
        return True

    def find(self, address: int) -> TceTable | None:
        """The table that translates a bus address."""
        for table in self.tables:
            if table is not None and table.contains(address):
                return table
        return None


class Ioda2TableGroup(TableGroup):
    """Bare metal, POWER8 and later."""

    def get_table_size(self, page_shift: int, window_size: int, levels: int) -> int:
        if not 0 < levels <= _MAX_LEVELS or window_size.bit_count() != 1:
            return 0
        entries_shift = (window_size.bit_length() - 1 - page_shift) & _U32
        table = max(4096, shifted_one(entries_shift + _TCE_SHIFT))
        level = shifted_one(self._level_shift(entries_shift, levels))
        total = 0
        for _ in range(levels):
            if level:
                total += -(-table // level) * level
                table = max(table // level << _TCE_SHIFT, level)
        # One table is for the hardware, and one remembers the addresses that the process gave.
        return 2 * total & _U64

    def create_table(self, number: int, page_shift: int, window_size: int, levels: int) -> TceTable:
        entries_shift = (window_size.bit_length() - 1 - page_shift) & _U32
        table_shift = max((entries_shift + _TCE_SHIFT) & _U32, self.page_shift)
        level_shift = self._level_shift(entries_shift, levels)
        if (level_shift - _TCE_SHIFT) * levels + page_shift >= 55:
            raise fail(errno.EINVAL)
        if level_shift > _LARGEST_LEVEL:
            raise fail(errno.ENOMEM)
        return TceTable(
            start=self.second_start if number else self.tce32_start,
            page_shift=page_shift,
            entries=shifted_one(table_shift) >> _TCE_SHIFT,
            levels=levels,
            level_entries=1 << (level_shift - _TCE_SHIFT),
            allocated_size=self.get_table_size(page_shift, window_size, levels),
        )

    def _level_shift(self, entries_shift: int, levels: int) -> int:
        """Size of one level's table, as a power of two."""
        per_level = ((entries_shift + levels - 1) & _U32) // levels
        return max((per_level + _TCE_SHIFT) & _U32, self.page_shift)


class PseriesTableGroup(TableGroup):
    """A PAPR guest: its firmware makes and removes windows, and a PE that it refused once is not asked again."""

    write_includes_read = False

    def __init__(self, iommu: Iommu, window: Window, page_size: int) -> None:
        super().__init__(iommu, window, page_size)
        self.failed = False
        """The firmware refused a window: until the next boot there are no more."""

    def get_table_size(self, page_shift: int, window_size: int, levels: int) -> int:
        if levels > 1:
            return _U32
        shift = (page_shift - _TCE_SHIFT) & 127
        return window_size >> shift if shift < 64 else 0

    def create_table(self, number: int, page_shift: int, window_size: int, levels: int) -> TceTable:
        if window_size.bit_count() != 1 or levels > 1:
            raise fail(errno.EINVAL)
        if self.failed:
            raise fail(errno.ENODEV)
        default = page_shift == 12 and window_size <= self.tce32_size
        if number == 0:
            if self._dynamic_window() is not None:
                raise fail(errno.EPERM)
            if default:
                return self._table(number, self.tce32_start, page_shift, window_size)
        self._ask_firmware(page_shift, window_size)
        return self._table(number, self.second_start, page_shift, window_size)

    def set_window(self, number: int, table: TceTable) -> None:
        # The firmware made the window for one PE; it cannot be given to another.
        if self.tables[number] is not table:
            raise fail(errno.EPERM)

    def used_by_host(self) -> None:
        self.failed = True

    def _dynamic_window(self) -> TceTable | None:
        """The window that is not the default one."""
        return next((table for table in self.tables if table and table.start == self.second_start), None)

    def _ask_firmware(self, page_shift: int, window_size: int) -> None:
        """The firmware has one window besides the default one, of no more than `_LARGEST_BLOCK` TCEs, and at least 1."""
        if window_size >> page_shift == 0 or window_size >> page_shift > _LARGEST_BLOCK:
            raise fail(errno.EINVAL)
        if self._dynamic_window() is not None:
            self.failed = True
            raise fail(errno.ENODEV)

    def _table(self, number: int, start: int, page_shift: int, window_size: int) -> TceTable:
        table = TceTable(
            start=start,
            page_shift=page_shift,
            entries=window_size >> page_shift,
            allocated_size=self.get_table_size(page_shift, window_size, 1),
        )
        self.tables[number] = table
        return table


class Ioda1TableGroup(TableGroup):
    """POWER7: a PE's share of the 32-bit window is fixed, and dynamic windows are not offered."""

    def __init__(self, iommu: Iommu, window: Window, page_size: int) -> None:
        super().__init__(iommu, window, page_size)
        self.max_dynamic_windows = 0
        self.max_levels = 0

    def get_table_size(self, page_shift: int, window_size: int, levels: int) -> int:
        return window_size >> page_shift << _TCE_SHIFT if levels == 1 else 0

    def create_table(self, number: int, page_shift: int, window_size: int, levels: int) -> TceTable:
        if number or window_size != self.tce32_size:
            raise fail(errno.EINVAL)
        return TceTable(
            start=self.tce32_start,
            page_shift=page_shift,
            entries=window_size >> page_shift,
            allocated_size=self.get_table_size(page_shift, window_size, levels),
        )
