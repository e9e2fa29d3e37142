"""Recovery of a frozen PE: what works again afterwards, and what is said where it does not."""

from __future__ import annotations

import errno
import logging
import random
import threading

import pytest
from eeh_setting import BRIDGE, DISK, EDU, Recorder, Setting, anywhere, fails, setting

import vfio
from simtests.conformance.edu_load import EduLoad
from simtests.conformance.eeh_clock import MachineClock
from vfio import assign, eeh, errors, uapi
from vfio.drivers.edu import Edu
from vfio.drivers.nvme import Nvme
from vfio.eeh import history
from vfio.fake.backend import FakeBackend

__all__ = ["anywhere", "setting"]  # fixtures, found here by name


def test_a_frozen_device_moves_data_and_interrupts_again(anywhere: Setting) -> None:
    vector = anywhere.device.msi.enable()
    told: list[str] = []
    anywhere.freeze()
    assert anywhere.eeh.state is eeh.State.STOPPED
    log = anywhere.recover(Recorder(told), engine=anywhere.edu)
    assert log.recovered
    assert (log.before, log.after, log.reset) == ("STOPPED", "NORMAL", "hot")
    assert told == ["error in STOPPED", f"reset of {anywhere.device.address}, bus master True", "resume"]
    assert anywhere.moves()
    assert anywhere.interrupts(vector)
    assert anywhere.eeh.unrestored == {}


def test_a_bad_dma_freezes_and_recovery_brings_the_device_back(setting: Setting) -> None:
    with pytest.raises(errors.DeviceFrozen):
        setting.edu.load(0x7000_0000, 16, timeout=0.01)
    assert setting.edu.bar.read32(0) == 0xFFFF_FFFF
    with pytest.raises(
        errors.PeFrozen, match=r"PHB#1-PE#fd \(0001:01:00.0\) is frozen: its state is STOPPED"
    ) as caught:
        setting.eeh.check(setting.edu.bar.read32(0))
    assert caught.value.errno == errno.EIO
    log = setting.recover(engine=setting.edu)
    assert log.recovered
    assert setting.eeh.check(setting.edu.bar.read32(0)) == setting.edu.bar.read32(0)
    assert setting.moves()


@pytest.mark.parametrize("what", ["mmio", "dma", "both"])
def test_every_kind_of_freeze_is_recovered(setting: Setting, what: str) -> None:
    setting.freeze(what)
    assert setting.recover().recovered
    assert setting.moves()


def test_a_device_that_works_is_left_alone(setting: Setting) -> None:
    told: list[str] = []
    before = setting.device.pci.raw()
    log = setting.recover(Recorder(told))
    assert (log.outcome, log.after, told) == ("not frozen", "NORMAL", [])
    assert setting.device.pci.raw() == before
    assert str(log) == f"PHB#1-PE#fd ({EDU}) is not frozen: nothing was done"


def test_recovery_twice_in_a_row_recovers_once(setting: Setting) -> None:
    setting.freeze()
    assert setting.recover().recovered
    assert setting.recover().outcome == "not frozen"
    setting.freeze()
    assert setting.recover().recovered


def test_what_the_reset_cleared_is_put_back_and_told(setting: Setting) -> None:
    vector = setting.device.msi.enable()
    setting.device.config.write8(0x0C, 0x20)
    setting.freeze()
    log = setting.recover()
    assert f"{EDU} command 0x0102 -> 0x0106" in log.restored
    assert f"MSI of {EDU}: 1 eventfds" in log.restored
    assert setting.device.pci.command.bus_master
    assert setting.interrupts(vector)


def test_bus_master_that_was_off_stays_off(setting: Setting) -> None:
    setting.device.enable_bus_master(False)
    setting.freeze()
    assert setting.recover().recovered
    assert not setting.device.pci.command.bus_master


def test_interrupt_that_was_waiting_is_not_lost(setting: Setting) -> None:
    vector = setting.device.msi.enable()
    setting.edu.interrupt()
    setting.freeze()
    setting.recover()
    assert vector.take() == 1
    assert setting.interrupts(vector)


