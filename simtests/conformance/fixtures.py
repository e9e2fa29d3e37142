"""Fixtures that mean the same on the fake and on a real kernel; both conftests take them from here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from simtests.conformance.areas import Area
from simtests.conformance.freezing import KernelMessages
from simtests.conformance.raw import V1, V2, Container, Member, Program
from vfio.backend import Backend

__all__ = ["area", "kernel_messages", "other_program", "program", "v1", "v2"]


@pytest.fixture
def program(backend: Backend) -> Iterator[Program]:
    """This process, making raw calls.  Nothing is open or locked before, nor after."""
    program = Program(backend)
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
def other_program(another_process: Callable[..., Any]) -> Callable[..., Program]:
    """Starts other processes that make raw calls; they exit when the case ends.

    Options: `uid`, `groups` (in which it is; None: the user's own alone), `memlock` (RLIMIT_MEMLOCK, bytes), `ipc_lock`
    (CAP_IPC_LOCK; None: as root has it).
    """
    return lambda **options: Program(another_process(**options))


@pytest.fixture
def kernel_messages(backend: Backend) -> Iterator[KernelMessages]:
    """What the kernel says from here on."""
    messages = KernelMessages(backend)
    yield messages
    messages.close()
