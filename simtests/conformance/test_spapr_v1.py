"""sPAPR TCE v1: one group, one window, ENABLE with worst-case accounting, pages pinned by MAP."""

import errno

import pytest

from simtests.conformance import areas
from simtests.conformance.engine import Engine
from simtests.conformance.raw import NOWHERE, READ, V1, V2, WRITE
from vfio import uapi

pytestmark = pytest.mark.power

IOVA = 0x100000
TCE_PAGE = 4096


@pytest.fixture
def table(target):
    """Bytes that the kernel charges for the table of the default window."""
    entries = target.topology.iommu.default_window.size // TCE_PAGE
    return entries * 8 * (2 if target.platform == "PowerNV" else 1)


@pytest.fixture
def window(target):
    return target.topology.iommu.default_window


@pytest.fixture
def enabled(v1):
    assert v1.enable() == 0
    return v1


# --- GET_INFO ---


def test_info_has_the_window_and_no_ddw(v1, window):
    info = v1.info()
    assert (info.argsz, info.flags) == (32, 0)
    assert (info.dma32_window_start, info.dma32_window_size) == (window.start, window.size)
    assert (info.ddw.pgsizes, info.ddw.max_dynamic_windows_supported, info.ddw.levels) == (0, 0, 0)


def test_info_writes_16_bytes_for_an_argsz_below_32_and_all_32_for_more(v1):
    for argsz, written in ((16, 16), (17, 16), (31, 16), (32, 32), (40, 32)):
        data = bytearray(argsz.to_bytes(4, "little") + b"\xa5" * 60)
        assert v1.get_info(data) == 0
        assert data[:8] == argsz.to_bytes(4, "little") + bytes(4)
        assert data[8:16] != b"\xa5" * 8
        assert data[16:written] == bytes(written - 16)
        assert data[written:] == b"\xa5" * (64 - written)


def test_info_does_not_look_at_flags_and_overwrites_them(v1):
    data = bytearray((32).to_bytes(4, "little") + b"\xff" * 28)
    assert v1.get_info(data) == 0
    assert data[4:8] == bytes(4)


# --- ENABLE and DISABLE ---


@pytest.mark.parametrize("argument", [0, 1, NOWHERE, (1 << 64) - 1])
def test_enable_charges_the_whole_window_and_disable_gives_it_back(program, v1, window, argument):
    assert v1.enable(argument) == 0
    assert program.locked == window.size
    assert v1.disable(argument) == 0
    assert program.locked == 0


def test_enable_twice_raises_ebusy(program, enabled, window):
    assert enabled.enable() == -errno.EBUSY
    assert program.locked == window.size


def test_disable_is_always_0(program, v1, window):
    for _ in range(2):
        assert v1.disable() == 0
    assert v1.enable() == 0
    for _ in range(3):
        assert v1.disable() == 0
        assert program.locked == 0
    assert v1.enable() == 0
    assert program.locked == window.size


def test_enable_beyond_the_locked_memory_limit_raises_enomem(other_program, member, window):
    other = other_program(memlock=window.size - 1, ipc_lock=False)
    container = other.attached(member, V1)
    for _ in range(2):
        assert container.enable() == -errno.ENOMEM
        assert other.locked == 0
    memory = other.memory(other.page)
    assert container.map(memory.address, IOVA, other.page) == -errno.EPERM


def test_at_exactly_the_limit_enable_works_and_the_first_map_raises_enomem(other_program, member, window, table):
    other = other_program(memlock=window.size, ipc_lock=False)
    container = other.attached(member, V1)
    memory = other.memory(other.page)
    assert container.enable() == 0
    for _ in range(2):
        assert container.map(memory.address, IOVA, other.page) == -errno.ENOMEM
        assert other.locked == window.size


def test_limit_with_room_for_the_table_too_is_enough(other_program, member, window, table):
    other = other_program(memlock=window.size + table, ipc_lock=False)
    container = other.attached(member, V1)
    memory = other.memory(other.page)
    assert container.enable() == 0
    assert container.map(memory.address, IOVA, other.page) == 0
    assert other.locked == window.size + table


