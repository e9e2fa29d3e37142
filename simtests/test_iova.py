"""The IOVA allocator, against a plain set of pages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio.iova import IovaAllocator

PAGE = 0x1000


def test_first_allocation_is_never_iova_0():
    assert IovaAllocator(0, 16 * PAGE).allocate(PAGE, PAGE) == PAGE


def test_iova_0_can_be_reserved_by_name():
    free = IovaAllocator(0, 16 * PAGE)
    assert free.reserve(0, PAGE)
    assert not free.reserve(0, PAGE)


def test_allocation_is_aligned():
    free = IovaAllocator(0x1000, 1 << 24)
    assert free.allocate(0x1000, 0x10000) == 0x10000


def test_full_range_allocates_nothing():
    free = IovaAllocator(1 << 59, 2 * PAGE)
    assert free.allocate(2 * PAGE, PAGE) == 1 << 59
    assert free.allocate(PAGE, PAGE) is None
    assert free.largest == 0


@pytest.mark.parametrize(("start", "length"), [(PAGE, 16 * PAGE), (16 * PAGE, PAGE), (15 * PAGE, 2 * PAGE)])
def test_range_outside_is_not_reserved(start, length):
    free = IovaAllocator(0, 16 * PAGE)
    assert not free.reserve(start, length)
    assert free.largest == 16 * PAGE


STEPS = st.lists(
    st.tuples(st.sampled_from(["allocate", "reserve", "free"]), st.integers(0, 31), st.integers(1, 8)), max_size=60
)


@given(STEPS)
def test_agrees_with_a_set_of_pages(steps):
    free, used, held = IovaAllocator(0, 32), set(), []
    for action, start, length in steps:
        if action == "free":
            if held:
                at, count = held.pop(start % len(held))
                free.free(at, count)
                used -= set(range(at, at + count))
            continue
        if action == "reserve":
            wanted = set(range(start, start + length))
            taken = free.reserve(start, length)
            assert taken == (not wanted & used and max(wanted) < 32)
            at = start if taken else None
        else:
            at = free.allocate(length, 1)
            fits = [n for n in range(1, 33 - length) if not set(range(n, n + length)) & used]
            assert at == (fits[0] if fits else None)
        if at is not None:
            held.append((at, length))
            used |= set(range(at, at + length))
    runs = "".join("u" if page in used else "f" for page in range(32)).split("u")
    assert free.largest == max(map(len, runs))


def test_of_several_ranges_the_gap_between_is_never_given():
    free = IovaAllocator.of_ranges([(0, 0x4000), (0x6000, 0x9000)])
    assert [free.allocate(0x2000, 0x1000) for _ in range(3)] == [0x1000, 0x6000, None]
    assert not free.reserve(0x3000, 0x4000)
    assert free.reserve(0x3000, 0x1000)
    free.free(0x3000, 0x1000)
    free.free(0x6000, 0x2000)
    assert free.largest == 0x3000
