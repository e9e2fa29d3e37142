"""Other processes of the fake kernel, with the fixture that `hwtests.processes` has for the real one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from simtests.conformance.forked import ForkedProcess
from vfio.backend import Backend, open_backend
from vfio.backends import remote
from vfio.backends.remote import RemoteBackend
from vfio.fake.backend import FakeBackend


class OtherProcess(FakeBackend):
    """A process of the same machine, which can be handed descriptors."""

    def __init__(self, origin: FakeBackend, **options: object) -> None:
        started = origin.another_process(**options)  # type: ignore[arg-type]
        super().__init__(started.machine, started.process, started.url)
        self._origin = origin

    def receive(self, fd: int) -> int:
        """The open file of the first process's descriptor `fd`, as a descriptor of this one."""
        if fd not in self._origin.process.files:
            return os.dup(fd)
        with self.machine.lock:
            file = self._origin.process.file(fd)
            file.get()
            return self.process.install(file)

    def give(self, fd: int) -> int:
        """The open file of this process's descriptor `fd`, as a descriptor of the first process."""
        with self.machine.lock:
            file = self.process.file(fd)
            file.get()
            return self._origin.process.install(file)

    @property
    def pid(self) -> int:
        return self.process.pid

    def close(self, fd: int) -> None:
        if fd in self.process.files:
            super().close(fd)
        else:
            os.close(fd)

    def exit(self) -> None:
        if self.process in self.machine.processes:
            super().exit()

    kill = exit


def forked(
    origin: RemoteBackend,
    *,
    uid: int = 0,
    groups: Iterable[int] | None = None,
    memlock: int | None = 8 << 20,
    ipc_lock: bool | None = None,
) -> ForkedProcess:
    """A real process of a served machine."""
    capable = uid == 0 if ipc_lock is None else ipc_lock
    limit = "unlimited" if memlock is None else memlock
    url = f"{origin.url.partition('?')[0]}?uid={uid}&memlock={limit}&ipc_lock={int(capable)}"
    if groups is not None:
        url += "&groups=" + ",".join(map(str, groups))
    return ForkedProcess(origin, lambda: open_backend(url), remote.leave)


@pytest.fixture
def another_process(backend: Backend) -> Iterator[Callable[..., Backend]]:
    """Starts another process: `uid`, `groups` (in which it is; None: the user's own alone), `memlock` (RLIMIT_MEMLOCK,
    bytes), `ipc_lock` (CAP_IPC_LOCK)."""
    started: list[OtherProcess | ForkedProcess] = []

    def start(**options: object) -> Backend:
        if isinstance(backend, RemoteBackend):
            started.append(forked(backend, **options))  # type: ignore[arg-type]
        else:
            assert isinstance(backend, FakeBackend)
            started.append(OtherProcess(backend, **options))
        return started[-1]

    yield start
    for each in started:
        each.exit()


@pytest.fixture
def fork(backend: Backend) -> Iterator[Callable[..., ForkedProcess]]:
    """Forks this process: the child has all that is open and mapped.  Arguments are what it can do by name.

    For served machines: a machine in this process would be forked as well.
    """
    assert isinstance(backend, RemoteBackend)
    started: list[ForkedProcess] = []

    def start(**tasks: Callable[[], Any]) -> ForkedProcess:
        started.append(ForkedProcess(backend, lambda: backend, inherit=True, tasks=tasks))
        return started[-1]

    yield start
    for each in started:
        each.exit()
