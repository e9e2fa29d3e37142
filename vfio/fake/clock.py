"""Time on the modelled machine."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from itertools import count


class Clock:
    """Virtual seconds since boot: it stands still until it is moved, so that nothing in a test waits.

    That of a served machine goes with real time from `follow` on, as often as somebody calls `catch_up`.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._behind: float | None = None
        """Real time less this one's, while it follows."""

    def now(self) -> float:
        return self._now

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Let `call` be made when `seconds` more have passed; of several that are due, the earliest is first."""
        heapq.heappush(self._timers, (self._now + seconds, next(self._numbers), call))

    def follow(self) -> None:
        """Go with real time."""
        self._behind = time.monotonic() - self._now

    def catch_up(self) -> None:
        """Let the real time that has passed pass here too; nothing, unless it follows."""
        if self._behind is not None:
            self._pass(max(self._now, time.monotonic() - self._behind))

    def due(self) -> float | None:
        """Seconds until something is to happen by itself; None while time stands still, or nothing is."""
        if self._behind is None or not self._timers:
            return None
        return max(0.0, self._timers[0][0] - (time.monotonic() - self._behind))

    def advance(self, seconds: float) -> None:
        """Let time pass: what a driver would have slept, or what a test wants to be over."""
        if seconds < 0:
            raise ValueError(f"time does not go back ({seconds} s)")
        if self._behind is not None:
            self._behind -= seconds
        self._pass(self._now + seconds)

    def _pass(self, until: float) -> None:
        while self._timers and self._timers[0][0] <= until:
            due, _, call = heapq.heappop(self._timers)
            self._now = max(self._now, due)
            call()
        self._now = max(self._now, until)
