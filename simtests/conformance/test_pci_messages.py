"""MSI and MSI-X of a vfio-pci device: sets of vectors, whole and in part, and what arrives.

Source: drivers/vfio/pci/vfio_pci_intrs.c of Linux 6.12.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from simtests.conformance.fixtures import PC, POWER
from simtests.conformance.irq_calls import BOOL, EVENTFD, INTX, MSI, MSIX, NEVER, NONE, TRIGGER, disable, set_fds
from simtests.conformance.pci_calls import (
    COMMAND,
    MASTER,
    MEMORY,
    EduRegisters,
    RawDevice,
    closed_descriptor,
    endpoint_address,
    eventfds,
    on_vfio,
    opened,
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
    keeps = target.topology.platform.cpu == "POWER8" or target.platform == "PC"
    assert signals(fd, NEVER) == (1 if keeps else 0)
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
        if target.platform != "PC":
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
        assert bytes(memory.view[:8]) == (bytes(4) if target.platform != "pSeries" else b"\xff" * 4) + b"\xff" * 4
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


@POWER
def test_msix_cannot_grow_beyond_the_first_allocation_on_power(endpoint):
    with eventfds(3) as fds:
        assert set_fds(endpoint, MSIX, *fds[:2]) == 0
        assert set_fds(endpoint, MSIX, fds[2], start=2) == "EINVAL"
        assert endpoint.set_irqs(MSIX, NONE | TRIGGER, count=2) == 0
        assert [signals(fd, NEVER) for fd in fds] == [1, 1, 0]


@PC
def test_msix_grows_and_has_gaps_on_a_pc(endpoint):
    with eventfds(3) as fds, closed_descriptor() as closed:
        assert set_fds(endpoint, MSIX, *fds[:2]) == 0
        assert set_fds(endpoint, MSIX, fds[2], start=4) == 0
        assert endpoint.set_irqs(MSIX, NONE | TRIGGER, count=5) == 0
        assert [signals(fd, NEVER) for fd in fds] == [1, 1, 1]
        assert set_fds(endpoint, MSIX, fds[2], closed, start=2) == "EBADF"
        assert set_fds(endpoint, MSIX, fds[2], fds[0], fds[1], start=3) == "EINVAL"
        assert endpoint.set_irqs(MSIX, NONE | TRIGGER, count=5) == 0
        assert [signals(fd, NEVER) for fd in fds] == [1, 1, 1]
        assert set_fds(endpoint, MSIX, fds[0], start=3) == 0
        assert disable(endpoint, MSIX) == 0
        assert endpoint.set_irqs(MSIX, NONE | TRIGGER, start=3, count=1) == "EINVAL"


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


# --- Sets of vectors ---


def test_msix_can_be_enabled_without_setting_a_vector(endpoint, target):
    grows = target.platform == "PC"
    assert endpoint.set_irqs(MSIX, EVENTFD | TRIGGER, start=2) == 0  # two vectors are allocated
    with eventfds(2) as (first, second):
        assert set_fds(endpoint, MSIX, second, start=1) == 0
        assert set_fds(endpoint, MSIX, first, start=2) == (0 if grows else "EINVAL")
        assert endpoint.set_irqs(MSIX, NONE | TRIGGER, count=3) == 0
        assert (signals(second), signals(first, NEVER)) == (1, int(grows))
    assert disable(endpoint, MSIX) == 0


def test_msix_set_to_nothing_at_all_stays_as_it_is(endpoint, fd):
    assert set_fds(endpoint, MSIX, fd) == 0
    assert endpoint.set_irqs(MSIX, EVENTFD | TRIGGER) == 0
    assert endpoint.set_irqs(MSIX, EVENTFD | TRIGGER, start=4) == 0
    assert endpoint.set_irqs(MSIX, BOOL | TRIGGER, start=4) == 0
    assert endpoint.set_irqs(MSIX, NONE | TRIGGER, count=1) == 0
    assert signals(fd) == 1


@pytest.mark.parametrize("start", [0, 1, 4])
def test_msix_is_disabled_whatever_the_start_of_none(endpoint, fd, start):
    assert set_fds(endpoint, MSIX, fd) == 0
    assert endpoint.set_irqs(MSIX, NONE | TRIGGER, start=start) == 0
    assert endpoint.set_irqs(MSIX, NONE | TRIGGER, start=start) == "EINVAL"
    assert endpoint.set_irqs(MSIX, BOOL | TRIGGER, start=start) == "EINVAL"


@pytest.mark.parametrize("none", [-1, -2, -(1 << 31)])
def test_msix_vector_in_the_middle_is_taken_out_and_put_back(endpoint, none):
    with eventfds(3) as fds:
        assert set_fds(endpoint, MSIX, *fds) == 0
        assert set_fds(endpoint, MSIX, none, start=1) == 0
        assert endpoint.set_irqs(MSIX, NONE | TRIGGER, count=3) == 0
        assert [signals(fd, NEVER) for fd in fds] == [1, 0, 1]
        assert set_fds(endpoint, MSIX, fds[1], start=1) == 0
        assert endpoint.set_irqs(MSIX, NONE | TRIGGER, count=3) == 0
        assert [signals(fd, NEVER) for fd in fds] == [1, 1, 1]


def test_msix_with_no_vector_left_is_still_enabled(endpoint, fd):
    assert set_fds(endpoint, MSIX, fd, fd) == 0
    assert set_fds(endpoint, MSIX, -1, -1) == 0
    assert set_fds(endpoint, INTX, fd) == "EINVAL"
    assert set_fds(endpoint, MSIX, fd, start=1) == 0
    assert disable(endpoint, MSIX) == 0


def test_msix_of_vectors_that_have_no_eventfd_yet_gets_them_later(endpoint):
    with eventfds(2) as (first, second):
        assert set_fds(endpoint, MSIX, first, -1, -1, -1) == 0
        assert set_fds(endpoint, MSIX, second, start=3) == 0
        assert endpoint.set_irqs(MSIX, BOOL | TRIGGER, count=4, data=b"\0\1\1\1") == 0
        assert (signals(first, NEVER), signals(second)) == (0, 1)


def test_vector_beyond_the_allocated_ones_is_looked_at_before_its_descriptor(endpoint, target, fd):
    """Where vectors are allocated one by one, there is nothing to look at."""
    assert set_fds(endpoint, MSIX, fd) == 0
    with closed_descriptor() as closed:
        assert set_fds(endpoint, MSIX, closed, start=1) == ("EBADF" if target.platform == "PC" else "EINVAL")
        assert set_fds(endpoint, MSIX, closed) == "EBADF"
    assert set_fds(endpoint, MSIX, -1, start=4) == 0  # taking out what there is not is no error


def test_one_eventfd_for_two_vectors_counts_both(endpoint, fd):
    assert set_fds(endpoint, MSIX, fd, fd) == 0
    assert endpoint.set_irqs(MSIX, NONE | TRIGGER, count=2) == 0
    assert signals(fd) == 2
    assert set_fds(endpoint, MSIX, -1) == 0
    assert endpoint.set_irqs(MSIX, NONE | TRIGGER, count=2) == 0
    assert signals(fd) == 1


# --- What the rest of the device does to them ---


def test_message_needs_bus_master(edu, registers, fd):
    assert set_fds(edu, MSI, fd) == 0
    assert edu.config(COMMAND, 2) & MASTER == 0
    registers.raise_line()
    assert signals(fd, NEVER) == 0
    edu.set_config(COMMAND, 2, edu.config(COMMAND, 2) | MASTER)
    assert signals(fd, NEVER) == 0  # it was lost
    registers.raise_line()
    assert signals(fd) == 1
    registers.lower_line()


def test_msix_is_enabled_and_disabled_while_memory_is_not_decoded(endpoint, fd):
    command = endpoint.config(COMMAND, 2)
    endpoint.set_config(COMMAND, 2, command & ~MEMORY)
    assert set_fds(endpoint, MSIX, fd) == 0
    assert endpoint.set_irqs(MSIX, NONE | TRIGGER, count=1) == 0
    assert signals(fd) == 1
    assert endpoint.config(COMMAND, 2) == command & ~MEMORY
    assert disable(endpoint, MSIX) == 0
    endpoint.set_config(COMMAND, 2, command)


@pytest.mark.targets("powernv8", "powernv8-64k", "pseries", "pseries-64k", "q35")
def test_msix_is_not_enabled_in_d3hot(endpoint, fd):
    control = endpoint.capability(1) + 4
    endpoint.set_config(control, 2, endpoint.config(control, 2) | 3)
    assert set_fds(endpoint, MSIX, fd) == "EINVAL"
    assert disable(endpoint, MSIX) == "EINVAL"
    endpoint.set_config(control, 2, endpoint.config(control, 2) & ~3)
    assert set_fds(endpoint, MSIX, fd) == 0
