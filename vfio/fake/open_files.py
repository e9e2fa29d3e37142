"""Open files of the model that are descriptors of other programs.

A program is given the one end of a pipe, and the server keeps the other.  Duplicating, inheriting, sending and closing
are the business of the real kernel: when the last copy of the program's end is gone, the server's end hangs up.
"""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vfio.fake.file import File
    from vfio.fake.machine import Machine

_Identity = tuple[int, int]


class _Kept(NamedTuple):
    file: File
    end: int
    identity: _Identity


class OpenFiles:
    """Those of a machine.  All of it is called with the machine's lock held."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._epoll = select.epoll()
        self._by_end: dict[int, _Kept] = {}
        self._by_identity: dict[_Identity, _Kept] = {}

    def __len__(self) -> int:
        return len(self._by_end)

    def fileno(self) -> int:
        """Readable while `settle` has something to do."""
        return self._epoll.fileno()

    def install(self, file: File) -> int:
        """A new descriptor for `file`, which takes over the caller's reference: to be sent away, and closed."""
        end, writing = os.pipe2(os.O_CLOEXEC)
        try:
            # For reading as well, as every file of VFIO is.
            descriptor = os.open(f"/proc/self/fd/{writing}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            os.close(end)
            raise
        finally:
            os.close(writing)
        kept = _Kept(file, end, _identity(end))
        self._by_end[end] = self._by_identity[kept.identity] = kept
        self._epoll.register(end, 0)  # a hang-up is told in any case, and nothing else matters
        return descriptor

    def find(self, descriptor: int) -> File | None:
        """The open file that a descriptor stands for, whoever sent it."""
        kept = self._by_identity.get(_identity(descriptor))
        return kept.file if kept else None

    def of(self, pid: int) -> dict[int, File]:
        """What a process has open, by its descriptors."""
        found: dict[int, File] = {}
        try:
            names = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            return found
        for name in names:
            try:
                status = os.stat(f"/proc/{pid}/fd/{name}")
            except OSError:
                continue  # closed since
            if kept := self._by_identity.get((status.st_dev, status.st_ino)):
                found[int(name)] = kept.file
        return found

    def cancel(self, descriptor: int) -> None:
        """Close a descriptor that was not sent yet."""
        kept = self._by_identity[_identity(descriptor)]
        os.close(descriptor)
        self._release(kept)

    def settle(self) -> None:
        """Release the files whose last descriptor is gone."""
        while events := self._epoll.poll(0):
            for end, _ in events:
                self._release(self._by_end[end])

    def close(self) -> None:
        """The machine ends: programs keep descriptors of nothing."""
        for end in self._by_end:
            os.close(end)
        self._by_end.clear()
        self._by_identity.clear()
        self._epoll.close()

    def _release(self, kept: _Kept) -> None:
        del self._by_end[kept.end], self._by_identity[kept.identity]
        os.close(kept.end)  # which takes it from the epoll
        try:
            kept.file.put()
        finally:
            self._machine.changed.notify_all()


def _identity(descriptor: int) -> _Identity:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino
