"""What the served fake and its clients say to each other, over a stream socket of this host.

A frame is a header, the numbers of the descriptors that came with it, and a body::

    u32 length       of all that follows the header, in bytes; at most LONGEST
    u16 kind         of `Kind`
    u16 descriptors  how many came with the frame; at most MOST_AT_ONCE
    u32 sequence     of the request; an answer repeats it
    i32 * descriptors    the number that each has in the sender, in the order in which they were sent (SCM_RIGHTS)
    ...              the body

Numbers are in the byte order of the host.  A client sends HELLO, and then one request at a time on a connection, each
after the answer to the one before; a program with threads has several connections.  A request that names more than
MOST_AT_ONCE descriptors is preceded by frames DESCRIPTORS, which have no body and get no answer, up to MOST_NAMED in
all.  Whoever says anything else is disconnected.

**Open files are descriptors.**  The server gives a client a descriptor for each file that it opens: an end of a pipe,
which stands for the open file of the modelled kernel.  The client's kernel does the rest: a descriptor that is
duplicated, inherited or sent to another process is the same open file, and when the last copy is closed, by whatever
means, the server sees the pipe hang up and releases the file.  So a request carries the descriptors that it names as
descriptors: having one is what gives the right to use it.

The bodies of the calls that are made often are structs (IOCTL, PREAD, PWRITE, LOAD, STORE and their answers, below).
All others are a list in JSON: the arguments, and for an answer the result.

An answer is RESULT, or FAILURE with `FAILED` (an errno or 0, the index of the exception in `FAILURES`, the length of
the message), the message, and, for IOCTL, the buffer as the call left it.
"""

from __future__ import annotations

import array
import enum
import json
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from vfio.fake.fault import BusError, SegmentationFault
from vfio.fake.kernel_error import KernelWouldBeHurt, KernelWouldBlock

VERSION = 1
MAGIC = b"vfio fake"

GREETING = MAGIC + bytes([VERSION])

HEADER = struct.Struct("=IHHI")
LONGEST = 16 << 20
"""Bytes of a frame after its header."""
PIECE = 4 << 20
"""Bytes of one read or write of a device; longer ones are several."""
MOST_AT_ONCE = 253
"""Descriptors that Linux takes in one message (SCM_MAX_FD)."""
MOST_NAMED = 4096
"""Descriptors of one request."""

IOCTL = struct.Struct("=iBBxxQQ")
"""Descriptor, whether a buffer follows (then the argument is 0), whether there is room for a descriptor, request,
argument.  The answer is `NUMBER`, and the buffer."""
NUMBER = struct.Struct("=q")
PREAD = struct.Struct("=iQq")
"""Descriptor, length, offset.  The answer is the bytes."""
PWRITE = struct.Struct("=iq")
"""Descriptor, offset; and the bytes.  The answer is `NUMBER`."""
LOAD = struct.Struct("=Iqi")
"""Mapping, offset, width.  The answer is `VALUE`."""
STORE = struct.Struct("=IqiQ")
"""Mapping, offset, width, value."""
VALUE = struct.Struct("=Q")
FAILED = struct.Struct("=iHH")

FAILURES: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    OverflowError,
    IndexError,
    KernelWouldBeHurt,
    KernelWouldBlock,
    BusError,
    SegmentationFault,
    RuntimeError,
)
"""What a call of the seam raises; the last is for mistakes of the model itself."""


class Kind(enum.IntEnum):
    """Of a frame.  The arguments in JSON, where there are any, and the result."""

    HELLO = 1
    """GREETING (MAGIC, and the version as a byte), then [uid, groups, memlock, ipc_lock, address of some memory, its
    content in hex, whether this is for a child that is about to be forked]: [page size in bytes].  The first four are null for
    what the process really has; a memlock of -1 is unlimited."""
    ADOPT = 2
    """From a forked child, on a connection that its parent made for it: [address of some memory, its content in hex]:
    [].  The answer may be taken later."""
    DESCRIPTORS = 3
    IOCTL = 4
    PREAD = 5
    PWRITE = 6
    LOAD = 7
    STORE = 8
    OPEN = 9
    """Path, flags, room for a descriptor: none, and the descriptor."""
    SETTLE = 10
    """The client has closed something: when this is answered, it is released."""
    MMAP = 11
    """Descriptor, length, offset, protection: [number of the mapping, -1].  Where the device would not notice an access,
    a descriptor comes with the answer, and instead of -1 the offset at which it can be mapped."""
    MUNMAP = 12
    ALLOCATE = 13
    """Length, page size: whether a process may have such memory.  It is the client's own."""
    ADD_LARGE = 14
    """Address, length, page size: this memory counts as hugetlb pages."""
    REMOVE_LARGE = 15
    POPULATE = 16
    READ_TEXT = 17
    WRITE_TEXT = 18
    READLINK = 19
    LISTDIR = 20
    EXISTS = 21
    STAT = 22
    CHOWN = 23
    CHMOD = 24
    LOCKED = 25
    STATUS = 26
    """GREETING: all that the server knows of its machine and its clients.  Needs no HELLO."""
    STOP = 27
    """GREETING: the server ends.  Needs no HELLO."""
    RESULT = 100
    FAILURE = 101
    REFUSED = 102
    """No HELLO or ADOPT: [errno, why, what to do about it]."""


