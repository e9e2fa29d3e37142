"""A machine that many programs reach: one thread takes their requests in turn.

A write to sysfs may have to wait until another program lets go of a device, so each has a thread of its own; all else is
answered at once.  Whatever was closed before a request was sent is released before the request is carried out.

A client that says what is no request, that sends a part of a frame and no more, or that does not take its answer, is
disconnected.  What it had is released as if its program had ended, and nobody else notices.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from vfio.backends import wire
from vfio.backends.wire import Kind, ProtocolError
from vfio.fake import reach, status
from vfio.fake.backend import FakeBackend
from vfio.fake.calls import Answer, Calls
from vfio.fake.client_process import UNADOPTED, ClientProcess, Who
from vfio.fake.open_files import OpenFiles

if TYPE_CHECKING:
    from vfio.fake.machine import Machine

PATIENCE = 10.0
"""Seconds that a client has for its HELLO, for the rest of a frame, and to make room for an answer."""

_PEER = struct.Struct("3i")
_GONE = select.EPOLLHUP | select.EPOLLRDHUP | select.EPOLLERR


class _Refused(Exception):
    """A client that cannot be served."""

    def __init__(self, number: int, why: str, remedy: str) -> None:
        super().__init__(why)
        self.body = wire.as_json([number, why, remedy])


class _Client:
    """One connection."""

    process: ClientProcess
    calls: Calls

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.fd = connection.fileno()
        self.pid, self.uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        self.incoming = wire.Incoming()
        self.greeted = False
        self.writing = False
        """A thread is to make its call."""
        self.waiting = False
        """That thread has begun."""
        self.closed = False
        self.unsent = b""
        """Of the last answer."""


class Server:
    """Serves `machine` at a listening socket, until `stop`.

    Whoever can connect and is `owner` (a uid) or root is served.
    """

    def __init__(self, machine: Machine, listener: socket.socket, owner: int | None = None) -> None:
        self.machine = machine
        self.owner = os.geteuid() if owner is None else owner
        self.files = OpenFiles(machine)
        self.processes: dict[tuple[int, int, Who], ClientProcess] = {}
        self.clients: dict[int, _Client] = {}
        self.started = time.time()
        self.answered = 0
        """Requests."""
        listener.setblocking(False)
        self._listener = listener
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wake_lock = threading.RLock()
        self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        self._made: deque[tuple[_Client, int, Answer | None]] = deque()
        self._deadlines: dict[_Client, float] = {}
        self._stopped = False
        for fd in (listener.fileno(), self._wake, self.files.fileno()):
            self._epoll.register(fd, select.EPOLLIN)

    def run(self, ended: Callable[[], object] = lambda: None) -> None:
        """Serve until `stop` is called; `ended` is called then, before clients see the end.  Time on the machine is real
        time meanwhile."""
        with self.machine.lock:
            self.machine.clock.follow()
        try:
            while not self._stopped:
                self._turn()
        finally:
            ended()
            self._close()

    def stop(self) -> None:
        """End `run`; may be called by any thread, and by a signal handler."""
        self._stopped = True
        self._wake_up()

    def _wake_up(self) -> None:
        with self._wake_lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    # --- the loop ---

    def _turn(self) -> None:
        events = self._epoll.poll(self._patience())
        with self.machine.lock:
            self.machine.clock.catch_up()
            self.files.settle()
        self._take_made()
        ready = []
        arrived = False
        for fd, event in events:
            client = self.clients.get(fd)
            if client is None:
                if fd == self._listener.fileno():
                    arrived = True
                elif fd == self._wake:
                    os.eventfd_read(self._wake)
            elif event & _GONE:
                # Whatever it asked for last, nobody waits for the answer.
                self._disconnect(client)
            else:
                ready.append((client, event))
        for client, event in ready:
            if not client.closed:
                self._guarded(client, event)
        if arrived:  # last: the newcomer may get the descriptor of one that has left
            self._accept()
        if self._deadlines:
            now = time.monotonic()
            for client in [client for client, deadline in self._deadlines.items() if deadline <= now]:
                self._disconnect(client)

    def _patience(self) -> float | None:
        with self.machine.lock:
            due = self.machine.clock.due()
        waits = [due] if due is not None else []
        if self._deadlines:
            waits.append(max(0.0, min(self._deadlines.values()) - time.monotonic()))
        return min(waits, default=None)

    def _guarded(self, client: _Client, event: int) -> None:
        try:
            if event & select.EPOLLOUT:
                self._send_rest(client)
            elif client.incoming.receive(client.socket):
                self._take_frames(client)
            else:
                self._disconnect(client)
        except (BlockingIOError, InterruptedError):
            pass
        except (ProtocolError, OSError):
            self._disconnect(client)
        except Exception:
            traceback.print_exc()
            self._disconnect(client)

    def _take_frames(self, client: _Client) -> None:
        frame = client.incoming.frame()
        if frame is None:
            self._deadlines[client] = self._deadlines.get(client, time.monotonic() + PATIENCE)
            return
        self._deadlines.pop(client, None)
        if client.incoming.pending:
            _close_all(frame)
            raise ProtocolError("a request before the answer to the last")
        if frame.kind == Kind.WRITE_TEXT and client.greeted:
            client.writing = True
            self._epoll.modify(client.fd, select.EPOLLRDHUP)
            threading.Thread(target=self._write, args=(client, frame), name="vfio-write", daemon=True).start()
            return
        self._send(client, frame.sequence, self._answer(client, frame))

    def _answer(self, client: _Client, frame: wire.Frame) -> Answer:
        self.answered += 1
        try:
            if client.greeted and client.process.pid != UNADOPTED:
                return self._call(client, frame)
            try:
                if frame.kind == Kind.STATUS:
                    _check_greeting(frame.body)
                    return Answer(Kind.RESULT, wire.as_json(status.of(self)))
                if frame.kind == Kind.STOP:
                    _check_greeting(frame.body)
                    self._stopped = True
                    return Answer(Kind.RESULT)
                return self._greet(client, frame)
            except _Refused as refused:
                return Answer(Kind.REFUSED, refused.body)
        finally:
            _close_all(frame)

    def _call(self, client: _Client, frame: wire.Frame) -> Answer:
        try:
            return client.calls.make(frame)
        except ProtocolError:
            raise
        except Exception as error:
            traceback.print_exc()
            text = f"the model of the kernel failed: {type(error).__name__}: {error}"
            return Answer(Kind.FAILURE, wire.failure(RuntimeError(text)))

    # --- writes to sysfs, which may wait ---

    def _write(self, client: _Client, frame: wire.Frame) -> None:
        """In a thread.  Whoever gets the lock after it finds the answer, or finds that it has to wait."""
        with self.machine.lock:
            if client.closed:
                _close_all(frame)
                return
            client.waiting = True
            answer: Answer | None = None
            with contextlib.suppress(ProtocolError):
                answer = self._answer(client, frame)
            self._made.append((client, frame.sequence, answer))
        self._wake_up()

    def _take_made(self) -> None:
        while self._made:
            client, sequence, answer = self._made.popleft()
            client.writing = client.waiting = False
            if client.closed:
                self._part(client)
            elif answer is None:
                self._disconnect(client)
            else:
                self._epoll.modify(client.fd, select.EPOLLIN | select.EPOLLRDHUP)
                try:
                    self._send(client, sequence, answer)
                except OSError:
                    self._disconnect(client)

    # --- answers ---

    def _send(self, client: _Client, sequence: int, answer: Answer) -> None:
        numbers = answer.descriptors
        data = wire.encode(answer.kind, sequence, answer.body, numbers)
        try:
            sent = client.socket.sendmsg([data], wire.ancillary(numbers)) if numbers else client.socket.send(data)
        finally:
            for fd in numbers:
                os.close(fd)
        if sent < len(data):
            client.unsent = data[sent:]
            self._epoll.modify(client.fd, select.EPOLLOUT | select.EPOLLRDHUP)
            self._deadlines[client] = time.monotonic() + PATIENCE
        elif answer.kind == Kind.REFUSED:
            self._disconnect(client)

    def _send_rest(self, client: _Client) -> None:
        client.unsent = client.unsent[client.socket.send(client.unsent) :]
        if client.unsent:
            self._deadlines[client] = time.monotonic() + PATIENCE
            return
        del self._deadlines[client]
        self._epoll.modify(client.fd, select.EPOLLIN | select.EPOLLRDHUP)

    # --- coming and going ---

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away()
            return
        client = _Client(connection)
        if client.uid not in (0, self.owner):
            connection.close()
            return
        connection.setblocking(False)
        self.clients[client.fd] = client
        self._deadlines[client] = time.monotonic() + PATIENCE
        self._epoll.register(client.fd, select.EPOLLIN | select.EPOLLRDHUP)

    def _turn_away(self) -> None:
        """Without a descriptor for the client it could not even be told no."""
        os.close(self._spare)
        with contextlib.suppress(OSError):
            self._listener.accept()[0].close()
        self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def _greet(self, client: _Client, frame: wire.Frame) -> Answer:
        if client.greeted and frame.kind == Kind.ADOPT:
            return self._adopt(client, frame)
        if client.greeted or frame.kind != Kind.HELLO:
            raise ProtocolError("no HELLO")
        who, address, content, fork = _hello(_check_greeting(frame.body))
        if client.pid <= 0:
            raise _Refused(
                errno.EPERM,
                "this program is in another PID namespace, and its memory and descriptors cannot be seen from there",
                "start the server where the programs are (in the same container)",
            )
        with self.machine.lock:
            process = self.processes.get((client.pid, client.uid, who))
            if fork:
                if process is None:
                    raise ProtocolError("a child without a parent")
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
                process = process.fork()
            elif process is None:
                self._check_memory(client.pid, client.uid, address, content)
                process = ClientProcess(self.machine, self.files, client.pid, client.uid, who)
                self.processes[client.pid, client.uid, who] = process
            process.connections += 1
        client.process, client.greeted = process, True
        client.calls = Calls(FakeBackend(self.machine, process), process)
        return Answer(Kind.RESULT, wire.as_json([self.machine.page_size]))

    def _adopt(self, client: _Client, frame: wire.Frame) -> Answer:
        values = wire.from_json(frame.body)
        if not (isinstance(values, list) and len(values) == 2 and client.incoming.credentials):
            raise ProtocolError("no ADOPT")
        address, content = _memory(*values)
        pid, uid, _ = client.incoming.credentials
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        self._check_memory(pid, uid, address, content)
        with self.machine.lock:
            client.process.adopt(pid)
            self.processes[pid, client.uid, client.process.who] = client.process
        client.pid = pid
        return Answer(Kind.RESULT, wire.as_json([]))

    def _check_memory(self, pid: int, uid: int, address: int, content: bytes) -> None:
        """Raise `_Refused` where the memory of a process cannot be reached."""
        if trouble := reach.trouble(pid, uid, address, content):
            raise _Refused(errno.EPERM, *trouble)

    def _disconnect(self, client: _Client) -> None:
        if client.closed:
            return
        client.closed = True
        del self.clients[client.fd]
        self._deadlines.pop(client, None)
        client.incoming.close()
        client.socket.close()
        with self.machine.lock:
            ended = not client.waiting
        if ended:
            self._part(client)

    def _part(self, client: _Client) -> None:
        """With its last connection a process ends."""
        if not client.greeted:
            return
        client.greeted = False
        process = client.process
        process.connections -= 1
        if process.connections:
            return
        self.processes.pop((process.pid, client.uid, process.who), None)
        try:
            with self.machine.lock:
                self.files.settle()
                process.exit()
        except Exception:
            traceback.print_exc(file=sys.stderr)

    def _close(self) -> None:
        for client in list(self.clients.values()):
            self._disconnect(client)
        with self.machine.lock:
            self.files.settle()
            self.files.close()
        self._listener.close()
        self._epoll.close()
        os.close(self._spare)
        with self._wake_lock:
            wake, self._wake = self._wake, -1
            os.close(wake)


def _check_greeting(body: bytes) -> bytes:
    """What comes after the greeting."""
    if not body.startswith(wire.MAGIC):
        raise ProtocolError("no greeting")
    version, rest = body[len(wire.MAGIC) : len(wire.GREETING)], body[len(wire.GREETING) :]
    if version != bytes([wire.VERSION]):
        raise _Refused(
            errno.EPROTONOSUPPORT,
            f"it speaks version {wire.VERSION} of the protocol, and this program version {version.hex() or '?'}",
            "let both be of the same release of vfio",
        )
    return rest


def _hello(body: bytes) -> tuple[Who, int, bytes, bool]:
    values = wire.from_json(body)
    kinds = ((int, type(None)), (list, type(None)), (int, type(None)), (bool, type(None)), (int,), (str,), (bool,))
    if not isinstance(values, list) or len(values) != len(kinds):
        raise ProtocolError("no HELLO")
    if any(type(value) not in allowed for value, allowed in zip(values, kinds, strict=True)):
        raise ProtocolError("no HELLO")
    uid, groups, memlock, ipc_lock, address, content, fork = values
    if groups is not None and not (groups and all(type(group) is int for group in groups)):
        raise ProtocolError("no HELLO")
    return Who(uid, None if groups is None else tuple(groups), memlock, ipc_lock), *_memory(address, content), fork


def _memory(address: object, content: object) -> tuple[int, bytes]:
    try:
        if type(address) is int and 0 <= address < 1 << 64 and isinstance(content, str) and 0 < len(content) <= 128:
            return address, bytes.fromhex(content)
    except ValueError:
        pass
    raise ProtocolError("no memory to look at")


def _close_all(frame: wire.Frame) -> None:
    for fd in frame.descriptors.values():
        os.close(fd)
