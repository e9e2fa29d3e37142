"""Other processes that are real ones: forked children that make the calls they are sent.

other = start()
fd = other.receive(container.fd)        # a descriptor of ours, now theirs
other.ioctl(fd, request, buffer)        # the answer, and what the kernel wrote to the buffer
other.exit()
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
from collections.abc import Callable
from collections.abc import Mapping as Mapping_
from typing import TYPE_CHECKING, Any

from vfio.backend import Backend, FileStatus, LockedMemory, Mapping, Memory

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class ForkedProcess(Backend):
    """A child, and the calls that it makes for us.

    The child calls `leave` first, while it has all that it inherited, and then `begin`, with no file open but its
    connection to us, which returns the child's backend.  With `inherit` it keeps what it has.  `tasks` is what it can
    do on request besides the calls of the seam.
    """

    def __init__(
        self,
        origin: Backend,
        begin: Callable[[], Backend],
        leave: Callable[[], object] = lambda: None,
        *,
        inherit: bool = False,
        tasks: Mapping_[str, Callable[[], Any]] | None = None,
    ) -> None:
        self.url, self.page_size = origin.url, origin.page_size
        self._socket, theirs = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            self._socket.close()
            _live(theirs, begin, leave, inherit, tasks or {})
        theirs.close()

    def receive(self, fd: int) -> int:
        """The open file of our descriptor `fd`, as a descriptor of that process."""
        _send(self._socket, ("receive", ()))
        socket.send_fds(self._socket, [b"f"], [fd])
        return int(self._answer())

    def give(self, fd: int) -> int:
        """The open file of that process's descriptor `fd`, as a descriptor of ours."""
        _send(self._socket, ("give", (fd,)))
        _data, [mine], _flags, _address = socket.recv_fds(self._socket, 1, 1)
        self._answer()
        return mine

    def do(self, task: str) -> Any:
        """What the child was made to be able to do."""
        return self._call("do", task)

    @property
    def pid(self) -> int:
        return self._pid

    def exit(self) -> None:
        """End the process; the kernel takes back all that it had. Exiting twice is harmless."""
        if self._pid:
            self._socket.close()
            os.waitpid(self._pid, 0)
            self._pid = 0

    def kill(self) -> None:
        """End the process as SIGKILL does."""
        os.kill(self._pid, 9)
        self.exit()

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

    def __init__(self, process: ForkedProcess, address: int, length: int, page_size: int) -> None:
        self._process = process
        self.address, self.length, self.page_size = address, length, page_size

    @property
    def view(self) -> memoryview:
        raise NotImplementedError("memory of another process cannot be reached from this one")

    def close(self) -> None:
        if self._process.pid:
            self._process._call("free", self.address)


class _Child:
    """What the child can do besides the calls of the seam."""

    def __init__(self, connection: socket.socket, backend: Backend, tasks: Mapping_[str, Callable[[], Any]]) -> None:
        self._connection, self._backend, self._tasks = connection, backend, tasks
        self._memory: dict[int, Memory] = {}

    def receive(self) -> int:
        _data, [fd], _flags, _address = socket.recv_fds(self._connection, 1, 1)
        return fd

    def give(self, fd: int) -> None:
        socket.send_fds(self._connection, [b"f"], [fd])

    def do(self, task: str) -> Any:
        return self._tasks[task]()

    def ioctl_buffer(self, fd: int, request: int, data: bytes) -> tuple[int, bytes]:
        buffer = bytearray(data)
        return self._backend.ioctl(fd, request, buffer), bytes(buffer)

    def allocate(self, length: int, page_size: int | None) -> tuple[int, int, int]:
        made = self._backend.allocate(length, page_size)
        self._memory[made.address] = made
        return made.address, made.length, made.page_size

    def free(self, address: int) -> None:
        if made := self._memory.pop(address, None):
            made.close()


def _live(
    connection: socket.socket,
    begin: Callable[[], Backend],
    leave: Callable[[], object],
    inherit: bool,
    tasks: Mapping_[str, Callable[[], Any]],
) -> None:
    """The child's life; it never returns."""
    try:
        leave()
        if not inherit:
            _let_go_of_files(connection.fileno())
        backend = begin()
        child = _Child(connection, backend, tasks)
        while True:
            name, arguments = _receive(connection)
            call = getattr(child, name, None) or getattr(backend, name)
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
