"""INTx of a vfio-pci device: enabled, masked, unmasked and triggered, and what arrives.

Source: drivers/vfio/pci/vfio_pci_intrs.c and drivers/vfio/virqfd.c of Linux 6.12.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from simtests.conformance.irq_calls import (
    BOOL,
    EVENTFD,
    INTX,
    MASK,
    MSI,
    NEVER,
    NONE,
    TRIGGER,
    UNMASK,
    disable,
    set_fds,
)
from simtests.conformance.pci_calls import (
    COMMAND,
    INTX_OFF,
    EduRegisters,
    RawDevice,
    closed_descriptor,
    eventfds,
    opened,
    signals,
)

WRITES = "what the program writes to an eventfd is no call of the seam"

pytestmark = pytest.mark.lab_only  # hostile


@pytest.fixture
def edu(backend, member) -> Iterator[RawDevice]:
    """A conventional device: INTx, and MSI with one vector."""
    with opened(backend, member.address) as device:
        yield device


@pytest.fixture
def registers(edu) -> EduRegisters:
    found = EduRegisters(edu)
    found.lower_line()
    return found


@pytest.fixture
def fd() -> Iterator[int]:
    with eventfds() as (fd,):
        yield fd


def test_intx_that_is_off_cannot_be_disabled_triggered_or_masked(edu):
    assert disable(edu, INTX) == "EINVAL"
    for action in (TRIGGER, MASK, UNMASK):
        assert edu.set_irqs(INTX, NONE | action, count=1) == "EINVAL"
        assert edu.set_irqs(INTX, BOOL | action, count=1, data=b"\1") == "EINVAL"
    assert set_fds(edu, INTX, -1, action=UNMASK) == "EINVAL"


@pytest.mark.parametrize("kind", [BOOL, EVENTFD])
def test_intx_takes_no_count_of_none_but_to_disable(edu, fd, kind):
    assert edu.set_irqs(INTX, kind | TRIGGER) == "EINVAL"
    assert set_fds(edu, INTX, fd) == 0
    assert edu.set_irqs(INTX, kind | TRIGGER) == "EINVAL"
    for action in (MASK, UNMASK):
        assert edu.set_irqs(INTX, NONE | action) == "EINVAL"
        assert edu.set_irqs(INTX, kind | action) == "EINVAL"


def test_intx_with_a_descriptor_that_is_not_open_is_ebadf_and_leaves_it_off(edu):
    with closed_descriptor() as closed:
        assert set_fds(edu, INTX, closed) == "EBADF"
    assert disable(edu, INTX) == "EINVAL"


def test_intx_with_a_descriptor_that_is_no_eventfd_is_einval_and_leaves_it_off(edu):
    with open(os.devnull) as file:
        for no_eventfd in (file.fileno(), edu.container, edu.fd):
            assert set_fds(edu, INTX, no_eventfd) == "EINVAL"
    assert disable(edu, INTX) == "EINVAL"


@pytest.mark.parametrize("none", [-1, -2, -(1 << 31)])
def test_intx_without_a_descriptor_is_enabled_all_the_same(edu, none):
    assert set_fds(edu, INTX, none) == 0
    assert edu.set_irqs(INTX, NONE | TRIGGER, count=1) == 0
    assert disable(edu, INTX) == 0
    assert disable(edu, INTX) == "EINVAL"


def test_intx_triggered_by_hand_signals_the_eventfd(edu, fd):
    assert set_fds(edu, INTX, fd) == 0
    assert edu.set_irqs(INTX, NONE | TRIGGER, count=1) == 0
    assert signals(fd) == 1
    assert edu.set_irqs(INTX, BOOL | TRIGGER, count=1, data=b"\1") == 0
    assert edu.set_irqs(INTX, BOOL | TRIGGER, count=1, data=b"\xff") == 0
    assert edu.set_irqs(INTX, BOOL | TRIGGER, count=1, data=b"\0") == 0
    assert signals(fd) == 2
    assert signals(fd, NEVER) == 0


def test_intx_of_the_device_arrives_once_until_it_is_unmasked(edu, registers, fd):
    assert set_fds(edu, INTX, fd) == 0
    registers.raise_line()
    assert signals(fd) == 1
    assert signals(fd, NEVER) == 0  # the line is up, and masked
    assert edu.set_irqs(INTX, NONE | UNMASK, count=1) == 0
    assert signals(fd) == 1
    registers.lower_line()
    assert edu.set_irqs(INTX, NONE | UNMASK, count=1) == 0
    assert signals(fd, NEVER) == 0
    registers.raise_line()
    assert signals(fd) == 1
    registers.lower_line()


@pytest.mark.parametrize(("kind", "data"), [(NONE, b""), (BOOL, b"\1")])
def test_masked_intx_waits_until_it_is_unmasked(edu, registers, fd, kind, data):
    assert set_fds(edu, INTX, fd) == 0
    assert edu.set_irqs(INTX, kind | MASK, count=1, data=data) == 0
    registers.raise_line()
    assert signals(fd, NEVER) == 0
    assert edu.set_irqs(INTX, kind | UNMASK, count=1, data=data) == 0
    assert signals(fd) == 1
    registers.lower_line()


def test_intx_masked_and_unmasked_with_false_stays_as_it_is(edu, registers, fd):
    assert set_fds(edu, INTX, fd) == 0
    assert edu.set_irqs(INTX, BOOL | MASK, count=1, data=b"\0") == 0
    registers.raise_line()
    assert signals(fd) == 1
    assert edu.set_irqs(INTX, BOOL | UNMASK, count=1, data=b"\0") == 0
    assert signals(fd, NEVER) == 0
    registers.lower_line()


def test_masking_and_unmasking_intx_twice_is_harmless(edu, registers, fd):
    assert set_fds(edu, INTX, fd) == 0
    for action in (MASK, MASK, UNMASK, UNMASK):
        assert edu.set_irqs(INTX, NONE | action, count=1) == 0
    registers.raise_line()
    assert signals(fd) == 1
    registers.lower_line()


def test_intx_trigger_can_be_replaced_and_removed(edu, registers):
    with eventfds(2) as (first, second):
        assert set_fds(edu, INTX, first) == 0
        assert set_fds(edu, INTX, second) == 0
        registers.raise_line()
        assert (signals(second), signals(first, NEVER)) == (1, 0)
        assert set_fds(edu, INTX, -1) == 0
        assert edu.set_irqs(INTX, NONE | UNMASK, count=1) == 0
        assert (signals(second, NEVER), signals(first, NEVER)) == (0, 0)
        registers.lower_line()
        assert disable(edu, INTX) == 0  # without a trigger it is still on


def test_intx_trigger_that_is_refused_leaves_the_old_one(edu, registers, fd):
    assert set_fds(edu, INTX, fd) == 0
    with closed_descriptor() as closed:
        assert set_fds(edu, INTX, closed) == "EBADF"
    assert set_fds(edu, INTX, edu.container) == "EINVAL"
    registers.raise_line()
    assert signals(fd) == 1
    registers.lower_line()


def test_intx_cannot_be_masked_by_an_eventfd(edu, fd):
    assert set_fds(edu, INTX, fd) == 0
    assert set_fds(edu, INTX, fd, action=MASK) == "ENOTTY"


def test_intx_is_unmasked_by_writing_to_an_eventfd(edu, registers):
    with eventfds(2) as (trigger, unmask):
        assert set_fds(edu, INTX, trigger) == 0
        assert set_fds(edu, INTX, unmask, action=UNMASK) == 0
        registers.raise_line()
        assert signals(trigger) == 1
        os.eventfd_write(unmask, 1)
        assert signals(trigger) == 1  # the line is still up
        assert set_fds(edu, INTX, -1, action=UNMASK) == 0
        os.eventfd_write(unmask, 1)
        assert signals(trigger, NEVER) == 0
        registers.lower_line()


@pytest.mark.not_recorded(WRITES)
def test_counter_of_an_eventfd_for_unmasking_is_taken_by_the_kernel(edu, registers):
    with eventfds(2) as (trigger, unmask):
        assert set_fds(edu, INTX, trigger) == 0
        assert set_fds(edu, INTX, unmask, action=UNMASK) == 0
        os.eventfd_write(unmask, 5)
        edu.config(COMMAND, 2)
        assert signals(unmask, NEVER) == 0
        registers.raise_line()
        assert signals(trigger) == 1
        registers.lower_line()


@pytest.mark.not_recorded(WRITES)
def test_counter_from_before_unmasks_intx_and_stays(edu, registers):
    with eventfds(2) as (trigger, unmask):
        assert set_fds(edu, INTX, trigger) == 0
        registers.raise_line()
        assert signals(trigger) == 1
        os.eventfd_write(unmask, 3)
        assert set_fds(edu, INTX, unmask, action=UNMASK) == 0
        assert signals(trigger) == 1  # the line is still up
        edu.config(COMMAND, 2)
        assert signals(unmask) == 3
        registers.lower_line()


def test_intx_may_unmask_itself(edu, registers, fd):
    assert set_fds(edu, INTX, fd) == 0
    assert set_fds(edu, INTX, fd, action=UNMASK) == 0
    registers.raise_line()
    assert signals(fd, NEVER) == 0  # taken before it is seen
    registers.lower_line()
    assert signals(fd, NEVER) == 0
    with eventfds() as (other,):
        assert set_fds(edu, INTX, other) == 0
        registers.raise_line()
        assert signals(other) == 1
        registers.lower_line()


def test_intx_has_one_eventfd_for_unmasking(edu, fd):
    assert set_fds(edu, INTX, fd) == 0
    with eventfds(2) as (first, second), closed_descriptor() as closed:
        assert set_fds(edu, INTX, closed, action=UNMASK) == "EBADF"
        assert set_fds(edu, INTX, edu.container, action=UNMASK) == "EINVAL"
        assert set_fds(edu, INTX, -1, action=UNMASK) == 0
        assert set_fds(edu, INTX, first, action=UNMASK) == 0
        assert set_fds(edu, INTX, second, action=UNMASK) == "EBUSY"
        assert set_fds(edu, INTX, closed, action=UNMASK) == "EBADF"  # looked at first
        assert set_fds(edu, INTX, -1, action=UNMASK) == 0
        assert set_fds(edu, INTX, second, action=UNMASK) == 0


def test_interrupt_disable_bit_of_the_command_register_masks_intx(edu, registers, fd):
    assert set_fds(edu, INTX, fd) == 0
    command = edu.config(COMMAND, 2)
    edu.set_config(COMMAND, 2, command | INTX_OFF)
    registers.raise_line()
    assert signals(fd, NEVER) == 0
    edu.set_config(COMMAND, 2, command)
    assert signals(fd) == 1
    registers.lower_line()


def test_disabled_intx_does_not_arrive(edu, registers, fd):
    assert set_fds(edu, INTX, fd) == 0
    assert disable(edu, INTX) == 0
    registers.raise_line()
    assert signals(fd, NEVER) == 0
    registers.lower_line()


# --- The line before, and DisINTx ---


def test_line_that_is_up_when_intx_is_enabled_arrives_from_an_xics_and_not_from_a_xive(edu, target, registers, fd):
    registers.raise_line()
    assert set_fds(edu, INTX, fd) == 0
    assert signals(fd, NEVER) == (1 if target.topology.platform.cpu == "POWER8" else 0)
    registers.lower_line()


def test_intx_enabled_while_the_command_register_disables_it_begins_masked(edu, registers, fd):
    command = edu.config(COMMAND, 2)
    edu.set_config(COMMAND, 2, command | INTX_OFF)
    assert set_fds(edu, INTX, fd) == 0
    registers.raise_line()
    assert signals(fd, NEVER) == 0
    assert edu.set_irqs(INTX, NONE | UNMASK, count=1) == 0  # which DisINTx is above
    assert signals(fd, NEVER) == 0
    assert edu.set_irqs(INTX, NONE | TRIGGER, count=1) == 0
    assert signals(fd, NEVER) == 0
    edu.set_config(COMMAND, 2, command)
    assert signals(fd) == 1
    registers.lower_line()


def test_intx_arrives_after_msi_was_used(edu, registers, fd):
    assert set_fds(edu, MSI, fd) == 0
    assert disable(edu, MSI) == 0
    assert set_fds(edu, INTX, fd) == 0
    registers.raise_line()
    assert signals(fd) == 1
    registers.lower_line()


def test_intx_enabled_again_is_not_masked_any_more(edu, registers, fd):
    assert set_fds(edu, INTX, fd) == 0
    assert edu.set_irqs(INTX, NONE | MASK, count=1) == 0
    assert disable(edu, INTX) == 0
    assert set_fds(edu, INTX, fd) == 0
    registers.raise_line()
    assert signals(fd) == 1
    registers.lower_line()


# --- Resampling ---


def test_signal_from_before_unmasks_at_once(edu, registers):
    with eventfds(2) as (trigger, unmask):
        assert set_fds(edu, INTX, trigger) == 0
        registers.raise_line()
        assert signals(trigger) == 1
        os.eventfd_write(unmask, 1)
        assert set_fds(edu, INTX, unmask, action=UNMASK) == 0
        assert signals(trigger) == 1
        assert signals(unmask, NEVER) == 1  # it stays in the counter
        registers.lower_line()


def test_closed_eventfd_makes_room_for_another_one(edu, registers):
    with eventfds(2) as (trigger, second):
        assert set_fds(edu, INTX, trigger) == 0
        with eventfds() as (first,):
            assert set_fds(edu, INTX, first, action=UNMASK) == 0
            assert set_fds(edu, INTX, second, action=UNMASK) == "EBUSY"
        assert set_fds(edu, INTX, second, action=UNMASK) == 0
        registers.raise_line()
        assert signals(trigger) == 1
        os.eventfd_write(second, 1)
        assert signals(trigger) == 1
        registers.lower_line()


def test_second_eventfd_for_unmasking_is_not_listened_to(edu, registers):
    with eventfds(3) as (trigger, first, second):
        assert set_fds(edu, INTX, trigger) == 0
        assert set_fds(edu, INTX, first, action=UNMASK) == 0
        registers.raise_line()
        assert signals(trigger) == 1
        os.eventfd_write(second, 1)
        assert set_fds(edu, INTX, second, action=UNMASK) == "EBUSY"
        assert signals(trigger, NEVER) == 0
        registers.lower_line()


def test_eventfd_for_unmasking_goes_with_intx(edu, registers):
    with eventfds(2) as (trigger, unmask):
        assert set_fds(edu, INTX, trigger) == 0
        assert set_fds(edu, INTX, unmask, action=UNMASK) == 0
        assert disable(edu, INTX) == 0
        assert set_fds(edu, INTX, trigger) == 0
        registers.raise_line()
        assert signals(trigger) == 1
        os.eventfd_write(unmask, 1)
        assert signals(trigger, NEVER) == 0
        assert signals(unmask, NEVER) == 1  # nobody else took it
        registers.lower_line()
