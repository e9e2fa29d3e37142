"""Capturing a host as a topology: the model shows what the host showed."""

from __future__ import annotations

import errno
import os

import pytest
from fake_host import Function, Host, power_host

from vfio import errors, sysfs, topology, usage
from vfio.backend import open_backend
from vfio.backends.kernel import KernelBackend
from vfio.fake.backend import FakeBackend
from vfio.fake.capture import capture
from vfio.fake.machine import Machine
from vfio.fake.process import Process

NAMES = topology.names()


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


def test_capturing_needs_no_privilege_and_opens_nothing():
    host = power_host()
    host.process.uid = 4321
    asked = []
    opener, host.open = host.open, lambda path, flags: asked.append(path) or opener(path, flags)
    capture(host)
    assert asked == []
    assert host.changes == []


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
