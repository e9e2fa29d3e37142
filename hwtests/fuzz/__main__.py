"""The command: fuzz targets of the lab against the model, and print what differs, as short as it gets."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

from hwtests.fuzz import render, sides
from hwtests.fuzz.compare import Difference, by_signature, calls, compare
from hwtests.fuzz.execute import Run
from hwtests.fuzz.facts import Facts
from hwtests.fuzz.generate import generate
from hwtests.fuzz.program import Program
from hwtests.fuzz.shrink import shrink
from hwtests.lab.errors import LabError
from hwtests.lab.progress import Progress
from hwtests.lab.targets import Target, target

_SHOWN = 10  # kinds of differences that are made short and printed


class _Fuzz:
    """One target."""

    def __init__(self, where: Target, report: Progress) -> None:
        self.facts = Facts.of(where.name, where.page_size, where.machine())
        self.lab = sides.Lab(where, self.facts, report.report)

    def programs(self, seed: str, calls: int, steps: int) -> list[Program]:
        return [generate(self.facts, f"{seed}/{number}", steps) for number in range(-(-calls // steps))]

    def fake(self, program: Program) -> Run:
        return sides.fake(self.facts, program)

    def run(self, programs: Sequence[Program], shrinking: bool, record: Path | None) -> bool:
        """Run, compare and print; whether nothing differed."""
        begin = time.monotonic()
        real = self.lab.run(programs)
        if record:
            self._record(record, programs, real)
        middle = time.monotonic()
        fake = [self.fake(program) for program in programs]
        end = time.monotonic()
        compared, differences = 0, []
        for program, one, other in zip(programs, real, fake, strict=True):
            found, count = compare(program, one, other)
            compared += count
            if found is not None:
                differences.append(found)
        click.echo(
            f"{self.facts.target}: {len(programs)} programs, {calls(real)} calls made, {compared} compared, "
            f"{len(differences)} differences ({middle - begin:.0f} s in the lab, {end - middle:.0f} s modelled)"
        )
        for line in self.lab.harm:
            click.echo(f"the kernel was hurt: {line}")
        self._show(differences, shrinking)
        return not differences and not self.lab.harm

    def _record(self, path: Path, programs: Sequence[Program], real: Sequence[Run]) -> None:
        """Add what the real kernel answered to a file, for the tests of the model."""
        with path.open("a", encoding="utf-8") as file:
            for program, run in zip(programs, real, strict=True):
                entry = {"target": self.facts.target, "program": json.loads(program.dumps()), "records": run.records}
                file.write(json.dumps(entry, separators=(",", ":")) + "\n")

    def _show(self, differences: Sequence[Difference], shrinking: bool) -> None:
        kinds = by_signature(differences)
        for signature, same in kinds.items():
            click.echo(f"{len(same):5} {' / '.join(signature)}")
        shown = [same[0] for same in kinds.values()][:_SHOWN]
        if len(kinds) > len(shown):
            click.echo(f"the first {len(shown)} of these {len(kinds)} kinds:")
        if shrinking and shown:
            shown = shrink(shown, self.lab.run, self.fake)
        for found in shown:
            click.echo(f"\n{' / '.join(found.signature)}")
            for line in render.difference(found):
                click.echo(line)
            click.echo(found.program.dumps())


@click.command()
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@click.option("--calls", type=click.IntRange(1), default=20000, show_default=True, help="Calls to make on each target.")
@click.option("--seed", help="Of the programs; the default is a new one each time.")
@click.option("--steps", type=click.IntRange(8), default=60, show_default=True, help="Steps of a program.")
@click.option("--replay", type=click.Path(exists=True, path_type=Path), help="Run the programs of this file instead.")
@click.option("--record", type=click.Path(dir_okay=False, path_type=Path), help="Add the real answers to this file.")
@click.option("--shrink/--no-shrink", "shrinking", default=True, help="Whether to make programs short.")
def main(
    targets: tuple[str, ...],
    calls: int,
    seed: str | None,
    steps: int,
    replay: Path | None,
    record: Path | None,
    shrinking: bool,
) -> None:
    """Run random programs on each TARGET of the lab and on the model of it; print where they differ.

    Exit status 1 if anything did. `python -m hwtests.lab targets` lists the targets. A program is printed as C and as
    a line of JSON; lines of JSON in a file can be replayed, and replayed ones recorded as tests of the model:

    \b
      python -m hwtests.fuzz powernv8 --replay found.jsonl --record simtests/fuzz_corpus.jsonl
    """
    seed = seed or secrets.token_hex(4)
    fine = True
    try:
        with Progress() as progress:
            for name in targets:
                fuzz = _Fuzz(target(name), progress)
                if replay:
                    programs = list(map(Program.loads, replay.read_text().splitlines()))
                else:
                    click.echo(f"{name}: seed {seed}")
                    programs = fuzz.programs(seed, calls, steps)
                fine &= fuzz.run(programs, shrinking, record)
    except LabError as error:
        raise click.ClickException(str(error)) from error
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
