"""The RTAS calls of DDW and EEH on the fake: every status that a guest can be answered with."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from papr_front import (
    ADDRESSED,
    BOTH,
    BUID,
    CONFIGURE,
    CREATE,
    DETAIL,
    EDU,
    HIGH,
    INFO,
    LIST,
    LOW,
    OPTION,
    PAGE,
    QUERY,
    RAM,
    REMOVE,
    RESET,
    SLOT_RESET,
    STATE,
    TESTDEV,
    WINDOW,
    Front,
    fresh,
)

from vfio import papr
from vfio.drivers.edu import Edu
from vfio.papr import Hcall, Rtas
from vfio.papr.numbers import page_mask, page_shifts


@pytest.fixture
def front() -> Iterator[Front]:
    yield from fresh()


# --- windows ---


def test_query_tells_the_free_windows_the_largest_and_the_page_sizes_that_the_memory_allows(front: Front) -> None:
    assert front.rtas(QUERY, front.where, *BUID, results=5) == [Rtas.SUCCESS, 1, RAM // PAGE, 0x01, 0]
    assert front.rtas(QUERY, front.where, *BUID, results=6) == [Rtas.SUCCESS, 1, 0, RAM // PAGE, 0x01, 0]


def test_page_sizes_are_those_of_the_memory_behind_the_guest() -> None:
    assert Front("fake:power8?page_size=65536").phb.page_sizes == [4096, 65536]
    huge = Front("fake:power8?page_size=65536", 32 << 20, 16 << 20)
    assert huge.rtas(QUERY, huge.where, *BUID, results=5)[3] == 0b111


def test_masks_of_page_sizes_go_both_ways() -> None:
    assert page_mask([4096, 65536, 2 << 20, 16 << 20, 256 << 20, 1 << 30]) == 0b101000111
    assert page_shifts(0b101000111) == [12, 16, 21, 24, 28]


def test_create_gives_a_liobn_and_the_address_of_a_window_that_works(front: Front) -> None:
    assert front.create(12, 23) == [Rtas.SUCCESS, HIGH, WINDOW >> 32, 0]
    assert front.put(WINDOW + 0x1000, 0x2000 | BOTH, HIGH) == Hcall.SUCCESS
    assert front.entry(WINDOW + 0x1000) == (0x2000, 3)
    assert front.put(0x1000, 0, HIGH) == Hcall.PARAMETER
    assert front.rtas(QUERY, front.where, *BUID, results=5)[1] == 0


def test_create_with_all_windows_in_use_is_a_hardware_error(front: Front) -> None:
    front.create(12, 23)
    assert front.create(12, 23) == [Rtas.HARDWARE_ERROR, 0, 0, 0]


@pytest.mark.parametrize(
    ("page_shift", "window_shift"), [(16, 23), (13, 23), (12, 11), (12, 64), (64, 64), (0, 23), (12, 0xFFFFFFFF)]
)
def test_create_with_a_wrong_page_or_size_is_a_parameter_error(
    front: Front, page_shift: int, window_shift: int
) -> None:
    before = front.backend.locked()
    assert front.create(page_shift, window_shift) == [Rtas.PARAMETER_ERROR, 0, 0, 0]
    assert front.backend.locked() == before
    assert len(front.phb.tables) == 1


def test_create_of_more_than_the_guest_may_have_is_a_hardware_error_and_charges_nothing(front: Front) -> None:
    before = front.backend.locked()
    assert front.create(12, 40) == [Rtas.HARDWARE_ERROR, 0, 0, 0]
    assert front.backend.locked() == before


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENOSPC, errno.EPERM])
def test_create_that_the_kernel_refuses_is_a_hardware_error(front: Front, number: int) -> None:
    front.backend.machine.hooks.fail("VFIO_IOMMU_SPAPR_TCE_CREATE", number)
    assert front.create(12, 23) == [Rtas.HARDWARE_ERROR, 0, 0, 0]
    assert front.create(12, 23)[0] == Rtas.SUCCESS


def test_remove_takes_the_window_with_what_is_mapped_in_it(front: Front) -> None:
    before = front.backend.locked().locked
    front.create(12, 23)
    front.put(WINDOW, BOTH, HIGH)
    assert front.rtas(REMOVE, HIGH) == [Rtas.SUCCESS]
    assert front.backend.locked().locked == before
    assert front.put(WINDOW, BOTH, HIGH) == Hcall.PARAMETER
    assert front.rtas(REMOVE, HIGH) == [Rtas.PARAMETER_ERROR]


@pytest.mark.parametrize("liobn", [0, HIGH, LOW + 2, 0xFFFFFFFF])
def test_remove_of_a_window_that_there_is_not_is_a_parameter_error(front: Front, liobn: int) -> None:
    assert front.rtas(REMOVE, liobn) == [Rtas.PARAMETER_ERROR]


def test_window_that_the_kernel_does_not_remove_is_empty_and_can_be_used_and_removed(front: Front) -> None:
    front.create(12, 23)
    front.put(WINDOW, BOTH, HIGH)
    front.backend.machine.hooks.fail("VFIO_IOMMU_SPAPR_TCE_REMOVE", errno.EIO)
    assert front.rtas(REMOVE, HIGH) == [Rtas.HARDWARE_ERROR]
    assert front.get(WINDOW, HIGH) == (Hcall.SUCCESS, 0)
    assert front.entry(WINDOW) is None
    assert front.put(WINDOW, 0x2000 | BOTH, HIGH) == Hcall.SUCCESS
    assert front.entry(WINDOW) == (0x2000, 3)
    assert front.rtas(REMOVE, HIGH) == [Rtas.SUCCESS]
    assert front.create(12, 23)[0] == Rtas.SUCCESS


def test_window_after_the_default_one_was_removed_begins_at_0(front: Front) -> None:
    assert front.rtas(REMOVE, LOW) == [Rtas.SUCCESS]
    assert front.create(12, 23) == [Rtas.SUCCESS, LOW, 0, 0]
    assert front.put(0x1000, 0x2000 | BOTH) == Hcall.SUCCESS


@pytest.mark.parametrize("default_too", [False, True])
def test_reset_leaves_the_default_window_alone_and_empty(front: Front, default_too: bool) -> None:
    front.put(0x1000, 0x2000 | BOTH)
    front.create(12, 23)
    if default_too:
        front.rtas(REMOVE, LOW)
    assert front.rtas(RESET, front.where, *BUID) == [Rtas.SUCCESS]
    assert list(front.phb.tables) == [LOW]
    assert front.entry(0x1000) is None
    assert front.get(0x7FFFF000) == (Hcall.SUCCESS, 0)
    assert front.get(0x80000000) == (Hcall.PARAMETER,)


@pytest.mark.parametrize(("name", "more", "results"), ADDRESSED)
def test_calls_for_another_phb_or_device_or_in_another_shape_are_parameter_errors(
    front: Front, name: str, more: tuple[int, ...], results: int
) -> None:
    refused = [Rtas.PARAMETER_ERROR] + [0] * (results - 1)
    high, low = BUID
    assert front.rtas(name, front.where, high, low + 1, *more, results=results) == refused
    assert front.rtas(name, front.where, high + 1, low, *more, results=results) == refused
    assert front.rtas(name, front.where + 0x100, high, low, *more, results=results) == refused
    assert front.rtas(name, front.where, high, results=results) == refused
    assert front.rtas(name, front.where, high, low, *more, 0, results=results) == refused
    assert front.rtas(name, front.where, high, low, *more, results=7) == [Rtas.PARAMETER_ERROR] + [0] * 6
    assert front.rtas(name, front.where, high, low, *more, results=0) == []
    assert front.rtas(name, -1, high, low, *more, results=results) == refused
    assert front.rtas(name, 1 << 32, high, low, *more, results=results) == refused
    assert list(front.phb.tables) == [LOW]


@pytest.mark.parametrize("name", ["", "ibm,make-coffee", "IBM,QUERY-PE-DMA-WINDOW", "ibm,query-pe-dma-window "])
def test_a_name_that_is_no_call_is_a_parameter_error(front: Front, name: str) -> None:
    assert front.rtas(name, front.where, *BUID, results=5) == [Rtas.PARAMETER_ERROR, 0, 0, 0, 0]


@pytest.mark.parametrize("results", [17, 1 << 20, 0xFFFFFFFF, 1 << 70])
def test_an_answer_that_no_guest_has_room_for_ends_where_its_room_ends(front: Front, results: int) -> None:
    assert front.rtas(QUERY, front.where, *BUID, results=results) == [Rtas.PARAMETER_ERROR] + [0] * 15
    assert front.rtas(QUERY, front.where, *BUID, results=-results) == []


def test_window_whose_table_cannot_be_built_is_a_hardware_error_and_charges_nothing() -> None:
    front = Front()
    front.phb.close()
    phb = papr.Phb(front.device.group.container, papr.GuestMemory(front.ram), largest_window=1 << 62)
    where = phb.add(front.device)
    before = front.backend.locked()
    for window_shift in (56, 62):
        answer = phb.rtas(CREATE, where, *BUID, 12, window_shift, results=4)
        assert answer == [Rtas.HARDWARE_ERROR, 0, 0, 0]
    assert front.backend.locked() == before
    assert phb.rtas(QUERY, where, *BUID, results=5)[2] == 0xFFFFFFFF
    assert phb.rtas(QUERY, where, *BUID, results=6)[2:4] == [(1 << 50) >> 32, 0]
    phb.close()
    front.device.close()
    assert front.backend.leaks() == []


# --- EEH ---


def test_pe_address_and_mode(front: Front) -> None:
    assert front.rtas(INFO, front.where, *BUID, 0, results=2) == [Rtas.SUCCESS, 1]
    assert front.rtas(INFO, front.where, *BUID, 1, results=2) == [Rtas.SUCCESS, papr.PeMode.NOT_SHARED]
    with front.device.group.device(TESTDEV) as other:
        front.phb.add(other)
        assert front.rtas(INFO, front.where, *BUID, 1, results=2) == [Rtas.SUCCESS, papr.PeMode.SHARED]
    assert front.rtas(INFO, front.where, *BUID, 2, results=2) == [Rtas.PARAMETER_ERROR, 0]


def test_a_frozen_pe_is_seen_and_thawed_by_halves(front: Front) -> None:
    assert front.rtas(STATE, 1, *BUID, results=5) == [Rtas.SUCCESS, 0, 1, 0, 0]
    front.backend.machine.eeh.freeze(EDU)
    assert front.rtas(STATE, 1, *BUID, results=4) == [Rtas.SUCCESS, 2, 1, 0]
    assert front.rtas(OPTION, 1, *BUID, papr.EehOption.THAW_IO) == [Rtas.SUCCESS]
    assert front.rtas(STATE, 1, *BUID, results=4) == [Rtas.SUCCESS, 4, 1, 0]
    assert front.rtas(OPTION, 1, *BUID, papr.EehOption.THAW_DMA) == [Rtas.SUCCESS]
    assert front.rtas(STATE, 1, *BUID, results=4) == [Rtas.SUCCESS, 0, 1, 0]


def test_unavailable_pe_says_when_to_ask_again(front: Front) -> None:
    front.backend.machine.eeh.freeze(EDU, "mmio")
    assert front.rtas(STATE, 1, *BUID, results=4) == [Rtas.SUCCESS, 5, 1, 1000]


def test_enable_thaws_and_disable_does_nothing(front: Front) -> None:
    front.backend.machine.eeh.freeze(EDU)
    assert front.rtas(OPTION, front.where, *BUID, papr.EehOption.DISABLE) == [Rtas.SUCCESS]
    assert front.rtas(STATE, front.where, *BUID, results=4)[1] == 2
    assert front.rtas(OPTION, front.where, *BUID, papr.EehOption.ENABLE) == [Rtas.SUCCESS]
    assert front.rtas(STATE, front.where, *BUID, results=4)[1] == 0


@pytest.mark.parametrize("kind", [papr.SlotReset.HOT, papr.SlotReset.FUNDAMENTAL])
def test_reset_of_the_slot(front: Front, kind: int) -> None:
    assert front.rtas(SLOT_RESET, 1, *BUID, kind) == [Rtas.SUCCESS]
    with pytest.raises(OSError) as caught:  # noqa: PT011  its errno is what counts
        front.device.config.read16(4)
    assert caught.value.errno == errno.ENODEV
    assert front.rtas(SLOT_RESET, 1, *BUID, papr.SlotReset.DEACTIVATE) == [Rtas.SUCCESS]
    assert front.rtas(CONFIGURE, 1, *BUID) == [Rtas.SUCCESS]
    assert front.rtas(STATE, 1, *BUID, results=4)[1] == 0


@pytest.mark.parametrize("kind", ["intx", "msi"])
def test_interrupts_of_the_monitor_survive_a_reset_of_the_slot(front: Front, kind: str) -> None:
    irq = getattr(front.device, kind)
    with irq.enable() as vector:
        for _ in range(2):  # a guest that asks twice is reset twice
            assert front.rtas(SLOT_RESET, 1, *BUID, papr.SlotReset.HOT) == [Rtas.SUCCESS]
        with pytest.raises(OSError) as caught:  # noqa: PT011  its errno is what counts
            irq.trigger()
        assert caught.value.errno == errno.EINVAL
        assert front.rtas(SLOT_RESET, 1, *BUID, papr.SlotReset.DEACTIVATE) == [Rtas.SUCCESS]
        assert front.rtas(CONFIGURE, 1, *BUID) == [Rtas.SUCCESS]
        edu = Edu(front.device)
        edu.interrupt()
        assert vector.wait(1) == 1
        edu.acknowledge()


def test_interrupts_stay_enabled_where_a_reset_is_refused(front: Front) -> None:
    with front.device.msi.enable() as vector:
        front.backend.machine.hooks.fail("VFIO_EEH_PE_OP", errno.EIO)
        assert front.rtas(SLOT_RESET, 1, *BUID, papr.SlotReset.HOT) == [Rtas.HARDWARE_ERROR]
        front.device.msi.trigger()
        assert vector.take() == 1


def test_interrupts_that_cannot_be_enabled_again_are_a_hardware_error_and_are_tried_again(front: Front) -> None:
    with front.device.msi.enable() as vector:
        assert front.rtas(SLOT_RESET, 1, *BUID, papr.SlotReset.HOT) == [Rtas.SUCCESS]
        front.backend.machine.hooks.fail("VFIO_DEVICE_SET_IRQS", errno.ENOMEM)
        assert front.rtas(SLOT_RESET, 1, *BUID, papr.SlotReset.DEACTIVATE) == [Rtas.HARDWARE_ERROR]
        assert front.rtas(SLOT_RESET, 1, *BUID, papr.SlotReset.DEACTIVATE) == [Rtas.SUCCESS]
        front.device.msi.trigger()
        assert vector.take() == 1


@pytest.mark.parametrize(("name", "option"), [(OPTION, 4), (SLOT_RESET, 2), (SLOT_RESET, 4), (OPTION, 0xFFFFFFFF)])
def test_an_option_that_there_is_not_is_a_parameter_error(front: Front, name: str, option: int) -> None:
    assert front.rtas(name, 1, *BUID, option) == [Rtas.PARAMETER_ERROR]


@pytest.mark.parametrize(("name", "more"), [(OPTION, (1,)), (SLOT_RESET, (1,))])
def test_eeh_call_that_the_hardware_refuses_is_a_hardware_error(front: Front, name: str, more: tuple[int, ...]) -> None:
    front.backend.machine.hooks.fail("VFIO_EEH_PE_OP", errno.EIO)
    assert front.rtas(name, 1, *BUID, *more) == [Rtas.HARDWARE_ERROR]


def test_state_that_the_kernel_does_not_tell_and_a_pe_that_it_does_not_configure_are_parameter_errors(
    front: Front,
) -> None:
    front.backend.machine.hooks.fail("VFIO_EEH_PE_OP", errno.EIO)
    assert front.rtas(STATE, 1, *BUID, results=4) == [Rtas.PARAMETER_ERROR, 0, 0, 0]
    front.backend.machine.hooks.fail("VFIO_EEH_PE_OP", errno.EIO)
    assert front.rtas(CONFIGURE, 1, *BUID) == [Rtas.PARAMETER_ERROR]


def test_error_log_there_is_none(front: Front) -> None:
    for kind in papr.LogKind:
        assert front.rtas(DETAIL, 1, *BUID, 0, 64, LIST, PAGE, kind) == [Rtas.NO_ERRORS_FOUND]
    for bad in ((0, 0, LIST, PAGE, 3), (0, 0, RAM, 8, 1), (RAM, 8, LIST, PAGE, 1), (0, 0, LIST, 0xFFFFFFFF, 1)):
        assert front.rtas(DETAIL, 1, *BUID, *bad) == [Rtas.PARAMETER_ERROR]


def test_platform_without_eeh_answers_parameter_error_to_all_of_it() -> None:
    front = Front("fake:pseries")
    for name, more, results in ADDRESSED[3:]:
        assert front.rtas(name, front.where, *BUID, *more, results=results)[0] == Rtas.PARAMETER_ERROR, name
