"""sPAPR TCE v2: the default window, TCE_CREATE and TCE_REMOVE."""

import errno

import pytest

from simtests.conformance import areas
from simtests.conformance.pci_calls import on_vfio
from simtests.conformance.raw import NOWHERE, SECOND_WINDOW, V2, Member
from vfio import sysfs, uapi

pytestmark = pytest.mark.power

POWERNV = pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k")
PSERIES = pytest.mark.targets("pseries", "pseries-64k")
IOVA = 0x100000


@pytest.fixture
def facts(target):
    return target.topology.iommu


@pytest.fixture
def default_table(target, facts):
    """Bytes charged for the table of the default window."""
    return facts.default_window.size // 4096 * 8 * (2 if target.platform == "PowerNV" else 1)


@pytest.fixture
def memory(program):
    return program.memory(max(65536, program.page))


# --- GET_INFO ---


def test_info_has_the_figures_of_the_platform(v2, facts):
    info = v2.info()
    assert (info.argsz, info.flags) == (32, uapi.VFIO_IOMMU_SPAPR_INFO_DDW)
    window = facts.default_window
    assert (info.dma32_window_start, info.dma32_window_size) == (window.start, window.size)
    assert info.ddw.pgsizes == facts.page_sizes
    assert (info.ddw.max_dynamic_windows_supported, info.ddw.levels) == (facts.windows, facts.levels)


def test_info_writes_16_bytes_for_an_argsz_below_32_and_all_32_for_more(v2):
    whole = bytearray((32).to_bytes(4, "little") + b"\xa5" * 60)
    assert v2.get_info(whole) == 0
    for argsz in (16, 24, 31, 48):
        data = bytearray(argsz.to_bytes(4, "little") + b"\xa5" * 60)
        assert v2.get_info(data) == 0
        written = 32 if argsz >= 32 else 16
        assert data[4:written] == whole[4:written]
        assert data[written:] == b"\xa5" * (64 - written)


def test_info_does_not_change_with_windows(v2):
    before = bytes(uapi.buffer(v2.info()))
    assert v2.create(12, 1 << 30) == SECOND_WINDOW
    assert bytes(uapi.buffer(v2.info())) == before
    for start in (0, SECOND_WINDOW):
        assert v2.remove(start) == 0
    assert bytes(uapi.buffer(v2.info())) == before


def test_requests_of_v1_raise_enotty(v2, memory):
    for _ in range(2):
        for argument in (0, NOWHERE):
            assert v2.enable(argument) == -errno.ENOTTY
            assert v2.disable(argument) == -errno.ENOTTY
        v2.register(memory.address, memory.length)


# --- the default window ---


def test_default_window_is_made_by_the_first_map(program, v2, memory, default_table):
    assert v2.register(memory.address, memory.length) == 0
    assert program.locked == memory.length
    assert v2.map(memory.address, IOVA, memory.length) == 0
    assert program.locked == memory.length + default_table


def test_default_window_is_made_by_the_first_unmap(program, v2, memory, default_table):
    assert v2.register(memory.address, memory.length) == 0
    assert v2.unmap(IOVA, 4096) == 0
    assert program.locked == memory.length + default_table


def test_default_window_is_made_by_a_create_even_if_that_fails(program, v2, default_table):
    assert v2.create(13, 1 << 30) == -errno.EINVAL
    assert program.locked == default_table
    assert v2.create(12, 1 << 30) == SECOND_WINDOW


def test_default_window_is_not_made_by_a_create_with_a_bad_struct(program, v2):
    assert v2.create(12, 1 << 30, flags=1) == -errno.EINVAL
    assert v2.ioctl(uapi.VFIO_IOMMU_SPAPR_TCE_CREATE, NOWHERE) == -errno.EFAULT
    assert program.locked == 0


def test_default_window_is_not_made_by_a_registration(program, v2, memory):
    assert v2.register(memory.address, memory.length) == 0
    assert v2.unregister(memory.address, memory.length) == 0
    assert program.locked == 0


def test_default_window_without_room_for_its_table_raises_enomem_and_stays_to_be_made(
    other_program, member, default_table
):
    other = other_program(memlock=default_table, ipc_lock=False)
    container, memory = other.attached(member, V2), other.memory(other.page)
    assert container.register(memory.address, other.page) == 0
    for _ in range(2):
        assert container.map(memory.address, IOVA, 4096) == -errno.ENOMEM
        assert container.unmap(IOVA, 4096) == -errno.ENOMEM
        assert container.create(12, 1 << 30) == -errno.ENOMEM
        assert other.locked == other.page
    assert container.unregister(memory.address, other.page) == 0
    assert container.unmap(IOVA, 4096) == 0
    assert other.locked == default_table


