"""The modelled sPAPR driver, as both versions have it, and version 1.  (Spec: sections 4 and 5.)"""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest
from spapr_host import PAGE, Buffer, Host, User

from vfio import uapi
from vfio.fake.kernel_error import KernelWouldBeHurt
from vfio.fake.pe import MemoryGone

READ, WRITE, RW = 1, 2, 3
GIB = 1 << 30
DEFAULT_TABLE = 8192  # kB that a table for 2 GiB of 4K pages is charged with
WINDOW = 2 * GIB


@pytest.fixture
def buffer() -> Buffer:
    return Buffer(16 * PAGE)


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def v1(host: Host) -> User:
    user = User(host)
    user.attach(0, version=1)
    return user


@pytest.fixture
def v2(host: Host) -> User:
    user = User(host)
    user.attach(0)
    return user


def enable(user: User) -> int | str:
    return user.call(user.container, uapi.VFIO_IOMMU_ENABLE)


def disable(user: User) -> int | str:
    return user.call(user.container, uapi.VFIO_IOMMU_DISABLE)


# --- GET_INFO ---


def test_get_info_tells_v2_of_dynamic_windows(v2: User) -> None:
    answer, info = v2.info()
    assert (answer, info.argsz, info.flags) == (0, 32, 1)
    assert (info.dma32_window_start, info.dma32_window_size) == (0, 0x80000000)
    assert (info.ddw.pgsizes, info.ddw.max_dynamic_windows_supported, info.ddw.levels) == (0x11011000, 2, 5)


def test_get_info_tells_v1_of_the_default_window_only(v1: User) -> None:
    answer, info = v1.info()
    assert (answer, info.flags, info.dma32_window_size) == (0, 0, 0x80000000)
    assert (info.ddw.pgsizes, info.ddw.max_dynamic_windows_supported, info.ddw.levels) == (0, 0, 0)


@pytest.mark.parametrize(("argsz", "written"), [(16, 16), (31, 16), (32, 32)])
def test_get_info_writes_as_much_as_there_is_room_for(v2: User, argsz: int, written: int) -> None:
    arg = bytearray(argsz.to_bytes(4, "little") + b"\xaa" * 28)
    assert v2.call(v2.container, uapi.VFIO_IOMMU_SPAPR_TCE_GET_INFO, arg) == 0
    assert arg[8:16] == bytes(4) + (0x80000000).to_bytes(4, "little")
    assert arg[written:] == b"\xaa" * (32 - written)
    assert arg[16:written] == uapi.buffer(v2.info()[1])[16:written]


def test_get_info_looks_at_its_argument(v2: User) -> None:
    assert v2.call(v2.container, uapi.VFIO_IOMMU_SPAPR_TCE_GET_INFO, 0x10) == "EFAULT"
    assert v2.info(argsz=15)[0] == "EINVAL"


# --- v1: ENABLE and DISABLE ---


def test_enable_charges_the_whole_window_and_disable_gives_it_back(v1: User) -> None:
    assert enable(v1) == 0
    assert v1.locked == WINDOW >> 10
    assert enable(v1) == "EBUSY"
    assert disable(v1) == 0
    assert disable(v1) == 0
    assert v1.locked == 0


def test_mapping_wants_enable_before_it_looks_at_anything(v1: User, buffer: Buffer) -> None:
    assert v1.call(v1.container, uapi.VFIO_IOMMU_MAP_DMA, 0x10) == "EPERM"
    assert v1.call(v1.container, uapi.VFIO_IOMMU_UNMAP_DMA, 0x10) == "EPERM"
    enable(v1)
    assert v1.call(v1.container, uapi.VFIO_IOMMU_MAP_DMA, 0x10) == "EFAULT"
    assert v1.call(v1.container, uapi.VFIO_IOMMU_UNMAP_DMA, 0x10) == "EFAULT"
    assert v1.map(buffer.address, 0, PAGE) == 0


