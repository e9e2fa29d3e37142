"""An opened device of a modelled machine, for tests of the driver alone: no container, no group file."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from vfio import topology
from vfio.fake.machine import Machine
from vfio.fake.pci import PciDevice
from vfio.fake.process import Process
from vfio.fake.user import Argument
from vfio.fake.vfio_pci import OPS
from vfio.fake.vfio_pci_device import VfioPciDevice

CONFIG = 7 << 40
GET_INFO, GET_REGION_INFO, GET_IRQ_INFO, SET_IRQS, RESET = 7, 8, 9, 10, 11
HOT_RESET_INFO, HOT_RESET, IOEVENTFD, FEATURE = 12, 13, 16, 17
NONE, BOOL, EVENTFD, MASK, UNMASK, TRIGGER = 1, 2, 4, 8, 16, 32
INTX, MSI, MSIX, ERR, REQ = range(5)


class Opened:
    """What a process can do with an open device."""

    def __init__(self, machine: Machine, pci: PciDevice, process: Process) -> None:
        self.machine, self.pci, self.process = machine, pci, process
        assert pci.vfio is not None
        self.vdev: VfioPciDevice = pci.vfio
        OPS.open(self.vdev, process)

    def close(self) -> None:
        OPS.release(self.vdev)

    def read(self, offset: int, count: int) -> bytes:
        return OPS.read(self.vdev, self.process, count, offset)

    def write(self, offset: int, data: bytes) -> int:
        return OPS.write(self.vdev, self.process, data, offset)

    def config(self, offset: int, count: int) -> bytes:
        return self.read(CONFIG + offset, count)

    def set_config(self, offset: int, data: bytes) -> int:
        return self.write(CONFIG + offset, data)

    def ioctl(self, n: int | None, data: bytearray) -> int:
        return OPS.ioctl(self.vdev, self.process, n, Argument(self.process, data))

    def set_irqs(self, index: int, flags: int, *data: int, start: int = 0, count: int | None = None) -> int:
        packed = struct.pack(f"={len(data)}{'i' if flags & EVENTFD else 'B'}", *data)
        count = len(data) if count is None else count
        return self.ioctl(
            SET_IRQS, bytearray(struct.pack("=5I", 20 + len(packed), flags, index, start, count) + packed)
        )

    def irq_info(self, index: int) -> tuple[int, int]:
        """Flags and count."""
        data = bytearray(struct.pack("=4I", 16, 0, index, 0))
        self.ioctl(GET_IRQ_INFO, data)
        _, flags, _, count = struct.unpack("=4I", data)
        return flags, count

    def region(self, index: int, room: int = 32) -> tuple[int, int, int, int, bytes]:
        """argsz, flags, cap_offset, size, and what is behind the struct."""
        data = bytearray(struct.pack("=4I2Q", room, 0, index, 0, 0, 0).ljust(room, b"\0"))
        self.ioctl(GET_REGION_INFO, data)
        argsz, flags, _, cap, size, offset = struct.unpack_from("=4I2Q", data)
        assert offset == index << 40
        return argsz, flags, cap, size, bytes(data[32:])


class Host:
    """A machine whose vfio-pci devices are opened by one process."""

    def __init__(self, name: str = "power8", **how: Any) -> None:
        described = name if isinstance(name, topology.Topology) else topology.load(name)
        self.machine = Machine(described, **how)
        self.process = Process(self.machine)

    def bind(self, address: str) -> PciDevice:
        pci = self.machine.device(address)
        pci.vfio = VfioPciDevice(pci)
        return pci

    def open(self, address: str) -> Opened:
        pci = self.machine.device(address)
        return Opened(self.machine, pci if pci.vfio else self.bind(address), self.process)


@contextmanager
def refused(number: int) -> Iterator[None]:
    """The call fails with this errno."""
    with pytest.raises(OSError, match=rf"^\[Errno {number}\] ") as caught:
        yield
    assert caught.value.errno == number


@contextmanager
def eventfd(value: int = 0) -> Iterator[int]:
    fd = os.eventfd(value, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def taken(fd: int) -> int:
    """The counter of an eventfd, which is 0 afterwards."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def until(done: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    for _ in range(2000):
        if done():
            return
        time.sleep(0.001)
    raise AssertionError("it did not happen within two seconds")