def test_removing_the_default_window_before_it_is_made_means_that_there_is_none(program, v2, memory):
    assert v2.remove(0) == 0
    assert program.locked == 0
    assert v2.remove(0) == -errno.EINVAL
    assert v2.register(memory.address, memory.length) == 0
    assert v2.map(memory.address, IOVA, 4096) == -errno.ENXIO
    assert v2.unmap(IOVA, 4096) == -errno.ENXIO
    assert program.locked == memory.length


def test_removed_default_window_does_not_come_back(program, v2, memory, default_table):
    assert v2.register(memory.address, memory.length) == 0
    assert v2.map(memory.address, IOVA, 4096) == 0
    assert v2.remove(0) == 0
    assert program.locked == memory.length
    assert v2.map(memory.address, IOVA, 4096) == -errno.ENXIO
    assert v2.unregister(memory.address, memory.length) == 0  # its entries are gone with the window
    assert program.locked == 0


def test_default_window_comes_back_with_a_new_container(program, v2, memory, member):
    assert v2.remove(0) == 0
    assert v2.group.unset_container() == 0
    assert v2.group.set_container(v2.fd) == 0
    assert v2.set_iommu(V2) == 0
    assert v2.register(memory.address, memory.length) == 0
    assert v2.map(memory.address, IOVA, 4096) == 0


# --- CREATE ---


@pytest.mark.parametrize("shift", [12, 16])
def test_window_beside_the_default_one_is_at_1_shl_59(v2, shift):
    assert v2.create(shift, 1 << 30) == SECOND_WINDOW


def test_create_fills_the_start_and_writes_back_the_reserved_fields(v2):
    struct = uapi.vfio_iommu_spapr_tce_create(
        page_shift=12, window_size=1 << 30, levels=1, __resv1=0x11223344, __resv2=0x55667788
    )
    before = bytes(uapi.buffer(struct))
    assert v2.ioctl(uapi.VFIO_IOMMU_SPAPR_TCE_CREATE, uapi.buffer(struct)) == 0
    after = bytes(uapi.buffer(struct))
    assert after[:32] == before[:32]
    assert int.from_bytes(after[32:], "little") == SECOND_WINDOW


def test_struct_of_a_failed_create_is_left_alone(v2):
    struct = uapi.vfio_iommu_spapr_tce_create(page_shift=13, window_size=1 << 30, levels=1, start_addr=0x5A5A)
    before = bytes(uapi.buffer(struct))
    assert v2.ioctl(uapi.VFIO_IOMMU_SPAPR_TCE_CREATE, uapi.buffer(struct)) == -errno.EINVAL
    assert bytes(uapi.buffer(struct)) == before


def test_create_whose_answer_cannot_be_written_raises_efault_and_leaves_the_window(program, v2, area):
    place = area(1)
    struct = uapi.vfio_iommu_spapr_tce_create(page_shift=12, window_size=1 << 30, levels=1)
    place.write(0, bytes(uapi.buffer(struct)))
    place.protect(0, areas.READ)
    assert v2.ioctl(uapi.VFIO_IOMMU_SPAPR_TCE_CREATE, place.address) == -errno.EFAULT
    assert v2.create(12, 1 << 30) == -errno.ENOSPC
    assert v2.remove(SECOND_WINDOW) == 0


def test_third_window_raises_enospc_before_anything_else_is_checked(v2):
    assert v2.create(12, 1 << 30) == SECOND_WINDOW
    for shift, size, levels in ((12, 1 << 30, 1), (13, 1 << 30, 1), (12, 3, 1), (12, 1 << 30, 0)):
        assert v2.create(shift, size, levels) == -errno.ENOSPC


@pytest.mark.parametrize("shift", [0, 11, 13, 15, 17, 20, 32, 63, 64, 76, 0xFFFF_FFFF])
def test_page_size_that_the_platform_does_not_have_raises_einval(program, v2, default_table, shift):
    assert v2.create(shift, 1 << 30) == -errno.EINVAL
    assert program.locked == default_table


@POWERNV
@pytest.mark.parametrize("size", [0, 1, 3 << 20, (1 << 30) + 4096, (1 << 64) - 1])
def test_size_that_is_no_power_of_two_raises_einval_and_charges_nothing(program, v2, default_table, size):
    assert v2.create(12, size) == -errno.EINVAL
    assert program.locked == default_table


@POWERNV
@pytest.mark.parametrize("levels", [0, 6, 7, 0xFFFF_FFFF])
def test_levels_outside_1_to_5_raise_einval_and_charge_nothing(program, v2, default_table, levels):
    assert v2.create(12, 1 << 30, levels) == -errno.EINVAL
    assert program.locked == default_table


