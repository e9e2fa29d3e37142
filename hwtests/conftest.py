"""How hardware tests are chosen, and what they are given.

    pytest hwtests --lab powernv8 [--lab powernv8-64k ...]     in emulated machines
    pytest hwtests --device 0001:01:00.0                       on this POWER host, with that device

Marks: `lab_only` (hostile, or needs the emulated machine), `needs_edu` (drives QEMU's edu device),
`targets("powernv8", ...)` (only these targets of the lab), `power` (not for q35, a PC).
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.register_assert_rewrite("simtests.conformance")

from hwtests import transcripts  # noqa: E402
from hwtests.devices import (  # noqa: E402
    as_alice,
    bound_address,
    device,
    edu_driver,
    freezer,
    iommu_module,
    load_driver,
    member,
    mixed,
    second,
    two_edus,
)
from hwtests.processes import another_process, fork, killed_by  # noqa: E402
from simtests.conformance.fixtures import (  # noqa: E402
    area,
    kernel_messages,
    native,
    other_program,
    program,
    runs_on,
    v1,
    v2,
)

if TYPE_CHECKING:
    from hwtests.lab.targets import System
    from vfio.backend import Backend

__all__ = [  # fixtures, found here by name
    "another_process",
    "area",
    "as_alice",
    "bound_address",
    "device",
    "edu_driver",
    "fork",
    "freezer",
    "iommu_module",
    "kernel_messages",
    "killed_by",
    "load_driver",
    "member",
    "mixed",
    "native",
    "other_program",
    "program",
    "second",
    "two_edus",
    "v1",
    "v2",
]

_HERE = Path(__file__).parent
_HOW = """\
hwtests need a real kernel:
  pytest hwtests --lab powernv8             in an emulated machine (python -m hwtests.lab targets lists them)
  pytest hwtests --device 0001:01:00.0      on this POWER host, as root, with a device bound to vfio-pci"""
_EDU = "1234:11e8"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hwtests", "hardware tests")
    group.addoption(
        "--lab",
        action="append",
        default=[],
        metavar="TARGET",
        help="run hwtests in an emulated machine; may be given several times",
    )
    group.addoption(
        "--lab-timeout",
        type=float,
        default=180.0,
        metavar="SECONDS",
        help="longest that one test may take in the lab (default %(default)s)",
    )
    group.addoption("--device", metavar="ADDRESS", help="run the safe hwtests on this host with this PCI device")
    group.addoption(
        "--transcripts",
        metavar="DIR",
        help="store what each case asked the kernel of the lab, and its answers (python -m hwtests.transcripts)",
    )
    group.addoption("--lab-guest", metavar="TARGET", help="(used by the lab inside its machines)")


def pytest_configure(config: pytest.Config) -> None:
    for mark in (
        "lab_only: hostile, or needs the emulated machine; never run on a real host",
        "needs_edu: drives QEMU's edu device; skipped with a real device",
        "targets(name, ...): only for these targets of the lab",
        "power: about what only POWER has: sPAPR TCE, EEH, PAPR; not for q35",
        "leaks: leaves something held on purpose, in a process of its own",
        "not_recorded(reason): does what no transcript can hold",
        "fresh: needs the machine as it boots, and so comes first",
        "spoils: leaves the machine changed until it boots again, and so comes last",
    ):
        config.addinivalue_line("markers", mark)
    option = config.option
    if sum(map(bool, (option.lab, option.device, option.lab_guest))) > 1:
        raise pytest.UsageError("--lab and --device exclude each other")
    if option.lab:
        from hwtests.lab.errors import LabError
        from hwtests.lab.pytest_lab import LabPlugin

        try:
            config.pluginmanager.register(LabPlugin(config, option.lab, option.lab_timeout), "vfio-lab")
        except LabError as error:
            raise pytest.UsageError(f"--lab: {error}") from error
        if option.transcripts:
            config.pluginmanager.register(transcripts.Writer(Path(option.transcripts)), "vfio-transcripts")
    elif option.lab_guest:
        from hwtests.lab.pytest_guest import GuestPlugin

        config.pluginmanager.register(GuestPlugin(config), "vfio-lab-guest")
    elif option.device:
        _check_device(option.device)


def _check_device(address: str) -> None:
    if not platform.machine().startswith("ppc64"):
        raise pytest.UsageError(f"--device is for a POWER host; this is {platform.machine()}. Here: --lab powernv8")
    if "/" in address or not Path("/sys/bus/pci/devices", address).exists():
        raise pytest.UsageError(f"--device: no PCI device {address} (a full address is like 0001:01:00.0)")


def _chosen(config: pytest.Config) -> bool:
    return bool(config.option.lab or config.option.device or config.option.lab_guest)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path.name == "lab" or not _chosen(config):
        return True
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = [metafunc.config.option.lab_guest] if metafunc.config.option.lab_guest else metafunc.config.option.lab
    if names:
        metafunc.parametrize("target", list(dict.fromkeys(names)), indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        wanted = not item.path.is_relative_to(_HERE) or (_chosen(config) and _wanted(config, item))
        (kept if wanted else left_out).append(item)
    items[:] = sorted(kept, key=_when)
    if left_out:
        config.hook.pytest_deselected(items=left_out)


def _when(item: pytest.Item) -> int:
    return (item.get_closest_marker("spoils") is not None) - (item.get_closest_marker("fresh") is not None)


def _wanted(config: pytest.Config, item: pytest.Item) -> bool:
    marks = list(item.iter_markers("targets"))
    fixtures = getattr(item, "fixturenames", ())
    if "edu_driver" in fixtures:
        item.add_marker("needs_edu")
    if {"two_edus", "second", "load_driver", "iommu_module", "as_alice", "freezer"} & set(fixtures):
        item.add_marker("lab_only")
    if config.option.device:
        if item.get_closest_marker("needs_edu") and (found := _identity(config.option.device)) != _EDU:
            item.add_marker(pytest.mark.skip(reason=f"needs QEMU's edu device; {config.option.device} is {found}"))
        return not marks and not item.get_closest_marker("lab_only")
    from hwtests.lab.pytest_lab import target_of

    target = target_of(item)
    if target == "q35" and not marks and not item.path.name.startswith(("test_conformance_", "test_fuzz")):
        return False  # what else names no target is about POWER
    return runs_on(item, target)


def _identity(address: str) -> str:
    directory = Path("/sys/bus/pci/devices", address)
    return ":".join((directory / name).read_text().strip().removeprefix("0x") for name in ("vendor", "device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not _chosen(config):
        terminalreporter.section("hwtests were not run")
        terminalreporter.line(_HOW)


@pytest.fixture(scope="session", autouse=True)
def target(request: pytest.FixtureRequest) -> System:
    """What the test runs on: `name`, `page_size`, `platform`, and `topology`, which is None on a real host."""
    from hwtests.lab.targets import System

    return System.of_target(request.param) if hasattr(request, "param") else System.of_host()


@pytest.fixture(scope="session")
def edu_address(target: System, pytestconfig: pytest.Config) -> str:
    """Address of an edu device that opens fast; use with the mark `needs_edu`."""
    return _device_address(target, pytestconfig)


@pytest.fixture(scope="session")
def device_address(target: System, pytestconfig: pytest.Config) -> str:
    """Address of the device to work with: `--device` on a host, the first edu in the lab."""
    return _device_address(target, pytestconfig)


def _device_address(target: System, config: pytest.Config) -> str:
    if target.topology is None:
        return str(config.option.device)
    return next(device.address for device in target.topology.devices if device.model == "edu")


@pytest.fixture
def backend(request: pytest.FixtureRequest, target: System) -> Iterator[Backend]:
    """The real kernel, behind the seam."""
    from vfio.backend import open_backend

    real = open_backend("kernel:")
    if not request.config.option.transcripts:
        yield real
        return
    with transcripts.recorded(real, request.node, target) as traced:
        yield traced
