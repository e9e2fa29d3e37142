"""Fixtures that mean the same on the fake and on a real kernel; both conftests take them from here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from simtests.conformance.areas import Area
from simtests.conformance.freezing import KernelMessages
from simtests.conformance.raw import TYPE1, TYPE1_V2, V1, V2, Container, Member, Program, iommu_types
from vfio.backend import Backend

if TYPE_CHECKING:
    from hwtests.lab.targets import System
    from simtests.conformance.conftest import FakeTarget

__all__ = [
    "EVERY_TYPE",
    "PC",
    "POWER",
    "area",
    "kernel_messages",
    "native",
    "other_program",
    "program",
    "runs_on",
    "v1",
    "v2",
]

POWER = pytest.mark.power
PC = pytest.mark.targets("q35")
EVERY_TYPE = [
    *(pytest.param(number, marks=POWER) for number in (V1, V2)),
    *(pytest.param(number, marks=PC) for number in (TYPE1, TYPE1_V2)),
]
"""The IOMMU types that a container can have, each where there are machines that have it."""


def runs_on(item: pytest.Item, target: str) -> bool:
    """Whether a case is for a target of the lab: for those that its marks name, and for q35 if it is not about POWER.

    The target `noiommu` is for the cases that name it alone.
    """
    marks = list(item.iter_markers("targets"))
    if (target == "q35" and item.get_closest_marker("power")) or (target == "noiommu" and not marks):
        return False
    return all(target in mark.args for mark in marks)


@pytest.fixture
def program(backend: Backend, target: System | FakeTarget) -> Iterator[Program]:
    """This process, making raw calls.  Nothing is open or locked before, nor after."""
    program = Program(backend, iommu_types(target.platform))
    assert program.locked == 0
    yield program
    program.close_all()


@pytest.fixture
def v1(program: Program, member: Member) -> Container:
    """A container with one group, sPAPR TCE v1."""
    return program.attached(member, V1)


@pytest.fixture
def v2(program: Program, member: Member) -> Container:
    """A container with one group, sPAPR TCE v2."""
    return program.attached(member, V2)


@pytest.fixture
def native(program: Program, member: Member) -> Container:
    """A container with one group, of the machine's own IOMMU model: sPAPR TCE v2 on POWER, Type1v2 on a PC."""
    return program.attached(member)


@pytest.fixture
def area(backend: Backend) -> Iterator[Callable[..., Area]]:
    """Makes ranges of host pages, with what the seam has no calls for: holes and rights."""
    made: list[Area] = []

    def make(pages: int, alignment: int | None = None) -> Area:
        made.append(Area(pages, backend.page_size, alignment))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def other_program(another_process: Callable[..., Any], target: System | FakeTarget) -> Callable[..., Program]:
    """Starts other processes that make raw calls; they exit when the case ends.

    Options: `uid`, `groups` (in which it is; None: the user's own alone), `memlock` (RLIMIT_MEMLOCK, bytes), `ipc_lock`
    (CAP_IPC_LOCK; None: as root has it).
    """
    return lambda **options: Program(another_process(**options), iommu_types(target.platform))


@pytest.fixture
def kernel_messages(backend: Backend) -> Iterator[KernelMessages]:
    """What the kernel says from here on."""
    messages = KernelMessages(backend)
    yield messages
    messages.close()
