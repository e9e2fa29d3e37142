"""Configuration space as vfio-pci shows it: what a user sees, and what of it a user can change.

The tables say for every byte of three devices what zeros and ones written to it leave; they were taken from the real
kernel.  Source: drivers/vfio/pci/vfio_pci_config.c of Linux 6.12.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from simtests.conformance.pci_calls import (
    COMMAND,
    CONFIG,
    INTX_OFF,
    MASTER,
    MEMORY,
    RawDevice,
    endpoint_address,
    on_vfio,
    opened,
)
from vfio import sysfs

BAR0, CAPABILITY_POINTER, INTERRUPT_LINE = 0x10, 0x34, 0x3C
PM, MSI, VENDOR, EXPRESS, MSIX = 0x01, 0x05, 0x09, 0x10, 0x11

pytestmark = pytest.mark.lab_only  # what these devices are is known
SIBLINGS = pytest.mark.targets("siblings", "siblings-64k")


@pytest.fixture
def edu(backend, member) -> Iterator[RawDevice]:
    with opened(backend, member.address) as device:
        yield device


@pytest.fixture
def endpoint(backend, target) -> Iterator[RawDevice]:
    """A PCI Express device."""
    with on_vfio(backend, endpoint_address(target)) as address, opened(backend, address) as device:
        yield device


class Run(NamedTuple):
    """Bytes that behave alike: what is in them after zeros and after ones were written, each byte by itself."""

    first: int
    last: int
    zeros: int
    ones: int


EDU = [
    Run(0x04, 0x04, 0x00, 0x07),  # command: I/O, memory, bus master; and
    Run(0x05, 0x05, 0x00, 0x05),  # SERR, INTx disable
    Run(0x0C, 0x0C, 0x00, 0xFF),  # cache line size
    Run(0x12, 0x12, 0x00, 0xF0),  # BAR 0: 1 MiB
    Run(0x13, 0x13, 0x00, 0xFF),
    Run(0x3C, 0x3C, 0x00, 0xFF),  # interrupt line
    Run(0x42, 0x42, 0x00, 0x8E),  # MSI control: all but the enable bit
    Run(0x44, 0xFF, 0x00, 0xFF),  # MSI address and data, and behind them bytes that belong to nothing
]
DISK = [
    Run(0x04, 0x04, 0x00, 0x07),
    Run(0x05, 0x05, 0x00, 0x05),
    Run(0x0C, 0x0C, 0x00, 0xFF),
    Run(0x11, 0x11, 0x00, 0xC0),  # BAR 0 and 1: 16 KiB, 64 bits
    Run(0x12, 0x17, 0x00, 0xFF),
    Run(0x3C, 0x3C, 0x00, 0xFF),
    Run(0x4C, 0x5F, 0x00, 0xFF),
    Run(0x68, 0x7F, 0x00, 0xFF),
    Run(0x88, 0x88, 0x00, 0xE0),  # device control: payload size; not the error enables, which QEMU's disk has not
    Run(0x89, 0x89, 0x00, 0x70),  # device control: read request size; function level reset reads 0
    Run(0xA9, 0xA9, 0x00, 0x80),  # device control 2
    Run(0xBC, 0xFF, 0x00, 0xFF),
    Run(0x104, 0xFFF, 0x00, 0xFF),
]
NETWORK_CARD = [
    Run(0x04, 0x04, 0x00, 0x07),
    Run(0x05, 0x05, 0x00, 0x05),
    Run(0x0C, 0x0C, 0x00, 0xFF),
    Run(0x12, 0x12, 0x00, 0xFE),  # BAR 0: 128 KiB
    Run(0x13, 0x13, 0x00, 0xFF),
    Run(0x16, 0x16, 0x00, 0xFE),  # BAR 1: 128 KiB
    Run(0x17, 0x17, 0x00, 0xFF),
    Run(0x18, 0x18, 0x01, 0xE1),  # BAR 2: 32 I/O ports
    Run(0x19, 0x1B, 0x00, 0xFF),
    Run(0x1D, 0x1D, 0x00, 0xC0),  # BAR 3: 16 KiB
    Run(0x1E, 0x1F, 0x00, 0xFF),
    Run(0x3C, 0x3C, 0x00, 0xFF),
    Run(0x40, 0x9F, 0x00, 0xFF),
    Run(0xAC, 0xC7, 0x00, 0xFF),
    Run(0xCC, 0xCC, 0x00, 0x03),  # power state
    Run(0xCD, 0xCD, 0x00, 0x1E),  # PM data select
    Run(0xD2, 0xD2, 0x00, 0x8E),
    Run(0xD4, 0xDF, 0x00, 0xFF),
    Run(0xE8, 0xE8, 0x00, 0xE0),
    Run(0xE9, 0xE9, 0x00, 0x70),
    Run(0xF4, 0xFF, 0x00, 0xFF),
    Run(0x10C, 0x10C, 0x00, 0x30),  # AER: severity, and
    Run(0x10D, 0x10D, 0x00, 0xF0),
    Run(0x10E, 0x10E, 0x00, 0xFF),
    Run(0x10F, 0x10F, 0x00, 0x03),
    Run(0x114, 0x114, 0x00, 0xC1),  # masks of correctable errors
    Run(0x115, 0x115, 0x00, 0xF1),
    Run(0x118, 0x118, 0xA0, 0xE0),  # ECRC enables
    Run(0x119, 0x119, 0x00, 0x01),
    Run(0x14C, 0xFFF, 0x00, 0xFF),
]
VIRTIO = [
    Run(0x04, 0x04, 0x00, 0x07),
    Run(0x05, 0x05, 0x00, 0x05),
    Run(0x0C, 0x0C, 0x00, 0xFF),
    Run(0x15, 0x15, 0x00, 0xF0),  # BAR 1: 4 KiB
    Run(0x16, 0x17, 0x00, 0xFF),
    Run(0x21, 0x21, 0x00, 0xC0),  # BAR 4 and 5: 16 KiB, 64 bits, prefetchable
    Run(0x22, 0x27, 0x00, 0xFF),
    Run(0x3C, 0x3C, 0x00, 0xFF),
    Run(0x48, 0x48, 0x00, 0xEF),  # device control: error enables and payload size
    Run(0x49, 0x49, 0x00, 0x70),
    Run(0x69, 0x69, 0x00, 0x80),
    Run(0x80, 0x80, 0x00, 0x03),  # power state
    Run(0xCC, 0xCC, 0x00, 0xFF),  # a capability of the vendor's: what its hardware lets anybody write
    Run(0xD0, 0xDB, 0x00, 0xFF),
    Run(0xE8, 0xFF, 0x00, 0xFF),
    Run(0x104, 0xFFF, 0x00, 0xFF),
]
POWER_STATE = (0x64, 0xCC)
"""Where disk and network card have their power state, which has cases of its own."""


def expected(runs: list[Run]) -> dict[int, tuple[int, int]]:
    """What zeros and ones leave in each byte that can be written."""
    return {at: (run.zeros, run.ones) for run in runs for at in range(run.first, run.last + 1)}


def measured(device: RawDevice) -> dict[int, tuple[int, int]]:
    """What zeros and ones leave in each byte in which they leave anything but what was there; all put back."""
    before = device.read(CONFIG, 0, device.region(CONFIG).size)
    assert isinstance(before, bytes)
    found = {}
    for at, was in enumerate(before):
        left = []
        for value in (0x00, 0xFF):
            assert device.write(CONFIG, at, bytes([value])) == 1
            left.append(device.config(at, 1))
        assert device.write(CONFIG, at, bytes([was])) == 1
        if left != [was, was]:
            found[at] = (left[0], left[1])
    assert device.read(CONFIG, 0, len(before)) == before
    return found


def differences(found: dict[int, tuple[int, int]], runs: list[Run], but: tuple[int, ...] = ()) -> dict[str, object]:
    """The bytes that are not as the table says."""
    wanted = expected(runs)
    for at in but:
        found.pop(at, None)
        wanted.pop(at, None)
    every = sorted(found.keys() | wanted.keys())
    return {hex(at): (found.get(at), wanted.get(at)) for at in every if found.get(at) != wanted.get(at)}


def test_every_byte_of_an_edu_keeps_what_it_should(edu):
    assert differences(measured(edu), EDU) == {}


def test_every_byte_of_an_express_device_keeps_what_it_should(endpoint):
    table = NETWORK_CARD if endpoint.config(0, 2) == 0x8086 else DISK
    assert differences(measured(endpoint), table, POWER_STATE) == {}


@pytest.fixture
def virtio(backend, target) -> Iterator[RawDevice]:
    """A device with capabilities of its vendor's, which virtio-pci has otherwise."""
    address = next(device.address for device in target.topology.devices if device.driver == "virtio-pci")
    driver = sysfs.path(address, "driver")
    backend.write_text(f"{driver}/unbind", address)
    try:
        with on_vfio(backend, address), opened(backend, address) as device:
            yield device
    finally:
        backend.write_text("/sys/bus/pci/drivers_probe", address)


