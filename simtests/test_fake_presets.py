"""URLs of the modelled kernel: machines, options, and how a wrong one is refused."""

from __future__ import annotations

import errno

import pytest

import vfio
from vfio import errors, topology
from vfio.backend import open_backend
from vfio.fake.backend import FakeBackend
from vfio.iommu.spapr import Spapr


def opened(url: str) -> FakeBackend:
    backend = open_backend(url)
    assert isinstance(backend, FakeBackend)
    return backend


@pytest.mark.parametrize("name", topology.names())
def test_every_packaged_machine_boots(name):
    backend = opened(f"fake:{name}")
    described = topology.load(name)
    functions = [device for phb in described.phbs for device in phb.functions]
    assert sorted(backend.listdir("/sys/bus/pci/devices")) == sorted(device.address for device in functions)
    groups = {device.group for device in functions if device.group is not None}
    assert sorted(map(int, backend.listdir("/sys/kernel/iommu_groups"))) == sorted(groups)
    assert backend.leaks() == []
    assert backend.url == f"fake:{name}"


def test_what_a_url_does_not_say():
    backend = opened("fake:power8")
    assert (backend.page_size, backend.machine.kernel, backend.machine.strict) == (4096, (6, 12), True)
    assert backend.machine.freezes is True
    assert (backend.process.uid, backend.process.memlock, backend.process.ipc_lock) == (0, 8 << 20, True)


def test_every_option():
    backend = opened("fake:power9?page_size=65536&kernel=7.2&strict=0&freeze=0&uid=1000&memlock=65536&ipc_lock=1")
    assert (backend.page_size, backend.machine.kernel, backend.machine.strict) == (65536, (7, 2), False)
    assert backend.machine.freezes is False
    assert (backend.process.uid, backend.process.memlock, backend.process.ipc_lock) == (1000, 65536, True)


def test_memlock_may_be_unlimited():
    assert opened("fake:power8?memlock=unlimited").process.memlock is None


def test_only_root_may_lock_without_limit_unless_it_is_said():
    assert opened("fake:power8?uid=1000").process.ipc_lock is False
    assert opened("fake:power8?uid=0&ipc_lock=0").process.ipc_lock is False


def test_machines_are_separate():
    one, other = opened("fake:power8"), opened("fake:power8")
    one.write_text("/sys/bus/pci/devices/0000:01:00.0/driver_override", "x")
    assert other.read_text("/sys/bus/pci/devices/0000:01:00.0/driver_override") == "(null)\n"


def test_the_topology_says_page_size_and_kernel_and_the_url_overrides_it():
    backend = opened("fake:example")
    assert (backend.page_size, backend.machine.kernel) == (65536, (6, 12))
    assert backend.read_text("/proc/sys/kernel/osrelease") == "6.12.38+deb13-powerpc64le-64k\n"
    assert opened("fake:example?page_size=4096").page_size == 4096


SMALLEST = topology.__doc__.partition("::\n\n")[2].partition("Sizes and addresses")[0]


