"""How every ioctl treats its argument: what is copied, what is checked, and in which order."""

import errno
import os

import pytest

from simtests.conformance.fixtures import PC, POWER
from simtests.conformance.raw import NOWHERE, V2, answer, foreign, other_directions
from vfio import uapi

STRUCTS = {
    "VFIO_GROUP_GET_STATUS": 8,
    "VFIO_IOMMU_SPAPR_TCE_GET_INFO": 16,
    "VFIO_IOMMU_MAP_DMA": 32,
    "VFIO_IOMMU_UNMAP_DMA": 24,
    "VFIO_IOMMU_SPAPR_REGISTER_MEMORY": 24,
    "VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY": 24,
    "VFIO_IOMMU_SPAPR_TCE_CREATE": 40,
    "VFIO_IOMMU_SPAPR_TCE_REMOVE": 16,
    "VFIO_IOMMU_GET_INFO": 16,
    "VFIO_IOMMU_DIRTY_PAGES": 8,
}
"""Requests with a struct, and how many of its bytes the kernel copies first."""
ANSWERING = ("VFIO_GROUP_GET_STATUS", "VFIO_IOMMU_SPAPR_TCE_GET_INFO", "VFIO_IOMMU_GET_INFO")
"""Those whose flags are an answer."""
TYPE1_CAPABILITIES = 96
"""Bytes of what Type1 has to say behind its info."""


def marks(name):
    """Where a request is one."""
    return POWER if "SPAPR" in name else PC if name in ("VFIO_IOMMU_GET_INFO", "VFIO_IOMMU_DIRTY_PAGES") else ()


every_struct = pytest.mark.parametrize(
    ("name", "minsz"), [pytest.param(*each, marks=marks(each[0])) for each in STRUCTS.items()], ids=STRUCTS
)


@pytest.fixture
def enabled(native, program):
    """A container that takes every request: some memory is registered, which enables it and makes it ours."""
    memory = program.memory(program.page)
    assert native.pin(memory.address, memory.length) == 0
    return native


def call(container, name, argument):
    """Make the call on the file that knows it."""
    return (container.group if "GROUP" in name else container).ioctl(getattr(uapi, name), argument)


@every_struct
def test_pointer_to_nothing_raises_efault(program, enabled, name, minsz):
    for pointer in (0, NOWHERE, (1 << 64) - 4096, 0xC000_0000_0000_0000):
        assert call(enabled, name, pointer) == -errno.EFAULT


@every_struct
def test_struct_whose_last_byte_is_missing_raises_efault_whatever_its_argsz(program, enabled, area, name, minsz):
    torn = area(2)
    torn.hole(1)
    for argsz in (0, minsz - 1, minsz, 4096):
        torn.write(program.page - (minsz - 1), argsz.to_bytes(4, "little") + bytes(minsz - 5))
        pointer = torn.address + program.page - (minsz - 1)
        assert call(enabled, name, pointer) == -errno.EFAULT


@every_struct
@pytest.mark.parametrize("short", [0, 1, 7])
def test_argsz_below_the_minimum_raises_einval_and_writes_nothing(program, enabled, name, minsz, short):
    for argsz in {short, minsz - 1}:
        data = bytearray(argsz.to_bytes(4, "little") + bytes(60))
        before = bytes(data)
        assert call(enabled, name, data) == -errno.EINVAL
        assert data == before


def test_larger_argsz_is_accepted_and_what_is_behind_the_struct_is_left_alone(program, enabled):
    for name, size in (ANSWERING[0], 8), (ANSWERING[1], 32) if program.native == V2 else (ANSWERING[2], 24):
        data = bytearray((64).to_bytes(4, "little") + b"\xa5" * 60)
        assert call(enabled, name, data) == 0
        wanted = 64 if name != ANSWERING[2] else 24 + TYPE1_CAPABILITIES  # for which there is no room
        assert data[:4] == wanted.to_bytes(4, "little")
        assert data[size:] == b"\xa5" * (64 - size)
        assert data[4:8] != b"\xa5" * 4


SPAPR_VALID = {
    "VFIO_IOMMU_MAP_DMA": uapi.vfio_iommu_type1_dma_map(flags=3, iova=0x100000, size=0),
    "VFIO_IOMMU_UNMAP_DMA": uapi.vfio_iommu_type1_dma_unmap(iova=0x100000, size=4096),
    "VFIO_IOMMU_SPAPR_REGISTER_MEMORY": uapi.vfio_iommu_spapr_register_memory(),
    "VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY": uapi.vfio_iommu_spapr_register_memory(),
    "VFIO_IOMMU_SPAPR_TCE_CREATE": uapi.vfio_iommu_spapr_tce_create(page_shift=12, window_size=1 << 30, levels=1),
    "VFIO_IOMMU_SPAPR_TCE_REMOVE": uapi.vfio_iommu_spapr_tce_remove(start_addr=1 << 59),
}
"""Arguments that are good, but for memory; CREATE comes before REMOVE."""
TYPE1_VALID = {
    "VFIO_IOMMU_MAP_DMA": uapi.vfio_iommu_type1_dma_map(flags=3, iova=0x100000),
    "VFIO_IOMMU_UNMAP_DMA": uapi.vfio_iommu_type1_dma_unmap(iova=0x100000, size=4096),
    "VFIO_IOMMU_DIRTY_PAGES": uapi.vfio_iommu_type1_dirty_bitmap(flags=uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_START),
}


