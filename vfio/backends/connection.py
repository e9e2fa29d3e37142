"""A connection of a client to the server of a machine."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence

from vfio import errors
from vfio.backends import remote_url, wire
from vfio.backends.wire import Kind


class Ended(Exception):
    """The server is gone."""


class Connection:
    """One request at a time."""

    def __init__(self, url: str, path: str) -> None:
        """Connect to the server at `path`.  Raises `errors.NoServer`, and `errors.NoSuchBackend` where it may not."""
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._incoming = wire.Incoming(1 << 31)
        self._sequence = 0
        self._awaited = 0
        try:
            self.socket.connect(path)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
            self.socket.close()
            raise errors.NoServer(url, path) from error
        except PermissionError as error:
            self.socket.close()
            raise remote_url.forbidden(url, path, error) from error
        except OSError:
            self.socket.close()
            raise

    @property
    def server(self) -> int:
        """Its pid."""
        credentials = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid: int = struct.unpack("3i", credentials)[0]
        return pid

    def ask(self, kind: Kind, body: bytes, descriptors: Sequence[int]) -> wire.Frame:
        """Make a request, and wait for the answer.  Raises `Ended`."""
        self.send(kind, body, descriptors)
        return self.answer()

    def send(self, kind: Kind, body: bytes, descriptors: Sequence[int] = ()) -> None:
        """Make a request whose answer is taken later.  Raises ValueError for one that is too long, and sends nothing."""
        if len(body) + 4 * len(descriptors) > wire.LONGEST:
            raise ValueError(f"a request of {len(body)} bytes: {wire.LONGEST} are possible")
        try:
            while len(descriptors) > wire.MOST_AT_ONCE:
                first, descriptors = descriptors[: wire.MOST_AT_ONCE], descriptors[wire.MOST_AT_ONCE :]
                self._write(wire.encode(Kind.DESCRIPTORS, 0, b"", first), first)
            self._sequence = (self._sequence + 1) & 0xFFFF_FFFF
            self._write(wire.encode(kind, self._sequence, body, descriptors), descriptors)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Ended from error
        self._awaited += 1

    def answer(self, flags: int = 0) -> wire.Frame:
        """The answer to the last request; those to earlier ones, whose caller was interrupted, are dropped."""
        while True:
            while (frame := self._incoming.frame()) is None:
                try:
                    if not self._incoming.receive(self.socket, flags):
                        raise Ended
                except ConnectionResetError as error:
                    raise Ended from error
            self._awaited -= 1
            if frame.sequence == self._sequence:
                return frame
            for fd in frame.descriptors.values():
                os.close(fd)

    @property
    def is_free(self) -> bool:
        """Whether no answer is on its way."""
        return self._awaited == 0

    def catch_up(self) -> bool:
        """Drop answers that nobody waits for; False while some have not come."""
        try:
            while not self.is_free:
                for fd in self.answer(socket.MSG_DONTWAIT).descriptors.values():
                    os.close(fd)
        except BlockingIOError:
            return False
        return True

    def wait_for_end(self) -> None:
        """Until the server has closed the connection."""
        try:
            while self._incoming.receive(self.socket):
                pass
        except ConnectionResetError:
            pass

    def close(self) -> None:
        self._incoming.close()
        self.socket.close()

    def _write(self, data: bytes, descriptors: Sequence[int]) -> None:
        sent = self.socket.sendmsg([data], wire.ancillary(descriptors), socket.MSG_NOSIGNAL)
        if sent < len(data):
            self.socket.sendall(memoryview(data)[sent:], socket.MSG_NOSIGNAL)


def control(url: str, path: str, kind: Kind) -> wire.Frame:
    """Ask the server at `path` for something that is no call of a process: STATUS or STOP."""
    connection = Connection(url, path)
    try:
        frame = connection.ask(kind, wire.GREETING, ())
        if kind == Kind.STOP:
            connection.wait_for_end()
    except Ended:
        raise remote_url.turned_away(url, path) from None
    finally:
        connection.close()
    if frame.kind != Kind.RESULT:
        raise errors.ServerRefused(path, *wire.from_json(frame.body))
    return frame
