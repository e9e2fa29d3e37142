"""Several processes: what they share by fork and by descriptors that they send, and what the end of one gives back."""

import errno
import os

import pytest

import vfio
from simtests.conformance.engine import Engine
from simtests.conformance.fixtures import EVERY_TYPE, POWER
from simtests.conformance.raw import V1, V2, Group, answer
from vfio import errors, uapi

VIABLE, CONTAINER_SET = uapi.VFIO_GROUP_FLAGS_VIABLE, uapi.VFIO_GROUP_FLAGS_CONTAINER_SET
CONFIG = 7 << 40
IOVA = 0x100000

pytestmark = pytest.mark.not_recorded("a transcript holds no fork, and no process that is killed")


# --- who has it ---


def test_message_for_a_busy_group_names_the_process_that_has_it(program, other_program, member, backend):
    other = other_program()
    other.group(member)
    with pytest.raises(errors.Busy) as caught:
        vfio.Group(member.group, backend)
    assert caught.value.errno == errno.EBUSY
    assert [holder.pid for holder in caught.value.holders] == [other.backend.pid]
    assert f"pid {other.backend.pid} " in str(caught.value)


def test_message_names_who_got_the_descriptor_and_not_who_opened_it(program, other_program, member, backend):
    other, third = other_program(), other_program()
    group = program.group(member)
    other.take(other.backend.receive(group.fd))
    group.close()
    with pytest.raises(errors.Busy) as caught:
        vfio.Group(member.group, backend)
    assert [holder.pid for holder in caught.value.holders] == [other.backend.pid]
    assert third.open(member.node) == -errno.EBUSY


# --- descriptors that are sent ---


def test_device_that_was_handed_over_is_the_same_device(program, other_program, native, member):
    other, device = other_program(), native.group.device(member.address)
    theirs = other.take(other.backend.receive(device))
    program.backend.pwrite(device, b"\x5a", CONFIG + 0x3C)
    assert other.backend.pread(theirs, 1, CONFIG + 0x3C) == b"\x5a"
    program.close(device)
    assert native.group.unset_container() == -errno.EBUSY
    other.close(theirs)
    assert native.group.unset_container() == 0


def test_group_goes_there_and_back(program, other_program, member):
    other, group = other_program(), program.group(member)
    theirs = other.take(other.backend.receive(group.fd))
    group.close()
    back = Group(program, program.take(other.backend.give(theirs)))
    other.close(theirs)
    assert back.status() == VIABLE
    assert other.open(member.node) == -errno.EBUSY


def test_group_joins_the_container_of_another_process(program, other_program, member):
    other, container = other_program(), program.container()
    theirs = other.take(other.backend.receive(container.fd))
    group = other.group(member)
    assert group.set_container(theirs) == 0
    assert container.set_iommu(program.native) == 0
    assert group.status() == VIABLE | CONTAINER_SET
    assert other.close(theirs) is None
    assert container.extension(program.native) == 1


def test_number_of_another_process_means_nothing(program, other_program, member):
    other, container = other_program(), program.container()
    while (mine := program.dup(container.fd)) < 200:
        pass
    assert other.ioctl(mine, uapi.VFIO_GET_API_VERSION) == -errno.EBADF
    assert other.group(member).set_container(mine) == -errno.EBADF


@pytest.mark.needs_edu
def test_interrupt_reaches_an_eventfd_of_another_process(program, other_program, member):
    other, eventfd = other_program(), os.eventfd(0, os.EFD_NONBLOCK)
    try:
        container = other.attached(member)
        device = container.group.device(member.address)
        theirs = other.backend.receive(eventfd)
        set_vector(other, device, theirs)
        other.backend.close(theirs)
        trigger(other, device)
        assert os.eventfd_read(eventfd) == 1
        other.backend.exit()
        with pytest.raises(BlockingIOError):
            os.eventfd_read(eventfd)
    finally:
        os.close(eventfd)