def test_v1_has_no_registration_and_no_windows(v1: User, buffer: Buffer) -> None:
    assert v1.register(buffer.address, PAGE) == "ENOTTY"
    assert v1.unregister(buffer.address, PAGE) == "ENOTTY"
    assert v1.create(16, GIB)[0] == "ENOTTY"
    assert v1.remove(0) == "ENOTTY"


def test_enable_past_the_limit_is_enomem() -> None:
    host = Host()
    user = User(host, host.new_process(pid=os.getpid(), memlock=WINDOW - PAGE, ipc_lock=False))
    user.attach(0, version=1)
    assert enable(user) == "ENOMEM"
    assert user.locked == 0


def test_with_room_for_the_window_only_the_first_map_is_enomem(buffer: Buffer) -> None:
    host = Host()
    user = User(host, host.new_process(pid=os.getpid(), memlock=WINDOW, ipc_lock=False))
    user.attach(0, version=1)
    assert enable(user) == 0
    assert user.map(buffer.address, 0, PAGE) == "ENOMEM"
    assert user.locked == WINDOW >> 10


def test_the_capability_lifts_the_limit_and_not_the_charge() -> None:
    host = Host()
    user = User(host, host.new_process(pid=os.getpid(), memlock=0, ipc_lock=True))
    user.attach(0, version=1)
    assert enable(user) == 0
    assert user.locked == WINDOW >> 10


def test_mappings_survive_disable(host: Host, v1: User, buffer: Buffer) -> None:
    enable(v1)
    v1.map(buffer.address, PAGE, PAGE)
    buffer[0:4] = b"kept"
    disable(v1)
    assert host.pe(0).dma_read(PAGE, 4) == b"kept"
    assert v1.locked == DEFAULT_TABLE  # the table's own account stays


def test_detaching_returns_what_enable_charged(v1: User, host: Host) -> None:
    enable(v1)
    group = host.vfio.groups[0].opened_file
    assert group is not None
    assert v1.unset_container(group) == 0
    assert v1.locked == 0


def test_v1_pins_for_writing_whatever_the_flags_say(v1: User, buffer: Buffer) -> None:
    enable(v1)
    buffer.protect(4 * PAGE, PAGE, mmap.PROT_READ)
    for flags in (READ, WRITE, RW):
        assert v1.map(buffer.address + 4 * PAGE, PAGE, PAGE, flags) == "EFAULT"
        assert v1.map(0x10000, PAGE, PAGE, flags) == "EFAULT"


def test_v1_failing_at_a_later_page_clears_the_pages_before_it(host: Host, v1: User, buffer: Buffer) -> None:
    enable(v1)
    buffer[0:3] = b"old"
    v1.map(buffer.address, PAGE, 4 * PAGE)
    buffer.protect(6 * PAGE, PAGE, 0)
    assert v1.map(buffer.address + 4 * PAGE, PAGE, 4 * PAGE) == "EFAULT"
    table = host.pe(0).table_group.tables[0]
    assert [tuple(run)[:2] for run in table.extents] == [(3, 5)]  # two of the old four are lost


def test_v1_on_64k_pages_maps_4k_pieces_of_them(buffer: Buffer) -> None:
    host = Host(page_size=65536)
    user = User(host)
    user.attach(0, version=1)
    enable(user)
    buffer[PAGE : PAGE + 4] = b"here"
    assert user.map(buffer.address + PAGE, 0x5000, PAGE) == 0
    assert host.pe(0).dma_read(0x5000, 4) == b"here"
    assert user.locked == (WINDOW >> 10) + DEFAULT_TABLE


# --- MAP and UNMAP: the order of checks ---


