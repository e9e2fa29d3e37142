"""The modelled sPAPR driver, version 2: registration and windows.  (Spec: sections 4.4 to 4.8.)"""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest
from spapr_host import PAGE, Buffer, Host, User

from vfio import uapi

GIB = 1 << 30
MIB16 = 16 << 20
WINDOW = 2 * GIB
SECOND = 1 << 59
DEFAULT_TABLE = 8192  # kB


@pytest.fixture
def buffer() -> Buffer:
    return Buffer(64 * PAGE)


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def user(host: Host) -> User:
    user = User(host)
    user.attach(0)
    return user


@pytest.fixture
def neighbour(host: Host, user: User) -> User:
    """A second container of the same process."""
    neighbour = User(host)
    neighbour.attach(1)
    return neighbour


def regions(user: User) -> list[tuple[int, int, int]]:
    """Size, holders and TCEs of all regions."""
    found = user.host.vfio.describe()["processes"]
    return [(r["size"], r["holders"], r["mapped"]) for p in found for r in p["regions"]]


# --- registration ---


def test_register_charges_and_unregister_gives_back(user: User, buffer: Buffer) -> None:
    assert user.register(buffer.address, buffer.size) == 0
    assert user.locked == buffer.size >> 10
    assert user.register(buffer.address, buffer.size) == "EBUSY"
    assert user.unregister(buffer.address, buffer.size) == 0
    assert user.locked == 0
    assert regions(user) == []


