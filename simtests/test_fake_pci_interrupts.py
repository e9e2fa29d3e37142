"""SET_IRQS of the modelled kernel: INTx, MSI, MSI-X, error and request, delivered to real eventfds."""

from __future__ import annotations

import errno
import os
import struct

import pytest
from fake_pci import (
    BOOL,
    ERR,
    EVENTFD,
    INTX,
    MASK,
    MSI,
    MSIX,
    NONE,
    REQ,
    SET_IRQS,
    TRIGGER,
    UNMASK,
    Host,
    Opened,
    eventfd,
    refused,
    taken,
    until,
)

from vfio.fake import registers as reg
from vfio.fake import vfio_pci
from vfio.fake.file import File

EDU, TESTDEV, NVME = "0000:01:00.0", "0000:01:00.1", "0002:01:00.0"


@pytest.fixture
def edu() -> Opened:
    opened = Host().open(EDU)
    opened.set_config(reg.COMMAND, b"\x06\x01")
    return opened


@pytest.fixture
def nvme() -> Opened:
    return Host().open(NVME)


def assert_line(edu: Opened) -> None:
    edu.write(0x60, b"\0\0\0\1")


def release_line(edu: Opened) -> None:
    edu.write(0x64, b"\xff" * 4)


def test_irq_info_of_every_index(edu: Opened, nvme: Opened) -> None:
    assert [edu.irq_info(index) for index in (INTX, MSI, MSIX, REQ)] == [(7, 1), (9, 1), (9, 0), (9, 1)]
    assert [nvme.irq_info(index) for index in range(5)] == [(7, 1), (9, 0), (9, 65), (9, 1), (9, 1)]
    for index in (ERR, 5):
        with refused(errno.EINVAL):
            edu.irq_info(index)
    assert Host().open(TESTDEV).irq_info(INTX) == (7, 0)


@pytest.mark.parametrize(
    ("words", "number"),
    [
        ((19, NONE | TRIGGER, 0, 0, 1), errno.EINVAL),
        ((20, NONE | TRIGGER, 5, 0, 1), errno.EINVAL),
        ((20, NONE | TRIGGER, 0, 0, 0xFFFFFFFF), errno.EINVAL),
        ((20, NONE | TRIGGER, 0, 0xFFFFFFFF, 0), errno.EINVAL),
        ((20, NONE | TRIGGER | 64, 0, 0, 1), errno.EINVAL),
        ((20, NONE | TRIGGER, 0, 1, 0), errno.EINVAL),
        ((20, NONE | TRIGGER, 0, 0, 2), errno.EINVAL),
        ((20, NONE | TRIGGER, MSIX, 0, 0), errno.EINVAL),
        ((20, TRIGGER, 0, 0, 1), errno.EINVAL),
        ((20, NONE | BOOL | TRIGGER, 0, 0, 1), errno.EINVAL),
        ((20, BOOL | TRIGGER, 0, 0, 1), errno.EINVAL),
        ((23, EVENTFD | TRIGGER, 0, 0, 1), errno.EINVAL),
        ((20, NONE, 0, 0, 1), errno.ENOTTY),
        ((20, NONE | MASK | UNMASK, 0, 0, 1), errno.ENOTTY),
        ((20, NONE | MASK, MSI, 0, 1), errno.ENOTTY),
        ((20, NONE | UNMASK, REQ, 0, 1), errno.ENOTTY),
        ((20, NONE | TRIGGER, ERR, 0, 0), errno.EINVAL),
    ],
)
def test_arguments_are_checked_in_the_kernels_order(edu: Opened, words: tuple[int, ...], number: int) -> None:
    with refused(number):
        edu.ioctl(SET_IRQS, bytearray(struct.pack("=5I", *words) + bytes(4)))


# --- INTx ---


def test_line_signals_once_and_stays_masked_until_it_is_unmasked(edu: Opened) -> None:
    with eventfd() as fd:
        assert edu.set_irqs(INTX, EVENTFD | TRIGGER, fd) == 0
        assert_line(edu)
        assert_line(edu)
        assert taken(fd) == 1
        release_line(edu)
        edu.set_irqs(INTX, NONE | UNMASK, count=1)
        assert taken(fd) == 0
        assert_line(edu)
        assert taken(fd) == 1
        edu.close()


def test_unmasking_while_the_line_is_asserted_signals_again(edu: Opened) -> None:
    with eventfd() as fd:
        edu.set_irqs(INTX, EVENTFD | TRIGGER, fd)
        assert_line(edu)
        edu.set_irqs(INTX, BOOL | UNMASK, 1)
        assert taken(fd) == 2
        edu.set_irqs(INTX, BOOL | UNMASK, 0)
        assert taken(fd) == 0
        edu.close()


