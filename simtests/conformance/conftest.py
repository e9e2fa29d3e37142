"""The fake's side of the conformance cases: a fresh machine of each preset for each case."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import vfio
import vfio.drivers.edu
from simtests.conformance import modules
from simtests.conformance.areas import Area
from simtests.conformance.fixtures import (
    area,
    kernel_messages,
    native,
    other_program,
    program,
    runs_on,
    v1,
    v2,
)
from simtests.conformance.freezing import Freezer
from simtests.conformance.processes import another_process, fork
from simtests.conformance.raw import Member
from simtests.conformance.served import ServedMachine
from vfio.backend import Backend, open_backend
from vfio.backends.remote import RemoteBackend
from vfio.fake import presets
from vfio.fake.backend import FakeBackend
from vfio.fake.fault import BusError, SegmentationFault
from vfio.fake.machine import Machine
from vfio.topology import Topology

__all__ = [
    "another_process",
    "area",
    "fork",
    "kernel_messages",
    "native",
    "other_program",
    "program",
    "v1",
    "v2",
]  # fixtures, found here by name

_HERE = Path(__file__).parent
_TARGETS = {
    "power8": "powernv8",
    "power8?page_size=65536": "powernv8-64k",
    "power9": "powernv9",
    "pseries": "pseries",
    "power8?kernel=7.2": "powernv8",
    "x86": "q35",
}
"""Presets of the fake, and which target of the lab each is like."""
_FOR_SOME = {"siblings": "siblings", "noiommu": "noiommu"}
"""Those for the cases that name them alone."""

_SERVED = ("power8", "power8?page_size=65536", "pseries")
"""Those that the cases run on once more, through a socket: unix:PRESET."""
_SERVED_TO_FORKS = (*_SERVED, "x86")
"""Those for the cases that fork, which run through a socket alone."""


@dataclass(frozen=True)
class FakeTarget:
    """What a case runs on; the same properties as `hwtests.lab.targets.System`."""

    name: str  # of the lab's target that it is like
    url: str
    served: ServedMachine | None
    page_size: int  # bytes
    platform: str  # "PowerNV", "pSeries" or "PC"
    topology: Topology
    kernel: tuple[int, int]


def pytest_configure(config: pytest.Config) -> None:
    for mark in (
        "targets(name, ...): only where the machine is like one of these targets of the lab",
        "lab_only: hostile, or needs the emulated machine; never run on a real host",
        "power: about what only POWER has: sPAPR TCE, EEH, PAPR",
        "needs_edu: drives QEMU's edu device",
        "leaks: leaves something held on purpose; the machine is not looked at afterwards",
        "not_recorded(reason): does what no transcript can hold",
        "spoils: leaves the machine changed until it boots again",
    ):
        config.addinivalue_line("markers", mark)


def _params(item: pytest.Item) -> dict[str, str]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _like(name: str) -> str:
    """The target of the lab that fake:PRESET, or unix:PRESET, is like."""
    return (_TARGETS | _FOR_SOME)[name.partition(":")[2]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        marked = metafunc.definition.get_closest_marker("targets")
        presets = _TARGETS | _FOR_SOME if marked else _TARGETS
        everywhere = [f"fake:{preset}" for preset in presets] + [f"unix:{preset}" for preset in _SERVED]
        if "fork" in metafunc.fixturenames:  # a machine in this process would be forked as well
            everywhere = [f"unix:{preset}" for preset in _SERVED_TO_FORKS]
        if "freezer" in metafunc.fixturenames:  # which has the machine's clock in hand
            everywhere = [name for name in everywhere if name.startswith("fake:")]
        metafunc.parametrize("target", everywhere, indirect=True, ids=everywhere)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if item.path.is_relative_to(_HERE) and "target" in _params(item)]
    left_out = {item for item in here if not runs_on(item, _like(_params(item)["target"]))}
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def target(request: pytest.FixtureRequest) -> FakeTarget:
    """What the case runs on."""
    scheme, _, preset = request.param.partition(":")
    machine = _described(preset)
    served = request.getfixturevalue("servers")(preset) if scheme == "unix" else None
    return FakeTarget(
        _like(request.param),
        _url(preset),
        served,
        machine.page_size,
        machine.topology.platform.name,
        machine.topology,
        machine.kernel,
    )


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], ServedMachine]]:
    """The served machine of a preset; its server lasts for the session."""
    started: dict[str, ServedMachine] = {}

    def start(preset: str) -> ServedMachine:
        if preset not in started:
            started[preset] = ServedMachine(_url(preset)[5:], tmp_path_factory.mktemp("served") / "socket")
        return started[preset]

    yield start
    for each in started.values():
        each.end()


@pytest.fixture
def backend(target: FakeTarget, request: pytest.FixtureRequest) -> Iterator[FakeBackend | RemoteBackend]:
    """A machine of its own for each case, on which nothing is left when the case ends."""
    backend = target.served.renew() if target.served else _open(target.url)
    yield backend
    if request.node.get_closest_marker("leaks") is None:
        assert (target.served.ask("leaks") if target.served else _leaks(backend)) == []
    if isinstance(backend, RemoteBackend):
        backend.exit()


@pytest.fixture
def mixed(backend: FakeBackend | RemoteBackend, area: Callable[..., Area]) -> Callable[[int], int]:
    """Makes 32 MiB of which that half (0 or 1) is a huge page of 16 MiB and the other ordinary pages; the address."""
    half = 16 << 20

    def make(huge_half: int) -> int:
        address: int = area(2 * half // backend.page_size, half).address
        space = backend if isinstance(backend, RemoteBackend) else backend.process.memory
        space.add_large(address + huge_half * half, half, half)
        return address

    return make


@pytest.fixture
def device_address(target: FakeTarget) -> str:
    """Address of the device to work with."""
    return next(device.address for device in target.topology.devices if device.model == "edu")


@pytest.fixture
def member(backend: Backend, target: FakeTarget, device_address: str) -> Member:
    """The device to work with, on vfio-pci."""
    return _bound(backend, target, device_address)


@pytest.fixture
def second(backend: Backend, target: FakeTarget, member: Member) -> Member:
    """A device of another group, on vfio-pci."""
    return _bound(backend, target, second_address(target.topology, member.group))


@pytest.fixture
def bound_address(member: Member) -> str:
    """Address of the device to work with, on vfio-pci."""
    return member.address


@pytest.fixture
def two_edus(backend: Backend, target: FakeTarget) -> list[str]:
    """Addresses of two edus in groups of their own, on vfio-pci."""
    found = [device.address for device in target.topology.devices if device.model == "edu"][:2]
    return [_bound(backend, target, address).address for address in found]


class _Freezer(Freezer):
    """The model freezes; its clock is virtual."""

    def __init__(self, backend: FakeBackend) -> None:
        super().__init__(backend)
        self._machine = backend.machine

    def __call__(self, address: str, what: str = "both") -> None:
        self._machine.eeh.of(address).freeze = what  # type: ignore[assignment]

    def sleep(self, seconds: float) -> None:
        self._machine.clock.advance(seconds)


@pytest.fixture
def freezer(backend: FakeBackend) -> Freezer:
    """Freezes PEs."""
    return _Freezer(backend)


@pytest.fixture
def load_driver(backend: Backend, target: FakeTarget) -> Iterator[Callable[[str], None]]:
    """Loads drivers of the host, which take the free devices that they match; they are unloaded afterwards."""
    loaded: list[str] = []

    def change(what: str, name: str) -> None:
        if target.served:
            target.served.ask(what, name)
        else:
            assert isinstance(backend, FakeBackend)
            getattr(backend.machine.driver_core, what)(name)

    def load(name: str) -> None:
        change("load", name)
        loaded.append(name)

    yield load
    for name in reversed(loaded):
        change("unload", name)


@pytest.fixture
def iommu_module(backend: Backend, target: FakeTarget) -> Iterator[IommuModule]:
    """The module with VFIO's IOMMU driver; loaded again afterwards."""
    module = IommuModule(target.served.ask if target.served else functools.partial(_change_module, backend))
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
def device(backend: Backend, bound_address: str) -> Iterator[vfio.Device]:
    """The device to work with, open."""
    with vfio.open_device(bound_address, backend) as device:
        yield device


