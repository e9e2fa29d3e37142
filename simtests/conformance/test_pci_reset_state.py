"""What a reset leaves behind: of configuration space, of the device, of interrupts, of its power state.

Source: drivers/vfio/pci/vfio_pci_core.c and vfio_pci_config.c, drivers/pci/pci.c (pci_save_state) of Linux 6.12.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from simtests.conformance.irq_calls import (
    ERR,
    INTX,
    MSI,
    MSIX,
    NEVER,
    NONE,
    REQ,
    TRIGGER,
    UNMASK,
    disable,
    set_fds,
)
from simtests.conformance.pci_calls import (
    COMMAND,
    CONFIG,
    INTX_OFF,
    MASTER,
    MEMORY,
    EduRegisters,
    RawDevice,
    endpoint_address,
    eventfds,
    int32,
    on_vfio,
    opened,
    signals,
)
from vfio import uapi

PM, EXPRESS = 0x01, 0x10
BAR0, CACHE_LINE, INTERRUPT_LINE, GAP = 0x10, 0x0C, 0x3C, 0xFC
_MASK_SET, _ADMIN_QUEUE_SIZES = 0x0C, 0x24
"""Registers of a disk: one that a reset clears, and one that QEMU's keeps even then."""

pytestmark = pytest.mark.lab_only  # what these devices are is known
BARE_METAL = pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k")
"""Machines whose devices are behind root ports, so that a bus can be reset."""
WITH_D3HOT = pytest.mark.targets("powernv8", "powernv8-64k", "pseries", "pseries-64k", "q35")
"""Machines whose firmware lets a device into D3hot."""


@pytest.fixture
def endpoint(backend, target) -> Iterator[RawDevice]:
    """A PCI Express device with a function reset; on bare metal it is alone on its bus."""
    with on_vfio(backend, endpoint_address(target)) as address, opened(backend, address) as device:
        yield device


@pytest.fixture
def lonely(backend, two_edus) -> Iterator[RawDevice]:
    """An edu that is alone on its bus, with which it is reset; that takes seconds."""
    with opened(backend, two_edus[1]) as device:
        yield device


def function_reset(device: RawDevice) -> int | str:
    return device.ioctl(uapi.VFIO_DEVICE_RESET)


def hot_reset(device: RawDevice) -> int | str:
    argument = bytearray((16).to_bytes(4, "little") + bytes(4) + (1).to_bytes(4, "little")) + int32(device.group)
    return device.ioctl(uapi.VFIO_DEVICE_PCI_HOT_RESET, argument)


def control_reset(device: RawDevice) -> int | str:
    """By the bit in the device's own register."""
    at = device.capability(EXPRESS) + 8
    return device.write(CONFIG, at, (device.config(at, 2) | 0x8000).to_bytes(2, "little")) - 2  # type: ignore[operator]


Reset = Callable[[RawDevice], int | str]


@pytest.fixture
def resets(target) -> list[Reset]:
    """The ways to reset `endpoint`: on a root bus only the first; a network card has no bit for it."""
    return [function_reset, hot_reset, control_reset] if target.platform == "PowerNV" else [function_reset]


# --- Configuration space ---


def test_reset_keeps_everything_that_a_user_wrote_into_configuration_space(endpoint, resets):
    for reset in resets:
        endpoint.set_config(COMMAND, 2, endpoint.config(COMMAND, 2) | MASTER | INTX_OFF)
        endpoint.set_config(CACHE_LINE, 1, 0x40)
        endpoint.set_config(INTERRUPT_LINE, 1, 0x55)
        endpoint.set_config(BAR0, 4, 0x12340000)
        control = endpoint.capability(EXPRESS) + 8
        endpoint.set_config(control, 2, endpoint.config(control, 2) & ~0x7000 | 0x3000)
        endpoint.set_config(GAP, 4, 0xCAFEF00D)
        before = endpoint.read(CONFIG, 0, 4096)
        assert reset(endpoint) == 0
        assert endpoint.read(CONFIG, 0, 4096) == before


def test_memory_that_was_not_decoded_is_not_decoded_afterwards(endpoint, resets):
    for reset in resets:
        command = endpoint.config(COMMAND, 2)
        endpoint.set_config(COMMAND, 2, command & ~MEMORY)
        assert reset(endpoint) == 0
        assert endpoint.config(COMMAND, 2) == command & ~MEMORY
        assert endpoint.read(0, 0, 4) == "EIO"
        endpoint.set_config(COMMAND, 2, command)
        assert len(endpoint.read(0, 0, 4)) == 4


