"""vfio fake serve, status and stop, and other commands on a served machine, as a shell runs them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from vfio_cli.main import cli

from vfio.backends import remote
from vfio.fake import serving

VFIO = f"{shlex.quote(sys.executable)} -m vfio_cli.main"


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's directory for sockets; servers that were started there are ended."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    yield tmp_path / "vfio"
    for path in (*tmp_path.glob("vfio/*"), *tmp_path.glob("*")):
        if path.is_socket():
            remote.stop(str(path))


def vfio(*words: str) -> Result:
    return CliRunner().invoke(cli, words, prog_name="vfio")


def sh(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", script.replace("vfio ", f"{VFIO} ")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


def test_shell_that_evaluates_the_line_has_a_host_that_remembers(runtime):
    done = sh(
        'eval "$(vfio fake serve --detach)" && echo "$VFIO_BACKEND" && vfio bind 0000:01:00.0 && '
        "vfio list --driver vfio-pci && vfio restore --all && vfio list --driver vfio-pci --json && vfio fake stop"
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    user = "" if os.geteuid() == 0 else "?uid=0"
    assert lines[0] == f"unix:{runtime / 'fake.sock'}{user}"
    assert lines[1] == "0000:01:00.0: no driver -> vfio-pci"
    assert "0000:01:00.0" in lines[3]
    assert lines[4:] == ["0000:01:00.0: vfio-pci -> no driver", "[]"]
    assert list(runtime.iterdir()) == []


def test_served_machine_passes_the_selftest(runtime):
    done = sh(
        f"eval \"$(vfio fake serve --detach --machine 'power9?page_size=65536' --socket {runtime.parent / 'a b.sock'})\""
        " && vfio selftest 0000:01:00.0 --bind --json && vfio fake stop".replace("a b.sock", "a\\ b.sock")
    )
    assert done.stderr == ""
    assert json.loads(done.stdout)["passed"]


def test_server_in_the_background_holds_nothing_of_its_callers(runtime):
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    done = subprocess.run(
        [*shlex.split(VFIO), "fake", "serve", "--detach"], pass_fds=[writing], capture_output=True, check=False
    )
    os.close(writing)
    assert done.returncode == 0
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_second_server_is_refused_with_the_pid_of_the_first(runtime):
    first = vfio("fake", "serve", "--detach", "--json")
    assert first.exit_code == 0
    pid = json.loads(first.stdout)["pid"]
    second = vfio("fake", "serve", "--detach")
    assert (second.exit_code, second.stdout) == (1, "")
    assert f"process {pid} does" in second.stderr
    assert f"vfio fake stop --socket {runtime / 'fake.sock'}" in second.stderr
    assert vfio("fake", "status", "--json").exit_code == 0


def test_socket_that_a_killed_server_left_is_replaced(runtime):
    pid = json.loads(vfio("fake", "serve", "--detach", "--json").stdout)["pid"]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (runtime / "fake.sock").is_socket()
    again = vfio("fake", "serve", "--detach", "--json")
    assert again.exit_code == 0
    assert json.loads(vfio("fake", "status", "--json").stdout)["pid"] == json.loads(again.stdout)["pid"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_ends_the_server_and_removes_its_socket(runtime, number):
    server = subprocess.Popen([*shlex.split(VFIO), "fake", "serve"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline().startswith("export VFIO_BACKEND=unix:")
    server.send_signal(number)
    assert server.wait(20) == 0
    server.stdout.close()
    assert list(runtime.iterdir()) == []


def test_status_shows_clients_bindings_and_nodes(runtime):
    vfio("fake", "serve", "--detach")
    backend = remote.from_url(f"unix:{runtime / 'fake.sock'}?uid=0")
    backend.write_text("/sys/bus/pci/devices/0000:01:00.0/driver_override", "vfio-pci")
    backend.write_text("/sys/bus/pci/drivers_probe", "0000:01:00.0")
    fd = backend.open("/dev/vfio/0", os.O_RDWR)
    result = vfio("fake", "status")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["socket", str(runtime / "fake.sock")]
    assert any(line.split()[:5] == [str(os.getpid()), "0", "/dev/vfio/0", "0", "0"] for line in lines)
    assert any(line.split() == ["0000:01:00.0", "0", "vfio-pci"] for line in lines)
    assert any(line.split() == ["/dev/vfio/0", "0", "0", "0600"] for line in lines)
    backend.close(fd)
    backend.exit()


def test_socket_is_for_its_owner_alone_and_so_is_its_directory(runtime):
    listener = serving.Listener(serving.default_path())
    assert runtime.stat().st_mode & 0o777 == 0o700
    assert (runtime / "fake.sock").stat().st_mode & 0o777 == 0o600
    listener.close()
    assert not (runtime / "fake.sock").exists()


def test_without_a_directory_of_the_users_root_has_its_own_and_others_have_a_private_one(monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert serving.default_path() == Path("/run/vfio/fake.sock")
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/tmp")
    assert serving.default_path() == Path("/tmp/vfio-1234/fake.sock")


def test_directory_that_others_could_have_made_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    (tmp_path / "vfio-1").mkdir(mode=0o777)
    (tmp_path / "vfio-1").chmod(0o777)
    result = vfio("fake", "serve", "--detach", "--socket", str(tmp_path / "vfio-1" / "fake.sock"))
    assert result.exit_code == 1
    assert "others could reach it" in result.stderr


def test_path_of_what_is_no_socket_is_left_alone(tmp_path):
    file = tmp_path / "file"
    file.write_text("precious")
    result = vfio("fake", "serve", "--detach", "--socket", str(file))
    assert result.exit_code == 1
    assert "no socket" in result.stderr
    assert file.read_text() == "precious"


def test_socket_of_another_program_is_left_alone(tmp_path):
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "other"))
        other.listen()
        assert vfio("fake", "serve", "--detach", "--socket", str(tmp_path / "other")).exit_code == 1
        assert (tmp_path / "other").is_socket()


def test_path_that_is_too_long_is_an_error_that_says_so(tmp_path):
    result = vfio("fake", "serve", "--detach", "--socket", str(tmp_path / ("x" * 120)))
    assert result.exit_code == 1
    assert "at most 107 bytes" in result.stderr


def test_directory_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    result = vfio("fake", "serve", "--detach", "--socket", str(tmp_path / "file" / "socket"))
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "machine", ["power6", "power8?page_size=1", "nowhere.toml", "power8?uid=7", "power8?ipc_lock=0"]
)
def test_machine_that_there_is_not_is_a_usage_error_and_serves_nothing(runtime, machine):
    result = vfio("fake", "serve", "--detach", "--machine", machine)
    assert (result.exit_code, result.stdout) == (2, "")
    assert not runtime.exists()


@pytest.mark.parametrize("command", ["status", "stop"])
def test_without_a_server_the_command_fails_and_says_how_to_start_one(runtime, command):
    result = vfio("fake", command)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"nobody serves at {runtime / 'fake.sock'}" in result.stderr
    assert "vfio fake serve --detach" in result.stderr


def test_backend_that_nobody_serves_is_a_usage_error(runtime):
    result = vfio("list", "--backend", f"unix:{runtime}/fake.sock")
    assert result.exit_code == 2
    assert "start a server" in result.stderr


def test_status_and_stop_go_where_the_backend_does(tmp_path, monkeypatch):
    path = tmp_path / "elsewhere"
    assert vfio("fake", "serve", "--detach", "--socket", str(path)).exit_code == 0
    monkeypatch.setenv("VFIO_BACKEND", f"unix:{path}?uid=0")
    assert json.loads(vfio("fake", "status", "--json").stdout)["clients"] == []
    assert vfio("fake", "stop").exit_code == 0
    assert not path.exists()


@pytest.mark.parametrize("command", ["serve", "status", "stop"])
def test_command_has_help_with_an_example(command):
    result = vfio("fake", command, "--help")
    assert result.exit_code == 0
    assert f"vfio fake {command}" in result.stdout.split("Example")[1]
