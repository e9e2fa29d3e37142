"""Where a modelled NVMe namespace keeps its bytes: sparse memory, or a file of the host's."""

from __future__ import annotations

import os
from typing import Protocol

_CHUNK = 1 << 16


class Disk(Protocol):
    """`size` bytes, addressed from 0 on; callers stay inside."""

    size: int

    def read(self, offset: int, length: int) -> bytes: ...

    def write(self, offset: int, data: bytes) -> None: ...

    def flush(self) -> None: ...


class SparseDisk:
    """Zeros until written, and gone with the machine."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._chunks: dict[int, bytearray] = {}

    def read(self, offset: int, length: int) -> bytes:
        found = []
        for number, start, count in _pieces(offset, length):
            chunk = self._chunks.get(number)
            found.append(bytes(chunk[start : start + count]) if chunk else bytes(count))
        return b"".join(found)

    def write(self, offset: int, data: bytes) -> None:
        at = 0
        for number, start, count in _pieces(offset, len(data)):
            chunk = self._chunks.setdefault(number, bytearray(_CHUNK))
            chunk[start : start + count] = data[at : at + count]
            at += count

    def flush(self) -> None:
        """There is no cache."""


class FileDisk:
    """A file, made with `size` bytes where there is none; an existing one keeps its size, rounded down to whole sectors."""

    def __init__(self, path: str, size: int) -> None:
        self.path = path
        if not os.path.exists(path):
            with open(path, "wb") as file:
                file.truncate(size)
        self.size = os.path.getsize(path) & ~511

    def read(self, offset: int, length: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(length)

    def write(self, offset: int, data: bytes) -> None:
        with open(self.path, "r+b") as file:
            file.seek(offset)
            file.write(data)

    def flush(self) -> None:
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())


def _pieces(offset: int, length: int) -> list[tuple[int, int, int]]:
    """A range as (chunk, first byte in it, number of bytes)."""
    found = []
    while length > 0:
        start = offset % _CHUNK
        count = min(length, _CHUNK - start)
        found.append((offset // _CHUNK, start, count))
        offset += count
        length -= count
    return found
