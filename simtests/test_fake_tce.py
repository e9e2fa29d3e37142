"""The modelled kernel's TCE tables: runs of entries, levels, and what tables of a geometry cost."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spapr_host import answer

from vfio import topology
from vfio.fake.extents import Extents
from vfio.fake.table_group import Ioda2TableGroup, PseriesTableGroup
from vfio.fake.tce import TCE_READ, TCE_WRITE, TceTable

PAGE = 4096
RW = TCE_READ | TCE_WRITE

edits = st.lists(
    st.tuples(st.booleans(), st.integers(0, 60), st.integers(0, 20), st.integers(0, 3)), min_size=1, max_size=40
)


@given(edits=edits)
def test_runs_say_what_a_dictionary_of_entries_would_say(edits: list[tuple[bool, int, int, int]]) -> None:
    runs, entries, gone = Extents(PAGE), dict[int, int](), 0
    for add, first, count, base in edits:
        heard: list[tuple[int, int]] = []
        runs.remove(first, first + count, lambda value, n, heard=heard: heard.append((value, n)))  # type: ignore[misc]
        expected = sorted(entries.pop(entry) for entry in range(first, first + count) if entry in entries)
        assert sorted(value + i * PAGE for value, n in heard for i in range(n)) == expected
        gone += len(expected)
        if add and count:
            value = (base << 32) + first * PAGE
            runs.insert(first, first + count, value)
            entries.update({first + i: value + i * PAGE for i in range(count)})
        assert runs.covered == len(entries)
        for entry in range(85):
            found = runs.find(entry)
            assert (found and found.value + (entry - found.start) * PAGE) == entries.get(entry)
    assert [entry for run in runs for entry in range(run.start, run.end)] == sorted(entries)


@given(order=st.permutations(range(0, 64, 2)))
def test_neighbours_that_continue_one_another_become_one_run(order: list[int]) -> None:
    runs = Extents(PAGE)
    for entry in [*order, *(entry + 1 for entry in order)]:
        runs.insert(entry, entry + 1, entry * PAGE)
    assert [tuple(run) for run in runs] == [(0, 64, 0)]


def test_neighbours_with_other_permissions_stay_apart() -> None:
    runs = Extents(PAGE)
    runs.insert(0, 1, 0x10000 | TCE_READ)
    runs.insert(1, 2, 0x11000 | RW)
    assert len(runs) == 2


def test_many_scattered_pages_are_found_again_and_removed() -> None:
    runs = Extents(PAGE)
    for i in range(20_000):
        entry = i * 7919 % 20_000 * 2
        runs.insert(entry, entry + 1, entry * PAGE * 3)
    assert len(runs) == runs.covered == 20_000
    assert all(runs.find(entry) == (entry, entry + 1, entry * PAGE * 3) for entry in range(0, 40_000, 2))
    assert runs.find(39_999) is None
    runs.remove(100, 39_900)
    assert [run.start for run in runs] == [*range(0, 100, 2), *range(39_900, 40_000, 2)]


def test_a_map_of_a_terabyte_is_one_run() -> None:
    table = TceTable(start=1 << 59, page_shift=12, entries=1 << 28)
    table.write(table.first, 1 << 28, 0x10000 | RW)
    assert len(table.extents) == 1
    found = table.translate((1 << 59) + (1 << 40) - 1)
    assert found == (0x10000 + (1 << 40) - 1, 1, RW)


def test_scattered_mappings_take_24_bytes_each() -> None:
    table = TceTable(start=0, page_shift=12, entries=1 << 20)
    for entry in range(0, 200_000, 2):
        table.write(entry, 1, entry * PAGE * 3 | RW)
    blocks = table.extents._blocks
    size = sum(len(array) * array.itemsize for block in blocks for array in (block.starts, block.ends, block.values))
    assert (len(table.extents), size) == (100_000, 2_400_000)
    assert len(blocks) < 250


def test_translation_goes_on_to_the_end_of_the_run() -> None:
    table = TceTable(start=0, page_shift=16, entries=16)
    table.write(2, 3, 0x7F0000 | TCE_READ)
    assert table.translate(0x2_0010) == (0x7F0010, 0x2_FFF0, TCE_READ)
    assert table.translate(0x5_0000) is None


def test_tables_below_the_top_are_made_when_a_mapping_needs_them_and_stay() -> None:
    group = Ioda2TableGroup(topology.load("power8").iommu, topology.load("power8").iommu.default_window, PAGE)
    table = group.create_table(1, 12, 1 << 40, 3)
    assert (table.tables, table.level_entries) == (1, 1024)
    table.write(table.first, 1, RW)
    assert table.tables == 3
    table.write(table.first + 1, 1023, RW)
    assert table.tables == 3
    table.write(table.first + 1023, 2, RW)  # into the next table of the lowest level
    assert table.tables == 4
    table.write(table.first + (1 << 27), 1, RW)  # far away: one of each level
    assert table.tables == 6
    table.clear_all()
    assert table.tables == 6


# What CREATE answered, and by how many kB locked memory grew, on Linux 6.12 on a POWER8 (4K pages, 64K pages).
# A refusal whose charge is not 0 keeps it.
CREATED = {
    # page shift, size, levels
    (12, 1 << 31, 1): ((0, 8192), (0, 8192)),
    (16, 1 << 30, 1): ((0, 256), (0, 256)),
    (12, 1 << 36, 2): ((0, 262208), (0, 262272)),
    (12, 1 << 40, 3): ((0, 4198416), (0, 4194944)),
    (12, 4096, 1): ((0, 8), (0, 128)),
    (12, 2048, 1): ((0, 8), (0, 128)),
    (12, 512, 1): ((0, 8), (0, 128)),
    (12, 256, 1): ((errno.EINVAL, 0), (errno.EINVAL, 0)),
    (12, 64, 1): ((errno.EINVAL, 0), (errno.EINVAL, 0)),
    (12, 1, 1): ((errno.EINVAL, 0), (errno.EINVAL, 0)),
    (12, 4096, 2): ((0, 16), (0, 256)),
    (12, 2048, 2): ((0, 16), (0, 256)),
    (12, 1024, 2): ((errno.EINVAL, 24), (errno.EINVAL, 0)),
    (12, 512, 2): ((errno.EINVAL, 24), (errno.EINVAL, 0)),
    (12, 256, 2): ((errno.EINVAL, 40), (errno.EINVAL, 0)),
    (12, 64, 2): ((errno.EINVAL, 72), (errno.EINVAL, 64)),
    (12, 1, 2): ((errno.EINVAL, 0), (errno.EINVAL, 0)),
    (12, 4096, 3): ((0, 24), (0, 384)),
    (12, 1024, 3): ((0, 24), (0, 384)),
    (12, 512, 3): ((errno.EINVAL, 0), (errno.EINVAL, 0)),
    (16, 65536, 1): ((0, 8), (0, 128)),
    (16, 8192, 1): ((0, 8), (0, 128)),
    (16, 4096, 1): ((errno.EINVAL, 0), (errno.EINVAL, 0)),
    (16, 32768, 2): ((0, 16), (0, 256)),
    (16, 16384, 2): ((errno.EINVAL, 24), (errno.EINVAL, 0)),
    (16, 1024, 2): ((errno.EINVAL, 72), (errno.EINVAL, 64)),
    (16, 65536, 3): ((0, 24), (errno.EINVAL, 384)),
    (16, 16384, 3): ((0, 24), (errno.EINVAL, 384)),
    (16, 8192, 3): ((errno.EINVAL, 0), (errno.EINVAL, 0)),
    (140, 1 << 30, 1): ((errno.EINVAL, 4096), (errno.EINVAL, 4096)),
    (144, 1 << 30, 1): ((errno.EINVAL, 256), (errno.EINVAL, 256)),
    (28, 1 << 30, 1): ((0, 8), (0, 128)),
    (24, 1 << 30, 1): ((0, 8), (0, 128)),
    (12, 1 << 63, 1): ((errno.EINVAL, 35184372088832), (errno.EINVAL, 35184372088832)),
    (12, 1 << 63, 5): ((errno.EINVAL, 35201560350752), (errno.EINVAL, 35188667580672)),
    (12, 1 << 45, 5): ((errno.EINVAL, 134480400), (errno.EINVAL, 134234496)),
    (16, 1 << 60, 5): ((errno.EINVAL, 275415828488), (errno.EINVAL, 274911465728)),
    (28, 1 << 63, 5): ((errno.EINVAL, 537921552), (errno.EINVAL, 536936832)),
    (28, 1 << 40, 5): ((errno.EINVAL, 96), (errno.EINVAL, 640)),
    (12, 0, 1): ((errno.EINVAL, 0), (errno.EINVAL, 0)),
    (12, 3 << 20, 1): ((errno.EINVAL, 0), (errno.EINVAL, 0)),
    (12, 1 << 20, 0): ((errno.EINVAL, 0), (errno.EINVAL, 0)),
    (12, 1 << 20, 6): ((errno.EINVAL, 0), (errno.EINVAL, 0)),
    # One level of more than 16 MiB cannot be allocated.
    (12, 1 << 33, 1): ((0, 32768), (0, 32768)),
    (12, 1 << 34, 1): ((errno.ENOMEM, 65536), (errno.ENOMEM, 65536)),
}


@pytest.mark.parametrize(("nth", "page_size"), [(0, 4096), (1, 65536)], ids=["4K", "64K"])
@pytest.mark.parametrize("geometry", CREATED, ids=str)
def test_a_powernv_table_costs_what_the_kernel_charged(
    geometry: tuple[int, int, int], nth: int, page_size: int
) -> None:
    number, kilobytes = CREATED[geometry][nth]
    iommu = topology.load("power8").iommu
    group = Ioda2TableGroup(iommu, iommu.default_window, page_size)
    assert group.get_table_size(*geometry) // page_size * page_size >> 10 == kilobytes
    if number and not group.get_table_size(*geometry):
        return  # refused for that
    if number:
        assert answer(group.create_table, 0, *geometry) == errno.errorcode[number]
    else:
        assert group.create_table(0, *geometry).allocated_size >> 10 == kilobytes


# The same on a pseries guest with 4K pages; each is the first window that is created, and not the default one's slot.
PSERIES = {
    (12, 1 << 30, 0): (0, 2048),
    (12, 1 << 38, 1): (0, 524288),
    (16, 1 << 36, 1): (0, 8192),
    (24, 1 << 36, 1): (0, 32),
    (24, 1 << 30, 1): (0, 0),
    (12, (1 << 20) + 4096, 1): (errno.EINVAL, 0),
    (12, 1 << 20, 2): (errno.EINVAL, 4194300),
    (21, 1 << 20, 1): (errno.EINVAL, 0),
    (12, 1 << 50, 1): (errno.EINVAL, 2147483648),
    (24, 1 << 62, 1): (errno.EINVAL, 2147483648),
    (12, 1 << 63, 1): (errno.EINVAL, 17592186044416),
}


@pytest.mark.parametrize("geometry", PSERIES, ids=str)
def test_a_pseries_table_costs_what_the_kernel_charged(geometry: tuple[int, int, int]) -> None:
    number, kilobytes = PSERIES[geometry]
    iommu = topology.load("pseries").iommu
    group = PseriesTableGroup(iommu, iommu.default_window, PAGE)
    assert group.get_table_size(*geometry) // PAGE * PAGE >> 10 == kilobytes
    if number:
        assert answer(group.create_table, 1, *geometry) == errno.errorcode[number]
        assert not group.failed
    else:
        assert group.create_table(1, *geometry).start == 1 << 59
