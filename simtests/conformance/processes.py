"""Other processes of the fake kernel, with the fixture that `hwtests.processes` has for the real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from vfio.fake.backend import FakeBackend


class OtherProcess(FakeBackend):
    """A process of the same machine, which can be handed descriptors."""

    def __init__(self, origin: FakeBackend, **options: object) -> None:
        started = origin.another_process(**options)  # type: ignore[arg-type]
        super().__init__(started.machine, started.process, started.url)
        self._origin = origin

    def receive(self, fd: int) -> int:
        """The open file of the first process's descriptor `fd`, as a descriptor of this one."""
        with self.machine.lock:
            file = self._origin.process.file(fd)
            file.get()
            return self.process.install(file)


@pytest.fixture
def another_process(backend: FakeBackend) -> Iterator[Callable[..., OtherProcess]]:
    """Starts another process: `uid`, `groups` (in which it is; None: the user's own alone), `memlock` (RLIMIT_MEMLOCK,
    bytes), `ipc_lock` (CAP_IPC_LOCK)."""
    started: list[OtherProcess] = []

    def start(**options: object) -> OtherProcess:
        started.append(OtherProcess(backend, **options))
        return started[-1]

    yield start
    for each in started:
        if each.process in backend.machine.processes:
            each.exit()