@pytest.mark.needs_edu
def test_dma_reaches_the_memory_of_the_process_that_mapped_it(program, other_program, native, member):
    other = other_program()
    memory = program.memory(program.page)
    memory.view[:16] = b"sixteen letters."
    assert native.pin(memory.address, memory.length) == 0
    assert native.map(memory.address, IOVA, memory.length) == 0
    engine = Engine(native, member)
    engine._program = other
    engine.fd = other.take(other.backend.receive(engine.fd))
    engine.load(IOVA)
    engine.store(IOVA + 32)
    assert memory.view[32:48] == b"sixteen letters."


# --- fork ---


def test_child_has_what_its_parent_had_open(program, fork, member):
    group = program.group(member)
    child = fork()
    group.close()
    assert program.open(member.node) == -errno.EBUSY
    assert answer(child.ioctl, group.fd, uapi.VFIO_GROUP_UNSET_CONTAINER) == -errno.EINVAL
    child.close(group.fd)
    assert program.group(member).status() == VIABLE


def test_what_a_child_closes_its_parent_still_has(program, fork, member):
    group, child = program.group(member), fork()
    child.close(group.fd)
    assert group.status() == VIABLE
    assert program.open(member.node) == -errno.EBUSY


def test_end_of_a_child_closes_nothing_of_its_parents(program, fork, native, member):
    device = native.group.device(member.address)
    memory = program.memory(program.page)
    assert native.pin(memory.address, memory.length) == 0
    assert native.map(memory.address, IOVA, memory.length) == 0
    locked = program.locked
    fork().exit()
    assert program.backend.pread(device, 4, CONFIG) != b""
    assert program.locked == locked
    assert native.unmap(IOVA, memory.length) == 0
    assert native.unpin(memory.address, memory.length) == 0


@POWER
def test_child_is_another_address_space_so_that_its_parents_container_raises_eperm(program, fork, native):
    memory = program.memory(program.page)
    assert native.pin(memory.address, memory.length) == 0
    child = fork()
    info = uapi.buffer(uapi.vfio_iommu_spapr_tce_info())
    assert answer(child.ioctl, native.fd, uapi.VFIO_IOMMU_SPAPR_TCE_GET_INFO, info) == -errno.EPERM
    assert child.ioctl(native.fd, uapi.VFIO_CHECK_EXTENSION, program.native) == 1
    assert child.locked().locked == 0
    assert program.locked == memory.length


@POWER
def test_child_that_uses_a_container_first_owns_it(program, fork, native):
    child = fork()
    struct = uapi.buffer(uapi.vfio_iommu_spapr_tce_create(page_shift=13, window_size=1 << 30, levels=1))
    assert answer(child.ioctl, native.fd, uapi.VFIO_IOMMU_SPAPR_TCE_CREATE, struct) == -errno.EINVAL
    assert native.get_info(uapi.buffer(uapi.vfio_iommu_spapr_tce_info())) == -errno.EPERM


def test_mapping_of_a_child_keeps_the_device_and_reaches_it(program, fork, native, member):
    device = native.group.device(member.address)
    program.backend.pwrite(device, b"\x02\x00", CONFIG + 4)
    bar = program.mmap(device, program.page, 0)
    value = bar.load(0, 4)
    child = fork(load=lambda: bar.load(0, 4))
    for fd in (device, native.group.fd, native.fd):
        child.close(fd)
    bar.close()
    program.close_all()
    assert program.open(member.node) == -errno.EBUSY
    assert child.do("load") == value
    child.exit()
    assert program.group(member).status() == VIABLE


def test_child_opens_what_its_parent_sees(program, fork, member):
    child = fork()
    group = child.open(member.node, os.O_RDWR)
    assert program.open(member.node) == -errno.EBUSY
    mine = Group(program, program.take(child.give(group)))
    child.exit()
    assert mine.status() == VIABLE


# --- kill -9 ---


