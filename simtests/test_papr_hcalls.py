"""H_PUT_TCE and its kin on the fake: every code that a guest can be answered with, and what reaches VFIO."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from papr_front import BOTH, HIGH, LIST, LOW, MAP, PAGE, RAM, READ, UNMAP, WINDOW, WRITE, Front, fresh

from vfio.papr import Hcall, Opcode


@pytest.fixture
def front() -> Iterator[Front]:
    yield from fresh()


# --- H_PUT_TCE ---


def test_put_tce_maps_one_page(front: Front) -> None:
    assert front.put(0x5000, 0x3000 | BOTH) == Hcall.SUCCESS
    assert front.entry(0x5000) == (0x3000, 3)
    assert front.entry(0x6000) is None
    assert front.get(0x5000) == (Hcall.SUCCESS, 0x3000 | BOTH)


def test_read_bit_alone_lets_the_device_only_read(front: Front) -> None:
    assert front.put(0x5000, 0x3000 | READ) == Hcall.SUCCESS
    assert front.entry(0x5000) == (0x3000, 1)


def test_write_bit_alone_is_read_and_write_as_the_platform_has_it(front: Front) -> None:
    assert front.put(0x5000, 0x3000 | WRITE) == Hcall.SUCCESS
    assert front.entry(0x5000) == (0x3000, 3)
    assert front.get(0x5000) == (Hcall.SUCCESS, 0x3000 | WRITE)


def test_put_tce_replaces_what_was_mapped(front: Front) -> None:
    front.put(0, 0x3000 | BOTH)
    assert front.put(0, 0x7000 | BOTH) == Hcall.SUCCESS
    assert front.entry(0) == (0x7000, 3)


def test_put_tce_without_permissions_unmaps_and_its_value_is_kept(front: Front) -> None:
    front.put(0x5000, 0x3000 | BOTH)
    assert front.put(0x5000, 0x9000) == Hcall.SUCCESS
    assert front.entry(0x5000) is None
    assert front.get(0x5000) == (Hcall.SUCCESS, 0x9000)


@pytest.mark.parametrize(
    ("liobn", "ioba", "tce"),
    [
        (LOW + 7, 0, BOTH),
        (HIGH, 0, BOTH),  # a number that a window can have, and none has
        (LOW, 0x800, BOTH),
        (LOW, 0x80000000, BOTH),
        (LOW, WINDOW, BOTH),
        (LOW, (1 << 64) - PAGE, BOTH),
        (LOW, 0, 0x800 | BOTH),
        (LOW, 0, RAM | BOTH),
        (LOW, 0, (1 << 64) - PAGE | BOTH),
        (LOW, 0, 1 << 64),
        (-1, 0, BOTH),
        (LOW, -PAGE, BOTH),
    ],
)
def test_put_tce_with_a_wrong_argument_is_h_parameter_and_reaches_nobody(
    front: Front, liobn: int, ioba: int, tce: int
) -> None:
    before = front.calls(MAP), front.calls(UNMAP)
    assert front.hcall(Opcode.H_PUT_TCE, liobn, ioba, tce) == (Hcall.PARAMETER,)
    assert (front.calls(MAP), front.calls(UNMAP)) == before
    assert front.get(0) == (Hcall.SUCCESS, 0)


@pytest.mark.parametrize("arguments", [(), (LOW,), (LOW, 0, 0, 0, 0, 0)])
@pytest.mark.parametrize("opcode", list(Opcode))
def test_wrong_number_of_arguments_is_h_parameter(front: Front, opcode: int, arguments: tuple[int, ...]) -> None:
    assert front.hcall(opcode, *arguments) == (Hcall.PARAMETER,)


@pytest.mark.parametrize("opcode", [0, 4, 0x140, -1, 1 << 70])
def test_other_hypercalls_are_h_function(front: Front, opcode: int) -> None:
    assert front.hcall(opcode, LOW, 0, 0) == (Hcall.FUNCTION,)


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOMEM, Hcall.RESOURCE), (errno.EFAULT, Hcall.HARDWARE), (errno.EPERM, Hcall.HARDWARE)]
)
def test_map_that_the_kernel_refuses_leaves_the_entry_empty(front: Front, number: int, code: Hcall) -> None:
    front.put(0x5000, 0x3000 | BOTH)
    front.backend.machine.hooks.fail(MAP, number)
    assert front.put(0x5000, 0x7000 | BOTH) == code
    assert front.entry(0x5000) is None
    assert front.get(0x5000) == (Hcall.SUCCESS, 0)


# --- H_PUT_TCE_INDIRECT ---


def test_512_pages_that_follow_one_another_are_one_map(front: Front) -> None:
    before = front.calls(MAP)
    assert front.put_list(0x100000, [n * PAGE | BOTH for n in range(512)]) == Hcall.SUCCESS
    assert front.calls(MAP) == before + 1
    assert front.entry(0x100000) == (0, 3)
    assert front.entry(0x100000 + 511 * PAGE) == (511 * PAGE, 3)
    assert front.get(0x100000 + 511 * PAGE) == (Hcall.SUCCESS, 511 * PAGE | BOTH)


def test_a_list_becomes_as_many_calls_as_it_has_runs(front: Front) -> None:
    front.put_list(0, [n * PAGE | BOTH for n in range(8)])
    maps, unmaps = front.calls(MAP), front.calls(UNMAP)
    tces = [0x10000 | BOTH, 0x11000 | BOTH, 0x12000 | READ, 0, 0x5000, 0x20000 | READ, 0x1F000 | READ, 0]
    assert front.put_list(0, tces) == Hcall.SUCCESS
    assert (front.calls(MAP) - maps, front.calls(UNMAP) - unmaps) == (4, 2)
    seen = [front.entry(n * PAGE) for n in range(8)]
    assert seen == [(0x10000, 3), (0x11000, 3), (0x12000, 1), None, None, (0x20000, 1), (0x1F000, 1), None]
    assert [front.get(n * PAGE)[1] for n in range(8)] == tces


@pytest.mark.parametrize("bad", [RAM | BOTH, 0x800 | BOTH])
def test_one_bad_tce_in_a_list_and_none_is_set(front: Front, bad: int) -> None:
    front.put(0x2000, 0x6000 | BOTH)
    before = front.calls(MAP)
    assert front.put_list(0, [0 | BOTH, 0x9000 | BOTH, 0, bad]) == Hcall.PARAMETER
    assert front.calls(MAP) == before
    assert [front.get(n * PAGE)[1] for n in range(4)] == [0, 0, 0x6000 | BOTH, 0]


@pytest.mark.parametrize(
    ("ioba", "tces", "count"),
    [
        (0, LIST, 513),
        (0, LIST + 8, 1),
        (0, RAM, 1),
        (0, (1 << 64) - PAGE, 512),
        (0x80000000 - PAGE, LIST, 2),
        (0x10, LIST, 1),
        (0, LIST, 1 << 63),
    ],
)
def test_indirect_with_a_wrong_argument_is_h_parameter(front: Front, ioba: int, tces: int, count: int) -> None:
    before = front.calls(MAP)
    assert front.hcall(Opcode.H_PUT_TCE_INDIRECT, LOW, ioba, tces, count) == (Hcall.PARAMETER,)
    assert front.calls(MAP) == before


def test_indirect_with_no_entries_does_nothing(front: Front) -> None:
    assert front.hcall(Opcode.H_PUT_TCE_INDIRECT, LOW, 0, LIST, 0) == (Hcall.SUCCESS,)


def test_list_of_which_the_second_run_fails_keeps_the_first(front: Front) -> None:
    front.put_list(0, [n * PAGE | BOTH for n in range(4)])
    front.backend.machine.hooks.fail(MAP, errno.ENOMEM, nth=2)
    assert front.put_list(0, [0x10000 | BOTH, 0x20000 | BOTH, 0x21000 | BOTH, 0x30000 | BOTH]) == Hcall.RESOURCE
    assert [front.entry(n * PAGE) for n in range(4)] == [(0x10000, 3), None, None, (0x3000, 3)]
    assert [front.get(n * PAGE)[1] for n in range(4)] == [0x10000 | BOTH, 0, 0, 0x3000 | BOTH]


# --- H_STUFF_TCE and H_GET_TCE ---


def test_stuff_with_0_clears_with_one_unmap(front: Front) -> None:
    front.put_list(0, [n * PAGE | BOTH for n in range(512)])
    before = front.calls(UNMAP)
    assert front.stuff(0x1000, 0, 510) == Hcall.SUCCESS
    assert front.calls(UNMAP) == before + 1
    assert [front.entry(n * PAGE) for n in (0, 1, 510, 511)] == [(0, 3), None, None, (511 * PAGE, 3)]
    assert front.get(510 * PAGE) == (Hcall.SUCCESS, 0)


def test_stuff_keeps_a_value_without_permissions(front: Front) -> None:
    front.put(0, BOTH)
    assert front.stuff(0, 0xDEAD000, 3) == Hcall.SUCCESS
    assert front.entry(0) is None
    assert [front.get(n * PAGE)[1] for n in range(4)] == [0xDEAD000] * 3 + [0]
    assert front.stuff(0, 0, 4) == Hcall.SUCCESS
    assert front.get(0) == (Hcall.SUCCESS, 0)


def test_stuff_of_what_was_never_used_asks_nobody(front: Front) -> None:
    before = front.calls(UNMAP)
    assert front.stuff(0, 0, 0x80000) == Hcall.SUCCESS
    assert front.calls(UNMAP) == before


@pytest.mark.parametrize(
    ("ioba", "tce", "count"), [(0, READ, 1), (0, WRITE, 1), (0, 0, 0x80001), (8, 0, 1), (WINDOW, 0, 1), (0, 0, 1 << 63)]
)
def test_stuff_with_a_wrong_argument_is_h_parameter(front: Front, ioba: int, tce: int, count: int) -> None:
    front.put(0, BOTH)
    assert front.stuff(ioba, tce, count) == Hcall.PARAMETER
    assert front.entry(0) == (0, 3)


def test_unmap_that_the_kernel_refuses_is_h_hardware_and_the_entry_is_still_seen(front: Front) -> None:
    front.put(0, BOTH)
    front.backend.machine.hooks.fail(UNMAP, errno.EPERM)
    assert front.stuff(0, 0, 1) == Hcall.HARDWARE
    assert front.get(0) == (Hcall.SUCCESS, BOTH)
    assert front.stuff(0, 0, 1) == Hcall.SUCCESS


@pytest.mark.parametrize(("liobn", "ioba"), [(LOW + 9, 0), (HIGH, 0), (LOW, 0x80000000), (LOW, 4)])
def test_get_with_a_wrong_argument_is_h_parameter(front: Front, liobn: int, ioba: int) -> None:
    assert front.get(ioba, liobn) == (Hcall.PARAMETER,)


def test_get_makes_no_call(front: Front) -> None:
    before = sum(front.backend.machine.hooks.calls.values())
    assert front.get(0x1000) == (Hcall.SUCCESS, 0)
    assert sum(front.backend.machine.hooks.calls.values()) == before
