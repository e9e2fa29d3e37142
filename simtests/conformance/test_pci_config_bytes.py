"""Every byte of every device's configuration space against what the real kernel was seen to do with it.

The files in simtests/config_space are recorded by ``python -m hwtests.config_space record TARGET...``; the same case
runs in the lab, so that they are held against the kernel again.
"""

from __future__ import annotations

from typing import Any

import pytest

from simtests.conformance.config_bytes import differences, measure, recorded
from simtests.conformance.pci_calls import on_vfio, opened
from vfio.backend import Backend

RECORDED = ("powernv8", "powernv8-64k", "powernv9", "pseries", "q35")
BARE_METAL = pytest.mark.targets("powernv8", "powernv8-64k", "powernv9")

pytestmark = [
    pytest.mark.lab_only,  # what these devices are is known
    pytest.mark.targets(*RECORDED),
    pytest.mark.not_recorded("tens of thousands of calls, and tables of its own"),
]


def check(backend: Backend, target: Any, model: str) -> None:
    """Compare a device of this model."""
    described = next(each for each in target.topology.devices if each.model == model)
    with on_vfio(backend, described.address) as address, opened(backend, address) as device:
        assert differences(measure(device), recorded(target.name, model)) == []


def test_every_byte_of_an_edu_reads_back_as_recorded(backend, target):
    check(backend, target, "edu")


@BARE_METAL
def test_every_byte_of_a_test_device_reads_back_as_recorded(backend, target):
    check(backend, target, "pci-testdev")


@BARE_METAL
def test_every_byte_of_a_disk_reads_back_as_recorded(backend, target):
    check(backend, target, "nvme")


@pytest.mark.targets("pseries", "q35")
def test_every_byte_of_a_network_card_reads_back_as_recorded(backend, target):
    check(backend, target, "e1000e")