@SIBLINGS
@pytest.mark.not_recorded("20,000 calls")
def test_every_byte_of_a_device_with_capabilities_of_its_vendor_keeps_what_it_should(virtio):
    assert differences(measured(virtio), VIRTIO) == {}


@SIBLINGS
def test_capability_of_the_vendor_is_read_as_it_is(virtio):
    """VIRTIO 1.1, 4.1.4: kind of structure, BAR, offset in it, length."""
    assert virtio.capabilities() == [
        (0xDC, MSIX),
        *((at, VENDOR) for at in (0xC8, 0xB4, 0xA4, 0x94, 0x84)),
        (0x7C, PM),
        (0x40, EXPRESS),
    ]
    assert virtio.read(CONFIG, 0x84, 16) == bytes.fromhex("09 7c 10 01 04000000 00000000 00100000")
    assert virtio.read(CONFIG, 0xB4, 20) == bytes.fromhex("09 a4 14 02 04000000 00300000 00100000 04000000")
    for at in range(0x84, 0x94, 4):
        before = virtio.config(at, 4)
        virtio.set_config(at, 4, 0xFFFFFFFF)  # which its hardware does not take
        assert virtio.config(at, 4) == before


@SIBLINGS
def test_prefetchable_bar_keeps_its_type_bits(virtio):
    virtio.set_config(0x20, 4, 0xFFFFFFFF)
    virtio.set_config(0x24, 4, 0xFFFFFFFF)
    assert (virtio.config(0x20, 4), virtio.config(0x24, 4)) == (0xFFFFC00C, 0xFFFFFFFF)
    assert [virtio.region(index).size for index in range(6)] == [0, 0x1000, 0, 0, 0x4000, 0]
    assert virtio.region(4).flags == 7


