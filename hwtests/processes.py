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
import pickle
import resource
import signal
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from hwtests import transcripts
from vfio.backend import Backend, FileStatus, LockedMemory, Mapping, Memory
from vfio.backends import kernel

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_CAP_IPC_LOCK = 1 << 14
_KEEPCAPS = 8  # prctl(2)
_CAPABILITY_VERSION = 0x20080522
_libc = ctypes.CDLL(None, use_errno=True)


class OtherProcess(Backend):
    """A child, and the calls that it makes for us."""

    url = kernel.THIS.url
    page_size = kernel.THIS.page_size

    def __init__(self, uid: int, groups: Sequence[int], memlock: int | None, ipc_lock: bool | None) -> None:
        self._socket, theirs = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            _be_another(theirs, uid, groups, memlock, uid == 0 if ipc_lock is None else ipc_lock)
        theirs.close()

    def receive(self, fd: int) -> int:
        """The open file of our descriptor `fd`, as a descriptor of that process."""
        _send(self._socket, ("receive", ()))
        socket.send_fds(self._socket, [b"f"], [fd])
        return int(self._answer())

    @property
    def pid(self) -> int:
        return self._pid

    def exit(self) -> None:
        """End the process; the kernel takes back all that it had. Exiting twice is harmless."""
        if self._pid:
            self._socket.close()
            os.waitpid(self._pid, 0)
            self._pid = 0

    def open(self, path: str, flags: int) -> int:
        return int(self._call("open", path, flags))

    def close(self, fd: int) -> None:
        self._call("close", fd)

    def dup(self, fd: int) -> int:
        return int(self._call("dup", fd))

    def ioctl(self, fd: int, request: int, arg: int | WriteableBuffer = 0) -> int:
        if isinstance(arg, int):
            return int(self._call("ioctl", fd, request, arg))
        with memoryview(arg) as view:
            result, view.cast("B")[:] = self._call("ioctl_buffer", fd, request, bytes(view))
        return int(result)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        data: bytes = self._call("pread", fd, length, offset)
        return data

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        return int(self._call("pwrite", fd, data, offset))

    def mmap(self, fd: int, length: int, offset: int, prot: int) -> Mapping:
        raise NotImplementedError("a mapping of another process cannot be reached from this one")

    def allocate(self, length: int, page_size: int | None = None) -> Memory:
        return _OtherMemory(self, *self._call("allocate", length, page_size))

    def populate(self, address: int, length: int) -> None:
        self._call("populate", address, length)

    def read_text(self, path: str) -> str:
        return str(self._call("read_text", path))

    def write_text(self, path: str, text: str) -> None:
        self._call("write_text", path, text)

    def readlink(self, path: str) -> str:
        return str(self._call("readlink", path))

    def listdir(self, path: str) -> list[str]:
        return list(self._call("listdir", path))

    def exists(self, path: str) -> bool:
        return bool(self._call("exists", path))

    def stat(self, path: str) -> FileStatus:
        return FileStatus(*self._call("stat", path))

    def chown(self, path: str, uid: int, gid: int) -> None:
        self._call("chown", path, uid, gid)

    def chmod(self, path: str, mode: int) -> None:
        self._call("chmod", path, mode)

    def locked(self) -> LockedMemory:
        return LockedMemory(*self._call("locked"))

    def _call(self, name: str, *arguments: object) -> Any:
        _send(self._socket, (name, arguments))
        return self._answer()

    def _answer(self) -> Any:
        result, failure = _receive(self._socket)
        if failure is not None:
            raise failure
        return result


class _OtherMemory(Memory):
    """Memory of another process: an address there, and no bytes here."""

    def __init__(self, process: OtherProcess, address: int, length: int, page_size: int) -> None:
        self._process = process
        self.address, self.length, self.page_size = address, length, page_size

    @property
    def view(self) -> memoryview:
        raise NotImplementedError("memory of another process cannot be reached from this one")

    def close(self) -> None:
        if self._process._pid:
            self._process._call("free", self.address)


class _Child:
    """What the child can do besides the calls of the seam."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._memory: dict[int, Memory] = {}

    def receive(self) -> int:
        _data, [fd], _flags, _address = socket.recv_fds(self._connection, 1, 1)
        return fd

    def ioctl_buffer(self, fd: int, request: int, data: bytes) -> tuple[int, bytes]:
        buffer = bytearray(data)
        return kernel.THIS.ioctl(fd, request, buffer), bytes(buffer)

    def allocate(self, length: int, page_size: int | None) -> tuple[int, int, int]:
        made = kernel.THIS.allocate(length, page_size)
        self._memory[made.address] = made
        return made.address, made.length, made.page_size

    def free(self, address: int) -> None:
        if made := self._memory.pop(address, None):
            made.close()


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


def _be_another(
    connection: socket.socket, uid: int, groups: Sequence[int], memlock: int | None, ipc_lock: bool
) -> None:
    """The child's life; it never returns."""
    try:
        _let_go_of_files(connection.fileno())
        limit = resource.RLIM_INFINITY if memlock is None else memlock
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
        if uid:
            _libc.prctl(_KEEPCAPS, 1, 0, 0, 0)
            first, *others = groups
            os.setgroups(others)
            os.setresgid(first, first, first)
            os.setresuid(uid, uid, uid)
        _set_capabilities(_CAP_IPC_LOCK if ipc_lock else 0, keep_others=uid == 0)
        child = _Child(connection)
        while True:
            name, arguments = _receive(connection)
            call = getattr(child, name, None) or getattr(kernel.THIS, name)
            try:
                answer: tuple[Any, Exception | None] = call(*arguments), None
            except (OSError, ValueError) as error:
                answer = None, error
            _send(connection, answer)
    except EOFError:
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(1)


def _let_go_of_files(keep: int) -> None:
    """A fork shares every open file; a process of its own has only what it is handed."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != keep:
            with contextlib.suppress(OSError):
                os.close(int(name))


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


def _send(connection: socket.socket, message: object) -> None:
    data = pickle.dumps(message)
    connection.sendall(len(data).to_bytes(4, "little") + data)


def _receive(connection: socket.socket) -> Any:
    size = int.from_bytes(_exactly(connection, 4), "little")
    return pickle.loads(_exactly(connection, size))


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data