def test_intx_comes_again_after_recovery(setting: Setting) -> None:
    vector = setting.device.intx.enable()
    setting.edu.interrupt()
    assert vector.take() == 1  # masked now, and the line is up
    setting.freeze()
    setting.recover()
    assert setting.interrupts(vector)


def test_intx_resampling_survives(setting: Setting) -> None:
    vector = setting.device.intx.enable()
    resample = setting.device.intx.resample()
    setting.freeze()
    setting.recover()
    for _ in range(2):
        assert setting.interrupts(vector)
        resample.fire()


def test_all_devices_of_the_container_are_restored(setting: Setting) -> None:
    """A reset goes to the PEs of all groups; each device's own driver is called."""
    other = "0000:01:00.0"
    backend = setting.backend
    with assign.bound([other], backend=backend), vfio.Container(backend) as container:
        setting.device.close()
        groups = [vfio.Group(number, backend) for number in (1, 0)]
        for group in groups:
            container.attach(group)
        container.choose_iommu()
        devices = [groups[0].device(EDU), groups[1].device(other)]
        edus = [Edu(device) for device in devices]
        told: list[str] = []
        drivers = {device: Recorder(told, f"{device.address} ") for device in devices}
        backend.machine.eeh.freeze(EDU)
        answer = container.eeh.answer()
        assert (answer.state, answer.group) == (eeh.State.STOPPED, 1)
        log = eeh.recover(devices[0], drivers, clock=setting.clock)
        assert log.recovered
        assert [each.address for each in log.devices] == [EDU, other]
        assert [device.pci.command.bus_master for device in devices] == [True, True]
        assert [edu.invert(1) for edu in edus] == [0xFFFF_FFFE] * 2
        assert [text for text in told if text.endswith("resume")] == [f"{EDU} resume", f"{other} resume"]
        assert "group 1 answered" in log.steps[0].detail
        for each in (*devices, *groups):
            each.close()


@pytest.mark.parametrize("frozen", [0, 1])
def test_the_pe_that_answers_is_named(setting: Setting, frozen: int) -> None:
    other = "0000:01:00.0"
    backend = setting.backend
    setting.device.close()
    with assign.bound([other], backend=backend), vfio.Container(backend) as container:
        with vfio.Group(0, backend) as first, vfio.Group(1, backend) as second:
            container.attach(first)
            container.attach(second)
            container.choose_iommu()
            backend.machine.eeh.freeze([other, EDU][frozen], "dma")
            answer = container.eeh.answer()
            assert (answer.state, answer.group) == (eeh.State.STOPPED_DMA, frozen)
            assert answer.pe is not None
            assert answer.pe.name == ["PHB#0-PE#1fd", "PHB#1-PE#fd"][frozen]
            backend.machine.eeh.freeze(other, "both")
            backend.machine.eeh.freeze(EDU, "dma")
            assert container.eeh.answer().group == 1  # the newest is asked first
            container.eeh.enable()


def test_a_reset_that_somebody_left_asserted_is_ended(setting: Setting) -> None:
    setting.eeh.assert_reset()
    log = setting.recover()
    assert log.recovered
    assert log.devices[0].unreadable == "the device is gone, or its PE is held in EEH reset"
    setting.device.enable_bus_master()  # nobody knows what it was
    assert setting.moves()


def test_a_pe_that_works_with_configuration_space_blocked_is_recovered(setting: Setting) -> None:
    setting.eeh.assert_reset()
    setting.eeh.enable()
    assert setting.eeh.state is eeh.State.NORMAL
    assert setting.recover().recovered
    assert setting.device.config.read16(4) != 0xFFFF


def test_hooks_are_all_optional_and_a_foreign_object_has_none(setting: Setting) -> None:
    for driver in (None, object(), setting.edu):
        setting.freeze()
        assert setting.recover(driver).recovered


def test_fundamental_reset_by_choice_and_as_fallback(setting: Setting) -> None:
    setting.freeze()
    assert setting.recover(reset="fundamental").reset == "fundamental"
    setting.freeze()
    fails(setting, uapi.VFIO_EEH_PE_RESET_HOT, errno.EIO)
    log = setting.recover()
    assert (log.recovered, log.reset) == (True, "fundamental")
    assert [step.name for step in log.steps if step.name.startswith("reset")] == ["reset hot", "reset fundamental"]
    assert setting.moves()


