"""vfio eeh: status, recover, reset, inject, watch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result
from vfio_cli.main import cli

import vfio
from vfio import assign, eeh
from vfio.eeh.history import FreezeFile
from vfio.fake.backend import FakeBackend

EDU, BRIDGE, DISK = "0001:01:00.0", "0001:00:00.0", "0002:01:00.0"
Command = Callable[..., Result]


@pytest.fixture
def backend() -> FakeBackend:
    """A POWER9 host with one device on vfio-pci."""
    made = vfio.open_backend("fake:power9")
    assert isinstance(made, FakeBackend)
    assign.bind([EDU], backend=made)
    return made


@pytest.fixture
def command(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command on that host, whose time passes when it waits."""
    monkeypatch.setattr("vfio.backend.open_backend", lambda url=None: backend)
    monkeypatch.setattr(eeh.Clock, "sleep", lambda self, seconds: backend.machine.clock.advance(seconds))
    return lambda *words: CliRunner().invoke(cli, ["eeh", *words], prog_name="vfio")


@pytest.fixture
def owner(backend: FakeBackend) -> FakeBackend:
    """Another process, which has the device open."""
    other = backend.another_process()
    vfio.open_device(EDU, other)
    return other


@pytest.fixture
def seen(backend: FakeBackend) -> list[str]:
    """The files that are opened from now on."""
    paths: list[str] = []
    real = backend.open
    backend.open = lambda path, flags: (paths.append(path), real(path, flags))[1]  # type: ignore[method-assign]
    return paths


def test_status_of_all_opens_nothing(command: Command, backend: FakeBackend, seen: list[str]) -> None:
    result = command("status")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["ADDRESS", "PE", "STATE", "DRIVER", "WHAT"]
    assert f"{EDU}  PHB#1-PE#fd   NORMAL  vfio-pci  MMIO and DMA work" in lines
    assert command("status", "--all").stdout == result.stdout
    assert not [path for path in seen if path.startswith("/dev")]


def test_status_of_a_frozen_pe_says_what_to_do(command: Command, backend: FakeBackend) -> None:
    backend.machine.eeh.freeze(EDU)
    result = command("status", EDU)
    assert result.exit_code == 0
    assert "state                  STOPPED: MMIO and DMA are frozen" in result.stdout
    assert "kernel's notes         ISOLATED PRI_BUS" in result.stdout
    assert result.stderr.endswith(f"MMIO and DMA are frozen\n  vfio eeh recover {EDU}\n")


def test_status_names_the_owner(command: Command, backend: FakeBackend, owner: FakeBackend) -> None:
    backend.machine.eeh.freeze(EDU, "dma")
    result = command("status", EDU, "--json")
    told = json.loads(result.stdout)
    assert told["state"] == "STOPPED_DMA"
    assert told["pe"] == 0xFD
    assert told["held_by"][0]["pid"] == owner.process.pid
    assert told["enabled"] == ["MMIO_ACTIVE", "MMIO_ENABLED"]
    assert told["remedy"] == "its owner has to recover it: vfio.eeh.recover(device, driver)"
    assert len(json.loads(command("status", "--json").stdout)) == 7


@pytest.mark.parametrize(
    ("prepare", "remedy"),
    [
        (
            lambda machine: machine.eeh.freeze(DISK),
            "it is for the host to recover it; if it does not, as root: echo 1 >",
        ),
        (lambda machine: setattr(machine.eeh.of(DISK), "isolated", True), "eeh_pe_state ends that"),
        (lambda machine: setattr(machine.eeh.of(DISK), "recovering", True), "wait: the host is at it"),
        (lambda machine: setattr(machine.eeh.of(DISK), "removed", True), "close the device, mend or replace it"),
    ],
)
def test_status_of_a_device_of_the_host(
    command: Command, backend: FakeBackend, prepare: Callable[[object], None], remedy: str
) -> None:
    prepare(backend.machine)
    assert remedy in command("status", DISK).stderr


def test_recover_brings_a_frozen_pe_back_and_shows_the_log(command: Command, backend: FakeBackend) -> None:
    backend.machine.eeh.freeze(EDU)
    result = command("recover", EDU)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0] == f"PHB#1-PE#fd ({EDU}) froze, and was recovered"
    assert "configuration space of 0001:01:00.0 at the freeze" in result.stdout
    assert backend.machine.eeh.of(EDU).freeze == "none"
    assert backend.leaks() == []
    assert command("recover", EDU).stdout == f"PHB#1-PE#fd ({EDU}) is not frozen: nothing was done\n"