# --- The header ---


def test_header_of_an_edu(edu, target):
    serr = 0 if target.platform == "pSeries" else 0x0100
    io = int(target.platform == "PC")  # whose firmware enables everything
    assert edu.config(0x00, 4) == 0x11E81234
    assert edu.config(COMMAND, 2) == MEMORY | serr | io
    assert edu.config(0x06, 2) == 0x0010  # has capabilities
    assert edu.config(0x08, 4) == 0x00FF0010
    assert edu.config(0x0C, 4) == (0x00800000 if target.platform == "PowerNV" else 0)  # of several functions
    assert edu.config(0x2C, 4) == 0x11001AF4
    line = 10 if target.platform == "PC" else 0  # likewise
    assert (edu.config(CAPABILITY_POINTER, 1), edu.config(INTERRUPT_LINE, 2)) == (0x40, 0x0100 | line)
    assert edu.capabilities() == [(0x40, MSI)]


def test_capabilities_of_an_express_device(endpoint):
    network_card = endpoint.config(0, 2) == 0x8086
    assert endpoint.capabilities() == (
        [(0xC8, PM), (0xD0, MSI), (0xE0, EXPRESS), (0xA0, MSIX)]
        if network_card
        else [(0x40, MSIX), (0x80, EXPRESS), (0x60, PM)]
    )


def test_pme_support_is_hidden(endpoint):
    assert endpoint.config(endpoint.capability(PM) + 2, 2) & 0xF800 == 0


def test_vendor_and_device_cannot_be_changed(edu):
    edu.set_config(0, 4, 0xDEADBEEF)
    assert edu.config(0, 4) == 0x11E81234


def test_all_ones_in_the_command_register_leave_the_bits_that_there_are(edu):
    edu.set_config(COMMAND, 2, 0xFFFF)
    assert edu.config(COMMAND, 2) == 0x0507


def test_interrupt_disable_bit_is_remembered(edu):
    command = edu.config(COMMAND, 2)
    edu.set_config(COMMAND, 2, command | INTX_OFF)
    assert edu.config(COMMAND, 2) == command | INTX_OFF


def test_status_cannot_be_changed(edu):
    before = edu.config(0x06, 2)
    edu.set_config(0x06, 2, 0xFFFF)
    assert edu.config(0x06, 2) == before


def test_size_of_a_bar_is_found_by_writing_ones(edu):
    host = edu.config(BAR0, 4)
    edu.set_config(BAR0, 4, 0xFFFFFFFF)
    assert edu.config(BAR0, 4) == 0xFFF00000
    edu.set_config(BAR0, 4, host)
    assert edu.config(BAR0, 4) == host


def test_bar_that_is_not_implemented_reads_zero_whatever_is_written(edu):
    for at in range(BAR0 + 4, 0x28, 4):
        edu.set_config(at, 4, 0xFFFFFFFF)
        assert edu.config(at, 4) == 0


def test_rom_bar_that_is_not_implemented_reads_zero_whatever_is_written(edu):
    edu.set_config(0x30, 4, 0xFFFFFFFF)
    assert edu.config(0x30, 4) == 0


def test_64_bit_bar_keeps_its_type_bits(endpoint):
    if endpoint.config(0, 2) != 0x8086:
        endpoint.set_config(BAR0, 4, 0xFFFFFFFF)
        endpoint.set_config(BAR0 + 4, 4, 0xFFFFFFFF)
        assert (endpoint.config(BAR0, 4), endpoint.config(BAR0 + 4, 4)) == (0xFFFFC004, 0xFFFFFFFF)
    else:
        endpoint.set_config(BAR0 + 8, 4, 0)
        assert endpoint.config(BAR0 + 8, 4) == 1  # I/O ports