@pytest.fixture
def edu_driver(device: vfio.Device) -> vfio.drivers.edu.Edu:
    """The driver of an edu, on `device`."""
    return vfio.drivers.edu.Edu(device)


class IommuModule:
    """modprobe of the module with VFIO's IOMMU driver."""

    def __init__(self, ask: Callable[[str], str | None]) -> None:
        self._ask = ask

    def unload(self) -> str | None:
        """None, or the errno: EAGAIN while a container uses it."""
        return self._ask("unload_iommu")

    def load(self) -> None:
        self._ask("load_iommu")


def _change_module(backend: Backend, what: str) -> str | None:
    assert isinstance(backend, FakeBackend)
    return modules.ACTIONS[what](backend.machine)


def second_address(topology: Topology, group: int) -> str:
    """Address of the first device that is not in `group`."""
    return next(device.address for device in topology.devices if device.group not in (group, None))


def _open(url: str) -> FakeBackend:
    backend = open_backend(url)
    assert isinstance(backend, FakeBackend)
    return backend


def _url(preset: str) -> str:
    """What the lab's QEMU does, the fake does here: no PE freezes by itself."""
    return f"fake:{preset}{'&' if '?' in preset else '?'}freeze=0"


@functools.cache
def _described(preset: str) -> Machine:
    """A machine that is only looked at."""
    return presets.machine_alone(_url(preset))


def _leaks(backend: Backend) -> list[str]:
    assert isinstance(backend, FakeBackend)
    return backend.leaks()


def _bound(backend: Backend, target: FakeTarget, address: str) -> Member:
    group = target.topology.device(address).group
    assert group is not None
    backend.write_text(f"/sys/bus/pci/devices/{address}/driver_override", "vfio-pci\n")
    if backend.exists(f"/sys/bus/pci/devices/{address}/driver"):
        backend.write_text(f"/sys/bus/pci/devices/{address}/driver/unbind", address)
    backend.write_text("/sys/bus/pci/drivers_probe", address)
    return Member(address, group)
