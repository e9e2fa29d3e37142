"""The NVMe driver: data through both windows, PRPs of every form, interrupts, refusals, resets, shutdown."""

import errno
import os
from contextlib import ExitStack

import pytest

import vfio
from simtests.conformance.pci_calls import on_vfio
from vfio import errors, selftest
from vfio.drivers import nvme_bench, nvme_protocol
from vfio.drivers.nvme import Command, CommandFailed, Nvme, Stopped

pytestmark = [
    pytest.mark.lab_only,
    pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k", "powernv10", "powernv10-64k"),
    pytest.mark.not_recorded("the device completes commands some time after the call that issues them"),
]
BLOCK, BLOCKS = 512, 32768
LARGEST = 512 << 10


@pytest.fixture
def bound(backend, target):
    """Address of the disk, on vfio-pci."""
    address = next(device.address for device in target.topology.devices if device.model == "nvme")
    with on_vfio(backend, address):
        yield address


@pytest.fixture
def device(backend, bound):
    """The disk's device, open, with nothing locked before and after."""
    before = backend.locked().locked
    with vfio.open_device(bound, backend) as device:
        yield device
    assert backend.locked().locked == before


@pytest.fixture(params=["default", "64-bit"])
def window(request, device):
    """Each of the two windows that a PE can have."""
    if request.param == "default":
        yield device.iommu.windows[0]
        return
    with device.iommu.create_window(1 << 28) as window:
        assert window.start == 1 << 59
        yield window


@pytest.fixture
def disk(device):
    with Nvme(device) as disk:
        yield disk


@pytest.fixture
def memory(backend):
    """Makes memory for data, mapped by a driver."""
    with ExitStack() as undo:

        def make(disk, length):
            dma = undo.enter_context(disk.map(undo.enter_context(vfio.DmaBuffer(length, backend=backend))))
            undo.callback(disk.drain)
            return dma

        yield make


@pytest.fixture
def deaf(monkeypatch):
    """Makes a controller deaf: its doorbells are not rung until that is undone."""

    def deafen(disk):
        monkeypatch.setattr(disk.bar, "doorbell32", lambda offset, value: None)
        return monkeypatch.undo

    return deafen


def page_in(disk, dma):
    """Where a page of the controller's begins in mapped memory, in bytes: a window's pages may be smaller."""
    return -dma.iova % disk.page


def reads(disk, dma, places, blocks=1):
    """Begin to read one piece from each of `places`, side by side into `dma`."""
    return [disk.start_read(lba, blocks, dma, n * blocks * BLOCK) for n, lba in enumerate(places)]


def writes(disk, dma, places, blocks=1):
    """The same for writing."""
    return [disk.start_write(lba, blocks, dma, n * blocks * BLOCK) for n, lba in enumerate(places)]


# --- what it is ---


def test_controller_and_its_namespace_say_what_they_are(disk):
    found = disk.controller
    assert (found.vendor, found.subsystem_vendor) == (0x1B36, 0x1AF4)
    assert (found.model, found.serial) == ("QEMU NVMe Ctrl", "lab")
    assert (found.version, found.largest_transfer, found.write_cache) == ((1, 4, 0), LARGEST, True)
    (space,) = disk.namespaces
    assert (space.number, space.blocks, space.block_size, space.metadata) == (1, BLOCKS, BLOCK, 0)
    assert space.size == BLOCKS * BLOCK


def test_controllers_page_is_the_hosts(disk, target):
    assert disk.page == target.page_size
    assert disk.bar.read32(nvme_protocol.CC) >> 7 & 0xF == target.page_size.bit_length() - 13


def test_device_of_another_class_is_refused(backend, target):
    edu = next(device.address for device in target.topology.devices if device.model == "edu")
    with on_vfio(backend, edu), vfio.open_device(edu, backend) as device:
        with pytest.raises(errors.CallFailed, match="its class is 00ff00") as caught:
            Nvme(device)
        assert caught.value.errno == errno.ENODEV


# --- data ---


