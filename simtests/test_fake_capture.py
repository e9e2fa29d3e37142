"""Capturing a host as a topology: the model shows what the host showed."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
from fake_host import Function, Host, power_host

import vfio
from vfio import errors, sysfs, topology, uapi, usage
from vfio.backend import open_backend
from vfio.backends.kernel import KernelBackend
from vfio.fake.backend import FakeBackend
from vfio.fake.capture import capture
from vfio.fake.devices import make_model
from vfio.fake.machine import Machine
from vfio.fake.process import Process

NAMES = [name for name in topology.names() if topology.load(name).platform.name in ("PowerNV", "pSeries")]
"""What can be captured: hosts with a POWER processor of the server kind."""


def again(backend: FakeBackend) -> FakeBackend:
    """The model of what was captured."""
    described = topology.parse(capture(backend).toml, "captured.toml")
    machine = Machine(described, page_size=described.platform.page_size)
    return FakeBackend(machine, Process(machine))


def shown(backend: FakeBackend) -> object:
    """All that the library tells of a host without opening anything."""
    devices = sysfs.devices(backend)
    groups = {number: sysfs.blockers(backend, number) for number in sysfs.groups(backend)}
    eeh = {device.address: sysfs.eeh(backend, device.address) for device in devices}
    return devices, groups, eeh, usage.interfaces(backend), usage.disks(backend)


@pytest.mark.parametrize("name", NAMES)
def test_a_captured_machine_shows_the_same(name):
    backend = open_backend(f"fake:{name}")
    copy = again(backend)
    assert shown(copy) == shown(backend)
    assert copy.page_size == backend.page_size
    for path in ("/proc/sys/kernel/osrelease", "/proc/cpuinfo"):
        assert copy.read_text(path) == backend.read_text(path)


@pytest.mark.parametrize("name", NAMES)
def test_capturing_twice_gives_the_same_text(name):
    first = capture(open_backend(f"fake:{name}")).toml
    machine = Machine(topology.parse(first), page_size=topology.parse(first).platform.page_size)
    assert capture(FakeBackend(machine, Process(machine))).toml == first


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"power7", "example"}))
def test_windows_are_those_of_the_platform(name):
    assert topology.parse(capture(open_backend(f"fake:{name}")).toml).iommu == topology.load(name).iommu


def test_power7_is_captured_without_dynamic_windows():
    assert topology.parse(capture(open_backend("fake:power7")).toml).iommu == topology.load("power7").iommu


def test_bound_devices_and_waiting_overrides_are_captured():
    host = power_host()
    host.move("0001:01:00.0", "vfio-pci", override="nvme")
    copy = again(host)
    device = sysfs.device(copy, "0001:01:00.0")
    assert (device.driver, device.driver_override, device.vfio_dev) == ("vfio-pci", "nvme", "vfio0")
    assert copy.exists("/dev/vfio/2")
    assert shown(copy) == shown(host)


def test_a_variant_driver_is_captured_as_one():
    host = Host(Function("0000:00:01.0", "mlx5_vfio", group=1), drivers=(topology.Driver("mlx5_vfio", vfio=True),))
    copy = again(host)
    assert sysfs.device(copy, "0000:00:01.0").on_vfio
    assert shown(copy) == shown(host)


def test_of_two_alike_devices_the_free_one_stays_free():
    host = Host(Function("0000:00:01.0", "tg3", group=1), Function("0000:00:02.0", group=2))
    copy = again(host)
    assert [device.driver for device in sysfs.devices(copy)] == ["tg3", None]


def test_names_of_any_kind_survive():
    host = power_host()
    host.disk("nvme0n1", "0001:01:00.0", "259:0", mounted=('/mnt/"my" disk\\x', "/a\x7fb", "/ü\t🦉"))
    host.host.release = '6.12.0-"odd"'
    copy = again(host)
    assert usage.disks(copy) == usage.disks(host)
    assert sysfs.kernel_release(copy) == '6.12.0-"odd"'


def test_domains_beyond_four_digits_are_captured():
    host = Host(Function("10000:00:00.0", group=3), Function("0001:00:00.0"))
    assert shown(again(host)) == shown(host)


def test_capturing_needs_no_privilege_and_opens_nothing_but_configuration_space():
    host = power_host()
    host.process.uid = 4321
    asked = []
    opener, host.open = host.open, lambda path, flags: asked.append(path) or opener(path, flags)
    capture(host)
    assert all(re.fullmatch("/sys/bus/pci/devices/[^/]+/config", path) for path in asked)
    assert host.changes == []


def regions(backend: FakeBackend, address: str) -> list[tuple[int, int, bytes]]:
    """What a user is told of the regions of a device, which is on vfio-pci for as long."""
    with assigned(backend, address) as device:
        found = []
        for index in range(8):
            info = uapi.vfio_region_info.sized(40, index=index)
            data = uapi.buffer(info)
            backend.ioctl(device.fd, uapi.VFIO_DEVICE_GET_REGION_INFO, data)
            found.append((info.size, info.flags, bytes(data[32:])))
        return found


@contextmanager
def assigned(backend: FakeBackend, address: str) -> Iterator[vfio.Device]:
    backend.machine.driver_core.drivers["vfio-pci"].dynamic_ids.clear()
    with suppress(OSError):
        backend.write_text(sysfs.path(address, "driver/unbind"), address)
    backend.write_text(sysfs.path(address, "driver_override"), "vfio-pci")
    backend.write_text("/sys/bus/pci/drivers_probe", address)
    with vfio.open_device(address, backend) as device:
        yield device


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("power8", "0000:01:00.0"),
        ("power8", "0002:01:00.0"),
        ("power9?page_size=65536", "0002:01:00.0"),
        ("pseries", "0001:00:00.0"),
        ("siblings", "0000:01:00.1"),
        ("siblings", "0002:01:00.0"),
    ],
)
def test_regions_of_a_captured_device_are_those_of_the_host(name, address):
    backend = open_backend(f"fake:{name}")
    copy = again(backend)
    assert regions(copy, address) == regions(backend, address)
    path = sysfs.path(address, "resource")
    assert copy.read_text(path) == backend.read_text(path)


def a_card() -> Host:
    """A host with a card as network cards are: registers and MSI-X in two BARs, I/O ports, an expansion ROM."""
    host = Host(Function("0000:01:00.0", group=1, id=(0x15B3, 0x1017)))
    bars = (
        topology.Bar(0, 1 << 24, bits64=True, prefetchable=True),
        topology.Bar(2, 1 << 16),
        topology.Bar(4, 1 << 25, bits64=True),
    )
    phb = host.machine.topology.phbs[0]
    card = replace(phb.devices[0], bars=bars, msix=topology.Msix(64, 2, 0x8000, 0xC000), rom=1 << 17)
    described = replace(host.machine.topology, phbs=(replace(phb, devices=(card,)),))
    machine = Machine(described)
    return FakeBackend(machine, Process(machine))  # type: ignore[return-value]


def test_bars_of_any_card_are_captured():
    host = a_card()
    assert again(host).machine.topology.devices[0].bars == host.machine.topology.devices[0].bars
    found = regions(again(host), "0000:01:00.0")
    assert [size for size, _, _ in found] == [1 << 24, 0, 1 << 16, 0, 1 << 25, 0, 1 << 17, 4096]
    assert [flags for _, flags, _ in found] == [7, 0, 15, 0, 7, 0, 1, 3]


def test_msix_table_is_captured_by_root():
    with assigned(again(a_card()), "0000:01:00.0") as device:
        assert device.msix.count == 64
        config = device.config
        at = next(at for at in range(0x40, 0x100, 4) if config.read8(at) == 0x11 and config.read16(at + 2) == 63)
        assert (config.read32(at + 4), config.read32(at + 8)) == (0x8002, 0xC002)


def test_user_captures_bars_and_is_told_that_only_root_captures_msix_tables():
    host = a_card()
    host.process.uid = 4321
    captured = capture(host)
    (card,) = topology.parse(captured.toml).devices
    assert (card.bars, card.rom, card.msix) == (host.machine.topology.devices[0].bars, 1 << 17, None)
    (note,) = captured.notes
    assert "capture as root" in note


def test_model_keeps_its_own_msix_table_where_it_fits_the_bars_that_are_said():
    card = replace(topology.load("example").device("0000:01:00.1"), bars=(topology.Bar(0, 1 << 20),))
    assert make_model(card).vectors == 8
    assert make_model(replace(card, bars=(topology.Bar(0, 1 << 12),))).vectors == 0
    assert make_model(replace(card, bars=())).vectors == 0
    assert make_model(replace(card, msix=topology.Msix(0))).vectors == 0


def test_a_host_without_groups_is_captured_with_a_note():
    captured = capture(Host(Function("0000:00:01.0")))
    assert captured.notes == ["no device of this host is in an IOMMU group: none can be assigned, here or on the model"]
    assert sysfs.devices(again(Host(Function("0000:00:01.0"))))[0].group is None


@pytest.mark.skipif(os.path.exists("/proc/powerpc"), reason="this is POWER, which can be captured")
def test_this_host_is_refused_for_not_being_power():
    with pytest.raises(errors.CallFailed) as raised:
        capture(KernelBackend())
    assert raised.value.errno == errno.ENODEV
    assert "it is not POWER" in raised.value.why
    assert "fake:power9" in raised.value.remedy


def test_a_host_without_pci_is_refused():
    with pytest.raises(errors.CallFailed, match="it has no PCI devices"):
        capture(Host())


def test_an_unknown_platform_is_refused():
    host = power_host()
    reader = host.read_text
    host.read_text = lambda path: reader(path).replace("PowerNV", "CHRP")  # type: ignore[method-assign]
    with pytest.raises(errors.CallFailed, match="its platform is CHRP; the modelled kernel has PowerNV and pSeries"):
        capture(host)


def test_a_p4080_is_not_captured():
    with pytest.raises(
        errors.CallFailed, match="its platform is P4080 DS; the modelled kernel has PowerNV and pSeries"
    ):
        capture(open_backend("fake:p4080"))
