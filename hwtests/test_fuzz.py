"""Random programs do the same on this kernel and on the model of it; `python -m hwtests.fuzz` makes far more calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from hwtests.devices import bound
from hwtests.fuzz import render, sides
from hwtests.fuzz.compare import compare
from hwtests.fuzz.facts import Facts
from hwtests.fuzz.generate import generate
from hwtests.fuzz.guest import Runner

if TYPE_CHECKING:
    from hwtests.lab.targets import System
    from vfio.backend import Backend

pytestmark = [pytest.mark.lab_only, pytest.mark.fresh]  # other tests leave traces in configuration space

_PROGRAMS, _STEPS = 15, 100


@pytest.fixture
def facts(target: System) -> Facts:
    assert target.topology is not None
    return Facts.of(target.name, target.page_size, target.topology)


@pytest.fixture
def runner(backend: Backend, facts: Facts) -> Iterator[Runner]:
    """Runs programs on this kernel."""
    with bound(backend, *(each.address for each in facts.endpoints)):
        yield Runner(backend, facts)


def test_random_programs_do_the_same_on_the_model(runner: Runner, facts: Facts) -> None:
    calls = 0
    for number in range(_PROGRAMS):
        program = generate(facts, f"hwtests/{number}", _STEPS)
        difference, compared = compare(program, runner.run(program), sides.fake(facts, program))
        assert difference is None, "\n" + "\n".join(render.difference(difference))
        calls += compared
    assert calls > _PROGRAMS * _STEPS * 3 // 4


def test_a_program_finds_the_machine_as_the_one_before_it_did(runner: Runner, facts: Facts) -> None:
    programs = [generate(facts, f"again/{number}", 60) for number in range(4)]
    assert [runner.run(each) for each in programs] == [runner.run(each) for each in programs]
