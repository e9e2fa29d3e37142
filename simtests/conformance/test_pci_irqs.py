"""Interrupts of a vfio-pci device: VFIO_DEVICE_SET_IRQS, check by check, and what arrives.

Source: drivers/vfio/pci/vfio_pci_intrs.c and drivers/vfio/vfio_main.c of Linux 6.12.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from simtests.conformance.pci_calls import (
    COMMAND,
    INTX_OFF,
    MASTER,
    NOWHERE,
    EduRegisters,
    RawDevice,
    closed_descriptor,
    endpoint_address,
    eventfds,
    half_readable,
    int32,
    on_vfio,
    opened,
    outcome,
    signals,
)
from vfio import uapi

SET_IRQS = uapi.VFIO_DEVICE_SET_IRQS
INTX, MSI, MSIX, ERR, REQ = range(5)
NONE, BOOL, EVENTFD = 1, 2, 4
MASK, UNMASK, TRIGGER = 8, 16, 32
NEVER = 0.05
"""Seconds after which an interrupt that has not arrived does not."""
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
def endpoint(backend, target) -> Iterator[RawDevice]:
    """A PCI Express device with MSI-X."""
    with on_vfio(backend, endpoint_address(target)) as address, opened(backend, address) as device:
        yield device


@pytest.fixture
def fd() -> Iterator[int]:
    with eventfds() as (fd,):
        yield fd


def set_fds(device: RawDevice, index: int, *fds: int, start: int = 0, action: int = TRIGGER) -> int | str:
    """What came of setting eventfds."""
    return device.set_irqs(index, EVENTFD | action, start, len(fds), bytes(int32(*fds)))


def disable(device: RawDevice, index: int) -> int | str:
    """What came of disabling an index."""
    return device.set_irqs(index, NONE | TRIGGER)


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


# --- INTx ---


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


# --- MSI ---


def test_msi_of_the_device_arrives_every_time(edu, registers, fd):
    assert set_fds(edu, MSI, fd) == 0
    edu.set_config(COMMAND, 2, edu.config(COMMAND, 2) | 4)  # a message is a write of the device
    for _ in range(3):
        registers.raise_line()
        assert signals(fd) == 1
        registers.lower_line()


def test_msi_that_is_off_cannot_be_disabled_or_triggered(edu):
    assert disable(edu, MSI) == "EINVAL"
    assert edu.set_irqs(MSI, NONE | TRIGGER, count=1) == "EINVAL"
    assert edu.set_irqs(MSI, BOOL | TRIGGER, count=1, data=b"\1") == "EINVAL"


def test_msi_for_no_vector_at_all_is_erange(edu):
    assert edu.set_irqs(MSI, EVENTFD | TRIGGER) == "ERANGE"
    assert disable(edu, MSI) == "EINVAL"


def test_msix_for_no_vector_at_all_is_erange(endpoint):
    assert endpoint.set_irqs(MSIX, EVENTFD | TRIGGER) == "ERANGE"
    assert disable(endpoint, MSIX) == "EINVAL"


def test_msi_with_a_bad_descriptor_is_disabled_again(edu, fd):
    with closed_descriptor() as closed:
        assert set_fds(edu, MSI, closed) == "EBADF"
    assert set_fds(edu, MSI, edu.container) == "EINVAL"
    assert disable(edu, MSI) == "EINVAL"
    assert set_fds(edu, INTX, fd) == 0


def test_msi_triggered_by_hand_signals_the_eventfd(edu, fd):
    assert set_fds(edu, MSI, fd) == 0
    assert edu.set_irqs(MSI, NONE | TRIGGER, count=1) == 0
    assert signals(fd) == 1
    assert edu.set_irqs(MSI, BOOL | TRIGGER, count=1, data=b"\0") == 0
    assert signals(fd, NEVER) == 0
    assert edu.set_irqs(MSI, BOOL | TRIGGER, count=1, data=b"\1") == 0
    assert signals(fd) == 1


def test_msi_vector_without_an_eventfd_is_skipped(edu, registers, fd):
    assert set_fds(edu, MSI, -1) == 0
    assert edu.set_irqs(MSI, NONE | TRIGGER, count=1) == 0
    registers.raise_line()
    registers.lower_line()
    assert set_fds(edu, MSI, fd) == 0
    assert signals(fd, NEVER) == 0
    assert edu.set_irqs(MSI, NONE | TRIGGER, count=1) == 0
    assert signals(fd) == 1


def send(edu, registers, times=1):
    """Messages of the device, which are writes of it."""
    edu.set_config(COMMAND, 2, edu.config(COMMAND, 2) | MASTER)
    for _ in range(times):
        registers.raise_line()
        registers.lower_line()


def test_messages_from_before_the_first_eventfd_arrive_as_one_from_an_xics_and_not_at_all_from_a_xive(
    target, edu, registers, fd
):
    assert set_fds(edu, MSI, -1) == 0
    send(edu, registers, 3)
    assert set_fds(edu, MSI, -1) == 0
    assert set_fds(edu, MSI, fd) == 0
    assert signals(fd, NEVER) == (1 if target.topology.platform.cpu == "POWER8" else 0)
    send(edu, registers)
    assert signals(fd) == 1


def test_message_from_before_the_first_eventfd_is_forgotten_when_msi_is_disabled(edu, registers, fd):
    assert set_fds(edu, MSI, -1) == 0
    send(edu, registers)
    assert disable(edu, MSI) == 0
    assert set_fds(edu, MSI, fd) == 0
    assert signals(fd, NEVER) == 0


def test_message_of_a_vector_without_its_eventfd_any_more_is_lost(edu, registers, fd):
    assert set_fds(edu, MSI, fd) == 0
    assert set_fds(edu, MSI, -1) == 0
    send(edu, registers)
    assert set_fds(edu, MSI, fd) == 0
    assert signals(fd, NEVER) == 0


def test_message_of_a_vector_without_its_eventfd_any_more_overwrites_iova_0_on_powernv(
    target, backend, edu, registers, fd
):
    size = backend.page_size
    with backend.allocate(size) as memory:
        memory.view[:8] = b"\xff" * 8
        where = {"vaddr": memory.address, "size": size}
        registered = uapi.vfio_iommu_spapr_register_memory(**where)
        assert backend.ioctl(edu.container, uapi.VFIO_IOMMU_SPAPR_REGISTER_MEMORY, uapi.buffer(registered)) == 0
        mapped = uapi.vfio_iommu_type1_dma_map(**where, flags=3, iova=0)
        assert backend.ioctl(edu.container, uapi.VFIO_IOMMU_MAP_DMA, uapi.buffer(mapped)) == 0
        assert set_fds(edu, MSI, -1) == 0
        send(edu, registers)
        assert bytes(memory.view[:8]) == b"\xff" * 8
        assert set_fds(edu, MSI, fd) == 0
        assert set_fds(edu, MSI, -1) == 0
        send(edu, registers)
        assert bytes(memory.view[:8]) == (bytes(4) if target.platform == "PowerNV" else b"\xff" * 4) + b"\xff" * 4
        edu.close()


def test_msi_eventfd_can_be_replaced_and_removed(edu):
    with eventfds(2) as (first, second):
        assert set_fds(edu, MSI, first) == 0
        assert set_fds(edu, MSI, second) == 0
        assert edu.set_irqs(MSI, NONE | TRIGGER, count=1) == 0
        assert (signals(second), signals(first, NEVER)) == (1, 0)
        assert set_fds(edu, MSI, -1) == 0
        assert edu.set_irqs(MSI, NONE | TRIGGER, count=1) == 0
        assert (signals(second, NEVER), signals(first, NEVER)) == (0, 0)
        assert disable(edu, MSI) == 0


def test_bad_descriptor_clears_the_msi_vector_and_leaves_msi_on(edu, fd):
    assert set_fds(edu, MSI, fd) == 0
    with closed_descriptor() as closed:
        assert set_fds(edu, MSI, closed) == "EBADF"
    assert edu.set_irqs(MSI, NONE | TRIGGER, count=1) == 0
    assert signals(fd, NEVER) == 0
    assert disable(edu, MSI) == 0


def test_enable_bit_of_msi_can_be_set_only_while_the_interrupt_is_on(edu, fd):
    control = edu.capability(5) + 2
    edu.set_config(control, 2, 0xFFFF)
    assert edu.config(control, 2) == 0x008E
    edu.set_config(control, 2, 0x0080)
    assert set_fds(edu, MSI, fd) == 0
    assert edu.config(control, 2) == 0x0080  # the kernel's own enabling is not shown
    edu.set_config(control, 2, 0x0081)
    assert edu.config(control, 2) == 0x0081
    assert disable(edu, MSI) == 0
    assert edu.config(control, 2) == 0x0081


# --- One kind at a time ---


def test_only_one_of_intx_and_msi_can_be_on(edu, fd):
    assert set_fds(edu, MSI, fd) == 0
    assert set_fds(edu, INTX, fd) == "EINVAL"
    assert disable(edu, INTX) == "EINVAL"
    assert disable(edu, MSI) == 0
    assert set_fds(edu, INTX, fd) == 0
    assert set_fds(edu, MSI, fd) == "EINVAL"
    assert disable(edu, MSI) == "EINVAL"
    assert edu.set_irqs(MSI, NONE | TRIGGER, count=1) == "EINVAL"
    assert disable(edu, INTX) == 0


def test_only_one_of_intx_and_msix_can_be_on(endpoint, fd):
    assert set_fds(endpoint, MSIX, fd) == 0
    assert set_fds(endpoint, INTX, fd) == "EINVAL"
    assert disable(endpoint, INTX) == "EINVAL"
    assert disable(endpoint, MSIX) == 0
    assert set_fds(endpoint, INTX, fd) == 0
    assert set_fds(endpoint, MSIX, fd) == "EINVAL"
    assert disable(endpoint, MSIX) == "EINVAL"


# --- MSI-X ---


def test_msix_vectors_are_triggered_one_by_one(endpoint):
    with eventfds(3) as fds:
        assert set_fds(endpoint, MSIX, *fds) == 0
        assert endpoint.set_irqs(MSIX, NONE | TRIGGER, start=1, count=1) == 0
        assert [signals(fd, NEVER) for fd in fds] == [0, 1, 0]
        assert endpoint.set_irqs(MSIX, BOOL | TRIGGER, count=3, data=b"\1\0\7") == 0
        assert [signals(fd, NEVER) for fd in fds] == [1, 0, 1]
        assert endpoint.set_irqs(MSIX, NONE | TRIGGER, count=3) == 0
        assert [signals(fd, NEVER) for fd in fds] == [1, 1, 1]


def test_msix_trigger_beyond_the_allocated_vectors_is_harmless(endpoint, fd):
    assert set_fds(endpoint, MSIX, fd) == 0
    assert endpoint.set_irqs(MSIX, NONE | TRIGGER, count=4) == 0
    assert signals(fd) == 1


def test_msix_from_a_start_allocates_the_vectors_before_it(endpoint):
    with eventfds(2) as (first, second):
        assert set_fds(endpoint, MSIX, second, start=1) == 0
        assert set_fds(endpoint, MSIX, first) == 0
        assert endpoint.set_irqs(MSIX, NONE | TRIGGER, count=2) == 0
        assert (signals(first), signals(second)) == (1, 1)


def test_msix_cannot_grow_beyond_the_first_allocation_on_power(endpoint):
    with eventfds(3) as fds:
        assert set_fds(endpoint, MSIX, *fds[:2]) == 0
        assert set_fds(endpoint, MSIX, fds[2], start=2) == "EINVAL"
        assert endpoint.set_irqs(MSIX, NONE | TRIGGER, count=2) == 0
        assert [signals(fd, NEVER) for fd in fds] == [1, 1, 0]


def test_bad_msix_descriptor_clears_those_before_it_and_keeps_those_behind(endpoint):
    with eventfds(3) as fds, closed_descriptor() as closed:
        assert set_fds(endpoint, MSIX, *fds) == 0
        assert set_fds(endpoint, MSIX, fds[0], closed, fds[2]) == "EBADF"
        assert endpoint.set_irqs(MSIX, NONE | TRIGGER, count=3) == 0
        assert [signals(fd, NEVER) for fd in fds] == [0, 0, 1]
        assert disable(endpoint, MSIX) == 0


def test_bad_descriptor_at_the_first_setting_of_msix_disables_it_again(endpoint):
    with eventfds(2) as (first, second):
        assert set_fds(endpoint, MSIX, first, endpoint.container, second) == "EINVAL"
        assert disable(endpoint, MSIX) == "EINVAL"


def test_all_msix_vectors_can_be_had(endpoint):
    count, _ = endpoint.irq(MSIX)
    with eventfds() as (fd,):
        assert set_fds(endpoint, MSIX, *[fd] * count) == 0
        assert endpoint.set_irqs(MSIX, NONE | TRIGGER, count=count) == 0
        assert signals(fd) == count
        assert set_fds(endpoint, MSIX, fd, start=count) == "EINVAL"


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