def test_recover_opens_the_group_and_no_device(command: Command, backend: FakeBackend) -> None:
    backend.machine.eeh.freeze(EDU)
    before = backend.machine.hooks.calls["VFIO_GROUP_GET_DEVICE_FD"]
    command("recover", EDU, "--reset", "fundamental")
    assert backend.machine.hooks.calls["VFIO_GROUP_GET_DEVICE_FD"] == before


def test_recover_as_json_can_be_loaded_as_a_log(command: Command, backend: FakeBackend) -> None:
    backend.machine.eeh.freeze(EDU)
    log = eeh.Log.from_dict(json.loads(command("recover", EDU, "--reset", "fundamental", "--json").stdout))
    assert (log.recovered, log.reset, log.before, log.after) == (True, "fundamental", "STOPPED", "NORMAL")


def test_the_log_has_what_the_kernel_said(command: Command, backend: FakeBackend) -> None:
    """A PE that the host gave up trying with, and left frozen."""
    backend.machine.eeh.freeze(EDU)
    backend.machine.clock.advance(1)  # the host recovers it, and says so
    backend.machine.eeh.of(EDU).freeze = "both"
    result = command("recover", EDU)
    assert "what the kernel's log says of it" in result.stdout
    assert "  EEH: Recovering PHB#1-PE#fd" in result.stdout.splitlines()


def test_recover_stops_at_the_limit_and_shows_the_log_all_the_same(command: Command, backend: FakeBackend) -> None:
    for _ in range(2):
        backend.machine.eeh.freeze(EDU)
        assert command("recover", EDU, "--limit", "2").exit_code == 0
    backend.machine.eeh.freeze(EDU)
    result = command("recover", EDU, "--limit", "2")
    assert result.exit_code == 1
    assert "it froze 3 times in the last hour, and 2 are allowed" in result.stderr
    assert "its state is now STOPPED_DMA" in result.stderr
    assert "1234:11e8" in result.stdout
    assert backend.leaks() == []
    result = command("recover", EDU, "--limit", "2", "--json")
    assert json.loads(result.stderr)["error"]["class"] == "TooManyFreezes"
    assert json.loads(result.stdout)["count"] == 3
    FreezeFile(backend).path.unlink()
    assert command("recover", EDU, "--limit", "2").exit_code == 0


@pytest.mark.parametrize("words", [["recover", EDU], ["reset", EDU], ["inject", EDU, "ld-cfg-addr"]])
def test_a_device_in_use_is_refused_with_its_owner_and_the_line_of_python(
    command: Command, backend: FakeBackend, owner: FakeBackend, words: list[str]
) -> None:
    backend.machine.eeh.freeze(EDU)
    result = command(*words)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert f"held by pid {owner.process.pid}" in result.stderr
    assert "log = vfio.eeh.recover(device, driver)" in result.stderr
    assert backend.machine.eeh.of(EDU).freeze == "both"
    assert json.loads(command(*words, "--json").stderr)["error"]["class"] == "Busy"


def test_reset_tells_the_state_before_and_after(command: Command, backend: FakeBackend) -> None:
    backend.machine.eeh.freeze(EDU)
    result = command("reset", EDU)
    assert result.exit_code == 0
    assert "hot reset in" in result.stdout
    assert result.stdout.endswith("STOPPED -> NORMAL\n")
    told = json.loads(command("reset", EDU, "--reset", "fundamental", "--json").stdout)
    assert (told["done"], told["before"], told["after"]) == ("fundamental reset", "NORMAL", "NORMAL")
    assert backend.leaks() == []


