"""sPAPR TCE v2: MAP and UNMAP."""

import errno

import pytest

from simtests.conformance.raw import NOWHERE, READ, SECOND_WINDOW, WRITE
from vfio import uapi

pytestmark = pytest.mark.power

IOVA = 0x100000
TCE_PAGE = 4096


@pytest.fixture
def memory(program):
    return program.memory(64 << 12 if program.page == 4096 else 8 * program.page)


@pytest.fixture
def ready(v2, memory):
    """A container in which `memory` is registered."""
    assert v2.register(memory.address, memory.length) == 0
    return v2


@pytest.fixture
def end(target):
    """End of the default window."""
    return target.topology.iommu.default_window.size


# --- order of checks ---


def test_map_and_unmap_before_a_registration_raise_eperm_and_look_at_no_argument(program, v2, memory):
    assert v2.map(memory.address, IOVA, program.page) == -errno.EPERM
    assert v2.unmap(IOVA, program.page) == -errno.EPERM
    for request in (uapi.VFIO_IOMMU_MAP_DMA, uapi.VFIO_IOMMU_UNMAP_DMA):
        assert v2.ioctl(request, NOWHERE) == -errno.EPERM
    assert program.locked == 0


def test_creating_a_window_enables_nothing(program, v2, memory):
    start = v2.create(12, 1 << 30)
    assert start == SECOND_WINDOW
    assert v2.map(memory.address, start, program.page) == -errno.EPERM


def test_map_outside_every_window_raises_enxio(ready, memory, end):
    for iova in (end, end + IOVA, 1 << 40, SECOND_WINDOW, (1 << 64) - TCE_PAGE):
        for flags in (0, READ | WRITE):
            assert ready.map(memory.address, iova, TCE_PAGE, flags) == -errno.ENXIO
        assert ready.unmap(iova, TCE_PAGE) == -errno.ENXIO


def test_bad_struct_makes_no_window_and_one_outside_it_does(program, ready, memory, end):
    before = program.locked
    assert ready.map(memory.address, IOVA, TCE_PAGE, flags=4) == -errno.EINVAL
    assert ready.ioctl(uapi.VFIO_IOMMU_MAP_DMA, NOWHERE) == -errno.EFAULT
    assert ready.unmap(IOVA, TCE_PAGE, flags=1) == -errno.EINVAL
    assert program.locked == before
    assert ready.map(memory.address, end, TCE_PAGE) == -errno.ENXIO
    assert program.locked > before


def test_map_of_a_misaligned_size_or_address_raises_einval(ready, memory):
    for vaddr, size in ((512, TCE_PAGE), (0, 512), (0, TCE_PAGE + 1), (1, TCE_PAGE), (0, 1)):
        assert ready.map(memory.address + vaddr, IOVA, size) == -errno.EINVAL
    for size in (1, 512, TCE_PAGE + 1):
        assert ready.unmap(IOVA, size) == -errno.EINVAL


def test_map_with_neither_read_nor_write_raises_einval_and_makes_the_window(program, ready, memory):
    before = program.locked
    assert ready.map(memory.address, IOVA, TCE_PAGE, flags=0) == -errno.EINVAL
    assert program.locked > before
    assert ready.map(memory.address, IOVA + 1, TCE_PAGE, flags=0) == -errno.EINVAL  # before the alignment of iova


def test_misaligned_iova_returns_1_and_maps_nothing(ready, memory):
    for offset in (1, 0x800, TCE_PAGE - 1):
        assert ready.map(memory.address, IOVA + offset, TCE_PAGE) == 1
        assert ready.map(NOWHERE * 16, IOVA + offset, TCE_PAGE) == 1
        assert ready.unmap(IOVA + offset, TCE_PAGE) == 1
    assert ready.unregister(memory.address, memory.length) == 0  # nothing was mapped, so nothing leaks


def test_misaligned_size_comes_before_a_misaligned_iova(ready, memory):
    assert ready.map(memory.address, IOVA + 1, TCE_PAGE + 1) == -errno.EINVAL
    assert ready.unmap(IOVA + 1, TCE_PAGE + 1) == -errno.EINVAL


