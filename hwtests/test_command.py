"""The `vfio` command on a real kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hwtests.test_assign import held, snapshot
from vfio import sysfs

SEVERAL = pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k")


def run(*words: str, user: str | int | None = None) -> subprocess.CompletedProcess[str]:
    """The command, in a pipe."""
    as_user: dict[str, Any] = {"user": user, "group": user, "extra_groups": []} if user else {}
    return subprocess.run([sys.executable, "-m", "vfio_cli.main", *words], capture_output=True, text=True, **as_user)


def succeed(*words: str, user: str | int | None = None) -> str:
    done = run(*words, user=user)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = snapshot()
    yield
    assert snapshot() == before


@pytest.mark.lab_only
def test_list_shows_every_device_with_group_phb_and_pe(target):
    lines = {line.split()[0]: line.split() for line in succeed("list").splitlines()}
    assert lines.pop("ADDRESS")[:7] == ["ADDRESS", "GROUP", "PHB", "PE", "DRIVER", "ID", "NAME"]
    for phb in target.topology.phbs:
        for device in phb.functions:
            cells = lines.pop(device.address)
            group = ["-"] * 3 if device.group is None else [str(device.group), str(phb.domain), f"{device.pe or 0:#x}"]
            assert cells[1:4] == group
            assert cells[5] == f"{device.vendor:04x}:{device.device:04x}"
    assert lines == {}


def test_list_and_show_need_no_privilege_and_agree_with_sysfs(backend, device_address):
    nobody = 65534 if os.geteuid() == 0 else None
    (listed,) = [
        each for each in json.loads(succeed("list", "--json", user=nobody)) if each["address"] == device_address
    ]
    device = sysfs.device(backend, device_address)
    assert listed["group"] == device.group
    assert listed["driver"] == device.driver
    assert listed["pe"] == device.pe
    shown = json.loads(succeed("show", device_address, "--json", user=nobody))
    assert shown["group"] == device.group
    assert shown["eeh"] == sysfs.eeh(backend, device_address)


@pytest.mark.lab_only
@SEVERAL
def test_the_shell_commands_of_a_dry_run_do_what_bind_and_restore_do(device_address):
    before = snapshot()
    script = succeed("bind", device_address, "--group", "--user", "alice", "--dry-run")
    assert snapshot() == before
    undo_of_shell = []
    succeed("bind", device_address, "--group", "--user", "alice")
    bound = snapshot()
    undo_of_shell.append(succeed("restore", "--all", "--dry-run"))
    succeed("restore", "--all")
    assert snapshot() == before
    subprocess.run(["sh", "-ec", script], check=True)
    assert _without_names(snapshot()) == _without_names(bound)
    subprocess.run(["sh", "-ec", undo_of_shell[0]], check=True)
    assert snapshot() == before


def _without_names(found: Any) -> Any:
    """vfio-dev names count up with every bind."""
    devices, nodes = found
    return {address: (driver, override, len(names)) for address, (driver, override, names) in devices.items()}, nodes


@pytest.mark.lab_only
def test_an_ordinary_user_cannot_bind_and_is_told_why(device_address):
    before = snapshot()
    done = run("bind", device_address, user="alice")
    assert done.returncode == 1
    assert "sudo" in done.stderr
    assert "Traceback" not in done.stderr
    assert snapshot() == before


@pytest.mark.lab_only
def test_why_follows_a_device_to_readiness(device_address):
    assert succeed("why", device_address).splitlines()[0] == f"{device_address} cannot be opened: it is on no driver"
    succeed("bind", device_address)
    assert succeed("why", device_address) == f"{device_address} is ready to be opened by root (uid 0)\n"
    assert "mode 0600" in succeed("why", device_address, user="alice")
    with held(device_address) as process:
        assert f"held by pid {process.pid} " in succeed("why", device_address)
        done = run("unbind", device_address)
        assert done.returncode == 1
        assert f"pid {process.pid} " in done.stderr
    succeed("restore", "--all")


@pytest.mark.lab_only
def test_show_open_adds_what_the_device_and_its_iommu_tell(device_address, target):
    succeed("bind", device_address)
    done = run("show", device_address, "--open", "--json")
    assert done.returncode == 0
    assert done.stderr == f"vfio: opening {device_address} resets it\n"
    found = json.loads(done.stdout)["open"]
    iommu = target.topology.iommu
    assert found["iommu"]["model"] == "sPAPR TCE v2"
    assert sum(found["iommu"]["page_sizes"]) == iommu.page_sizes
    assert found["iommu"]["levels"] == iommu.levels
    assert found["iommu"]["max_windows"] == iommu.windows
    (window,) = found["iommu"]["windows"]
    assert (window["start"], window["size"]) == (iommu.default_window.start, iommu.default_window.size)
    assert [region["name"] for region in found["regions"]] == ["BAR0", "CONFIG"]
    assert found["regions"][0]["size"] == 1 << 20
    assert [irq["name"] for irq in found["irqs"]][:2] == ["INTx", "MSI"]
    assert [each["name"] for each in found["pci_capabilities"]] == ["MSI"]
    assert "BAR0" in run("show", device_address, "--open").stdout
    succeed("restore", "--all")


@pytest.mark.lab_only
def test_selftest_with_bind_passes_and_leaves_nothing(device_address):
    lines = succeed("selftest", device_address, "--bind").splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "skipped"}
    assert any("default window" in line and line.startswith("ok") for line in lines)


@pytest.mark.lab_only
def test_selftest_of_an_unbound_device_is_an_error_that_says_so(device_address):
    done = run("selftest", device_address)
    assert done.returncode == 1
    assert done.stderr.startswith(f"vfio: {device_address} cannot be opened: it is on no driver [ENODEV]")


@pytest.mark.lab_only
def test_a_terminated_selftest_restores_the_device(device_address):
    program = [sys.executable, "-m", "vfio_cli.main", "selftest", device_address, "--bind"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        assert process.stdout.readline().startswith("ok")
        process.terminate()
        process.communicate()
    assert process.returncode == 128 + 15


@pytest.mark.lab_only
def test_trace_shows_the_ioctls(device_address, tmp_path: Path):
    trace = tmp_path / "trace"
    succeed("selftest", device_address, "--bind", f"--trace={trace}")
    text = trace.read_text()
    assert "VFIO_SET_IOMMU" in text
    assert "drivers_probe" in text