# --- failures -------------------------------------------------------------------------------------------------------


def test_the_sixth_freeze_in_an_hour_is_not_recovered(anywhere: Setting) -> None:
    for _ in range(5):
        anywhere.freeze()
        assert anywhere.recover().recovered
    anywhere.freeze()
    told: list[str] = []
    with pytest.raises(errors.TooManyFreezes, match="it froze 6 times in the last hour, and 5 are allowed") as caught:
        anywhere.recover(Recorder(told))
    error = caught.value
    assert (error.count, error.limit, error.state, error.errno) == (6, 5, "STOPPED_DMA", errno.EIO)
    assert error.log.devices[0].identity == "1234:11e8"  # what froze it is known all the same
    assert told == ["error in STOPPED"]
    assert anywhere.eeh.state is eeh.State.STOPPED_DMA
    assert anywhere.recover(limit=6).recovered
    assert anywhere.moves()
    anywhere.machine.clock.advance(3601)
    anywhere.freeze()
    assert anywhere.recover().count == 1


def test_freezes_are_counted_for_each_pe_and_process(setting: Setting) -> None:
    freezes = eeh.Freezes()
    other = setting.backend.another_process()
    for n in range(3):
        freezes.add(setting.backend, 1, float(n))
    freezes.add(other, 1, 2.0)
    freezes.add(setting.backend, 2, 2.0)
    assert [freezes.count(setting.backend, 1, now) for now in (2.0, 3600.0, 3601.5, 9999.0)] == [3, 2, 1, 0]
    assert freezes.count(other, 1, 3.0) == 1


def test_freezes_of_commands_are_counted_in_a_file(setting: Setting) -> None:
    for n in range(2):
        history.FreezeFile(setting.backend).add(setting.backend, 1, 100.0 + n)
    assert history.FreezeFile(setting.backend).count(setting.backend, 1, 102.0) == 2
    assert history.FreezeFile(setting.backend).count(setting.backend, 1, 4000.0) == 0
    for nonsense in ("", "[1]", '{"1": "x"}', '{"x": [1]}', '{"1": [null]}'):
        history.FreezeFile(setting.backend).path.write_text(nonsense)
        assert history.FreezeFile(setting.backend).count(setting.backend, 1, 102.0) == 0


@pytest.mark.parametrize("hook", ["on_error", "on_reset", "on_resume"])
def test_a_driver_that_fails_is_named_and_recovery_can_be_repeated(setting: Setting, hook: str) -> None:
    class Broken(Recorder):
        pass

    def fail(self: Broken, *_: object) -> None:
        raise ValueError("the disk is not what it was")

    setattr(Broken, hook, fail)
    vector = setting.device.msi.enable()
    setting.freeze()
    with pytest.raises(errors.RecoveryFailed, match="the disk is not what it was") as caught:
        setting.recover(Broken([]))
    error = caught.value
    step, state = {
        "on_error": ("stop", "STOPPED"),
        "on_reset": ("start", "NORMAL"),
        "on_resume": ("resume", "NORMAL"),
    }[hook]
    assert (error.step, error.state, error.log.after) == (step, state, state)
    assert setting.eeh.state.name == state
    assert isinstance(error.__cause__, ValueError)
    assert "recover again" in error.remedy
    told: list[str] = []
    assert setting.recover(Recorder(told)).recovered
    assert told[-1] == "resume"
    assert setting.moves()
    assert setting.interrupts(vector)


OPERATIONS = {
    uapi.VFIO_EEH_PE_RESET_HOT: "reset hot",
    uapi.VFIO_EEH_PE_RESET_DEACTIVATE: "reset hot",
    uapi.VFIO_EEH_PE_CONFIGURE: "configure",
}