def test_inject_arms_an_error_that_the_next_access_meets(command: Command, backend: FakeBackend) -> None:
    result = command("inject", EDU, "ld-cfg-addr")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{EDU}: injected ld-cfg-addr in")
    assert backend.machine.eeh.of(EDU).injected is not None
    result = command("inject", EDU, "dma-rd-addr", "--at", "0x1000", "--bits", "64")
    assert result.exit_code == 1
    assert "cannot inject DMA_RD_ADDR, 64 bits, at 0x1000: the hardware or its firmware refused" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["status", EDU, "--all"],
        ["status", "nonsense"],
        ["watch", EDU, "--all"],
        ["watch", "--poll", "0"],
        ["recover"],
        ["recover", EDU, "--limit", "-1"],
        ["recover", EDU, "--reset", "warm"],
        ["inject", EDU],
        ["inject", EDU, "ld-nothing"],
        ["inject", EDU, "ld-cfg-addr", "--at", "x"],
        ["inject", EDU, "ld-cfg-addr", "--mask", str(1 << 64)],
        ["inject", EDU, "ld-cfg-addr", "--bits", "16"],
        ["thaw", EDU],
    ],
)
def test_bad_input_is_a_usage_error(command: Command, backend: FakeBackend, words: list[str]) -> None:
    result = command(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr
    assert backend.machine.hooks.calls["VFIO_EEH_PE_OP"] == 0


@pytest.mark.parametrize("name", sorted(cli.commands["eeh"].commands))  # type: ignore[attr-defined]
def test_every_command_has_help_with_an_example(command: Command, name: str) -> None:
    result = command(name, "--help")
    assert result.exit_code == 0
    assert f"vfio eeh {name}" in result.stdout
    assert "--json" in result.stdout


@pytest.mark.parametrize(
    "words", [["status"], ["status", EDU], ["recover", EDU], ["reset", EDU], ["inject", EDU, "ld-cfg-addr"], ["watch"]]
)
def test_a_guest_has_no_eeh(words: list[str]) -> None:
    address = next(device.address for device in vfio.open_backend("fake:pseries").machine.topology.devices)  # type: ignore[attr-defined]
    words = [address if word == EDU else word for word in words]
    result = CliRunner().invoke(cli, ["eeh", *words, "--backend", "fake:pseries"], prog_name="vfio")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "EEH is there on POWER hosts that run on the bare metal (PowerNV)" in result.stderr


@pytest.mark.parametrize("words", [["recover"], ["reset"], ["inject"]])
def test_a_device_that_is_not_on_vfio_pci_says_how_it_gets_there(command: Command, words: list[str]) -> None:
    result = command(*words, DISK, *(["ld-cfg-addr"] if words == ["inject"] else []))
    assert result.exit_code == 1
    assert f"vfio bind {DISK} --group" in result.stderr


def watched(
    backend: FakeBackend,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    script: list[Callable[[], object]],
    *words: str,
) -> Result:
    """What `watch` prints while `script` happens, a step a second, and Ctrl-C ends it."""

    def sleep(self: eeh.Clock, seconds: float) -> None:
        backend.machine.clock.advance(seconds)
        if not script:
            raise KeyboardInterrupt
        script.pop(0)()

    monkeypatch.setattr(eeh.Clock, "sleep", sleep)
    return command("watch", *words)


def test_watch_prints_events_as_they_come_and_ctrl_c_ends_it_well(
    command: Command, backend: FakeBackend, owner: FakeBackend, monkeypatch: pytest.MonkeyPatch, seen: list[str]
) -> None:
    machine = backend.machine
    script: list[Callable[[], object]] = [
        lambda: machine.eeh.freeze(EDU),
        lambda: machine.eeh.thaw(EDU),
        lambda: machine.driver_core.load("nvme"),
        lambda: machine.eeh.freeze(DISK),
        *[lambda: None] * 20,
    ]
    result = watched(backend, command, monkeypatch, script)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = [line.split("  ", 1)[1] for line in result.stdout.splitlines()]
    stopped = f"{EDU}  PHB#1-PE#fd STOPPED: MMIO and DMA are frozen; held by pid {owner.process.pid} "
    assert any(line.startswith(stopped) for line in lines)
    assert any(line.startswith(f"{EDU}  PHB#1-PE#fd NORMAL: MMIO and DMA work") for line in lines)
    assert f"{DISK}  EEH: Frozen PHB#2-PE#fd detected" in lines
    assert lines[-1] == f"{DISK}  EEH: Recovery successful."
    assert not [path for path in seen if path.startswith("/dev/vfio")]
    assert machine.eeh.of(DISK).freeze == "none"  # watching did not keep the host from it


def test_watch_of_one_device_as_json(
    command: Command, backend: FakeBackend, owner: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = backend.machine
    machine.driver_core.load("nvme")
    script = [lambda: machine.eeh.freeze(DISK), lambda: machine.eeh.freeze(EDU), *[lambda: None] * 20]
    result = watched(backend, command, monkeypatch, script, EDU, "--json")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(event["kind"], event["address"]) for event in events] == [("state", EDU)]
    assert events[0]["text"].startswith("PHB#1-PE#fd STOPPED")


def test_watch_ends_with_0_at_a_real_interrupt() -> None:
    words = [sys.executable, "-u", "-m", "vfio_cli.main", "eeh", "watch", "--backend", "fake:power9", "--poll", "0.05"]
    started = subprocess.Popen(
        [*words, "--trace"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ},
        # A shell has its background jobs ignore it, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert started.stderr is not None
    watching = threading.Event()

    def read() -> None:
        for line in started.stderr or ():
            if "/proc" in line or "EAGAIN" in line:
                watching.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert watching.wait(30)
    started.send_signal(signal.SIGINT)
    assert started.wait(30) == 0
    reader.join()
    assert started.stdout is not None
    assert started.stdout.read() == ""
    started.stdout.close()
    started.stderr.close()
