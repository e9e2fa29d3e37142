"""Devices for tests: bound for as long as a test needs them, and put back exactly."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vfio
import vfio.drivers.edu
from hwtests import transcripts
from hwtests.phb import Phb
from simtests.conformance import areas
from simtests.conformance.freezing import Freezer
from simtests.conformance.raw import Member
from vfio import assign, sysfs
from vfio.backends import kernel

if TYPE_CHECKING:
    from hwtests.lab.targets import System

_X86 = platform.machine() == "x86_64"
_DELETE_MODULE = 176 if _X86 else 129  # delete_module(2)
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def bound(backend: vfio.Backend, *addresses: str, user: str | None = None) -> Iterator[None]:
    """The devices, and only those, on vfio-pci."""
    assign.bind(addresses, user=user, backend=backend)
    try:
        yield
    finally:
        assign.restore(addresses, backend=backend)


@pytest.fixture
def bound_address(backend: vfio.Backend, device_address: str) -> Iterator[str]:
    """Address of the device to work with, on vfio-pci."""
    with bound(backend, device_address):
        yield device_address


@pytest.fixture(scope="module")
def member(device_address: str) -> Iterator[Member]:
    """The device to work with and its group, on vfio-pci for all cases of a module."""
    with _bound_member(device_address) as member:
        yield member


@pytest.fixture(scope="module")
def second(target: System, member: Member) -> Iterator[Member]:
    """A device of another group, on vfio-pci for all cases of a module."""
    assert target.topology is not None
    others = (device.address for device in target.topology.devices if device.group not in (member.group, None))
    with _bound_member(next(others)) as second:
        yield second


@contextmanager
def _bound_member(address: str) -> Iterator[Member]:
    with bound(kernel.THIS, address):
        group = sysfs.group_of(kernel.THIS, address)
        assert group is not None
        yield Member(address, group)


@pytest.fixture
def mixed() -> Iterator[Callable[[int], int]]:
    """Makes 32 MiB of which that half (0 or 1) is a huge page of 16 MiB and the other ordinary pages; the address."""
    made: list[int] = []

    def make(huge_half: int) -> int:
        made.append(areas.halves(huge_half, 16 << 20))
        return made[-1]

    yield make
    for address in made:
        areas.unmap(address, 32 << 20)


@pytest.fixture
def device(backend: vfio.Backend, bound_address: str) -> Iterator[vfio.Device]:
    """The device to work with, open."""
    with vfio.open_device(bound_address, backend) as device:
        yield device


@pytest.fixture
def edu_driver(device: vfio.Device) -> vfio.drivers.edu.Edu:
    """The driver of an edu, on `device`."""
    return vfio.drivers.edu.Edu(device)


@pytest.fixture
def two_edus(backend: vfio.Backend, target: System) -> Iterator[list[str]]:
    """Addresses of two edus in groups of their own, on vfio-pci."""
    assert target.topology is not None
    found = [device.address for device in target.topology.devices if device.model == "edu"][:2]
    with bound(backend, *found):
        yield found


@pytest.fixture
def load_driver(backend: vfio.Backend) -> Iterator[Callable[[str], None]]:
    """Loads drivers of the host, which take the free devices that they match; they are unloaded afterwards."""
    loaded: list[str] = []

    def modprobe(verb: str, *words: str) -> None:
        transcripts.tell(backend, verb, words[-1], lambda: subprocess.run(["modprobe", *words], check=True))

    def load(name: str) -> None:
        modprobe("load_driver", name)
        loaded.append(name)

    yield load
    for name in reversed(loaded):
        modprobe("unload_driver", "-r", name)


class IommuModule:
    """modprobe of the module with VFIO's IOMMU driver."""

    _name = "vfio_iommu_type1" if _X86 else "vfio_iommu_spapr_tce"

    def unload(self) -> str | None:
        """None, or the errno: EAGAIN while a container uses it."""
        if _libc.syscall(_DELETE_MODULE, self._name.encode(), os.O_NONBLOCK):
            return errno.errorcode[ctypes.get_errno()]
        return None

    def load(self) -> None:
        subprocess.run(["modprobe", self._name], check=True)


@pytest.fixture
def iommu_module() -> Iterator[IommuModule]:
    """The module with VFIO's IOMMU driver; loaded again afterwards."""
    module = IommuModule()
    yield module
    module.load()


class _Freezer(Freezer):
    """Writes the freeze bits of the PHB."""

    def __init__(self, backend: vfio.Backend) -> None:
        super().__init__(backend)
        self._phbs: dict[int, Phb] = {}
        self._touched: set[str] = set()

    def __call__(self, address: str, what: str = "both") -> None:
        number = int(sysfs.eeh(kernel.THIS, address)["eeh_pe_config_addr"], 16)
        domain = int(address.partition(":")[0], 16)
        phb = self._phbs.get(domain) or self._phbs.setdefault(domain, Phb(domain))
        self._touched.add(address)
        transcripts.tell(self.backend, "freeze", f"{address} {what}", lambda: phb.freeze(number, what))

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def close(self) -> None:
        for address in self._touched:
            with suppress(FileNotFoundError):  # it may be gone for good
                state = Path("/sys/bus/pci/devices", address, "eeh_pe_state")
                state.read_text()
                state.write_text("1")
        for phb in self._phbs.values():
            phb.close()


@pytest.fixture
def freezer(backend: vfio.Backend) -> Iterator[Freezer]:
    """Freezes PEs; they are thawed at the end."""
    freezer = _Freezer(backend)
    yield freezer
    freezer.close()


@pytest.fixture
def as_alice() -> Callable[[str], str]:
    """Runs Python code as the user alice; what it printed."""

    def run(code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], user="alice", group="alice", extra_groups=[], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
