"""sPAPR TCE v2: several groups in one container."""

import errno

import pytest

from simtests.conformance.engine import Engine
from simtests.conformance.raw import SECOND_WINDOW, V2
from vfio import uapi

pytestmark = pytest.mark.power

POWERNV = pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k")
PSERIES = pytest.mark.targets("pseries", "pseries-64k")
IOVA = 0x100000


@pytest.fixture
def memory(program):
    return program.memory(4 * program.page)


@pytest.fixture
def ready(v2, memory):
    assert v2.register(memory.address, memory.length) == 0
    return v2


@POWERNV
def test_second_group_joins_while_windows_and_mappings_are_live_and_costs_nothing(program, ready, second, memory):
    assert ready.map(memory.address, IOVA, memory.length) == 0
    assert ready.create(12, 1 << 30) == SECOND_WINDOW
    before = program.locked
    group = program.group(second)
    assert group.set_container(ready.fd) == 0
    assert program.locked == before
    assert ready.unmap(IOVA, memory.length) == 0


@POWERNV
def test_windows_made_for_two_groups_are_made_and_removed_once(program, ready, second):
    group = program.group(second)
    assert group.set_container(ready.fd) == 0
    assert ready.create(12, 1 << 30) == SECOND_WINDOW
    assert ready.create(12, 1 << 30) == -errno.ENOSPC
    assert ready.remove(SECOND_WINDOW) == 0
    assert ready.remove(SECOND_WINDOW) == -errno.EINVAL
    assert ready.remove(0) == 0


@POWERNV
def test_same_group_twice_raises_einval(ready):
    assert ready.group.set_container(ready.fd) == -errno.EINVAL


@POWERNV
def test_leaving_group_clears_every_entry_and_leaves_windows_and_registrations(program, ready, second, memory):
    group = program.group(second)
    assert group.set_container(ready.fd) == 0
    start = ready.create(12, 1 << 30)
    for iova in (IOVA, start):
        assert ready.map(memory.address, iova, memory.length) == 0
    before = program.locked
    assert group.unset_container() == 0
    assert program.locked == before
    assert ready.unregister(memory.address, memory.length) == 0
    assert program.locked == before - memory.length  # no entry was left that could hold it
    assert ready.register(memory.address, memory.length) == 0
    for iova in (IOVA, start):
        assert ready.map(memory.address, iova, memory.length) == 0
        assert ready.unmap(iova, memory.length) == 0


@POWERNV
@pytest.mark.parametrize("leaves", ["first", "second"])
def test_windows_live_on_with_either_group(program, ready, second, memory, leaves):
    group = program.group(second)
    assert group.set_container(ready.fd) == 0
    start = ready.create(16, 1 << 30)
    (ready.group if leaves == "first" else group).close()
    assert ready.map(memory.address, IOVA, memory.length) == 0
    assert ready.create(12, 1 << 30) == -errno.ENOSPC
    assert ready.remove(start) == 0


@POWERNV
def test_default_window_is_not_made_again_for_a_group_that_comes_back(program, ready, second, memory):
    group = program.group(second)
    assert ready.remove(0) == 0
    for _ in range(2):
        assert group.set_container(ready.fd) == 0
        assert ready.map(memory.address, IOVA, memory.length) == -errno.ENXIO
        assert group.unset_container() == 0
    assert ready.map(memory.address, IOVA, memory.length) == -errno.ENXIO


@POWERNV
@pytest.mark.lab_only
@pytest.mark.needs_edu
def test_device_of_a_group_that_joined_sees_live_mappings_through_both_windows(program, ready, second, memory):
    start = ready.create(12, 1 << 30)
    assert ready.map(memory.address, IOVA, program.page) == 0
    assert ready.map(memory.address + program.page, start, program.page) == 0
    first_group, ready.group = ready.group, program.group(second)
    assert ready.group.set_container(ready.fd) == 0
    engine = Engine(ready, second)
    memory.view[:16] = b"through both win"
    engine.load(IOVA)
    engine.store(start)
    assert memory.view[program.page : program.page + 16] == b"through both win"
    assert first_group.unset_container() == 0  # which clears all entries, for all
    engine.store(IOVA + 64)
    assert memory.view[64:80] == bytes(16)
    assert ready.map(memory.address, IOVA, program.page) == 0
    engine.store(IOVA + 64)
    assert memory.view[64:80] != bytes(16)


@PSERIES
def test_on_a_guest_a_second_group_joins_only_while_there_is_no_window(program, ready, second, memory):
    group = program.group(second)
    assert group.set_container(ready.fd) == 0
    assert group.unset_container() == 0
    assert ready.map(memory.address, IOVA, memory.length) == 0
    assert group.set_container(ready.fd) == -errno.EPERM
    assert group.status() == uapi.VFIO_GROUP_FLAGS_VIABLE
    assert ready.unmap(IOVA, memory.length) == 0
    assert ready.remove(0) == 0
    assert group.set_container(ready.fd) == 0


@PSERIES
def test_on_a_guest_two_groups_get_no_window(program, ready, second, memory):
    group = program.group(second)
    assert group.set_container(ready.fd) == 0
    for _ in range(2):
        assert ready.map(memory.address, IOVA, memory.length) == -errno.EPERM
        assert ready.unmap(IOVA, memory.length) == -errno.EPERM
        assert program.locked == memory.length
    assert group.unset_container() == 0
    assert ready.map(memory.address, IOVA, memory.length) == 0


def test_group_is_not_shared_by_two_containers(program, v2):
    other = program.container()
    assert v2.group.set_container(other.fd) == -errno.EINVAL
    assert other.set_iommu(V2) == -errno.EINVAL
