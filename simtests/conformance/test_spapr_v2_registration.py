"""sPAPR TCE v2: registering memory."""

import errno

import pytest

from simtests.conformance import areas
from simtests.conformance.raw import NOWHERE, V2
from vfio import uapi

pytestmark = pytest.mark.power

IOVA = 0x100000


@pytest.fixture
def memory(program):
    return program.memory(16 * program.page)


# --- REGISTER ---


def test_register_charges_the_pages_and_unregister_gives_them_back(program, v2, memory):
    for _ in range(2):
        assert v2.register(memory.address, memory.length) == 0
        assert program.locked == memory.length
        assert v2.unregister(memory.address, memory.length) == 0
        assert program.locked == 0


def test_registered_memory_is_locked_memory_and_not_pinned_memory(program, v2, memory):
    """VmLck of /proc/PID/status counts it, VmPin does not."""
    assert v2.register(memory.address, memory.length) == 0
    status = dict(line.split(":", 1) for line in program.backend.read_text("/proc/self/status").splitlines())
    assert (status["VmLck"].split(), status["VmPin"].split()) == ([f"{memory.length >> 10}", "kB"], ["0", "kB"])


def test_register_enables_the_container_and_a_failed_one_does_not(program, v2, memory):
    page = program.page
    for vaddr, size in ((memory.address + 1, page), (NOWHERE * 16, page), (memory.address, 0)):
        assert v2.register(vaddr, size) < 0
        assert v2.unmap(IOVA, page) == -errno.EPERM
    assert v2.register(memory.address, page) == 0
    assert v2.unmap(IOVA, page) == 0


def test_container_stays_enabled_when_nothing_is_registered_any_more(program, v2, memory):
    assert v2.register(memory.address, memory.length) == 0
    assert v2.unregister(memory.address, memory.length) == 0
    assert v2.unmap(IOVA, program.page) == 0
    assert v2.map(memory.address, IOVA, program.page) == -errno.EINVAL


