"""A freeze at any moment: whichever access of the device's is the last, no write is lost and none is made up."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress

import pytest

import vfio
from simtests.conformance.eeh_clock import MachineClock
from vfio import assign, eeh, errors
from vfio.drivers.nvme import Command, Nvme, Stopped
from vfio.errors import DeviceFrozen
from vfio.fake.backend import FakeBackend

DISK, BLOCK, BLOCKS, DEPTH = "0002:01:00.0", 512, 32768, 8


class Setting:
    """The disk of a modelled machine, with memory for data, and what has been written to it."""

    def __init__(self, backend: FakeBackend, device: vfio.Device, disk: Nvme, dma: vfio.Dma) -> None:
        self.backend, self.device, self.disk, self.dma = backend, device, disk, dma
        self.pci = backend.machine.device(DISK)
        self.written: dict[int, bytes] = {}

    def freeze(self) -> None:
        assert self.pci.pe is not None
        self.pci.pe.freeze = "both"

    def freeze_at(self, access: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Freeze before that access of the device to memory, counted from now on."""
        left = access

        def counted(inner: Callable[..., object]) -> Callable[..., object]:
            def access(*words: object) -> object:
                nonlocal left
                if left == 0:
                    self.freeze()
                left -= 1
                return inner(*words)

            return access

        for name in ("dma_read", "dma_write"):
            monkeypatch.setattr(self.pci, name, counted(getattr(self.pci, name)))

    def recover(self) -> eeh.Log:
        clock = MachineClock(self.backend.machine.clock)
        return eeh.recover(self.device, self.disk, limit=10_000, freezes=eeh.Freezes(), clock=clock)

    def write_some(self, before: Callable[[int], None] = lambda n: None) -> list[Command]:
        """Begin a write to each of some places; `before` is called before each."""
        data = os.urandom(DEPTH * BLOCK)
        self.dma[: len(data)] = data
        commands = []
        for n, lba in enumerate(random.sample(range(BLOCKS), DEPTH)):
            before(n)
            commands.append(self.disk.start_write(lba, 1, self.dma, n * BLOCK))
            self.written.pop(lba, None)
            self.written[lba] = data[n * BLOCK : (n + 1) * BLOCK]
        return commands

    def check(self, *, all_of_it: bool = False) -> None:
        """Read back what was written last, and some of what was before, or all."""
        places = list(self.written)
        some = places if all_of_it else places[-DEPTH:] + random.sample(places, min(DEPTH, len(places)))
        for lba in some:
            assert self.disk.read(lba, 1) == self.written[lba], lba


@pytest.fixture(params=[None])
def setting(request: pytest.FixtureRequest) -> Iterator[Setting]:
    backend = vfio.open_backend("fake:power9")
    assert isinstance(backend, FakeBackend)
    with assign.bound([DISK], backend=backend), vfio.open_device(DISK, backend) as device:
        with Nvme(device, depth=DEPTH, interrupt=request.param) as disk:
            with vfio.DmaBuffer(DEPTH * BLOCK, backend=backend) as buffer, disk.map(buffer) as dma:
                yield Setting(backend, device, disk, dma)
    assert backend.leaks() == []


@pytest.mark.parametrize("setting", ["MSI-X", "INTx", "polling"], indirect=True)
def test_thousand_freezes_under_load_lose_no_write(setting: Setting) -> None:
    for _ in range(1000 if setting.disk.interrupt == "MSI-X" else 100):
        last = random.randrange(DEPTH + 1)
        commands = setting.write_some(lambda n, last=last: setting.freeze() if n == last else None)  # type: ignore[misc]
        if last == DEPTH:
            setting.freeze()
        with suppress(DeviceFrozen):
            setting.disk.wait(*commands)
        assert sum(not command.done for command in commands) == DEPTH - last
        assert setting.recover().outcome == "recovered"
        setting.disk.wait(*commands)
        setting.check()
    setting.check(all_of_it=True)


