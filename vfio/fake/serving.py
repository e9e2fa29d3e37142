"""Where a server listens, and how it is started and ended."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import signal
import socket
import stat
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from vfio import errors
from vfio.fake.server import Server

if TYPE_CHECKING:
    from vfio.fake.machine import Machine

_NAME = "fake.sock"
_BACKLOG = 256
_LONGEST = 107  # bytes of a path: sun_path of a struct sockaddr_un, with its NUL


def default_path() -> Path:
    """Of this user: in ``$XDG_RUNTIME_DIR/vfio``, ``/run/vfio`` for root, or a directory in /tmp that is private."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and _is_mine(runtime):
        return Path(runtime, "vfio", _NAME)
    if os.geteuid() == 0:
        return Path("/run/vfio", _NAME)
    return Path(tempfile.gettempdir(), f"vfio-{os.geteuid()}", _NAME)


class Listener:
    """A socket with a path, for its owner (mode 0600); `listen` lets programs in, `close` removes it.

    Raises `errors.AlreadyServed` where somebody serves at that path; what a server that was killed has left is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        if len(os.fsencode(self.path)) > _LONGEST:
            raise errors.CallFailed(
                errno.ENAMETOOLONG,
                f"cannot serve at {self.path}",
                f"the path of a socket has at most {_LONGEST} bytes",
                "say a shorter one: --socket PATH",
            )
        _make_directory(self.path.parent)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._bind()
            self._identity = self._found()
        except BaseException:
            self.socket.close()
            raise

    def listen(self) -> None:
        """From now on programs get through, and see the calling process as the server."""
        self.socket.listen(_BACKLOG)

    def close(self) -> None:
        self.socket.close()
        if self._found() == self._identity:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()

    def _bind(self) -> None:
        os.fchmod(self.socket.fileno(), 0o600)  # which the file gets
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)  # two that start at once do not replace each other
            self._remove_stale()
            self.socket.bind(str(self.path))
        except OSError as error:
            if isinstance(error, errors.VfioError):
                raise
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        finally:
            os.close(directory)

    def _remove_stale(self) -> None:
        try:
            status = self.path.lstat()
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(status.st_mode):
            raise errors.CallFailed(
                errno.EEXIST, f"cannot serve at {self.path}", "there is a file, which is no socket", "--socket PATH"
            )
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.path))
            except ConnectionRefusedError:
                self.path.unlink()
                return
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        raise errors.AlreadyServed(str(self.path), struct.unpack("3i", credentials)[0])

    def _found(self) -> tuple[int, int] | None:
        try:
            status = self.path.lstat()
        except OSError:
            return None
        return status.st_dev, status.st_ino


def run(machine: Machine, listener: Listener, ready: Callable[[], object]) -> None:
    """Serve until a signal (SIGTERM, SIGINT, SIGHUP) or a client ends it; `ready` is called when programs get through."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    server = Server(machine, listener.socket)
    before = {
        number: signal.signal(number, lambda *_: server.stop())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    try:
        listener.listen()
        ready()
        server.run(listener.close)
    finally:
        listener.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def detach(machine: Machine, listener: Listener) -> int:
    """Serve in a process of its own, in the background; its pid, as soon as programs get through.

    Raises `errors.CallFailed` if it ends before.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _live(machine, listener, writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        told = pipe.read()
    listener.socket.close()
    if told != b"+":
        raise errors.CallFailed(
            errno.EIO, f"cannot serve at {listener.path}", told.decode("utf-8", "replace") or "the server has ended"
        )
    return pid


def _live(machine: Machine, listener: Listener, writing: int) -> NoReturn:
    """The life of a server in the background."""
    status = 1
    try:
        os.setsid()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
        _close_inherited()

        def ready() -> None:
            os.write(writing, b"+")
            os.close(writing)

        run(machine, listener, ready)
        status = 0
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(writing, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(status)


def _close_inherited() -> None:
    """Whoever waits for the end of what the shell left open does not wait for the server; all that is ours is CLOEXEC."""
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        with contextlib.suppress(OSError):
            if fd > 2 and os.get_inheritable(fd):
                os.close(fd)


def _make_directory(directory: Path) -> None:
    """One for this user alone, where there is none."""
    if directory == Path(tempfile.gettempdir()):
        return
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if directory.parent == Path(tempfile.gettempdir()) and directory.name.startswith("vfio-"):
        status = directory.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise errors.CallFailed(
                errno.EPERM,
                f"cannot serve in {directory}",
                "others could reach it, or it is another user's",
                f"--socket PATH;  or, if it is yours:  chmod 700 {directory}",
            )


def _is_mine(directory: str) -> bool:
    try:
        return os.stat(directory).st_uid == os.geteuid()
    except OSError:
        return False