def test_map_checks_in_the_kernels_order(v2: User, buffer: Buffer) -> None:
    assert v2.map(buffer.address, 0x1000, PAGE) == "EPERM"
    assert v2.register(buffer.address, buffer.size) == 0
    arg = uapi.vfio_iommu_type1_dma_map(argsz=31, flags=0xFF)
    assert v2.call(v2.container, uapi.VFIO_IOMMU_MAP_DMA, arg) == "EINVAL"
    assert v2.map(buffer.address, 0x1000, PAGE, flags=4) == "EINVAL"
    assert v2.locked == 64  # no window yet
    assert v2.map(1, WINDOW, 1, flags=0) == "ENXIO"  # and the default window is there from now on
    assert v2.locked == 64 + DEFAULT_TABLE
    assert v2.map(buffer.address, 0x1001, PAGE + 1) == "EINVAL"
    assert v2.map(buffer.address + 1, 0x1001, PAGE) == "EINVAL"
    assert v2.map(buffer.address, 0x1001, PAGE, flags=0) == "EINVAL"
    assert v2.map(buffer.address, 0x1001, PAGE) == 1
    assert v2.map(0x10000, 0x1000, PAGE) == "EINVAL"
    assert v2.map(0x10000, 0x1000, 0) == 0  # nobody looks at the address


def test_unmap_checks_in_the_kernels_order(v2: User, buffer: Buffer) -> None:
    assert v2.unmap(0x1000, PAGE) == "EPERM"
    v2.register(buffer.address, buffer.size)
    arg = uapi.vfio_iommu_type1_dma_unmap(argsz=23)
    assert v2.call(v2.container, uapi.VFIO_IOMMU_UNMAP_DMA, arg) == "EINVAL"
    assert v2.unmap(0x1000, PAGE, flags=1) == "EINVAL"
    assert v2.locked == 64
    assert v2.unmap(WINDOW, 1) == "ENXIO"
    assert v2.locked == 64 + DEFAULT_TABLE
    assert v2.unmap(0x1001, PAGE + 1) == "EINVAL"
    assert v2.unmap(0x1001, PAGE) == 1
    assert v2.unmap(0x1000, PAGE) == 0
    assert v2.unmap(0, WINDOW) == 0


def test_unmap_leaves_its_size_field_alone(v2: User, buffer: Buffer) -> None:
    v2.register(buffer.address, buffer.size)
    arg = uapi.vfio_iommu_type1_dma_unmap(iova=0, size=WINDOW)
    assert v2.call(v2.container, uapi.VFIO_IOMMU_UNMAP_DMA, arg) == 0
    assert arg.size == WINDOW


# --- the calls that hurt ---


def test_a_map_past_the_end_of_the_window_is_reported(v2: User, buffer: Buffer, host: Host) -> None:
    v2.register(buffer.address, buffer.size)
    with pytest.raises(KernelWouldBeHurt, match="0x80000000"):
        v2.map(buffer.address, WINDOW - PAGE, 2 * PAGE)
    assert host.pe(0).table_group.tables[0].extents.covered == 0


def test_a_map_that_fails_inside_the_window_hurts_nobody(v2: User, buffer: Buffer) -> None:
    v2.register(buffer.address, PAGE)
    assert v2.map(buffer.address, WINDOW - PAGE, 2 * PAGE) == "EINVAL"


def test_without_strict_what_is_past_the_end_is_dropped(buffer: Buffer) -> None:
    host = Host(strict=False)
    user = User(host)
    user.attach(0)
    user.register(buffer.address, buffer.size)
    assert user.map(buffer.address, WINDOW - PAGE, 2 * PAGE) == 0
    assert host.vfio.describe()["containers"][0]["windows"][0]["mapped"] == PAGE
    assert user.unmap(WINDOW - PAGE, 1 << 40) == 0
    assert host.vfio.describe()["processes"][0]["regions"][0]["mapped"] == 0


def test_an_unmap_past_the_end_is_reported_or_answered_1_by_later_kernels(buffer: Buffer) -> None:
    old, new = User(Host()), User(Host(kernel=(7, 2)))
    for user in (old, new):
        user.attach(0)
        user.register(buffer.address, buffer.size)
    assert new.map(buffer.address, WINDOW - PAGE, PAGE) == 0
    assert new.unmap(WINDOW - PAGE, 2 * PAGE) == 1
    assert new.host.vfio.describe()["containers"][0]["windows"][0]["mapped"] == PAGE
    with pytest.raises(KernelWouldBeHurt, match="UNMAP"):
        old.unmap(WINDOW - PAGE, 2 * PAGE)