def test_struct_is_not_written(ready, memory):
    struct = uapi.vfio_iommu_type1_dma_map(vaddr=memory.address, iova=IOVA, size=TCE_PAGE, flags=3)
    before = bytes(uapi.buffer(struct))
    assert ready.ioctl(uapi.VFIO_IOMMU_MAP_DMA, uapi.buffer(struct)) == 0
    assert bytes(uapi.buffer(struct)) == before
    unmap = uapi.vfio_iommu_type1_dma_unmap(iova=IOVA, size=4 * TCE_PAGE)
    before = bytes(uapi.buffer(unmap))
    assert ready.ioctl(uapi.VFIO_IOMMU_UNMAP_DMA, uapi.buffer(unmap)) == 0
    assert bytes(uapi.buffer(unmap)) == before  # the size is not updated


# --- what can be mapped ---


@pytest.mark.parametrize("flags", [READ, WRITE, READ | WRITE])
def test_registered_memory_maps_and_unmaps(ready, memory, flags):
    assert ready.map(memory.address, IOVA, memory.length, flags) == 0
    assert ready.unmap(IOVA, memory.length) == 0
    assert ready.unregister(memory.address, memory.length) == 0


def test_memory_that_is_not_registered_raises_einval(program, ready):
    elsewhere = program.memory(program.page)
    assert ready.map(elsewhere.address, IOVA, program.page) == -errno.EINVAL
    assert ready.map(0, IOVA, TCE_PAGE) == -errno.EINVAL
    assert ready.map(0xC000_0000_0000_0000, IOVA, TCE_PAGE) == -errno.EINVAL


def test_map_runs_over_regions_that_touch_and_not_over_a_gap(program, v2):
    page = program.page
    memory = program.memory(8 * page)
    for start, pages in ((0, 2), (2, 1), (4, 4)):
        assert v2.register(memory.address + start * page, pages * page) == 0
    assert v2.map(memory.address, IOVA, 3 * page) == 0
    assert v2.unmap(IOVA, 3 * page) == 0
    assert v2.map(memory.address, IOVA, 4 * page) == -errno.EINVAL
    assert v2.map(memory.address + 7 * page, IOVA, 2 * page) == -errno.EINVAL
    for start, pages in ((0, 2), (2, 1), (4, 4)):  # the failures left nothing mapped
        before = program.locked
        assert v2.unregister(memory.address + start * page, pages * page) == 0
        assert program.locked == before - pages * page


def test_size_0_is_0_and_looks_at_no_memory(ready):
    assert ready.map(NOWHERE, IOVA, 0) == 0
    assert ready.map(0, IOVA, 0) == 0
    assert ready.unmap(IOVA, 0) == 0


def test_last_page_of_the_window_maps(ready, memory, end):
    assert ready.map(memory.address, end - TCE_PAGE, TCE_PAGE) == 0
    assert ready.unmap(end - TCE_PAGE, TCE_PAGE) == 0


def test_iova_0_maps_like_any_other(ready, memory):
    assert ready.map(memory.address, 0, TCE_PAGE) == 0
    assert ready.unmap(0, TCE_PAGE) == 0


# --- what is mapped already ---


def counts_as_mapped(program, container, memory):
    """Whether entries refer to the region: unregistering it then gives nothing back. The process has to exit after."""
    before = program.locked
    assert container.unregister(memory.address, memory.length) == 0
    return program.locked == before


def test_second_map_at_the_same_iova_replaces_the_first_and_its_count(program, ready, memory):
    other = program.memory(memory.length)
    assert ready.register(other.address, other.length) == 0
    assert ready.map(memory.address, IOVA, memory.length) == 0
    assert ready.map(other.address, IOVA, other.length) == 0
    assert not counts_as_mapped(program, ready, memory)
    assert ready.unmap(IOVA, other.length) == 0
    assert not counts_as_mapped(program, ready, other)


