"""sPAPR TCE v2: what windows cost in locked memory, and what a refused window keeps."""

import errno

import pytest

from simtests.conformance.raw import SECOND_WINDOW, V2

pytestmark = pytest.mark.power

POWERNV = pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k")
PSERIES = pytest.mark.targets("pseries", "pseries-64k")


def table_bytes(size, shift, levels, page):
    """Locked memory of a table on bare metal: hardware table and user-space view, as if all levels were filled.

    Where a window is smaller than its page, the kernel's 32-bit logarithms wrap and its shifts take 7 bits of them.
    """
    table = max(4096, shifted(entries_log(size, shift) + 3))
    level, total = shifted(level_log(size, shift, levels, page)), 0
    for _ in range(levels):
        total += (table + level - 1) & -level % (1 << 64)
        table = max(table // level * 8 if level else 0, level)
    return 2 * total // page * page


def entries_log(size, shift):
    return (size.bit_length() - 1 - shift) % (1 << 32)


def level_log(size, shift, levels, page):
    each = (entries_log(size, shift) + levels - 1) % (1 << 32) // levels
    return max((each + 3) % (1 << 32), page.bit_length() - 1)


def shifted(amount):
    return 1 << amount % 128 if amount % 128 < 64 else 0


def too_many_bits(size, shift, levels, page):
    return (level_log(size, shift, levels, page) - 3) * levels + shift >= 55


@POWERNV
@pytest.mark.leaks
@pytest.mark.parametrize(
    ("shift", "size", "levels"),
    [
        (12, 1 << 12, 1),
        (12, 1 << 21, 1),
        (12, 1 << 22, 1),
        (12, 1 << 25, 1),
        (12, 1 << 26, 1),
        (12, 1 << 30, 1),
        (12, 1 << 31, 1),
        (12, 1 << 32, 1),
        (12, 1 << 30, 2),
        (12, 1 << 31, 2),
        (12, 1 << 33, 2),
        (12, 1 << 30, 3),
        (16, 1 << 16, 1),
        (16, 1 << 25, 1),
        (16, 1 << 29, 1),
        (16, 1 << 30, 1),
        (16, 1 << 34, 1),
        (16, 1 << 30, 2),
        (16, 1 << 34, 2),
        (16, 1 << 34, 3),
        (16, 1 << 36, 3),
    ],
)
def test_window_costs_its_table_twice_and_gives_it_back(other_program, member, shift, size, levels):
    other = other_program()
    container = other.attached(member, V2)
    assert container.remove(0) == 0
    charge = table_bytes(size, shift, levels, other.page)
    if too_many_bits(size, shift, levels, other.page):
        assert container.create(shift, size, levels) == -errno.EINVAL
        assert other.locked == charge
        return
    assert container.create(shift, size, levels) == 0
    assert other.locked == charge
    assert container.remove(0) == 0
    assert other.locked == 0


@POWERNV
def test_figures_are_those_that_were_seen(program, v2):
    small = program.page == 4096
    assert v2.remove(0) == 0
    for shift, size, levels, kib in (
        (12, 1 << 31, 1, 8192),
        (16, 1 << 30, 1, 256),
        (12, 1 << 12, 1, 8 if small else 128),
        (12, 1 << 36, 2, 262208 if small else 262272),
    ):
        assert v2.create(shift, size, levels) == 0
        assert program.locked == kib << 10
        assert v2.remove(0) == 0


@PSERIES
@pytest.mark.parametrize(("shift", "size"), [(12, 1 << 30), (16, 1 << 30), (12, 1 << 28)])
def test_window_of_a_guest_costs_8_bytes_a_page(program, v2, shift, size):
    assert v2.create(13, 1 << 30) == -errno.EINVAL  # which makes the default window
    before = program.locked
    assert before == 2 << 20
    assert v2.create(shift, size) == SECOND_WINDOW
    assert program.locked - before == size >> shift - 3
    assert v2.remove(SECOND_WINDOW) == 0
    assert program.locked == before


def test_registrations_and_windows_are_charged_separately_and_go_with_the_group(program, v2):
    memory = program.memory(16 * program.page)
    assert v2.register(memory.address, memory.length) == 0
    assert v2.create(12, 1 << 30) == SECOND_WINDOW
    tables = program.locked - memory.length
    assert tables > 0
    assert v2.unregister(memory.address, memory.length) == 0
    assert program.locked == tables
    v2.group.close()
    assert program.locked == 0


@POWERNV
def test_limit_is_met_to_the_page(other_program, member):
    cost = 256 << 10
    other = other_program(memlock=cost, ipc_lock=False)
    container = other.attached(member, V2)
    assert container.remove(0) == 0
    assert container.create(16, 1 << 30) == 0
    assert other.locked == cost
    memory = other.memory(other.page)
    assert container.register(memory.address, other.page) == -errno.ENOMEM
    assert container.remove(0) == 0
    short = other_program(memlock=cost - other.page, ipc_lock=False)
    container.close()
    container.group.close()
    container = short.attached(member, V2)
    assert container.remove(0) == 0
    assert container.create(16, 1 << 30) == -errno.ENOMEM
    assert short.locked == 0


# --- charges that outlast the window that was refused ---


@POWERNV
@pytest.mark.leaks
@pytest.mark.parametrize(("size", "levels"), [(1 << 30, 5), (1 << 63, 5), (1 << 62, 4)])
def test_geometry_that_indexes_too_many_bits_raises_einval_and_keeps_its_charge(other_program, member, size, levels):
    other = other_program()
    container = other.attached(member, V2)
    assert container.remove(0) == 0
    assert too_many_bits(size, 12, levels, other.page)
    assert container.create(12, size, levels) == -errno.EINVAL
    kept = other.locked
    assert kept == table_bytes(size, 12, levels, other.page)
    assert container.group.unset_container() == 0
    assert other.locked == kept


@POWERNV
@pytest.mark.leaks
def test_four_levels_of_4_kib_pages_are_too_many_for_a_kernel_with_64_kib_pages(other_program, member):
    other = other_program()
    container = other.attached(member, V2)
    assert container.remove(0) == 0
    assert container.create(12, 1 << 30, 4) == (0 if other.page == 4096 else -errno.EINVAL)
    assert other.locked == table_bytes(1 << 30, 12, 4, other.page)


@POWERNV
@pytest.mark.leaks
@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_window_smaller_than_its_page_is_refused_or_rounded_up_by_the_bits_it_happens_to_have(
    other_program, member, levels
):
    """The logarithm of less than one entry wraps: some sizes come out as a table, others are charged and refused."""
    other = other_program()
    container = other.attached(member, V2)
    assert container.remove(0) == 0
    kept = 0
    for size in (1, 2, 16, 256, 512, 1024, 2048):
        charge = table_bytes(size, 12, levels, other.page)
        answer = container.create(12, size, levels)
        if answer == 0:
            assert not too_many_bits(size, 12, levels, other.page)
            assert other.locked == kept + charge
            assert container.remove(0) == 0
        else:
            assert answer == -errno.EINVAL
            assert too_many_bits(size, 12, levels, other.page) or charge == 0
            kept += charge
        assert other.locked == kept


@POWERNV
@pytest.mark.leaks
def test_level_that_the_kernel_cannot_allocate_raises_enomem_and_keeps_its_charge(other_program, member):
    other = other_program()
    container = other.attached(member, V2)
    assert container.remove(0) == 0
    assert container.create(12, 1 << 36, 1) == -errno.ENOMEM
    kept = other.locked
    assert kept == table_bytes(1 << 36, 12, 1, other.page)
    assert container.create(12, 1 << 30, 1) == 0
    assert container.group.unset_container() == 0
    assert other.locked == kept


@POWERNV
@pytest.mark.leaks
def test_charge_of_a_refusal_is_gone_with_the_process(program, other_program, member):
    other = other_program()
    container = other.attached(member, V2)
    assert container.create(12, 1 << 30, 5) == -errno.EINVAL
    assert other.locked > 0
    other.backend.exit()
    again = program.attached(member, V2)
    assert again.create(12, 1 << 30) == SECOND_WINDOW


@PSERIES
@pytest.mark.leaks
@pytest.mark.parametrize(
    ("size", "levels", "charged"),
    [
        (1 << 30, 2, 0xFFFF_FFFF),
        (1 << 30, 0xFFFF_FFFF, 0xFFFF_FFFF),
        (3 << 20, 1, 3 << 11),
        ((1 << 30) + 4096, 1, (1 << 21) + 8),
        (3 << 30, 2, 0xFFFF_FFFF),
        (1 << 62, 1, 1 << 53),
    ],
)
def test_window_that_a_guest_refuses_raises_einval_and_keeps_its_charge(other_program, member, size, levels, charged):
    other = other_program()
    container = other.attached(member, V2)
    assert container.create(13, 1 << 30) == -errno.EINVAL  # which makes the default window
    before = other.locked
    assert container.create(12, size, levels) == -errno.EINVAL
    assert other.locked - before == charged // other.page * other.page
    assert container.create(12, 1 << 30) == SECOND_WINDOW  # the firmware was not asked for it, and gives another


@PSERIES
@pytest.mark.parametrize("size", [0, 1, 256])
def test_window_without_an_entry_is_refused_by_a_guest_and_not_charged(program, v2, size):
    assert v2.create(13, 1 << 30) == -errno.EINVAL
    before = program.locked
    assert v2.create(12, size) == -errno.EINVAL
    assert program.locked == before


@PSERIES
def test_guest_takes_0_levels_for_1(program, v2):
    assert v2.create(12, 1 << 30, 0) == SECOND_WINDOW
    assert program.locked == (2 << 20) + (2 << 20)
