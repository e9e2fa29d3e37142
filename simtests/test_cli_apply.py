"""vfio apply, export: output, exit status, JSON."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

DISK = "0001:01:00.0"
FREE = "0002:00:00.0"

PLAN = f"""\
[[device]]
address = "{DISK}"
owner = "4321:77"
mode = 0o660

[[device]]
address = "{FREE}"
optional = true
"""


@pytest.fixture
def plan(tmp_path: Path) -> str:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    return str(path)


def piped(host, words, text):
    from vfio_cli.main import cli

    return CliRunner().invoke(cli, words, prog_name="vfio", input=text)


def test_apply_shows_what_differs_changes_it_and_the_second_time_nothing(vfio, host, plan):
    result = vfio("apply", plan)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[:7] == [
        f"--- {DISK}",
        f"+++ {DISK}",
        "@@ -1,2 +1,2 @@",
        "-driver: nvme",
        "-driver_override: none",
        "+driver: vfio-pci",
        "+driver_override: vfio-pci",
    ]
    assert lines[-3:] == ["+owner: 4321:77", "+mode: 0660", "changed: true"]
    assert host.devices[DISK].driver == host.devices[FREE].driver == "vfio-pci"
    made = len(host.changes)
    again = vfio("apply", plan)
    assert (again.exit_code, again.output) == (0, "changed: false\n")
    assert len(host.changes) == made


def test_check_changes_nothing_and_says_the_same(vfio, host, plan):
    result = vfio("apply", plan, "--check")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "changed: true (only checked)"
    assert host.changes == []
    assert vfio("apply", plan).stdout.splitlines()[:-1] == result.stdout.splitlines()[:-1]
    assert vfio("apply", plan, "--check").output == "changed: false\n"


def test_apply_as_json(vfio, vfio_json, plan):
    found = vfio_json("apply", plan, "--check")
    assert {key: found[key] for key in ("changed", "check", "done", "notes")} == {
        "changed": True,
        "check": True,
        "done": False,
        "notes": [],
    }
    assert found["diff"][0] == {
        "kind": "device",
        "name": DISK,
        "before": {"driver": "nvme", "driver_override": "none"},
        "after": {"driver": "vfio-pci", "driver_override": "vfio-pci"},
    }
    assert found["commands"][-2:] == ["chown 4321:77 /dev/vfio/2", "chmod 0660 /dev/vfio/2"]
    assert vfio_json("apply", plan)["done"]
    assert vfio_json("apply", plan) == {
        "check": False,
        "changed": False,
        "done": False,
        "diff": [],
        "commands": [],
        "notes": [],
    }


def test_the_diff_is_coloured_on_a_terminal(host, plan, monkeypatch):
    from vfio_cli.main import cli

    monkeypatch.setattr("vfio.backend.open_backend", lambda url=None: host)
    result = CliRunner().invoke(cli, ["apply", plan, "--check"], prog_name="vfio", color=True)
    assert "\x1b[31m-driver: nvme\x1b[0m" in result.stdout
    assert "\x1b[32m+driver: vfio-pci\x1b[0m" in result.stdout


def test_a_bad_plan_is_a_usage_error_and_changes_nothing(vfio, host, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text(PLAN + "drvier = 'nvme'\n")
    result = vfio("apply", str(path))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        f"vfio: {path}:9: device[1].drvier: unknown key; did you mean driver? [EINVAL]\n  nothing was changed\n"
    )
    assert json.loads(vfio("apply", str(path), "--json").stderr)["error"]["class"] == "BadPlan"
    path.write_text('[[device]]\nid = "abcd:0001"\n')
    assert vfio("apply", str(path)).exit_code == 2
    assert vfio("apply", str(tmp_path / "none.toml")).exit_code == 2
    assert host.changes == []


def test_a_failure_is_rolled_back_and_says_what_was_put_back(vfio, host, plan):
    before = host.snapshot()
    host.fault = lambda n: errno.EIO if n == 4 else 0
    result = vfio("apply", plan)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"/sys/bus/pci/devices/{FREE}/driver_override" in result.stderr or "drivers_probe" in result.stderr
    assert result.stderr.splitlines()[-1] == f"  put back as before: {DISK}, {FREE}"
    assert host.snapshot() == before
    host.fault = lambda n: 0
    assert vfio("apply", plan).exit_code == 0


@pytest.mark.parametrize(
    "words", [["apply"], ["apply", "plan.toml", "--forget"], ["apply", "--forget", "--persist"], ["apply", "a", "b"]]
)
def test_apply_takes_a_plan_or_forget(vfio, words):
    assert vfio(*words).exit_code == 2


def test_persist_and_forget(vfio, host, plan, tmp_path):
    etc = tmp_path / "etc"
    refused = vfio("apply", plan, "--persist")
    assert refused.exit_code == 1
    assert "--config-dir DIR" in refused.stderr
    assert host.changes == []
    result = vfio("apply", plan, "--persist", "--config-dir", str(etc))
    assert result.exit_code == 0
    rules = etc / "udev" / "rules.d" / "60-vfio-assign.rules"
    assert result.stdout.splitlines()[:2] == ["--- /dev/null", f"+++ {rules}"]
    assert rules.read_text().count("driver_override") == 2
    assert vfio("apply", plan, "--persist", "--config-dir", str(etc)).stdout == "changed: false\n"
    assert vfio("apply", "--forget", "--config-dir", str(etc), "--check").stdout.endswith("(only checked)\n")
    assert vfio("apply", "--forget", "--config-dir", str(etc)).stdout.endswith("changed: true\n")
    assert not rules.exists()


def test_export_and_apply_are_a_round_trip(vfio, host, plan):
    vfio("apply", plan)
    exported = vfio("export")
    assert exported.exit_code == 0
    assert f'address = "{DISK}"\ndriver = "vfio-pci"\nowner = "4321:77"\nmode = 0o660\n' in exported.stdout
    result = piped(host, ["apply", "--check", "-"], exported.stdout)
    assert (result.exit_code, result.output) == (0, "changed: false\n")
    everything = vfio("export", "--all").stdout
    assert everything.count("[[device]]") == 4  # bridges stay with the host
    assert piped(host, ["apply", "--check", "-"], everything).output == "changed: false\n"
    vfio("restore", "--all")
    assert vfio("export").stdout.count("[[device]]") == 0
    assert "changed: true" in piped(host, ["apply", "-"], exported.stdout).output
    assert vfio("export").stdout == exported.stdout


def test_export_as_json(vfio, vfio_json, plan):
    vfio("apply", plan)
    assert vfio_json("export")["device"][0] == {
        "address": DISK,
        "driver": "vfio-pci",
        "owner": "4321:77",
        "mode": 0o660,
    }


def test_a_bad_plan_on_standard_input_says_so(vfio, host):
    result = piped(host, ["apply", "-"], "[[device]]\n")
    assert result.exit_code == 2
    assert "<stdin>:1: device[0].address: an entry selects by exactly one of" in result.stderr


def test_the_plan_in_the_help_is_one(tmp_path):
    """Copied from `vfio apply --help`, it runs: on a machine whose device it names."""
    shown = subprocess.run([sys.executable, "-m", "vfio_cli.main", "apply", "--help"], capture_output=True, text=True)
    lines = shown.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if "[[device]]" in line)
    text = "\n".join(line.strip() for line in lines[start : lines.index("", start)])
    path = tmp_path / "plan.toml"
    path.write_text(text.replace("alice:kvm", "4321:77"))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vfio_cli.main", "--backend", "fake:power9", "apply", str(path), "--json"),
            *("--config-dir", str(tmp_path / "etc")),
        ],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [record["kind"] for record in json.loads(done.stdout)["diff"]] == ["file", "device", "node"]
