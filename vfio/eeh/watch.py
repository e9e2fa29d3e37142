"""Notice that a PE froze.

Three things tell: a register that reads all ones (a driver says so with `Watch.check`), the ERR and REQ interrupts where
they come, and GET_STATE, which is asked now and then.  For a device in use the host itself may say nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Literal, NamedTuple

from vfio import errors
from vfio.closing import Closing
from vfio.eeh import operations
from vfio.eeh.clock import SYSTEM, Clock
from vfio.eeh.operations import Answer
from vfio.eeh.state import PeStatus, State

if TYPE_CHECKING:
    from vfio.device import Device
    from vfio.irq import Irq, Vectors

POLL = 1.0
"""Seconds between two GET_STATE calls."""

How = Literal["read", "ERR", "REQ", "poll"]


class Notice(NamedTuple):
    """Something happened to the PE of a watched device."""

    device: Device
    how: How
    """An all-ones ``read``, the ``ERR`` or ``REQ`` interrupt, or a ``poll`` of GET_STATE."""
    state: State
    """At that moment; NORMAL is possible with ERR and REQ only."""
    group: int | None
    """Whose PE it is, in a container of several groups; None where that is not known."""
    pe: PeStatus | None

    @property
    def frozen(self) -> bool:
        return self.state is not State.NORMAL

    def __str__(self) -> str:
        words = {
            "read": "a register read all ones",
            "ERR": "the ERR interrupt fired",
            "REQ": "the REQ interrupt fired: the host wants the device back",
            "poll": "GET_STATE was asked",
        }[self.how]
        return f"{self.device.address}: {words}, the state is {self.state.name}"


class Watch(Closing):
    """Watches the PE of an open device, asking GET_STATE every `poll` seconds.

        with Watch(device) as watch:
            for notice in watch:  # or: async for
                if notice.frozen:
                    print(eeh.recover(device, driver, noticed=str(notice)))

    A freeze is told once; the next one is told after the state was NORMAL again.  ERR and REQ are enabled as long as it
    watches, where the device has them and nobody else has enabled them.  Any thread may call `check` and `close`; one
    iterates.  Raises `errors.NoEeh` where there is no EEH.
    """

    def __init__(self, device: Device, poll: float = POLL, clock: Clock = SYSTEM) -> None:
        self.device = device
        self.eeh = operations.of(device)
        self.poll = poll
        self.clock = clock
        self.eeh.state  # noqa: B018 - raises where there is none
        self._lock = threading.Lock()
        """Held while a descriptor is used, so that `close` closes none under it."""
        self._told = State.NORMAL
        self._seen_by_read = False
        self._wake: int | None = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._interrupts: dict[How, Vectors] = {}
        try:
            self._enable("ERR", lambda: device.err)
            self._enable("REQ", lambda: device.req)
        except BaseException:
            self.close()
            raise

    def check(self, value: int, width: int = 4) -> bool:
        """Whether `value`, read from `width` bytes of a register, is all ones because the PE is frozen.

        Costs nothing unless it is all ones; a freeze wakes the one who iterates.
        """
        if value != (1 << 8 * width) - 1 or self.eeh.state is State.NORMAL:
            return False
        with self._lock:
            self._seen_by_read = True
            if self._wake is not None:
                os.eventfd_write(self._wake, 1)
        return True

    def look(self) -> Notice | None:
        """What there is to tell now; None where nothing has changed, or once it is closed."""
        with self._lock:
            if self._wake is None:
                return None
            with suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            for how, vectors in self._interrupts.items():
                if vectors.take():
                    return self._notice(how, self.eeh.answer())
            found = self.eeh.answer()
            by_read, self._seen_by_read = self._seen_by_read, False
            if found.state is State.NORMAL:
                self._told = found.state
            if found.state is self._told:
                return None
            return self._notice("read" if by_read else "poll", found)

    def wait(self, timeout: float | None = None) -> Notice | None:
        """Wait for the next notice; None after `timeout` seconds, or when the watch was closed meanwhile."""
        end = None if timeout is None else self.clock.now() + timeout
        while self._wake is not None:
            if notice := self.look():
                return notice
            left = self.poll if end is None else min(self.poll, end - self.clock.now())
            if left <= 0:
                return None
            self.clock.wait(self._fds(), left)
        return None

    def run(self, call: Callable[[Notice], object]) -> None:
        """Call `call` with each notice, until the watch is closed."""
        for notice in self:
            call(notice)

    def __iter__(self) -> Iterator[Notice]:
        while notice := self.wait():
            yield notice

    async def __aiter__(self) -> AsyncIterator[Notice]:
        import asyncio  # 20 ms that only who needs it waits for

        loop = asyncio.get_running_loop()
        while self._wake is not None:
            if notice := self.look():
                yield notice
                continue
            woken = asyncio.Event()
            fds = self._fds()
            for fd in fds:
                loop.add_reader(fd, woken.set)
            try:
                with suppress(TimeoutError):
                    await asyncio.wait_for(woken.wait(), self.poll)
            finally:
                for fd in fds:
                    loop.remove_reader(fd)

    def close(self) -> None:
        """Stop watching; who waits is woken."""
        with self._lock:
            wake, self._wake = self._wake, None
            if wake is None:
                return
            os.eventfd_write(wake, 1)
            for vectors in self._interrupts.values():
                with suppress(OSError):  # of a device that is gone
                    vectors.close()
            self._interrupts.clear()
            os.close(wake)

    def _enable(self, how: How, irq: Callable[[], Irq]) -> None:
        with suppress(errors.NoInterrupt):  # not every device has it
            found = irq()
            if found.count and not found.enabled:
                self._interrupts[how] = found.enable()

    def _fds(self) -> list[int]:
        with self._lock:
            fds = [vectors.fileno() for vectors in self._interrupts.values()]
            return fds if self._wake is None else [self._wake, *fds]

    def _notice(self, how: How, found: Answer) -> Notice:
        self._told = found.state
        return Notice(self.device, how, found.state, found.group, found.pe)
