"""Type1: dirty pages, by raw calls.  The emulated hardware cannot tell which it wrote: every page that is mapped is dirty."""

import errno

import pytest

from simtests.conformance.raw import NOWHERE
from simtests.conformance.type1_calls import (
    ALL,
    GET,
    GET_BITMAP,
    PAGE,
    START,
    STOP,
    TYPE1,
    TYPE1_V2,
    VADDR,
    dirty,
    get_dirty,
    unmap,
    unmap_dirty,
)
from vfio import uapi

pytestmark = pytest.mark.targets("q35")

IOVA = 0x10_0000


@pytest.fixture
def v2(program, member):
    return program.attached(member, TYPE1_V2)


@pytest.fixture
def memory(program):
    return program.memory(256 * PAGE)


@pytest.fixture
def bitmap(program):
    """Memory for bitmaps, full of ones."""
    memory = program.memory(PAGE)
    memory.view[:] = b"\xff" * PAGE
    return memory


def words(bitmap, count):
    return [int.from_bytes(bitmap.view[8 * n : 8 * n + 8], "little") for n in range(count)]


def test_v1_refuses_before_it_looks(program, member):
    v1 = program.attached(member, TYPE1)
    assert v1.ioctl(uapi.VFIO_IOMMU_DIRTY_PAGES, NOWHERE) == -errno.EACCES
    assert dirty(v1, START) == -errno.EACCES


@pytest.mark.parametrize("flags", [0, 8, START | STOP, START | GET, 1 << 31])
def test_exactly_one_known_flag(v2, flags):
    assert dirty(v2, flags) == -errno.EINVAL


def test_bad_arguments(v2):
    assert v2.ioctl(uapi.VFIO_IOMMU_DIRTY_PAGES, NOWHERE) == -errno.EFAULT
    assert dirty(v2, START, argsz=7) == -errno.EINVAL
    assert dirty(v2, GET) == -errno.EINVAL


def test_start_and_stop_can_be_repeated(v2):
    for flag in (STOP, START, START, STOP, STOP):
        assert dirty(v2, flag) == 0


def test_bitmap_is_to_be_had_only_while_tracking(v2, memory, bitmap):
    assert v2.map(memory.address, IOVA, 64 * PAGE) == 0
    assert get_dirty(v2, IOVA, 64 * PAGE, bitmap.address, 8) == -errno.EINVAL
    assert dirty(v2, START) == 0
    assert get_dirty(v2, IOVA, 64 * PAGE, bitmap.address, 8) == 0
    assert dirty(v2, STOP) == 0
    assert get_dirty(v2, IOVA, 64 * PAGE, bitmap.address, 8) == -errno.EINVAL


def test_every_mapped_page_is_dirty_every_time(v2, memory, bitmap):
    assert v2.map(memory.address, IOVA, 70 * PAGE) == 0
    assert dirty(v2, START) == 0
    for _ in range(2):
        bitmap.view[:16] = bytes(16)
        assert get_dirty(v2, IOVA, 70 * PAGE, bitmap.address, 16) == 0
        assert words(bitmap, 3) == [2**64 - 1, 2**6 - 1, 2**64 - 1]


def test_without_a_mapping_the_bitmap_is_untouched(v2, bitmap):
    assert dirty(v2, START) == 0
    assert get_dirty(v2, IOVA, 64 * PAGE, bitmap.address, 8) == 0
    assert words(bitmap, 1) == [2**64 - 1]


def test_bits_of_several_mappings_are_each_in_their_place(v2, memory, bitmap):
    bitmap.view[:] = bytes(PAGE)
    for start, pages in ((3, 2), (70, 1), (128, 64)):
        assert v2.map(memory.address, IOVA + start * PAGE, pages * PAGE) == 0
    assert dirty(v2, START) == 0
    assert get_dirty(v2, IOVA, 256 * PAGE, bitmap.address, 32) == 0
    assert words(bitmap, 5) == [0b11 << 3, 1 << 6, 2**64 - 1, 0, 0]


def test_words_that_a_shifted_mapping_begins_or_ends_in(v2, memory, bitmap):
    """What was in the first word stays, even above the mapping; the rest of the last word is cleared."""
    bitmap.view[:24] = b"\x0f\0\0\0\0\0\0\xf0" + b"\xff" * 16
    assert v2.map(memory.address, IOVA + 8 * PAGE, 60 * PAGE) == 0
    assert dirty(v2, START) == 0
    assert get_dirty(v2, IOVA, 128 * PAGE, bitmap.address, 16) == 0
    assert words(bitmap, 3) == [0xFFFF_FFFF_FFFF_FF0F, 0xF, 2**64 - 1]


@pytest.mark.parametrize("shift", [1, 8, 63])
@pytest.mark.parametrize("times", [2, 3])
def test_bits_left_over_from_a_shifted_answer_show_again(v2, memory, bitmap, shift, times):
    assert v2.map(memory.address, IOVA + shift * PAGE, 3 * PAGE) == 0
    assert dirty(v2, START) == 0
    for _ in range(times):
        bitmap.view[:16] = bytes(16)
        assert get_dirty(v2, IOVA, 128 * PAGE, bitmap.address, 16) == 0
    assert words(bitmap, 2) == leftover(shift, times)


def leftover(shift, times):
    """A mapping of three pages, its bits shifted each time, of which only the three lowest are cleared."""
    length = -(-(3 + shift) // 64) * 64
    bits = 0
    for _ in range(times):
        bits = (bits | 0b111) << shift & (1 << length) - 1
        shown = bits
        bits &= ~0b111
    return [shown & 2**64 - 1, shown >> 64]


@pytest.mark.parametrize(
    ("iova", "size", "bytes_", "page"),
    [
        (0, 64, 0, PAGE),
        (0, 65, 8, PAGE),
        (0, 64, (1 << 28) + 8, PAGE),
        (0, 64, 8, 2 * PAGE),
        (0, 64, 8, 0),
        (0, 64, 4096, 1),
        (0, 0, 8, PAGE),
        (0.5, 64, 8, PAGE),
        (0, 63.5, 8, PAGE),
        (1, 64, 8, PAGE),
        (-1, 32, 8, PAGE),
    ],
)
def test_bitmap_of_the_wrong_size_or_range_raises_einval(v2, memory, bitmap, iova, size, bytes_, page):
    assert v2.map(memory.address, IOVA, 64 * PAGE) == 0
    assert dirty(v2, START) == 0
    asked = (IOVA + int(iova * PAGE), int(size * PAGE), bitmap.address, bytes_, page)
    assert get_dirty(v2, *asked) == -errno.EINVAL


def test_bitmap_that_cannot_be_written_raises_efault(v2, memory):
    assert v2.map(memory.address, IOVA, 64 * PAGE) == 0
    assert dirty(v2, START) == 0
    assert get_dirty(v2, IOVA, 64 * PAGE, NOWHERE, 8) == -errno.EFAULT
    assert get_dirty(v2, IOVA, 64 * PAGE, 1 << 63, 8) == -errno.EINVAL


def test_unmap_with_a_bitmap(v2, memory, bitmap):
    assert v2.map(memory.address, IOVA, 3 * PAGE) == 0
    assert unmap_dirty(v2, IOVA, 3 * PAGE, bitmap.address, 8) == (-errno.EINVAL, 3 * PAGE)
    assert dirty(v2, START) == 0
    assert unmap_dirty(v2, IOVA, 3 * PAGE, bitmap.address, 8) == (0, 3 * PAGE)
    assert words(bitmap, 2) == [0b111, 2**64 - 1]
    assert unmap_dirty(v2, IOVA, 3 * PAGE, bitmap.address, 8) == (0, 0)


def test_unmap_with_a_bitmap_and_another_flag_or_a_wrong_size_raises_einval(v2, memory, bitmap):
    assert v2.map(memory.address, IOVA, 3 * PAGE) == 0
    assert dirty(v2, START) == 0
    for change in (
        {"flags": GET_BITMAP | ALL},
        {"flags": GET_BITMAP | VADDR},
        {"argsz": 47},
        {"page": 2 * PAGE},
        {"bitmap": 0},
        {"bitmap": (1 << 28) + 8},
    ):
        asked = {"data": bitmap.address, "bitmap": 8} | change
        assert unmap_dirty(v2, IOVA, 3 * PAGE, **asked) == (-errno.EINVAL, 3 * PAGE)
    assert unmap_dirty(v2, IOVA, 3 * PAGE, NOWHERE, 8) == (-errno.EFAULT, 3 * PAGE)
    assert unmap(v2, IOVA, 3 * PAGE) == (0, 3 * PAGE)
