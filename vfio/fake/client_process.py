"""A process of the model that is a real one: its pid, its memory, its limits, and its descriptors."""

from __future__ import annotations

import errno
import itertools
import resource
from typing import TYPE_CHECKING, NamedTuple

from vfio.fake import procfd
from vfio.fake.device_file import HeldMapping
from vfio.fake.kernel_error import fail
from vfio.fake.memory import AddressSpace
from vfio.fake.process import Process

if TYPE_CHECKING:
    from vfio.backend import Mapping
    from vfio.fake.file import File
    from vfio.fake.machine import Machine
    from vfio.fake.open_files import OpenFiles

_CAP_IPC_LOCK = 1 << 14
UNADOPTED = 0
"""pid of a child that was announced, and is not there yet."""


class Who(NamedTuple):
    """What a program says it is; None is for what it really is."""

    uid: int | None = None
    groups: tuple[int, ...] | None = None
    """The first is the one that it runs as."""
    memlock: int | None = None
    """RLIMIT_MEMLOCK in bytes; -1 is unlimited."""
    ipc_lock: bool | None = None


class ClientProcess(Process):
    """A program that reaches the machine over a socket, with as many connections as it likes."""

    def __init__(self, machine: Machine, files: OpenFiles, pid: int, uid: int, who: Who) -> None:
        groups = who.groups if who.groups or who.uid is not None else _groups(pid)
        super().__init__(machine, pid=pid, uid=uid if who.uid is None else who.uid, groups=groups)
        self.who = who
        self.real_uid = uid
        self.memory = AddressSpace(pid, machine.page_size)
        if who.ipc_lock is not None:
            self.ipc_lock = who.ipc_lock
        elif who.uid is not None:
            self.ipc_lock = who.uid == 0
        else:
            self.ipc_lock = bool(_capabilities(pid) & _CAP_IPC_LOCK)
        self.connections = 0
        """When the last one ends, so does the process."""
        self.mappings: dict[int, Mapping] = {}
        """By the number that the program knows."""
        self._open_files = files
        self._numbers = itertools.count(1)
        # Of the call that is being made: the descriptors that came with it, by the program's numbers, whether there is
        # room for another, and those that go with the answer.
        self._named: dict[int, int] = {}
        self._room = False
        self.installed: list[int] = []

    # --- a call ---

    def begin(self, named: dict[int, int], room: bool = True) -> None:
        """A call is about to be made that names these descriptors."""
        self._named, self._room, self.installed = named, room, []

    # --- descriptors ---

    @property
    def files(self) -> dict[int, File]:
        return self._open_files.of(self.pid) if self.pid != UNADOPTED else {}

    def file(self, fd: int) -> File:
        found = self._open_files.find(self._named[fd]) if fd in self._named else None
        if found is None:
            raise fail(errno.EBADF)
        return found

    def lookup(self, fd: int) -> File | None:
        return self._open_files.find(self.descriptor(fd))

    def descriptor(self, fd: int) -> int:
        if fd not in self._named:
            raise fail(errno.EBADF)
        return self._named[fd]

    def eventfds(self) -> set[str]:
        return procfd.eventfds(self.pid) if self.pid != UNADOPTED else set()

    def install(self, file: File) -> int:
        """A descriptor that goes to the program with the answer."""
        if not self._room:
            raise fail(errno.EMFILE)
        self.installed.append(self._open_files.install(file))
        return self.installed[-1]

    def close(self, fd: int) -> None:
        """Of one that was just installed; what a program has it closes itself."""
        self.installed.remove(fd)
        self._open_files.cancel(fd)

    # --- mappings ---

    def add_mapping(self, mapping: Mapping) -> int:
        """The number by which the program names it."""
        number = next(self._numbers)
        self.mappings[number] = mapping
        return number

    # --- life ---

    def fork(self) -> ClientProcess:
        """A child that this process is about to have: what is mapped here is mapped there, at the same numbers."""
        child = ClientProcess(self.machine, self._open_files, UNADOPTED, self.real_uid, self.who)
        child.uid, child.groups, child.ipc_lock = self.uid, self.groups, self.ipc_lock
        child.memory.end()
        child.memory.inherit(self.memory)
        for number, mapping in self.mappings.items():
            if isinstance(mapping, HeldMapping):
                child.mappings[number] = mapping.inherit(child)
        child._numbers = itertools.count(max(self.mappings, default=0) + 1)
        return child

    def adopt(self, pid: int) -> None:
        """The child is there."""
        self.pid = self.memory.pid = pid

    def exit(self) -> None:
        """The program has ended.  Its files are released as their descriptors go, which others may have too."""
        self.memory.end()
        self.mappings.clear()
        self.machine.process_gone(self)
        self.locked_pages = 0
        self.machine.processes.remove(self)
        self.machine.changed.notify_all()

    # --- locked memory ---

    @property
    def memlock(self) -> int | None:
        """As it is now: a program may change its limit."""
        if self.who.memlock is not None:
            return None if self.who.memlock < 0 else self.who.memlock
        try:
            soft, _ = resource.prlimit(self.pid, resource.RLIMIT_MEMLOCK)
        except (OSError, ValueError):
            return 0  # it has ended
        return None if soft == resource.RLIM_INFINITY else soft

    @memlock.setter
    def memlock(self, value: int | None) -> None:
        """The limit is the program's; what the model assumes of a process of its own does not count."""


def _capabilities(pid: int) -> int:
    """CapEff of a process."""
    return int(_status(pid).get("CapEff", "0"), 16)


def _groups(pid: int) -> tuple[int, ...] | None:
    """Its effective group, and the others."""
    status = _status(pid)
    if "Gid" not in status:
        return None
    return (int(status["Gid"].split()[1]), *map(int, status["Groups"].split()))


def _status(pid: int) -> dict[str, str]:
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            return dict(line.split(":", 1) for line in file)
    except OSError:
        return {}


def command_of(pid: int) -> str:
    """The command line of a process, for people."""
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            return file.read().replace("\0", " ").strip()
    except OSError:
        return ""
