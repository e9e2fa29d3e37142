"""The clock for recovery: the machine's own on the fake, where nothing waits, else the real one."""

from __future__ import annotations

from collections.abc import Sequence

from vfio import eeh
from vfio.backend import Backend
from vfio.fake.backend import FakeBackend
from vfio.fake.clock import Clock


class MachineClock(eeh.Clock):
    """Virtual seconds; who waits lets them pass."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def now(self) -> float:
        return self.clock.now()

    def date(self) -> float:
        return self.clock.now()

    def sleep(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def wait(self, fds: Sequence[int], seconds: float) -> list[int]:
        ready = super().wait(fds, 0)
        if not ready:
            self.sleep(seconds)
        return ready


def of(backend: Backend) -> eeh.Clock:
    """The clock of the machine behind a backend."""
    made = backend.unwrapped()
    return MachineClock(made.machine.clock) if isinstance(made, FakeBackend) else eeh.Clock()