def test_bar_can_be_written_byte_by_byte(edu):
    for byte in range(4):
        edu.set_config(BAR0 + byte, 1, 0xFF)
    assert edu.config(BAR0, 4) == 0xFFF00000
    edu.set_config(BAR0 + 3, 1, 0x12)
    assert edu.config(BAR0, 4) == 0x12F00000


def test_bar_of_the_hardware_stays_where_it_is(edu):
    identity = edu.read(0, 0, 4)
    edu.set_config(BAR0, 4, 0)
    assert edu.read(0, 0, 4) == identity


def test_interrupt_line_is_the_users_and_pin_is_not(edu):
    edu.set_config(INTERRUPT_LINE, 4, 0xFFFFFFFF)
    assert edu.config(INTERRUPT_LINE, 4) == 0x000001FF


def test_ids_and_list_pointers_of_capabilities_cannot_be_changed(edu):
    edu.set_config(CAPABILITY_POINTER, 1, 0x50)
    edu.set_config(0x40, 2, 0xFFFF)
    assert edu.capabilities() == [(0x40, MSI)]
    assert edu.config(0x40, 2) == MSI


def test_write_across_header_fields_changes_each_by_its_own_rule(edu):
    host = edu.read(CONFIG, 0, 64)
    assert edu.write(CONFIG, 8, b"\xff" * 8) == 8  # revision and class, then cache line, latency, type, BIST
    assert edu.read(CONFIG, 8, 8) == host[8:12] + b"\xff" + host[13:16]


# --- Capabilities ---


def test_message_address_and_data_are_the_users(edu):
    at = edu.capability(MSI)
    edu.set_config(at + 4, 4, 0x12345678)
    edu.set_config(at + 8, 4, 0x9ABCDEF0)
    edu.set_config(at + 12, 2, 0xBEEF)
    assert edu.config(at + 4, 4) == 0x12345678
    assert edu.config(at + 8, 4) == 0x9ABCDEF0
    assert edu.config(at + 12, 2) == 0xBEEF


def test_msix_control_cannot_be_changed(endpoint):
    at = endpoint.capability(MSIX) + 2
    before = endpoint.config(at, 2)
    endpoint.set_config(at, 2, 0xFFFF)
    assert endpoint.config(at, 2) == before
    endpoint.set_config(at, 2, 0)
    assert endpoint.config(at, 2) == before


def test_express_device_control_keeps_sizes_and_drops_the_reset_bit(endpoint):
    at = endpoint.capability(EXPRESS) + 8
    before = endpoint.config(at, 2)
    endpoint.set_config(at, 2, before & ~0x7000 | 0x2000)  # maximum read request: 512 bytes
    assert endpoint.config(at, 2) == before & ~0x7000 | 0x2000
    endpoint.set_config(at, 2, before)
    assert endpoint.config(at, 2) == before


def test_function_reset_through_device_control_reads_zero(endpoint):
    at = endpoint.capability(EXPRESS)
    if endpoint.config(at + 4, 4) & 1 << 28:  # has one
        endpoint.set_config(at + 8, 2, endpoint.config(at + 8, 2) | 0x8000)
        assert endpoint.config(at + 8, 2) & 0x8000 == 0
    assert endpoint.config(COMMAND, 2) & MEMORY


# --- Opening and closing ---


def test_device_is_opened_without_bus_master(backend, member):
    for _ in range(2):
        with opened(backend, member.address) as device:
            command = device.config(COMMAND, 2)
            assert command & MASTER == 0
            assert command & MEMORY
            device.set_config(COMMAND, 2, command | MASTER)
            assert device.config(COMMAND, 2) & MASTER


def test_what_a_user_wrote_is_gone_after_the_last_close(backend, member):
    with opened(backend, member.address) as device:
        before = device.read(CONFIG, 0, 64)
        device.set_config(BAR0, 4, 0xFFFFFFFF)
        device.set_config(INTERRUPT_LINE, 1, 0x55)
        device.set_config(COMMAND, 2, 0x0507)
        device.set_config(0x0C, 1, 0x40)  # cache line size, in hardware
        assert device.read(CONFIG, 0, 64) != before
    with opened(backend, member.address) as device:
        assert device.read(CONFIG, 0, 64) == before


def test_two_descriptors_see_one_configuration_space(backend, edu):
    other = edu.open_again()
    edu.set_config(INTERRUPT_LINE, 1, 0x77)
    assert backend.pread(other, 1, CONFIG << 40 | INTERRUPT_LINE) == b"\x77"
    backend.close(other)
    assert edu.config(INTERRUPT_LINE, 1) == 0x77