def test_what_is_written_is_read_back(device, window):
    with Nvme(device, window=window) as disk:
        for blocks in (1, 7, 8, 9, 127, 128, 129, 1024, 1025, 3000):
            data = os.urandom(blocks * BLOCK)
            disk.write(100, b"\x5a" * ((blocks + 2) * BLOCK))
            disk.write(101, data)
            disk.flush()
            assert disk.read(101, blocks) == data
            assert disk.read(100, 1) == disk.read(101 + blocks, 1) == b"\x5a" * BLOCK


def test_first_and_last_block_are_as_good_as_others(disk):
    for lba in (0, BLOCKS - 1):
        data = os.urandom(BLOCK)
        disk.write(lba, data)
        assert disk.read(lba, 1) == data


@pytest.mark.parametrize("offset", [0, 4, 512, -512, -4])
def test_data_may_begin_anywhere_in_a_page_and_end_anywhere(device, window, memory, offset):
    with Nvme(device, window=window) as disk:
        offset %= disk.page
        dma = memory(disk, 6 * disk.page)
        for pages in range(4):
            length = pages * disk.page + 3 * BLOCK
            data = os.urandom(length)
            disk.write(50, data)
            dma[:] = b"\xee" * len(dma)
            disk.wait(disk.start_read(50, length // BLOCK, dma, offset))
            assert dma[offset : offset + length] == data
            assert dma[:offset] == b"\xee" * offset
            assert set(dma[offset + length : len(dma)]) == {0xEE}
            disk.wait(disk.start_write(500, length // BLOCK, dma, offset))
            assert disk.read(500, length // BLOCK) == data


def test_largest_transfer_is_one_command(device, window, memory):
    with Nvme(device, window=window) as disk:
        assert disk.largest_transfer == LARGEST
        dma = memory(disk, LARGEST + disk.page)
        data = os.urandom(LARGEST)
        dma[512 : 512 + LARGEST] = data
        disk.wait(disk.start_write(0, LARGEST // BLOCK, dma, 512))
        dma[:] = bytes(len(dma))
        disk.wait(disk.start_read(0, LARGEST // BLOCK, dma, 512))
        assert dma[512 : 512 + LARGEST] == data
        with pytest.raises(ValueError, match=f"{LARGEST} are the most"):
            disk.start_read(0, LARGEST // BLOCK + 1, dma)


def test_commands_beyond_the_depth_are_refused_and_queues_go_round(device, memory):
    with Nvme(device, depth=3) as disk:
        dma = memory(disk, 3 * BLOCK)
        for turn in range(20):
            data = os.urandom(3 * BLOCK)
            dma[: 3 * BLOCK] = data
            places = [turn * 8 + n for n in range(3)]
            issued = writes(disk, dma, places)
            with pytest.raises(errors.Busy, match="3 commands are on their way") as caught:
                disk.start_flush()
            assert caught.value.errno == errno.EAGAIN
            disk.wait(*issued)
            assert all(command.done and command.ended >= command.begun for command in issued)
            assert disk.lost == ()
            assert disk.read(turn * 8, 3) == data


def test_poll_tells_each_command_once(disk, memory):
    dma = memory(disk, 16 * BLOCK)
    left = set(reads(disk, dma, range(16)))
    while left:
        done = disk.poll(timeout=5)
        assert done
        assert set(done) <= left
        left -= set(done)
    assert disk.poll() == []


# --- what is refused ---


@pytest.mark.parametrize(("lba", "blocks"), [(BLOCKS, 1), (BLOCKS - 1, 2), (-1, 1), (0, 0), (0, BLOCKS + 1)])
def test_blocks_that_the_disk_does_not_have_are_refused(disk, lba, blocks):
    with pytest.raises(ValueError, match=f"{blocks} blocks from LBA {lba}.*0 to {BLOCKS - 1}"):
        disk.read(lba, blocks)
    if blocks > 0:
        with pytest.raises(ValueError, match="blocks from LBA"):
            disk.write(lba, bytes(blocks * BLOCK))


def test_data_that_is_no_whole_blocks_is_refused(disk):
    with pytest.raises(ValueError, match="100 bytes are no whole blocks"):
        disk.write(0, bytes(100))


def test_namespace_that_is_not_there_is_refused(disk):
    with pytest.raises(ValueError, match="no namespace 2; there are: 1"):
        disk.read(0, 1, namespace=2)


def test_memory_that_a_command_cannot_use_is_refused(device, disk, memory):
    dma = memory(disk, 4 * BLOCK)
    with pytest.raises(errors.Misaligned, match="words of 4 bytes"):
        disk.start_read(0, 1, dma, offset=2)
    for offset in (-4, len(dma)):
        with pytest.raises(ValueError, match="outside the memory"):
            disk.start_read(0, 1, dma, offset)
    dma.close()
    with pytest.raises(errors.NotMapped):
        disk.start_read(0, 1, dma)


@pytest.mark.parametrize(
    ("opcode", "namespace", "lba", "status", "number", "words"),
    [
        (2, 1, BLOCKS, 0x4080, errno.EINVAL, "LBA out of range"),
        (1, 1, BLOCKS - 3, 0x4080, errno.EINVAL, "LBA out of range"),
        (2, 0, 0, 0x400B, errno.EINVAL, "invalid namespace or format"),
        (2, 300, 0, 0x400B, errno.EINVAL, "invalid namespace or format"),
        (2, 2, 0, 0x4002, errno.EINVAL, "invalid field in command"),
        (0x77, 1, 0, 0x4001, errno.EOPNOTSUPP, "invalid command opcode"),
    ],
)
def test_controllers_refusal_is_an_error_with_its_status(disk, memory, opcode, namespace, lba, status, number, words):
    dma = memory(disk, 4 * BLOCK)
    dwords = (lba, 0, 3)
    command = disk.start(Command("a command", opcode, namespace, dma.iova, 4 * BLOCK, dwords))
    with pytest.raises(CommandFailed, match=f"a command: {words} .*not to be retried") as caught:
        disk.wait(command)
    assert (caught.value.status, caught.value.errno, caught.value.retryable) == (status, number, False)
    assert disk.read(0, 1) is not None


BAD_QUEUE, BAD_CQ, BAD_SIZE, BAD_VECTOR, BAD_PRP = 0x4101, 0x4100, 0x4102, 0x4108, 0x4013
BAD_FIELD, BAD_NAMESPACE, NEVER_QUEUE = 0x4002, 0x400B, 9
ADMIN = {
    # what: opcode, namespace, offset of the data, dwords 10 and 11, status
    "opcode": (0x7F, 0, 0, (), 0x4001),
    "delete submission queue 0": (0x00, 0, 0, (0,), BAD_QUEUE),
    "delete submission queue that is not there": (0x00, 0, 0, (NEVER_QUEUE,), BAD_QUEUE),
    "delete completion queue 0": (0x04, 0, 0, (0,), BAD_CQ),
    "delete completion queue that is not there": (0x04, 0, 0, (NEVER_QUEUE,), BAD_CQ),
    "delete completion queue in use": (0x04, 0, 0, (1,), 0x010C),
    "create completion queue 0": (0x05, 0, 0, (0x10000, 1), BAD_QUEUE),
    "create completion queue 65": (0x05, 0, 0, (0x10041, 1), BAD_QUEUE),
    "create completion queue twice": (0x05, 0, 0, (0x10001, 1), BAD_QUEUE),
    "create completion queue of 1": (0x05, 0, 0, (0x00002, 1), BAD_SIZE),
    "create completion queue of 2049": (0x05, 0, 0, (0x8000002, 1), BAD_SIZE),
    "create completion queue inside a page": (0x05, 0, 64, (0x10002, 1), BAD_PRP),
    "create completion queue with vector 65": (0x05, 0, 0, (0x10002, 65 << 16 | 1), BAD_VECTOR),
    "create completion queue in pieces": (0x05, 0, 0, (0x10002, 0), BAD_FIELD),
    "create submission queue without completions": (0x01, 0, 0, (0x10002, 1), BAD_CQ),
    "create submission queue for completions nowhere": (0x01, 0, 0, (0x10002, NEVER_QUEUE << 16 | 1), BAD_CQ),
    "create submission queue 0": (0x01, 0, 0, (0x10000, 0x10001), BAD_QUEUE),
    "create submission queue twice": (0x01, 0, 0, (0x10001, 0x10001), BAD_QUEUE),
    "create submission queue of 1": (0x01, 0, 0, (0x00002, 0x10001), BAD_SIZE),
    "create submission queue inside a page": (0x01, 0, 64, (0x10002, 0x10001), BAD_PRP),
    "create submission queue in pieces": (0x01, 0, 0, (0x10002, 0x10000), BAD_FIELD),
    "identify something": (0x06, 0, 0, (0x55,), BAD_FIELD),
    "identify namespace 0": (0x06, 0, 0, (0,), BAD_NAMESPACE),
    "identify namespace 257": (0x06, 257, 0, (0,), BAD_NAMESPACE),
    "identify all namespaces": (0x06, 0xFFFFFFFF, 0, (0,), BAD_NAMESPACE),
    "identify namespaces behind the last": (0x06, 0xFFFFFFFE, 0, (2,), BAD_NAMESPACE),
    "identify names of nothing": (0x06, 2, 0, (3,), BAD_FIELD),
    "set a feature that is none": (0x09, 0, 0, (0x55,), BAD_FIELD),
    "save a feature": (0x09, 0, 0, (0x80000006, 1), 0x410D),
    "set the queues while there are some": (0x09, 0, 0, (7, 0), 0x400C),
    "set arbitration": (0x09, 0, 0, (1, 0), 0x410E),
    "set the write cache of a namespace": (0x09, 1, 0, (6, 1), 0x410F),
    "get a feature that is none": (0x0A, 0, 0, (0x55,), BAD_FIELD),
    "get the error recovery of no namespace": (0x0A, 0, 0, (5,), BAD_NAMESPACE),
    "get the configuration of vector 65": (0x0A, 0, 0, (9, 65), BAD_FIELD),
    "abort in a queue that is not there": (0x08, 0, 0, (NEVER_QUEUE,), BAD_FIELD),
}


def test_admin_commands_are_refused_with_their_status(disk, memory):
    dma = memory(disk, 2 * disk.page)
    page = dma.iova + page_in(disk, dma)
    found = {}
    for what, (opcode, namespace, offset, dwords, _) in ADMIN.items():
        try:
            disk.admin(what, opcode, page + offset, namespace, dwords)
            found[what] = 0
        except CommandFailed as error:
            found[what] = error.status
    assert found == {what: status for what, (*_, status) in ADMIN.items()}
    assert len(disk.read(0, 1)) == BLOCK


def test_features_and_aborts_answer(disk):
    def get(feature, more=0, namespace=0):
        return disk.admin("get a feature", 0x0A, 0, namespace, (feature, more))

    assert get(7) == 0x3F003F  # 64 queues of each kind
    assert (get(9, 0), get(9, 1)) == (0x10000, 1)  # vectors: the admin queue's is not coalesced
    assert get(1) == 7
    assert get(4) == 0x157
    assert get(6) == 1
    disk.admin("set the write cache", 0x09, dwords=(6, 0))
    assert get(6) == 0
    disk.reset()
    assert get(6) == 0
    disk.admin("set the write cache", 0x09, dwords=(6, 1))
    assert disk.admin("abort", 0x08, dwords=(1,)) == 1  # nothing was aborted


def test_queues_are_deleted_and_made_again(disk, memory):
    dma = memory(disk, 3 * disk.page)
    page = dma.iova + page_in(disk, dma)
    for number in (2, 64):
        disk.admin("create completion queue", 0x05, page, dwords=(number | 7 << 16, 1))
        disk.admin("create submission queue", 0x01, page + disk.page, dwords=(number | 7 << 16, number << 16 | 1))
        disk.admin("delete submission queue", 0x00, dwords=(number,))
        disk.admin("delete completion queue", 0x04, dwords=(number,))
        with pytest.raises(CommandFailed, match="invalid completion queue"):
            disk.admin("delete completion queue", 0x04, dwords=(number,))


def test_identify_lists_namespaces_behind_a_number(disk, memory):
    dma = memory(disk, disk.page)
    for behind, wanted in ((0, [1, 0]), (1, [0, 0])):
        dma[:8] = b"\xff" * 8
        disk.admin("list", 0x06, dma.iova, behind, (2,))
        assert [int.from_bytes(dma[at : at + 4], "little") for at in (0, 4)] == wanted
    disk.admin("names", 0x06, dma.iova, 1, (3,))
    assert dma[:8] == bytes((4, 1, 0, 0, 0, 0, 0, 0))
    disk.admin("a namespace that is not there", 0x06, dma.iova, 2, (0,))
    assert dma[:4096] == bytes(4096)


def test_compare_and_write_zeroes(disk, memory):
    dma = memory(disk, 4 * BLOCK)
    data = os.urandom(4 * BLOCK)
    dma[: len(data)] = data
    disk.write(20, data)

    def do(opcode):
        disk.wait(disk.start(Command("a command", opcode, 1, dma.iova, len(data), (20, 0, 3))))

    do(0x05)
    dma[2000:2001] = bytes([data[2000] ^ 1])
    with pytest.raises(CommandFailed, match="compare failure") as caught:
        do(0x05)
    assert (caught.value.status, caught.value.retryable) == (0x285, True)
    do(0x08)
    assert disk.read(20, 4) == bytes(4 * BLOCK)


def test_transfer_beyond_the_limit_is_refused_by_the_controller(disk, memory):
    length = (disk.page << 7) + BLOCK
    dma = memory(disk, min(length, 1 << 20))
    command = Command("too much", nvme_protocol.READ, 1, dma.iova, 1 << 16, (0, 0, length // BLOCK - 1))
    with pytest.raises(CommandFailed, match="invalid field in command"):
        disk.wait(disk.start(command))


def test_closed_driver_says_so(device):
    with Nvme(device) as disk:
        pass
    disk.close()
    with pytest.raises(errors.Closed):
        disk.start_flush()


# --- interrupts ---


@pytest.mark.parametrize("kind", ["MSI-X", "INTx", "polling"])
def test_completions_are_noticed_by(device, window, memory, kind):
    with Nvme(device, window=window, interrupt=kind) as disk:
        assert disk.interrupt == kind
        dma = memory(disk, 32 * BLOCK)
        data = os.urandom(32 * BLOCK)
        dma[: len(data)] = data
        for _ in range(5):
            disk.wait(*writes(disk, dma, range(32)))
            assert disk.read(0, 32) == data


def test_msix_is_chosen_first_and_msi_that_is_not_there_refused(device, disk):
    assert disk.interrupt == "MSI-X"
    assert len(disk.vectors) == 2
    disk.close()
    with pytest.raises(errors.NoInterrupt):
        Nvme(device, interrupt="MSI")
    with Nvme(device) as disk:
        disk.flush()


# --- timeouts and resets ---


def test_command_that_is_lost_times_out_and_happens_after_a_reset(disk, memory, deaf):
    dma = memory(disk, BLOCK)
    data = os.urandom(BLOCK)
    dma[:BLOCK] = data
    disk.write(9, bytes(BLOCK))
    hear = deaf(disk)
    command = disk.start_write(9, 1, dma)
    with pytest.raises(errors.TimedOut, match="write of 1 blocks at LBA 9"):
        disk.wait(command, timeout=0.1)
    assert disk.lost == (command,)
    hear()
    with pytest.raises(Stopped, match="nothing happened for"):
        disk.start_flush()
    disk.reset()
    assert command.done
    assert disk.lost == ()
    disk.wait(command)
    assert disk.read(9, 1) == data


def test_write_that_timed_out_is_not_overtaken_by_a_later_one(device, deaf):
    with Nvme(device, timeout=0.2) as disk:
        hear = deaf(disk)
        with pytest.raises(errors.TimedOut):
            disk.write(9, b"\1" * BLOCK)
        hear()
        disk.timeout = 30
        disk.reset()
        disk.write(9, b"\2" * BLOCK)
        assert disk.read(9, 1) == b"\2" * BLOCK


def test_reset_with_commands_on_their_way_loses_none(device, window, memory):
    with Nvme(device, window=window, depth=16) as disk:
        dma = memory(disk, 16 * 8 * BLOCK)
        for _ in range(5):
            data = os.urandom(16 * 8 * BLOCK)
            dma[: len(data)] = data
            issued = writes(disk, dma, range(0, 16 * 8, 8), blocks=8)
            disk.reset()
            disk.wait(*issued)
            assert disk.read(0, 16 * 8) == data


def test_stopped_driver_issues_nothing_until_it_resumes(disk):
    disk.on_error()
    with pytest.raises(Stopped, match="being recovered"):
        disk.read(0, 1)
    disk.device.reset()
    disk.on_reset(disk.device)
    with pytest.raises(Stopped):
        disk.read(0, 1)
    disk.on_resume()
    assert len(disk.read(0, 1)) == BLOCK


def test_reset_by_somebody_else_is_noticed(disk):
    disk.flush()
    disk.device.reset()
    with pytest.raises(Stopped, match="something has reset it"):
        disk.read(0, 1)
    disk.reset()
    assert len(disk.read(0, 1)) == BLOCK


def test_controller_that_cannot_reach_memory_fails_and_a_reset_brings_it_back(disk):
    disk.device.enable_bus_master(False)
    with pytest.raises(Stopped, match="fatal error"):
        disk.read(0, 1)
    disk.reset()
    assert len(disk.read(0, 1)) == BLOCK


# --- the end ---


def test_closing_shuts_the_controller_down(device):
    disk = Nvme(device)
    bar = disk.bar
    assert (bar.read32(nvme_protocol.CSTS), bar.read32(nvme_protocol.CC) & 1) == (1, 1)
    disk.close()
    assert (bar.read32(nvme_protocol.CSTS), bar.read32(nvme_protocol.CC)) == (0, 0)
    assert not device.pci.command.bus_master
    assert [window.mapped for window in device.iommu.windows] == [[]]
    assert not device.msix.enabled


def test_what_was_written_is_there_when_it_is_opened_again(backend, bound):
    data = os.urandom(20 * BLOCK)
    with vfio.open_device(bound, backend) as device, Nvme(device) as disk:
        disk.write(1000, data)
    with vfio.open_device(bound, backend) as device, Nvme(device) as disk:
        assert disk.read(1000, 20) == data


def test_driver_can_be_closed_after_its_device(backend, bound):
    with vfio.open_device(bound, backend) as device:
        disk = Nvme(device)
    disk.close()
    with pytest.raises(errors.Closed):
        disk.flush()


def test_failed_start_leaves_nothing(device, monkeypatch):
    with Nvme(device):
        pass  # the kernel makes the default window, and charges it, when it is first used
    monkeypatch.setattr(nvme_protocol, "CC_ENTRY_SIZES", 5 << 16 | 4 << 20)
    before = device.backend.locked().locked
    with pytest.raises(Stopped, match="fatal error"):
        Nvme(device)
    assert device.backend.locked().locked == before
    assert [window.mapped for window in device.iommu.windows] == [[]]
    monkeypatch.undo()
    with Nvme(device) as disk:
        disk.flush()
    assert device.backend.locked().locked == before


# --- what is built on it ---


def test_selftest_reads_the_disk_through_every_window_and_changes_nothing(backend, bound):
    with vfio.open_device(bound, backend) as device, Nvme(device) as disk:
        data = os.urandom(2048 * BLOCK)
        disk.write(0, data)
    steps = list(selftest.steps(bound, backend))
    assert [step for step in steps if step.status == "failed"] == []
    done = {step.name: step.detail for step in steps if step.status == "ok"}
    assert done["registers"] == "QEMU NVMe Ctrl lab, namespaces: 16 MiB"
    assert "blocks of 512 bytes read in" in done["default window"]
    assert "blocks of 512 bytes read in" in done["window, 4 KiB pages"]
    assert done["INTx"] == done["MSI-X"] == "raised by the device"
    with vfio.open_device(bound, backend) as device, Nvme(device) as disk:
        assert disk.read(0, 2048) == data


@pytest.mark.parametrize("write", [False, True])
def test_bench_keeps_its_depth_and_counts(device, window, write):
    with Nvme(device, window=window, depth=8) as disk:
        found = nvme_bench.run(disk, 0.5, block=2048, pattern="sequential", write=write)
        assert found.commands == len(found.latencies) > 8
        assert found.bytes == found.commands * 2048
        assert found.latencies == sorted(found.latencies)
        assert found.latencies[0] > 0
        assert found.latency(100) == found.latencies[-1]
        assert disk.lost == ()


def test_bench_refuses_blocks_that_one_command_cannot_move(disk):
    for block in (0, 100, 2 * LARGEST):
        with pytest.raises(ValueError, match=f"blocks of {block} bytes: multiples of 512 up to {LARGEST}"):
            nvme_bench.run(disk, 1, block=block)
