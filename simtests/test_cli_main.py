"""The command as a whole: help, common options, usage errors, and the self-test's command."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from vfio_cli.main import cli

from vfio import errors, selftest

COMMANDS = sorted(cli.commands)
DISK = "0001:01:00.0"


def test_the_commands_are_those_of_the_manual():
    assert " ".join(COMMANDS) == (
        "apply bind config demo eeh export fake list nvme restore selftest show unbind why window"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_and_the_common_options(vfio, command):
    result = vfio(command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert f"vfio {command}" in result.stdout
    for option in ("--json", "--backend URL", "--trace [FILE]"):
        assert option in result.stdout


def test_help_and_version_of_the_whole(vfio):
    assert all(command in vfio("--help").stdout for command in COMMANDS)
    assert vfio("--version").stdout.startswith("vfio, version ")


@pytest.mark.parametrize(
    "words",
    [
        ["no-such-command"],
        ["list", "--no-such-option"],
        ["list", "--group", "x"],
        ["list", "--group", "-1"],
        ["bind"],
        ["bind", "../../x"],
        ["bind", "0000:01:00.0; reboot"],
        ["bind", DISK, "--user", "no-such-user"],
        ["unbind", "0000:01:00"],
        ["unbind", DISK, "--wait", "-1"],
        ["unbind", DISK, "--wait", "soon"],
        ["restore", "zzzz:01:00.0"],
        ["show"],
        ["show", DISK, DISK],
        ["why", ""],
        ["selftest", "0000:01:00.9"],
        ["demo", "0000:01:00.9"],
        ["show", "--trace", DISK],
    ],
)
def test_bad_input_is_a_usage_error_and_changes_nothing(vfio, host, words):
    result = vfio(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr
    assert "Traceback" not in result.stderr
    assert host.changes == []
    result = vfio(*words, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stderr)["error"]["what"]


def test_a_backend_that_nobody_offers_is_a_usage_error():
    result = CliRunner().invoke(cli, ["list", "--backend", "nowhere:"], prog_name="vfio")
    assert result.exit_code == 2
    assert result.stderr.startswith("vfio: no backend 'nowhere:'")


def test_the_backend_is_that_of_the_option_before_or_behind_the_command(host, monkeypatch):
    asked = []
    monkeypatch.setattr("vfio.backend.open_backend", lambda url=None: asked.append(url) or host)
    CliRunner().invoke(cli, ["--backend", "a:", "list"])
    CliRunner().invoke(cli, ["list", "--backend", "b:"])
    CliRunner().invoke(cli, ["--backend", "a:", "list", "--backend", "b:"])
    CliRunner().invoke(cli, ["list"])
    assert asked == ["a:", "b:", "b:", None]


def test_trace_tells_every_call_on_standard_error(vfio):
    result = vfio("list", "--trace")
    assert result.exit_code == 0
    assert result.stderr.startswith('listdir("/sys/bus/pci/devices") = ')
    assert "nvme" in result.stdout


def test_trace_to_a_file_as_text_and_as_json_lines(vfio, tmp_path):
    text, lines = tmp_path / "trace", tmp_path / "trace.jsonl"
    result = vfio("list", f"--trace={text}")
    assert (result.exit_code, result.stderr) == (0, "")
    assert text.read_text().startswith("listdir(")
    vfio("list", "--trace", str(lines))
    assert json.loads(lines.read_text().splitlines()[0])["call"] == "listdir"


def test_a_trace_file_that_cannot_be_written_is_an_error(vfio, tmp_path):
    result = vfio("list", f"--trace={tmp_path}/absent/trace")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"vfio: {tmp_path}/absent/trace: No such file or directory")


def test_the_console_script_runs_without_a_terminal():
    done = subprocess.run(
        [sys.executable, "-m", "vfio_cli.main", "list", "--json"], capture_output=True, text=True, check=True
    )
    assert isinstance(json.loads(done.stdout), list)


def test_rich_is_not_imported_where_no_table_is_drawn():
    program = "import sys; from vfio_cli.main import cli; print('rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# --- selftest ---


def given_steps(monkeypatch: pytest.MonkeyPatch, *steps: selftest.Step, error: OSError | None = None) -> None:
    def run(address, backend):
        yield from steps
        if error:
            raise error

    monkeypatch.setattr(selftest, "steps", run)


OPEN = selftest.Step("open", "ok", "group 2", 0.25)
SKIPPED = selftest.Step("window, 16 MiB pages", "skipped", "needs hugetlb pages", 0.0)
FAILED = selftest.Step("MSI", "failed", "nothing happened for 1 s", 1.0)


def test_selftest_prints_each_step(vfio, monkeypatch):
    given_steps(monkeypatch, OPEN, SKIPPED)
    result = vfio("selftest", DISK)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "ok       open                        0.25 s  group 2",
        "skipped  window, 16 MiB pages        0.00 s  needs hugetlb pages",
    ]


def test_selftest_fails_with_a_failed_step(vfio, monkeypatch):
    given_steps(monkeypatch, OPEN, FAILED)
    assert vfio("selftest", DISK).exit_code == 1
    result = vfio("selftest", DISK, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {
        "address": DISK,
        "passed": False,
        "steps": [
            {"name": "open", "status": "ok", "detail": "group 2", "seconds": 0.25},
            {"name": "MSI", "status": "failed", "detail": "nothing happened for 1 s", "seconds": 1.0},
        ],
    }


def test_selftest_without_any_step_fails(vfio, monkeypatch):
    given_steps(monkeypatch)
    assert vfio("selftest", DISK).exit_code == 1


def test_selftest_of_an_unbound_device_says_so(vfio, host):
    result = vfio("selftest", "0002:00:00.0")
    assert result.exit_code == 1
    assert result.stderr == (
        "vfio: 0002:00:00.0 cannot be opened: it is on no driver [ENODEV]\n  vfio bind 0002:00:00.0 --group\n"
    )
    assert host.changes == []


@pytest.mark.parametrize(
    ("steps", "error", "status"),
    [
        ([OPEN], None, 0),
        ([OPEN, FAILED], None, 1),
        ([OPEN], errors.Closed("device"), 1),
    ],
)
def test_selftest_with_bind_restores_the_group_however_it_ends(vfio, host, monkeypatch, steps, error, status):
    before = host.snapshot()
    seen = []

    def run(address, backend):
        seen.append([host.devices[each].driver for each in ("0000:01:00.0", "0000:01:00.1")])
        yield from steps
        if error:
            raise error

    monkeypatch.setattr(selftest, "steps", run)
    result = vfio("selftest", "0000:01:00.0", "--bind")
    assert result.exit_code == status
    assert seen == [["vfio-pci", "vfio-pci"]]
    assert host.snapshot() == before


def test_selftest_with_bind_refuses_what_is_in_use(vfio, host, monkeypatch):
    given_steps(monkeypatch, OPEN)
    host.network("eth0", DISK, up=True)
    result = vfio("selftest", DISK, "--bind")
    assert result.exit_code == 1
    assert "network interface eth0 is up" in result.stderr
    assert host.changes == []
