"""Open files.  A file is released when its last reference goes: descriptors, mappings, and other files hold some."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfio.backend import Mapping
from vfio.fake.kernel_error import fail

if TYPE_CHECKING:
    from vfio.fake.process import Process
    from vfio.fake.user import Argument


class File:
    """An open file description.  Subclasses answer the calls that they have."""

    link = "anon_inode:[file]"
    """What /proc/PID/fd shows."""

    def __init__(self) -> None:
        self._references = 1

    def get(self) -> None:
        """Take a reference."""
        self._references += 1

    def put(self) -> None:
        """Drop a reference; the last one releases the file."""
        self._references -= 1
        if self._references == 0:
            self.release()

    def release(self) -> None:
        """The last reference is gone."""

    def ioctl(self, process: Process, n: int | None, argument: Argument) -> int:
        """The request VFIO_BASE + `n` (None: no VFIO request of this machine)."""
        raise fail(errno.ENOTTY)

    def pread(self, process: Process, length: int, offset: int) -> bytes:
        raise fail(errno.EINVAL)

    def pwrite(self, process: Process, data: bytes, offset: int) -> int:
        raise fail(errno.EINVAL)

    def mmap(self, process: Process, length: int, offset: int, prot: int) -> Mapping:
        """The mapping takes a reference on the file, and drops it when it is closed."""
        raise fail(errno.ENODEV)
