"""The served fake: a modelled kernel in another process, which any number of programs reach.  (``vfio fake serve``)

    unix:PATH                       a process of that machine, as the one that it really is
    unix:PATH?uid=N                 as if its user were N (0: root)
    unix:PATH?groups=N,...          as if those were its groups; where uid is given, it is in its user's own alone
    unix:PATH?memlock=BYTES         as if RLIMIT_MEMLOCK were that; or unlimited
    unix:PATH?ipc_lock=0|1          with or without CAP_IPC_LOCK; where uid is given, root has it and nobody else

Open files are real descriptors: they can be duplicated, inherited, and sent to other programs, and they are closed by
the end of the program, however it ends.  A forked child is a process of its own on the machine.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import secrets
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from vfio import errors, uapi
from vfio.backend import Backend, FileStatus, LockedMemory, Mapping, Memory, check_argument
from vfio.backends import remote_url, wire
from vfio.backends.connection import Connection, Ended, control
from vfio.backends.descriptors import named_by
from vfio.backends.wire import Kind
from vfio.fake.fake_memory import FakeMemory

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_GET_DEVICE_FD = uapi.VFIO_GROUP_GET_DEVICE_FD
_U64 = (1 << 64) - 1
_PR_SET_PTRACER = 0x59616D61
_ITEM: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
_libc = ctypes.CDLL(None, use_errno=True)

# What the server reads to see that it can reach this program's memory; a child inherits it where it is.
_PROOF = secrets.token_bytes(16)
_PROOF_COPY = ctypes.create_string_buffer(_PROOF, len(_PROOF))


class RemoteBackend(Backend):
    """This program, as a process of a machine that a server has."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._address = remote_url.parse(url)
        self._free: list[Connection] = []
        self._all: set[Connection] = set()
        self._lock = threading.Lock()
        self._for_child: Connection | None = None
        self._adoption: Connection | None = None
        connection = self._connect()
        (self.page_size,) = self._greet(connection)
        self._free.append(connection)
        _backends.add(self)
        _follow_forks()

    def __del__(self) -> None:
        for connection in getattr(self, "_all", ()):
            connection.close()

    def exit(self) -> None:
        """Leave the machine: to it, this process has ended.  What is still open stays until it is closed."""
        with self._lock:
            while self._all:
                self._all.pop().close()
            self._free.clear()

    # --- files and devices ---

    def open(self, path: str, flags: int) -> int:
        return self._descriptor(self._ask(Kind.OPEN, _arguments(path, flags, _has_room())))

    def close(self, fd: int) -> None:
        os.close(fd)
        self._ask(Kind.SETTLE)

    def dup(self, fd: int) -> int:
        return os.dup(fd)

    def ioctl(self, fd: int, request: int, arg: int | WriteableBuffer = 0) -> int:
        room = request != _GET_DEVICE_FD or _has_room()
        if isinstance(arg, int):
            body = wire.IOCTL.pack(fd, 0, room, request & _U64, arg & _U64)
            frame = self._ask(Kind.IOCTL, body, named_by(fd, request, arg))
        else:
            check_argument(request, arg)
            with memoryview(arg) as view:
                data = bytes(view)
            body = wire.IOCTL.pack(fd, 1, room, request & _U64, 0) + data
            frame = self._ask(Kind.IOCTL, body, named_by(fd, request, data), arg)
        if frame.descriptors:
            return self._descriptor(frame)
        result: int = wire.NUMBER.unpack_from(frame.body)[0]
        return result

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        if length < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        found = b""
        while True:
            piece = min(length - len(found), wire.PIECE)
            frame = self._ask(Kind.PREAD, wire.PREAD.pack(fd, piece, _signed(offset + len(found))), (fd,))
            found += frame.body
            if len(frame.body) < piece or len(found) == length:
                return found

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        done = 0
        while True:
            piece = bytes(data[done : done + wire.PIECE])
            frame = self._ask(Kind.PWRITE, wire.PWRITE.pack(fd, _signed(offset + done)) + piece, (fd,))
            written: int = wire.NUMBER.unpack(frame.body)[0]
            done += written
            if written < len(piece) or done == len(data):
                return done

    def mmap(self, fd: int, length: int, offset: int, prot: int) -> Mapping:
        frame = self._ask(Kind.MMAP, _arguments(fd, length, offset, prot), (fd,))
        number, start = wire.from_json(frame.body)
        plain = None
        if frame.descriptors:
            memory = self._descriptor(frame)
            try:
                plain = mmap.mmap(memory, length, mmap.MAP_SHARED, prot, offset=start)
            finally:
                os.close(memory)
        return RemoteMapping(self, number, length, plain)

    def allocate(self, length: int, page_size: int | None = None) -> Memory:
        page = self._value(Kind.ALLOCATE, length, -1 if page_size is None else page_size)
        return FakeMemory(self, length, page)

    def add_large(self, address: int, length: int, page: int) -> None:
        """This memory of the program counts as hugetlb pages of `page` bytes from now on."""
        if page > self.page_size:
            self._ask(Kind.ADD_LARGE, _arguments(address, length, page))

    def remove_large(self, address: int) -> None:
        """It does so no more."""
        self._ask(Kind.REMOVE_LARGE, _arguments(address))

    def populate(self, address: int, length: int) -> None:
        self._ask(Kind.POPULATE, _arguments(address, length))

    # --- sysfs, procfs, devtmpfs ---

    def read_text(self, path: str) -> str:
        return str(self._value(Kind.READ_TEXT, path))

    def write_text(self, path: str, text: str) -> None:
        self._value(Kind.WRITE_TEXT, path, text)

    def readlink(self, path: str) -> str:
        return str(self._value(Kind.READLINK, path))

    def listdir(self, path: str) -> list[str]:
        return list(self._value(Kind.LISTDIR, path))

    def exists(self, path: str) -> bool:
        return bool(self._value(Kind.EXISTS, path))

    def stat(self, path: str) -> FileStatus:
        return FileStatus(*self._value(Kind.STAT, path))

    def chown(self, path: str, uid: int, gid: int) -> None:
        self._value(Kind.CHOWN, path, uid, gid)

    def chmod(self, path: str, mode: int) -> None:
        self._value(Kind.CHMOD, path, mode)

    def locked(self) -> LockedMemory:
        return LockedMemory(*self._value(Kind.LOCKED))

    # --- requests ---

    def _value(self, kind: Kind, *arguments: object) -> Any:
        return wire.from_json(self._ask(kind, _arguments(*arguments)).body)

    def _ask(
        self,
        kind: Kind,
        body: bytes = b"",
        descriptors: Sequence[int] = (),
        buffer: WriteableBuffer | None = None,
    ) -> wire.Frame:
        """Make a request; what the call raised is raised here."""
        connection = self._take()
        try:
            try:
                frame = connection.ask(kind, body, descriptors)
            except OSError as error:
                if error.errno != errno.EBADF:
                    raise
                # Nothing was sent: one of the numbers is none of a descriptor, and the server has to know which.
                frame = connection.ask(kind, body, [fd for fd in descriptors if _is_open(fd)])
        except Ended:
            raise errors.ServerGone(self._address.path) from None
        finally:
            self._give(connection)
        if frame.kind == Kind.RESULT:
            if buffer is not None:
                _fill(buffer, frame.body[wire.NUMBER.size :])
            return frame
        if frame.kind == Kind.REFUSED:
            raise self._refused(frame)
        error_, rest = wire.raised(frame.body)
        if buffer is not None:
            _fill(buffer, rest)
        raise error_

    def _descriptor(self, frame: wire.Frame) -> int:
        (fd,) = frame.descriptors.values()
        return fd

    def _take(self) -> Connection:
        """A connection that nobody uses; a thread that finds none makes one."""
        with self._lock:
            if not self._all:
                raise errors.ServerGone(self._address.path)
            if self._adoption:
                self._finish_adoption()
            for index in range(len(self._free) - 1, -1, -1):
                try:
                    if self._free[index].is_free or self._free[index].catch_up():
                        return self._free.pop(index)
                except Ended:
                    raise errors.ServerGone(self._address.path) from None
        connection = self._connect()
        self._greet(connection)
        return connection

    def _give(self, connection: Connection) -> None:
        with self._lock:
            if connection in self._all:
                self._free.append(connection)

    def _connect(self) -> Connection:
        try:
            connection = Connection(self.url, self._address.path)
        except errors.NoServer:
            if self._all:
                raise errors.ServerGone(self._address.path) from None
            raise
        _allow(connection.server)
        self._all.add(connection)
        return connection

    def _greet(self, connection: Connection, fork: bool = False) -> Any:
        who = self._address
        body = wire.as_json([who.uid, who.groups, who.memlock, who.ipc_lock, *_proof(), fork])
        try:
            frame = connection.ask(Kind.HELLO, wire.GREETING + body, ())
        except Ended:
            frame = None
        if frame is None or frame.kind != Kind.RESULT:
            self._all.discard(connection)
            connection.close()
            if frame is None:
                raise remote_url.turned_away(self.url, self._address.path)
            raise self._refused(frame)
        return wire.from_json(frame.body)

    def _refused(self, frame: wire.Frame) -> errors.ServerRefused:
        return errors.ServerRefused(self._address.path, *wire.from_json(frame.body))

    # --- forks ---

    def before_fork(self) -> None:
        """Connect the child, so that it is there as soon as it is, and nothing that it inherits is lost meanwhile."""
        self._for_child = None
        try:
            connection = self._connect()
            self._greet(connection, fork=True)
        except OSError:
            return  # the child will hear of it, should it ever call
        self._all.discard(connection)
        self._for_child = connection

    def after_fork_in_parent(self) -> None:
        if self._for_child:
            self._for_child.close()
            self._for_child = None

    def after_fork_in_child(self) -> None:
        self._lock = threading.Lock()
        for connection in self._all:
            connection.close()
        self._all, self._free = set(), []
        mine, self._for_child = self._for_child, None
        if mine is None:
            return
        _allow(mine.server)
        self._all, self._free = {mine}, [mine]
        with suppress(Ended):
            mine.send(Kind.ADOPT, wire.as_json(_proof()))
            self._adoption = mine

    def _finish_adoption(self) -> None:
        assert self._adoption is not None
        try:
            frame = self._adoption.answer()
        except Ended:
            raise errors.ServerGone(self._address.path) from None
        finally:
            self._adoption = None
        if frame.kind != Kind.RESULT:
            raise self._refused(frame)