def test_a_power8_host_would_hang_on_nothing_at_iova_0(v2: User, buffer: Buffer) -> None:
    v2.register(buffer.address, buffer.size)
    with pytest.raises(KernelWouldBeHurt, match="IOVA 0"):
        v2.map(buffer.address, 0, 0)
    with pytest.raises(KernelWouldBeHurt, match="IOVA 0"):
        v2.unmap(0, 0)
    with pytest.raises(KernelWouldBeHurt, match="first page"):
        v2.map(0x10000, 0, PAGE)
    assert v2.map(buffer.address + 15 * PAGE, 0, 2 * PAGE) == "EINVAL"  # the second page fails


@pytest.mark.parametrize("host", [Host("power9"), Host(strict=False)], ids=["power9", "lenient"])
def test_other_hosts_answer(host: Host, buffer: Buffer) -> None:
    user = User(host)
    files = user.attach(0)
    user.register(buffer.address, buffer.size)
    assert (user.map(buffer.address, 0, 0), user.unmap(0, 0), user.map(0x10000, 0, PAGE)) == (0, 0, "EINVAL")
    user.close_all(*files)


# --- DMA ---


@pytest.mark.parametrize(("flags", "reads", "writes"), [(READ, True, False), (WRITE, True, True), (RW, True, True)])
def test_write_permission_brings_read_permission(
    v2: User, host: Host, buffer: Buffer, flags: int, reads: bool, writes: bool
) -> None:
    v2.register(buffer.address, buffer.size)
    v2.map(buffer.address, 0x1000, PAGE, flags)
    buffer[0:4] = b"abcd"
    pe = host.pe(0)
    assert (pe.dma_read(0x1000, 4) == b"abcd") is reads
    pe.dma_write(0x1000, b"ABCD")
    assert (buffer[0:4] == b"ABCD") is writes
    assert [fault.reason for fault in pe.dma_faults] == ([] if writes else ["mapped without write access"])


def test_a_dma_goes_on_where_it_finds_a_mapping(v2: User, host: Host, buffer: Buffer) -> None:
    v2.register(buffer.address, buffer.size)
    v2.map(buffer.address, 0x1000, PAGE)
    v2.map(buffer.address + 4 * PAGE, 0x3000, PAGE)
    for page, letter in ((0, b"a"), (4, b"b")):
        buffer[page * PAGE : (page + 1) * PAGE] = letter * PAGE
    pe, host.freezes = host.pe(0), False
    assert pe.dma_read(0x1FFE, 0x1004) == b"aa" + bytes(0x1000) + b"bb"
    assert pe.dma_faults == [(0x2000, 0x1000, False, "nothing is mapped there")]
    pe.dma_write(0x1FFE, b"xx" + b"!" * 0x1000 + b"yy")
    assert (buffer[PAGE - 2 : PAGE], buffer[4 * PAGE : 4 * PAGE + 2]) == (b"xx", b"yy")


def test_a_dma_outside_every_window_reads_zeros(host: Host) -> None:
    assert host.pe(0).dma_read(1 << 40, 8) == bytes(8)
    assert host.pe(0).dma_faults == [(1 << 40, 8, False, "no window has this address")]


def test_a_long_dma_to_nowhere_is_one_fault(v2: User, host: Host) -> None:
    v2.create(16, GIB)
    host.freezes = False
    assert host.pe(0).dma_read(0x1234, 1 << 20) == bytes(1 << 20)
    host.pe(0).dma_write(0x1234 + (1 << 20), b"1234")
    assert [(f.address, f.length, f.write) for f in host.pe(0).dma_faults] == [
        (0x1234, 1 << 20, False),
        (0x101234, 4, True),
    ]


def test_a_frozen_pe_does_no_dma(v2: User, host: Host, buffer: Buffer) -> None:
    v2.register(buffer.address, buffer.size)
    v2.map(buffer.address, 0x1000, PAGE)
    buffer[0:4] = b"abcd"
    pe = host.pe(0)
    pe.freeze = "dma"
    assert pe.dma_read(0x1000, 4) == bytes(4)
    pe.dma_write(0x1000, b"ABCD")
    assert buffer[0:4] == b"abcd"
    assert {fault.reason for fault in pe.dma_faults} == {"the PE is frozen"}


