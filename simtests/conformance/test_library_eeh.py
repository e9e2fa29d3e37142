"""EEH in the library: states, recovery of a PE that is frozen for real, watching."""

import errno
from functools import partial

import pytest

import vfio
from simtests.conformance import eeh_clock
from simtests.conformance.edu_load import EduLoad
from simtests.conformance.freezing import EEH_HOSTS, FREEZABLE
from vfio import eeh, errors
from vfio.drivers.edu import Edu
from vfio.eeh import host

pytestmark = [
    pytest.mark.power,
    pytest.mark.lab_only,
    pytest.mark.not_recorded("what a device does while it is reset depends on the time"),
]
freezable = pytest.mark.targets(*FREEZABLE)
has_eeh = pytest.mark.targets(*EEH_HOSTS)


@pytest.fixture
def clock(backend):
    return eeh_clock.of(backend)


@pytest.fixture
def one(device):
    """EEH of the device's container."""
    return eeh.of(device)


@pytest.fixture
def recover(device, clock):
    """Recovers the device; freezes are counted for each case alone."""
    return partial(eeh.recover, device, clock=clock, freezes=eeh.Freezes())


@pytest.fixture
def dma(device, backend):
    buffer = vfio.DmaBuffer(1 << 16, backend=backend)
    with device.iommu.map(buffer) as dma:
        yield dma


def moves(edu, dma, data=b"some data to be moved"):
    """Whether data gets into the device and out of it."""
    dma[: len(data)] = data
    edu.load(dma.iova, len(data))
    edu.store(dma.iova + 4096, len(data))
    return dma[4096 : 4096 + len(data)] == data


def interrupts(edu, vector):
    vector.take()
    edu.interrupt()
    fired = vector.wait(2)
    edu.acknowledge()
    return fired == 1


@freezable
def test_a_frozen_device_moves_data_and_interrupts_again(device, edu_driver, freezer, recover, dma):
    vector = device.msi.enable()
    freezer(device.address)
    log = recover(engine=edu_driver)
    assert (log.outcome, log.before, log.after, log.reset) == ("recovered", "STOPPED", "NORMAL", "hot")
    assert log.restored == [f"{device.address} command 0x0102 -> 0x0106", f"MSI of {device.address}: 1 eventfds"]
    assert log.devices[0].config == log.devices[0].after
    assert moves(edu_driver, dma)
    assert interrupts(edu_driver, vector)
    assert recover().outcome == "not frozen"


@freezable
@pytest.mark.parametrize("what", ["mmio", "dma", "both"])
def test_a_fundamental_reset_recovers_from_every_kind_of_freeze(device, edu_driver, freezer, recover, dma, what):
    freezer(device.address, what)
    assert recover(engine=edu_driver, reset="fundamental").recovered
    assert eeh.status(device.backend, device.address).noted == eeh.state.Noted.PRI_BUS
    assert moves(edu_driver, dma)


@freezable
def test_a_freeze_under_load_loses_no_data(device, freezer, recover, dma):
    load = EduLoad(device, dma, patience=2.0)
    try:
        for n in range(3):
            load.wait_for(2)
            freezer(device.address)
            load.wait_for(1)  # the emulated device goes on while it is frozen
            assert recover(load, reset="fundamental").recovered
            assert load.calls == ["error", "reset", "resume"] * (n + 1)
            load.wait_for(2)
    finally:
        load.close()
    assert load.wrong == []


@freezable
def test_intx_comes_again_after_a_reset(device, edu_driver, freezer, recover):
    vector = device.intx.enable()
    edu_driver.interrupt()
    assert vector.wait(2) == 1
    freezer(device.address)
    assert recover(reset="fundamental").recovered
    edu_driver.acknowledge()  # QEMU's edu keeps its line up through a reset
    device.intx.unmask()
    assert interrupts(edu_driver, vector)


