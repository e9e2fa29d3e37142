"""EEH in the library: the operations of a container, and the states that sysfs shows."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from eeh_setting import EDU, Setting, anywhere, setting

import vfio
from vfio import assign, eeh, errors, uapi
from vfio.eeh import host

__all__ = ["anywhere", "setting"]  # fixtures, found here by name


def test_states_and_operations_have_their_kernel_names() -> None:
    prefix = "VFIO_EEH_PE_STATE_"
    kernel = {name.removeprefix(prefix): getattr(uapi, name) for name in dir(uapi) if name.startswith(prefix)}
    assert {state.name: state.value for state in eeh.State} == kernel
    assert [function.value for function in eeh.ErrorFunction] == list(range(20))


def test_operations_one_by_one(anywhere: Setting) -> None:
    one = anywhere.eeh
    assert one.available
    one.disable()
    one.configure()
    one.deassert_reset()
    assert one.state is eeh.State.NORMAL
    anywhere.device.enable_bus_master()
    anywhere.freeze()
    one.unfreeze_io()
    assert one.state is eeh.State.STOPPED_DMA
    one.unfreeze_dma()
    assert one.state is eeh.State.NORMAL
    assert anywhere.moves()
    anywhere.freeze()
    one.unfreeze_dma()
    assert one.state is eeh.State.UNAVAIL
    one.enable()
    assert one.state is eeh.State.NORMAL
    with one.held_in_reset("fundamental"):
        assert one.state is eeh.State.STOPPED
        with pytest.raises(OSError, match="held in EEH reset") as caught:
            anywhere.device.config.read32(4)
        assert caught.value.errno == errno.ENODEV
    assert one.state is eeh.State.NORMAL
    one.reset("hot", clock=anywhere.clock)
    assert not anywhere.device.pci.command.bus_master


def test_a_reset_is_ended_when_its_body_fails(setting: Setting) -> None:
    with pytest.raises(ZeroDivisionError), setting.eeh.held_in_reset():
        raise ZeroDivisionError
    assert setting.eeh.state is eeh.State.NORMAL
    assert setting.device.pci.vendor == 0x1234


def test_an_injected_error_freezes_at_the_next_access(setting: Setting) -> None:
    setting.eeh.inject(eeh.ErrorFunction.LD_CFG_ADDR)
    assert setting.eeh.state is eeh.State.NORMAL
    setting.device.config.read32(8)
    assert setting.eeh.state is eeh.State.STOPPED
    assert setting.recover().recovered


def test_an_injection_that_the_hardware_refuses_is_told(setting: Setting) -> None:
    for call, number in (
        (lambda: setting.eeh.inject(eeh.ErrorFunction.LD_IO_ADDR), errno.EIO),
        (lambda: setting.eeh.inject(20), errno.EINVAL),
    ):
        with pytest.raises(errors.CallFailed, match="cannot inject") as caught:
            call()
        assert caught.value.errno == number


def test_operations_without_an_iommu_or_a_group_say_what_is_missing(setting: Setting) -> None:
    setting.device.close()
    with vfio.Container(setting.backend) as container:
        with pytest.raises(errors.CallFailed, match="the container has no group"):
            container.eeh.enable()
        with vfio.Group(1, setting.backend) as group:
            container.attach(group)
            with pytest.raises(errors.CallFailed, match="the container has no IOMMU"):
                _ = container.eeh.state
            container.choose_iommu()
            assert container.eeh.state is eeh.State.NORMAL
    with pytest.raises(errors.Closed):
        container.eeh.enable()


def test_a_state_that_nobody_knows_is_an_error(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setting.eeh, "_op", lambda op, what: 3)
    with pytest.raises(errors.UnexpectedAnswer, match="the kernel answered 3"):
        _ = setting.eeh.state


def test_a_guest_has_no_eeh() -> None:
    backend = vfio.open_backend("fake:pseries")
    address = next(iter(d.address for d in vfio.sysfs.devices(backend) if d.vendor == 0x1234))  # type: ignore[attr-defined]
    with assign.bound([address], backend=backend), vfio.open_device(address, backend) as device:
        one = eeh.of(device)
        assert not one.available
        calls: list[Callable[[], object]] = [
            one.enable, one.reset, one.configure, lambda: one.state, lambda: eeh.recover(device),
            lambda: eeh.Watch(device), lambda: eeh.status(backend, address), lambda: eeh.statuses(backend),
            lambda: host.HostWatch(backend),
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(errors.NoEeh, match="EEH for no device") as caught:
                call()
            assert caught.value.errno == errno.ENODEV


# --- sysfs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "state", "words"),
    [
        ("0x00000078 0x00000800", "NORMAL", "MMIO and DMA work"),
        ("0x00000000 0x00000801", "STOPPED", "MMIO and DMA are frozen"),
        ("0x00000028 0x00000801", "STOPPED_DMA", "DMA is frozen, MMIO works"),
        ("0x00000050 0x00000800", "UNAVAIL", "MMIO is frozen, DMA works"),
        ("0x00000000 0x00000805", "STOPPED", "MMIO and DMA are frozen; configuration space is blocked"),
        ("0x00000078 0x0000090f", "NORMAL", "the host is recovering it; configuration space is blocked"),
        (
            "0x00000028 0x00000c03",
            "STOPPED_DMA",
            "given up by the host after too many failures; DMA is frozen, MMIO works",
        ),
        (
            "0x00000078 0x00000801",
            "NORMAL",
            "MMIO and DMA work; the host still counts it as frozen, and would not notice a freeze",
        ),
        ("0x00000004 0x00000800", "RESET", "held in reset"),
        ("0x00000001 0x00000801", "STOPPED", "temporarily unavailable"),
        ("0x00000002 0x00000801", "STOPPED", "permanently unavailable"),
    ],
)
def test_the_bits_of_sysfs_are_said_in_words(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, files: str, state: str, words: str
) -> None:
    """As the lab's kernels showed them."""
    monkeypatch.setattr(
        "vfio.sysfs.eeh",
        lambda backend, address: {"eeh_mode": "0x200", "eeh_pe_config_addr": "0xfd", "eeh_pe_state": files},
    )
    found = eeh.status(setting.backend, EDU)
    assert (found.state.name, found.words, found.name) == (state, words, "PHB#1-PE#fd")


def test_files_that_nobody_understands_are_an_error(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"eeh_mode": "0x200", "eeh_pe_config_addr": "0xfd", "eeh_pe_state": "frozen"}
    monkeypatch.setattr("vfio.sysfs.eeh", lambda backend, address: files)
    with pytest.raises(errors.CallFailed, match="cannot understand the EEH files"):
        eeh.status(setting.backend, EDU)
