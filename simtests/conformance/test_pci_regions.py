"""Regions of a vfio-pci device, read and written through its file and mapped.

Source: drivers/vfio/pci/vfio_pci_rdwr.c and vfio_pci_core.c of Linux 6.12.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from simtests.conformance.pci_calls import (
    COMMAND,
    CONFIG,
    MEMORY,
    EduRegisters,
    RawDevice,
    endpoint_address,
    file_range,
    on_vfio,
    opened,
    outcome,
)
from vfio import sysfs, uapi
from vfio.backend import Mapping
from vfio.topology import option_rom

BAR_SIZE = 1 << 20
LIVENESS = EduRegisters.LIVENESS
PROT_READ, PROT_WRITE = 1, 2

pytestmark = pytest.mark.lab_only  # what these devices are is known


@pytest.fixture
def edu(backend, member) -> Iterator[RawDevice]:
    with opened(backend, member.address) as device:
        yield device


@pytest.fixture
def registers(edu) -> EduRegisters:
    return EduRegisters(edu)


@pytest.fixture
def endpoint(backend, target) -> Iterator[RawDevice]:
    """A PCI Express device with MSI-X."""
    with on_vfio(backend, endpoint_address(target)) as address, opened(backend, address) as device:
        yield device


def mapped(device: RawDevice, index: int, length: int, offset: int = 0, prot: int = 3) -> str | None:
    """The errno of mapping a region; None if it can be mapped."""
    found = device.map(index, length, offset, prot)
    if isinstance(found, Mapping):
        found.close()
        return None
    return found


# --- Positions ---


@pytest.mark.parametrize("index", [8, 9, 10, 255, 0x7FFFFF])
def test_access_of_a_region_that_there_is_not_is_einval(edu, index):
    assert edu.read(index, 0, 4) == "EINVAL"
    assert edu.write(index, 0, b"\0\0\0\0") == "EINVAL"


@pytest.mark.parametrize("index", [0, 1, 6, CONFIG, 8, 9])
def test_access_of_nothing_is_nothing_wherever(edu, index):
    assert (edu.read(index, 0, 0), edu.write(index, 0, b"")) == (b"", 0)


@pytest.mark.parametrize("index", [1, 2, 3, 4, 5, 6])
def test_access_of_a_region_that_is_not_implemented_is_einval(edu, index):
    assert edu.read(index, 0, 4) == "EINVAL"
    assert edu.write(index, 0, b"\0\0\0\0") == "EINVAL"


@pytest.mark.parametrize("offset", [BAR_SIZE, BAR_SIZE + 4, (1 << 40) - 4])
def test_access_behind_a_bar_is_einval(edu, offset):
    assert edu.read(0, offset, 4) == "EINVAL"
    assert edu.write(0, offset, b"\0\0\0\0") == "EINVAL"


@pytest.mark.parametrize("count", [5, 8, 4096])
def test_access_past_the_end_of_a_bar_is_cut_short(edu, count):
    data = edu.read(0, BAR_SIZE - 4, count)
    assert isinstance(data, bytes)
    assert len(data) == 4
    assert edu.write(0, BAR_SIZE - 4, bytes(count)) == 4


def test_position_below_zero_is_einval(backend, edu):
    assert outcome(backend.pread, edu.fd, 4, -4) == "EINVAL"
    assert outcome(backend.pwrite, edu.fd, b"1234", -4) == "EINVAL"


# --- BARs through the file ---


def test_register_holds_what_was_written(registers):
    for value in (0, 0x12345678, 0xFFFFFFFF):
        registers[LIVENESS] = value
        assert registers[LIVENESS] == value ^ 0xFFFFFFFF


def test_a_bar_is_read_in_naturally_aligned_pieces(edu, registers):
    registers[LIVENESS] = 0
    # From 4 on: one piece of four bytes, which the register answers, and one of eight, which it does not.
    assert edu.read(0, LIVENESS, 12) == b"\xff" * 12
    registers[LIVENESS] = 0xFFFFFFFF
    assert edu.read(0, LIVENESS, 12) == bytes(4) + b"\xff" * 8
    assert edu.read(0, 0, 8) == b"\xff" * 8
    assert edu.read(0, 0, 4) != b"\xff" * 4


def test_a_bar_is_written_in_naturally_aligned_pieces(edu, registers):
    registers[LIVENESS] = 0
    assert edu.write(0, 0, bytes(8)) == 8  # one piece of eight bytes: not a register
    assert registers[LIVENESS] == 0xFFFFFFFF
    assert edu.write(0, LIVENESS, b"\xff" * 12) == 12
    assert registers[LIVENESS] == 0


def test_a_bar_without_memory_decode_is_eio(edu, registers):
    command = edu.config(COMMAND, 2)
    edu.set_config(COMMAND, 2, command & ~MEMORY)
    assert edu.read(0, LIVENESS, 4) == "EIO"
    assert edu.write(0, LIVENESS, b"\0\0\0\0") == "EIO"
    assert edu.read(0, BAR_SIZE, 4) == "EINVAL"
    assert edu.read(1, 0, 4) == "EINVAL"
    edu.set_config(COMMAND, 2, command)
    registers[LIVENESS] = 1
    assert registers[LIVENESS] == 0xFFFFFFFE


def test_the_msix_table_reads_ones_and_keeps_nothing(endpoint):
    index, offset, size = msix_table(endpoint)
    assert endpoint.read(index, offset, size) == b"\xff" * size
    assert endpoint.write(index, offset, bytes(size)) == size
    assert endpoint.read(index, offset, size) == b"\xff" * size
    assert endpoint.read(index, offset + 3, 5) == b"\xff" * 5


def test_io_ports_are_read_and_written_through_the_file(endpoint):
    for index in range(6):
        if endpoint.config(0x10 + 4 * index, 4) & 1:
            size = endpoint.region(index).size
            assert endpoint.write(index, 0, bytes(4)) == 4
            assert endpoint.read(index, 0, 4) == bytes(4)
            assert endpoint.read(index, size, 4) == "EINVAL"
            assert mapped(endpoint, index, 4096) == "EINVAL"


# --- ROM and configuration space ---


def test_rom_cannot_be_written(edu):
    assert edu.write(6, 0, b"\0") == "EINVAL"


@pytest.mark.parametrize(("offset", "count"), [(256, 1), (252, 5), (0, 257), (1 << 20, 4), (255, 2)])
def test_access_past_configuration_space_is_efault(edu, offset, count):
    assert edu.read(CONFIG, offset, count) == "EFAULT"
    assert edu.write(CONFIG, offset, bytes(count)) == "EFAULT"


def test_write_that_starts_in_configuration_space_and_leaves_it_changes_nothing(edu):
    before = edu.config(0xFE, 2)
    assert edu.write(CONFIG, 0xFE, b"\x5a\x5a\x5a") == "EFAULT"
    assert edu.config(0xFE, 2) == before


def test_express_configuration_space_ends_at_4096(endpoint):
    assert len(endpoint.read(CONFIG, 0, 4096)) == 4096
    assert endpoint.read(CONFIG, 4093, 4) == "EFAULT"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 16, 64])
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 5])
def test_configuration_space_reads_the_same_in_pieces_of_any_size(edu, offset, count):
    whole = b"".join(edu.read(CONFIG, at, 1) for at in range(offset, offset + count))
    assert edu.read(CONFIG, offset, count) == whole


# --- The expansion ROM of the second function of `siblings` ---

SIBLINGS = pytest.mark.targets("siblings", "siblings-64k")
ROM, ROM_BAR = 6, 0x30


@pytest.fixture
def with_rom(backend, target) -> Iterator[tuple[RawDevice, bytes]]:
    """A device with an expansion ROM, and what is in that."""
    found = next(device for device in target.topology.devices if device.rom)
    with on_vfio(backend, found.address), opened(backend, found.address) as device:
        yield device, option_rom(found.rom)


@SIBLINGS
def test_rom_region_has_the_size_of_the_bar_and_is_read_only(with_rom):
    device, _ = with_rom
    region = device.region(ROM)
    assert (region.size, region.flags) == (0x800, 1)


@SIBLINGS
def test_rom_reads_its_image_and_ones_behind_it(with_rom):
    device, image = with_rom
    assert len(image) == 0x600
    assert device.read(ROM, 0, 0x800) == image + b"\xff" * 0x200
    assert device.read(ROM, 1, 7) == image[1:8]
    assert device.read(ROM, 0x5FE, 4) == image[-2:] + b"\xff\xff"
    assert device.read(ROM, 0x7FC, 8) == b"\xff" * 4
    assert device.read(ROM, 0x800, 1) == "EINVAL"


@SIBLINGS
def test_rom_cannot_be_written_or_mapped(backend, with_rom):
    device, _ = with_rom
    for offset in (0, 0x7FF, 0x800):
        assert device.write(ROM, offset, b"\0") == "EINVAL"
    assert mapped(device, ROM, backend.page_size) == "EINVAL"


@SIBLINGS
def test_rom_without_memory_decode_is_enomem(with_rom):
    device, image = with_rom
    command = device.config(COMMAND, 2)
    device.set_config(COMMAND, 2, command & ~MEMORY)
    assert device.read(ROM, 0, 4) == "ENOMEM"
    device.set_config(COMMAND, 2, command)
    assert device.read(ROM, 0, 4) == image[:4]


@SIBLINGS
def test_rom_bar_starts_as_0_and_keeps_its_size_mask_and_the_enable_bit(with_rom):
    device, image = with_rom
    assert device.config(ROM_BAR, 4) == 0
    for written, kept in ((0xFFFFFFFF, 0xFFFFF801), (0xFFFFF800, 0xFFFFF800), (0x12345679, 0x12345001), (1, 1), (0, 0)):
        device.set_config(ROM_BAR, 4, written)
        assert device.config(ROM_BAR, 4) == kept
    assert device.read(ROM, 0, 4) == image[:4]  # wherever the user puts it


# --- Mapping ---


def test_bar_can_be_mapped_as_a_whole_and_in_part(backend, edu):
    page = backend.page_size
    assert mapped(edu, 0, BAR_SIZE) is None
    assert mapped(edu, 0, page, BAR_SIZE - page) is None
    assert mapped(edu, 0, 100) is None
    assert mapped(edu, 0, page, page, PROT_READ) is None


def test_mapped_register_is_that_of_the_file(backend, edu, registers):
    mapping = backend.mmap(edu.fd, backend.page_size, 0, PROT_READ | PROT_WRITE)
    try:
        registers[LIVENESS] = 0x00FF00FF
        value = int.from_bytes(edu.read(0, LIVENESS, 4), "little")
        assert mapping.load(LIVENESS, 4) == value
        mapping.store(LIVENESS, 4, 0)
        assert registers[LIVENESS] == 0xFFFFFFFF
    finally:
        mapping.close()


def test_mapping_from_a_place_that_is_not_page_aligned_is_einval(backend, edu):
    assert mapped(edu, 0, backend.page_size, 4) == "EINVAL"
    assert mapped(edu, 0, backend.page_size, backend.page_size // 2) == "EINVAL"


@pytest.mark.parametrize("index", [1, 2, 5, 6, CONFIG, 8, 9, 100])
def test_region_that_is_no_mappable_bar_cannot_be_mapped(backend, edu, index):
    assert mapped(edu, index, backend.page_size) == "EINVAL"


def test_mapping_past_the_end_of_a_bar_is_einval(backend, edu):
    page = backend.page_size
    assert mapped(edu, 0, BAR_SIZE + 1) == "EINVAL"
    assert mapped(edu, 0, 2 * page, BAR_SIZE - page) == "EINVAL"
    assert mapped(edu, 0, page, BAR_SIZE) == "EINVAL"


def test_small_bar_can_be_mapped_up_to_the_end_of_its_page(backend, endpoint):
    index, _, _ = msix_table(endpoint)
    rounded = -(-endpoint.region(index).size // backend.page_size) * backend.page_size
    assert mapped(endpoint, index, rounded) is None
    assert mapped(endpoint, index, rounded + 1) == "EINVAL"


def test_mapping_works_again_when_memory_decode_is_back(backend, edu, registers):
    mapping = backend.mmap(edu.fd, backend.page_size, 0, PROT_READ | PROT_WRITE)
    try:
        registers[LIVENESS] = 0xFFFFFFFF
        assert mapping.load(LIVENESS, 4) == 0
        command = edu.config(COMMAND, 2)
        edu.set_config(COMMAND, 2, command & ~MEMORY)
        assert mapped(edu, 0, backend.page_size) is None  # it may be made, not touched
        edu.set_config(COMMAND, 2, command)
        assert mapping.load(LIVENESS, 4) == 0
    finally:
        mapping.close()


@pytest.mark.not_recorded("a signal is no answer")
def test_touching_a_mapping_without_memory_decode_is_sigbus(backend, edu, killed_by):
    mapping = backend.mmap(edu.fd, backend.page_size, 0, PROT_READ | PROT_WRITE)
    try:
        assert killed_by(lambda: mapping.load(LIVENESS, 4)) is None
        command = edu.config(COMMAND, 2)
        edu.set_config(COMMAND, 2, command & ~MEMORY)
        assert killed_by(lambda: mapping.load(LIVENESS, 4)) == "SIGBUS"
        assert killed_by(lambda: mapping.store(LIVENESS, 4, 0)) == "SIGBUS"
        edu.set_config(COMMAND, 2, command)
        assert killed_by(lambda: mapping.load(LIVENESS, 4)) is None
    finally:
        mapping.close()


@pytest.mark.not_recorded("a signal is no answer")
def test_mapping_made_without_memory_decode_is_sigbus_until_it_is_on(backend, edu, killed_by):
    command = edu.config(COMMAND, 2)
    edu.set_config(COMMAND, 2, command & ~MEMORY)
    mapping = backend.mmap(edu.fd, backend.page_size, 0, PROT_READ)
    try:
        assert killed_by(lambda: mapping.load(LIVENESS, 4)) == "SIGBUS"
        edu.set_config(COMMAND, 2, command)
        assert killed_by(lambda: mapping.load(LIVENESS, 4)) is None
    finally:
        mapping.close()


@pytest.mark.not_recorded("a signal is no answer")
def test_touching_a_mapping_in_low_power_is_sigbus(backend, endpoint, killed_by):
    mapping = backend.mmap(endpoint.fd, min(backend.page_size, 0x4000), 0, PROT_READ)
    try:
        assert killed_by(lambda: mapping.load(0, 4)) is None
        entry, leave = (uapi.VFIO_DEVICE_FEATURE_SET | number for number in (3, 5))
        assert endpoint.ioctl(uapi.VFIO_DEVICE_FEATURE, uapi.vfio_device_feature(flags=entry)) == 0
        assert killed_by(lambda: mapping.load(0, 4)) == "SIGBUS"
        assert endpoint.ioctl(uapi.VFIO_DEVICE_FEATURE, uapi.vfio_device_feature(flags=leave)) == 0
        assert killed_by(lambda: mapping.load(0, 4)) is None
    finally:
        mapping.close()


@pytest.mark.targets("powernv8", "powernv8-64k", "pseries", "pseries-64k", "q35")  # POWER9's firmware allows no D3hot
@pytest.mark.not_recorded("a signal is no answer")
def test_touching_a_mapping_in_d3hot_is_sigbus(backend, endpoint, killed_by):
    mapping = backend.mmap(endpoint.fd, min(backend.page_size, 0x4000), 0, PROT_READ)
    control = endpoint.capability(0x01) + 4
    try:
        endpoint.set_config(control, 2, endpoint.config(control, 2) | 3)
        assert killed_by(lambda: mapping.load(0, 4)) == "SIGBUS"
        endpoint.set_config(control, 2, endpoint.config(control, 2) & ~3)
        assert killed_by(lambda: mapping.load(0, 4)) is None
    finally:
        mapping.close()


def test_mapping_keeps_the_device_and_its_group_open(backend, member):
    node = sysfs.node(member.group)
    with opened(backend, member.address) as device:
        mapping = backend.mmap(device.fd, backend.page_size, 0, PROT_READ | PROT_WRITE)
        registers = EduRegisters(device)
        registers[LIVENESS] = 0xFFFFFFFF
    try:
        assert outcome(backend.open, node, 2) == "EBUSY"
        assert mapping.load(LIVENESS, 4) == 0
    finally:
        mapping.close()
    backend.close(backend.open(node, 2))


def test_unmapping_twice_is_harmless(backend, edu):
    mapping = backend.mmap(edu.fd, backend.page_size, 0, PROT_READ)
    mapping.close()
    mapping.close()


# --- Descriptors ---


def test_access_of_a_closed_descriptor_is_ebadf(backend, edu):
    closed = edu.open_again()
    backend.close(closed)
    assert outcome(backend.pread, closed, 4, 0) == "EBADF"
    assert outcome(backend.pwrite, closed, b"1234", 0) == "EBADF"
    assert outcome(backend.mmap, closed, backend.page_size, 0, PROT_READ) == "EBADF"


@pytest.mark.parametrize("which", ["container", "group"])
def test_container_and_group_have_no_bytes_and_cannot_be_mapped(backend, edu, which):
    fd = getattr(edu, which)
    assert outcome(backend.pread, fd, 4, 0) == "EINVAL"
    assert outcome(backend.pwrite, fd, b"1234", 0) == "EINVAL"
    assert outcome(backend.mmap, fd, backend.page_size, 0, PROT_READ) == "ENODEV"


def test_duplicate_of_a_descriptor_reaches_the_same_registers(backend, edu, registers):
    copy = backend.dup(edu.fd)
    registers[LIVENESS] = 0xFFFFFFFF
    assert backend.pread(copy, 4, file_range(0, LIVENESS)) == bytes(4)
    backend.close(copy)
    assert registers[LIVENESS] == 0


def msix_table(device: RawDevice) -> tuple[int, int, int]:
    """Where the MSI-X table is: the index of its BAR, its offset there, its length in bytes."""
    at = device.capability(0x11)
    entries = (device.config(at + 2, 2) & 0x7FF) + 1
    where = device.config(at + 4, 4)
    return where & 7, where & ~7, entries * 16
