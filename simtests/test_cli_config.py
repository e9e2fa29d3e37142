"""vfio config: configuration space for people and for programs."""

from __future__ import annotations

import json
import os

import pytest
from click.testing import CliRunner
from vfio_cli.main import cli

from vfio import open_backend, pci
from vfio.fake.backend import FakeBackend

DISK = "0002:01:00.0"


@pytest.fixture
def power8() -> FakeBackend:
    backend = open_backend("fake:power8")
    assert isinstance(backend, FakeBackend)
    return backend


@pytest.fixture
def run(power8, monkeypatch):
    """The command, run on a POWER8 host."""
    monkeypatch.setattr("vfio.backend.open_backend", lambda url=None: power8)
    return lambda *words: CliRunner().invoke(cli, ["config", *words], prog_name="vfio")


def test_config_names_every_register_and_opens_nothing(run, power8, monkeypatch):
    opened = []
    real = power8.open
    monkeypatch.setattr(power8, "open", lambda path, flags: opened.append((path, flags)) or real(path, flags))
    result = run(DISK)
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0] == "header of a function"
    assert "  000  vendor                      0x1b36" in lines
    assert "  044  table                       0x00002000  BAR0 at 0x2000" in lines
    assert opened == [(f"/sys/bus/pci/devices/{DISK}/config", os.O_RDONLY)]
    assert power8.leaks() == []


def test_config_as_hex_is_a_dump(run):
    lines = run(DISK, "--hex").stdout.splitlines()
    assert lines[0] == "000: 36 1b 10 00 00 01 10 00 02 02 08 01 00 00 00 00"
    assert lines[-1] == "ff0:" + " 00" * 16
    assert "*" in lines


def test_config_as_json_has_fields_and_bytes(run, power8):
    found = json.loads(run(DISK, "--json").stdout)
    assert (found["address"], found["source"], found["size"]) == (DISK, "sysfs", 4096)
    assert found["header"]["command"] == {
        "value": 0x100,
        "io": False,
        "memory": False,
        "bus_master": False,
        "special_cycles": False,
        "write_invalidate": False,
        "palette_snoop": False,
        "parity_response": False,
        "serr": True,
        "fast_back_to_back": False,
        "intx_disable": False,
    }
    assert [(each["name"], each["offset"], each["id"], each["version"]) for each in found["capabilities"]] == [
        ("MSI-X", 0x40, 0x11, None),
        ("PCI Express", 0x80, 0x10, None),
        ("PM", 0x60, 0x01, None),
    ]
    assert found["faults"] == []
    assert pci.ConfigSpace(bytes.fromhex(found["bytes"])).as_dict()["capabilities"] == found["capabilities"]


def test_config_as_json_and_hex_is_the_bytes_alone(run):
    found = json.loads(run(DISK, "--hex", "--json").stdout)
    assert set(found) == {"address", "source", "size", "bytes"}


def test_config_of_who_is_not_root_says_that_there_is_more(power8, monkeypatch):
    other = power8.another_process(uid=1000)
    monkeypatch.setattr("vfio.backend.open_backend", lambda url=None: other)
    result = CliRunner().invoke(cli, ["config", DISK], prog_name="vfio")
    assert result.exit_code == 0
    assert result.stderr == "vfio: only root can read more than the first 64 bytes: capabilities are not shown\n"
    assert "  03d  interrupt pin               0x01        pin INTA" in result.stdout.splitlines()
    assert "MSI-X" not in result.stdout


def test_config_through_vfio_shows_what_a_user_sees_and_warns_of_the_reset(run, power8):
    power8.write_text(f"/sys/bus/pci/devices/{DISK}/driver_override", "vfio-pci\n")
    power8.write_text("/sys/bus/pci/drivers_probe", DISK)
    result = run(DISK, "--vfio")
    assert result.exit_code == 0
    assert result.stderr == f"vfio: opening {DISK} resets it\n"
    assert "  004  command                     0x0102      memory, serr" in result.stdout.splitlines()
    assert json.loads(run(DISK, "--vfio", "--json").stdout)["source"] == "vfio"
    assert power8.leaks() == []


def test_config_through_vfio_of_a_device_that_is_not_bound_says_how_to_bind_it(run):
    result = run(DISK, "--vfio")
    assert result.exit_code == 1
    assert "vfio bind 0002:01:00.0" in result.stderr


def test_config_of_a_device_that_is_not_there_fails(run):
    result = run("0009:01:00.0")
    assert result.exit_code == 1
    assert result.stderr.startswith("vfio: no device 0009:01:00.0: it is not in sysfs [ENODEV]\n")


def test_config_of_a_blocked_device_says_that_it_does_not_answer(run, power8):
    device = power8.machine.driver_core.devices[DISK]
    device.pe.eeh.assert_reset()
    result = run(DISK)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == (
        "fault: the device does not answer: all ones is what a frozen, reset or missing device reads"
    )


@pytest.mark.parametrize("words", [[], ["nonsense"], [DISK, "--octal"], [DISK, DISK]])
def test_bad_input_is_a_usage_error(run, words):
    assert run(*words).exit_code == 2
