"""Type1: MAP and UNMAP, by raw calls."""

import errno
import mmap

import pytest

from simtests.conformance.engine import Engine
from simtests.conformance.raw import NOWHERE, READ, WRITE
from simtests.conformance.type1_calls import ALL, MAP_VADDR, PAGE, TYPE1, TYPE1_V2, VADDR, unmap
from vfio import uapi

pytestmark = pytest.mark.targets("q35")

IOVA = 0x10_0000
ALL_ONES = (1 << 64) - 1


@pytest.fixture
def v1(program, member):
    return program.attached(member, TYPE1)


@pytest.fixture
def v2(program, member):
    return program.attached(member, TYPE1_V2)


@pytest.fixture
def memory(program):
    return program.memory(16 * PAGE)


# --- map ---


def test_map_charges_its_pages_and_unmap_returns_its_size(program, v2, memory):
    before = program.locked
    assert v2.map(memory.address, IOVA, memory.length) == 0
    assert program.locked == before + memory.length
    assert unmap(v2, IOVA, memory.length) == (0, memory.length)
    assert program.locked == before


@pytest.mark.parametrize("flags", [0, 8, READ | 8, MAP_VADDR | READ, MAP_VADDR | READ | WRITE, 1 << 31])
def test_map_with_other_flags_raises_einval(v2, memory, flags):
    assert v2.map(memory.address, IOVA, PAGE, flags) == -errno.EINVAL


@pytest.mark.parametrize(
    ("vaddr", "iova", "size"), [(0, 0, 0), (1, 0, PAGE), (0, 2048, PAGE), (0, 0, 2048), (0, 0, PAGE + 1)]
)
def test_map_of_parts_of_pages_raises_einval(v2, memory, vaddr, iova, size):
    assert v2.map(memory.address + vaddr, IOVA + iova, size) == -errno.EINVAL


def test_map_that_wraps_raises_einval_or_eoverflow(v2, memory, target):
    expected = -(errno.EOVERFLOW if target.kernel >= (7, 2) else errno.EINVAL)
    top = ALL_ONES - PAGE + 1
    assert v2.map(memory.address, top, 2 * PAGE) == expected
    assert v2.map(top, IOVA, 2 * PAGE) == expected


def test_map_of_a_bad_argument(v2):
    assert v2.ioctl(uapi.VFIO_IOMMU_MAP_DMA, NOWHERE) == -errno.EFAULT
    short = uapi.vfio_iommu_type1_dma_map(argsz=31, flags=READ, iova=IOVA, size=PAGE)
    assert v2.ioctl(uapi.VFIO_IOMMU_MAP_DMA, uapi.buffer(short)) == -errno.EINVAL


@pytest.mark.parametrize("offset", [-1, 0, 1, 2, 3, 4])
@pytest.mark.parametrize("kind", [TYPE1, TYPE1_V2])
def test_map_over_a_mapping_raises_eexist_and_beside_it_works(program, member, memory, kind, offset):
    container = program.attached(member, kind)
    assert container.map(memory.address, IOVA, 4 * PAGE) == 0
    expected = 0 if offset == 4 else -errno.EEXIST
    assert container.map(memory.address, IOVA + offset * PAGE, 2 * PAGE) == expected
    assert container.map(memory.address, IOVA - 3 * PAGE, 2 * PAGE) == 0


@pytest.mark.parametrize(
    ("range_", "first", "expected"),
    [(0, True, 0), (0, False, 0), (1, True, 0), (1, False, 0)],
)
def test_first_and_last_page_of_the_ranges_map(v2, memory, target, range_, first, expected):
    start, end = target.topology.iommu.ranges[range_]
    assert v2.map(memory.address, start if first else end + 1 - PAGE, PAGE) == expected


def test_outside_the_ranges_or_across_their_ends_raises_einval(v2, memory, target):
    (_, hole), (after, top) = target.topology.iommu.ranges
    for iova, pages in ((hole + 1, 1), (after - PAGE, 1), (hole + 1 - PAGE, 2), (after - PAGE, 2), (top + 1, 1)):
        assert v2.map(memory.address, iova, pages * PAGE) == -errno.EINVAL
    assert v2.map(memory.address, hole + 1 - PAGE, (after - hole - 1) + 2 * PAGE) == -errno.EINVAL


