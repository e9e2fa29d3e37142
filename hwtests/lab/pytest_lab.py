"""`pytest hwtests --lab TARGET`: the host's half. Tests run in a guest and are reported here, one by one.

The host collects as usual, with a `target` parameter; the chosen items of one target go to one machine, whose pytest
(`hwtests.lab.pytest_guest`) sends its reports back in frames. Here they go through the same hooks as local ones, so
that -v, -x, --junit-xml, --lf and the like work.
"""

import json
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from hwtests.lab import frames, machine
from hwtests.lab.errors import LabError
from hwtests.lab.progress import Progress
from hwtests.lab.targets import Target, target

_TAIL = 4000  # characters of the guest's output to show when it failed
_BOOTS = 4  # of one target: a test that kills the machine costs one

_COLLECTING = 420.0
"""Seconds more that the guest's pytest may take to begin with its first test: it compiles all of them, emulated."""


class LabPlugin:
    """Runs the items of each target in a machine of that target."""

    def __init__(self, config: pytest.Config, targets: Sequence[str], timeout: float) -> None:
        self._config = config
        self._timeout = timeout
        self.targets = {name: target(name) for name in targets}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        option = session.config.option
        if option.collectonly or (session.testsfailed and not option.continue_on_collection_errors):
            return None  # pytest's own loop knows what to do
        local = [item for item in session.items if target_of(item) not in self.targets]
        for number, item in enumerate(local, start=1):
            following = local[number] if number < len(local) else None
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            obey(session)
        for one in self.targets.values():
            items = [item for item in session.items if target_of(item) == one.name]
            if items:
                _TargetRun(session, one, items, self._timeout).run()
        return True

    def pytest_report_header(self) -> str:
        return "lab: " + ", ".join(f"{one.name} ({one.description})" for one in self.targets.values())


def target_of(item: pytest.Item) -> str | None:
    """The target that `item` is meant for; None on the host."""
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("target") if callspec else None


def obey(session: pytest.Session) -> None:
    """Stop where pytest's own loop would."""
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)


