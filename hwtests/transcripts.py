"""Transcripts: what each conformance case asked a real kernel, and what the kernel answered.

    python -m hwtests.transcripts record powernv8 [powernv8-64k ...]

runs the conformance cases in the lab and stores ``simtests/transcripts/TARGET.jsonl.gz``, one file a target, from which
`simtests/test_transcripts.py` makes the same calls to the fake and compares the answers.  Record again after a case was
added or changed, or for another kernel; nothing is stored of a target where a case fails.

A file is JSON lines.  The first tells target, kernel and page size, and the cases that are left out, with the reason.
For each case there is a line with its name and the state it began in, then one for each call, as
`vfio.backends.trace.JsonTrace` writes them, in the order in which the calls ended.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from vfio import sysfs
from vfio.backend import Backend
from vfio.backends.call import Call
from vfio.backends.call_json import json_record
from vfio.backends.surroundings import Surroundings
from vfio.backends.trace import TraceBackend

if TYPE_CHECKING:
    from hwtests.lab.targets import System
    from hwtests.processes import OtherProcess

T = TypeVar("T")

DIRECTORY = Path("simtests/transcripts")
SUFFIX = ".jsonl.gz"
LONGEST = 3000
"""Calls of a case that is recorded: one that tries every byte of something says in its own tables what it found."""

_PROPERTY = "transcript"
_FILES = "hwtests/test_conformance_*.py"


# --- In the guest ---


class _Records:
    """The calls of one case."""

    def __init__(self) -> None:
        self.calls: list[dict[str, object]] = []

    def write(self, call: Call) -> None:
        record = json_record(call)
        del record["ns"]  # never the same twice
        self.calls.append(record)

    def reason_against(self, item: pytest.Item) -> str:
        """Why the case cannot be kept; empty if it can."""
        if mark := item.get_closest_marker("not_recorded"):
            return str(mark.args[0])
        if any("overlaps" in record for record in self.calls):
            return "calls were under way at the same time"
        if len(self.calls) > LONGEST:
            return f"{len(self.calls)} calls"
        return ""


class TracedProcess(TraceBackend):
    """Another process of a case, its calls told together with those of the first."""

    def __init__(self, origin: TraceBackend, inner: OtherProcess, sink: _Records, options: dict[str, object]) -> None:
        super().__init__(inner, sink, Surroundings(inner.pid), origin)
        self._origin, self._other = origin, inner
        origin.tell("another_process", (options,), lambda: self.process)

    def receive(self, fd: int) -> int:
        """As `OtherProcess.receive`."""
        return self.tell("receive", (self._origin.named(fd),), lambda: self._other.receive(fd))

    def give(self, fd: int) -> int:
        """As `OtherProcess.give`."""
        return self.tell("give", (self.named(fd),), lambda: self._other.give(fd))

    @property
    def pid(self) -> int:
        return self._other.pid

    def kill(self) -> None:
        """As `OtherProcess.kill`."""
        self.tell("kill", (), self._other.kill)

    def exit(self) -> None:
        """As `OtherProcess.exit`."""
        self.tell("exit", (), self._other.exit)


@contextlib.contextmanager
def recorded(real: Backend, item: pytest.Item, target: System) -> Iterator[Backend]:
    """The kernel of a case that is recorded; the record leaves with the report of its teardown.

    What is not to be recorded is not slowed down either.
    """
    records = _Records()
    start = _state(real, target)
    yield real if item.get_closest_marker("not_recorded") else TraceBackend(real, records, Surroundings())
    reason = records.reason_against(item)
    item.user_properties.append(
        (_PROPERTY, {"start": start, "left_out": reason, "calls": [] if reason else records.calls})
    )


def also(backend: Backend, other: OtherProcess, **options: object) -> OtherProcess | TracedProcess:
    """Another process, recorded if the first one is."""
    if not isinstance(backend, TraceBackend):
        return other
    sink = backend.sink
    assert isinstance(sink, _Records)
    return TracedProcess(backend, other, sink, options)


def tell(backend: Backend, what: str, name: str, make: Callable[[], T]) -> T:
    """Do something that is no call of the seam, but that a replay has to do as well."""
    if isinstance(backend, TraceBackend):
        return backend.tell(what, (name,), make)
    return make()


def _state(real: Backend, target: System) -> dict[str, object]:
    """How the machine and the process are when a case begins."""
    assert target.topology is not None
    addresses = [device.address for device in target.topology.devices]
    locked = real.locked()
    return {
        "drivers": {address: sysfs.driver_of(real, address) for address in addresses},
        "overrides": {address: sysfs.override_of(real, address) for address in addresses},
        "memlock": locked.limit,
        "ipc_lock": locked.unlimited,
        "locked": locked.locked,
        "kernel": sysfs.kernel_release(real),
        "page_size": real.page_size,
    }


# --- On the host ---


class Writer:
    """Collects the transcripts that reports bring, and stores them when all cases of a target have passed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._found: dict[str, dict[str, Any]] = {}
        self._failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name, target = _case(report.nodeid)
        if report.failed:
            self._failed.add(target)
        for key, value in report.user_properties:
            if key == _PROPERTY and report.when == "teardown":
                assert isinstance(value, dict)
                self._found.setdefault(target, {})[name] = value

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("transcripts")
        for target, cases in self._found.items():
            if target in self._failed:
                terminalreporter.line(f"{target}: a case failed, nothing was stored")
                continue
            if all(case["left_out"] for case in cases.values()):
                continue  # or not of a target at all: a case's parameter may come before it
            path = self._directory / f"{target}{SUFFIX}"
            size = store(path, target, cases)
            calls = sum(len(case["calls"]) for case in cases.values())
            left_out = sum(bool(case["left_out"]) for case in cases.values())
            terminalreporter.line(
                f"{path}: {len(cases) - left_out} cases, {calls} calls, {size >> 10} KiB; {left_out} cases left out"
            )


