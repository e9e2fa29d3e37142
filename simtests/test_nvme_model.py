"""The fake's NVMe controller by itself: what it says, what a freeze does to it, disks of every kind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import vfio
from vfio import assign, topology
from vfio.drivers import nvme_protocol
from vfio.drivers.nvme import Command, CommandFailed, Nvme, Stopped
from vfio.errors import DeviceFrozen
from vfio.fake.backend import FakeBackend
from vfio.fake.devices.nvme import Nvme as Model
from vfio.fake.devices.nvme_disk import FileDisk, SparseDisk

DISK, BLOCK = "0002:01:00.0", 512

# What QEMU 7.2.22's controller answered to Identify on real kernels: rows of 32 bytes that are not all zero.
SEEN = {
    (1, 0): """
        000 361bf41a6c6162202020202020202020202020202020202051454d55204e564d
        020 65204374726c2020202020202020202020202020202020202020202020202020
        040 372e322e32322020060054520007000000040100000000000000000000010000
        060 0080000000000000000000000000000100000000000000000000000000000000
        100 0a01030303070000000057017501000000000000000000000000000000000000
        200 66440000000100005d0100000007000000000000000003000100000000000000
        300 6e716e2e323031392d30382e6f72672e71656d753a6c61620000000000000000
        800 c409000010000000040000000000000000000000000000000000000000000000""",
    (0, 1): """
        000 008000000000000000800000000000000080000000000000140700031f000000
        020 0001000000000000000000000000000000000000000000000000000000000000
        040 0000000007000700000000000000000000000000000000000000000000000000
        080 0000090008000900100009004000090000000c0008000c0010000c0040000c00""",
}
"""By CNS and namespace."""


@contextmanager
def opened(url: str = "fake:power9", **properties: str) -> Iterator[tuple[vfio.Device, Model]]:
    """The disk of a machine, open, and its model; `properties` are those of its device."""
    backend = vfio.open_backend(url)
    assert isinstance(backend, FakeBackend)
    pci = backend.machine.device(DISK)
    if properties:
        described = backend.machine.topology.device(DISK)
        model = Model(replace(described, properties=(*described.properties, *properties.items())))
        model.pci, pci.model = pci, model
        model.registers = pci.registers
    assert isinstance(pci.model, Model)
    with assign.bound([DISK], backend=backend), vfio.open_device(DISK, backend) as device:
        yield device, pci.model
    assert backend.leaks() == []


@pytest.fixture
def mapped() -> Iterator[Callable[[Nvme, int], vfio.Dma]]:
    with ExitStack() as undo:

        def make(disk: Nvme, length: int) -> vfio.Dma:
            buffer = undo.enter_context(vfio.DmaBuffer(length, backend=disk.device.backend))
            return undo.enter_context(disk.map(buffer))

        yield make


@pytest.mark.parametrize(("which", "namespace"), SEEN)
def test_identify_data_is_the_real_one(which: int, namespace: int) -> None:
    expected = bytearray(4096)
    rows = SEEN[which, namespace].split()
    for offset, row in zip(rows[::2], rows[1::2], strict=True):
        expected[int(offset, 16) : int(offset, 16) + 32] = bytes.fromhex(row)
    with opened() as (device, _), Nvme(device) as disk, vfio.DmaBuffer(4096, backend=device.backend) as buffer:
        with disk.map(buffer) as dma:
            disk.admin("identify", 6, dma.iova, namespace, (which,))
            assert dma[:4096].hex(" ", 4) == expected.hex(" ", 4)


# --- registers ---


def test_registers_keep_what_they_should() -> None:
    with opened() as (device, _):
        bar = device.region(vfio.BAR0)
        for offset in (0x00, 0x08, 0x1C, 0x20, 0x38):  # read-only, or not there
            before = bar.read32(offset)
            bar.write32(offset, 0xFFFF_FFFF)
            assert bar.read32(offset) == before
        bar.write32(0x0C, 0x5)
        assert (bar.read32(0x0C), bar.read32(0x10)) == (5, 5)
        bar.write32(0x10, 0x4)
        assert (bar.read32(0x0C), bar.read32(0x10)) == (1, 1)
        bar.write32(0x24, 0x12345678)
        bar.write64(0x28, 0x1122334455667788)
        bar.write32(0x30, 0x99AABBCC)
        bar.write32(0x34, 0xDDEEFF00)
        seen = [bar.read32(offset) for offset in range(0x24, 0x38, 4)]
        assert seen == [0x12345678, 0x55667788, 0x11223344, 0x99AABBCC, 0xDDEEFF00]
        assert bar.read32(0x1000) == 0  # doorbells cannot be read
        device.reset()
        assert (bar.read32(0x0C), bar.read32(0x24)) == (0, 0x12345678)


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("sizes of entries", 5 << 16 | 4 << 20 | 1),
        ("page too large", 6 << 16 | 4 << 20 | 5 << 7 | 1),
        ("command set", 6 << 16 | 4 << 20 | 1 << 4 | 1),
        ("no admin queues", 6 << 16 | 4 << 20 | 1),
    ],
)
def test_controller_that_is_enabled_wrongly_reports_a_fatal_error(what: str, value: int) -> None:
    with opened() as (device, _):
        bar = device.region(vfio.BAR0)
        if what != "no admin queues":
            bar.write32(0x24, 7 << 16 | 7)
        bar.write32(0x14, value)
        assert bar.read32(0x1C) == 2
        bar.write32(0x14, 0)
        assert bar.read32(0x1C) == 0


def test_shutdown_is_reported_until_it_is_taken_back() -> None:
    with opened() as (device, _):
        bar = device.region(vfio.BAR0)
        bar.write32(0x14, 1 << 14)
        assert bar.read32(0x1C) == 2 << 2
        bar.write32(0x14, 0)
        assert bar.read32(0x1C) == 0


def test_doorbells_of_queues_that_are_not_there_are_ignored() -> None:
    with opened() as (device, model), Nvme(device) as disk:
        for offset in (0x1010, 0x1014, 0x1100, 0x1FFC):
            disk.bar.write32(offset, 1)
        disk.bar.write32(0x1008, 0xFFFF)  # beyond the end of queue 1
        disk.bar.write32(0x100C, 0xFFFF)
        assert (model.submissions[1].tail, model.completions[1].head) == (0, 0)
        assert disk.read(0, 1) == bytes(BLOCK)


def test_completions_wait_while_their_queue_is_full_and_come_in_order(mapped: Callable[..., vfio.Dma]) -> None:
    with opened() as (device, model), Nvme(device) as disk:
        dma = mapped(disk, 2 * disk.page)
        disk.admin("create completion queue of 3", 0x05, dma.iova, dwords=(2 | 2 << 16, 1))
        disk.admin("create submission queue of 8", 0x01, dma.iova + disk.page, dwords=(2 | 7 << 16, 2 << 16 | 1))
        for n in range(7):
            dma[disk.page + 64 * n : disk.page + 64 * (n + 1)] = nvme_protocol.entry(0x00, 100 + n, 1, 0, 0, ())
        seen, head = [], 0

        def take() -> None:
            """Look at the entry at the head."""
            nonlocal head
            found = nvme_protocol.completion(dma[16 * head : 16 * (head + 1)])
            seen.append((found.cid, found.phase_and_status))
            head = (head + 1) % 3

        disk.bar.doorbell32(0x1010, 7)
        queue = model.completions[2]
        assert ((queue.tail - head) % 3, len(queue.waiting)) == (2, 5)
        while len(seen) < 7:
            take()
            disk.bar.doorbell32(0x1014, head)
        # The phase changes each time that the queue begins anew.
        assert seen == [(100 + n, 1 ^ (n // 3 & 1)) for n in range(7)]
        assert (queue.waiting, model.submissions[2].busy) == ([], 0)


def test_event_requests_are_held_up_to_their_limit() -> None:
    with opened() as (device, model), Nvme(device) as disk:
        disk.timeout = 0.01
        for held in range(4):
            with pytest.raises(vfio.errors.TimedOut):
                disk.admin("event", 0x0C)
            assert model.events_wanted == held + 1
        disk.timeout = 5
        with pytest.raises(CommandFailed) as caught:
            disk.admin("event", 0x0C)
        assert caught.value.status == 0x105
        disk.reset()
        assert model.events_wanted == 0


# --- freezes ---


@pytest.mark.parametrize("what", ["both", "mmio"])
def test_frozen_device_is_told_from_a_slow_one(what: str) -> None:
    with opened() as (device, _), Nvme(device) as disk:
        device.backend.machine.device(DISK).pe.freeze = what
        for call in (lambda: disk.read(0, 1), lambda: disk.poll(1)):
            with pytest.raises((DeviceFrozen, Stopped)) as caught:
                call()
        assert len(disk.lost) == 1
        assert "PE is frozen" in caught.value.why
        with pytest.raises(DeviceFrozen):
            Nvme(device)
        device.backend.machine.device(DISK).pe.freeze = "none"
        disk.reset()
        assert disk.lost == ()


def test_dma_that_leads_nowhere_freezes_the_pe_and_writes_nothing_to_the_disk() -> None:
    with opened() as (device, model), Nvme(device) as disk:
        disk.write(5, b"\x11" * BLOCK)
        command = Command("a stray write", 1, 1, 0x4000_0000, BLOCK, (5, 0, 0))
        disk.start(command)
        with pytest.raises(DeviceFrozen):
            disk.wait(command)
        assert model.disks[1].read(5 * BLOCK, BLOCK) == b"\x11" * BLOCK
        disk.drain()
        assert disk.lost == ()
        assert command.status == 0x07  # aborted: nobody issues it again
        device.backend.machine.device(DISK).pe.freeze = "none"
        disk.reset()
        assert disk.read(5, 1) == b"\x11" * BLOCK


def test_dma_that_leads_nowhere_is_a_transfer_error_where_nothing_freezes() -> None:
    with opened("fake:power9?freeze=0") as (device, _), Nvme(device) as disk:
        command = Command("a stray read", 2, 1, 0x4000_0000, BLOCK, (5, 0, 0))
        with pytest.raises(CommandFailed, match="data transfer error"):
            disk.wait(disk.start(command))


# --- disks ---


def test_namespaces_of_several_sizes_are_apart() -> None:
    with opened(namespaces="0x100000,0x200000") as (device, _), Nvme(device) as disk:
        assert [(space.number, space.size) for space in disk.namespaces] == [(1, 1 << 24), (2, 1 << 20), (3, 1 << 21)]
        for number in (1, 2, 3):
            disk.write(7, bytes([number]) * BLOCK, namespace=number)
        for number in (1, 2, 3):
            assert disk.read(7, 1, namespace=number) == bytes([number]) * BLOCK
            disk.flush(number)
        with pytest.raises(ValueError, match="namespace 2 has 2048 blocks"):
            disk.read(2048, 1, namespace=2)
        assert len(disk.read(2048, 1, namespace=3)) == BLOCK


@pytest.mark.parametrize("size", [512, 1024, 4096])
def test_blocks_of_other_sizes(size: int) -> None:
    with opened(logical_block_size=str(size)) as (device, _), Nvme(device) as disk:
        (space,) = disk.namespaces
        assert (space.block_size, space.size) == (size, 1 << 24)
        data = os.urandom(5 * size)
        disk.write(space.blocks - 5, data)
        assert disk.read(space.blocks - 5, 5) == data


def test_disk_can_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with opened(file=str(path)) as (device, _), Nvme(device) as disk:
        disk.write(3, b"\x42" * BLOCK)
        disk.flush()
    assert path.stat().st_size == 1 << 24
    assert path.read_bytes()[3 * BLOCK : 4 * BLOCK] == b"\x42" * BLOCK
    with opened(file=str(path)) as (device, _), Nvme(device) as disk:
        assert disk.read(3, 1) == b"\x42" * BLOCK


def test_disk_has_the_size_of_its_topology_or_one_gibibyte() -> None:
    device = topology.load("power9").device(DISK)
    assert Model(device).disks[1].size == 1 << 24
    assert Model(replace(device, drive=0)).disks[1].size == 1 << 30


@pytest.mark.parametrize("make", [lambda path: SparseDisk(1 << 20), lambda path: FileDisk(str(path), 1 << 20)])
def test_disk_reads_what_was_written_across_its_pieces(make: Callable[[Path], SparseDisk], tmp_path: Path) -> None:
    disk = make(tmp_path / "disk")
    assert disk.read(0, 1 << 20) == bytes(1 << 20)
    data = os.urandom(200_000)
    disk.write(65_000, data)
    assert disk.read(65_000, 200_000) == data
    assert disk.read(64_990, 20) == bytes(10) + data[:10]
    disk.flush()