@freezable
def test_a_freeze_too_many_leaves_the_pe_frozen_and_says_so(device, edu_driver, freezer, recover, one, dma):
    freezer(device.address)
    with pytest.raises(errors.TooManyFreezes) as caught:
        recover(limit=0)
    assert (caught.value.count, caught.value.limit, caught.value.state) == (1, 0, "STOPPED_DMA")
    assert one.state is eeh.State.STOPPED_DMA
    assert caught.value.log.devices[0].identity == "1234:11e8"
    assert recover(reset="fundamental").recovered
    assert moves(edu_driver, dma)


@freezable
def test_a_driver_that_fails_leaves_a_pe_that_can_be_recovered_again(device, edu_driver, freezer, recover, one, dma):
    class Broken:
        def on_reset(self, device):
            raise ValueError("it is not what it was")

    vector = device.msi.enable()
    freezer(device.address)
    with pytest.raises(errors.RecoveryFailed, match="it is not what it was") as caught:
        recover(Broken(), reset="fundamental")
    assert (caught.value.step, caught.value.state) == ("start", "NORMAL")
    assert recover(reset="fundamental").recovered
    assert moves(edu_driver, dma)
    assert interrupts(edu_driver, vector)


@has_eeh
def test_a_reset_that_somebody_left_asserted_is_ended(device, edu_driver, recover, one, dma):
    one.assert_reset("fundamental")  # STOPPED; but NORMAL where the PHB, as QEMU's of a POWER8, cannot be frozen
    with pytest.raises(errors.CallFailed) as caught:
        device.config.read32(4)
    assert caught.value.errno == errno.ENODEV
    log = recover(reset="fundamental")
    assert log.recovered
    assert log.devices[0].config == ""
    device.enable_bus_master()  # nobody knew that it was on
    assert moves(edu_driver, dma)


@has_eeh
def test_operations_on_a_pe_that_works(device, one, clock):
    assert one.available
    one.enable()
    one.disable()
    one.configure()
    one.unfreeze_io()
    one.unfreeze_dma()
    assert one.answer() == (eeh.State.NORMAL, None, None)
    one.check_state()
    assert one.check(0xFFFF_FFFF) == 0xFFFF_FFFF
    one.reset("fundamental", clock=clock)
    assert one.state is eeh.State.NORMAL


@has_eeh
def test_injection_that_the_firmware_takes_and_refuses(one):
    one.inject(eeh.ErrorFunction.ST_CFG_DATA)
    for function, number in ((eeh.ErrorFunction.LD_IO_ADDR, errno.EIO), (20, errno.EINVAL)):
        with pytest.raises(errors.CallFailed, match="cannot inject") as caught:
            one.inject(function)
        assert caught.value.errno == number


@freezable
def test_operations_on_a_frozen_pe(device, freezer, one):
    address = device.address
    freezer(address)
    with pytest.raises(errors.PeFrozen, match="its state is STOPPED"):
        one.check(0xFFFF_FFFF)
    one.unfreeze_io()
    assert one.answer().pe == eeh.status(device.backend, address)
    assert one.answer().pe.words == "DMA is frozen, MMIO works"
    one.unfreeze_dma()
    assert one.state is eeh.State.NORMAL
    freezer(address)
    one.unfreeze_dma()
    assert one.state is eeh.State.UNAVAIL
    assert eeh.status(device.backend, address).half_frozen
    one.enable()
    assert one.state is eeh.State.NORMAL


