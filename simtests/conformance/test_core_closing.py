"""Closing in every order: what lives on, and what ends."""

import errno

import pytest

from simtests.conformance.raw import V2
from vfio import uapi

VIABLE, CONTAINER_SET = uapi.VFIO_GROUP_FLAGS_VIABLE, uapi.VFIO_GROUP_FLAGS_CONTAINER_SET
CONFIG = 7 << 40


@pytest.fixture
def memory(program):
    return program.memory(4 * program.page)


def works(program, device):
    return len(program.backend.pread(device, 4, CONFIG)) == 4


def test_device_keeps_its_group_busy_after_the_group_is_closed(program, native, member, memory):
    device = native.group.device(member.address)
    native.group.close()
    assert program.open(member.node) == -errno.EBUSY
    assert works(program, device)
    assert native.pin(memory.address, memory.length) == 0
    assert native.map(memory.address, 0x100000, memory.length) == 0
    native.close()
    assert works(program, device)
    assert program.open(member.node) == -errno.EBUSY
    assert program.locked > memory.length
    program.close(device)
    assert program.locked == 0
    assert program.group(member).status() == VIABLE


def test_mapped_bar_keeps_everything_as_the_device_would(program, native, member):
    device = native.group.device(member.address)
    bar = program.mmap(device, program.page, 0)
    program.close(device)
    assert native.group.unset_container() == -errno.EBUSY
    native.group.close()
    assert program.open(member.node) == -errno.EBUSY
    native.close()
    bar.load(0, 4)
    assert program.open(member.node) == -errno.EBUSY
    bar.close()
    assert program.group(member).status() == VIABLE


def test_container_lives_on_behind_its_group(program, native, member, memory):
    assert native.pin(memory.address, memory.length) == 0
    native.close()
    assert native.group.status() == VIABLE | CONTAINER_SET
    assert program.locked == memory.length
    assert native.group.device(member.address) >= 0
    assert native.group.set_container(program.container().fd) == -errno.EINVAL


def test_group_leaves_a_container_that_nobody_has_open(program, native, memory):
    assert native.pin(memory.address, memory.length) == 0
    native.close()
    assert native.group.unset_container() == 0
    assert program.locked == 0
    other = program.container()
    assert native.group.set_container(other.fd) == 0
    assert other.set_iommu(program.older) == 0


def test_closing_the_only_group_unsets_the_container(program, native, member, memory):
    assert native.pin(memory.address, memory.length) == 0
    native.group.close()
    assert program.locked == 0
    assert native.set_iommu(program.native) == -errno.EINVAL
    assert native.pin(memory.address, memory.length) == -errno.EINVAL
    group = program.group(member)
    assert group.status() == VIABLE
    assert group.set_container(native.fd) == 0
    assert native.set_iommu(program.older) == 0


def test_group_is_released_with_its_last_duplicate(program, native, member):
    again = program.dup(native.group.fd)
    native.group.close()
    assert program.open(member.node) == -errno.EBUSY
    assert program.ioctl(again, uapi.VFIO_GROUP_UNSET_CONTAINER) == 0
    program.close(again)
    assert program.group(member).status() == VIABLE


def test_container_is_released_with_its_last_duplicate(program, native):
    again = program.dup(native.fd)
    native.close()
    assert program.ioctl(again, uapi.VFIO_CHECK_EXTENSION, program.native) == 1
    assert program.ioctl(again, uapi.VFIO_SET_IOMMU, program.native) == -errno.EINVAL


def test_device_is_released_with_its_last_duplicate(program, native, member):
    device = native.group.device(member.address)
    again = program.dup(device)
    program.close(device)
    assert works(program, again)
    assert native.group.unset_container() == -errno.EBUSY
    program.close(again)
    assert native.group.unset_container() == 0


def test_group_that_was_handed_to_another_process_is_released_by_the_last_one(program, other_program, member):
    other, group = other_program(), program.group(member)
    theirs = other.take(other.backend.receive(group.fd))
    group.close()
    assert program.open(member.node) == -errno.EBUSY
    assert other.open(member.node) == -errno.EBUSY
    other.close(theirs)
    program.group(member)


def test_process_that_exits_closes_everything(program, other_program, member):
    other = other_program()
    container = other.attached(member)
    memory = other.memory(other.page)
    assert container.pin(memory.address, memory.length) == 0
    assert container.map(memory.address, 0x100000, memory.length) == 0
    assert container.group.device(member.address) >= 0
    other.backend.exit()
    again = program.attached(member)
    assert again.group.device(member.address) >= 0


def test_other_group_keeps_the_iommu_when_one_leaves(program, native, second, memory):
    group = program.group(second)
    assert group.set_container(native.fd) == 0
    assert native.pin(memory.address, memory.length) == 0
    for _ in range(2):
        assert group.unset_container() == 0
        assert native.set_iommu(program.native) == -errno.EINVAL
        assert native.pin(memory.address, memory.length) == -(errno.EBUSY if program.native == V2 else errno.EEXIST)
        assert group.set_container(native.fd) == 0
    native.group.close()
    assert program.locked == memory.length
    assert native.unpin(memory.address, memory.length) == 0
    group.close()
    assert native.unpin(memory.address, memory.length) == -errno.EINVAL


@pytest.mark.parametrize("order", ["cgd", "cdg", "gcd", "gdc", "dcg", "dgc"])
def test_nothing_is_held_after_any_order_of_closing(program, native, member, memory, order):
    device = native.group.device(member.address)
    assert native.pin(memory.address, memory.length) == 0
    assert native.map(memory.address, 0x100000, memory.length) == 0
    for letter in order:
        program.close({"c": native.fd, "g": native.group.fd, "d": device}[letter])
    assert program.locked == 0
    assert program.group(member).status() == VIABLE
