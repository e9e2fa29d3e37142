"""The kernel's log, and /dev/kmsg, which tells it.  (Documentation/ABI/testing/dev-kmsg)"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, NamedTuple

from vfio.fake.file import File
from vfio.fake.kernel_error import KernelWouldBlock, fail

if TYPE_CHECKING:
    from vfio.fake.clock import Clock
    from vfio.fake.process import Process

ERR, WARNING, INFO = 3, 4, 6
"""Levels of a message, of those that syslog(2) has."""

_KEPT = 4000
"""Records that the log has room for; older ones are lost."""


class Record(NamedTuple):
    """A message."""

    sequence: int
    level: int
    time: float
    """Seconds since boot."""
    text: str

    def __str__(self) -> str:
        """As a read(2) of /dev/kmsg gives it."""
        return f"{self.level},{self.sequence},{int(self.time * 1e6)},-;{self.text}\n"


class KernelLog:
    """What the kernel of a machine has said."""

    def __init__(self, clock: Clock) -> None:
        self.records: list[Record] = []
        """Oldest first."""
        self.next = 0
        """Sequence number of the next message."""
        self._clock = clock

    def write(self, level: int, text: str) -> None:
        """The kernel says something."""
        self.records.append(Record(self.next, level, self._clock.now(), text))
        self.next += 1
        del self.records[:-_KEPT]

    @property
    def text(self) -> str:
        """All messages, a line each, without times: for tests."""
        return "".join(f"{record.text}\n" for record in self.records)


class KmsgFile(File):
    """An open /dev/kmsg: each read gives one record, from the oldest on that there was when it was opened."""

    link = "/dev/kmsg"

    def __init__(self, log: KernelLog, process: Process, flags: int) -> None:
        """EPERM for who may not read the log: anybody but root."""
        super().__init__()
        if process.uid != 0 and flags & os.O_ACCMODE != os.O_WRONLY:
            raise fail(errno.EPERM)
        self._log = log
        self._next = log.records[0].sequence if log.records else log.next
        self._blocks = not flags & os.O_NONBLOCK

    def pread(self, process: Process, length: int, offset: int) -> bytes:
        """The next record, wherever `offset` is.

        EPIPE, once, where records were lost; EINVAL where the record does not fit, which loses it; EAGAIN behind the last
        one.  Where a reader would wait, `KernelWouldBlock`.
        """
        records = self._log.records
        if self._next == self._log.next:
            if self._blocks:
                raise KernelWouldBlock(
                    "a read of /dev/kmsg waits for the next message: open it with O_NONBLOCK, and read until EAGAIN"
                )
            raise fail(errno.EAGAIN)
        oldest = records[0].sequence
        if self._next < oldest:
            self._next = oldest
            raise fail(errno.EPIPE)
        data = str(records[self._next - oldest]).encode()
        self._next += 1
        if len(data) > length:
            raise fail(errno.EINVAL)
        return data