@pytest.mark.parametrize("op", OPERATIONS)
def test_an_operation_that_fails_for_good_is_told_with_the_state(setting: Setting, op: int) -> None:
    vector = setting.device.msi.enable()
    setting.freeze()
    real = setting.backend.ioctl
    fails(setting, op, errno.EIO, times=1000)
    fundamental = setting.eeh.assert_reset
    setting.eeh.assert_reset = lambda kind="hot": fundamental("hot")  # type: ignore[method-assign]
    with pytest.raises(errors.RecoveryFailed, match="the hardware or its firmware refused") as caught:
        setting.recover()
    error = caught.value
    assert error.step == OPERATIONS[op].replace("hot", "fundamental")
    assert error.errno == errno.EIO
    setting.backend.ioctl = real  # type: ignore[method-assign]
    assert error.state == setting.eeh.state.name
    if op == uapi.VFIO_EEH_PE_RESET_DEACTIVATE:
        assert error.remedy.startswith("it is held in reset: eeh.deassert_reset()")
    del setting.eeh.assert_reset
    assert setting.recover().recovered
    assert setting.moves()
    assert setting.interrupts(vector)
    assert setting.device.pci.command.bus_master


def test_a_thaw_that_fails_costs_the_log_only(setting: Setting) -> None:
    setting.freeze()
    fails(setting, uapi.VFIO_EEH_PE_UNFREEZE_IO, errno.EIO)
    assert setting.recover().recovered


def test_time_that_is_up_is_an_error_and_what_was_begun_can_be_ended(setting: Setting) -> None:
    setting.freeze()
    with pytest.raises(errors.RecoveryFailed, match=r"nothing happened for 1 s") as caught:
        setting.recover(timeout=1.0)
    assert caught.value.errno == errno.ETIMEDOUT
    assert caught.value.state == "NORMAL"
    assert "not restored" in caught.value.remedy
    assert not setting.device.pci.command.bus_master
    assert setting.recover().recovered
    assert setting.device.pci.command.bus_master
    assert setting.moves()


def test_an_interrupted_recovery_ends_the_reset(setting: Setting) -> None:
    class Impatient(MachineClock):
        def sleep(self, seconds: float) -> None:
            raise KeyboardInterrupt

    setting.freeze()
    log = eeh.Log(EDU, 1, 0.0)
    with pytest.raises(KeyboardInterrupt):
        eeh.recover(setting.device, clock=Impatient(setting.machine.clock), log=log)
    assert log.outcome == "reset hot: KeyboardInterrupt"
    assert log.after == setting.eeh.state.name == "NORMAL"
    assert setting.recover().recovered
    assert setting.moves()


def test_a_device_that_freezes_again_while_it_is_set_up_is_told(setting: Setting) -> None:
    class Careless(Recorder):
        def on_reset(self, device: vfio.Device) -> None:
            setting.freeze()

    setting.freeze()
    with pytest.raises(errors.RecoveryFailed, match=r"is frozen: its state is STOPPED") as caught:
        setting.recover(Careless([]))
    assert (caught.value.step, caught.value.state) == ("start", "STOPPED")
    assert "nothing gets through" in caught.value.remedy
    assert setting.recover().recovered


def test_data_that_comes_back_changed_fails_the_exercise(setting: Setting) -> None:
    class Liar(Edu):
        def load(self, iova: int, length: int, *, interrupt: bool = False, timeout: float = 5.0) -> None:
            super().load(iova, max(length - 1, 1))

    liar = Liar(setting.device)
    setting.freeze()
    setting.dma[:4096] = bytes(range(256)) * 16
    with pytest.raises(errors.RecoveryFailed, match="bytes came back changed") as caught:
        setting.recover(engine=liar)
    assert caught.value.step == "exercise"
    assert setting.recover(engine=setting.edu).recovered


def test_a_device_that_the_host_has_given_up_is_not_touched() -> None:
    backend = vfio.open_backend("fake:power9")
    assert isinstance(backend, FakeBackend)
    assign.bind([EDU], backend=backend)
    setting = Setting(backend)
    watch = eeh.Watch(setting.device, clock=setting.clock)
    setting.machine.eeh.fail(EDU)
    setting.machine.clock.advance(0.1)
    notices = [watch.wait(0.5), watch.wait(0.5)]
    assert [notice.how for notice in notices if notice] == ["REQ"]
    before = setting.machine.hooks.calls["VFIO_EEH_PE_OP"]
    with pytest.raises(errors.RecoveryFailed, match=r"given PHB#1-PE#fd .* up after too many failures") as caught:
        setting.recover()
    assert "echo 1 > /sys/bus/pci/rescan" in caught.value.remedy
    assert setting.machine.hooks.calls["VFIO_EEH_PE_OP"] - before <= 2  # it only looked
    with pytest.raises(errors.Harmful, match="cannot begin a hot reset"):
        setting.eeh.assert_reset()
    watch.close()
    setting.device.close()
    assert not backend.exists(f"/sys/bus/pci/devices/{EDU}")


