"""A device leaves vfio-pci while its group, or the device itself, is open."""

import errno
import os
import select
import threading
import time

import pytest

from simtests.conformance.raw import Member, answer
from vfio import sysfs, uapi

VIABLE = uapi.VFIO_GROUP_FLAGS_VIABLE


@pytest.fixture
def own(program, backend, bound_address):
    """The device, on vfio-pci for this case alone; on vfio-pci again when the case ends."""
    yield Member(bound_address, sysfs.group_of(backend, bound_address))
    program.close_all()
    if sysfs.driver_of(backend, bound_address) is None:
        bind(backend, bound_address)


def unbind(backend, address):
    backend.write_text("/sys/bus/pci/drivers/vfio-pci/unbind", address)


def bind(backend, address):
    backend.write_text("/sys/bus/pci/drivers/vfio-pci/bind", address)


def test_group_whose_devices_are_gone_answers_enodev(program, own):
    group, container = program.group(own), program.container()
    assert group.status() == VIABLE
    unbind(program.backend, own.address)
    assert not program.backend.exists(own.node)
    assert group.status() == -errno.ENODEV
    assert group.set_container(container.fd) == -errno.ENODEV
    assert group.unset_container() == -errno.EINVAL
    assert group.device(own.address) == -errno.ENODEV
    assert program.open(own.node) == -errno.ENOENT


def test_group_whose_devices_are_gone_has_left_its_container(program, own):
    container = program.attached(own)
    memory = program.memory(program.page)
    assert container.pin(memory.address, memory.length) == 0
    assert program.locked == memory.length
    unbind(program.backend, own.address)
    assert program.locked == 0
    assert container.pin(memory.address, memory.length) == -errno.EINVAL
    assert container.set_iommu(program.native) == -errno.EINVAL
    assert container.group.unset_container() == -errno.EINVAL
    assert container.group.status() == -errno.ENODEV
    assert container.group.set_container(container.fd) == -errno.ENODEV


def test_old_file_of_a_group_stays_dead_and_the_new_node_opens(program, own):
    group = program.group(own)
    unbind(program.backend, own.address)
    bind(program.backend, own.address)
    fresh = program.group(own)
    assert fresh.status() == VIABLE
    assert group.status() == -errno.ENODEV
    assert group.device(own.address) == -errno.ENODEV
    assert fresh.set_container(program.container().fd) == 0
    group.close()
    assert fresh.status() == 3


def test_unbind_waits_for_a_mapping_too(program, other_program, own):
    other, answers = other_program(), []  # a process that was forked later would have the mapping too
    container = program.attached(own)
    device = container.group.device(own.address)
    mapping = program.mmap(device, program.page, 0)
    program.close(device)
    worker = threading.Thread(target=lambda: answers.append(answer(unbind, other.backend, own.address)))
    try:
        worker.start()
        while program.backend.exists(f"/sys/bus/pci/devices/{own.address}/driver"):
            time.sleep(0.01)
        time.sleep(0.05)
        assert answers == []
        mapping.load(0, 4)
        mapping.close()
        worker.join(20)
    finally:
        program.close_all()
        worker.join(20)
    assert answers == [None]
    assert not program.backend.exists(own.node)


def test_unbind_waits_for_the_device_and_asks_for_it(program, other_program, own):
    container = program.attached(own)
    device = container.group.device(own.address)
    asked = os.eventfd(0, os.EFD_NONBLOCK)
    set_request_eventfd(program, device, asked)
    other, answers = other_program(), []
    worker = threading.Thread(
        target=lambda: answers.append(
            answer(other.backend.write_text, "/sys/bus/pci/drivers/vfio-pci/unbind", own.address)
        )
    )
    try:
        worker.start()
        assert select.select([asked], [], [], 10)[0] == [asked]
        assert os.eventfd_read(asked) == 1
        assert not program.backend.exists(f"/sys/bus/pci/devices/{own.address}/driver")
        assert container.group.device(own.address) == -errno.ENODEV
        assert program.backend.pread(device, 2, 7 << 40) != b""
        assert answers == []
        again = program.dup(device)
        program.close(device)
        time.sleep(0.05)
        assert answers == []
        program.close(again)
    finally:
        program.close_all()
        worker.join(20)
        os.close(asked)
    assert answers == [None]
    assert not program.backend.exists(own.node)


def set_request_eventfd(program, device, eventfd):
    data = uapi.vfio_irq_set.sized(
        24,
        flags=uapi.VFIO_IRQ_SET_DATA_EVENTFD | uapi.VFIO_IRQ_SET_ACTION_TRIGGER,
        index=uapi.VFIO_PCI_REQ_IRQ_INDEX,
        start=0,
        count=1,
        data=eventfd.to_bytes(4, "little"),
    )
    assert program.ioctl(device, uapi.VFIO_DEVICE_SET_IRQS, uapi.buffer(data)) == 0