def test_cap_ipc_lock_lifts_the_limit_but_not_the_charge(other_program, member, window):
    other = other_program(memlock=0, ipc_lock=True)
    assert other.attached(member, V1).enable() == 0
    assert other.locked == window.size


def test_leaving_without_disable_returns_the_charge(program, enabled, window):
    memory = program.memory(program.page)
    assert enabled.map(memory.address, IOVA, program.page) == 0
    assert program.locked > window.size
    assert enabled.group.unset_container() == 0
    assert program.locked == 0


def test_disable_leaves_the_tables_charge(program, enabled, table):
    memory = program.memory(program.page)
    assert enabled.map(memory.address, IOVA, program.page) == 0
    assert enabled.disable() == 0
    assert program.locked == table


@pytest.mark.needs_edu
def test_mappings_stay_active_for_the_device_after_disable(program, enabled, member):
    memory = program.memory(program.page)
    assert enabled.map(memory.address, IOVA, program.page) == 0
    engine = Engine(enabled, member)
    memory.view[:16] = b"still reachable!"
    assert enabled.disable() == 0
    assert enabled.unmap(IOVA, program.page) == -errno.EPERM
    engine.load(IOVA)
    engine.store(IOVA + 64)
    assert memory.view[64:80] == b"still reachable!"


# --- requests of v2 ---


@pytest.mark.parametrize("request_", ["REGISTER_MEMORY", "UNREGISTER_MEMORY", "TCE_CREATE", "TCE_REMOVE"])
def test_request_of_v2_raises_enotty_before_its_argument_is_looked_at(v1, request_):
    number = getattr(uapi, f"VFIO_IOMMU_SPAPR_{request_}")
    for argument in (NOWHERE, bytearray(64)):
        assert v1.ioctl(number, argument) == -errno.ENOTTY
    assert v1.enable() == 0
    assert v1.ioctl(number, NOWHERE) == -errno.ENOTTY


# --- MAP and UNMAP ---


def test_map_and_unmap_before_enable_raise_eperm_and_look_at_no_argument(program, v1):
    memory = program.memory(program.page)
    assert v1.map(memory.address, IOVA, program.page) == -errno.EPERM
    assert v1.unmap(IOVA, program.page) == -errno.EPERM
    for request in (uapi.VFIO_IOMMU_MAP_DMA, uapi.VFIO_IOMMU_UNMAP_DMA):
        assert v1.ioctl(request, NOWHERE) == -errno.EPERM
    assert program.locked == 0
    assert v1.enable() == 0
    assert v1.disable() == 0
    assert v1.map(memory.address, IOVA, program.page) == -errno.EPERM


def test_first_map_makes_and_charges_the_window_and_pages_are_not_charged(program, enabled, window, table):
    memory = program.memory(16 * program.page)
    assert enabled.map(memory.address, IOVA, memory.length) == 0
    assert program.locked == window.size + table
    assert enabled.map(memory.address, 2 * IOVA, memory.length) == 0
    assert program.locked == window.size + table
    assert enabled.unmap(IOVA, memory.length) == 0
    assert program.locked == window.size + table


def test_unmap_alone_makes_and_charges_the_window(program, enabled, window, table):
    assert enabled.unmap(IOVA, program.page) == 0
    assert program.locked == window.size + table


def test_map_outside_the_window_raises_enxio(program, enabled, window):
    memory = program.memory(program.page)
    for iova in (window.size, window.size * 2, 1 << 59, (1 << 64) - TCE_PAGE):
        assert enabled.map(memory.address, iova, program.page) == -errno.ENXIO
        assert enabled.unmap(iova, program.page) == -errno.ENXIO
    assert enabled.map(memory.address, window.size - TCE_PAGE, TCE_PAGE) == 0


def test_map_of_a_misaligned_size_or_address_raises_einval(program, enabled):
    memory = program.memory(2 * program.page)
    for vaddr, size in ((512, TCE_PAGE), (0, 512), (0, TCE_PAGE + 1), (1, TCE_PAGE)):
        assert enabled.map(memory.address + vaddr, IOVA, size) == -errno.EINVAL
    assert enabled.unmap(IOVA, 512) == -errno.EINVAL


