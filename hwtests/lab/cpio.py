"""Initramfs archives: the `newc` cpio format (Documentation/driver-api/early-userspace/buffer-format.rst).

The kernel unpacks concatenated archives in order, each padded to 4 bytes, so a cached base and a small piece per run
need no common archive. Everything belongs to root; nobody needs to be root to write it.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_TRAILER = "TRAILER!!!"


@dataclass(frozen=True)
class Entry:
    """One file, directory, link or device of an archive."""

    name: str  # path without a leading slash
    mode: int  # type and permission bits, as in st_mode
    data: bytes = b""  # contents, or the target of a symbolic link
    mtime: int = 0  # seconds since the epoch
    rdev: tuple[int, int] = (0, 0)  # major and minor number of a device node


def directory(name: str, mode: int = 0o755) -> Entry:
    """A directory."""
    return Entry(name, stat.S_IFDIR | mode)


def file(name: str, data: bytes | str, mode: int = 0o644, mtime: int = 0) -> Entry:
    """A regular file."""
    return Entry(name, stat.S_IFREG | mode, data.encode() if isinstance(data, str) else data, mtime)


def symlink(name: str, target: str) -> Entry:
    """A symbolic link to `target`."""
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def device(name: str, major: int, minor: int, mode: int = 0o600) -> Entry:
    """A character device."""
    return Entry(name, stat.S_IFCHR | mode, rdev=(major, minor))


def tree(root: Path, prefix: str = "", skip: Iterable[str] = ()) -> Iterator[Entry]:
    """Everything below `root`, under `prefix` in the archive, in a stable order; `skip` are names left out wherever
    they appear. Directories come before what is in them."""
    left_out = frozenset(skip)
    for path in sorted(root.iterdir()):
        if path.name in left_out:
            continue
        name = f"{prefix}/{path.name}" if prefix else path.name
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            yield symlink(name, os.readlink(path))
        elif stat.S_ISDIR(status.st_mode):
            yield directory(name)
            yield from tree(path, name, left_out)
        elif stat.S_ISREG(status.st_mode):
            mode = 0o755 if status.st_mode & 0o111 else 0o644
            yield file(name, path.read_bytes(), mode, int(status.st_mtime))


def parents(name: str) -> Iterator[Entry]:
    """The directories above `name`, outermost first: the kernel drops a file whose directory is missing."""
    for parent in reversed(Path(name).parents[:-1]):
        yield directory(str(parent))


def write(stream: BinaryIO, entries: Iterable[Entry]) -> None:
    """Write a whole archive, ending on a multiple of 4 bytes."""
    inode = 0
    for inode, entry in enumerate(entries, start=1):
        _write_entry(stream, entry, inode)
    _write_entry(stream, Entry(_TRAILER, 0), 0)


def read(data: bytes) -> Iterator[Entry]:
    """The entries of one archive. Raises ValueError where `data` is not `newc`."""
    offset = 0
    while True:
        header = data[offset : offset + 110]
        if len(header) < 110 or header[:6] != b"070701":
            raise ValueError(f"no newc header at offset {offset}")
        field = [int(header[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
        mode, mtime, size, major, minor, name_size = field[1], field[5], field[6], field[9], field[10], field[11]
        name = data[offset + 110 : offset + 110 + name_size - 1].decode()
        offset = _aligned(offset + 110 + name_size)
        if name == _TRAILER:
            return
        yield Entry(name, mode, data[offset : offset + size], mtime, (major, minor))
        offset = _aligned(offset + size)


def _write_entry(stream: BinaryIO, entry: Entry, inode: int) -> None:
    name = entry.name.encode() + b"\0"
    fields = (inode, entry.mode, 0, 0, 1, entry.mtime, len(entry.data), 0, 0, *entry.rdev, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % value for value in fields) + name
    stream.write(head + bytes(-len(head) % 4))
    stream.write(entry.data + bytes(-len(entry.data) % 4))


def _aligned(offset: int) -> int:
    return (offset + 3) & ~3
