"""Other processes on the real kernel: forked children that make the calls they are sent.

other = another_process(uid=1000, memlock=1 << 20)
fd = other.receive(container.fd)        # a descriptor of ours, now theirs
other.ioctl(fd, request, buffer)        # the answer, and what the kernel wrote to the buffer
other.exit()
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import resource
import signal
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from hwtests import transcripts
from simtests.conformance.forked import ForkedProcess
from vfio.backend import Backend
from vfio.backends import kernel

_CAP_IPC_LOCK = 1 << 14
_KEEPCAPS = 8  # prctl(2)
_CAPABILITY_VERSION = 0x20080522
_libc = ctypes.CDLL(None, use_errno=True)


class OtherProcess(ForkedProcess):
    """A process of its own."""

    def __init__(self, uid: int, groups: Sequence[int], memlock: int | None, ipc_lock: bool | None) -> None:
        capable = uid == 0 if ipc_lock is None else ipc_lock
        super().__init__(kernel.THIS, lambda: _become(uid, groups, memlock, capable))


@pytest.fixture
def another_process(backend: Backend) -> Iterator[Callable[..., OtherProcess | transcripts.TracedProcess]]:
    """Starts another process: `uid`, `groups` (in which it is; None: the user's own alone), `memlock` (RLIMIT_MEMLOCK,
    bytes), `ipc_lock` (CAP_IPC_LOCK)."""
    started: list[OtherProcess] = []

    def start(
        *,
        uid: int = 0,
        groups: Sequence[int] | None = None,
        memlock: int | None = 8 << 20,
        ipc_lock: bool | None = None,
    ) -> OtherProcess | transcripts.TracedProcess:
        started.append(OtherProcess(uid, (uid,) if groups is None else groups, memlock, ipc_lock))
        return transcripts.also(backend, started[-1], uid=uid, groups=groups, memlock=memlock, ipc_lock=ipc_lock)

    yield start
    for each in started:
        each.exit()


@pytest.fixture
def fork(backend: Backend) -> Iterator[Callable[..., ForkedProcess]]:
    """Forks this process: the child has all that is open and mapped.  Arguments are what it can do by name."""
    started: list[ForkedProcess] = []

    def start(**tasks: Callable[[], Any]) -> ForkedProcess:
        started.append(ForkedProcess(backend, lambda: backend, inherit=True, tasks=tasks))
        return started[-1]

    yield start
    for each in started:
        each.exit()


@pytest.fixture
def killed_by() -> Callable[[Callable[[], object]], str | None]:
    """Which signal a call that touches a mapping kills its process by; None: by none.  A child makes the call."""

    def touch(call: Callable[[], object]) -> str | None:
        pid = os.fork()
        if pid == 0:
            faulthandler.disable()
            with contextlib.suppress(BaseException):
                call()
                os._exit(0)
            os._exit(1)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            return signal.Signals(os.WTERMSIG(status)).name
        assert os.WEXITSTATUS(status) == 0, "the call failed"
        return None

    return touch


def _become(uid: int, groups: Sequence[int], memlock: int | None, ipc_lock: bool) -> Backend:
    """In the child: give up what that process does not have."""
    limit = resource.RLIM_INFINITY if memlock is None else memlock
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
    if uid:
        _libc.prctl(_KEEPCAPS, 1, 0, 0, 0)
        first, *others = groups
        os.setgroups(others)
        os.setresgid(first, first, first)
        os.setresuid(uid, uid, uid)
    _set_capabilities(_CAP_IPC_LOCK if ipc_lock else 0, keep_others=uid == 0)
    return kernel.THIS


def _set_capabilities(ipc_lock: int, keep_others: bool) -> None:
    header = struct.pack("Ii", _CAPABILITY_VERSION, 0)
    data = ctypes.create_string_buffer(24)
    assert _libc.capget(header, data) == 0
    effective, permitted, inheritable, *high = struct.unpack("6I", data.raw)
    others = ~_CAP_IPC_LOCK if keep_others else 0
    effective, permitted = (value & others | permitted & ipc_lock for value in (effective, permitted))
    if not keep_others:
        high = [0, 0, 0]
    assert _libc.capset(header, struct.pack("6I", effective, permitted, inheritable & others, *high)) == 0