def test_misaligned_iova_returns_1(program, enabled):
    memory = program.memory(program.page)
    for iova in (IOVA + 1, IOVA + 0x800):
        assert enabled.map(memory.address, iova, TCE_PAGE) == 1
        assert enabled.unmap(iova, TCE_PAGE) == 1


def test_map_with_neither_read_nor_write_raises_einval_in_the_window_and_enxio_outside(program, enabled, window):
    memory = program.memory(program.page)
    assert enabled.map(memory.address, IOVA, TCE_PAGE, flags=0) == -errno.EINVAL
    assert enabled.map(memory.address, window.size, TCE_PAGE, flags=0) == -errno.ENXIO
    assert enabled.map(memory.address, IOVA + 1, TCE_PAGE, flags=0) == -errno.EINVAL


def test_parts_of_a_host_page_can_be_mapped_where_host_pages_are_larger(program, enabled):
    memory = program.memory(program.page)
    for offset in range(0, program.page, TCE_PAGE):
        assert enabled.map(memory.address + offset, IOVA + 2 * offset, TCE_PAGE) == 0


@pytest.mark.parametrize("flags", [READ, WRITE, READ | WRITE])
@pytest.mark.parametrize("rights", ["none", "read", "hole"])
def test_map_pins_as_writable_whatever_the_flags_or_raises_efault(program, enabled, area, flags, rights):
    memory = area(3)
    if rights == "hole":
        memory.hole(1)
    else:
        memory.protect(1, areas.NONE if rights == "none" else areas.READ)
    page = program.page
    assert enabled.map(memory.address, IOVA, page, flags) == 0
    assert enabled.map(memory.address + page, IOVA, page, flags) == -errno.EFAULT
    assert enabled.map(memory.address + 2 * page, IOVA, page, flags) == 0
    assert enabled.map(memory.address, IOVA, 3 * page, flags) == -errno.EFAULT


def test_map_of_nothing_and_of_kernel_addresses_raises_efault(program, enabled):
    for vaddr in (NOWHERE, 0, 0xC000_0000_0000_0000, (1 << 64) - 0x10000):
        assert enabled.map(vaddr, IOVA, TCE_PAGE) == -errno.EFAULT


def test_size_0_is_0_and_looks_at_no_memory(enabled):
    assert enabled.map(NOWHERE, IOVA, 0) == 0
    assert enabled.unmap(IOVA, 0) == 0


def test_unmap_of_what_is_not_mapped_is_0(program, enabled, window):
    assert enabled.unmap(IOVA, 16 * TCE_PAGE) == 0
    assert enabled.unmap(0, window.size) == 0
    memory = program.memory(program.page)
    assert enabled.map(memory.address, IOVA, program.page) == 0
    for _ in range(2):
        assert enabled.unmap(IOVA, program.page) == 0


@pytest.mark.needs_edu
def test_second_map_at_the_same_iova_replaces_the_first(program, enabled, member):
    memory = program.memory(4 * program.page)
    engine = Engine(enabled, member)
    for number, text in enumerate((b"first", b"other")):
        at = number * program.page
        memory.view[at : at + 5] = text
        assert enabled.map(memory.address + at, IOVA, program.page) == 0
        assert enabled.map(memory.address + 2 * program.page, 2 * IOVA, program.page) == 0
        engine.load(IOVA)
        engine.store(2 * IOVA)
        assert memory.view[2 * program.page : 2 * program.page + 5] == text


# --- groups ---


def test_second_group_raises_ebusy_enabled_or_not(program, v1, second):
    group = program.group(second)
    assert group.set_container(v1.fd) == -errno.EBUSY
    assert v1.enable() == 0
    assert group.set_container(v1.fd) == -errno.EBUSY
    assert group.status() == uapi.VFIO_GROUP_FLAGS_VIABLE
    assert v1.group.unset_container() == 0
    assert group.set_container(v1.fd) == 0
    assert v1.set_iommu(V1) == 0


def test_v1_is_refused_for_two_groups_and_v2_then_taken(program, member, second):
    container, groups = program.container(), [program.group(each) for each in (member, second)]
    for group in groups:
        assert group.set_container(container.fd) == 0
    assert container.set_iommu(V1) == -errno.EBUSY
    assert container.extension(V1) == 1
    assert container.set_iommu(V2) == 0