def test_a_file_is_a_machine(tmp_path, monkeypatch):
    """The one in the description of the format."""
    file = tmp_path / "my host.toml"
    file.write_text(SMALLEST)
    for url in (f"fake:{file}", f"fake:{str(file).replace(' ', '%20')}?kernel=7.2"):
        assert opened(url).listdir("/sys/bus/pci/devices") == ["0000:00:00.0"]
    monkeypatch.chdir(tmp_path)
    assert opened("fake:my host.toml").listdir("/sys/bus/pci/devices") == ["0000:00:00.0"]


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("fake:", "no topology ''; there are document, example, noiommu, p4080, power10"),
        ("fake:power6", "no topology 'power6'; there are document, example, noiommu, p4080, power10"),
        ("fake:../power8", "../power8: cannot be read"),
        ("fake:nowhere.toml", "nowhere.toml: cannot be read"),
        (
            "fake:power8?",
            "no option ''; there are page_size, kernel, strict, freeze, pamu_errno, uid, memlock, ipc_lock",
        ),
        ("fake:power8?pagesize=4096", "no option 'pagesize'; there are page_size"),
        ("fake:power8?page_size", "page_size: page_size is one of 4096, 65536"),
        ("fake:power8?page_size=64K", "page_size=64K: page_size is one of 4096, 65536"),
        ("fake:power8?kernel=6.1", "kernel=6.1: kernel is one of 6.12, 7.2"),
        ("fake:power8?strict=yes", "strict=yes: strict is one of 0, 1"),
        ("fake:power8?uid=root", "uid=root: uid is a number, 0 to 4294967294"),
        ("fake:power8?uid=-1", "uid=-1: uid is a number"),
        ("fake:power8?uid=4294967295", "uid=4294967295: uid is a number"),
        ("fake:power8?memlock=1M", "memlock=1M: memlock is a number of bytes, or unlimited"),
        ("fake:power8?memlock=99999999999999999999999", "memlock is a number of bytes, or unlimited"),
        ("fake:power8?kernel=7.2&kernel=6.12", "kernel is said twice"),
        ("fake:power8?kernel=7.2&", "no option ''"),
        ("fake:\0.toml", "cannot be read"),
    ],
)
def test_a_wrong_url_tells_what_there_is(url, why):
    with pytest.raises(errors.NoSuchBackend) as raised:
        open_backend(url)
    assert raised.value.errno == errno.EINVAL
    assert why in raised.value.why
    assert "power8" in raised.value.remedy


def test_a_topology_that_breaks_a_rule_tells_its_line(tmp_path):
    file = tmp_path / "host.toml"
    file.write_text(SMALLEST.replace("levels = 5", "levels = 6"))
    line = next(n for n, text in enumerate(SMALLEST.splitlines(), 1) if "levels" in text)
    with pytest.raises(errors.NoSuchBackend, match=f"host.toml:{line}: iommu.levels: 0x6 is not in 0x1..0x5"):
        open_backend(f"fake:{file}")


def test_a_device_that_nobody_models_is_a_plain_endpoint(tmp_path):
    file = tmp_path / "host.toml"
    file.write_text(SMALLEST.replace('"edu"', '"some-card"'))
    assert opened(f"fake:{file}").read_text("/sys/bus/pci/devices/0000:00:00.0/vendor") == "0x1234\n"


def test_a_model_of_ones_own_that_cannot_be_loaded_is_named(tmp_path):
    file = tmp_path / "host.toml"
    file.write_text(SMALLEST.replace('"edu"', '"no_such_module:Card"'))
    with pytest.raises(errors.NoSuchBackend, match=r"0000:00:00\.0: device 'no_such_module:Card' cannot be loaded"):
        open_backend(f"fake:{file}")


# --- POWER7 ---


@pytest.fixture
def power7() -> FakeBackend:
    backend = opened("fake:power7")
    for address in ("0000:03:00.0", "0000:04:00.0"):
        backend.write_text(f"/sys/bus/pci/devices/{address}/driver_override", "vfio-pci")
        backend.write_text("/sys/bus/pci/drivers_probe", address)
    return backend


@pytest.mark.parametrize(("address", "start"), [("0000:03:00.0", 0), ("0000:04:00.0", 1 << 30)])
def test_power7_has_a_fixed_window_a_pe(power7, address, start):
    with vfio.open_device(address, backend=power7) as device:
        iommu = device.iommu
        assert isinstance(iommu, Spapr)
        assert (iommu.info.window_start, iommu.info.window_size) == (start, 1 << 30)
        assert iommu.name == vfio.SpaprTce.name


def test_power7_refuses_version_2(power7):
    with vfio.Container(power7) as container, vfio.Group(0, power7) as group:
        container.attach(group)
        with pytest.raises(OSError, match="EINVAL"):
            container.set_iommu(vfio.SpaprTceV2)
        container.set_iommu(vfio.SpaprTce)


def test_power7_takes_one_group_a_container(power7):
    with vfio.Container(power7) as container, vfio.Group(0, power7) as one, vfio.Group(1, power7) as other:
        container.attach(one)
        container.set_iommu(vfio.SpaprTce)
        with pytest.raises(OSError, match="EBUSY"):
            container.attach(other)
