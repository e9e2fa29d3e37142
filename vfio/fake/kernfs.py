"""Directories, files and links that are made when they are looked at: what /sys, /proc and /dev consist of."""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from vfio.fake.file import File
from vfio.fake.kernel_error import fail

if TYPE_CHECKING:
    from vfio.fake.process import Process


class Node:
    """Anything that a path can lead to."""

    def __init__(self, mode: int, uid: int = 0, gid: int = 0) -> None:
        self.mode = mode
        """Type and permission bits."""
        self.uid = uid
        self.gid = gid
        self.rdev = 0


class Directory(Node):
    """A directory: `names` tells what is in it, and `lookup` makes one of them (None: it is not there)."""

    def __init__(
        self,
        names: Callable[[], Iterable[str]],
        lookup: Callable[[str], Node | None],
        mode: int = 0o755,
        uid: int = 0,
    ) -> None:
        super().__init__(stat.S_IFDIR | mode, uid, uid)
        self.names = names
        self.lookup = lookup


Child = Node | Callable[[], Node | None] | None
"""What is in a directory: a node, what makes one when it is looked up, or nothing."""


def directory(children: Mapping[str, Child], mode: int = 0o755, uid: int = 0) -> Directory:
    """A directory of these; those that are None are not there."""

    def lookup(name: str) -> Node | None:
        child = children.get(name)
        return child() if callable(child) else child

    return Directory(lambda: [name for name, child in children.items() if child is not None], lookup, mode, uid)


class Link(Node):
    """A symbolic link."""

    def __init__(self, target: str) -> None:
        super().__init__(stat.S_IFLNK | 0o777)
        self.target = target


class Attribute(Node):
    """A file whose content is made when it is read (`show`), and that does something when it is written (`store`).

    `store` gets all that one write(2) wrote, at most a page of it, and never nothing.
    """

    def __init__(
        self,
        show: Callable[[], str | bytes] | None = None,
        store: Callable[[str], None] | None = None,
        mode: int | None = None,
        uid: int = 0,
        public: int | None = None,
    ) -> None:
        if mode is None:
            mode = (0o444 if show else 0) | (0o200 if store else 0)
        super().__init__(stat.S_IFREG | mode, uid, uid)
        self.show = show
        self.store = store
        self.public = public
        """How many bytes anybody but root reads of it; None: all."""


def text(content: str) -> Attribute:
    """A file that says always the same, in a line."""
    return Attribute(lambda: f"{content}\n")


class DeviceNode(Node):
    """A character or block device; `opens` makes an open file of it with these flags, None for one that the model
    cannot open."""

    def __init__(
        self,
        kind: int,
        rdev: int,
        mode: int,
        uid: int = 0,
        gid: int = 0,
        opens: Callable[[int], File] | None = None,
    ) -> None:
        super().__init__(kind | mode, uid, gid)
        self.rdev = rdev
        self.opens = opens


class AttributeFile(File):
    """An open attribute."""

    def __init__(self, attribute: Attribute, path: str, page_size: int) -> None:
        super().__init__()
        self.link = path
        self._attribute = attribute
        self._page_size = page_size

    def pread(self, process: Process, length: int, offset: int) -> bytes:
        if self._attribute.show is None:
            raise fail(errno.EIO)
        if offset < 0 or length < 0:
            raise fail(errno.EINVAL)
        content = self._attribute.show()
        data = content.encode() if isinstance(content, str) else content
        if process.uid != 0:
            data = data[: self._attribute.public]
        return data[offset : offset + length]

    def pwrite(self, process: Process, data: bytes, offset: int) -> int:
        if self._attribute.store is None:
            raise fail(errno.EIO)
        data = data[: self._page_size]
        if data:
            self._attribute.store(data.decode("utf-8", "replace"))
        return len(data)