@pytest.mark.parametrize(("into", "size"), [(1, PAGE), (0, PAGE + 1), (PAGE // 2, PAGE)])
def test_register_wants_whole_pages(user: User, buffer: Buffer, into: int, size: int) -> None:
    assert user.register(buffer.address + into, size) == "EINVAL"
    assert user.unregister(buffer.address + into, size) == "EINVAL"


def test_pages_are_those_of_the_host(buffer: Buffer) -> None:
    user = User(Host(page_size=65536))
    user.attach(0)
    assert user.register(buffer.address + PAGE, 65536) == "EINVAL"
    assert user.register(buffer.address, 65536) == 0


def test_a_range_that_wraps_is_einval(user: User) -> None:
    assert user.register((1 << 64) - PAGE, PAGE) == "EINVAL"


def test_register_looks_at_its_argument(user: User) -> None:
    assert user.call(user.container, uapi.VFIO_IOMMU_SPAPR_REGISTER_MEMORY, 0x10) == "EFAULT"
    short = uapi.vfio_iommu_spapr_register_memory(argsz=23)
    assert user.call(user.container, uapi.VFIO_IOMMU_SPAPR_REGISTER_MEMORY, short) == "EINVAL"
    assert user.register(0, PAGE, flags=1) == "EINVAL"
    assert user.unregister(0, PAGE, flags=1) == "EINVAL"
    assert user.map(0, 0, 0) == "EPERM"  # none of them enabled it


def test_nothing_and_the_absurd_are_enomem(user: User, buffer: Buffer) -> None:
    assert user.register(buffer.address, 0) == "ENOMEM"
    assert user.register(buffer.address, 1 << 46) == "ENOMEM"
    assert user.locked == 0


def test_memory_that_cannot_be_pinned_is_efault(user: User, buffer: Buffer) -> None:
    buffer.protect(0, PAGE, mmap.PROT_READ)
    assert user.register(buffer.address, PAGE) == "EFAULT"
    assert user.register(0x10000, PAGE) == "EFAULT"
    assert user.register(0xC000000000000000, PAGE) == "EFAULT"
    assert user.locked == 0


def test_a_hole_answers_how_many_pages_come_before_it(user: User, buffer: Buffer) -> None:
    buffer.protect(5 * PAGE, PAGE, 0)
    assert user.register(buffer.address, 16 * PAGE) == 5
    assert (user.locked, regions(user)) == (0, [])
    assert user.map(buffer.address, 0x1000, PAGE) == "EPERM"


@pytest.mark.parametrize(("first", "last"), [(0, 5), (7, 12), (5, 6), (0, 16)])
def test_an_overlap_is_einval_from_any_container(
    user: User, neighbour: User, buffer: Buffer, first: int, last: int
) -> None:
    user.register(buffer.address + 4 * PAGE, 4 * PAGE)
    for each in (user, neighbour):
        assert each.register(buffer.address + first * PAGE, (last - first) * PAGE) == "EINVAL"
    assert user.locked == 16


def test_an_overlap_with_a_hole_answers_the_hole(user: User, buffer: Buffer) -> None:
    user.register(buffer.address, 4 * PAGE)
    buffer.protect(8 * PAGE, PAGE, 0)
    assert user.register(buffer.address, 12 * PAGE) == 8


def test_the_limit_counts_and_is_exact(buffer: Buffer) -> None:
    host = Host()
    user = User(host, host.new_process(pid=os.getpid(), memlock=8 * PAGE, ipc_lock=False))
    user.attach(0)
    assert user.register(buffer.address, 9 * PAGE) == "ENOMEM"
    assert user.register(buffer.address, 8 * PAGE) == 0
    assert user.register(buffer.address + 8 * PAGE, PAGE) == "ENOMEM"
    assert user.create(12, 1 << 20)[0] == "ENOMEM"
    assert user.locked == 32


def test_what_is_registered_is_shared_and_charged_once(user: User, neighbour: User, buffer: Buffer) -> None:
    assert user.register(buffer.address, PAGE) == 0
    assert neighbour.register(buffer.address, PAGE) == 0
    assert (user.locked, regions(user)) == (4, [(PAGE, 2, 0)])
    assert user.unregister(buffer.address, PAGE) == 0
    assert user.unregister(buffer.address, PAGE) == "ENOENT"
    assert user.locked == 4
    assert neighbour.unregister(buffer.address, PAGE) == 0
    assert user.locked == 0


def test_unregister_wants_the_exact_range(user: User, neighbour: User, buffer: Buffer) -> None:
    assert user.unregister(buffer.address, PAGE) == "EPERM"  # no owner yet
    user.register(buffer.address, 4 * PAGE)
    neighbour.register(buffer.address + 32 * PAGE, PAGE)
    for address, size in ((0, 3), (1, 3), (0, 8), (0, 0), (32, 1)):
        assert user.unregister(buffer.address + address * PAGE, size * PAGE) == "ENOENT"


def test_memory_registered_elsewhere_can_be_mapped_once_enabled(user: User, neighbour: User, buffer: Buffer) -> None:
    user.register(buffer.address, 8 * PAGE)
    assert neighbour.map(buffer.address, 0x1000, PAGE) == "EPERM"
    neighbour.register(buffer.address + 32 * PAGE, PAGE)
    assert neighbour.map(buffer.address, 0x1000, PAGE) == 0


def test_unregistering_what_is_mapped_leaks_it_until_the_process_ends(user: User, host: Host, buffer: Buffer) -> None:
    user.register(buffer.address, 4 * PAGE)
    user.map(buffer.address, 0x1000, PAGE)
    assert user.unregister(buffer.address, 4 * PAGE) == 0
    assert user.unregister(buffer.address, 4 * PAGE) == "ENOENT"
    assert user.locked == 16 + DEFAULT_TABLE
    assert user.map(buffer.address + PAGE, 0x2000, PAGE) == 0
    assert user.register(buffer.address, 8 * PAGE) == "EINVAL"
    assert any("leaked" in line for line in host.vfio.held())
    assert user.register(buffer.address, 4 * PAGE) == 0
    assert user.unmap(0, 0x10000) == 0
    assert user.unregister(buffer.address, 4 * PAGE) == 0
    assert user.locked == 16 + DEFAULT_TABLE  # nothing maps it, and yet it is never freed
    group = host.vfio.groups[0].opened_file
    assert group is not None
    user.unset_container(group)
    assert user.locked == 16
    host.vfio.process_gone(user.process)
    assert regions(user) == []


def test_what_another_container_maps_leaks_with_the_container_that_registered_it(
    user: User, neighbour: User, host: Host, buffer: Buffer
) -> None:
    user.register(buffer.address, 4 * PAGE)
    neighbour.register(buffer.address + 32 * PAGE, PAGE)
    neighbour.map(buffer.address, 0x1000, PAGE)
    group = host.vfio.groups[0].opened_file
    assert group is not None
    user.unset_container(group)
    assert regions(user) == [(4 * PAGE, 1, 1), (PAGE, 1, 0)]


# --- what may be mapped ---


def test_a_page_has_to_lie_in_one_region_and_different_pages_may_not(user: User, buffer: Buffer) -> None:
    user.register(buffer.address, 4 * PAGE)
    user.register(buffer.address + 4 * PAGE, 4 * PAGE)
    assert user.map(buffer.address + 2 * PAGE, 0x1000, 4 * PAGE) == 0
    assert regions(user) == [(4 * PAGE, 1, 2), (4 * PAGE, 1, 2)]
    assert user.unmap(0x2000, 2 * PAGE) == 0
    assert regions(user) == [(4 * PAGE, 1, 1), (4 * PAGE, 1, 1)]


def test_a_large_page_does_not_span_regions() -> None:
    memory = Buffer(65536)
    start = memory.address
    host = Host()
    host.process.memory.add_large(start, 65536, 65536)
    user = User(host)
    user.attach(0)
    user.register(start, 32768)
    user.register(start + 32768, 32768)
    user.create(16, GIB)
    assert user.map(start, SECOND, 65536) == "EINVAL"


def test_a_replaced_entry_gives_its_region_back(user: User, buffer: Buffer) -> None:
    user.register(buffer.address, 4 * PAGE)
    user.register(buffer.address + 8 * PAGE, 4 * PAGE)
    user.map(buffer.address, 0x1000, 4 * PAGE)
    user.map(buffer.address + 8 * PAGE, 0x2000, 2 * PAGE)
    assert regions(user) == [(4 * PAGE, 1, 2), (4 * PAGE, 1, 2)]
    user.map(buffer.address, 0x1000, 4 * PAGE)  # the same again
    assert regions(user) == [(4 * PAGE, 1, 4), (4 * PAGE, 1, 0)]


def test_a_partial_failure_clears_this_calls_entries_and_not_the_rest(user: User, host: Host, buffer: Buffer) -> None:
    user.register(buffer.address, 4 * PAGE)
    assert user.map(buffer.address, 0x1000, 4 * PAGE) == 0
    assert user.map(buffer.address + 2 * PAGE, 0x1000, 4 * PAGE) == "EINVAL"
    windows = host.vfio.describe()["containers"][0]["windows"]
    assert [(run["iova"], run["size"]) for run in windows[0]["mappings"]] == [(0x3000, 2 * PAGE)]
    assert regions(user) == [(4 * PAGE, 1, 2)]


@pytest.mark.parametrize(
    ("page_size", "large", "answers"),
    [
        (4096, 4096, {12: 0, 16: "EINVAL", 24: "EINVAL"}),
        (65536, 65536, {12: 0, 16: 0, 24: "EINVAL"}),
        (65536, MIB16, {12: 0, 16: 0, 24: 0}),
    ],
    ids=["4K", "64K", "64K-hugetlb"],
)
def test_a_window_page_is_no_larger_than_the_page_behind_it(
    page_size: int, large: int, answers: dict[int, int | str]
) -> None:
    host = Host(page_size=page_size)
    memory = Buffer(MIB16, align=MIB16)
    start = memory.address
    if large == MIB16:
        host.process.memory.add_large(start, MIB16, MIB16)
    user = User(host)
    user.attach(0)
    assert user.register(start, MIB16) == 0
    for shift, answer in answers.items():
        user.create(shift, GIB)
        assert user.map(start, SECOND, 1 << shift) == answer
        user.remove(SECOND)


def test_hugetlb_registered_off_its_boundary_counts_as_small_pages() -> None:
    host = Host(page_size=65536)
    memory = Buffer(2 * MIB16, align=MIB16)
    start = memory.address
    host.process.memory.add_large(start, 2 * MIB16, MIB16)
    user = User(host)
    user.attach(0)
    assert user.register(start + 65536, 2 * MIB16 - 65536) == 0
    user.create(24, GIB)
    assert user.map(start + MIB16, SECOND, MIB16) == "EINVAL"


def test_ordinary_pages_behind_a_huge_one_claim_too_much_and_fail_later() -> None:
    host = Host(page_size=65536)
    memory = Buffer(2 * MIB16, align=MIB16)
    start = memory.address
    host.process.memory.add_large(start, MIB16, MIB16)
    user = User(host)
    user.attach(0)
    user.register(start, 2 * MIB16)
    user.create(24, GIB)
    assert user.map(start, SECOND, MIB16) == 0
    assert user.map(start + MIB16, SECOND, MIB16) == "EPERM"
    assert user.map(start, SECOND, 2 * MIB16) == "EPERM"
    assert host.vfio.describe()["containers"][0]["windows"][1]["mapped"] == 0


def test_ordinary_pages_before_a_huge_one_make_all_small() -> None:
    host = Host(page_size=65536)
    memory = Buffer(2 * MIB16, align=MIB16)
    host.process.memory.add_large(memory.address + MIB16, MIB16, MIB16)
    user = User(host)
    user.attach(0)
    assert user.register(memory.address, 2 * MIB16) == 0
    assert host.vfio.describe()["processes"][0]["regions"][0]["largest_page"] == 65536


def test_mapping_a_terabyte_is_one_run_and_one_look_at_the_regions() -> None:
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    size, reserve = 1 << 40, 0x4000  # MAP_NORESERVE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve
    address = libc.mmap(None, ctypes.c_size_t(size), 3, flags, -1, ctypes.c_long(0))
    host = Host()
    user = User(host)
    user.attach(0)
    assert user.register(address, size) == 0
    assert user.create(12, 1 << 41, 3) == (0, SECOND)
    assert user.map(address, SECOND, size) == 0
    assert regions(user) == [(size, 1, size // PAGE)]
    window = host.vfio.describe()["containers"][0]["windows"][1]
    assert (window["extents"], window["mapped"]) == (1, size)
    assert user.unmap(SECOND + PAGE, size) == 0
    assert regions(user) == [(size, 1, 1)]
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))


# --- windows ---


def test_the_default_window_comes_with_the_first_need(user: User, buffer: Buffer) -> None:
    assert user.create(99, GIB)[0] == "EINVAL"  # but the default window is there
    assert user.locked == DEFAULT_TABLE
    assert user.remove(WINDOW - 1) == 0  # any address in it
    assert user.locked == 0
    user.register(buffer.address, PAGE)
    assert user.map(buffer.address, 0x1000, PAGE) == "ENXIO"  # it does not come back


def test_a_pending_default_window_is_removed_without_ever_being_made(user: User, buffer: Buffer) -> None:
    assert user.remove(PAGE) == "EINVAL"
    assert user.remove(0) == 0
    assert user.remove(0) == "EINVAL"
    assert user.locked == 0
    user.register(buffer.address, PAGE)
    assert user.unmap(0x1000, PAGE) == "ENXIO"


def test_a_default_window_that_cannot_be_paid_stays_pending(buffer: Buffer) -> None:
    host = Host()
    user = User(host, host.new_process(pid=os.getpid(), memlock=4 << 20, ipc_lock=False))
    user.attach(0)
    user.register(buffer.address, PAGE)
    for _ in range(2):
        assert user.map(buffer.address, 0x1000, PAGE) == "ENOMEM"
        assert user.unmap(0x1000, PAGE) == "ENOMEM"
        assert user.create(16, 1 << 20)[0] == "ENOMEM"
    user.process.memlock = None
    assert user.map(buffer.address, 0x1000, PAGE) == 0


def test_create_looks_at_its_argument_and_writes_all_of_it_back(user: User) -> None:
    assert user.call(user.container, uapi.VFIO_IOMMU_SPAPR_TCE_CREATE, 0x10) == "EFAULT"
    for fields in ({"argsz": 39}, {"flags": 1}):
        arg = uapi.vfio_iommu_spapr_tce_create(**fields)
        assert user.call(user.container, uapi.VFIO_IOMMU_SPAPR_TCE_CREATE, arg) == "EINVAL"
    assert user.locked == 0
    arg = uapi.vfio_iommu_spapr_tce_create(page_shift=16, window_size=GIB, levels=1)
    data = uapi.buffer(arg)
    data[12:16] = data[28:32] = b"\xaa\xbb\xcc\xdd"  # reserved, and left alone
    assert user.call(user.container, uapi.VFIO_IOMMU_SPAPR_TCE_CREATE, data) == 0
    assert arg.start_addr == SECOND
    assert bytes(data[12:16]) + bytes(data[28:32]) == b"\xaa\xbb\xcc\xdd" * 2


def test_create_that_cannot_answer_has_created(user: User, buffer: Buffer) -> None:
    arg = uapi.vfio_iommu_spapr_tce_create(page_shift=16, window_size=GIB, levels=1)
    buffer[0:40] = bytes(uapi.buffer(arg))
    buffer.protect(0, PAGE, mmap.PROT_READ)
    assert user.call(user.container, uapi.VFIO_IOMMU_SPAPR_TCE_CREATE, buffer.address) == "EFAULT"
    assert user.remove(SECOND) == 0


def test_remove_looks_at_its_argument(user: User) -> None:
    assert user.call(user.container, uapi.VFIO_IOMMU_SPAPR_TCE_REMOVE, 0x10) == "EFAULT"
    assert user.remove(0, flags=1) == "EINVAL"
    assert user.remove(0) == 0  # still pending


def test_two_windows_are_all_and_slots_decide_where_they_are(user: User) -> None:
    assert user.create(16, GIB) == (0, SECOND)
    assert user.create(99, 0, 0)[0] == "ENOSPC"
    assert user.remove(0x1234) == 0
    assert user.create(24, 1 << 40) == (0, 0)
    assert user.remove(SECOND + GIB - 1) == 0
    assert user.create(12, 1 << 20) == (0, SECOND)


def test_a_window_is_never_smaller_than_a_page_of_tces(user: User, buffer: Buffer) -> None:
    user.register(buffer.address, PAGE)
    user.remove(0)
    assert user.create(12, PAGE) == (0, 0)
    assert user.map(buffer.address, (2 << 20) - PAGE, PAGE) == 0
    assert user.map(buffer.address, 2 << 20, PAGE) == "ENXIO"


def test_a_refused_geometry_keeps_its_charge(user: User, host: Host) -> None:
    user.remove(0)
    assert user.create(12, 1 << 40, 5)[0] == "EINVAL"
    leaked = user.locked
    assert leaked > 0
    assert user.create(12, 1 << 34, 1)[0] == "ENOMEM"
    assert user.locked == leaked + 65536
    group = host.vfio.groups[0].opened_file
    assert group is not None
    user.unset_container(group)
    assert user.locked == leaked + 65536
    assert any("windows that were refused" in line for line in host.vfio.held())


def test_removing_a_window_lets_go_of_what_it_maps(user: User, buffer: Buffer) -> None:
    user.register(buffer.address, buffer.size)
    user.map(buffer.address, 0x1000, 8 * PAGE)
    assert regions(user) == [(buffer.size, 1, 8)]
    assert user.remove(0) == 0
    assert regions(user) == [(buffer.size, 1, 0)]
    assert user.unregister(buffer.address, buffer.size) == 0
    assert user.locked == 0


# --- several groups ---


def test_groups_share_windows_and_a_new_one_sees_them_at_once(user: User, host: Host, buffer: Buffer) -> None:
    user.register(buffer.address, buffer.size)
    user.map(buffer.address, 0x1000, PAGE)
    user.create(16, GIB)
    locked = user.locked
    buffer[0:4] = b"both"
    assert user.set_container(user.open_group(1)) == 0
    assert user.locked == locked
    assert [host.pe(number).dma_read(0x1000, 4) for number in (0, 1)] == [b"both", b"both"]


def test_a_group_that_leaves_clears_the_windows_of_all(user: User, host: Host, buffer: Buffer) -> None:
    user.register(buffer.address, buffer.size)
    second = user.open_group(1)
    user.set_container(second)
    user.map(buffer.address, 0x1000, PAGE)
    locked = user.locked
    buffer[0:4] = b"both"
    assert user.unset_container(second) == 0
    host.freezes = False
    assert [host.pe(number).dma_read(0x1000, 4) for number in (0, 1)] == [bytes(4), bytes(4)]
    assert (user.locked, regions(user)) == (locked, [(buffer.size, 1, 0)])
    assert user.map(buffer.address, 0x1000, PAGE) == 0
    assert host.pe(0).dma_read(0x1000, 4) == b"both"


def test_the_last_group_takes_everything_with_it(user: User, host: Host, buffer: Buffer) -> None:
    user.register(buffer.address, buffer.size)
    user.map(buffer.address, 0x1000, PAGE)
    user.create(16, GIB)
    group = host.vfio.groups[0].opened_file
    assert group is not None
    group.put()
    assert (user.locked, regions(user), host.pe(0).table_group.tables) == (0, [], [None, None])


def test_the_default_window_is_pending_again_only_after_no_group(user: User, buffer: Buffer) -> None:
    user.remove(0)
    second = user.open_group(1)
    user.set_container(second)
    user.register(buffer.address, PAGE)
    assert user.map(buffer.address, 0x1000, PAGE) == "ENXIO"
    user.unset_container(second)
    user.set_container(second)
    assert user.map(buffer.address, 0x1000, PAGE) == "ENXIO"


# --- pseries ---


@pytest.fixture
def guest() -> User:
    user = User(Host("pseries"))
    user.attach(0)
    return user


def test_pseries_windows_are_where_the_firmware_puts_them(guest: User) -> None:
    assert guest.info()[1].ddw.levels == 1
    assert guest.create(16, 1 << 28) == (0, SECOND)
    assert guest.locked == 2048 + 32
    assert guest.remove(0) == 0
    assert guest.create(12, GIB)[0] == "EPERM"  # not while the other window is there; and the charge stays
    assert guest.locked == 2048 + 32
    assert guest.remove(SECOND) == 0
    assert guest.create(12, GIB // 2) == (0, 0)
    assert guest.remove(0) == 0
    assert guest.create(16, GIB) == (0, SECOND)  # in the first slot


def test_pseries_refuses_levels_with_a_huge_charge(guest: User) -> None:
    guest.remove(0)
    assert guest.create(12, 1 << 20, 2)[0] == "EINVAL"
    assert guest.locked == 4194300


def test_a_pseries_pe_that_the_firmware_refused_is_lost_until_boot(guest: User, buffer: Buffer) -> None:
    guest.remove(0)
    assert guest.create(16, 1 << 28) == (0, SECOND)
    assert guest.create(16, 1 << 28)[0] == "ENODEV"
    assert guest.remove(SECOND) == 0
    assert guest.create(12, GIB // 2)[0] == "ENODEV"
    assert guest.locked == 32 + 1024
    group = guest.host.vfio.groups[0].opened_file
    assert group is not None
    guest.unset_container(group)
    guest.set_container(group)
    assert guest.set_iommu(7) == 0
    guest.register(buffer.address, PAGE)
    assert guest.map(buffer.address, 0x1000, PAGE) == "ENODEV"


def test_pseries_groups_cannot_share_a_window(guest: User, buffer: Buffer) -> None:
    assert guest.set_container(guest.open_group(1)) == 0
    guest.register(buffer.address, PAGE)
    assert guest.map(buffer.address, 0x1000, PAGE) == "EPERM"
    assert guest.locked == 4
    assert [guest.host.pe(number).table_group.tables for number in (0, 1)] == [[None, None], [None, None]]


def test_a_second_pseries_group_is_refused_once_there_is_a_window(guest: User, buffer: Buffer) -> None:
    guest.register(buffer.address, PAGE)
    guest.map(buffer.address, 0x1000, PAGE)
    second = guest.open_group(1)
    assert guest.set_container(second) == "EPERM"
    assert guest.status(second) == 1
    assert guest.unmap(0x1000, PAGE) == 0
