"""Time, as recovery and watching need it; a test gives them the clock of a modelled machine instead."""

from __future__ import annotations

import select
import time
from collections.abc import Sequence


class Clock:
    """The clock of this process.  All times are in seconds."""

    def now(self) -> float:
        """Seconds since some moment; never goes back."""
        return time.monotonic()

    def date(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        time.sleep(seconds)

    def wait(self, fds: Sequence[int], seconds: float) -> list[int]:
        """The descriptors of `fds` that can be read: at once, or as soon as one can; none after `seconds`."""
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLIN)
        return [fd for fd, _ in poll.poll(seconds * 1000)]


SYSTEM = Clock()
