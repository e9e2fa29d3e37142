"""A process of the modelled machine: who it is, what it has open, what it may lock."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vfio.backend import LockedMemory
from vfio.fake import procfd
from vfio.fake.file import File
from vfio.fake.kernel_error import fail
from vfio.fake.memory import AddressSpace

if TYPE_CHECKING:
    from vfio.fake.machine import Machine


class Process:
    """A process.  Its descriptors are real numbers, reserved so that they never collide with the host process's own."""

    def __init__(
        self,
        machine: Machine,
        *,
        pid: int | None = None,
        uid: int = 0,
        groups: Iterable[int] | None = None,
        memlock: int | None = 8 << 20,
        ipc_lock: bool = True,
    ) -> None:
        self.machine = machine
        self.pid = os.getpid() if pid is None else pid
        self.uid = uid
        self.groups = (uid,) if groups is None else tuple(groups)
        """Its group, and the supplementary ones; without any said, that of the user's own number."""
        # All processes of a model that runs in one process share that one's memory, each under its own accounts.
        self.memory = AddressSpace(os.getpid(), machine.page_size)
        self.memlock = memlock
        """RLIMIT_MEMLOCK in bytes; None is unlimited."""
        self.ipc_lock = ipc_lock
        """CAP_IPC_LOCK."""
        self.locked_pages = 0
        """VmLck, in host pages: what the kernel calls locked_vm."""
        self._files: dict[int, File] = {}
        machine.processes.append(self)

    @property
    def sys_rawio(self) -> bool:
        """CAP_SYS_RAWIO."""
        return self.uid == 0

    # --- descriptors ---

    @property
    def files(self) -> dict[int, File]:
        """What it has open, by descriptor."""
        return self._files

    def install(self, file: File) -> int:
        """A new descriptor for `file`, which takes over the caller's reference."""
        fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self._files[fd] = file
        return fd

    def file(self, fd: int) -> File:
        """The file behind a descriptor of the model; EBADF for any other."""
        try:
            return self._files[fd]
        except KeyError:
            raise fail(errno.EBADF) from None

    def lookup(self, fd: int) -> File | None:
        """What any descriptor stands for: None for a file that is not the model's; EBADF for none."""
        if fd not in self._files:
            self.descriptor(fd)
        return self._files.get(fd)

    def descriptor(self, fd: int) -> int:
        """The same file as a descriptor of the host process; EBADF for what is not open."""
        others = (process for process in self.machine.processes if process is not self)
        if fd < 0 or any(fd in other._files for other in others):
            raise fail(errno.EBADF)
        os.fstat(fd)
        return fd

    def eventfds(self) -> set[str]:
        """The identities of the eventfds that it has open."""
        return procfd.eventfds(below=procfd.lowest_aside())

    def close(self, fd: int) -> None:
        file = self.file(fd)
        del self._files[fd]
        os.close(fd)
        file.put()

    def exit(self) -> None:
        """The process ends: its files close, newest first, and what it had pinned and locked is given back."""
        for fd in sorted(self._files, reverse=True):
            self.close(fd)
        self.machine.process_gone(self)
        self.locked_pages = 0
        if self in self.machine.processes:
            self.machine.processes.remove(self)

    def forget_descriptors(self) -> None:
        """The host process goes on without the machine: give the reserved numbers back."""
        for fd in list(self._files):
            os.close(fd)

    # --- permissions ---

    def may(self, wanted: int, uid: int, gid: int, mode: int) -> bool:
        """Whether it may read (4), write (2) or search (1) what has this owner, group and mode (acl_permission_check).

        The owner has the owner's bits and no others, a member of the group the group's; root may all.
        """
        if self.uid == 0:
            return True
        shift = 6 if self.uid == uid else 3 if gid in self.groups else 0
        return mode >> shift & wanted == wanted

    # --- locked memory ---

    def charge(self, pages: int) -> None:
        """Add to locked memory; ENOMEM past the limit, unless the process has CAP_IPC_LOCK."""
        limit = None if self.memlock is None else self.memlock // self.machine.page_size
        if limit is not None and not self.ipc_lock and self.locked_pages + pages > limit:
            raise fail(errno.ENOMEM)
        self.locked_pages += pages

    def uncharge(self, pages: int) -> None:
        """Take from locked memory."""
        self.locked_pages = max(0, self.locked_pages - pages)

    def locked(self) -> LockedMemory:
        return LockedMemory(self.locked_pages * self.machine.page_size, self.memlock, self.ipc_lock)