def test_enabling_with_an_asserted_line_signals_at_once(edu: Opened) -> None:
    assert_line(edu)
    with eventfd() as fd:
        edu.set_irqs(INTX, EVENTFD | TRIGGER, fd)
        assert taken(fd) == 1
        edu.close()


def test_masked_line_does_not_signal(edu: Opened) -> None:
    with eventfd() as fd:
        edu.set_irqs(INTX, EVENTFD | TRIGGER, fd)
        edu.set_irqs(INTX, NONE | MASK, count=1)
        assert_line(edu)
        assert taken(fd) == 0
        edu.set_irqs(INTX, NONE | UNMASK, count=1)
        assert taken(fd) == 1
        edu.close()


def test_virtual_disintx_masks_and_unmasks(edu: Opened) -> None:
    with eventfd() as fd:
        edu.set_irqs(INTX, EVENTFD | TRIGGER, fd)
        edu.set_config(reg.COMMAND, b"\x06\x05")
        assert_line(edu)
        edu.set_irqs(INTX, NONE | UNMASK, count=1)
        assert taken(fd) == 0
        edu.set_config(reg.COMMAND, b"\x06\x01")
        assert taken(fd) == 1
        edu.close()


def test_trigger_by_hand_is_for_an_active_intx(edu: Opened) -> None:
    for flags, data in ((NONE, ()), (BOOL, (1,))):
        with refused(errno.EINVAL):
            edu.set_irqs(INTX, flags | TRIGGER, *data, count=1)
    with eventfd() as fd:
        edu.set_irqs(INTX, EVENTFD | TRIGGER, fd)
        edu.set_irqs(INTX, NONE | TRIGGER, count=1)
        edu.set_irqs(INTX, BOOL | TRIGGER, 1)
        edu.set_irqs(INTX, BOOL | TRIGGER, 0)
        assert taken(fd) == 2
        edu.close()


def test_negative_eventfd_enables_without_a_trigger_and_removes_one(edu: Opened) -> None:
    assert edu.set_irqs(INTX, EVENTFD | TRIGGER, -1) == 0
    with eventfd() as fd:
        edu.set_irqs(INTX, EVENTFD | TRIGGER, fd)
        edu.set_irqs(INTX, EVENTFD | TRIGGER, -1)
        edu.set_irqs(INTX, NONE | TRIGGER, count=1)
        assert taken(fd) == 0
    assert edu.set_irqs(INTX, NONE | TRIGGER, count=0) == 0
    with refused(errno.EINVAL):
        edu.set_irqs(INTX, NONE | TRIGGER, count=0)


def test_what_is_no_eventfd_is_refused(edu: Opened, nvme: Opened) -> None:
    device = edu.process.install(File())
    with open("/dev/null", encoding="ascii") as null:
        for opened, index, start in ((edu, INTX, 0), (edu, MSI, 0), (nvme, MSIX, 3), (nvme, ERR, 0), (edu, REQ, 0)):
            for fd, number in ((99999, errno.EBADF), (null.fileno(), errno.EINVAL), (device, errno.EINVAL)):
                with refused(number):
                    opened.set_irqs(index, EVENTFD | TRIGGER, fd, start=start)
            assert opened.vdev.interrupts.active is None
    edu.process.close(device)


def test_device_without_a_host_interrupt_has_no_intx(edu: Opened) -> None:
    edu.pci.irq = 0
    with eventfd() as fd:
        with refused(errno.ENODEV):
            edu.set_irqs(INTX, EVENTFD | TRIGGER, fd)
    assert edu.vdev.interrupts.active is None


def test_mask_and_unmask_want_an_active_intx(edu: Opened) -> None:
    for action in (MASK, UNMASK):
        with refused(errno.EINVAL):
            edu.set_irqs(INTX, NONE | action, count=1)
    edu.set_irqs(INTX, EVENTFD | TRIGGER, -1)
    for action in (MASK, UNMASK):
        with refused(errno.EINVAL):
            edu.set_irqs(INTX, NONE | action, count=0)
    with refused(errno.ENOTTY):
        edu.set_irqs(INTX, EVENTFD | MASK, -1)


def test_unmask_eventfd_unmasks_and_is_consumed(edu: Opened) -> None:
    with eventfd() as fd, eventfd() as unmask:
        edu.set_irqs(INTX, EVENTFD | TRIGGER, fd)
        assert edu.set_irqs(INTX, EVENTFD | UNMASK, unmask) == 0
        assert_line(edu)
        assert taken(fd) == 1
        os.eventfd_write(unmask, 1)
        until(lambda: taken(fd) == 1)
        assert taken(unmask) == 0
        with refused(errno.EBADF):
            edu.set_irqs(INTX, EVENTFD | UNMASK, 99999)
        with refused(errno.EBUSY):
            edu.set_irqs(INTX, EVENTFD | UNMASK, unmask)
        assert edu.set_irqs(INTX, EVENTFD | UNMASK, -1) == 0
        assert edu.set_irqs(INTX, EVENTFD | UNMASK, unmask) == 0
        edu.close()