def test_a_parent_that_the_host_recovers_is_waited_for(setting: Setting) -> None:
    above = setting.machine.eeh.of(BRIDGE)
    above.recovering = True
    assert setting.eeh.state is eeh.State.UNAVAIL
    setting.machine.clock.after(3.0, lambda: setattr(above, "recovering", False))
    log = setting.recover()
    assert log.recovered
    assert "waited for the host to recover the PE above" in log.steps[0].detail
    assert 3.0 <= log.steps[0].seconds < 4.0
    above.recovering = True
    with pytest.raises(errors.RecoveryFailed, match="UNAVAIL") as caught:
        setting.recover(timeout=2.0)
    assert (caught.value.errno, caught.value.state, caught.value.step) == (errno.ETIMEDOUT, "UNAVAIL", "confirm")
    above.recovering = False


def test_threads_recover_one_after_the_other(setting: Setting) -> None:
    setting.freeze()
    logs: list[eeh.Log] = []
    threads = [threading.Thread(target=lambda: logs.append(setting.recover())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(log.outcome for log in logs) == ["not frozen"] * 3 + ["recovered"]
    assert setting.moves()


def test_every_step_is_logged_with_its_time(setting: Setting, caplog: pytest.LogCaptureFixture) -> None:
    setting.freeze()
    with caplog.at_level(logging.INFO, "vfio.eeh"):
        log = setting.recover(Recorder([]), engine=setting.edu)
    names = [step.name for step in log.steps]
    assert names == [
        "confirm", "stop", "thaw", "collect", "count", "reset hot", "configure", "restore", "verify", "start",
        "exercise", "resume", "confirm",
    ]  # fmt: skip
    told = [record.getMessage() for record in caplog.records]
    for step in log.steps:
        assert f"PHB#1-PE#fd ({EDU}): {step.name}, {step.seconds:.3f} s: {step.detail}" in told
    assert log.steps[5].seconds == pytest.approx(5.15)
    assert log.seconds == pytest.approx(sum(step.seconds for step in log.steps))


def test_freezes_under_load_lose_no_data(anywhere: Setting) -> None:
    """Transfers are on their way when the PE freezes, and end in time-outs."""
    load = EduLoad(anywhere.device, anywhere.dma)
    try:
        for n in range(20):
            load.wait_for(2)
            anywhere.freeze(("mmio", "dma", "both")[n % 3])
            assert anywhere.recover(load, limit=1000).recovered
            load.wait_for(2)
    finally:
        load.close()
    assert load.wrong == []
    assert load.calls == ["error", "reset", "resume"] * 20


def test_a_thousand_freezes_under_load_lose_nothing_of_a_disk() -> None:
    """A PE freezes while the eight writes of a round are issued; they are issued again, and read back."""
    backend = vfio.open_backend("fake:power9")
    assert isinstance(backend, FakeBackend)
    clock, rng = MachineClock(backend.machine.clock), random.Random(1)
    with assign.bound([DISK], backend=backend), vfio.open_device(DISK, backend) as device, Nvme(device) as disk:
        with vfio.DmaBuffer(1 << 15, backend=backend) as buffer, disk.map(buffer) as dma:
            for n in range(1000):
                data = rng.randbytes(1 << 15)
                dma[: len(data)] = data
                frozen_at = rng.randrange(8)
                commands = []
                for i in range(8):
                    if i == frozen_at:
                        backend.machine.eeh.freeze(DISK, ("mmio", "dma", "both")[n % 3])
                    commands.append(disk.start_write(i * 8, 8, dma, i * 4096))
                log = eeh.recover(device, disk, limit=1000, clock=clock)
                assert log.recovered
                disk.wait(*commands)
                assert disk.read(0, 64) == data
    assert backend.leaks() == []