class RemoteMapping(Mapping):
    """Device memory: each access is a request, which the device notices.

    Where the device is nothing but memory there is a view of it, `plain`, which takes no request.  It stays where a real
    one would be taken away, and an access raise SIGBUS: while memory decode is off, and in D3hot.
    """

    def __init__(self, backend: RemoteBackend, number: int, length: int, plain: mmap.mmap | None) -> None:
        self.length = length
        self._backend, self._number, self._plain = backend, number, plain
        self._views: dict[int, memoryview] = {}
        self._closed = False

    def view(self, width: int) -> memoryview | None:
        if self._plain is None or self._closed:
            return None
        if width not in self._views:
            with memoryview(self._plain) as whole:
                self._views[width] = whole[: self.length // width * width].cast(_ITEM[width])
        return self._views[width]

    def load(self, offset: int, width: int) -> int:
        frame = self._backend._ask(Kind.LOAD, wire.LOAD.pack(self._number, offset, width))
        value: int = wire.VALUE.unpack(frame.body)[0]
        return value

    def store(self, offset: int, width: int, value: int) -> None:
        if not 0 <= value <= _U64:
            raise OverflowError(f"{value} is no number of {width} bytes")
        self._backend._ask(Kind.STORE, wire.STORE.pack(self._number, offset, width, value))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            while self._views:
                self._views.popitem()[1].release()
            if self._plain:
                self._plain.close()
            self._backend._ask(Kind.MUNMAP, wire.as_json([self._number]))


def from_url(url: str) -> RemoteBackend:
    """The backend of a URL: the same object for whoever opens it in this process, because a process is one process.

    Raises `errors.NoSuchBackend` where nobody serves, and `errors.ServerRefused`.
    """
    with _opening:
        found = _by_url.get(url)
        if found is None or not _answers(found):
            found = _by_url[url] = RemoteBackend(url)
        return found


def leave() -> None:
    """Leave every machine: for a child that is to be a process of its own and not its parent's child."""
    for backend in list(_backends):
        backend.exit()


def status(path: str) -> dict[str, Any]:
    """What the server at `path` tells: its clients, what they have open and locked, what is bound to which driver."""
    found: dict[str, Any] = wire.from_json(control(remote_url.make(path), path, Kind.STATUS).body)
    return found


def stop(path: str) -> None:
    """End the server at `path`, and with it the machine; returns when it has ended."""
    control(remote_url.make(path), path, Kind.STOP)


_by_url: weakref.WeakValueDictionary[str, RemoteBackend] = weakref.WeakValueDictionary()
_backends: weakref.WeakSet[RemoteBackend] = weakref.WeakSet()
_opening = threading.Lock()
_following = False


def _answers(backend: RemoteBackend) -> bool:
    try:
        backend._ask(Kind.SETTLE)
    except OSError:
        return False
    return True


def _follow_forks() -> None:
    global _following
    if _following:
        return
    _following = True
    one_at_a_time = threading.Lock()
    prepared: list[RemoteBackend] = []

    def before() -> None:
        one_at_a_time.acquire()
        prepared[:] = list(_backends)
        for backend in prepared:
            backend.before_fork()

    def in_parent() -> None:
        for backend in prepared:
            backend.after_fork_in_parent()
        prepared.clear()
        one_at_a_time.release()

    def in_child() -> None:
        global _opening
        _opening = threading.Lock()  # which another thread of the parent may have had
        for backend in prepared:
            backend.after_fork_in_child()
        prepared.clear()
        one_at_a_time.release()

    os.register_at_fork(before=before, after_in_parent=in_parent, after_in_child=in_child)


def _allow(server: int) -> None:
    """Let the server reach this program's memory where only parents may (Yama); elsewhere nothing happens."""
    _libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(server), 0, 0, 0)


def _proof() -> list[object]:
    return [ctypes.addressof(_PROOF_COPY), _PROOF.hex()]


def _arguments(*values: object) -> bytes:
    """The body of a request.  The server takes a number of more than 64 bits for an attack."""
    for value in values:
        if isinstance(value, int) and not -(1 << 63) <= value <= _U64:
            raise OverflowError(f"{value} has more than 64 bits")
    return wire.as_json(values)


def _has_room() -> bool:
    """Whether this process can have another descriptor."""
    try:
        os.close(os.dup(0 if _is_open(0) else 2))
    except OSError as error:
        return error.errno != errno.EMFILE
    return True


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except (OSError, OverflowError):
        return False
    return True


def _signed(offset: int) -> int:
    """An offset as the kernel's loff_t."""
    return (offset + (1 << 63)) % (1 << 64) - (1 << 63)


def _fill(buffer: WriteableBuffer, data: bytes) -> None:
    with memoryview(buffer) as view:
        view.cast("B")[:] = data
