"""Eventfds as the kernel holds them.  They are real: a program waits for them with poll(2)."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

from vfio.fake import procfd
from vfio.fake.kernel_error import fail
from vfio.fake.process import Process


class EventFd:
    """A reference on an eventfd of a process, which may close its own descriptor meanwhile (eventfd_ctx)."""

    def __init__(self, process: Process, fd: int) -> None:
        """EBADF for what is not open, EINVAL for what is no eventfd."""
        fd = process.descriptor(fd)
        if not procfd.is_eventfd(fd):
            raise fail(errno.EINVAL)
        self.fd = _aside(fd)
        self.identity = procfd.eventfd_identity(self.fd)
        """What tells one eventfd from another, whatever the descriptor."""
        self._virqfds = process.machine.virqfds

    def signal(self) -> None:
        """Add one; a counter that is full stays so, and one that the kernel listens to is taken before it is seen."""
        if self._virqfds.signal(self.identity):
            return
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        if poll.poll(0):
            os.eventfd_write(self.fd, 1)

    def put(self) -> None:
        """Drop the reference."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class VirqFd:
    """Something that the kernel does whenever a process signals an eventfd.  (drivers/vfio/virqfd.c)"""

    def __init__(self, listener: _Listener, handler: Callable[[], None]) -> None:
        self._listener = listener
        self.handler = handler

    def put(self) -> None:
        """Do it no more."""
        self._listener.remove(self)

    def open_in(self, processes: Iterable[Process]) -> bool:
        """Whether one of these has the eventfd open; it ends with the last that closes it."""
        return any(self._listener.identity in process.eventfds() for process in processes)


class VirqFds:
    """The eventfds that the kernel listens to; handlers are called under `lock`.

    The kernel takes the counter in the write itself, whoever writes, and then does what is asked for.  Here it is taken
    at the next call of a process, or by a thread for each eventfd, which waits for that and ends with the last that
    listens.  So two writes right after each other may count as one, and a process that reads the counter right after it
    wrote may be faster, which it never is on a kernel.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock
        self._listeners: dict[str, _Listener] = {}

    def listen(self, process: Process, fd: int, handler: Callable[[], None], there: VirqFd | None = None) -> VirqFd:
        """Call `handler` for each signal of the eventfd, in the place of `there`, whose eventfd is closed.

        EBADF and EINVAL as `EventFd`; EBUSY if that one is not closed.
        """
        eventfd = EventFd(process, fd)
        if there and there.open_in(process.machine.processes):
            eventfd.put()
            raise fail(errno.EBUSY)
        if there:
            there.put()
        pending = _readable(eventfd.fd)
        listener = self._listeners.get(eventfd.identity)
        if listener:
            eventfd.put()
        else:
            listener = _Listener(eventfd, self._lock, lambda: self._listeners.pop(eventfd.identity))
            self._listeners[eventfd.identity] = listener
        virqfd = listener.add(handler)
        if pending:  # a signal from before counts, and stays in the counter
            handler()
        return virqfd

    def signal(self, identity: str) -> bool:
        """The kernel itself signals an eventfd, under the lock; False if nobody listens."""
        listener = self._listeners.get(identity)
        if listener:
            listener.signal()
        return listener is not None

    def deliver(self) -> None:
        """What processes have signalled happens now, whether or not the threads have noticed.  Called under the lock,
        before a call of a process, so that the call comes after what the process did before."""
        for listener in list(self._listeners.values()):
            listener.deliver()


class _Listener:
    """A thread that waits for one eventfd to be signalled."""

    def __init__(self, eventfd: EventFd, lock: threading.RLock, ended: Callable[[], object]) -> None:
        self._eventfd, self._lock, self._on_end = eventfd, lock, ended
        self.identity = eventfd.identity
        wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._wake = _aside(wake)
        os.close(wake)
        # Each signal is an edge; what the counter holds already is none.
        with select.epoll() as epoll:
            self._edges = select.epoll.fromfd(_aside(epoll.fileno()))
        self._edges.register(self._eventfd.fd, select.EPOLLIN | select.EPOLLET)
        self._edges.poll(0)
        self._virqfds: list[VirqFd] = []
        self._signalled = self._delivering = False
        threading.Thread(target=self._listen, name="vfio-virqfd", daemon=True).start()

    def add(self, handler: Callable[[], None]) -> VirqFd:
        found = VirqFd(self, handler)
        self._virqfds.insert(0, found)  # a wait queue: the newest is called first
        return found

    def remove(self, virqfd: VirqFd) -> None:
        """Under the lock, so the thread is told to end and not waited for."""
        self._virqfds.remove(virqfd)
        if not self._virqfds:
            self._on_end()
            os.eventfd_write(self._wake, 1)

    def signal(self) -> None:
        """Take the counter, and have the signal delivered."""
        with suppress(BlockingIOError):  # there is nothing, or the process has just read it itself
            os.preadv(self._eventfd.fd, [bytearray(8)], -1, os.RWF_NOWAIT)
        self._signalled = True
        if not self._delivering:  # what signals itself waits for the next call: it would never come to an end
            os.eventfd_write(self._wake, 1)

    def deliver(self) -> None:
        """After a signal: call who listens."""
        self._delivering = True
        try:
            if self._edges.poll(0):
                self.signal()
            if self._signalled:
                self._signalled = False
                for virqfd in list(self._virqfds):
                    virqfd.handler()
        finally:
            self._delivering = False

    def _listen(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(self._edges, select.POLLIN)
        while True:
            woken = self._wake in {fd for fd, _ in poll.poll()}
            with self._lock:
                if not self._virqfds:
                    break
                if woken:
                    os.eventfd_read(self._wake)
                self.deliver()
        self._edges.close()
        self._eventfd.put()
        os.close(self._wake)


def _aside(fd: int) -> int:
    """A duplicate with a high number: a kernel's references take none of the numbers that its processes get next."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, procfd.lowest_aside())


def _readable(fd: int) -> bool:
    """Whether the counter is more than 0."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
