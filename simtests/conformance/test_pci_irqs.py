"""Interrupts of a vfio-pci device: what VFIO_DEVICE_SET_IRQS checks before it looks at the index, in its order; error and
request interrupts; and what becomes of interrupts when a device is closed.

Source: drivers/vfio/pci/vfio_pci_intrs.c and drivers/vfio/vfio_main.c of Linux 6.12.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from simtests.conformance.irq_calls import (
    BOOL,
    ERR,
    EVENTFD,
    INTX,
    MASK,
    MSI,
    MSIX,
    NEVER,
    NONE,
    REQ,
    SET_IRQS,
    TRIGGER,
    UNMASK,
    disable,
    set_fds,
)
from simtests.conformance.pci_calls import (
    NOWHERE,
    RawDevice,
    closed_descriptor,
    endpoint_address,
    eventfds,
    half_readable,
    on_vfio,
    opened,
    outcome,
    signals,
)
from vfio import uapi

pytestmark = pytest.mark.lab_only  # hostile


@pytest.fixture
def edu(backend, member) -> Iterator[RawDevice]:
    """A conventional device: INTx, and MSI with one vector."""
    with opened(backend, member.address) as device:
        yield device


@pytest.fixture
def endpoint(backend, target) -> Iterator[RawDevice]:
    """A PCI Express device with MSI-X."""
    with on_vfio(backend, endpoint_address(target)) as address, opened(backend, address) as device:
        yield device


@pytest.fixture
def fd() -> Iterator[int]:
    with eventfds() as (fd,):
        yield fd


# --- Checks before the index ---


@pytest.mark.parametrize("address", [0, NOWHERE], ids=hex)
def test_set_irqs_at_a_bad_address_is_efault(edu, address):
    assert edu.ioctl(SET_IRQS, address) == "EFAULT"


@pytest.mark.parametrize("argsz", [0, 4, 19])
def test_set_irqs_with_a_short_argsz_is_einval(edu, argsz):
    argument = uapi.vfio_irq_set.sized(20, flags=NONE | TRIGGER, index=REQ, count=1)
    argument.argsz = argsz
    assert edu.ioctl(SET_IRQS, argument) == "EINVAL"


@pytest.mark.parametrize("index", [5, 6, 0x80000000, 0xFFFFFFFF])
def test_set_irqs_of_an_index_that_there_is_not_is_einval(edu, index):
    assert edu.set_irqs(index, NONE | MASK | UNMASK, count=1) == "EINVAL"


@pytest.mark.parametrize("flags", [NONE | TRIGGER | 0x40, NONE | TRIGGER | 0x80000000, 0xFFFFFFFF])
def test_set_irqs_with_an_unknown_flag_is_einval(edu, flags):
    assert edu.set_irqs(INTX, flags, count=1) == "EINVAL"


@pytest.mark.parametrize(
    ("start", "count"),
    [(0, 2), (1, 0), (1, 1), (2, 0), (0, 0xFFFFFFFF), (0xFFFFFFFF, 0), (0xFFFFFFFF, 1), (1, 0xFFFFFFFE)],
)
@pytest.mark.parametrize("index", [INTX, MSI, REQ])
def test_set_irqs_beyond_the_interrupts_of_the_index_is_einval(edu, index, start, count):
    assert edu.set_irqs(index, NONE | TRIGGER, start, count) == "EINVAL"


@pytest.mark.parametrize("index", [MSIX, ERR])
@pytest.mark.parametrize("flags", [NONE | TRIGGER, NONE | MASK, NONE | MASK | UNMASK])
def test_set_irqs_of_an_index_without_interrupts_is_einval_even_for_none(edu, index, flags):
    assert edu.set_irqs(index, flags) == "EINVAL"


@pytest.mark.parametrize("data", [0, NONE | BOOL, NONE | EVENTFD, BOOL | EVENTFD, NONE | BOOL | EVENTFD])
def test_set_irqs_needs_exactly_one_kind_of_data(edu, data):
    assert edu.set_irqs(INTX, data | TRIGGER, count=1, data=bytes(4)) == "EINVAL"


@pytest.mark.parametrize(("kind", "size"), [(BOOL, 0), (EVENTFD, 0), (EVENTFD, 1), (EVENTFD, 3)])
def test_set_irqs_with_less_data_than_its_count_needs_is_einval(edu, kind, size):
    assert edu.set_irqs(REQ, kind | TRIGGER, count=1, data=b"\xff" * size) == "EINVAL"


def test_set_irqs_with_more_data_than_its_count_needs_is_fine(edu):
    assert edu.set_irqs(REQ, EVENTFD | TRIGGER, count=1, data=b"\xff" * 12) == 0


def test_set_irqs_with_data_that_cannot_be_read_is_efault(backend, edu):
    header = bytes(uapi.buffer(uapi.vfio_irq_set.sized(24, flags=EVENTFD | TRIGGER, index=REQ, count=1)))[:20]
    with half_readable(backend, header) as address:
        assert edu.ioctl(SET_IRQS, address) == "EFAULT"


@pytest.mark.parametrize("action", [0, MASK | UNMASK, MASK | TRIGGER, UNMASK | TRIGGER, MASK | UNMASK | TRIGGER])
@pytest.mark.parametrize("index", [INTX, MSI, REQ])
def test_set_irqs_needs_exactly_one_action(edu, index, action):
    assert edu.set_irqs(index, NONE | action, count=1) == "ENOTTY"


@pytest.mark.parametrize("action", [MASK, UNMASK])
@pytest.mark.parametrize("index", [MSI, REQ])
def test_only_intx_can_be_masked(edu, index, action):
    assert edu.set_irqs(index, NONE | action, count=1) == "ENOTTY"
    assert edu.set_irqs(index, BOOL | action, count=1, data=b"\1") == "ENOTTY"


@pytest.mark.parametrize("action", [MASK, UNMASK])
@pytest.mark.parametrize("index", [MSIX, ERR])
def test_only_intx_can_be_masked_on_an_express_device_too(endpoint, index, action):
    assert endpoint.set_irqs(index, NONE | action, count=1) == "ENOTTY"


# --- ERR and REQ ---


@pytest.mark.parametrize("index", [ERR, REQ])
def test_request_and_error_interrupts_without_an_eventfd_are_einval(endpoint, index):
    assert disable(endpoint, index) == "EINVAL"
    assert endpoint.set_irqs(index, NONE | TRIGGER, count=1) == "EINVAL"
    assert endpoint.set_irqs(index, BOOL | TRIGGER) == "EINVAL"
    assert endpoint.set_irqs(index, EVENTFD | TRIGGER) == "EINVAL"


@pytest.mark.parametrize("index", [ERR, REQ])
@pytest.mark.parametrize("value", [b"\0", b"\1"])
def test_boolean_trigger_without_an_eventfd_does_nothing(endpoint, index, value):
    assert endpoint.set_irqs(index, BOOL | TRIGGER, count=1, data=value) == 0


@pytest.mark.parametrize("index", [ERR, REQ])
def test_request_and_error_interrupts_are_triggered_by_hand(endpoint, fd, index):
    assert set_fds(endpoint, index, fd) == 0
    assert endpoint.set_irqs(index, NONE | TRIGGER, count=1) == 0
    assert endpoint.set_irqs(index, BOOL | TRIGGER, count=1, data=b"\0") == 0
    assert signals(fd) == 1
    assert endpoint.set_irqs(index, BOOL | TRIGGER, count=1, data=b"\1") == 0
    assert signals(fd) == 1
    assert endpoint.set_irqs(index, BOOL | TRIGGER) == "EINVAL"
    assert endpoint.set_irqs(index, EVENTFD | TRIGGER) == "EINVAL"


@pytest.mark.parametrize("index", [ERR, REQ])
@pytest.mark.parametrize("remove", [NONE, EVENTFD])
def test_request_and_error_eventfds_are_removed(endpoint, fd, index, remove):
    assert set_fds(endpoint, index, fd) == 0
    assert (disable(endpoint, index) if remove == NONE else set_fds(endpoint, index, -1)) == 0
    assert endpoint.set_irqs(index, NONE | TRIGGER, count=1) == "EINVAL"
    assert disable(endpoint, index) == "EINVAL"
    assert set_fds(endpoint, index, -1) == 0  # nothing to remove is no error


@pytest.mark.parametrize("index", [ERR, REQ])
def test_bad_descriptor_for_a_request_or_error_interrupt_keeps_the_old_one(endpoint, fd, index):
    assert set_fds(endpoint, index, fd) == 0
    with closed_descriptor() as closed:
        assert set_fds(endpoint, index, closed) == "EBADF"
    assert set_fds(endpoint, index, endpoint.container) == "EINVAL"
    assert set_fds(endpoint, index, -2) == "EINVAL"
    assert endpoint.set_irqs(index, NONE | TRIGGER, count=1) == 0
    assert signals(fd) == 1


def test_request_interrupt_is_independent_of_the_others(edu, fd):
    assert set_fds(edu, REQ, fd) == 0
    assert set_fds(edu, MSI, fd) == 0
    assert edu.set_irqs(REQ, NONE | TRIGGER, count=1) == 0
    assert edu.set_irqs(MSI, NONE | TRIGGER, count=1) == 0
    assert signals(fd) == 2


@pytest.mark.parametrize("index", [ERR, REQ])
def test_request_and_error_eventfds_are_replaced(endpoint, index):
    with eventfds(2) as (first, second):
        assert set_fds(endpoint, index, first) == 0
        assert set_fds(endpoint, index, second) == 0
        assert endpoint.set_irqs(index, NONE | TRIGGER, count=1) == 0
        assert (signals(second), signals(first, NEVER)) == (1, 0)


# --- Closing ---


def test_interrupts_are_of_the_device_and_not_of_the_descriptor(backend, edu, fd):
    other = edu.open_again()
    assert set_fds(edu, MSI, fd) == 0
    backend.close(other)
    assert edu.set_irqs(MSI, NONE | TRIGGER, count=1) == 0
    assert signals(fd) == 1


@pytest.mark.parametrize("index", [INTX, MSI, REQ])
def test_last_close_disables_interrupts(backend, member, fd, index):
    with opened(backend, member.address) as device:
        assert set_fds(device, index, fd) == 0
    with opened(backend, member.address) as device:
        assert device.set_irqs(index, NONE | TRIGGER, count=1) == "EINVAL"
        assert disable(device, index) == "EINVAL"
    assert signals(fd, NEVER) == 0


def test_closed_eventfd_still_belongs_to_the_device(edu):
    with eventfds() as (fd,):
        copy = os.dup(fd)
        assert set_fds(edu, MSI, fd) == 0
    try:
        assert edu.set_irqs(MSI, NONE | TRIGGER, count=1) == 0
        assert signals(copy) == 1
    finally:
        os.close(copy)


def test_interrupts_of_a_closed_device_are_ebadf(backend, member):
    with opened(backend, member.address) as device:
        closed = device.open_again()
        backend.close(closed)
        argument = uapi.buffer(uapi.vfio_irq_set.sized(20, flags=NONE | TRIGGER))
        assert outcome(backend.ioctl, closed, SET_IRQS, argument) == "EBADF"
