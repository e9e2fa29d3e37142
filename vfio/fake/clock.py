"""Time on the modelled machine."""

from __future__ import annotations


class Clock:
    """Virtual seconds since boot: it stands still until it is moved, so that nothing in a test waits."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass: what a driver would have slept, or what a test wants to be over."""
        if seconds < 0:
            raise ValueError(f"time does not go back ({seconds} s)")
        self._now += seconds
