"""The ``[iommu]`` table of a topology, one reader for each kind of IOMMU, and DMA windows."""

from __future__ import annotations

from collections.abc import Iterable

from vfio.topology_parts import Iommu, Pamu, Window
from vfio.topology_table import Table


def iommu(table: Table) -> Iommu:
    """The sPAPR IOMMU of POWER: windows, and pages of several sizes."""
    dynamic = table.boolean("dynamic_windows") if table.has("dynamic_windows") else True
    default = window(table.table("default_window"))
    page_sizes = table.integer("page_sizes", minimum=1)
    if not page_sizes & default.page_size:
        raise table.error("page_sizes", f"{page_sizes:#x} lacks the default window's page size {default.page_size:#x}")
    start = 0
    if dynamic:
        start = table.integer("second_window_start")
        if start < default.start + default.size:
            raise table.error("second_window_start", f"{start:#x} lies inside or below the default window")
    iommu = Iommu(
        default_window=default,
        second_window_start=start,
        page_sizes=page_sizes,
        levels=table.integer("levels", 1, 5),
        windows=table.integer("windows", 1, 2),
        dynamic_windows=dynamic,
    )
    table.end()
    return iommu


def type1(table: Table) -> Iommu:
    """The IOMMU of a PC: no windows, ranges of IOVA."""
    page_sizes = table.integer("page_sizes", minimum=1)
    page = page_sizes & -page_sizes
    iommu = Iommu(
        Window(0, 0, page),
        0,
        page_sizes,
        levels=0,
        windows=0,
        dynamic_windows=False,
        ranges=ranges(table.tables("ranges"), page),
        remaps_interrupts=table.boolean("remaps_interrupts") if table.has("remaps_interrupts") else True,
    )
    table.end()
    return iommu


def ranges(tables: Iterable[Table], page: int) -> tuple[tuple[int, int], ...]:
    """First and last IOVA of ranges of whole pages, ascending."""
    found: list[tuple[int, int]] = []
    for each in tables:
        start, end = each.integer("start"), each.integer("end")
        if start % page or (end + 1) % page or not (found[-1][1] if found else -1) < start < end:
            raise each.error("start", f"{start:#x}..{end:#x}: ranges are whole pages of {page} bytes, and ascend")
        each.end()
        found.append((start, end))
    return tuple(found)


def pamu(table: Table) -> Iommu:
    """The IOMMU of a P4080: a domain has one aperture, cut into windows of one size."""
    page_sizes = table.integer("page_sizes", minimum=1)
    pamu = Pamu(
        aperture_bits=table.integer("aperture_bits", 32, 64),
        windows=table.power_of_two("windows", minimum=1),
        msi_banks=tuple(table.integers("msi_banks")),
        cpus=table.integer("cpus", minimum=1),
    )
    table.end()
    return Iommu(Window(0, 0, 4096), 0, page_sizes, levels=0, windows=0, dynamic_windows=False, pamu=pamu)


def window(table: Table) -> Window:
    """A DMA window, wherever one is described."""
    window = Window(
        start=table.integer("start"),
        size=table.integer("size", minimum=1),
        page_size=table.integer("page_size", minimum=1),
    )
    if window.page_size & (window.page_size - 1) or window.size % window.page_size:
        raise table.error("page_size", "must be a power of two that divides the size")
    table.end()
    return window