@pytest.mark.leaks
def test_replacing_an_entry_by_the_same_one_counts_once(other_program, member):
    other = other_program()
    container, memory = other.attached(member, 7), other.memory(4 * other.page)
    assert container.register(memory.address, memory.length) == 0
    for _ in range(3):
        assert container.map(memory.address, IOVA, memory.length) == 0
    assert container.unmap(IOVA, memory.length) == 0
    assert not counts_as_mapped(other, container, memory)
    assert container.register(memory.address, memory.length) == 0
    assert container.map(memory.address, IOVA, TCE_PAGE) == 0
    assert counts_as_mapped(other, container, memory)


@pytest.mark.leaks
def test_memory_mapped_twice_is_mapped_until_both_are_gone(other_program, member):
    other = other_program()
    container, memory = other.attached(member, 7), other.memory(4 * other.page)
    assert container.register(memory.address, memory.length) == 0
    for iova in (IOVA, 2 * IOVA):
        assert container.map(memory.address, iova, memory.length) == 0
    assert container.unmap(IOVA, memory.length) == 0
    assert container.unmap(IOVA, memory.length) == 0
    assert counts_as_mapped(other, container, memory)


def test_unmap_of_parts_and_of_more_than_is_mapped(program, ready, memory, end):
    assert ready.map(memory.address, IOVA, memory.length) == 0
    assert ready.unmap(IOVA + TCE_PAGE, TCE_PAGE) == 0
    assert ready.unmap(IOVA - 16 * TCE_PAGE, 2 * memory.length) == 0
    assert ready.unmap(0, end) == 0
    assert not counts_as_mapped(program, ready, memory)


def test_failed_map_clears_what_it_replaced_and_leaves_what_it_did_not_reach(program, v2):
    """Entries before the page that fails are cleared, older mappings too; entries from it on stay."""
    page = program.page
    old, new = program.memory(4 * page), program.memory(4 * page)
    assert v2.register(old.address, 2 * page) == 0
    assert v2.register(old.address + 2 * page, 2 * page) == 0
    assert v2.register(new.address, 2 * page) == 0
    assert v2.map(old.address, IOVA, 4 * page) == 0
    assert v2.map(new.address, IOVA, 4 * page) == -errno.EINVAL
    before = program.locked
    assert v2.unregister(new.address, 2 * page) == 0
    assert v2.unregister(old.address, 2 * page) == 0
    assert program.locked == before - 4 * page
    assert v2.unmap(IOVA, 4 * page) == 0
    assert v2.unregister(old.address + 2 * page, 2 * page) == 0
    assert program.locked == before - 6 * page


@pytest.mark.leaks
def test_entries_from_the_failed_page_on_are_still_mapped(other_program, member):
    other = other_program()
    page, container = other.page, other.attached(member, 7)
    old, new = other.memory(4 * page), other.memory(4 * page)
    for memory, pages in ((old, 4), (new, 2)):
        assert container.register(memory.address, pages * page) == 0
    assert container.map(old.address, IOVA, 4 * page) == 0
    assert container.map(new.address, IOVA, 4 * page) == -errno.EINVAL
    assert counts_as_mapped(other, container, old)


# --- window pages and host pages ---


def test_window_of_larger_pages_checks_alignment_by_them(program, v2):
    memory = program.memory(4 << 16)
    assert v2.register(memory.address, memory.length) == 0
    start = v2.create(16, 1 << 30)
    assert start == SECOND_WINDOW
    for vaddr, size in ((memory.address + 4096, 1 << 16), (memory.address, 4096), (memory.address, (1 << 16) + 4096)):
        assert v2.map(vaddr, start, size) == -errno.EINVAL
    base = memory.address + -memory.address % (1 << 16)
    assert v2.map(base, start + 4096, 1 << 16) == 1
    assert v2.unmap(start + 4096, 1 << 16) == 1
    assert v2.unmap(start, 4096) == -errno.EINVAL


