"""What a vfio-pci device tells of itself: VFIO_DEVICE_GET_INFO, GET_REGION_INFO, GET_IRQ_INFO.

Source: drivers/vfio/pci/vfio_pci_core.c and include/uapi/linux/vfio.h of Linux 6.12.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from simtests.conformance.pci_calls import NOWHERE, RawDevice, endpoint_address, on_vfio, opened
from simtests.conformance.raw import other_directions
from vfio import uapi

INFO = uapi.VFIO_DEVICE_GET_INFO
REGION_INFO = uapi.VFIO_DEVICE_GET_REGION_INFO
IRQ_INFO = uapi.VFIO_DEVICE_GET_IRQ_INFO

pytestmark = pytest.mark.lab_only  # what these devices are is known


@pytest.fixture
def edu(backend, member) -> Iterator[RawDevice]:
    with opened(backend, member.address) as device:
        yield device


@pytest.fixture
def endpoint(backend, target) -> Iterator[RawDevice]:
    """A PCI Express device with MSI-X and a function reset."""
    with on_vfio(backend, endpoint_address(target)) as address, opened(backend, address) as device:
        yield device


# --- VFIO_DEVICE_GET_INFO ---


def test_info_counts_nine_regions_and_five_interrupt_indexes(edu):
    info = uapi.vfio_device_info()
    assert edu.ioctl(INFO, info) == 0
    assert (info.argsz, info.num_regions, info.num_irqs, info.cap_offset) == (24, 9, 5, 0)


def test_info_has_no_reset_flag_for_a_function_that_cannot_be_reset_alone(edu):
    info = uapi.vfio_device_info()
    assert edu.ioctl(INFO, info) == 0
    assert info.flags == uapi.VFIO_DEVICE_FLAGS_PCI


def test_info_has_the_reset_flag_for_a_device_with_a_function_reset(endpoint):
    info = uapi.vfio_device_info()
    assert endpoint.ioctl(INFO, info) == 0
    assert info.flags == uapi.VFIO_DEVICE_FLAGS_PCI | uapi.VFIO_DEVICE_FLAGS_RESET


@pytest.mark.parametrize("argsz", [0, 1, 4, 15])
def test_info_with_a_short_argsz_is_einval_and_writes_nothing(edu, argsz):
    buffer = bytearray(argsz.to_bytes(4, "little") + b"\xaa" * 20)
    before = bytes(buffer)
    assert edu.ioctl(INFO, buffer) == "EINVAL"
    assert buffer == before


@pytest.mark.parametrize("argsz", [16, 17, 23, 24, 32])
def test_info_writes_as_much_as_argsz_says_and_never_more_than_the_struct(edu, argsz):
    buffer = bytearray(argsz.to_bytes(4, "little") + b"\xaa" * 36)
    assert edu.ioctl(INFO, buffer) == 0
    whole = bytes(uapi.buffer(uapi.vfio_device_info(argsz=argsz, flags=2, num_regions=9, num_irqs=5)))
    written = min(argsz, 24)
    assert buffer == whole[:written] + b"\xaa" * (40 - written)


def test_info_ignores_the_flags_that_are_passed(edu):
    info = uapi.vfio_device_info(flags=0xFFFFFFFF)
    assert edu.ioctl(INFO, info) == 0
    assert info.flags == uapi.VFIO_DEVICE_FLAGS_PCI


@pytest.mark.parametrize("request_number", [INFO, REGION_INFO, IRQ_INFO], ids=["info", "region", "irq"])
@pytest.mark.parametrize("address", [0, 8, NOWHERE, 0xC000_0000_0000_0000], ids=hex)
def test_info_at_a_bad_address_is_efault(edu, request_number, address):
    assert edu.ioctl(request_number, address) == "EFAULT"


# --- VFIO_DEVICE_GET_REGION_INFO ---


@pytest.mark.parametrize("index", range(8))
def test_region_offset_is_its_index_shifted_by_forty(edu, index):
    region = edu.region(index)
    assert (region.argsz, region.index, region.cap_offset, region.offset) == (32, index, 0, index << 40)


def test_bar_is_readable_writable_and_mappable(edu):
    region = edu.region(0)
    assert (region.size, region.flags) == (1 << 20, 7)


@pytest.mark.parametrize("index", range(1, 7))
def test_region_that_is_not_implemented_has_size_0_and_no_flags(edu, index):
    region = edu.region(index)
    assert (region.size, region.flags) == (0, 0)


def test_configuration_space_of_a_conventional_device_has_256_bytes(edu):
    region = edu.region(uapi.VFIO_PCI_CONFIG_REGION_INDEX)
    assert (region.size, region.flags) == (256, 3)


def test_configuration_space_of_an_express_device_has_4096_bytes(endpoint):
    region = endpoint.region(uapi.VFIO_PCI_CONFIG_REGION_INDEX)
    assert (region.size, region.flags) == (4096, 3)


@pytest.mark.parametrize("index", [8, 9, 10, 0x7FFFFFFF, 0xFFFFFFFF])
def test_region_that_there_is_not_is_einval(edu, index):
    assert edu.ioctl(REGION_INFO, uapi.vfio_region_info(index=index)) == "EINVAL"


@pytest.mark.parametrize("argsz", [0, 12, 31])
def test_region_info_with_a_short_argsz_is_einval_and_writes_nothing(edu, argsz):
    info = uapi.vfio_region_info(argsz=argsz, flags=0x55)
    assert edu.ioctl(REGION_INFO, info) == "EINVAL"
    assert (info.argsz, info.flags, info.size) == (argsz, 0x55, 0)


def test_upper_half_of_a_64_bit_bar_has_size_0(endpoint):
    low = endpoint.region(0)
    assert low.size
    if endpoint.config(0x10, 4) & 6 == 4:  # a 64-bit BAR
        assert (endpoint.region(1).size, endpoint.region(1).flags) == (0, 0)


def test_io_bar_is_readable_and_writable_but_not_mappable(endpoint):
    io = [index for index in range(6) if endpoint.config(0x10 + 4 * index, 4) & 1]
    for index in io:
        assert endpoint.region(index).flags == 3
    assert len(io) == (endpoint.config(0, 2) == 0x8086)  # the network card has one, the disk none


def test_bar_with_the_msix_table_needs_room_for_its_capability(endpoint):
    index = msix_bar(endpoint)
    small = uapi.vfio_region_info(index=index)
    assert endpoint.ioctl(REGION_INFO, small) == 0
    assert (small.argsz, small.cap_offset, small.flags, small.size) == (40, 0, 15, 0x4000)


@pytest.mark.parametrize("argsz", [40, 41, 64])
def test_bar_with_the_msix_table_says_that_the_table_may_be_mapped(endpoint, argsz):
    index = msix_bar(endpoint)
    buffer = bytearray(uapi.buffer(uapi.vfio_region_info(argsz=argsz, index=index))) + b"\xaa" * (argsz - 32)
    assert endpoint.ioctl(REGION_INFO, buffer) == 0
    info = uapi.from_buffer(uapi.vfio_region_info, buffer)
    assert (info.argsz, info.flags, info.cap_offset, info.size) == (argsz, 15, 32, 0x4000)
    header = uapi.vfio_info_cap_header(id=uapi.VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, version=1, next=0)
    assert buffer[32:] == bytes(uapi.buffer(header)) + b"\xaa" * (argsz - 40)


def test_bar_with_room_for_only_a_part_of_the_capability_gets_none_of_it(endpoint):
    buffer = bytearray(uapi.buffer(uapi.vfio_region_info(argsz=39, index=msix_bar(endpoint)))) + b"\xaa" * 8
    assert endpoint.ioctl(REGION_INFO, buffer) == 0
    info = uapi.from_buffer(uapi.vfio_region_info, buffer)
    assert (info.argsz, info.flags, info.cap_offset) == (40, 15, 0)
    assert buffer[32:] == b"\xaa" * 8


# --- VFIO_DEVICE_GET_IRQ_INFO ---


@pytest.mark.parametrize(("index", "count", "flags"), [(0, 1, 7), (1, 1, 9), (2, 0, 9), (4, 1, 9)])
def test_interrupts_of_a_conventional_device(edu, index, count, flags):
    assert edu.irq(index) == (count, flags)


def test_error_interrupt_of_a_device_that_is_not_express_is_einval(edu):
    assert edu.ioctl(IRQ_INFO, uapi.vfio_irq_info(index=uapi.VFIO_PCI_ERR_IRQ_INDEX)) == "EINVAL"


def test_interrupts_of_an_express_device(endpoint, target):
    network_card = endpoint.config(0, 2) == 0x8086
    msi, msix = (1, 5) if network_card else (0, 65)
    flags = 1 if target.platform == "PC" else 9  # whose vectors can be allocated one by one
    assert [endpoint.irq(index) for index in range(5)] == [(1, 7), (msi, 9), (msix, flags), (1, 9), (1, 9)]


@pytest.mark.parametrize("index", [5, 6, 0x80000000, 0xFFFFFFFF])
def test_interrupt_index_that_there_is_not_is_einval(edu, index):
    assert edu.ioctl(IRQ_INFO, uapi.vfio_irq_info(index=index)) == "EINVAL"


@pytest.mark.parametrize("argsz", [0, 8, 15])
def test_interrupt_info_with_a_short_argsz_is_einval_and_writes_nothing(edu, argsz):
    info = uapi.vfio_irq_info(argsz=argsz, flags=0x55, count=77)
    assert edu.ioctl(IRQ_INFO, info) == "EINVAL"
    assert (info.argsz, info.flags, info.count) == (argsz, 0x55, 77)


def test_interrupt_info_with_a_large_argsz_writes_only_the_struct(edu):
    buffer = bytearray(uapi.buffer(uapi.vfio_irq_info(argsz=24, index=1))) + b"\xaa" * 8
    assert edu.ioctl(IRQ_INFO, buffer) == 0
    assert buffer == bytes(uapi.buffer(uapi.vfio_irq_info(argsz=24, flags=9, index=1, count=1))) + b"\xaa" * 8


# --- Anything else ---


@pytest.mark.parametrize("number", [0, 6, 14, 15, 18, 19, 20, 21, 22, 60])
def test_request_that_a_device_does_not_know_is_enotty(edu, number):
    assert edu.ioctl(INFO - 7 + number, NOWHERE) == "ENOTTY"


def test_request_in_the_encoding_of_another_machine_is_enotty(edu):
    assert edu.ioctl(INFO ^ 0x20000000, uapi.vfio_device_info()) == "ENOTTY"


def test_request_with_a_direction_is_enotty(edu):
    for request in (INFO, REGION_INFO, IRQ_INFO, uapi.VFIO_DEVICE_RESET):
        for number in other_directions(request):
            assert edu.ioctl(number, bytearray(64)) == "ENOTTY"


def msix_bar(device: RawDevice) -> int:
    """Index of the BAR that holds the MSI-X table."""
    return device.config(device.capability(0x11) + 4, 4) & 7
