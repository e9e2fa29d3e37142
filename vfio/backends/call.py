"""A call of the seam and what came of it, with names that last instead of numbers that do not."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Protocol

from vfio import uapi
from vfio.backends.surroundings import FileIdentity, Run


@dataclass(frozen=True)
class Place:
    """An address of this process, as a symbol of memory and an offset in it."""

    symbol: str
    offset: int

    def __str__(self) -> str:
        return f"{self.symbol}+{self.offset:#x}"


@dataclass
class Argument:
    """The buffer of an ioctl: its bytes before and after, and what in them is not the same on another machine."""

    struct: type[uapi.Struct] | None
    before: bytes
    after: bytes = b""
    places: dict[int, Place] = field(default_factory=dict)
    """By offset in the buffer: 8-byte addresses."""
    descriptors: dict[int, str] = field(default_factory=dict)
    """By offset in the buffer: 4-byte file descriptors."""


@dataclass
class Call:
    """One call: its name, its arguments, what came of it."""

    name: str
    arguments: tuple[object, ...]
    result: object = None
    error: OSError | None = None
    nanoseconds: int = 0
    begin: int = 0
    """Nanoseconds since the trace began."""
    process: str | None = None
    """Who made it; None for the process that traces."""
    overlaps: bool = False
    """Whether another call was under way when it began, or ended."""
    outside: dict[str, str] = field(default_factory=dict)
    """What descriptors are that no traced call gave, by symbol: ``eventfd``, ``closed``, or the name of a file."""
    layout: tuple[Run, ...] = ()
    """What is at the address given, from there on; empty where all of it can be written."""
    address: int = 0
    """Of new memory."""
    pointed_at: bytes = b""
    """What is at the address given instead of a buffer."""
    signals: dict[str, int] = field(default_factory=dict)
    """How often each eventfd was signalled during the call, by symbol, of those that its program has open."""


@dataclass(frozen=True)
class Descriptor:
    """A file descriptor, by a name that lasts."""

    symbol: str
    kind: str
    iommu: str | None = None
    outside: FileIdentity | None = None
    """What it is, where no traced call gave it."""

    def __str__(self) -> str:
        return self.symbol


@dataclass(frozen=True)
class RequestNumber:
    """An ioctl number, and the requests it may be."""

    number: int
    names: tuple[str, ...]

    def __str__(self) -> str:
        return "|".join(self.names) or hex(self.number)


class Sink(Protocol):
    """Where calls go."""

    def write(self, call: Call) -> None: ...


def number_at(data: bytes, offset: int, size: int) -> int:
    """An unsigned number of the machine's byte order."""
    return int.from_bytes(data[offset : offset + size], sys.byteorder)