def test_eventfd_that_its_process_reads_as_well_goes_on_unmasking(edu: Opened) -> None:
    with eventfd() as fd, eventfd() as unmask:
        edu.set_irqs(INTX, EVENTFD | TRIGGER, fd)
        edu.set_irqs(INTX, EVENTFD | UNMASK, unmask)
        for _ in range(3000):  # either may be faster
            os.eventfd_write(unmask, 1)
            taken(unmask)
        assert_line(edu)
        assert taken(fd) == 1
        os.eventfd_write(unmask, 1)
        until(lambda: taken(fd) == 1)
        edu.close()


def test_unmask_eventfd_goes_with_intx(edu: Opened) -> None:
    with eventfd() as unmask:
        edu.set_irqs(INTX, EVENTFD | TRIGGER, -1)
        edu.set_irqs(INTX, EVENTFD | UNMASK, unmask)
        edu.set_irqs(INTX, NONE | TRIGGER, count=0)
        os.eventfd_write(unmask, 1)
        assert taken(unmask) == 1


# --- MSI and MSI-X ---


def test_message_is_delivered_for_each_interrupt(edu: Opened) -> None:
    with eventfd() as fd:
        assert edu.set_irqs(MSI, EVENTFD | TRIGGER, fd) == 0
        for _ in range(3):
            assert_line(edu)
        assert taken(fd) == 3
        edu.set_irqs(MSI, NONE | TRIGGER, count=0)
        assert_line(edu)
        assert taken(fd) == 0


def test_message_takes_a_bus_master(edu: Opened) -> None:
    edu.set_config(reg.COMMAND, b"\x02\x01")
    with eventfd() as fd:
        edu.set_irqs(MSI, EVENTFD | TRIGGER, fd)
        assert_line(edu)
        assert taken(fd) == 0
        edu.close()


def test_only_one_kind_of_interrupt_is_active(edu: Opened) -> None:
    with eventfd() as fd:
        edu.set_irqs(MSI, EVENTFD | TRIGGER, fd)
        for flags, data, count in ((EVENTFD, (fd,), 1), (NONE, (), 1), (NONE, (), 0)):
            with refused(errno.EINVAL):
                edu.set_irqs(INTX, flags | TRIGGER, *data, count=count)
        edu.set_irqs(MSI, NONE | TRIGGER, count=0)
        with refused(errno.EINVAL):
            edu.set_irqs(MSI, NONE | TRIGGER, count=0)
        edu.set_irqs(INTX, EVENTFD | TRIGGER, fd)
        with refused(errno.EINVAL):
            edu.set_irqs(MSI, EVENTFD | TRIGGER, fd)
        edu.close()


def test_no_vectors_at_all_raises_erange(edu: Opened) -> None:
    with refused(errno.ERANGE):
        edu.set_irqs(MSI, EVENTFD | TRIGGER, count=0)


def test_vectors_behind_the_first_allocation_raise_einval_and_clear_all_from_start_on(nvme: Opened) -> None:
    with eventfd() as first, eventfd() as second, eventfd() as third:
        nvme.set_irqs(MSIX, EVENTFD | TRIGGER, first, second, start=2)
        assert nvme.config(0x43, 1) == b"\x80"
        with refused(errno.EINVAL):
            nvme.set_irqs(MSIX, EVENTFD | TRIGGER, third, third, start=3)
        nvme.set_irqs(MSIX, NONE | TRIGGER, start=0, count=5)
        assert (taken(first), taken(second), taken(third)) == (1, 0, 0)
        nvme.close()


def test_failing_vector_of_an_inactive_index_disables_it(nvme: Opened) -> None:
    with eventfd() as fd:
        with refused(errno.EBADF):
            nvme.set_irqs(MSIX, EVENTFD | TRIGGER, fd, 99999)
        assert nvme.config(0x43, 1) == b"\x00"
        with refused(errno.EINVAL):
            nvme.set_irqs(MSIX, NONE | TRIGGER, count=1)


