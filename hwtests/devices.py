"""Devices for tests: bound for as long as a test needs them, and put back exactly."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

import vfio
import vfio.drivers.edu
from vfio import assign

if TYPE_CHECKING:
    from hwtests.lab.targets import System


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
def as_alice() -> Callable[[str], str]:
    """Runs Python code as the user alice; what it printed."""

    def run(code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], user="alice", group="alice", extra_groups=[], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
