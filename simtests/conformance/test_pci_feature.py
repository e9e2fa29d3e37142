"""VFIO_DEVICE_FEATURE and VFIO_DEVICE_IOEVENTFD of a vfio-pci device.

Source: drivers/vfio/vfio_main.c, drivers/vfio/pci/vfio_pci_core.c and vfio_pci_rdwr.c of Linux 6.12.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from simtests.conformance.pci_calls import (
    NOWHERE,
    EduRegisters,
    RawDevice,
    closed_descriptor,
    endpoint_address,
    eventfds,
    file_range,
    on_vfio,
    opened,
    outcome,
)
from vfio import sysfs, uapi

FEATURE = uapi.VFIO_DEVICE_FEATURE
GET, SET, PROBE = uapi.VFIO_DEVICE_FEATURE_GET, uapi.VFIO_DEVICE_FEATURE_SET, uapi.VFIO_DEVICE_FEATURE_PROBE
ENTRY, ENTRY_WITH_WAKEUP, EXIT = 3, 4, 5
IOEVENTFD = uapi.VFIO_DEVICE_IOEVENTFD
LIVENESS = EduRegisters.LIVENESS

pytestmark = pytest.mark.lab_only  # what these devices are is known
POWERNV = pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k")


@pytest.fixture
def edu(backend, member) -> Iterator[RawDevice]:
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


def newer_than_6_12(backend) -> bool:
    major, minor = sysfs.kernel_release(backend).split(".")[:2]
    return (int(major), int(minor.split("-")[0])) > (6, 12)


# --- VFIO_DEVICE_FEATURE ---


def feature(device: RawDevice, flags: int, data: bytes = b"", argsz: int | None = None) -> int | str:
    """What came of VFIO_DEVICE_FEATURE."""
    size = 8 + len(data) if argsz is None else argsz
    return device.ioctl(FEATURE, bytearray(size.to_bytes(4, "little") + flags.to_bytes(4, "little") + data))


def test_feature_at_a_bad_address_is_efault(edu):
    assert edu.ioctl(FEATURE, NOWHERE) == "EFAULT"


@pytest.mark.parametrize("argsz", [0, 4, 7])
def test_feature_with_a_short_argsz_is_einval(edu, argsz):
    assert feature(edu, PROBE | ENTRY, argsz=argsz) == "EINVAL"


@pytest.mark.parametrize("flags", [1 << 19, 1 << 31, 0xFFF80000])
def test_feature_with_an_unknown_flag_is_einval(edu, flags):
    assert feature(edu, PROBE | flags | ENTRY) == "EINVAL"


def test_feature_cannot_be_got_and_set_at_once_but_both_can_be_probed(edu):
    assert feature(edu, GET | SET | ENTRY) == "EINVAL"
    assert feature(edu, GET | SET | 99) == "EINVAL"
    assert feature(edu, PROBE | GET | SET | 99) == "ENOTTY"


@pytest.mark.parametrize("number", [0, 1, 2, 6, 7, 8, 9, 10, 11, 13, 99, 0xFFFF])
@pytest.mark.parametrize("action", [PROBE, PROBE | GET, PROBE | SET, GET, SET], ids=hex)
def test_feature_that_the_device_has_not_is_enotty(edu, number, action):
    assert feature(edu, action | number, bytes(64)) == "ENOTTY"


def test_feature_of_precopy_information_is_known_from_linux_7_on(backend, edu):
    expected = "EINVAL" if newer_than_6_12(backend) else "ENOTTY"
    assert feature(edu, SET | 12, bytes(64)) == expected


@pytest.mark.parametrize("number", [ENTRY, ENTRY_WITH_WAKEUP, EXIT])
def test_low_power_features_can_be_set_only(endpoint, number):
    assert feature(endpoint, PROBE | number) == 0
    assert feature(endpoint, PROBE | SET | number) == 0
    assert feature(endpoint, PROBE | GET | number) == "EINVAL"
    assert feature(endpoint, PROBE | GET | SET | number) == "EINVAL"
    assert feature(endpoint, GET | number, bytes(64)) == "EINVAL"
    assert feature(endpoint, number) == "EINVAL"


def test_low_power_with_wakeup_needs_room_for_an_eventfd(endpoint):
    assert feature(endpoint, SET | ENTRY_WITH_WAKEUP) == "EINVAL"
    assert feature(endpoint, SET | ENTRY_WITH_WAKEUP, bytes(7)) == "EINVAL"
    with closed_descriptor() as closed:
        assert feature(endpoint, SET | ENTRY_WITH_WAKEUP, closed.to_bytes(4, "little") + bytes(4)) == "EBADF"
    assert feature(endpoint, SET | ENTRY_WITH_WAKEUP, b"\xff" * 4 + bytes(4)) == "EINVAL"


def test_low_power_is_left_by_the_next_access(endpoint):
    assert feature(endpoint, SET | ENTRY) == 0
    assert feature(endpoint, SET | ENTRY) == "EINVAL"  # already there
    assert endpoint.config(0, 2) in (0x1B36, 0x8086)
    assert feature(endpoint, SET | EXIT) == 0
    assert feature(endpoint, SET | EXIT) == 0  # nothing to leave is no error
    assert feature(endpoint, SET | ENTRY) == 0
    assert feature(endpoint, SET | EXIT) == 0


# --- VFIO_DEVICE_IOEVENTFD ---


def ioeventfd(device: RawDevice, fd: int, offset: int = LIVENESS, data: int = 0, flags: int = 4, index: int = 0):
    """What came of VFIO_DEVICE_IOEVENTFD; flags are the width in bytes."""
    argument = uapi.vfio_device_ioeventfd(flags=flags, offset=file_range(index, offset), data=data, fd=fd)
    return device.ioctl(IOEVENTFD, argument)


def reads(device: RawDevice, register: int, value: int) -> bool:
    """Whether the register reads `value`, at the latest after two seconds."""
    registers = EduRegisters(device)
    end = time.monotonic() + 2
    while registers[register] != value and time.monotonic() < end:
        time.sleep(0.01)
    return registers[register] == value


def test_ioeventfd_at_a_bad_address_is_efault(edu):
    assert edu.ioctl(IOEVENTFD, NOWHERE) == "EFAULT"


@pytest.mark.parametrize("argsz", [0, 16, 27])
def test_ioeventfd_with_a_short_argsz_is_einval(edu, fd, argsz):
    assert edu.ioctl(IOEVENTFD, uapi.vfio_device_ioeventfd(argsz=argsz, flags=4, offset=4, fd=fd)) == "EINVAL"


@pytest.mark.parametrize("flags", [0, 3, 5, 6, 12, 15, 16, 20, 0x80000004])
def test_ioeventfd_needs_exactly_one_width_and_no_other_flag(edu, fd, flags):
    assert ioeventfd(edu, fd, flags=flags) == "EINVAL"


def test_ioeventfd_of_a_descriptor_below_minus_one_is_einval(edu):
    assert ioeventfd(edu, -2) == "EINVAL"


@pytest.mark.parametrize("index", [6, 7, 8, 9])
def test_ioeventfd_outside_bars_is_einval(edu, fd, index):
    assert ioeventfd(edu, fd, 0, index=index) == "EINVAL"


def test_ioeventfd_behind_the_end_of_a_bar_is_einval(edu, fd):
    assert ioeventfd(edu, fd, 1 << 20) == "EINVAL"
    assert ioeventfd(edu, fd, (1 << 20) - 2) == "EINVAL"
    assert ioeventfd(edu, fd, 0, index=1) == "EINVAL"


def test_ioeventfd_on_the_msix_table_is_einval(endpoint, fd):
    where = endpoint.config(endpoint.capability(0x11) + 4, 4)
    index, offset = where & 7, where & ~7
    assert ioeventfd(endpoint, fd, offset, index=index) == "EINVAL"
    assert ioeventfd(endpoint, fd, offset + 8, index=index) == "EINVAL"


def test_ioeventfd_with_a_bad_descriptor_is_refused(edu):
    with closed_descriptor() as closed:
        assert ioeventfd(edu, closed) == "EBADF"
    assert ioeventfd(edu, edu.container) == "EINVAL"
    with open(os.devnull) as file:
        assert ioeventfd(edu, file.fileno()) == "EINVAL"


def test_ioeventfd_is_there_once_until_it_is_removed(edu, fd):
    assert ioeventfd(edu, -1) == "ENODEV"
    assert ioeventfd(edu, fd) == 0
    assert ioeventfd(edu, fd) == "EEXIST"
    assert ioeventfd(edu, fd, data=1) == 0  # another value is another one
    assert ioeventfd(edu, -1, data=2) == "ENODEV"
    assert ioeventfd(edu, -1) == 0
    assert ioeventfd(edu, -1) == "ENODEV"
    assert ioeventfd(edu, -1, data=1) == 0


def test_device_has_at_most_a_thousand_ioeventfds(edu, fd):
    for data in range(1000):
        assert ioeventfd(edu, fd, data=data) == 0
    assert ioeventfd(edu, fd, data=1000) == "ENOSPC"
    assert ioeventfd(edu, fd, data=999) == "EEXIST"
    assert ioeventfd(edu, -1, data=1000) == "ENODEV"
    assert ioeventfd(edu, -1, data=500) == 0
    assert ioeventfd(edu, fd, data=1000) == 0


@pytest.mark.parametrize("flags", [1, 2, 4])
def test_ioeventfd_takes_every_width_up_to_four_bytes(edu, fd, flags):
    assert ioeventfd(edu, fd, flags=flags) == 0
    assert ioeventfd(edu, -1, flags=flags) == 0


def test_ioeventfd_of_eight_bytes_is_gone_in_linux_7(backend, edu, fd):
    assert ioeventfd(edu, fd, 0x80, flags=8) == ("EINVAL" if newer_than_6_12(backend) else 0)


@pytest.mark.not_recorded("what the program writes to an eventfd is no call of the seam")
def test_signalled_ioeventfd_writes_the_register_little_endian(edu, fd):
    registers = EduRegisters(edu)
    registers[LIVENESS] = 0
    value = int.from_bytes(0x12345678.to_bytes(4, registers.byteorder), "little")
    assert ioeventfd(edu, fd, data=value) == 0
    os.eventfd_write(fd, 1)
    assert reads(edu, LIVENESS, 0x12345678 ^ 0xFFFFFFFF)
    assert ioeventfd(edu, -1, data=value) == 0
    registers[LIVENESS] = 0
    os.eventfd_write(fd, 1)
    assert registers[LIVENESS] == 0xFFFFFFFF


@pytest.mark.not_recorded("what the program writes to an eventfd is no call of the seam")
@POWERNV  # a pseries has one edu
def test_one_eventfd_writes_registers_of_two_devices(backend, edu, second, fd):
    with opened(backend, second.address) as other:
        for device in (edu, other):
            EduRegisters(device)[LIVENESS] = 0
            assert ioeventfd(device, fd, data=0x11111111) == 0
        os.eventfd_write(fd, 1)
        assert reads(edu, LIVENESS, 0xEEEEEEEE)
        assert reads(other, LIVENESS, 0xEEEEEEEE)


def test_last_close_removes_ioeventfds(backend, member, fd):
    with opened(backend, member.address) as device:
        assert ioeventfd(device, fd) == 0
    with opened(backend, member.address) as device:
        assert ioeventfd(device, -1) == "ENODEV"


def test_ioeventfd_of_a_closed_descriptor_is_ebadf(backend, edu, fd):
    closed = edu.open_again()
    backend.close(closed)
    argument = uapi.buffer(uapi.vfio_device_ioeventfd(flags=4, offset=4, fd=fd))
    assert outcome(backend.ioctl, closed, IOEVENTFD, argument) == "EBADF"