@pytest.mark.parametrize("shift", [12, 16, 21, 24, 28, 30])
def test_window_page_must_not_be_larger_than_the_memorys(program, v2, target, shift):
    if not target.topology.iommu.page_sizes >> shift & 1:
        assert v2.create(shift, 1 << 34) == -errno.EINVAL
        return
    memory = program.memory(4 << 16)
    assert v2.register(memory.address, memory.length) == 0
    start = v2.create(shift, max(1 << 30, 16 << shift))
    assert start == SECOND_WINDOW
    page = 1 << shift
    aligned = memory.address & -page
    expected = 0 if page <= program.page and aligned == memory.address else -errno.EINVAL
    assert v2.map(aligned, start + page, page) == expected
    assert v2.unmap(start + page, page) == 0


@pytest.mark.targets("powernv8-64k")
@pytest.mark.parametrize(("shift", "expected"), [(12, 0), (16, 0), (24, 0), (28, -errno.EINVAL)])
def test_huge_pages_map_in_windows_of_up_to_their_size(program, v2, shift, expected):
    memory = program.memory(16 << 20, 16 << 20)
    assert v2.register(memory.address, memory.length) == 0
    start = v2.create(shift, 1 << 32)
    assert start == SECOND_WINDOW
    page = 1 << shift
    assert v2.map(memory.address & -page, start + page, page) == expected
    assert v2.unmap(start + page, page) == 0


@pytest.mark.targets("pseries")
def test_huge_pages_map_in_windows_of_their_size_on_a_guest(program, v2):
    memory = program.memory(2 << 20, 2 << 20)
    assert v2.register(memory.address, memory.length) == 0
    start = v2.create(21, 1 << 30)
    assert start == SECOND_WINDOW
    assert v2.map(memory.address, start + (2 << 20), 2 << 20) == 0
    assert v2.unmap(start + (2 << 20), 2 << 20) == 0


@pytest.mark.targets("powernv8-64k")
def test_huge_memory_registered_off_its_boundary_counts_as_ordinary(program, v2):
    memory = program.memory(32 << 20, 16 << 20)
    assert v2.register(memory.address + 65536, (16 << 20)) == 0
    start = v2.create(24, 1 << 32)
    assert v2.map(memory.address + (16 << 20), start, 16 << 20) == -errno.EINVAL
    assert v2.remove(start) == 0
    start = v2.create(16, 1 << 30)
    assert v2.map(memory.address + (16 << 20), start, 65536) == 0
    assert v2.unmap(start, 65536) == 0


@pytest.mark.targets("powernv8-64k")
def test_transparent_huge_pages_count_as_ordinary(program, v2, area):
    memory = area((16 << 20) // program.page, 16 << 20)
    memory.transparent()
    assert v2.register(memory.address, memory.length) == 0
    start = v2.create(24, 1 << 32)
    assert v2.map(memory.address, start, memory.length) == -errno.EINVAL


@pytest.mark.targets("powernv8-64k")
@pytest.mark.not_recorded("huge pages beside ordinary ones, which the seam cannot allocate")
def test_huge_page_before_ordinary_ones_lets_the_region_claim_its_size_and_the_pages_are_refused(program, v2, mixed):
    half, address = 16 << 20, mixed(0)
    assert v2.register(address, 2 * half) == 0
    start = v2.create(24, 1 << 32)
    assert v2.map(address, start, half) == 0
    assert v2.map(address + half, start + half, half) == -errno.EPERM
    assert v2.unmap(start, half) == 0


@pytest.mark.targets("powernv8-64k")
def test_ordinary_pages_before_a_huge_one_make_the_region_ordinary(program, v2, mixed):
    half, address = 16 << 20, mixed(1)
    assert v2.register(address, 2 * half) == 0
    start = v2.create(24, 1 << 32)
    for offset in (0, half):
        assert v2.map(address + offset, start, half) == -errno.EINVAL
    assert v2.remove(start) == 0
    start = v2.create(16, 1 << 32)
    assert v2.map(address, start, 2 * half) == 0
    assert v2.unmap(start, 2 * half) == 0
