"""Type1: extensions, SET_IOMMU, what GET_INFO says, and what no group or no such request gets."""

import errno
import struct

import pytest

from simtests.conformance.raw import NOWHERE
from simtests.conformance.type1_calls import ALL, NESTING, PAGE, TYPE1, TYPE1_V2, VADDR, available, unmap
from vfio import uapi

pytestmark = pytest.mark.targets("q35")

CHAIN = 96
"""Bytes of the capabilities: migration 32, mappings left 16, two ranges 48."""


@pytest.fixture
def v2(program, member):
    return program.attached(member, TYPE1_V2)


def info(container, argsz, room=256):
    """The answer, and the bytes of the struct afterwards."""
    buffer = bytearray(struct.pack("=I", argsz).ljust(room, b"\xee"))
    return container.ioctl(uapi.VFIO_IOMMU_GET_INFO, buffer), bytes(buffer)


def test_extensions_are_those_of_type1(program):
    container = program.container()
    there = [number for number in range(12) if container.extension(number)]
    assert there == [TYPE1, TYPE1_V2, NESTING, uapi.VFIO_UNMAP_ALL]


def test_update_vaddr_is_an_extension_once_the_iommu_is_set(v2):
    assert v2.extension(uapi.VFIO_UPDATE_VADDR) == 1
    assert v2.extension(uapi.VFIO_SPAPR_TCE_IOMMU) == 0


@pytest.mark.parametrize(
    ("kind", "expected"),
    [*((kind, errno.ENODEV) for kind in (0, 2, 4, 5, 7, 8, 10, 99)), (6, errno.EINVAL), (9, errno.EINVAL)],
)
def test_what_is_no_type_is_refused_and_another_can_be_set(program, member, kind, expected):
    container, group = program.container(), program.group(member)
    assert group.set_container(container.fd) == 0
    assert container.set_iommu(kind) == -expected
    assert container.set_iommu(TYPE1_V2) == 0
    assert container.set_iommu(TYPE1_V2) == -errno.EINVAL


@pytest.mark.parametrize("n", [15, 16, 18, 19, 20, 21])
def test_requests_of_other_iommus_are_unknown(v2, n):
    assert v2.ioctl(uapi.VFIO_GET_API_VERSION + n, bytearray(64)) == -errno.ENOTTY


def test_info_with_room_has_page_sizes_and_three_capabilities(v2, target):
    answer, data = info(v2, 24 + CHAIN)
    assert answer == 0
    assert struct.unpack_from("=2IQ2I", data) == (24 + CHAIN, 3, target.topology.iommu.page_sizes, 24, 0)
    assert struct.unpack_from("=2H2I4x2Q", data, 24)[:3] == (uapi.VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION, 1, 56)
    assert struct.unpack_from("=I4x2Q", data, 32) == (0, PAGE, 1 << 28)
    assert struct.unpack_from("=2H3I", data, 56)[:4] == (uapi.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, 1, 72, 65535)
    assert struct.unpack_from("=2H3I", data, 72) == (uapi.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, 1, 0, 2, 0)
    assert struct.unpack_from("=4Q", data, 88) == tuple(sum(target.topology.iommu.ranges, ()))
    assert data[24 + CHAIN :] == b"\xee" * (256 - 24 - CHAIN)


@pytest.mark.parametrize("argsz", [24, 24 + CHAIN - 1])
def test_info_without_room_says_how_much_there_has_to_be(v2, argsz):
    answer, data = info(v2, argsz)
    assert answer == 0
    assert struct.unpack_from("=2I8x2I", data) == (24 + CHAIN, 3, 0, 0)
    assert data[24:] == b"\xee" * (256 - 24)


@pytest.mark.parametrize("argsz", [16, 17, 20])
def test_info_writes_as_much_of_the_struct_as_was_asked_for(v2, argsz):
    answer, data = info(v2, argsz)
    assert answer == 0
    assert struct.unpack_from("=2I", data) == (24 + CHAIN, 3)
    assert data[16:argsz] == bytes(argsz - 16)
    assert data[argsz:] == b"\xee" * (256 - argsz)


def test_info_of_a_short_struct_and_of_a_bad_address(v2):
    assert info(v2, 15)[0] == -errno.EINVAL
    assert v2.ioctl(uapi.VFIO_IOMMU_GET_INFO, NOWHERE) == -errno.EFAULT


def test_mappings_left_are_counted(program, v2):
    memory = program.memory(4 * PAGE)
    assert available(v2) == 65535
    for n in range(3):
        assert v2.map(memory.address, 0x10000 * n, PAGE) == 0
    assert available(v2) == 65532
    assert unmap(v2, 0, 0x30000) == (0, 3 * PAGE)
    assert available(v2) == 65535


def test_groups_share_what_is_mapped_and_a_suspended_mapping_keeps_them_out(program, member, second, v2):
    memory, other = program.memory(PAGE), program.group(second)
    assert v2.map(memory.address, 0x10000, PAGE) == 0
    assert unmap(v2, 0, 0, ALL | VADDR) == (0, PAGE)
    assert other.set_container(v2.fd) == -errno.EBUSY
    assert v2.map(memory.address, 0x10000, PAGE, uapi.VFIO_DMA_MAP_FLAG_VADDR) == 0
    assert other.set_container(v2.fd) == 0
    assert v2.group.unset_container() == 0
    assert unmap(v2, 0x10000, PAGE) == (0, PAGE)


def test_last_group_takes_the_mappings_with_it(program, v2):
    memory, before = program.memory(PAGE), program.locked
    assert v2.map(memory.address, 0x10000, PAGE) == 0
    assert program.locked == before + PAGE
    assert v2.group.unset_container() == 0
    assert program.locked == before
    assert v2.map(memory.address, 0x10000, PAGE) == -errno.EINVAL
