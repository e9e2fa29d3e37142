"""What the outcome of a call depends on, and its arguments do not tell.

A call names descriptors and addresses of its process.  To make it again elsewhere one has to know what those were: an
eventfd, a file, nothing; memory that can be written, only read, or is not there.  Read from ``/proc/PID``, with nothing
of the process touched, so that a hole in memory stays a hole.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from typing import NamedTuple

CLOSED, EVENTFD = "closed", "eventfd"

_LOWEST, _HIGHEST = 1 << 16, 1 << 47
"""Addresses outside these are nobody's, on every machine: they stand for themselves."""
_AROUND = 64
"""Host pages kept around an address, so that what is said of its neighbourhood later has a place too."""
_LONGEST = 1 << 30
"""Bytes of a range that are looked at; what is behind them is the rest of a range that no process has."""
_ALIGNED = 1 << 24
"""To what an area is aligned: the largest page of memory that anybody uses here."""


class FileIdentity(NamedTuple):
    """What a descriptor is: two that are equal are the same thing."""

    kind: str
    """`CLOSED`, `EVENTFD`, or what ``/proc/PID/fd`` shows."""
    number: int = 0
    """Of an eventfd."""


class Run(NamedTuple):
    """A part of a range of addresses, by its offset and length in bytes."""

    offset: int
    length: int
    rights: str
    """``rw``, ``r``, or ``-`` where nothing can be read."""


class Surroundings:
    """Of the process `pid`; None is the calling one, whatever its pid becomes."""

    def __init__(self, pid: int | None = None) -> None:
        self._directory = "/proc/self" if pid is None else f"/proc/{pid}"
        self._areas: list[tuple[int, int, str]] = []

    def identity(self, fd: int) -> FileIdentity:
        """What a descriptor is."""
        try:
            link = os.readlink(f"{self._directory}/fd/{fd}")
        except OSError:
            return FileIdentity(CLOSED)
        if link == "anon_inode:[eventfd]":
            return FileIdentity(EVENTFD, self._eventfd(fd, "eventfd-id", 10))
        return FileIdentity(link)

    def count(self, fd: int) -> int:
        """The counter of an eventfd, which this does not change."""
        return self._eventfd(fd, "eventfd-count", 16)

    def layout(self, address: int, length: int) -> list[Run]:
        """What a range of memory is; empty where all of it can be written."""
        end, at, runs = address + min(length, _LONGEST), address, list[Run]()

        def add(until: int, rights: str) -> None:
            nonlocal at
            if until > at:
                if runs and runs[-1].rights == rights:
                    runs[-1] = runs[-1]._replace(length=until - address - runs[-1].offset)
                else:
                    runs.append(Run(at - address, until - at, rights))
                at = until

        for start, stop, rights in self._mapped():
            if stop > at and start < end:
                add(min(start, end), "-")
                add(min(stop, end), rights)
        add(end, "-")
        return [] if [run.rights for run in runs] == ["rw"] else runs

    def area(self, address: int, length: int, name: str) -> tuple[str, int] | None:
        """A lasting symbol (`name`, if it is new) and the offset there of memory that the backend did not allocate.

        None for an address that stands for itself.
        """
        if not _LOWEST <= address < _HIGHEST:
            return None
        for start, end, symbol in reversed(self._areas):
            if start <= address < end:
                return symbol, address - start
        around = _AROUND * mmap.PAGESIZE
        start = max(address - around, 0) // _ALIGNED * _ALIGNED
        self._areas.append((start, address + min(length, _LONGEST) + around, name))
        return name, address - start

    def read(self, address: int, most: int) -> bytes:
        """The bytes from `address` on, as far as the process could read them."""
        readable = most
        for run in self.layout(address, most):
            if run.rights == "-":
                readable = run.offset
                break
        try:
            with open(f"{self._directory}/mem", "rb", buffering=0) as memory:
                memory.seek(address)
                return memory.read(readable)
        except (OSError, ValueError, OverflowError):
            return b""

    def _mapped(self) -> list[tuple[int, int, str]]:
        """Start, end and rights of what is mapped, ascending; without what of a mapped file is behind its end."""
        found = []
        with open(f"{self._directory}/maps", encoding="utf-8", errors="replace") as file:
            for line in file:
                span, rights, offset, _device, inode, *name = line.rstrip("\n").split(maxsplit=5)
                start, end = (int(text, 16) for text in span.split("-"))
                if inode != "0":
                    links = [f"{self._directory}/map_files/{span}", *name]  # the first is for root alone
                    end = min(end, _end_of_file(links, start, int(offset, 16), end))
                found.append((start, end, "rw" if rights[:2] == "rw" else "r" if rights[0] == "r" else "-"))
        return [each for each in found if each[0] < each[1]]

    def _eventfd(self, fd: int, name: str, base: int) -> int:
        try:
            with open(f"{self._directory}/fdinfo/{fd}", encoding="ascii") as file:
                fields = dict(line.split(":", 1) for line in file if ":" in line)
            return int(fields[name], base)
        except (OSError, KeyError):
            return 0


def _end_of_file(paths: list[str], start: int, offset: int, otherwise: int) -> int:
    """Where a mapping of a file has no pages any more; `otherwise` for a device, which has no end."""
    for path in paths:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            pages = -(-max(status.st_size - offset, 0) // mmap.PAGESIZE)
            return start + pages * mmap.PAGESIZE if stat.S_ISREG(status.st_mode) else otherwise
    return otherwise
