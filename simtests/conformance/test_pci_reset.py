"""Resets and power states of a vfio-pci device.

Source: drivers/vfio/pci/vfio_pci_core.c and vfio_pci_config.c of Linux 6.12.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from simtests.conformance.pci_calls import (
    COMMAND,
    MASTER,
    MEMORY,
    NOWHERE,
    EduRegisters,
    RawDevice,
    closed_descriptor,
    endpoint_address,
    eventfds,
    group_number,
    half_readable,
    on_vfio,
    opened,
    outcome,
    signals,
)
from vfio import sysfs, uapi
from vfio.backend import Backend

RESET = uapi.VFIO_DEVICE_RESET
HOT_RESET_INFO = uapi.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO
HOT_RESET = uapi.VFIO_DEVICE_PCI_HOT_RESET
PM, EXPRESS = 0x01, 0x10
CACHE_LINE, INTERRUPT_LINE = 0x0C, 0x3C

pytestmark = pytest.mark.lab_only  # what these devices are is known
BARE_METAL = pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k")
"""Machines whose devices are behind root ports, so that a bus can be reset."""
GUEST = pytest.mark.targets("pseries", "pseries-64k", "q35")
"""Machines whose devices are on a root bus, which cannot be reset."""


@pytest.fixture
def edu(backend, member) -> Iterator[RawDevice]:
    """A device without a reset of its own; on bare metal another one is in the same slot."""
    with opened(backend, member.address) as device:
        yield device


@pytest.fixture
def endpoint(backend, target) -> Iterator[RawDevice]:
    """A PCI Express device with a function reset, alone on its bus."""
    with on_vfio(backend, endpoint_address(target)) as address, opened(backend, address) as device:
        yield device


def members(argument: bytearray) -> list[tuple[int, str]]:
    """(group, address) of each device that VFIO_DEVICE_GET_PCI_HOT_RESET_INFO tells."""
    info = uapi.from_buffer(uapi.vfio_pci_hot_reset_info, argument)
    found = []
    for each in range(info.count):
        at = uapi.sizeof(uapi.vfio_pci_hot_reset_info) + 8 * each
        device = uapi.from_buffer(uapi.vfio_pci_dependent_device, argument, at)
        address = f"{device.segment:04x}:{device.bus:02x}:{device.devfn >> 3:02x}.{device.devfn & 7}"
        found.append((int.from_bytes(argument[at : at + 4], "little"), address))
    return found


def hot_reset_info(argsz: int, room: int | None = None) -> bytearray:
    return bytearray(argsz.to_bytes(4, "little") + bytes((room or max(argsz, 12)) - 4))


def hot_reset(*fds: int, count: int | None = None, flags: int = 0, argsz: int | None = None) -> bytearray:
    """The argument of VFIO_DEVICE_PCI_HOT_RESET."""
    wanted = len(fds) if count is None else count
    words = [12 + 4 * len(fds) if argsz is None else argsz, flags, wanted, *fds]
    return bytearray(b"".join((word & 0xFFFFFFFF).to_bytes(4, "little") for word in words))


# --- VFIO_DEVICE_RESET ---


def test_reset_of_a_function_that_cannot_be_reset_alone_is_einval(edu):
    assert edu.ioctl(RESET) == "EINVAL"
    assert edu.ioctl(RESET, NOWHERE) == "EINVAL"


def test_reset_keeps_configuration_space(endpoint):
    command = endpoint.config(COMMAND, 2) | MASTER
    endpoint.set_config(COMMAND, 2, command)
    endpoint.set_config(CACHE_LINE, 1, 0x40)
    endpoint.set_config(INTERRUPT_LINE, 1, 0x55)
    bar = endpoint.config(0x10, 4)
    assert endpoint.ioctl(RESET) == 0
    assert endpoint.config(COMMAND, 2) == command
    assert endpoint.config(CACHE_LINE, 1) == 0x40
    assert endpoint.config(INTERRUPT_LINE, 1) == 0x55
    assert endpoint.config(0x10, 4) == bar


def test_reset_takes_no_argument(endpoint):
    assert endpoint.ioctl(RESET, NOWHERE) == 0


def test_mapping_works_after_a_reset(backend, endpoint):
    mapping = backend.mmap(endpoint.fd, backend.page_size if backend.page_size < 0x4000 else 0x4000, 0, 3)
    try:
        before = mapping.load(0, 4)
        assert endpoint.ioctl(RESET) == 0
        assert mapping.load(0, 4) == before
    finally:
        mapping.close()


def test_interrupts_stay_on_through_a_reset(endpoint):
    with eventfds() as (fd,):
        trigger = uapi.VFIO_IRQ_SET_ACTION_TRIGGER
        assert endpoint.set_irqs(2, uapi.VFIO_IRQ_SET_DATA_EVENTFD | trigger, 0, 1, fd.to_bytes(4, "little")) == 0
        assert endpoint.ioctl(RESET) == 0
        assert endpoint.set_irqs(2, uapi.VFIO_IRQ_SET_DATA_NONE | trigger, 0, 1) == 0
        assert signals(fd) == 1


@BARE_METAL
def test_device_whose_reset_methods_the_host_took_away_cannot_be_reset(backend, target):
    disk = endpoint_address(target)
    method = sysfs.path(disk, "reset_method")
    backend.write_text(method, "\n")
    try:
        with on_vfio(backend, disk), opened(backend, disk) as device:
            info = uapi.vfio_device_info()
            assert device.ioctl(uapi.VFIO_DEVICE_GET_INFO, info) == 0
            assert info.flags == uapi.VFIO_DEVICE_FLAGS_PCI
            assert device.ioctl(RESET) == "EINVAL"
    finally:
        backend.write_text(method, "default")


# --- VFIO_DEVICE_GET_PCI_HOT_RESET_INFO ---


@pytest.mark.parametrize("request_number", [HOT_RESET_INFO, HOT_RESET], ids=["info", "reset"])
def test_hot_reset_at_a_bad_address_is_efault(edu, request_number):
    assert edu.ioctl(request_number, NOWHERE) == "EFAULT"
    assert edu.ioctl(request_number, 0) == "EFAULT"


@pytest.mark.parametrize("argsz", [0, 8, 11])
def test_hot_reset_info_with_a_short_argsz_is_einval(edu, argsz):
    assert edu.ioctl(HOT_RESET_INFO, hot_reset_info(argsz)) == "EINVAL"


@GUEST
def test_hot_reset_on_a_root_bus_is_enodev(edu):
    argument = hot_reset_info(28)
    assert edu.ioctl(HOT_RESET_INFO, argument) == "ENODEV"
    assert argument == hot_reset_info(28)
    assert edu.ioctl(HOT_RESET, hot_reset(edu.group)) == "ENODEV"


@BARE_METAL
@pytest.mark.parametrize("argsz", [12, 20, 27])
def test_hot_reset_info_without_room_for_every_device_is_enospc_and_tells_their_number(edu, argsz):
    argument = hot_reset_info(argsz)
    argument[4:8] = b"\xff" * 4
    assert edu.ioctl(HOT_RESET_INFO, argument) == "ENOSPC"
    info = uapi.from_buffer(uapi.vfio_pci_hot_reset_info, argument)
    assert (info.argsz, info.flags, info.count) == (argsz, 0, 2)
    assert argument[12:] == bytes(argsz - 12)


@BARE_METAL
@pytest.mark.parametrize("argsz", [28, 32, 100])
def test_hot_reset_info_tells_the_devices_of_the_slot(backend, edu, argsz):
    argument = hot_reset_info(argsz)
    assert edu.ioctl(HOT_RESET_INFO, argument) == 0
    number = group_number(backend, edu.address)
    assert members(argument) == [(number, edu.address), (number, edu.address[:-1] + "1")]
    assert argument[:12] == argsz.to_bytes(4, "little") + b"\0\0\0\0\2\0\0\0"
    assert argument[28:] == bytes(argsz - 28)


@BARE_METAL
def test_hot_reset_info_of_a_device_alone_on_its_bus_tells_that_device(backend, endpoint):
    argument = hot_reset_info(20)
    assert endpoint.ioctl(HOT_RESET_INFO, argument) == 0
    assert members(argument) == [(group_number(backend, endpoint.address), endpoint.address)]


# --- VFIO_DEVICE_PCI_HOT_RESET ---


def test_hot_reset_with_a_short_argsz_a_flag_or_no_group_is_einval(edu):
    assert edu.ioctl(HOT_RESET, hot_reset(edu.group, argsz=11)) == "EINVAL"
    assert edu.ioctl(HOT_RESET, hot_reset(edu.group, flags=1)) == "EINVAL"
    if edu.ioctl(HOT_RESET_INFO, hot_reset_info(28)) == 0:
        assert edu.ioctl(HOT_RESET, hot_reset()) == "EINVAL"


@BARE_METAL
def test_hot_reset_with_more_groups_than_devices_is_einval(edu):
    assert edu.ioctl(HOT_RESET, hot_reset(edu.group, edu.group, edu.group)) == "EINVAL"
    assert edu.ioctl(HOT_RESET, hot_reset(edu.group, count=0xFFFFFFFF)) == "EINVAL"


@BARE_METAL
def test_hot_reset_with_groups_that_cannot_be_read_is_efault(backend, edu):
    with half_readable(backend, bytes(hot_reset(count=1, argsz=16))) as address:
        assert edu.ioctl(HOT_RESET, address) == "EFAULT"


@BARE_METAL
def test_hot_reset_with_a_descriptor_that_is_not_open_is_ebadf(edu):
    with closed_descriptor() as closed:
        assert edu.ioctl(HOT_RESET, hot_reset(closed)) == "EBADF"
        assert edu.ioctl(HOT_RESET, hot_reset(edu.group, closed)) == "EBADF"
    assert edu.ioctl(HOT_RESET, hot_reset(-1)) == "EBADF"


@BARE_METAL
def test_hot_reset_with_a_descriptor_that_is_no_group_is_einval(edu):
    with open(os.devnull) as file:
        for no_group in (file.fileno(), edu.container, edu.fd):
            assert edu.ioctl(HOT_RESET, hot_reset(no_group)) == "EINVAL"


@BARE_METAL
def test_hot_reset_with_a_neighbour_that_is_not_on_vfio_is_einval(edu):
    assert edu.ioctl(HOT_RESET, hot_reset(edu.group)) == "EINVAL"
    assert edu.ioctl(HOT_RESET, hot_reset(edu.group, edu.group)) == "EINVAL"


@BARE_METAL
def test_hot_reset_without_the_group_of_the_device_is_einval(backend, edu, target):
    with on_vfio(backend, endpoint_address(target)) as address:
        other = backend.open(sysfs.node(group_number(backend, address)), os.O_RDWR)
        assert edu.ioctl(HOT_RESET, hot_reset(other)) == "EINVAL"
        backend.close(other)


@BARE_METAL
def test_hot_reset_of_a_device_alone_on_its_bus_works(endpoint):
    command = endpoint.config(COMMAND, 2)
    assert endpoint.ioctl(HOT_RESET, hot_reset(endpoint.group)) == 0
    assert endpoint.config(COMMAND, 2) == command


@BARE_METAL
def test_neighbour_on_vfio_too_makes_a_hot_reset_possible(backend, edu):
    with on_vfio(backend, edu.address[:-1] + "1"):
        registers = EduRegisters(edu)
        registers[registers.LIVENESS] = 0
        assert edu.ioctl(HOT_RESET, hot_reset(edu.group, edu.group)) == 0  # the same group twice is no error
        assert registers[registers.LIVENESS] == 0xFFFFFFFF  # QEMU's edu has nothing that a reset would change


@BARE_METAL
def test_hot_reset_takes_a_group_that_is_not_needed(backend, edu, target):
    with on_vfio(backend, edu.address[:-1] + "1"), on_vfio(backend, endpoint_address(target)) as address:
        other = backend.open(sysfs.node(group_number(backend, address)), os.O_RDWR)
        assert edu.ioctl(HOT_RESET, hot_reset(other, edu.group)) == 0
        backend.close(other)


@pytest.mark.targets("siblings", "siblings-64k")
def test_bridge_among_its_siblings_is_told_of_and_keeps_them_from_a_hot_reset(backend, edu, target):
    siblings = [device for device in target.topology.devices if device.address[:-1] == edu.address[:-1]]
    argument = hot_reset_info(12 + 8 * len(siblings))
    assert edu.ioctl(HOT_RESET_INFO, argument) == 0
    number = group_number(backend, edu.address)
    assert members(argument) == [(number, device.address) for device in siblings]
    with on_vfio(backend, siblings[1].address), on_vfio(backend, siblings[2].address):
        assert edu.ioctl(HOT_RESET, hot_reset(edu.group)) == "EINVAL"


# --- A device that is alone on its bus ---


@BARE_METAL
def test_device_alone_on_its_bus_is_reset_with_the_bus(backend: Backend, two_edus: list[str]) -> None:
    with opened(backend, two_edus[1]) as device:
        info = uapi.vfio_device_info()
        assert device.ioctl(uapi.VFIO_DEVICE_GET_INFO, info) == 0
        assert info.flags == uapi.VFIO_DEVICE_FLAGS_PCI | uapi.VFIO_DEVICE_FLAGS_RESET
        registers = EduRegisters(device)
        registers[registers.LIVENESS] = 0
        assert device.ioctl(RESET) == 0
        assert registers[registers.LIVENESS] == 0xFFFFFFFF


# --- Power states ---


@pytest.mark.targets("powernv8", "powernv8-64k", "pseries", "pseries-64k", "q35")
def test_device_in_d3hot_shows_it_and_its_bars_are_eio(endpoint):
    at = endpoint.capability(PM) + 4
    assert endpoint.config(at, 2) & 3 == 0
    endpoint.set_config(at, 2, endpoint.config(at, 2) | 3)
    assert endpoint.config(at, 2) & 3 == 3
    assert endpoint.read(0, 0, 4) == "EIO"
    assert endpoint.write(0, 0, bytes(4)) == "EIO"
    assert endpoint.config(COMMAND, 2) & MEMORY  # which is not what stops it
    endpoint.set_config(at, 2, endpoint.config(at, 2) & ~3)
    assert endpoint.config(at, 2) & 3 == 0
    assert len(endpoint.read(0, 0, 4)) == 4


@pytest.mark.targets("powernv9", "powernv9-64k")
def test_device_that_refuses_a_power_state_stays_in_d0(endpoint):
    """The disk below a PHB4 of QEMU does not take D3hot; the kernel's log says so."""
    at = endpoint.capability(PM) + 4
    endpoint.set_config(at, 2, endpoint.config(at, 2) | 3)
    assert endpoint.config(at, 2) & 3 == 0
    assert len(endpoint.read(0, 0, 4)) == 4


def test_device_left_in_d3hot_is_in_d0_when_opened_again(backend, target):
    with on_vfio(backend, endpoint_address(target)) as address:
        with opened(backend, address) as device:
            at = device.capability(PM) + 4
            device.set_config(at, 2, device.config(at, 2) | 3)
        with opened(backend, address) as device:
            assert device.config(at, 2) & 3 == 0
            assert outcome(device.region, 0) is not None
            assert len(device.read(0, 0, 4)) == 4