def test_register_of_a_misaligned_range_raises_einval(program, v2, memory):
    page = program.page
    for vaddr, size in ((1, page), (page // 2, page), (0, 1), (0, page + 1), (page // 2, page // 2), (512, 0)):
        assert v2.register(memory.address + vaddr, size) == -errno.EINVAL
    assert program.locked == 0


@pytest.mark.targets("powernv8-64k", "powernv9-64k", "pseries-64k")
def test_register_of_4_kib_pieces_of_a_64_kib_page_raises_einval(v2, memory):
    assert v2.register(memory.address + 4096, 65536) == -errno.EINVAL
    assert v2.register(memory.address, 4096) == -errno.EINVAL


def test_register_of_a_range_that_wraps_raises_einval(program, v2, memory):
    page = program.page
    for vaddr, size in (
        (memory.address, -memory.address % (1 << 64) + page),
        ((1 << 64) - page, 2 * page),
        (page, (1 << 64) - page),
    ):
        if vaddr + size > 1 << 64:
            assert v2.register(vaddr, size) == -errno.EINVAL
    assert program.locked == 0


def test_register_of_the_same_range_twice_raises_ebusy(program, v2, memory):
    assert v2.register(memory.address, memory.length) == 0
    for _ in range(2):
        assert v2.register(memory.address, memory.length) == -errno.EBUSY
    assert program.locked == memory.length


def test_register_of_an_overlapping_range_raises_einval(program, v2, memory):
    page = program.page
    middle = memory.address + 4 * page
    assert v2.register(middle, 4 * page) == 0
    for start, pages in ((0, 5), (7, 2), (5, 1), (4, 1), (3, 6), (4, 5), (3, 5), (4, 3)):
        assert v2.register(memory.address + start * page, pages * page) == -errno.EINVAL
        assert program.locked == 4 * page
    for start, pages in ((0, 4), (8, 8)):  # neighbours
        assert v2.register(memory.address + start * page, pages * page) == 0
    assert program.locked == memory.length


def test_register_of_size_0_raises_enomem(program, v2, memory):
    assert v2.register(memory.address, 0) == -errno.ENOMEM
    assert program.locked == 0


@pytest.mark.parametrize("size", [1 << 50, 1 << 62])
def test_register_of_an_absurd_size_raises_enomem(other_program, member, size):
    other = other_program()
    container, memory = other.attached(member, V2), other.memory(other.page)
    assert container.register(memory.address, size) == -errno.ENOMEM
    assert other.locked == 0


@pytest.mark.parametrize("kind", ["hole", "none", "read", "zero", "kernel"])
def test_register_whose_first_page_cannot_be_pinned_raises_efault(program, v2, area, kind):
    memory = area(3)
    address = {"zero": 0, "kernel": 0xC000_0000_0000_0000}.get(kind, memory.address)
    if kind == "hole":
        memory.hole(0)
    elif kind in ("none", "read"):
        memory.protect(0, areas.NONE if kind == "none" else areas.READ)
    for pages in (1, 3):
        assert v2.register(address, pages * program.page) == -errno.EFAULT
    assert program.locked == 0


@pytest.mark.parametrize("kind", ["hole", "none", "read"])
@pytest.mark.parametrize("pinned", [1, 5])
def test_register_of_a_range_with_a_bad_page_returns_how_many_came_before(program, v2, area, kind, pinned):
    memory = area(8)
    if kind == "hole":
        memory.hole(pinned)
    else:
        memory.protect(pinned, areas.NONE if kind == "none" else areas.READ)
    assert v2.register(memory.address, 8 * program.page) == pinned
    assert program.locked == 0
    assert v2.unmap(IOVA, program.page) == -errno.EPERM  # not enabled
    assert v2.register(memory.address, pinned * program.page) == 0
    assert v2.register(memory.address + (pinned + 1) * program.page, (7 - pinned) * program.page) == 0


def test_overlap_is_found_after_the_pages_are_pinned(program, v2, area):
    memory = area(8)
    assert v2.register(memory.address, 4 * program.page) == 0
    memory.hole(6)
    assert v2.register(memory.address + 2 * program.page, 6 * program.page) == 4
    assert v2.register(memory.address + 2 * program.page, 4 * program.page) == -errno.EINVAL
    assert program.locked == 4 * program.page


def test_private_memory_can_be_registered_as_well_as_shared(program, v2, area):
    private = area(4)
    assert v2.register(private.address, 4 * program.page) == 0
    assert v2.map(private.address, IOVA, 4 * program.page) == 0
    assert v2.unmap(IOVA, 4 * program.page) == 0
    assert v2.unregister(private.address, 4 * program.page) == 0


def test_memory_of_a_file_can_be_registered_up_to_its_end(program, v2, area):
    memory = area(4)
    memory.file(0, 4, 2 * program.page)
    assert v2.register(memory.address, 4 * program.page) == 2
    assert v2.register(memory.address + 2 * program.page, 2 * program.page) == -errno.EFAULT
    assert program.locked == 0
    assert v2.register(memory.address, 2 * program.page) == 0


# --- limits ---


def test_register_beyond_the_limit_raises_enomem(other_program, member):
    other = other_program(memlock=256 << 10, ipc_lock=False)
    container, memory = other.attached(member, V2), other.memory(512 << 10)
    assert container.register(memory.address, 512 << 10) == -errno.ENOMEM
    assert other.locked == 0
    assert container.register(memory.address, 256 << 10) == 0
    assert container.register(memory.address + (256 << 10), other.page) == -errno.ENOMEM
    assert container.unregister(memory.address, 256 << 10) == 0
    assert container.register(memory.address + (256 << 10), other.page) == 0


def test_limit_of_0_refuses_every_registration(other_program, member):
    other = other_program(memlock=0, ipc_lock=False)
    container, memory = other.attached(member, V2), other.memory(other.page)
    assert container.register(memory.address, other.page) == -errno.ENOMEM
    assert other.locked == 0


def test_limit_comes_before_the_memory_is_looked_at(other_program, member):
    other = other_program(memlock=4 * 65536, ipc_lock=False)
    container = other.attached(member, V2)
    assert container.register(0x10000, 5 * 65536) == -errno.ENOMEM
    assert container.register(0x10000, 4 * 65536) == -errno.EFAULT
    assert other.locked == 0


def test_cap_ipc_lock_lifts_the_limit_but_not_the_charge(other_program, member):
    other = other_program(memlock=0, ipc_lock=True)
    container, memory = other.attached(member, V2), other.memory(4 * other.page)
    assert container.register(memory.address, memory.length) == 0
    assert other.locked == memory.length


def test_limit_counts_whole_pages(other_program, member):
    other = other_program(memlock=3 * 65536 - 1, ipc_lock=False)
    container, memory = other.attached(member, V2), other.memory(4 * 65536)
    fitting = (3 * 65536 - 1) // other.page * other.page
    assert container.register(memory.address, fitting + other.page) == -errno.ENOMEM
    assert container.register(memory.address, fitting) == 0


# --- UNREGISTER ---


def test_unregister_of_a_misaligned_range_raises_einval(program, v2, memory):
    page = program.page
    assert v2.register(memory.address, memory.length) == 0
    for vaddr, size in ((1, page), (page // 2, page), (0, 1), (0, memory.length - 1)):
        assert v2.unregister(memory.address + vaddr, size) == -errno.EINVAL


def test_unregister_of_anything_but_an_exact_region_raises_enoent(program, v2, memory):
    page = program.page
    assert v2.register(memory.address + page, 4 * page) == 0
    for start, pages in ((1, 3), (1, 5), (2, 3), (0, 5), (8, 1), (1, 0), (0, 0)):
        assert v2.unregister(memory.address + start * page, pages * page) == -errno.ENOENT
    assert program.locked == 4 * page
    assert v2.unregister(memory.address + page, 4 * page) == 0
    assert v2.unregister(memory.address + page, 4 * page) == -errno.ENOENT


def test_unregister_before_anything_was_registered_raises_eperm(program, v2, memory):
    assert v2.unregister(memory.address, memory.length) == -errno.EPERM
    assert v2.unregister(1, 1) == -errno.EPERM
    assert v2.ioctl(uapi.VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY, NOWHERE) == -errno.EPERM
    assert v2.register(memory.address, 0) == -errno.ENOMEM  # which makes this process the owner
    assert v2.unregister(memory.address, memory.length) == -errno.ENOENT
    assert v2.unregister(1, 1) == -errno.EINVAL


# --- two containers of one process ---


@pytest.fixture
def two(program, v2, second):
    return v2, program.attached(second, V2)


def test_region_is_shared_by_containers_and_charged_once(program, two, memory):
    one, other = two
    assert one.register(memory.address, memory.length) == 0
    assert other.register(memory.address, memory.length) == 0
    assert program.locked == memory.length
    assert other.register(memory.address, memory.length) == -errno.EBUSY
    assert one.unregister(memory.address, memory.length) == 0
    assert program.locked == memory.length
    assert one.unregister(memory.address, memory.length) == -errno.ENOENT
    assert other.unregister(memory.address, memory.length) == 0
    assert program.locked == 0


def test_region_of_another_container_is_not_ours_to_unregister(program, two, memory):
    one, other = two
    assert one.register(memory.address, 8 * program.page) == 0
    assert other.register(memory.address + 8 * program.page, program.page) == 0
    assert other.unregister(memory.address, 8 * program.page) == -errno.ENOENT


def test_region_of_another_container_is_in_the_way(program, two, memory):
    one, other = two
    assert one.register(memory.address, 8 * program.page) == 0
    assert other.register(memory.address + 4 * program.page, 8 * program.page) == -errno.EINVAL
    assert other.unmap(IOVA, program.page) == -errno.EPERM


def test_region_of_another_container_can_be_mapped_once_this_one_is_enabled(program, two, memory):
    one, other = two
    assert one.register(memory.address, 8 * program.page) == 0
    assert other.map(memory.address, IOVA, program.page) == -errno.EPERM
    assert other.register(memory.address + 8 * program.page, program.page) == 0
    assert other.map(memory.address, IOVA, 9 * program.page) == 0
    assert other.unmap(IOVA, 9 * program.page) == 0


def test_region_outlives_the_container_that_registered_it_first(program, two, memory):
    one, other = two
    assert one.register(memory.address, memory.length) == 0
    assert other.register(memory.address, memory.length) == 0
    assert one.group.unset_container() == 0
    assert program.locked == memory.length
    assert other.map(memory.address, IOVA, memory.length) == 0
    assert other.group.unset_container() == 0
    assert program.locked == 0


def test_regions_are_those_of_a_process(program, other_program, v2, second, memory):
    other = other_program()
    theirs, their_memory = other.attached(second, V2), other.memory(4 * other.page)
    assert theirs.register(their_memory.address, 4 * other.page) == 0
    assert v2.register(memory.address, memory.length) == 0
    assert program.locked == memory.length
    assert other.locked == 4 * other.page


# --- unregistering what is mapped: the kernel forgets the region, and keeps it ---


@pytest.fixture
def leaked(other_program, member):
    """A process that unregistered memory while it was mapped, its container and the memory."""
    other = other_program()
    container, memory = other.attached(member, V2), other.memory(4 * other.page)
    assert container.register(memory.address, memory.length) == 0
    assert container.map(memory.address, IOVA, other.page) == 0
    before = other.locked
    assert container.unregister(memory.address, memory.length) == 0
    assert other.locked == before
    return other, container, memory


@pytest.mark.leaks
def test_unregister_of_mapped_memory_is_0_and_forgets_it(leaked):
    other, container, memory = leaked
    assert container.unregister(memory.address, memory.length) == -errno.ENOENT
    assert container.register(memory.address, other.page) == -errno.EINVAL


@pytest.mark.leaks
def test_forgotten_memory_can_still_be_mapped(leaked):
    _, container, memory = leaked
    assert container.map(memory.address, 2 * IOVA, memory.length) == 0
    assert container.unmap(2 * IOVA, memory.length) == 0


@pytest.mark.leaks
def test_forgotten_memory_stays_charged_when_nothing_is_mapped_any_more(leaked):
    other, container, memory = leaked
    before = other.locked
    assert container.unmap(IOVA, other.page) == 0
    assert other.locked == before
    assert container.unregister(memory.address, memory.length) == -errno.ENOENT
    assert container.group.unset_container() == 0
    assert other.locked == memory.length


@pytest.mark.leaks
def test_forgotten_memory_is_registered_again_without_a_charge(leaked):
    other, container, memory = leaked
    before = other.locked
    assert container.register(memory.address, memory.length) == 0
    assert other.locked == before
    assert container.register(memory.address, memory.length) == -errno.EBUSY
    assert container.unmap(IOVA, other.page) == 0
    assert container.unregister(memory.address, memory.length) == 0


@pytest.mark.leaks
def test_one_of_two_holders_of_mapped_memory_leaves_it_to_the_other(other_program, member, second):
    other = other_program()
    one, two = other.attached(member, V2), other.attached(second, V2)
    memory = other.memory(4 * other.page)
    for container in (one, two):
        assert container.register(memory.address, memory.length) == 0
    assert one.map(memory.address, IOVA, memory.length) == 0
    before = other.locked
    assert one.unregister(memory.address, memory.length) == 0
    assert other.locked == before
    assert one.unmap(IOVA, memory.length) == 0
    assert two.unregister(memory.address, memory.length) == 0
    assert other.locked == before - memory.length
