"""What NVM Express puts into registers and memory: register offsets, commands, completions, identify data, status.

NVM Express Base Specification 1.4: section 3 (registers), 4 (memory structures), 5 (admin commands), 6 (NVM commands).
Everything is little-endian.
"""

from __future__ import annotations

import errno
import struct
from typing import NamedTuple

from vfio import errors

# --- registers (section 3.1) ---

CAP, VS, CC, CSTS, AQA, ASQ, ACQ, DOORBELLS = 0x00, 0x08, 0x14, 0x1C, 0x24, 0x28, 0x30, 0x1000
INTMS = 0x0C
CC_ENABLE, CC_SHUTDOWN, CC_SHUTDOWN_MASK = 1, 1 << 14, 3 << 14
CC_ENTRY_SIZES = 6 << 16 | 4 << 20
"""Submission entries of 2**6 and completion entries of 2**4 bytes."""
CSTS_READY, CSTS_FATAL, CSTS_SHUTDOWN_MASK, CSTS_SHUTDOWN_DONE = 1, 2, 3 << 2, 2 << 2
ALL_ONES = 0xFFFF_FFFF
"""What every register reads as while the device's PE is frozen, or the device gone."""

SUBMISSION, COMPLETION = 64, 16
"""Bytes of an entry in the queue of that name."""


class Capabilities:
    """The CAP register."""

    def __init__(self, value: int) -> None:
        self.queue_entries = (value & 0xFFFF) + 1
        """Most entries of an I/O queue."""
        self.timeout = max(1, value >> 24 & 0xFF) * 0.5
        """Longest that the controller takes to become ready or not ready, in seconds."""
        self.doorbell_stride = 4 << (value >> 32 & 0xF)
        """Bytes from one doorbell to the next."""
        self.smallest_page = 1 << (12 + (value >> 48 & 0xF))
        """Bytes."""
        self.largest_page = 1 << (12 + (value >> 52 & 0xF))


# --- commands (section 4.2, figures of sections 5 and 6) ---

DELETE_SUBMISSION, CREATE_SUBMISSION, DELETE_COMPLETION, CREATE_COMPLETION = 0x00, 0x01, 0x04, 0x05
IDENTIFY, SET_FEATURES = 0x06, 0x09
FLUSH, WRITE, READ = 0x00, 0x01, 0x02
IDENTIFY_NAMESPACE, IDENTIFY_CONTROLLER, IDENTIFY_ACTIVE_NAMESPACES = 0, 1, 2
IDENTIFY_SIZE = 4096
NUMBER_OF_QUEUES = 0x07
ALL_NAMESPACES = 0xFFFF_FFFF

_ENTRY = struct.Struct("<BBHIQQQQ6I")
_COMPLETION = struct.Struct("<IIHHHH")


def entry(opcode: int, cid: int, namespace: int, prp1: int, prp2: int, dwords: tuple[int, ...]) -> bytes:
    """A submission queue entry; `dwords` are those from 10 on, as many as are not 0."""
    return _ENTRY.pack(opcode, 0, cid, namespace, 0, 0, prp1, prp2, *dwords, *(0,) * (6 - len(dwords)))


class Completion(NamedTuple):
    """A completion queue entry."""

    result: int
    reserved: int
    submission_head: int
    submission_queue: int
    cid: int
    phase_and_status: int

    @property
    def status(self) -> int:
        """15 bits; 0 is success."""
        return self.phase_and_status >> 1


def completion(data: bytes | memoryview) -> Completion:
    return Completion(*_COMPLETION.unpack(data))


def prps(iova: int, length: int, page: int) -> list[int]:
    """The physical region pages of `length` bytes at `iova`: where it begins, and then each page of `page` bytes."""
    return [iova, *range(iova - iova % page + page, iova + length, page)]


# --- identify data (section 5.15.2) ---


class Controller(NamedTuple):
    """What a controller says of itself."""

    vendor: int
    subsystem_vendor: int
    serial: str
    model: str
    firmware: str
    version: tuple[int, int, int]
    """Of NVM Express."""
    largest_transfer: int
    """Bytes of one command; 0 where there is no limit."""
    namespaces: int
    """The largest number that a namespace can have."""
    write_cache: bool
    """Written data may be volatile until a flush."""


