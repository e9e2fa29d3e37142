"""What hardware does with a PE and QEMU does not: it freezes on an error, and stops what is frozen."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from simtests.conformance.raw import READ, SECOND_WINDOW, V2, WRITE, Container, Member, Program
from vfio import uapi
from vfio.backend import open_backend
from vfio.fake.backend import FakeBackend
from vfio.fake.eeh_pe import EehPe

UNFREEZE_IO, UNFREEZE_DMA, ENABLE, GET_STATE, DEACTIVATE, HOT, FUNDAMENTAL, INJECT = 2, 3, 1, 4, 5, 6, 7, 9
CONFIG, COMMAND, CLASS, MASTER = 7 << 40, 4, 8, 4
IOVA = 0x100000
ONES = b"\xff" * 4
ADDRESS = "0001:01:00.0"
"""An edu alone in its PE."""


class Opened:
    """The edu, open, with a page of memory mapped at IOVA."""

    def __init__(self, url: str) -> None:
        backend = open_backend(url)
        assert isinstance(backend, FakeBackend)
        self.backend, self.machine = backend, backend.machine
        backend.write_text(f"/sys/bus/pci/devices/{ADDRESS}/driver_override", "vfio-pci\n")
        backend.write_text("/sys/bus/pci/drivers_probe", ADDRESS)
        self.program = Program(backend)
        self.container: Container = self.program.attached(Member(ADDRESS, 1), V2)
        self.fd = self.container.group.device(ADDRESS)
        self.memory = self.program.memory(backend.page_size)
        assert self.container.register(self.memory.address, self.memory.length) == 0
        self.map()
        self.master()

    def map(self, flags: int = READ | WRITE, iova: int = IOVA) -> None:
        assert self.container.map(self.memory.address, iova, self.memory.length, flags) == 0

    def master(self) -> None:
        command = int.from_bytes(self.backend.pread(self.fd, 2, CONFIG + COMMAND), "little") | MASTER
        self.backend.pwrite(self.fd, command.to_bytes(2, "little"), CONFIG + COMMAND)

    @property
    def pe(self) -> EehPe:
        return self.machine.eeh.of(ADDRESS)

    @property
    def state(self) -> int:
        return self.container.eeh(GET_STATE)

    def read(self, register: int) -> bytes:
        return self.backend.pread(self.fd, 4, register)

    def write(self, register: int, value: int, width: int = 4) -> None:
        self.backend.pwrite(self.fd, value.to_bytes(width, "big"), register)

    def transfer(self, source: int, destination: int, command: int) -> None:
        for register, value in ((0x80, source), (0x88, destination), (0x90, 16), (0x98, command)):
            self.write(register, value, 8)

    def load(self, iova: int) -> None:
        """The device reads memory."""
        self.transfer(iova, 0x40000, 1)

    def store(self, iova: int) -> None:
        """The device writes memory."""
        self.transfer(0x40000, iova, 3)

    def inject(self, function: int, kind: int = 0, address: int = 0, mask: int = 0) -> int:
        error = {"type": kind, "func": function, "addr": address, "mask": mask}
        op = uapi.vfio_eeh_pe_op(op=INJECT, err=error)
        return self.container.ioctl(uapi.VFIO_EEH_PE_OP, uapi.buffer(op))

    def listen(self, index: int) -> int:
        """An eventfd for the interrupt."""
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        flags = uapi.VFIO_IRQ_SET_DATA_EVENTFD | uapi.VFIO_IRQ_SET_ACTION_TRIGGER
        argument = uapi.vfio_irq_set.sized(24, index=index, flags=flags, start=0, count=1)
        raw = uapi.buffer(argument)
        raw[20:] = fd.to_bytes(4, "little")
        assert self.program.ioctl(self.fd, uapi.VFIO_DEVICE_SET_IRQS, raw) == 0
        return fd


def taken(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


@pytest.fixture
def edu() -> Iterator[Opened]:
    opened = Opened("fake:power9")
    yield opened
    opened.program.close_all()
    assert opened.backend.leaks() == []


# --- what freezes ---


def test_dma_that_the_tables_allow_freezes_nothing(edu):
    edu.load(IOVA)
    edu.store(IOVA)
    assert edu.state == 0


@pytest.mark.parametrize("iova", [0, IOVA + 0x10000, 1 << 40, SECOND_WINDOW])
def test_dma_to_where_nothing_is_mapped_freezes_the_pe(edu, iova):
    edu.load(iova)
    assert edu.state == 2
    assert edu.pe.isolated


def test_dma_without_permission_freezes_the_pe(edu):
    edu.map(READ)
    edu.load(IOVA)
    assert edu.state == 0
    edu.store(IOVA)
    assert edu.state == 2


def test_dma_stops_at_the_page_that_freezes_the_pe(edu):
    end = IOVA + edu.memory.length
    edu.memory.view[-8:] = b"x" * 8
    edu.map(iova=IOVA + 2 * edu.memory.length)
    pe = edu.machine.device(ADDRESS).pe
    pe.dma_write(end - 8, bytes(8 + edu.memory.length) + b"after")
    assert edu.state == 2
    assert bytes(edu.memory.view[-8:]) == bytes(8)
    assert bytes(edu.memory.view[:5]) == bytes(5)  # mapped, but behind what froze the PE
    assert [fault.reason for fault in pe.dma_faults] == ["nothing is mapped there", "the PE is frozen"]


def test_device_without_bus_master_freezes_nothing(edu):
    edu.backend.pwrite(edu.fd, b"\2\0", CONFIG + COMMAND)
    edu.load(0)
    assert edu.state == 0


# --- what a freeze stops ---


def test_frozen_mmio_reads_all_ones_and_drops_stores(edu):
    bar = edu.program.mmap(edu.fd, edu.backend.page_size, 0)
    edu.write(0x04, 0x12345678)
    edu.machine.eeh.freeze(ADDRESS)
    assert edu.read(0x04) == ONES
    assert bar.load(0, 4) == 0xFFFF_FFFF
    edu.write(0x04, 1)
    bar.store(0x04, 4, 1)
    assert edu.container.eeh(UNFREEZE_IO) == 0
    assert edu.read(0x04) == (~0x12345678 & 0xFFFF_FFFF).to_bytes(4, "big")


def test_half_frozen_pe_stops_one_half(edu):
    edu.machine.eeh.freeze(ADDRESS, "dma")
    assert edu.read(0) == b"\x01\x00\x00\xed"
    edu.memory.view[:16] = b"x" * 16
    edu.store(IOVA)
    assert bytes(edu.memory.view[:16]) == b"x" * 16
    edu.machine.eeh.freeze(ADDRESS, "mmio")
    assert edu.read(0) == ONES


def test_configuration_space_stays_in_reach(edu):
    edu.machine.eeh.freeze(ADDRESS)
    assert edu.backend.pread(edu.fd, 2, CONFIG + COMMAND) == b"\x06\x01"


def test_on_power7_configuration_space_reads_all_ones():
    backend = open_backend("fake:power7")
    assert isinstance(backend, FakeBackend)
    address = next(pci.address for pci in backend.machine.driver_core.devices.values() if pci.group)
    file = f"/sys/bus/pci/devices/{address}/config"
    assert not backend.read_text(file).startswith("\ufffd" * 4)
    backend.machine.eeh.freeze(address)
    assert set(backend.read_text(file)) == {"\ufffd"}


def test_messages_of_a_frozen_pe_are_lost(edu):
    fd = edu.listen(1)
    edu.write(0x60, 1)
    assert taken(fd) == 1
    edu.machine.eeh.freeze(ADDRESS, "dma")
    edu.write(0x60, 1)
    assert taken(fd) == 0
    assert edu.container.eeh(UNFREEZE_DMA) == 0
    assert taken(fd) == 0
    edu.write(0x60, 1)
    assert taken(fd) == 1
    os.close(fd)


def test_intx_of_a_frozen_pe_waits_for_the_thaw(edu):
    fd = edu.listen(0)
    edu.machine.eeh.freeze(ADDRESS, "dma")
    edu.write(0x60, 1)
    assert taken(fd) == 0
    assert edu.container.eeh(UNFREEZE_DMA) == 0
    assert taken(fd) == 1
    os.close(fd)


def test_other_pes_go_on(edu):
    edu.machine.eeh.freeze("0000:01:00.0")
    assert edu.read(0) == b"\x01\x00\x00\xed"
    edu.load(IOVA)
    assert edu.state == 0


def test_thaw_is_all_that_a_freeze_needs(edu):
    fd = edu.listen(1)
    edu.load(0)
    assert [edu.container.eeh(op) for op in (UNFREEZE_IO, UNFREEZE_DMA, GET_STATE)] == [0, 0, 0]
    edu.memory.view[:16] = b"0123456789abcdef"
    edu.load(IOVA)
    edu.store(IOVA + 32)
    assert bytes(edu.memory.view[32:48]) == b"0123456789abcdef"
    edu.write(0x60, 1)
    assert taken(fd) == 1
    os.close(fd)


@pytest.mark.parametrize("reset", [HOT, FUNDAMENTAL])
def test_reset_clears_bus_master_and_messages(edu, reset):
    fd = edu.listen(1)
    assert [edu.container.eeh(op) for op in (reset, DEACTIVATE)] == [0, 0]
    assert edu.backend.pread(edu.fd, 2, CONFIG + COMMAND) == b"\x02\x01"
    edu.master()
    edu.write(0x60, 1)
    assert taken(fd) == 0
    os.close(fd)


def test_reset_takes_the_firmware_seconds_of_the_virtual_clock(edu):
    start = edu.machine.clock.now()
    assert edu.container.eeh(HOT) == 0
    assert edu.machine.clock.now() - start == pytest.approx(4.9)


# --- machines whose PEs do not freeze ---


@pytest.mark.parametrize("url", ["fake:power9?freeze=0", "fake:pseries"])
def test_bad_dma_on_a_machine_that_does_not_freeze_is_only_noted(url):
    backend = open_backend(url)
    assert isinstance(backend, FakeBackend)
    pe = backend.machine.pes[0]
    pe.dma_write(0, b"x")
    assert pe.freeze == "none"
    assert pe.dma_faults[0].reason == "no window has this address"


def test_like_qemu_a_frozen_pe_goes_on_working():
    edu = Opened("fake:power9?freeze=0")
    edu.machine.eeh.freeze(ADDRESS)
    assert edu.state == 2
    assert edu.read(0) == b"\x01\x00\x00\xed"
    edu.store(IOVA)
    assert edu.inject(4) == 0
    assert edu.backend.pread(edu.fd, 2, CONFIG + COMMAND) == b"\x06\x01"
    edu.program.close_all()


# --- injected errors ---


def test_config_error_hits_the_next_load_and_freezes_the_pe(edu):
    assert edu.inject(4) == 0
    assert edu.state == 0
    edu.read(0)
    assert edu.backend.pread(edu.fd, 4, CONFIG) == b"\x34\x12\xe8\x11"  # the kernel's own copy
    assert edu.state == 0
    assert edu.backend.pread(edu.fd, 4, CONFIG + CLASS) == ONES
    assert edu.state == 2
    assert edu.backend.pread(edu.fd, 4, CONFIG + CLASS) != ONES  # it hit once


def test_config_error_on_stores_drops_the_store(edu):
    assert edu.inject(10) == 0
    edu.backend.pread(edu.fd, 2, CONFIG + COMMAND)
    assert edu.state == 0
    edu.backend.pwrite(edu.fd, b"\0\0", CONFIG + COMMAND)
    assert edu.state == 2
    assert edu.backend.pread(edu.fd, 2, CONFIG + COMMAND) != b"\0\0"


def test_second_injection_replaces_the_first(edu):
    assert edu.inject(4) == 0
    assert edu.inject(10) == 0
    assert edu.backend.pread(edu.fd, 2, CONFIG + COMMAND) != b"\xff\xff"
    assert edu.state == 0


@pytest.mark.parametrize(("function", "write"), [(0, False), (1, False), (6, True), (7, True)])
def test_memory_error_hits_the_next_access_of_that_kind(function, write):
    edu = Opened("fake:power8")
    assert edu.inject(function) == 0
    if write:
        assert edu.read(0) != ONES
        edu.write(0x04, 0x1234)
    else:
        edu.write(0x04, 0x1234)
        assert edu.read(0x04) == ONES
    assert edu.state == 2
    assert edu.container.eeh(ENABLE) == 0
    assert edu.read(0x04) == ((0 if write else ~0x1234) & 0xFFFF_FFFF).to_bytes(4, "big")
    edu.program.close_all()


def test_memory_error_waits_for_its_address():
    edu = Opened("fake:power8")
    bar = edu.machine.device(ADDRESS).bars[0].bus_address
    assert edu.inject(0, address=bar + 0x08, mask=0xFFFF_FFFF) == 0
    assert edu.read(0x04) != ONES
    assert edu.state == 0
    assert edu.read(0x08) == ONES
    assert edu.state == 2
    edu.program.close_all()


@pytest.mark.parametrize(("function", "write"), [(12, False), (15, False), (16, True), (19, True)])
def test_dma_error_hits_the_next_dma_of_that_kind(function, write):
    edu = Opened("fake:power8")
    assert edu.inject(function) == 0
    (edu.load if write else edu.store)(IOVA)
    assert edu.state == 0
    (edu.store if write else edu.load)(IOVA)
    assert edu.state == 2
    edu.program.close_all()


def test_dma_error_waits_for_its_address():
    edu = Opened("fake:power8")
    assert edu.inject(12, address=IOVA + 0x800, mask=-0x100 & 0xFFFF_FFFF) == 0
    edu.load(IOVA)
    assert edu.state == 0
    edu.load(IOVA + 0x810)
    assert edu.state == 2
    edu.program.close_all()


# --- for good ---


def test_reset_after_the_pe_has_failed_for_good_would_hang_and_says_so(edu):
    request = edu.listen(4)
    edu.machine.eeh.fail(ADDRESS)
    assert taken(request) == 1
    assert edu.state == 4
    with pytest.raises(RuntimeError, match="waits to be removed"):
        edu.container.eeh(HOT)
    edu.machine.clock.advance(25)
    assert taken(request) == 2  # the host asks every ten seconds
    edu.program.close(edu.fd)
    assert ADDRESS not in edu.machine.driver_core.devices
    assert edu.state == -errno.EINVAL
    os.close(request)


def test_thousand_freezes_of_an_open_pe_count_nothing_and_take_no_time(edu):
    edu.memory.view[:16] = b"0123456789abcdef"
    for _ in range(1000):
        edu.load(0)
        assert edu.state == 2
        assert [edu.container.eeh(op) for op in (HOT, DEACTIVATE, GET_STATE)] == [0, 0, 0]
        edu.master()
        edu.load(IOVA)
        edu.store(IOVA + 64)
        assert bytes(edu.memory.view[64:80]) == b"0123456789abcdef"
        edu.memory.view[64:80] = bytes(16)
    assert edu.pe.freeze_count == 0
    assert edu.machine.eeh.freeze_count == 1000
    assert edu.machine.log.text == ""
