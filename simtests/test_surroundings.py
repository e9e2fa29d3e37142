"""What a trace tells of the process around a call."""

from __future__ import annotations

import ctypes
import mmap
import os
from itertools import pairwise

import pytest

from simtests.conformance.areas import NONE, READ, Area
from vfio import uapi
from vfio.backends.call import Call
from vfio.backends.call_json import json_record
from vfio.backends.kernel import KernelBackend
from vfio.backends.surroundings import Surroundings
from vfio.backends.trace import TraceBackend

PAGE = os.sysconf("SC_PAGESIZE")


class Records(list):
    """Keeps what a trace tells, as JSON."""

    def write(self, call: Call) -> None:
        self.append(json_record(call))


class Deaf(KernelBackend):
    """A kernel whose devices know every request and signal the eventfd `signalled`."""

    signalled: int | None = None

    def ioctl(self, fd, request, arg=0):
        if self.signalled is not None:
            os.eventfd_write(self.signalled, 2)
        return 0


@pytest.fixture
def around():
    return Surroundings()


@pytest.fixture
def area():
    area = Area(8, PAGE)
    yield area
    area.close()


@pytest.fixture
def records():
    return Records()


@pytest.fixture
def kernel():
    return Deaf()


@pytest.fixture
def traced(kernel, records):
    return TraceBackend(kernel, records, Surroundings())


def set_irq(*fds):
    data = b"".join(fd.to_bytes(4, "little", signed=True) for fd in fds)
    return uapi.buffer(uapi.vfio_irq_set.sized(20 + len(data), flags=0x24, index=1, count=len(fds), data=data))


def test_memory_that_can_be_written_has_nothing_to_tell(around, area):
    assert around.layout(area.address, 8 * PAGE) == []


def test_rights_and_holes_of_memory_are_told_by_offset(around, area):
    area.protect(1, READ)
    area.protect(2, NONE)
    area.hole(3)
    found = around.layout(area.address, 5 * PAGE)
    assert found == [(0, PAGE, "rw"), (PAGE, PAGE, "r"), (2 * PAGE, 2 * PAGE, "-"), (4 * PAGE, PAGE, "rw")]


def test_pages_behind_the_end_of_a_file_are_not_there(around, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * PAGE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 4 * PAGE) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        address = ctypes.addressof(first)
        del first
        os.truncate(path, PAGE + 1)
        assert around.layout(address, 4 * PAGE) == [(0, 2 * PAGE, "rw"), (2 * PAGE, 2 * PAGE, "-")]


def test_addresses_near_one_another_are_offsets_in_one_area(around, area):
    name, first = around.area(area.address, PAGE, "area1")
    assert name == "area1"
    assert around.area(area.address + 5 * PAGE, PAGE, "area2") == ("area1", first + 5 * PAGE)
    assert first % PAGE == area.address % PAGE


@pytest.mark.parametrize("address", [0, 8, 0x1000, 1 << 60, 0xC000_0000_0000_0000])
def test_address_that_nobody_has_stands_for_itself(around, address):
    assert around.area(address, PAGE, "area1") is None


def test_bytes_are_read_up_to_the_first_that_cannot_be(around, area):
    area.write(2 * PAGE - 4, b"last")
    area.protect(2, NONE)
    assert around.read(area.address + 2 * PAGE - 4, 64) == b"last"
    area.protect(2, READ)
    assert around.read(0x1000, 8) == b""


def test_descriptors_from_outside_are_told(traced, records):
    eventfd, file = os.eventfd(0), os.open(os.devnull, os.O_RDONLY)
    closed = os.dup(file)
    os.close(closed)
    try:
        traced.ioctl(99, uapi.VFIO_DEVICE_SET_IRQS, set_irq(eventfd, file, closed, -1))
    finally:
        os.close(eventfd)
        os.close(file)
    outside = records[0]["outside"]
    symbols = list(records[0]["args"][2]["fds"].values())
    assert [outside[symbol] for symbol in symbols] == ["eventfd", os.devnull, "closed"]


def test_number_that_becomes_another_thing_gets_another_symbol(traced, records):
    fd = os.eventfd(0)
    traced.ioctl(99, uapi.VFIO_DEVICE_SET_IRQS, set_irq(fd))
    os.close(fd)
    traced.ioctl(99, uapi.VFIO_DEVICE_SET_IRQS, set_irq(fd))
    first, second = (record["args"][2]["fds"]["20"] for record in records)
    assert first != second
    assert [record["outside"][each] for record, each in zip(records, (first, second), strict=True)] == [
        "eventfd",
        "closed",
    ]


def test_signals_during_a_call_are_counted_and_left_in_place(traced, records, kernel):
    fd = kernel.signalled = os.eventfd(5)
    traced.ioctl(99, uapi.VFIO_DEVICE_SET_IRQS, set_irq(fd))
    assert list(records[0]["signals"].values()) == [2]
    assert os.eventfd_read(fd) == 7
    os.close(fd)


def test_memory_at_an_address_is_told_with_what_is_there(traced, records, area):
    area.write(0, b"pointed at")
    area.protect(1, READ)
    traced.ioctl(99, uapi.VFIO_DEVICE_GET_INFO, area.address)
    record = records[0]
    assert record["args"][2]["place"] == "area1"
    assert bytes.fromhex(record["pointed_at"])[:10] == b"pointed at"
    traced.ioctl(99, uapi.VFIO_DEVICE_GET_INFO, area.address + 2 * PAGE - 8)
    assert records[1]["layout"] == [[0, 8, "r"], [8, 56, "rw"]]


def test_end_of_memory_is_told_and_newer_memory_at_its_place_is_another(traced, records):
    memory = traced.allocate(PAGE)
    address = memory.address
    memory.close()
    traced.ioctl(99, uapi.VFIO_DEVICE_GET_INFO, address)
    assert [record["call"] for record in records] == ["allocate", "free", "ioctl"]
    assert records[0]["address"] == address
    assert records[2]["args"][2] == {"place": "memory1", "offset": 0}


def test_calls_of_another_process_bear_its_name_and_begin_in_order(traced, records, kernel):
    other = TraceBackend(kernel, records, Surroundings(), traced)
    traced.ioctl(99, uapi.VFIO_DEVICE_RESET)
    other.ioctl(99, uapi.VFIO_DEVICE_RESET)
    assert [record.get("process") for record in records] == [None, "process1"]
    assert all(before["begin"] < after["begin"] for before, after in pairwise(records))


def test_calls_at_the_same_time_are_told_to_overlap(traced, records):
    traced.tell("outer", (), lambda: traced.ioctl(99, uapi.VFIO_DEVICE_RESET))
    assert [record["overlaps"] for record in records] == [True, True]