@dataclass
class _TargetRun:
    """The items of one target, and what became of them."""

    session: pytest.Session
    target: Target
    items: list[pytest.Item]
    timeout: float
    done: set[str] = field(default_factory=set)
    current: str | None = None  # node ID of the test that is running
    phases: set[str] = field(default_factory=set)  # of it, that were reported
    booted: machine.Session | None = None

    def run(self) -> None:
        """Boot as often as it takes, within reason."""
        for boot in range(1, _BOOTS + 1):
            left = [item for item in self.items if item.nodeid not in self.done]
            if not left:
                return
            finished = len(self.done)
            why = self._boot(left)
            if self.current is not None:  # the machine died, or was stopped, in this test
                self._failed(self.current, why)
            elif len(self.done) == finished or boot == _BOOTS:
                break
        for item in self.items:
            if item.nodeid not in self.done:
                self._failed(item.nodeid, f"not run on {self.target.name}: {why}")

    def _boot(self, items: list[pytest.Item]) -> str:
        """Run `items` in a new machine until they are done, one kills it, or time is up; why there were no more."""
        said = {frames.OUTPUT: "", frames.ERROR: ""}
        records = _Lines()

        def sink(channel: str, payload: bytes) -> None:
            if channel == frames.RECORD:
                for record in records.feed(payload):
                    self._record(record)
                return
            text = payload.decode("utf-8", "replace")
            said[channel] = (said[channel] + text)[-_TAIL:]
            if self.session.config.option.capture == "no":
                print(text, end="", flush=True)

        if reporter := self.session.config.pluginmanager.get_plugin("terminalreporter"):
            reporter.ensure_newline()
        try:
            with Progress() as progress:
                plan = machine.Options(lab_files={"items": "".join(f"{item.nodeid}\n" for item in items)})
                with machine.session(self.target, self._command(items), progress.report, plan) as booted:
                    self.booted = booted
                    booted.wait_ready()
                    progress.report("")
                    outcome = booted.run(sink, self.timeout + _COLLECTING)
        except LabError as error:
            return str(error)
        log = f"\n\nkernel log:\n{outcome.kernel_log}" if outcome.kernel_log else ""
        if outcome.timed_out:
            return f"no end after {self.timeout:g} s\n\n{said[frames.ERROR]}\nin the kernel:\n{outcome.stuck}{log}"
        tail = said[frames.OUTPUT] + said[frames.ERROR]
        return f"the guest's pytest ended with status {outcome.status}\n\n{tail}{log}"

    def _command(self, items: list[pytest.Item]) -> list[str]:
        option = self.session.config.option
        files = sorted({item.nodeid.partition("::")[0] for item in items})
        words = ["python3", "-m", "pytest", "-p", "no:cacheprovider", f"--tb={option.tbstyle}"]
        if option.capture == "no":
            words.append("-s")
        if option.showlocals:
            words.append("-l")
        if option.verbose > 0:
            words.append("-" + "v" * option.verbose)
        if option.transcripts:
            words.append("--transcripts=.")
        return [*words, f"--lab-guest={self.target.name}", *files]

    def _record(self, record: dict[str, object]) -> None:
        """Replay what the guest's pytest went through."""
        hook = self.session.config.hook
        assert self.booted is not None
        self.booted.deadline = time.monotonic() + self.timeout
        match record["event"]:
            case "start":
                self.current, self.phases = str(record["nodeid"]), set()
                hook.pytest_runtest_logstart(nodeid=self.current, location=self._location(self.current))
            case "report":
                report = hook.pytest_report_from_serializable(config=self.session.config, data=record["data"])
                if isinstance(report.longrepr, list):  # a skip's place and reason, which JSON makes a list
                    report.longrepr = tuple(report.longrepr)
                self.phases.add(report.when)
                hook.pytest_runtest_logreport(report=report)
            case "finish":
                nodeid, self.current = str(record["nodeid"]), None
                self.done.add(nodeid)
                hook.pytest_runtest_logfinish(nodeid=nodeid, location=self._location(nodeid))
                obey(self.session)
            case "warning":
                category = type(str(record["category"]), (UserWarning,), {})
                text, file, line = str(record["text"]), str(record["file"]), int(str(record["line"]))
                message = warnings.WarningMessage(category(text), category, file, line)
                hook.pytest_warning_recorded.call_historic(
                    kwargs={
                        "warning_message": message,
                        "nodeid": str(record["nodeid"]),
                        "when": "runtest",
                        "location": None,
                    }
                )

    def _failed(self, nodeid: str, why: str) -> None:
        """Report a test that cannot report itself any more."""
        hook, location = self.session.config.hook, self._location(nodeid)
        if self.current is None:
            self.phases = set()
            hook.pytest_runtest_logstart(nodeid=nodeid, location=location)
        self.current = None
        self.done.add(nodeid)
        when = "call" if "setup" in self.phases else "setup"
        for phase, text in ((when, why), ("teardown", None)):
            if phase in self.phases:
                continue
            hook.pytest_runtest_logreport(
                report=pytest.TestReport(
                    nodeid=nodeid,
                    location=location,
                    keywords={},
                    outcome="failed" if text else "passed",
                    longrepr=text,
                    when=phase,  # type: ignore[arg-type]
                )
            )
        hook.pytest_runtest_logfinish(nodeid=nodeid, location=location)
        obey(self.session)

    def _location(self, nodeid: str) -> tuple[str, int | None, str]:
        return next(item.location for item in self.items if item.nodeid == nodeid)


class _Lines:
    """JSON lines from pieces of any size."""

    def __init__(self) -> None:
        self._partial = b""

    def feed(self, data: bytes) -> Iterator[dict[str, object]]:
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            yield json.loads(line)