class ProtocolError(Exception):
    """The other side says what no frame is."""


class Frame(NamedTuple):
    """One that was received.  Whoever takes it closes its descriptors."""

    kind: int
    sequence: int
    descriptors: dict[int, int]
    """By the number that the sender has."""
    body: bytes


def encode(kind: int, sequence: int, body: bytes = b"", numbers: Sequence[int] = ()) -> bytes:
    """A frame, without the descriptors that go with it."""
    count = len(numbers)
    if not count:
        return HEADER.pack(len(body), kind, 0, sequence) + body
    return HEADER.pack(len(body) + 4 * count, kind, count, sequence) + struct.pack(f"={count}i", *numbers) + body


def ancillary(descriptors: Sequence[int]) -> list[tuple[int, int, bytes]]:
    """What sendmsg(2) takes to send descriptors."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors).tobytes())] if descriptors else []


def as_json(values: object) -> bytes:
    """A body."""
    return json.dumps(values, separators=(",", ":")).encode()


def from_json(body: bytes) -> Any:
    """Its value.  Raises `ProtocolError` for anything else."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"no JSON: {error}") from None


def failure(error: Exception, buffer: bytes = b"") -> bytes:
    """The body of FAILURE."""
    number = (error.errno or 0) if isinstance(error, OSError) else 0
    index = next(i for i, known in enumerate(FAILURES) if isinstance(error, known))
    text = b"" if number else str(error).encode("utf-8", "replace")[:65535]
    return FAILED.pack(number, index, len(text)) + text + buffer


def raised(body: bytes) -> tuple[Exception, bytes]:
    """What FAILURE says, and the buffer."""
    number, index, length = FAILED.unpack_from(body)
    if index >= len(FAILURES):
        raise ProtocolError(f"no exception {index}")
    rest = body[FAILED.size :]
    text = rest[:length].decode("utf-8", "replace")
    found = FAILURES[index]
    error = OSError(number, os.strerror(number)) if number and found is OSError else found(text)
    return error, rest[length:]


class Incoming:
    """What arrives at a socket, put together to frames."""

    _FLAGS = int(socket.MSG_CMSG_CLOEXEC)
    _CUT = int(socket.MSG_CTRUNC)
    _ANCILLARY = socket.CMSG_SPACE(4 * MOST_AT_ONCE) + socket.CMSG_SPACE(12)

    def __init__(self, longest: int = LONGEST) -> None:
        self.credentials: tuple[int, int, int] | None = None
        """pid, uid and gid of who sent last, if the socket passes them."""
        self._longest = longest
        self._data = bytearray()
        self._missing = 0
        self._numbers: list[int] = []
        self._descriptors: list[int] = []

    @property
    def pending(self) -> bool:
        """Whether a frame has begun to arrive."""
        return bool(self._data or self._descriptors or self._numbers)

    def receive(self, connection: socket.socket, flags: int = 0) -> bool:
        """Take what there is; False when the other side has ended.  Raises `ProtocolError` for lost descriptors."""
        room = min(max(65536, self._missing), 1 << 20)
        data, messages, told, _ = connection.recvmsg(room, self._ANCILLARY, flags | self._FLAGS)
        for level, kind, content in messages:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                arrived = array.array("i")
                arrived.frombytes(content[: len(content) // 4 * 4])
                self._descriptors += arrived
            elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                self.credentials = struct.unpack("3i", content)
        self._data += data
        if told & self._CUT:
            raise ProtocolError("descriptors were lost: this process can have no more (see ulimit -n)")
        if len(self._descriptors) > MOST_NAMED:
            raise ProtocolError(f"more than {MOST_NAMED} descriptors")
        return bool(data)

    def frame(self) -> Frame | None:
        """The next whole frame; None until it is there.  Raises `ProtocolError` for what cannot be one."""
        while len(self._data) >= HEADER.size:
            length, kind, count, sequence = HEADER.unpack_from(self._data)
            if length > self._longest or count > MOST_AT_ONCE or 4 * count > length:
                raise ProtocolError(f"a frame of {length} bytes and {count} descriptors")
            end = HEADER.size + length
            self._missing = end - len(self._data)
            if self._missing > 0:
                return None
            body = bytes(memoryview(self._data)[HEADER.size : end])
            del self._data[:end]
            if count:
                self._numbers += struct.unpack_from(f"={count}i", body)
                body = body[4 * count :]
            if len(self._numbers) > len(self._descriptors):
                raise ProtocolError(f"{len(self._numbers)} descriptors are named, and {len(self._descriptors)} came")
            if kind == Kind.DESCRIPTORS:
                if body or not count:
                    raise ProtocolError("DESCRIPTORS has a body, or no descriptors")
                continue
            if len(self._numbers) != len(self._descriptors):
                raise ProtocolError("descriptors came that no frame names")
            taken = self._descriptors
            descriptors = dict(zip(self._numbers, taken, strict=True)) if taken else {}
            if len(descriptors) != len(taken):
                raise ProtocolError("a number stands for two descriptors")
            self._numbers, self._descriptors = [], []
            return Frame(kind, sequence, descriptors, body)
        return None

    def close(self) -> None:
        """Let go of descriptors that came, and belong to no frame."""
        for fd in self._descriptors:
            os.close(fd)
        self._descriptors = []