@pytest.mark.parametrize("strict", [True, False])
def test_memory_that_went_away_under_a_mapping_is_never_touched(strict: bool) -> None:
    host = Host(strict=strict)
    user = User(host)
    user.attach(0)
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(None, ctypes.c_size_t(PAGE), 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, ctypes.c_long(0))
    user.register(address, PAGE)
    user.map(address, 0x1000, PAGE)
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(PAGE))
    pe = host.pe(0)
    if strict:
        with pytest.raises(MemoryGone, match="0x1000"):
            pe.dma_read(0x1000, 4)
        with pytest.raises(MemoryGone, match="0x1000"):
            pe.dma_write(0x1000, b"1234")
    else:
        assert pe.dma_read(0x1000, 4) == bytes(4)
        pe.dma_write(0x1000, b"1234")
    assert len(pe.dma_faults) == 2


# --- who may call ---


def test_only_the_owner_may_call_and_the_core_does_not_mind(v2: User, host: Host, buffer: Buffer) -> None:
    other = User(host, host.new_process(pid=os.getpid() + 1))
    other.container = v2.container
    assert other.info()[0] == 0
    assert other.map(0, 0, 0) == "EPERM"  # not enabled, by nobody
    assert other.unregister(buffer.address, PAGE) == "EPERM"  # no owner
    assert v2.call(v2.container, uapi.VFIO_IOMMU_SPAPR_REGISTER_MEMORY, 0x10) == "EFAULT"  # the owner, all the same
    assert other.info()[0] == "EPERM"
    assert other.call(other.container, None) == "EPERM"
    assert other.eeh(uapi.VFIO_EEH_PE_GET_STATE) == "EPERM"
    assert other.call(other.container, uapi.VFIO_CHECK_EXTENSION, 7) == 1
    assert other.set_iommu(7) == "EINVAL"
    assert v2.info()[0] == 0


@pytest.mark.parametrize("call", ["create", "remove"])
def test_window_calls_make_the_caller_the_owner(v2: User, host: Host, call: str) -> None:
    other = User(host, host.new_process(pid=os.getpid() + 1))
    other.container = v2.container
    request = uapi.VFIO_IOMMU_SPAPR_TCE_CREATE if call == "create" else uapi.VFIO_IOMMU_SPAPR_TCE_REMOVE
    assert other.call(other.container, request, 0x10) == "EFAULT"
    assert v2.info()[0] == "EPERM"


def test_the_owner_stays_when_its_process_ends(v2: User, host: Host) -> None:
    owner = host.new_process(pid=os.getpid() + 1)
    gone = User(host, owner)
    gone.container = v2.container
    gone.remove(0)
    owner.exit()
    assert v2.info()[0] == "EPERM"
    group = host.vfio.groups[0].opened_file
    assert group is not None
    assert v2.unset_container(group) == 0
    assert v2.set_container(group) == 0
    assert v2.set_iommu(7) == 0
    assert v2.info()[0] == 0


# --- POWER7, from the documents ---


def test_power7_has_one_fixed_window_a_pe_and_no_v2(buffer: Buffer) -> None:
    host = Host("power7")
    users = User(host), User(host)
    for number, user in enumerate(users):
        group = user.open_group(number)
        user.set_container(group)
        assert user.set_iommu(7) == "EINVAL"
        assert user.set_iommu(2) == 0
        info = user.info()[1]
        assert (info.dma32_window_start, info.dma32_window_size, info.flags) == (number * GIB, GIB, 0)
        assert enable(user) == 0
        assert user.map(buffer.address, number * GIB + PAGE, PAGE) == 0
        assert user.map(buffer.address, (1 - number) * GIB + PAGE, PAGE) == "ENXIO"
        buffer[0:2] = b"%d!" % number
        assert host.pe(number).dma_read(number * GIB + PAGE, 2) == b"%d!" % number
