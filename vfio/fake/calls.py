"""Requests of clients, made to the modelled kernel as calls of the seam.  (`vfio.backends.wire` says what they hold)"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from vfio.backends import wire
from vfio.backends.wire import Kind, ProtocolError
from vfio.fake.backend import FakeBackend, LockedMapping
from vfio.fake.client_process import ClientProcess
from vfio.fake.device_file import HeldMapping


class Answer(NamedTuple):
    """What is sent back; its descriptors are closed when they are sent."""

    kind: Kind
    body: bytes = b""
    descriptors: tuple[int, ...] = ()


class Calls:
    """The calls of one process."""

    def __init__(self, backend: FakeBackend, process: ClientProcess) -> None:
        self._backend, self._process = backend, process
        self._lock = backend.machine.lock
        self._plain: dict[int, tuple[Callable[..., Any], tuple[type, ...]]] = {
            Kind.SETTLE: (lambda: None, ()),
            Kind.MUNMAP: (self._munmap, (int,)),
            Kind.ALLOCATE: (self._allocate, (int, int)),
            Kind.ADD_LARGE: (process.memory.add_large, (int, int, int)),
            Kind.REMOVE_LARGE: (process.memory.remove_large, (int,)),
            Kind.POPULATE: (backend.populate, (int, int)),
            Kind.READ_TEXT: (backend.read_text, (str,)),
            Kind.WRITE_TEXT: (backend.write_text, (str, str)),
            Kind.READLINK: (backend.readlink, (str,)),
            Kind.LISTDIR: (backend.listdir, (str,)),
            Kind.EXISTS: (backend.exists, (str,)),
            Kind.STAT: (backend.stat, (str,)),
            Kind.CHOWN: (backend.chown, (str, int, int)),
            Kind.CHMOD: (backend.chmod, (str, int)),
            Kind.LOCKED: (backend.locked, ()),
        }

    def make(self, frame: wire.Frame) -> Answer:
        """Make the call that a frame asks for.  Raises `ProtocolError` for what no client sends."""
        with self._lock:
            try:
                return self._make(frame)
            except (struct.error, TypeError) as error:
                raise ProtocolError(f"{frame.kind}: {error}") from error

    def _make(self, frame: wire.Frame) -> Answer:
        process, kind, body = self._process, frame.kind, frame.body
        process.begin(frame.descriptors)
        if kind == Kind.IOCTL:
            return self._ioctl(frame)
        try:
            if kind == Kind.LOAD:
                number, offset, width = wire.LOAD.unpack(body)
                return Answer(Kind.RESULT, wire.VALUE.pack(self._mapping(number).load(offset, width)))
            if kind == Kind.STORE:
                number, offset, width, value = wire.STORE.unpack(body)
                self._mapping(number).store(offset, width, value)
                return Answer(Kind.RESULT)
            if kind == Kind.PREAD:
                fd, length, offset = wire.PREAD.unpack(body)
                if length > wire.PIECE:
                    raise ProtocolError(f"a read of {length} bytes")
                return Answer(Kind.RESULT, self._backend.pread(fd, length, offset))
            if kind == Kind.PWRITE:
                fd, offset = wire.PWRITE.unpack_from(body)
                done = self._backend.pwrite(fd, body[wire.PWRITE.size :], offset)
                return Answer(Kind.RESULT, wire.NUMBER.pack(done))
            if kind == Kind.OPEN:
                path, flags, room = _checked(body, (str, int, bool))
                process.begin({}, room)
                self._backend.open(path, flags)
                return Answer(Kind.RESULT, descriptors=tuple(process.installed))
            if kind == Kind.MMAP:
                return self._mmap(*_checked(body, (int, int, int, int)))
            return self._call(kind, body)
        except wire.FAILURES as error:
            return Answer(Kind.FAILURE, wire.failure(error))

    def _call(self, kind: int, body: bytes) -> Answer:
        if kind not in self._plain:
            raise ProtocolError(f"no request {kind}")
        call, types = self._plain[kind]
        return Answer(Kind.RESULT, wire.as_json(call(*_checked(body, types))))

    def _ioctl(self, frame: wire.Frame) -> Answer:
        fd, has_buffer, room, request, value = wire.IOCTL.unpack_from(frame.body)
        process = self._process
        process.begin(frame.descriptors, bool(room))
        buffer = bytearray(memoryview(frame.body)[wire.IOCTL.size :]) if has_buffer else bytearray()
        try:
            result = self._backend.ioctl(fd, request, buffer if has_buffer else value)
        except wire.FAILURES as error:
            return Answer(Kind.FAILURE, wire.failure(error, bytes(buffer)))
        return Answer(Kind.RESULT, wire.NUMBER.pack(result) + buffer, tuple(process.installed))

    def _mapping(self, number: int) -> Any:
        try:
            return self._process.mappings[number]
        except KeyError:
            raise ProtocolError(f"no mapping {number}") from None

    def _mmap(self, fd: int, length: int, offset: int, prot: int) -> Answer:
        mapping = self._backend.mmap(fd, length, offset, prot)
        assert isinstance(mapping, LockedMapping)
        inner = mapping.inner
        backing = inner.backing() if isinstance(inner, HeldMapping) else None
        body = wire.as_json([self._process.add_mapping(inner), backing[1] if backing else -1])
        return Answer(Kind.RESULT, body, (os.dup(backing[0]),) if backing else ())

    def _munmap(self, number: int) -> None:
        self._mapping(number).close()
        del self._process.mappings[number]
        self._backend.machine.changed.notify_all()

    def _allocate(self, length: int, page_size: int) -> int:
        return self._backend.page_of(length, None if page_size == -1 else page_size)


def _checked(body: bytes, types: tuple[type, ...]) -> list[Any]:
    """The arguments in a body, which have these types; integers have 64 bits."""
    values = wire.from_json(body) if body else []
    if not isinstance(values, list) or [type(value) for value in values] != list(types):
        raise ProtocolError(f"arguments are not {', '.join(each.__name__ for each in types)}")
    if any(type(value) is int and not -(1 << 63) <= value < 1 << 64 for value in values):
        raise ProtocolError("a number of more than 64 bits")
    return values