def using(other, member, iommu):
    """A process that has a container, a group, a device, locked memory, mappings, and an interrupt."""
    container = other.attached(member, iommu)
    device = container.group.device(member.address)
    memory = other.memory(4 * other.page)
    if iommu == V1:
        assert container.enable() == 0
    else:
        assert container.pin(memory.address, memory.length) == 0
    if iommu == V2:
        assert container.create(16, 1 << 30) > 0
    assert container.map(memory.address, IOVA, memory.length) == 0
    return container, device


@pytest.mark.parametrize("iommu", EVERY_TYPE)
def test_kill_gives_back_everything(program, other_program, member, iommu):
    for _ in range(3):
        other = other_program(memlock=None)
        using(other, member, iommu)
        assert program.open(member.node) == -errno.EBUSY
        other.backend.kill()
        group = program.group(member)
        assert group.status() == VIABLE
        container = program.container()
        assert group.set_container(container.fd) == 0
        assert container.set_iommu(program.native) == 0
        if program.native == V2:
            assert container.info().ddw.max_dynamic_windows_supported == 2
        device = group.device(member.address)
        assert program.backend.pread(device, 2, CONFIG + 4)[0] & 4 == 0
        program.close_all()
    assert program.locked == 0


def test_kill_releases_a_group_that_has_no_container(program, other_program, member):
    other = other_program()
    other.group(member)
    other.backend.kill()
    program.group(member)


def test_container_outlives_the_process_that_mapped_in_it(program, other_program, member):
    other = other_program()
    container, _ = using(other, member, other.native)
    mine = container.seen_by(program, other.backend.give(container.fd))
    other.backend.kill()
    assert program.group(member).set_container(mine.fd) == 0
    assert mine.set_iommu(program.native) == 0
    assert mine.asks() == 0


def test_device_outlives_the_process_that_opened_it(program, other_program, member):
    other = other_program()
    container, device = using(other, member, other.native)
    mine = program.take(other.backend.give(device))
    theirs = container.seen_by(program, other.backend.give(container.fd))
    other.backend.kill()
    assert program.open(member.node) == -errno.EBUSY
    assert len(program.backend.pread(mine, 4, CONFIG)) == 4
    assert theirs.asks() == (-errno.EPERM if program.native == V2 else 0)  # whose it is, only sPAPR minds
    program.close(mine)
    program.group(member)


# --- what stays ---


def test_owner_of_a_node_outlives_who_changed_it(program, other_program, member):
    other = other_program()
    other.backend.chown(member.node, 1000, 1000)
    try:
        other.backend.kill()
        alice = other_program(uid=1000)
        assert alice.group(member).status() == VIABLE
    finally:
        program.backend.chown(member.node, 0, 0)


def test_driver_outlives_who_bound_it(program, other_program, member):
    other = other_program()
    driver = f"/sys/bus/pci/devices/{member.address}/driver"
    other.backend.write_text("/sys/bus/pci/drivers/vfio-pci/unbind", member.address)
    other.backend.write_text("/sys/bus/pci/drivers/vfio-pci/bind", member.address)
    other.backend.kill()
    assert program.backend.readlink(driver).endswith("/vfio-pci")
    assert program.group(member).status() == VIABLE


# --- an edu's message ---


def set_vector(program, device, eventfd):
    data = uapi.vfio_irq_set.sized(
        24,
        flags=uapi.VFIO_IRQ_SET_DATA_EVENTFD | uapi.VFIO_IRQ_SET_ACTION_TRIGGER,
        index=uapi.VFIO_PCI_MSI_IRQ_INDEX,
        start=0,
        count=1,
        data=eventfd.to_bytes(4, "little"),
    )
    assert program.ioctl(device, uapi.VFIO_DEVICE_SET_IRQS, uapi.buffer(data)) == 0


def trigger(program, device):
    """Have it raise its interrupt."""
    backend = program.backend
    backend.pwrite(device, b"\x06\x00", CONFIG + 4)
    order = "little" if backend.pread(device, 4, 0)[:2] == b"\xed\x00" else "big"
    backend.pwrite(device, (1).to_bytes(4, order), 0x60)
