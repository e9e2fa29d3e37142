"""Closing in every order: what lives on, and what ends."""

import errno

import pytest

from simtests.conformance.raw import V1, V2
from vfio import uapi

VIABLE, CONTAINER_SET = uapi.VFIO_GROUP_FLAGS_VIABLE, uapi.VFIO_GROUP_FLAGS_CONTAINER_SET
CONFIG = 7 << 40


@pytest.fixture
def memory(program):
    return program.memory(4 * program.page)


def works(program, device):
    return len(program.backend.pread(device, 4, CONFIG)) == 4


def test_device_keeps_its_group_busy_after_the_group_is_closed(program, v2, member, memory):
    device = v2.group.device(member.address)
    v2.group.close()
    assert program.open(member.node) == -errno.EBUSY
    assert works(program, device)
    assert v2.register(memory.address, memory.length) == 0
    assert v2.map(memory.address, 0x100000, memory.length) == 0
    v2.close()
    assert works(program, device)
    assert program.open(member.node) == -errno.EBUSY
    assert program.locked > memory.length
    program.close(device)
    assert program.locked == 0
    assert program.group(member).status() == VIABLE


def test_mapped_bar_keeps_everything_as_the_device_would(program, v2, member):
    device = v2.group.device(member.address)
    bar = program.mmap(device, program.page, 0)
    program.close(device)
    assert v2.group.unset_container() == -errno.EBUSY
    v2.group.close()
    assert program.open(member.node) == -errno.EBUSY
    v2.close()
    bar.load(0, 4)
    assert program.open(member.node) == -errno.EBUSY
    bar.close()
    assert program.group(member).status() == VIABLE


def test_container_lives_on_behind_its_group(program, v2, member, memory):
    assert v2.register(memory.address, memory.length) == 0
    v2.close()
    assert v2.group.status() == VIABLE | CONTAINER_SET
    assert program.locked == memory.length
    assert v2.group.device(member.address) >= 0
    assert v2.group.set_container(program.container().fd) == -errno.EINVAL


def test_group_leaves_a_container_that_nobody_has_open(program, v2, memory):
    assert v2.register(memory.address, memory.length) == 0
    v2.close()
    assert v2.group.unset_container() == 0
    assert program.locked == 0
    other = program.container()
    assert v2.group.set_container(other.fd) == 0
    assert other.set_iommu(V1) == 0


def test_closing_the_only_group_unsets_the_container(program, v2, member, memory):
    assert v2.register(memory.address, memory.length) == 0
    v2.group.close()
    assert program.locked == 0
    assert v2.set_iommu(V2) == -errno.EINVAL
    assert v2.register(memory.address, memory.length) == -errno.EINVAL
    group = program.group(member)
    assert group.status() == VIABLE
    assert group.set_container(v2.fd) == 0
    assert v2.set_iommu(V1) == 0


def test_group_is_released_with_its_last_duplicate(program, v2, member):
    again = program.dup(v2.group.fd)
    v2.group.close()
    assert program.open(member.node) == -errno.EBUSY
    assert program.ioctl(again, uapi.VFIO_GROUP_UNSET_CONTAINER) == 0
    program.close(again)
    assert program.group(member).status() == VIABLE


def test_container_is_released_with_its_last_duplicate(program, v2):
    again = program.dup(v2.fd)
    v2.close()
    assert program.ioctl(again, uapi.VFIO_CHECK_EXTENSION, V2) == 1
    assert program.ioctl(again, uapi.VFIO_SET_IOMMU, V2) == -errno.EINVAL


def test_device_is_released_with_its_last_duplicate(program, v2, member):
    device = v2.group.device(member.address)
    again = program.dup(device)
    program.close(device)
    assert works(program, again)
    assert v2.group.unset_container() == -errno.EBUSY
    program.close(again)
    assert v2.group.unset_container() == 0


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
    container = other.attached(member, V2)
    memory = other.memory(other.page)
    assert container.register(memory.address, memory.length) == 0
    assert container.map(memory.address, 0x100000, memory.length) == 0
    assert container.group.device(member.address) >= 0
    other.backend.exit()
    again = program.attached(member, V2)
    assert again.group.device(member.address) >= 0


def test_other_group_keeps_the_iommu_when_one_leaves(program, v2, second, memory):
    group = program.group(second)
    assert group.set_container(v2.fd) == 0
    assert v2.register(memory.address, memory.length) == 0
    for _ in range(2):
        assert group.unset_container() == 0
        assert v2.set_iommu(V2) == -errno.EINVAL
        assert v2.register(memory.address, memory.length) == -errno.EBUSY
        assert group.set_container(v2.fd) == 0
    v2.group.close()
    assert program.locked == memory.length
    assert v2.unregister(memory.address, memory.length) == 0
    group.close()
    assert v2.unregister(memory.address, memory.length) == -errno.EINVAL


@pytest.mark.parametrize("order", ["cgd", "cdg", "gcd", "gdc", "dcg", "dgc"])
def test_nothing_is_held_after_any_order_of_closing(program, v2, member, memory, order):
    device = v2.group.device(member.address)
    assert v2.register(memory.address, memory.length) == 0
    assert v2.map(memory.address, 0x100000, memory.length) == 0
    for letter in order:
        program.close({"c": v2.fd, "g": v2.group.fd, "d": device}[letter])
    assert program.locked == 0
    assert program.group(member).status() == VIABLE