def test_larger_argsz_is_accepted_by_every_request_and_nothing_behind_its_struct_is_touched(program, enabled, area):
    memory = program.memory(program.page)
    torn = area(2)
    torn.hole(1)
    for name, struct in (SPAPR_VALID if program.native == V2 else TYPE1_VALID).items():
        minsz = STRUCTS[name]
        if "REGISTER" in name or (struct is TYPE1_VALID["VFIO_IOMMU_MAP_DMA"]):
            struct.vaddr, struct.size = memory.address, memory.length
        start = program.page - minsz
        torn.write(start, (0xFFFF_FFFF).to_bytes(4, "little") + bytes(uapi.buffer(struct))[4:minsz])
        assert call(enabled, name, torn.address + start) == 0, name
        assert torn.read(start, 4) == b"\xff" * 4


def test_huge_argsz_is_accepted_for_it_is_neither_read_nor_written_back(program, enabled, area):
    place = area(1)
    place.write(0, b"\xff" * 8)
    assert enabled.group.ioctl(uapi.VFIO_GROUP_GET_STATUS, place.address) == 0
    assert place.read(0, 4) == b"\xff" * 4
    assert int.from_bytes(place.read(4, 4), "little") == 3


def test_struct_that_ends_with_its_page_is_enough(program, enabled, area):
    torn = area(2)
    torn.hole(1)
    torn.write(program.page - 8, b"\xff\xff\xff\xff")
    assert enabled.group.ioctl(uapi.VFIO_GROUP_GET_STATUS, torn.address + program.page - 8) == 0
    torn.write(program.page - 16, (16).to_bytes(4, "little"))
    assert enabled.get_info(torn.address + program.page - 16) == 0


@pytest.mark.parametrize(
    ("name", "minsz"),
    [pytest.param(*each, marks=marks(each[0])) for each in STRUCTS.items() if each[0] not in ANSWERING],
    ids=lambda each: str(each),
)
@pytest.mark.parametrize("flags", [4, 8, 0x8000_0000, 0xFFFF_FFFF])
def test_unknown_flags_raise_einval(program, enabled, name, minsz, flags):
    data = bytearray(minsz.to_bytes(4, "little") + flags.to_bytes(4, "little") + bytes(minsz - 8))
    before = bytes(data)
    assert call(enabled, name, data) == -errno.EINVAL
    assert data == before


def test_requests_in_the_encoding_of_another_machine_are_unknown(program, enabled):
    for request in (uapi.VFIO_GET_API_VERSION, uapi.VFIO_CHECK_EXTENSION, *(getattr(uapi, name) for name in STRUCTS)):
        assert program.ioctl(enabled.fd, foreign(request), bytearray(64)) == -errno.ENOTTY
        assert program.ioctl(enabled.group.fd, foreign(request), bytearray(64)) == -errno.ENOTTY
    fresh = program.container()
    assert fresh.ioctl(foreign(uapi.VFIO_GET_API_VERSION)) == -errno.EINVAL


def test_requests_with_a_direction_are_unknown(program, enabled):
    for request in (uapi.VFIO_GET_API_VERSION, uapi.VFIO_IOMMU_SPAPR_TCE_GET_INFO, uapi.VFIO_GROUP_GET_STATUS):
        for number in other_directions(request):
            assert program.ioctl(enabled.fd, number, bytearray(64)) == -errno.ENOTTY
            assert program.ioctl(enabled.group.fd, number, bytearray(64)) == -errno.ENOTTY
    fresh = program.container()
    for number in other_directions(uapi.VFIO_GET_API_VERSION):
        assert fresh.ioctl(number) == -errno.EINVAL


def test_files_of_containers_and_groups_are_neither_read_nor_written(program, member):
    for fd in (program.container().fd, program.group(member).fd):
        for length in (0, 1, 4096):
            assert answer(program.backend.pread, fd, length, 0) == -errno.EINVAL
            assert answer(program.backend.pwrite, fd, bytes(length), 0) == -errno.EINVAL


def test_files_of_containers_and_groups_cannot_be_mapped(program, member):
    for fd in (program.container().fd, program.group(member).fd):
        assert answer(program.backend.mmap, fd, program.page, 0, 3) == -errno.ENODEV


def test_closed_and_absurd_descriptors_raise_ebadf(program):
    container = program.container()
    container.close()
    for fd in (container.fd, -1, 99_999):
        assert program.ioctl(fd, uapi.VFIO_GET_API_VERSION) == -errno.EBADF
        assert program.ioctl(fd, uapi.VFIO_IOMMU_MAP_DMA, bytearray(32)) == -errno.EBADF
        assert answer(program.backend.close, fd) == -errno.EBADF
        assert answer(program.backend.dup, fd) == -errno.EBADF
        assert answer(program.backend.pread, fd, 1, 0) == -errno.EBADF
        assert answer(program.backend.pwrite, fd, b"x", 0) == -errno.EBADF


def test_group_does_not_know_the_requests_of_a_container_nor_of_a_device(program, member):
    group = program.group(member)
    for offset in (0, 1, 2, *range(7, 30), 99, 155):
        assert group.ioctl(uapi.VFIO_GET_API_VERSION + offset, bytearray(64)) == -errno.ENOTTY


def test_descriptors_are_closed_on_exec(program, native, member):
    device = native.group.device(member.address)
    for fd in (native.fd, native.group.fd, device):
        assert os.get_inheritable(fd) is False
