"""Two runs of a program, step by step, up to the first difference: behind it they are in different states."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hwtests.fuzz.execute import Record, Run
from hwtests.fuzz.program import Program, Step


@dataclass(frozen=True)
class Difference:
    """The first step that the two kernels answered differently."""

    program: Program
    at: int
    """Its place in the program."""
    real: Record
    fake: Record

    @property
    def step(self) -> Step:
        return self.program.steps[self.at]

    @property
    def signature(self) -> tuple[str, ...]:
        """What kind of difference it is: two programs with the same one show the same mistake, most likely."""
        what = str(self.step.args.get("request", self.step.op))
        parts = [name for name in _PARTS if self.real.get(name) != self.fake.get(name)]
        return (what, outcome(self.real), outcome(self.fake), *parts[:1])


_PARTS = ("skipped", "raised", "errno", "ret", "out", "data", "buffers", "locked", "ended")


def compare(program: Program, real: Run, fake: Run) -> tuple[Difference | None, int]:
    """The first difference of two runs, and how many calls were compared."""
    compared = 0
    for at, (one, other) in enumerate(zip(real.records, fake.records, strict=False)):
        compared += "skipped" not in one
        if _plain(one) != _plain(other):
            return Difference(program, at, one, other), compared
    done = min(len(real.records), len(fake.records))
    if real.ended or fake.ended or done < len(program.steps):
        last = min(done, len(program.steps) - 1)
        records = (_at(real, last), _at(fake, last))
        return Difference(program, last, *records), compared
    return None, compared


def calls(runs: Iterable[Run]) -> int:
    """How many calls were made."""
    return sum("skipped" not in record for run in runs for record in run.records)


def by_signature(differences: Iterable[Difference]) -> dict[tuple[str, ...], list[Difference]]:
    """Differences of a kind, the shortest program first."""
    found: dict[tuple[str, ...], list[Difference]] = {}
    for each in sorted(differences, key=lambda each: each.at):
        found.setdefault(each.signature, []).append(each)
    return found


def _plain(record: Record) -> Record:
    """A record without the text that an exception has."""
    return {name: value for name, value in record.items() if name != "message"}


def _at(run: Run, number: int) -> Record:
    return run.records[number] if number < len(run.records) else {"ended": run.ended or "no record"}


def outcome(record: Record) -> str:
    """What a step came to, in a word: its errno, why it was not made, or what it returned, most numbers being alike."""
    for name in ("skipped", "raised", "errno", "ended"):
        if name in record:
            return f"{name} {str(record[name]).splitlines()[0]}"
    result = record.get("ret")
    return str(result) if not isinstance(result, int) or -1 < result < 3 else "n"