def test_memory_with_a_hole_raises_efault_and_leaves_nothing(program, v2, area):
    before, holed = program.locked, area(8)
    holed.hole(4)
    assert v2.map(holed.address, IOVA, 8 * PAGE) == -errno.EFAULT
    assert v2.map(NOWHERE, IOVA, PAGE) == -errno.EFAULT
    assert program.locked == before
    assert v2.map(holed.address, IOVA, 4 * PAGE) == 0


def test_read_only_memory_maps_for_reading_alone(v2, area):
    memory = area(4)
    memory.protect(0, mmap.PROT_READ, 4)
    assert v2.map(memory.address, IOVA, 4 * PAGE, READ | WRITE) == -errno.EFAULT
    assert v2.map(memory.address, IOVA, 4 * PAGE, WRITE) == -errno.EFAULT
    assert v2.map(memory.address, IOVA, 4 * PAGE, READ) == 0


def test_locked_memory_limit_raises_enomem_and_leaves_nothing(other_program, member):
    other = other_program(memlock=8 * PAGE, ipc_lock=False)
    container, memory = other.attached(member, TYPE1_V2), other.memory(16 * PAGE)
    assert container.map(memory.address, IOVA, 9 * PAGE) == -errno.ENOMEM
    assert other.locked == 0
    assert container.map(memory.address, IOVA, 8 * PAGE) == 0
    assert container.map(memory.address, 2 * IOVA, PAGE) == -errno.ENOMEM
    assert container.map(NOWHERE, 2 * IOVA, PAGE) == -errno.EFAULT
    assert other.locked == 8 * PAGE


# --- unmap ---


@pytest.mark.parametrize(("iova", "size"), [(0, 0), (1, PAGE), (0, 2048), (PAGE, PAGE - 1)])
def test_unmap_of_parts_of_pages_raises_einval_and_writes_nothing(v2, memory, iova, size):
    assert v2.map(memory.address, IOVA, PAGE) == 0
    assert unmap(v2, IOVA + iova, size) == (-errno.EINVAL, size)


def test_unmap_that_wraps_raises_einval_or_eoverflow(v2, target):
    expected = -(errno.EOVERFLOW if target.kernel >= (7, 2) else errno.EINVAL)
    assert unmap(v2, ALL_ONES - PAGE + 1, 2 * PAGE) == (expected, 2 * PAGE)


def test_unmap_of_a_bad_argument(v2):
    assert v2.ioctl(uapi.VFIO_IOMMU_UNMAP_DMA, NOWHERE) == -errno.EFAULT
    short = uapi.vfio_iommu_type1_dma_unmap(argsz=23, iova=IOVA, size=PAGE)
    assert v2.ioctl(uapi.VFIO_IOMMU_UNMAP_DMA, uapi.buffer(short)) == -errno.EINVAL
    assert unmap(v2, IOVA, PAGE, 8) == (-errno.EINVAL, PAGE)


@pytest.mark.parametrize("kind", [TYPE1, TYPE1_V2])
def test_unmap_of_nothing_is_success_and_size_0(program, member, kind):
    assert unmap(program.attached(member, kind), IOVA, 16 * PAGE) == (0, 0)


@pytest.mark.parametrize(("start", "pages"), [(1, 1), (0, 1), (3, 1), (-1, 2), (2, 4)])
def test_v2_does_not_cut_a_mapping(v2, memory, start, pages):
    assert v2.map(memory.address, IOVA, 4 * PAGE) == 0
    assert unmap(v2, IOVA + start * PAGE, pages * PAGE) == (-errno.EINVAL, pages * PAGE)
    assert unmap(v2, IOVA, 4 * PAGE) == (0, 4 * PAGE)


@pytest.mark.parametrize(
    ("start", "pages", "done"), [(1, 1, 0), (0, 1, 4), (3, 1, 0), (-1, 2, 4), (2, 4, 0), (-2, 2, 0), (1, 16, 0)]
)
def test_v1_unmaps_all_of_a_mapping_by_its_first_byte_and_else_nothing(v1, memory, start, pages, done):
    assert v1.map(memory.address, IOVA, 4 * PAGE) == 0
    assert v1.map(memory.address, IOVA + 8 * PAGE, PAGE) == 0
    assert unmap(v1, IOVA + start * PAGE, pages * PAGE) == (0, done * PAGE)
    assert unmap(v1, 0, 0, ALL) == (0, (5 - done) * PAGE)


def test_unmap_of_a_range_takes_all_mappings_and_the_gaps_between(program, v2, memory):
    for n in (0, 2, 5):
        assert v2.map(memory.address, IOVA + n * PAGE, PAGE) == 0
    assert unmap(v2, IOVA - PAGE, 4 * PAGE) == (0, 2 * PAGE)
    assert unmap(v2, 0, 1 << 32) == (0, PAGE)