@pytest.mark.parametrize("access", range(4 * DEPTH))
def test_freeze_between_any_two_accesses_of_the_device(
    setting: Setting, access: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        setting.freeze_at(access, patch)
        commands = setting.write_some()
        with pytest.raises(DeviceFrozen) if access < 3 * DEPTH else nullcontext():
            setting.disk.wait(*commands)
    # Each write is three accesses: its entry, its data, its completion.
    done = min(DEPTH, access // 3)
    assert [command.done for command in commands] == [True] * done + [False] * (DEPTH - done)
    setting.freeze()
    setting.recover()
    assert [command.status for command in commands] == [0] * DEPTH
    setting.check()


def test_completion_that_arrived_before_the_freeze_counts(setting: Setting) -> None:
    commands = setting.write_some()
    setting.freeze()
    setting.disk.on_error()
    assert all(command.done for command in commands)
    assert setting.disk.lost == ()
    setting.recover()
    setting.check()


def test_freeze_in_the_middle_of_a_recovery_is_recovered_from_again(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    for access in range(30):  # of the device that is being set up again, and then of what is issued again
        commands = setting.write_some(lambda n: setting.freeze() if n == 2 else None)
        with monkeypatch.context() as patch:
            setting.freeze_at(access, patch)
            with suppress(errors.RecoveryFailed):
                setting.recover()
        while setting.recover().outcome != "not frozen":
            pass
        setting.disk.wait(*commands)
        setting.check()


def test_reads_that_were_lost_are_read_again(setting: Setting) -> None:
    setting.disk.wait(*setting.write_some())
    places = list(setting.written)
    setting.freeze()
    commands = [setting.disk.start_read(lba, 1, setting.dma, n * BLOCK) for n, lba in enumerate(places)]
    setting.recover()
    setting.disk.wait(*commands)
    assert setting.dma[: DEPTH * BLOCK] == b"".join(setting.written[lba] for lba in places)


def test_synchronous_write_that_failed_happens_at_recovery(setting: Setting) -> None:
    setting.freeze()
    with pytest.raises(DeviceFrozen, match="does not answer") as caught:
        setting.disk.write(77, b"\x77" * BLOCK)
    assert "recover(device, driver)" in caught.value.remedy
    setting.recover()
    assert setting.disk.read(77, 1) == b"\x77" * BLOCK


def test_poll_tells_what_a_recovery_completed(setting: Setting) -> None:
    setting.freeze()
    commands = setting.write_some()
    setting.recover()
    assert setting.disk.poll() == commands
    assert setting.disk.poll() == []


def test_thread_that_waits_while_another_recovers_gets_its_answers(setting: Setting) -> None:
    over = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not over.is_set():
                commands = []
                while len(commands) < DEPTH:
                    with suppress(Stopped, DeviceFrozen):
                        lba = random.randrange(BLOCKS)
                        commands.append(setting.disk.start_read(lba, 1, setting.dma, len(commands) * BLOCK))
                while not all(command.done for command in commands):
                    with suppress(Stopped, DeviceFrozen):
                        setting.disk.wait(*commands)
        except BaseException as error:
            failures.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    for _ in range(20):
        setting.freeze()
        setting.recover()
    over.set()
    worker.join(60)
    assert not worker.is_alive()
    assert failures == []


def test_closing_a_frozen_disk_is_quiet_and_unmaps() -> None:
    backend = vfio.open_backend("fake:power9")
    assert isinstance(backend, FakeBackend)
    with assign.bound([DISK], backend=backend):
        with vfio.open_device(DISK, backend) as device:
            disk = Nvme(device)
            backend.machine.device(DISK).pe.freeze = "both"  # type: ignore[union-attr]
            with pytest.raises(DeviceFrozen):
                disk.flush()
            disk.close()
            assert [window.mapped for window in device.iommu.windows] == [[]]  # type: ignore[attr-defined]
        with vfio.open_device(DISK, backend) as device, Nvme(device) as disk:
            disk.flush()  # opening has thawed it
    assert backend.leaks() == []
