"""The two kernels that a program is run on: the real one in the lab, and the modelled one in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from hwtests.fuzz import setting
from hwtests.fuzz.execute import Executor, Run
from hwtests.fuzz.facts import Facts
from hwtests.fuzz.program import Program
from hwtests.lab import frames, machine
from hwtests.lab.targets import Target
from vfio.backend import Backend, open_backend

_BOOTS = 5  # of one run: a program that ends the machine costs one
_HARM = ("Oops", "BUG:", "soft lockup", "Kernel panic", "KASAN", "list_del corruption", "refcount_t")


class Lab:
    """The real kernel of a target."""

    def __init__(self, target: Target, facts: Facts, report: Callable[[str], None]) -> None:
        self._target = target
        self._facts = facts
        self._report = report
        self.harm: list[str] = []
        """Lines of the kernel log that say that a kernel was hurt."""

    def run(self, programs: Sequence[Program], timeout: float = 3600.0) -> list[Run]:
        """Run all of them, in one machine if none of them ends it. Raises LabError."""
        runs = [Run() for _ in programs]
        first = 0
        for _ in range(_BOOTS):
            if first == len(programs):
                break
            first += self._boot(programs[first:], runs[first:], timeout)
        for run in runs[first:]:
            run.ended = "not run"
        return runs

    def _boot(self, programs: Sequence[Program], runs: Sequence[Run], timeout: float) -> int:
        """How many of them are done: all, or those up to the one that ended the machine."""
        text = "\n".join((json.dumps(self._facts.to_json()), *(program.dumps() for program in programs)))
        options = machine.Options(lab_files={"programs": text})
        partial, said = b"", b""
        current, done = -1, 0

        def sink(channel: str, payload: bytes) -> None:
            nonlocal partial, said, current, done
            if channel != frames.RECORD:
                said = (said + payload)[-4000:]
                return
            *lines, partial = (partial + payload).split(b"\n")
            for number, *rest in map(json.loads, lines):
                current = number
                if not rest:
                    self._report(f"{self._target.name}: program {number + 1} of {len(programs)}")
                    continue
                done = number + 1
                runs[number].records, runs[number].ended = rest

        command = ["python3", "-m", "hwtests.fuzz.guest", "/lab/programs"]
        why = "the command ended early"
        try:
            outcome = machine.run(self._target, command, sink, self._report, options, timeout)
        except machine.MachineDied as error:
            why = str(error)
        else:
            self.harm += [line for line in outcome.kernel_log.splitlines() if any(word in line for word in _HARM)]
            if outcome.timed_out:
                why = f"no end after {timeout:g} s\n{outcome.stuck}"
        if done < len(programs):
            failed = max(current, done)
            runs[failed].ended = f"{why}\n{said.decode('utf-8', 'replace')}"
            return failed + 1
        return done


def fake(facts: Facts, program: Program) -> Run:
    """Run a program on a modelled machine that is new."""
    return run_here(facts, program, modelled(facts, program))


def run_here(facts: Facts, program: Program, backend: Backend) -> Run:
    """Run a program in this process."""
    executor = Executor(backend, facts, program)
    try:
        return Run(list(executor.run()))
    finally:
        executor.close()


def modelled(facts: Facts, program: Program) -> Backend:
    """A process, limited as the program wants it, of a modelled machine that is new."""
    backend = open_backend(facts.fake)
    setting.bind(backend, facts)
    if program.memlock is None:
        return backend
    return backend.another_process(memlock=program.memlock, ipc_lock=False)  # type: ignore[attr-defined,no-any-return]
