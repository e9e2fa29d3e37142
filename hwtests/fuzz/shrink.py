"""Makes the programs of differences short, many candidates at a time, because a boot costs more than a hundred runs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hwtests.fuzz.compare import Difference, compare, outcome
from hwtests.fuzz.execute import Run
from hwtests.fuzz.program import Program, Step

ROUNDS = 8
_CANDIDATES = 24  # of a difference in a round, to be run on the real kernel
_TRIED = 400  # on the model, which is quick, to find them

Real = Callable[[Sequence[Program]], list[Run]]
Fake = Callable[[Program], Run]


@dataclass
class _Case:
    best: Difference
    signature: tuple[str, ...]
    done: bool = False


def shrink(differences: Sequence[Difference], real: Real, fake: Fake, rounds: int = ROUNDS) -> list[Difference]:
    """For each difference one of the same kind whose program is as short as `rounds` rounds can make it.

    A round makes many shorter programs of every difference, runs those on the real kernel to whose last step the model
    still gives its answer, and goes on from the shortest that still shows the difference.
    """
    cases = [_Case(each, each.signature) for each in map(_cut, differences)]
    for number in range(rounds):
        batch = [
            (case, candidate, run)
            for case in cases
            if not case.done
            for candidate, run in _promising(case, fake, random.Random(number))
        ]
        if not batch:
            break
        before = [case.best for case in cases]
        for (case, candidate, other), one in zip(batch, real([candidate for _, candidate, _ in batch]), strict=True):
            found, _ = compare(candidate, one, other)
            if found is not None and found.signature == case.signature:
                found = _cut(found)
                if _cost(found.program) < _cost(case.best.program):
                    case.best = found
        for case, old in zip(cases, before, strict=True):
            case.done = case.best is old
    return [case.best for case in cases]


def _promising(case: _Case, fake: Fake, rng: random.Random) -> Iterator[tuple[Program, Run]]:
    """Candidates at whose end the model does what it did, and its runs of them."""
    found = 0
    for candidate in itertools.islice(_candidates(case.best.program, rng), _TRIED):
        run = fake(candidate)
        if len(run.records) == len(candidate.steps) and outcome(run.records[-1]) == outcome(case.best.fake):
            yield candidate, run
            found += 1
            if found == _CANDIDATES:
                return


def _cut(difference: Difference) -> Difference:
    """Without the steps behind the difference."""
    program = difference.program.with_steps(difference.program.steps[: difference.at + 1])
    return replace(difference, program=program)


def _cost(program: Program) -> tuple[int, int]:
    return len(program.steps), len(program.dumps())


def _candidates(program: Program, rng: random.Random) -> Iterator[Program]:
    """Shorter or plainer programs that end with the same step, the boldest first."""
    seen = {program.dumps()}
    for each in _all_candidates(program, rng):
        if (text := each.dumps()) not in seen:
            seen.add(text)
            yield each


def _all_candidates(program: Program, rng: random.Random) -> Iterator[Program]:
    steps = program.steps
    last = len(steps) - 1
    needed = _needed(steps)
    yield program.with_steps(step for step in steps if step.id in needed)
    for share in (0.7, 0.5, 0.3) * 4:
        gone = {step.id for step in steps[:last] if rng.random() < share}
        yield program.with_steps(step for step in steps if step.id not in gone)
    if program.memlock is not None:
        yield replace(program, memlock=None)
    for size in (last // 2, last // 4, last // 8):  # runs of steps
        if size > 1:
            for start in range(0, last, size):
                yield program.with_steps(steps[:start] + steps[min(start + size, last) :])
    for at in range(last):
        yield program.with_steps(steps[:at] + steps[at + 1 :])
    if last < 16:
        for at, step in enumerate(steps):
            for plainer in _plainer(step):
                yield program.with_steps((*steps[:at], plainer, *steps[at + 1 :]))
        for at in range(last):
            for other in range(at):
                yield program.with_steps(step for number, step in enumerate(steps) if number not in (at, other))


def _needed(steps: Sequence[Step]) -> set[int]:
    """The last step, the steps whose results it takes, and all that was done to the same descriptors."""
    needed = {steps[-1].id} | steps[-1].uses()
    while True:
        more = {each for step in steps for each in (step.id, *step.uses()) if step.id in needed or step.uses() & needed}
        if more <= needed:
            return needed
        needed |= more


def _plainer(step: Step) -> Iterator[Step]:
    """The step with one operand made simpler."""

    def changed(**args: Any) -> Step:
        return Step(step.id, step.op, {**step.args, **args})

    if step.args.get("by") in ("address", "end", "readonly") and "cut" not in step.args:
        yield changed(by="buffer") if _fits(step) else changed(by="address")
    struct = step.args.get("struct", {})
    for name, value in struct.items():
        if isinstance(value, list) and value[0] == "buffer" and value[2]:
            yield changed(struct={**struct, name: ["buffer", value[1], 0]})
        elif isinstance(value, int) and name not in ("argsz", "op", "index", "page_shift"):
            for simpler in {0, 4096, value >> 12 << 12, value & -value} - {value}:
                if simpler < value:
                    yield changed(struct={**struct, name: simpler})


def _fits(step: Step) -> bool:
    argsz = step.args.get("struct", {}).get("argsz", 0)
    return isinstance(argsz, int) and argsz <= 64