def test_create_beyond_the_limit_raises_enomem_and_charges_nothing(other_program, member, default_table):
    other = other_program(memlock=default_table + 65536, ipc_lock=False)
    container = other.attached(member, V2)
    for _ in range(2):
        assert container.create(12, 1 << 30) == -errno.ENOMEM
        assert other.locked == default_table


def test_limit_of_0_refuses_the_default_window_and_so_every_create(other_program, member):
    other = other_program(memlock=0, ipc_lock=False)
    container = other.attached(member, V2)
    assert container.create(12, 1 << 30) == -errno.ENOMEM
    assert container.remove(0) == 0
    assert container.create(12, 1 << 30) == -errno.ENOMEM
    assert other.locked == 0


@POWERNV
def test_after_the_default_window_is_removed_the_first_window_is_at_0(program, v2, memory):
    assert v2.remove(0) == 0
    assert v2.create(16, 1 << 30) == 0
    assert v2.create(12, 1 << 30) == SECOND_WINDOW
    assert v2.create(12, 1 << 30) == -errno.ENOSPC
    for start in (0, SECOND_WINDOW):
        assert v2.remove(start) == 0
    assert program.locked == 0
    assert v2.create(12, 1 << 30) == 0


@PSERIES
@pytest.mark.parametrize("size", [1 << 30, 1 << 28])
def test_on_a_guest_a_window_that_could_be_the_default_one_takes_its_place(program, v2, memory, size):
    assert v2.remove(0) == 0
    assert v2.register(memory.address, memory.length) == 0
    assert v2.create(12, size) == 0
    assert v2.map(memory.address, size - 4096, 4096) == 0
    assert v2.map(memory.address, size, 4096) == -errno.ENXIO
    assert v2.remove(0) == 0
    assert program.locked == memory.length


@PSERIES
def test_on_a_guest_any_other_window_is_at_1_shl_59_even_if_it_is_the_only_one(program, v2, memory):
    assert v2.remove(0) == 0
    assert v2.create(16, 1 << 30) == SECOND_WINDOW
    assert v2.register(memory.address, memory.length) == 0
    assert v2.map(memory.address, IOVA, 4096) == -errno.ENXIO
    assert v2.remove(0) == -errno.EINVAL
    assert v2.remove(SECOND_WINDOW) == 0
    assert program.locked == memory.length


def test_window_can_be_made_again_after_it_was_removed(program, v2):
    for shift in (12, 16, 12):
        assert v2.create(shift, 1 << 30) == SECOND_WINDOW
        assert v2.remove(SECOND_WINDOW) == 0


def test_map_works_in_both_windows_and_not_between(program, v2, memory):
    assert v2.register(memory.address, memory.length) == 0
    start = v2.create(12, 1 << 30)
    for iova in (IOVA, start + IOVA, start, start + (1 << 30) - 4096):
        assert v2.map(memory.address, iova, 4096) == 0
    for iova in (start - 4096, start + (1 << 40), 1 << 58, start + (1 << 30)):
        assert v2.map(memory.address, iova, 4096) == -errno.ENXIO
    for iova in (IOVA, start + IOVA, start, start + (1 << 30) - 4096):
        assert v2.unmap(iova, 4096) == 0


@POWERNV
@pytest.mark.parametrize("shift", [12, 16])
def test_window_of_one_page_has_a_whole_page_of_entries(program, v2, memory, shift):
    start, page = v2.create(shift, 1 << shift), 1 << shift
    assert start == SECOND_WINDOW
    assert v2.register(memory.address, memory.length) == 0
    whole = program.page // 8 * page
    assert v2.unmap(start + whole - page, page) == 0
    assert v2.unmap(start + whole, page) == -errno.ENXIO
    if page <= program.page:
        for iova in (start, start + page, start + whole - page):
            assert v2.map(memory.address, iova, page) == 0
            assert v2.unmap(iova, page) == 0
    assert v2.map(memory.address, start + whole, page) == -errno.ENXIO


