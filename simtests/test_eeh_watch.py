"""Noticing a freeze: the owner of a device, and who follows the host."""

from __future__ import annotations

import asyncio
import itertools
import threading

from eeh_setting import DISK, EDU, Setting, setting

from vfio import eeh
from vfio.eeh import host

__all__ = ["setting"]  # a fixture, found here by name


def test_a_poll_notices_a_freeze_once_until_it_is_over(setting: Setting) -> None:
    with eeh.Watch(setting.device, poll=1.0, clock=setting.clock) as watch:
        assert watch.wait(5.0) is None
        setting.machine.clock.after(2.5, setting.freeze)
        began = setting.clock.now()
        notice = watch.wait(10.0)
        assert notice is not None
        assert (notice.how, notice.state, notice.group, notice.frozen) == ("poll", eeh.State.STOPPED, 1, True)
        assert 2.5 <= setting.clock.now() - began <= 3.5
        assert watch.wait(5.0) is None
        setting.recover()
        assert watch.wait(2.0) is None
        setting.freeze("dma")
        notice = watch.wait(2.0)
        assert notice is not None
        assert notice.state is eeh.State.STOPPED_DMA


def test_a_read_of_all_ones_wakes_the_watch(setting: Setting) -> None:
    with eeh.Watch(setting.device, poll=60.0) as watch:
        assert not watch.check(0x1234)
        assert not watch.check(0xFFFF_FFFF)  # the PE works: it is what the register has
        setting.freeze()
        assert not watch.check(0xFFFF, 4)
        assert watch.check(setting.edu.bar.read32(0))
        assert str(watch.wait(30.0)) == f"{EDU}: a register read all ones, the state is STOPPED"
        setting.recover()
        assert watch.look() is None
        found: list[eeh.Notice | None] = []
        waiting = threading.Thread(target=lambda: found.append(watch.wait(30.0)))
        waiting.start()
        setting.freeze()
        assert watch.check(setting.edu.bar.read32(0))  # long before the next poll
        waiting.join(10)
        assert [notice.state for notice in found if notice] == [eeh.State.STOPPED]


def test_the_request_interrupt_is_told(setting: Setting) -> None:
    with eeh.Watch(setting.device, clock=setting.clock) as watch:
        setting.device.req.trigger()
        notice = watch.wait(1.0)
        assert notice is not None
        assert (notice.how, notice.state, notice.frozen) == ("REQ", eeh.State.NORMAL, False)
    assert not setting.device.req.enabled


def test_a_request_interrupt_that_somebody_uses_stays_theirs(setting: Setting) -> None:
    with setting.device.req.enable() as theirs:
        with eeh.Watch(setting.device, clock=setting.clock):
            setting.device.req.trigger()
        assert theirs.take() == 1


def test_closing_ends_the_iteration_of_another_thread(setting: Setting) -> None:
    watch = eeh.Watch(setting.device, poll=0.01)
    told: list[eeh.Notice] = []
    thread = threading.Thread(target=watch.run, args=(told.append,))
    thread.start()
    watch.close()
    watch.close()
    thread.join(10)
    assert not thread.is_alive()
    assert told == []


def test_watching_in_asyncio_and_recovering_in_a_thread(setting: Setting) -> None:
    async def owner() -> eeh.Log:
        with eeh.Watch(setting.device, poll=30.0) as watch:
            loop = asyncio.get_running_loop()
            loop.call_later(0.05, setting.freeze)
            loop.call_later(0.1, lambda: watch.check(setting.edu.bar.read32(0)))
            async for notice in watch:
                assert notice.how == "read"
                return await asyncio.to_thread(setting.recover)
        raise AssertionError

    assert asyncio.run(owner()).recovered


def test_following_the_host_tells_its_log_and_the_state_of_pes_in_use(setting: Setting) -> None:
    told: list[host.Event] = []
    with host.HostWatch(setting.backend, clock=setting.clock) as watch:
        told += watch.look()
        setting.freeze()
        told += watch.look()
        told += watch.look()
        setting.recover()
        told += watch.look()
    mine = [event.text for event in told if event.kind == "state" and event.address == EDU]
    assert mine[0].startswith("PHB#1-PE#fd STOPPED: MMIO and DMA are frozen; held by pid ")
    assert mine[-1].startswith("PHB#1-PE#fd NORMAL")
    assert len(mine) == 2


def test_a_pe_that_nobody_has_open_is_left_to_the_host_while_it_is_followed(setting: Setting) -> None:
    """To ask for its state would keep the host from recovering it."""
    setting.machine.driver_core.load("nvme")
    told: list[host.Event] = []
    with host.HostWatch(setting.backend, DISK, clock=setting.clock) as watch:
        setting.machine.eeh.freeze(DISK)
        for _ in range(30):
            told += watch.look()
            setting.clock.sleep(1.0)
    lines = [event.text for event in told if event.kind == "log" and event.address == DISK]
    assert "EEH: Recovering PHB#2-PE#fd" in lines
    assert lines[-1] == "EEH: Recovery successful."
    assert eeh.status(setting.backend, DISK).state is eeh.State.NORMAL


def test_a_log_that_may_not_be_read_is_noted(setting: Setting) -> None:
    alice = setting.backend.another_process(uid=1000)
    with host.HostWatch(alice, clock=setting.clock) as watch:
        notes = [event.text for event in watch.look() if event.kind == "note"]
    assert any("the kernel's log is not followed" in note for note in notes)


def test_iterating_follows_until_it_is_stopped(setting: Setting) -> None:
    with host.HostWatch(setting.backend, EDU, clock=setting.clock) as watch:
        setting.machine.clock.after(3.0, setting.freeze)
        first = next(event for event in itertools.islice(watch, 100) if event.kind == "state")
        assert first.address == EDU
