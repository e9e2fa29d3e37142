"""The fake's side of the conformance cases: a fresh machine of each preset for each case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

import vfio
from simtests.conformance.areas import Area
from simtests.conformance.fixtures import area, other_program, program, v1, v2
from simtests.conformance.processes import another_process
from simtests.conformance.raw import Member
from vfio.backend import open_backend
from vfio.fake.backend import FakeBackend
from vfio.fake.fault import BusError, SegmentationFault
from vfio.topology import Topology

__all__ = ["another_process", "area", "other_program", "program", "v1", "v2"]  # fixtures, found here by name

_TARGETS = {
    "power8": "powernv8",
    "power8?page_size=65536": "powernv8-64k",
    "power9": "powernv9",
    "pseries": "pseries",
    "power8?kernel=7.2": "powernv8",
}
"""Presets of the fake, and which target of the lab each is like."""
_FOR_SOME = {"siblings": "siblings"}
"""Those for the cases that name them alone."""


@dataclass(frozen=True)
class FakeTarget:
    """What a case runs on; the same properties as `hwtests.lab.targets.System`."""

    name: str  # of the lab's target that it is like
    url: str
    page_size: int  # bytes
    platform: str  # "PowerNV" or "pSeries"
    topology: Topology
    kernel: tuple[int, int]


def pytest_configure(config: pytest.Config) -> None:
    for mark in (
        "targets(name, ...): only where the machine is like one of these targets of the lab",
        "lab_only: hostile, or needs the emulated machine; never run on a real host",
        "needs_edu: drives QEMU's edu device",
        "leaks: leaves something held on purpose; the machine is not looked at afterwards",
        "not_recorded(reason): does what no transcript can hold",
        "spoils: leaves the machine changed until it boots again",
    ):
        config.addinivalue_line("markers", mark)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        marks = [set(mark.args) for mark in metafunc.definition.iter_markers("targets")]
        presets = _TARGETS | _FOR_SOME if marks else _TARGETS
        chosen = [preset for preset, like in presets.items() if all(like in names for names in marks)]
        metafunc.parametrize("target", chosen, indirect=True, ids=[f"fake:{preset}" for preset in chosen])


@pytest.fixture
def target(request: pytest.FixtureRequest) -> FakeTarget:
    """What the case runs on."""
    url = f"fake:{request.param}"
    machine = _open(url).machine
    return FakeTarget(
        (_TARGETS | _FOR_SOME)[request.param],
        url,
        machine.page_size,
        machine.topology.platform.name,
        machine.topology,
        machine.kernel,
    )


@pytest.fixture
def backend(target: FakeTarget, request: pytest.FixtureRequest) -> Iterator[FakeBackend]:
    """A machine of its own for each case, on which nothing is left when the case ends."""
    backend = _open(target.url)
    yield backend
    if request.node.get_closest_marker("leaks") is None:
        assert backend.leaks() == []


@pytest.fixture
def mixed(backend: FakeBackend, area: Callable[..., Area]) -> Callable[[int], int]:
    """Makes 32 MiB of which that half (0 or 1) is a huge page of 16 MiB and the other ordinary pages; the address."""
    half = 16 << 20

    def make(huge_half: int) -> int:
        address: int = area(2 * half // backend.page_size, half).address
        backend.process.memory.add_large(address + huge_half * half, half, half)
        return address

    return make


@pytest.fixture
def device_address(target: FakeTarget) -> str:
    """Address of the device to work with."""
    return next(device.address for device in target.topology.devices if device.model == "edu")


@pytest.fixture
def member(backend: FakeBackend, target: FakeTarget, device_address: str) -> Member:
    """The device to work with, on vfio-pci."""
    return _bound(backend, target, device_address)


@pytest.fixture
def second(backend: FakeBackend, target: FakeTarget, member: Member) -> Member:
    """A device of another group, on vfio-pci."""
    return _bound(backend, target, second_address(target.topology, member.group))


@pytest.fixture
def bound_address(member: Member) -> str:
    """Address of the device to work with, on vfio-pci."""
    return member.address


@pytest.fixture
def two_edus(backend: FakeBackend, target: FakeTarget) -> list[str]:
    """Addresses of two edus in groups of their own, on vfio-pci."""
    found = [device.address for device in target.topology.devices if device.model == "edu"][:2]
    return [_bound(backend, target, address).address for address in found]


@pytest.fixture
def load_driver(backend: FakeBackend) -> Iterator[Callable[[str], None]]:
    """Loads drivers of the host, which take the free devices that they match; they are unloaded afterwards."""
    loaded: list[str] = []

    def load(name: str) -> None:
        backend.machine.driver_core.load(name)
        loaded.append(name)

    yield load
    for name in reversed(loaded):
        backend.machine.driver_core.unload(name)


@pytest.fixture
def iommu_module(backend: FakeBackend) -> Iterator[IommuModule]:
    """The module with VFIO's IOMMU driver; loaded again afterwards."""
    module = IommuModule(backend)
    yield module
    module.load()


@pytest.fixture
def killed_by() -> Callable[[Callable[[], object]], str | None]:
    """Which signal a call that touches a mapping kills its process by; None: by none."""

    def touch(call: Callable[[], object]) -> str | None:
        try:
            call()
        except BusError:
            return "SIGBUS"
        except SegmentationFault:
            return "SIGSEGV"
        return None

    return touch


@pytest.fixture
def device(backend: FakeBackend, bound_address: str) -> Iterator[vfio.Device]:
    """The device to work with, open."""
    with vfio.open_device(bound_address, backend) as device:
        yield device


@pytest.fixture
def edu_driver(device: vfio.Device) -> vfio.drivers.edu.Edu:
    """The driver of an edu, on `device`."""
    return vfio.drivers.edu.Edu(device)


class IommuModule:
    """modprobe of the module with VFIO's IOMMU driver."""

    def __init__(self, backend: FakeBackend) -> None:
        self._core = backend.machine.vfio
        self._drivers = list(self._core.iommu_drivers)

    def unload(self) -> str | None:
        """None, or the errno: EAGAIN while a container uses it."""
        if any(container.iommu for container in self._core.containers):
            return "EAGAIN"
        self._core.iommu_drivers.clear()
        return None

    def load(self) -> None:
        self._core.iommu_drivers[:] = self._drivers


def second_address(topology: Topology, group: int) -> str:
    """Address of the first device that is not in `group`."""
    return next(device.address for device in topology.devices if device.group not in (group, None))


def _open(url: str) -> FakeBackend:
    backend = open_backend(url)
    assert isinstance(backend, FakeBackend)
    return backend


def _bound(backend: FakeBackend, target: FakeTarget, address: str) -> Member:
    group = target.topology.device(address).group
    assert group is not None
    backend.write_text(f"/sys/bus/pci/devices/{address}/driver_override", "vfio-pci\n")
    if backend.exists(f"/sys/bus/pci/devices/{address}/driver"):
        backend.write_text(f"/sys/bus/pci/devices/{address}/driver/unbind", address)
    backend.write_text("/sys/bus/pci/drivers_probe", address)
    return Member(address, group)