def test_unmap_all_wants_no_range(v2, memory):
    for n in (0, 2, 5):
        assert v2.map(memory.address, n * PAGE, PAGE) == 0
    assert unmap(v2, 0, PAGE, ALL) == (-errno.EINVAL, PAGE)
    assert unmap(v2, PAGE, 0, ALL) == (-errno.EINVAL, 0)
    assert unmap(v2, 0, 0, ALL) == (0, 3 * PAGE)
    assert unmap(v2, 0, 0, ALL) == (0, 0)


# --- memory that moves ---


def test_vaddr_of_a_mapping_is_replaced_between_unmap_and_map(v2, memory):
    assert v2.map(memory.address, IOVA, 2 * PAGE, MAP_VADDR) == -errno.ENOENT
    assert v2.map(memory.address, IOVA, 2 * PAGE) == 0
    assert v2.map(memory.address, IOVA, 2 * PAGE, MAP_VADDR) == -errno.EINVAL
    assert unmap(v2, IOVA, 2 * PAGE, VADDR) == (0, 2 * PAGE)
    assert v2.map(memory.address, IOVA, PAGE, MAP_VADDR) == -errno.EINVAL
    assert v2.map(memory.address, IOVA, 2 * PAGE) == -errno.EEXIST
    assert v2.map(memory.address, IOVA, 2 * PAGE, MAP_VADDR) == 0
    assert v2.map(memory.address, IOVA, 2 * PAGE, MAP_VADDR) == -errno.EINVAL


def test_suspending_twice_raises_einval_and_takes_back_what_came_before(v2, memory):
    for n in (0, 4):
        assert v2.map(memory.address, IOVA + n * PAGE, PAGE) == 0
    assert unmap(v2, IOVA + 4 * PAGE, PAGE, VADDR) == (0, PAGE)
    assert unmap(v2, 0, 0, ALL | VADDR) == (-errno.EINVAL, 0)
    assert v2.map(memory.address, IOVA, PAGE, MAP_VADDR) == -errno.EINVAL
    assert v2.map(memory.address, IOVA + 4 * PAGE, PAGE, MAP_VADDR) == 0
    assert unmap(v2, 0, 0, ALL | VADDR) == (0, 2 * PAGE)
    assert unmap(v2, 0, 0, ALL) == (0, 2 * PAGE)


# --- DMA ---


@pytest.mark.needs_edu
def test_dma_goes_where_it_is_mapped_and_no_further(program, v2, memory, member):
    memory.view[:16] = b"0123456789abcdef"
    engine = Engine(v2, member)
    assert v2.map(memory.address, IOVA, 2 * PAGE) == 0
    engine.load(IOVA)
    engine.store(IOVA + PAGE - 8)
    assert bytes(memory.view[PAGE - 8 : PAGE + 8]) == b"0123456789abcdef"
    engine.store(IOVA + 2 * PAGE)
    assert bytes(memory.view[2 * PAGE : 2 * PAGE + 16]) == bytes(16)


@pytest.mark.needs_edu
def test_mapping_for_reading_is_not_written_and_one_for_writing_can_be_read(program, v2, memory, member):
    memory.view[:16] = b"0123456789abcdef"
    engine = Engine(v2, member)
    assert v2.map(memory.address, IOVA, PAGE, READ) == 0
    assert v2.map(memory.address + PAGE, IOVA + PAGE, PAGE, WRITE) == 0
    engine.load(IOVA)
    engine.store(IOVA + 32)
    assert bytes(memory.view[32:48]) == bytes(16)
    engine.store(IOVA + PAGE)
    assert bytes(memory.view[PAGE : PAGE + 16]) == b"0123456789abcdef"
    memory.view[PAGE + 64 : PAGE + 80] = b"written, not red"
    engine.load(IOVA + PAGE + 64)
    engine.store(IOVA + PAGE + 128)
    assert bytes(memory.view[PAGE + 128 : PAGE + 144]) == b"written, not red"


@pytest.mark.needs_edu
def test_iova_above_4_gib_works(v2, memory, member, target):
    memory.view[:16] = b"0123456789abcdef"
    top = target.topology.iommu.ranges[1][1] + 1 - PAGE
    engine = Engine(v2, member)
    assert v2.map(memory.address, top, PAGE) == 0
    engine.load(top)
    engine.store(top + 64)
    assert bytes(memory.view[64:80]) == b"0123456789abcdef"
