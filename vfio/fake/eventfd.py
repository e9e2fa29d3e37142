"""Eventfds as the kernel holds them.  They are real: a program waits for them with poll(2)."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import select
import threading
from collections.abc import Callable

from vfio.fake.kernel_error import fail
from vfio.fake.process import Process


class EventFd:
    """A reference on an eventfd of a process, which may close its own descriptor meanwhile (eventfd_ctx)."""

    def __init__(self, process: Process, fd: int) -> None:
        """EBADF for what is not open, EINVAL for what is no eventfd."""
        try:
            link = os.readlink(f"/proc/self/fd/{fd}") if fd >= 0 else ""
        except OSError:
            link = ""
        if not link:
            raise fail(errno.EBADF)
        if link != "anon_inode:[eventfd]" or fd in process.files:
            raise fail(errno.EINVAL)
        self.fd = _aside(fd)

    def signal(self) -> None:
        """Add one; a counter that is full stays so."""
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


class VirqFds:
    """The eventfds that a device listens to; handlers are called under `lock`.

    The kernel is called from the write itself, once for each that listens, and the first takes the counter.  Here a
    thread for each eventfd waits; it ends with the last that listens.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock
        self._listeners: dict[str, _Listener] = {}

    def listen(self, process: Process, fd: int, handler: Callable[[], None]) -> VirqFd:
        """Call `handler` for each signal of the eventfd; EBADF and EINVAL as `EventFd`."""
        eventfd = EventFd(process, fd)
        identity = _identity(eventfd.fd)
        pending = _readable(eventfd.fd)
        listener = self._listeners.get(identity)
        if listener:
            eventfd.put()
        else:
            listener = _Listener(eventfd, self._lock, lambda: self._listeners.pop(identity))
            self._listeners[identity] = listener
        virqfd = listener.add(handler)
        if pending:  # a signal from before counts, and stays in the counter
            handler()
        return virqfd

    def deliver(self) -> None:
        """What processes have signalled happens now, whether or not the threads have noticed.  Called under the lock,
        before a call of a process, so that the call comes after what the process did before."""
        for listener in list(self._listeners.values()):
            listener.deliver()


class _Listener:
    """A thread that waits for one eventfd to be signalled."""

    def __init__(self, eventfd: EventFd, lock: threading.RLock, ended: Callable[[], object]) -> None:
        self._eventfd, self._lock, self._on_end = eventfd, lock, ended
        stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._stop = _aside(stop)
        os.close(stop)
        with select.epoll() as epoll:
            self._epoll = select.epoll.fromfd(_aside(epoll.fileno()))
        self._epoll.register(self._stop, select.EPOLLIN)
        # Each signal is an edge; what the counter holds already is none.
        self._epoll.register(self._eventfd.fd, select.EPOLLIN | select.EPOLLET)
        self._epoll.poll(0)
        self._virqfds: list[VirqFd] = []
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
            os.eventfd_write(self._stop, 1)

    def deliver(self) -> None:
        """Take the counter, if the process has not been faster, and call who listens."""
        if self._virqfds and _readable(self._eventfd.fd):
            os.eventfd_read(self._eventfd.fd)
            for virqfd in list(self._virqfds):
                virqfd.handler()

    def _listen(self) -> None:
        while not self._stopped():
            with self._lock:
                self.deliver()
        self._epoll.close()
        self._eventfd.put()
        os.close(self._stop)

    def _stopped(self) -> bool:
        """Wait for a signal; True if it was to end."""
        return self._stop in {fd for fd, _ in self._epoll.poll()}


def _aside(fd: int) -> int:
    """A duplicate with a high number: a kernel's references take none of the numbers that its processes get next."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1 << 16
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, most if limit == resource.RLIM_INFINITY else min(limit // 2, most))


def _readable(fd: int) -> bool:
    """Whether the counter is more than 0."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _identity(fd: int) -> str:
    """What tells one eventfd from another, whatever the descriptor."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
        return next((line for line in file if line.startswith("eventfd-id")), f"descriptor {fd}")