# --- The device ---


@BARE_METAL
def test_registers_of_a_disk_are_as_after_power_on(endpoint, resets):
    for reset in resets:
        assert endpoint.write(0, _MASK_SET, b"\x0f\0\0\0") == 4
        assert endpoint.write(0, _ADMIN_QUEUE_SIZES, b"\x1f\0\x1f\0") == 4
        assert endpoint.read(0, _MASK_SET, 4) == b"\x0f\0\0\0"
        assert reset(endpoint) == 0
        assert endpoint.read(0, _MASK_SET, 4) == bytes(4)
        assert endpoint.read(0, _ADMIN_QUEUE_SIZES, 4) == b"\x1f\0\x1f\0"


@WITH_D3HOT
def test_device_in_d3hot_is_in_d0_after_a_reset(endpoint, resets):
    for reset in resets:
        at = endpoint.capability(PM) + 4
        endpoint.set_config(at, 2, endpoint.config(at, 2) | 3)
        assert endpoint.config(at, 2) & 3 == 3
        assert reset(endpoint) == 0
        assert endpoint.config(at, 2) & 3 == 0
        assert len(endpoint.read(0, 0, 4)) == 4


@WITH_D3HOT
def test_way_through_d3hot_keeps_configuration_space(endpoint):
    control = endpoint.capability(PM) + 4
    endpoint.set_config(COMMAND, 2, endpoint.config(COMMAND, 2) | MASTER)
    endpoint.set_config(CACHE_LINE, 1, 0x40)
    before = endpoint.read(CONFIG, 0, 4096)
    for _ in range(2):
        endpoint.set_config(control, 2, endpoint.config(control, 2) | 3)
        endpoint.set_config(control, 2, endpoint.config(control, 2) & ~3)
    assert endpoint.read(CONFIG, 0, 4096) == before


@pytest.mark.targets("powernv8", "powernv8-64k")
def test_way_through_d3hot_leaves_a_device_that_remembers_there_as_it_was(endpoint):
    control = endpoint.capability(PM) + 4
    assert endpoint.config(control, 2) & 8
    assert endpoint.write(0, _MASK_SET, b"\x0f\0\0\0") == 4
    endpoint.set_config(control, 2, endpoint.config(control, 2) | 3)
    endpoint.set_config(control, 2, endpoint.config(control, 2) & ~3)
    assert endpoint.read(0, _MASK_SET, 4) == b"\x0f\0\0\0"


# --- Interrupts ---


def test_interrupts_are_still_enabled_after_a_reset(endpoint, resets):
    for reset in resets:
        with eventfds(4) as (first, second, err, req):
            assert set_fds(endpoint, MSIX, first, second) == 0
            assert set_fds(endpoint, ERR, err) == 0
            assert set_fds(endpoint, REQ, req) == 0
            assert reset(endpoint) == 0
            for index, count in ((MSIX, 2), (ERR, 1), (REQ, 1)):
                assert endpoint.set_irqs(index, NONE | TRIGGER, count=count) == 0
            assert [signals(fd) for fd in (first, second, err, req)] == [1, 1, 1, 1]
            assert set_fds(endpoint, MSIX, -1, start=1) == 0
            assert disable(endpoint, MSIX) == 0


@pytest.mark.targets("powernv8")
@pytest.mark.parametrize("reset", [function_reset, hot_reset])
def test_message_of_the_device_arrives_after_a_reset_of_its_bus(lonely, reset):
    registers = EduRegisters(lonely)
    with eventfds() as (fd,):
        assert set_fds(lonely, MSI, fd) == 0
        lonely.set_config(COMMAND, 2, lonely.config(COMMAND, 2) | MASTER)
        assert reset(lonely) == 0
        assert lonely.config(COMMAND, 2) & MASTER
        registers.raise_line()
        assert signals(fd) == 1
        registers.lower_line()


@pytest.mark.targets("powernv8")
def test_line_falls_with_a_reset_of_the_bus_and_intx_stays_masked(lonely):
    registers = EduRegisters(lonely)
    with eventfds() as (fd,):
        assert set_fds(lonely, INTX, fd) == 0
        registers.raise_line()
        assert signals(fd) == 1
        assert function_reset(lonely) == 0
        assert signals(fd, NEVER) == 0
        assert lonely.set_irqs(INTX, NONE | UNMASK, count=1) == 0
        assert signals(fd, NEVER) == 0
        registers.lower_line()
        registers.raise_line()
        assert signals(fd) == 1
        registers.lower_line()