def _case(nodeid: str) -> tuple[str, str]:
    """Name of the case without its target, and the target: `pci_info::test_x[0]`, `powernv8`."""
    file, _, name = nodeid.partition("::")
    module = Path(file).stem.removeprefix("test_conformance_")
    name, bracket, parameters = name.partition("[")
    target, _, rest = parameters.removesuffix("]").partition("-")
    if rest.partition("-")[0] == "64k":  # part of the target's name
        target, rest = f"{target}-64k", rest.partition("-")[2]
    return f"{module}::{name}" + (f"[{rest}]" if bracket and rest else ""), target


def store(path: Path, target: str, cases: dict[str, dict[str, Any]]) -> int:
    """Write the file of a target; returns its size in bytes."""
    first = next(iter(cases.values()))["start"]
    header = {
        "target": target,
        "kernel": first["kernel"],
        "page_size": first["page_size"],
        "left_out": {name: case["left_out"] for name, case in cases.items() if case["left_out"]},
    }
    lines: list[object] = [header]
    for name, case in cases.items():
        if not case["left_out"]:
            start = {key: value for key, value in case["start"].items() if key not in ("kernel", "page_size")}
            lines += [{"case": name, "start": start}, *case["calls"]]
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = gzip.compress(text.encode(), 9, mtime=0)
    path.write_bytes(data)
    return len(data)


def main(words: list[str]) -> int:
    """The command."""
    if len(words) < 2 or words[0] != "record":
        print(__doc__, file=sys.stderr)
        return 2
    root = Path(__file__).parents[1]
    files = [str(path.relative_to(root)) for path in sorted(root.glob(_FILES))]
    status = 0
    for target in words[1:]:
        command = [sys.executable, "-m", "pytest", "-q", f"--transcripts={DIRECTORY}", "--lab", target, *files]
        status = subprocess.run(command, cwd=root, env=os.environ).returncode or status
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