def controller(data: bytes, version: int, smallest_page: int) -> Controller:
    vendor, subsystem_vendor = struct.unpack_from("<HH", data)
    limit = data[77]
    return Controller(
        vendor,
        subsystem_vendor,
        _text(data[4:24]),
        _text(data[24:64]),
        _text(data[64:72]),
        (version >> 16, version >> 8 & 0xFF, version & 0xFF),
        smallest_page << limit if limit else 0,
        int.from_bytes(data[516:520], "little"),
        bool(data[525] & 1),
    )


class Namespace(NamedTuple):
    """A range of logical blocks, addressed by LBA from 0 on."""

    number: int
    blocks: int
    block_size: int
    """Bytes."""
    metadata: int
    """Bytes beside each block; this driver moves none."""
    eui64: str

    @property
    def size(self) -> int:
        """Bytes."""
        return self.blocks * self.block_size


def namespace(number: int, data: bytes) -> Namespace:
    format_index = data[26] & 0xF | (data[26] & 0x60) >> 1
    metadata, shift, _ = struct.unpack_from("<HBB", data, 128 + 4 * format_index)
    return Namespace(number, int.from_bytes(data[:8], "little"), 1 << shift, metadata, data[120:128].hex())


def _text(data: bytes) -> str:
    return data.decode("ascii", "replace").rstrip(" \0")


# --- status (section 4.6.1) ---

ABORTED = 0x007
_DO_NOT_RETRY = 1 << 14
_TYPES = {0: "generic", 1: "command specific", 2: "media", 3: "path", 7: "vendor specific"}
_NAMES = {
    0x000: "success",
    0x001: "invalid command opcode",
    0x002: "invalid field in command",
    0x003: "command ID conflict",
    0x004: "data transfer error",
    0x005: "aborted: power loss",
    0x006: "internal error",
    0x007: "abort requested",
    0x008: "aborted: its submission queue was deleted",
    0x00B: "invalid namespace or format",
    0x00C: "command sequence error",
    0x013: "invalid PRP offset",
    0x080: "LBA out of range",
    0x081: "capacity exceeded",
    0x082: "namespace not ready",
    0x083: "reservation conflict",
    0x084: "format in progress",
    0x100: "invalid completion queue",
    0x101: "invalid queue identifier",
    0x102: "invalid queue size",
    0x108: "invalid interrupt vector",
    0x10C: "invalid queue deletion",
    0x10D: "feature identifier not saveable",
    0x10E: "feature not changeable",
    0x10F: "feature not namespace specific",
    0x180: "conflicting attributes",
    0x181: "invalid protection information",
    0x182: "write to a read-only range",
    0x280: "write fault",
    0x281: "unrecovered read error",
    0x282: "end-to-end guard check error",
    0x283: "end-to-end application tag check error",
    0x284: "end-to-end reference tag check error",
    0x285: "compare failure",
    0x286: "access denied",
    0x287: "deallocated or unwritten block",
}
"""By status code type (bits 10:8) and status code (7:0)."""
_ERRNOS = {
    0x001: errno.EOPNOTSUPP,
    0x002: errno.EINVAL,
    0x00B: errno.EINVAL,
    0x013: errno.EINVAL,
    0x080: errno.EINVAL,
    0x081: errno.ENOSPC,
    0x182: errno.EROFS,
    0x286: errno.EACCES,
}


def status_text(status: int) -> str:
    """A status (15 bits) in the words of the specification."""
    code, kind = status & 0x7FF, _TYPES.get(status >> 8 & 7, "reserved type")
    again = ", not to be retried" if status & _DO_NOT_RETRY else ""
    return f"{_NAMES.get(code, 'unknown status')} ({kind} status {status & 0xFF:#04x}{again})"


class CommandFailed(errors.VfioError):
    """The controller completed a command with an error: `status` has all 15 bits, errno is EIO where nothing fits better."""

    def __init__(self, what: str, status: int) -> None:
        self.status = status
        self.retryable = not status & _DO_NOT_RETRY
        super().__init__(_ERRNOS.get(status & 0x7FF, errno.EIO), what, status_text(status))
