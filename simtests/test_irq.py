"""Interrupts where the kernel answers what no machine at hand makes it answer."""

from __future__ import annotations

import errno
import os

import pytest

import vfio
from vfio import errors, uapi
from vfio.fake.backend import FakeBackend

DISK = "0002:01:00.0"


@pytest.fixture
def backend():
    backend = vfio.open_backend("fake:power8")
    assert isinstance(backend, FakeBackend)
    backend.write_text(f"/sys/bus/pci/devices/{DISK}/driver_override", "vfio-pci\n")
    backend.write_text("/sys/bus/pci/drivers_probe", DISK)
    yield backend
    assert backend.leaks() == []


@pytest.fixture
def disk(backend):
    with vfio.open_device(DISK, backend) as device:
        yield device


def descriptors():
    """Those of the program: the modelled kernel keeps its own at high numbers."""
    return sorted(int(name) for name in os.listdir("/proc/self/fd") if int(name) < 500)


def test_host_with_fewer_vectors_is_an_error_that_tells_how_many(disk, backend, monkeypatch):
    real = backend.ioctl

    def ioctl(fd, request, argument=0):
        return 3 if request == uapi.VFIO_DEVICE_SET_IRQS else real(fd, request, argument)

    monkeypatch.setattr(backend, "ioctl", ioctl)
    before = descriptors()
    with pytest.raises(errors.NoInterrupt, match="the host can give 3 of 8 vectors") as caught:
        disk.msix.enable(4, room=8)
    assert caught.value.errno == errno.ENOSPC
    assert not disk.msix.enabled
    assert descriptors() == before


def test_host_with_fewer_vectors_does_not_arm_them_again_until_it_has_them(disk, backend, monkeypatch):
    real = backend.ioctl
    with disk.msix.enable(4) as vectors:
        disk.msix.suspend()
        with monkeypatch.context() as patch:
            patch.setattr(backend, "ioctl", lambda *words: 3 if words[1] == uapi.VFIO_DEVICE_SET_IRQS else real(*words))
            with pytest.raises(errors.NoInterrupt, match="the host can give 3 of 4 vectors") as caught:
                disk.msix.rearm()
        assert caught.value.errno == errno.ENOSPC
        assert disk.msix.rearm() == 4
        disk.msix.trigger(0, 4)
        assert [vector.take() for vector in vectors] == [1, 1, 1, 1]


def test_interrupt_that_the_kernel_does_not_disable_is_an_error_and_its_eventfds_stay(disk, backend):
    with disk.msix.enable(2) as vectors:
        backend.machine.hooks.fail("VFIO_DEVICE_SET_IRQS", errno.EIO)
        with pytest.raises(errors.NoInterrupt, match="cannot disable MSI-X") as caught:
            disk.msix.rearm()
        assert caught.value.errno == errno.EIO
        disk.msix.trigger(0, 2)
        assert [vector.take() for vector in vectors] == [1, 1]


def test_kernel_that_claims_to_add_vectors_and_refuses_leaves_those_that_were(disk):
    disk.msix.flags &= ~uapi.VFIO_IRQ_INFO_NORESIZE
    assert disk.msix.resizable
    with disk.msix.enable(2) as vectors:
        before = descriptors()
        with pytest.raises(errors.NoInterrupt) as caught:
            vectors.grow(2)
        assert caught.value.errno == errno.EINVAL
        assert descriptors() == before
        assert (len(vectors), vectors.room) == (2, 2)
        disk.msix.trigger(0, 2)
        assert [vector.take() for vector in vectors] == [1, 1]


def test_room_grows_with_the_vectors_where_the_kernel_can_add(disk, backend, monkeypatch):
    disk.msix.flags &= ~uapi.VFIO_IRQ_INFO_NORESIZE
    with disk.msix.enable(2) as vectors:
        monkeypatch.setattr(backend, "ioctl", lambda *arguments: 0)
        assert [vector.number for vector in vectors.grow(3)] == [2, 3, 4]
        assert vectors.room == 5
        monkeypatch.undo()


def test_vector_of_a_device_that_is_gone_closes_all_the_same(disk, backend):
    vectors = disk.msix.enable(2)
    backend.machine.hooks.fail("VFIO_DEVICE_SET_IRQS", errno.ENODEV)
    vector, fd = vectors[1], vectors[1].fileno()
    with pytest.raises(errors.NoInterrupt) as caught:
        vector.close()
    assert caught.value.errno == errno.ENODEV
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    vector.close()
    assert [vector.number for vector in vectors] == [0]