@POWERNV
@pytest.mark.parametrize(("size", "levels"), [(1 << 33, 2), (1 << 35, 3), (1 << 30, 4)])
def test_table_of_several_levels_maps_anywhere(program, v2, memory, size, levels):
    if levels == 4 and program.page == 65536:
        levels = 3  # four levels of a 64 KiB kernel index too many bits
    start = v2.create(12, size, levels)
    assert start == SECOND_WINDOW
    assert v2.register(memory.address, memory.length) == 0
    before = program.locked
    for iova in (start, start + size // 2, start + size - memory.length, start + size // 3 // 65536 * 65536):
        assert v2.map(memory.address, iova, memory.length) == 0
        assert program.locked == before  # lower levels are not charged on their own
        assert v2.unmap(iova, memory.length) == 0
    assert v2.map(memory.address, start + size, 4096) == -errno.ENXIO
    assert v2.unregister(memory.address, memory.length) == 0


# --- REMOVE ---


@pytest.mark.parametrize("offset", [0, 1, 4096, (1 << 30) - 1])
def test_any_address_in_a_window_removes_it(program, v2, default_table, offset):
    assert v2.create(12, 1 << 30) == SECOND_WINDOW
    assert v2.remove(SECOND_WINDOW + offset) == 0
    assert program.locked == default_table
    assert v2.remove(SECOND_WINDOW) == -errno.EINVAL


def test_any_address_in_the_default_window_removes_it(program, v2, facts):
    assert v2.create(13, 1 << 30) == -errno.EINVAL
    assert v2.remove(facts.default_window.size - 1) == 0
    assert program.locked == 0


def test_remove_of_an_address_in_no_window_raises_einval(program, v2, facts):
    for start in (1, 4096, facts.default_window.size, SECOND_WINDOW, (1 << 64) - 1):
        assert v2.remove(start) == -errno.EINVAL  # the default window is still to be made: only 0 means it
    assert v2.create(12, 1 << 30) == SECOND_WINDOW
    for start in (facts.default_window.size, SECOND_WINDOW - 1, SECOND_WINDOW + (1 << 30), (1 << 64) - 1):
        assert v2.remove(start) == -errno.EINVAL
    assert program.locked > 0


def test_remove_clears_entries_so_that_their_memory_can_be_unregistered(program, v2, memory, default_table):
    assert v2.register(memory.address, memory.length) == 0
    start = v2.create(12, 1 << 30)
    assert v2.map(memory.address, start + IOVA, memory.length) == 0
    assert v2.remove(start) == 0
    assert program.locked == memory.length + default_table
    assert v2.unregister(memory.address, memory.length) == 0
    assert program.locked == default_table


def test_remove_of_one_window_leaves_the_other(program, v2, memory):
    assert v2.register(memory.address, memory.length) == 0
    start = v2.create(12, 1 << 30)
    assert v2.map(memory.address, IOVA, 4096) == 0
    assert v2.map(memory.address, start, 4096) == 0
    assert v2.remove(start) == 0
    assert v2.map(memory.address, start, 4096) == -errno.ENXIO
    assert v2.map(memory.address, IOVA, 4096) == 0
    assert v2.unmap(IOVA, 4096) == 0


# --- a guest whose firmware will give no more windows ---


@PSERIES
@pytest.mark.spoils
@pytest.mark.leaks
def test_guest_that_its_firmware_refused_once_gets_no_window_until_it_boots_again(other_program, member):
    other = other_program()
    container, memory = other.attached(member, V2), other.memory(max(65536, other.page))
    assert container.register(memory.address, memory.length) == 0
    assert container.remove(0) == 0
    assert container.create(16, 1 << 30) == SECOND_WINDOW
    kept, cost = other.locked, (1 << 31) // 4096 * 8
    assert container.create(12, 1 << 31) == -errno.ENODEV  # the firmware has only one such window
    assert other.locked == kept + cost
    assert container.unmap(SECOND_WINDOW, 65536) == 0  # what there is stays
    assert container.remove(SECOND_WINDOW) == 0
    kept = other.locked
    for shift, size in ((16, 1 << 30), (12, 1 << 30)):
        assert container.create(shift, size) == -errno.ENODEV
        kept += size >> shift - 3
        assert other.locked == kept
    group = container.group
    assert group.unset_container() == 0
    assert group.set_container(container.fd) == 0
    assert container.set_iommu(V2) == 0
    assert container.register(memory.address, memory.length) == 0
    kept = other.locked
    for number in range(1, 3):
        assert container.map(memory.address, IOVA, 4096) == -errno.ENODEV  # nor a default one
        assert other.locked == kept + number * (2 << 20)


@PSERIES
@pytest.mark.spoils
@pytest.mark.leaks
@pytest.mark.not_recorded("a driver of the host's comes and goes")
def test_device_that_a_driver_of_the_guest_has_used_gets_no_window_until_it_boots_again(
    other_program, backend, target, load_driver
):
    card = next(device for device in target.topology.devices if device.model == "e1000e")
    load_driver("e1000e")
    assert sysfs.driver_of(backend, card.address) == "e1000e"
    backend.write_text(sysfs.path(card.address, "driver/unbind"), card.address)
    with on_vfio(backend, card.address):
        other = other_program()
        container, memory = other.attached(Member(card.address, card.group), V2), other.memory(max(65536, other.page))
        assert container.register(memory.address, memory.length) == 0
        assert container.map(memory.address, IOVA, 4096) == -errno.ENODEV
        assert container.create(12, 1 << 30) == -errno.ENODEV
        other.backend.exit()