def test_vectors_are_triggered_by_hand(nvme: Opened) -> None:
    with eventfd() as first, eventfd() as second:
        nvme.set_irqs(MSIX, EVENTFD | TRIGGER, first, -1, second)
        nvme.set_irqs(MSIX, BOOL | TRIGGER, 0, 1, 1)
        assert (taken(first), taken(second)) == (0, 1)
        nvme.set_irqs(MSIX, EVENTFD | TRIGGER, -1, start=2)
        nvme.set_irqs(MSIX, NONE | TRIGGER, count=3)
        assert (taken(first), taken(second)) == (1, 0)
        nvme.close()


def test_messages_cannot_be_set_up_in_d3hot(nvme: Opened) -> None:
    nvme.set_config(0x64, b"\3")
    with eventfd() as fd:
        with refused(errno.EINVAL):
            nvme.set_irqs(MSIX, EVENTFD | TRIGGER, fd)


def test_enabling_messages_lets_the_line_go(edu: Opened) -> None:
    assert_line(edu)
    assert edu.config(reg.STATUS, 1) == b"\x18"
    with eventfd() as fd:
        edu.set_irqs(MSI, EVENTFD | TRIGGER, fd)
        assert edu.config(reg.STATUS, 1) == b"\x10"
        edu.close()


def test_count_of_msi_is_what_a_blocked_register_reads(edu: Opened) -> None:
    assert edu.pci.pe
    edu.pci.eeh.blocked = True
    assert edu.irq_info(MSI) == (9, 128)


# --- error and request ---


@pytest.mark.parametrize("index", [ERR, REQ])
def test_error_and_request_are_one_eventfd_each(nvme: Opened, index: int) -> None:
    for flags, data, count in ((NONE, (), 1), (NONE, (), 0), (BOOL, (), 0), (EVENTFD, (), 0), (EVENTFD, (-2,), 1)):
        with refused(errno.EINVAL):
            nvme.set_irqs(index, flags | TRIGGER, *data, count=count)
    assert nvme.set_irqs(index, BOOL | TRIGGER, 1) == 0
    with eventfd() as fd:
        assert nvme.set_irqs(index, EVENTFD | TRIGGER, fd) == 0
        nvme.set_irqs(index, NONE | TRIGGER, count=1)
        nvme.set_irqs(index, BOOL | TRIGGER, 1)
        nvme.set_irqs(index, BOOL | TRIGGER, 0)
        assert taken(fd) == 2
        assert nvme.set_irqs(index, NONE | TRIGGER, count=0) == 0
        with refused(errno.EINVAL):
            nvme.set_irqs(index, NONE | TRIGGER, count=1)
        nvme.set_irqs(index, EVENTFD | TRIGGER, fd)
        assert nvme.set_irqs(index, EVENTFD | TRIGGER, -1) == 0
        with refused(errno.EINVAL):
            nvme.set_irqs(index, NONE | TRIGGER, count=1)


def test_request_of_the_host_is_signalled(edu: Opened) -> None:
    with eventfd() as fd:
        vfio_pci.OPS.request(edu.vdev, 0)
        edu.set_irqs(REQ, EVENTFD | TRIGGER, fd)
        vfio_pci.OPS.request(edu.vdev, 0)
        vfio_pci.OPS.request(edu.vdev, 1)
        assert taken(fd) == 2
        edu.close()
        vfio_pci.OPS.request(edu.vdev, 2)
        assert taken(fd) == 0


def test_error_that_the_host_found_is_signalled(nvme: Opened) -> None:
    vfio_pci.error_detected(nvme.pci)
    with eventfd() as fd:
        nvme.set_irqs(ERR, EVENTFD | TRIGGER, fd)
        vfio_pci.error_detected(nvme.pci)
        assert taken(fd) == 1
        nvme.close()
        vfio_pci.error_detected(nvme.pci)
        assert taken(fd) == 0


# --- eventfds ---


def test_eventfd_that_its_process_closed_is_still_held(edu: Opened) -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    watched = os.dup(fd)
    edu.set_irqs(MSI, EVENTFD | TRIGGER, fd)
    os.close(fd)
    assert_line(edu)
    assert taken(watched) == 1
    edu.close()
    os.close(watched)


def test_full_eventfd_stays_full_and_nobody_waits(edu: Opened) -> None:
    with eventfd() as fd:
        os.eventfd_write(fd, (1 << 64) - 2)
        edu.set_irqs(MSI, EVENTFD | TRIGGER, fd)
        assert_line(edu)
        assert taken(fd) == (1 << 64) - 2
        edu.close()


def test_nothing_is_left_open(edu: Opened) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    with eventfd() as fd, eventfd() as unmask:
        edu.set_irqs(INTX, EVENTFD | TRIGGER, fd)
        edu.set_irqs(INTX, EVENTFD | UNMASK, unmask)
        edu.set_irqs(REQ, EVENTFD | TRIGGER, fd)
        edu.close()
    until(lambda: descriptors() == before)