@freezable
@pytest.mark.parametrize("frozen", [0, 1])
def test_in_a_container_of_two_groups_the_frozen_pe_is_named_and_both_devices_are_restored(
    backend, two_edus, freezer, clock, frozen
):
    numbers = [vfio.sysfs.group_of(backend, address) for address in two_edus]
    with vfio.Container(backend) as container:
        with vfio.Group(numbers[0], backend) as first, vfio.Group(numbers[1], backend) as second:
            container.attach(first)
            container.attach(second)
            container.choose_iommu()
            devices = [first.device(two_edus[0]), second.device(two_edus[1])]
            edus = [Edu(device) for device in devices]
            freezer(two_edus[frozen])
            found = container.eeh.answer()
            assert (found.state, found.group) == (eeh.State.STOPPED, numbers[frozen])
            log = eeh.recover(devices[frozen], reset="fundamental", clock=clock, freezes=eeh.Freezes())
            assert log.recovered
            assert [each.address for each in log.devices] == two_edus
            for device, edu in zip(devices, edus, strict=True):
                assert device.pci.command.bus_master
                assert edu.invert(1) == 0xFFFF_FFFE
                device.close()


@freezable
def test_a_watch_notices_a_freeze(device, freezer, clock, recover):
    with eeh.Watch(device, poll=0.1, clock=clock) as watch:
        assert watch.wait(0.3) is None
        freezer(device.address)
        notice = watch.wait(5)
        assert (notice.how, notice.state, notice.group) == ("poll", eeh.State.STOPPED, device.group.number)
        assert watch.wait(0.3) is None
        assert recover(reset="fundamental", noticed=str(notice)).noticed.endswith("the state is STOPPED")
        assert watch.wait(0.3) is None
        freezer(device.address, "dma")
        assert watch.check(0xFFFF_FFFF)
        assert str(watch.wait(1)) == f"{device.address}: a register read all ones, the state is STOPPED_DMA"
        eeh.of(device).enable()


@freezable
def test_a_pe_that_nobody_has_open_is_recovered_through_its_group(backend, member, freezer, clock):
    freezer(member.address)
    with vfio.Container(backend) as container, vfio.Group(member.group, backend) as group:
        container.attach(group)
        container.choose_iommu()
        log = eeh.recover_idle(container, member.address, reset="fundamental", freezes=eeh.Freezes(), clock=clock)
        assert (log.recovered, log.before, log.after) == (True, "STOPPED", "NORMAL")
        assert log.devices[0].identity == "1234:11e8"
        assert eeh.recover_idle(container, member.address, clock=clock).outcome == "not frozen"
    with vfio.open_device(member.address, backend) as device:
        assert Edu(device).invert(1) == 0xFFFF_FFFE


@freezable
def test_following_the_host_shows_the_state_of_a_pe_in_use_and_the_log_of_others(backend, two_edus, freezer, clock):
    used, idle = two_edus
    with vfio.open_device(used, backend) as device, host.HostWatch(backend, clock=clock) as watch:
        told = watch.look()
        freezer(used)
        told += watch.look()
        eeh.recover(device, reset="fundamental", clock=clock, freezes=eeh.Freezes())
        told += watch.look()
        freezer(idle)
        freezer.check(idle)

        def recovered():
            told.extend(watch.look())
            return any(event.text == "EEH: Recovery successful." for event in told)

        freezer.until(recovered)
        states = [event.text for event in told if event.kind == "state"]
        name = eeh.status(backend, used).name
        assert states[0].startswith(f"{name} STOPPED: MMIO and DMA are frozen; held by pid ")
        assert states[-1].startswith(f"{name} NORMAL: ")
    lines = [event for event in told if event.kind == "log"]
    assert {event.address for event in lines} == {idle}
    assert f"EEH: Frozen {eeh.status(backend, idle).name} detected" in [event.text for event in lines]
    assert "EEH: Recovery successful." in host.said(backend, idle)


@pytest.mark.targets("pseries")
def test_a_guest_has_no_eeh(device, one):
    assert not one.available
    for call in (one.enable, one.reset, lambda: one.state, lambda: eeh.recover(device), lambda: eeh.Watch(device)):
        with pytest.raises(errors.NoEeh) as caught:
            call()
        assert caught.value.errno == errno.ENODEV
    for call in (lambda: eeh.status(device.backend, device.address), lambda: host.HostWatch(device.backend)):
        with pytest.raises(errors.NoEeh, match="EEH for no device"):
            call()
