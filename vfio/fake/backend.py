"""The seam's calls, made to a modelled kernel by one of its processes."""

from __future__ import annotations

import errno
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vfio import uapi
from vfio.backend import Backend, FileStatus, LockedMemory, Mapping, Memory, check_argument
from vfio.fake.fake_memory import FakeMemory
from vfio.fake.kernel_error import fail
from vfio.fake.machine import Machine, request_offset
from vfio.fake.process import Process
from vfio.fake.sysfs import FileTree
from vfio.fake.user import Argument

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


_names = functools.lru_cache(1024)(uapi.request_names)


class FakeBackend(Backend):
    """A process of a modelled machine.

    `machine` and `process` are the model itself, for tests: `Machine.hooks` makes calls fail, `Machine.leaks` names
    what is still held.
    """

    def __init__(self, machine: Machine, process: Process, url: str = "fake:") -> None:
        self.machine = machine
        self.process = process
        self.url = url
        self.page_size = machine.page_size
        self._tree = FileTree(machine)
        # A descriptor that its program forgot is not to outlive the machine in the host process.
        weakref.finalize(self, process.forget_descriptors)

    def another_process(
        self,
        *,
        uid: int = 0,
        groups: Iterable[int] | None = None,
        memlock: int | None = 8 << 20,
        ipc_lock: bool | None = None,
    ) -> FakeBackend:
        """The same machine, as another process sees it.  Its memory is this process's memory under another name.

        `groups` are all its groups; None is its user's own alone.
        """
        with self.machine.lock:
            pid = max(process.pid for process in self.machine.processes) + 1
            capable = uid == 0 if ipc_lock is None else ipc_lock
            other = Process(self.machine, pid=pid, uid=uid, groups=groups, memlock=memlock, ipc_lock=capable)
        return FakeBackend(self.machine, other, self.url)

    def exit(self) -> None:
        """End the process: what it has open is closed, and what it had registered and locked is given back."""
        with self.machine.lock:
            self.process.exit()

    def leaks(self) -> list[str]:
        """`Machine.leaks`."""
        with self.machine.lock:
            return self.machine.leaks()

    # --- files and devices ---

    def open(self, path: str, flags: int) -> int:
        with self._call("open"):
            file = self._tree.open(self.process, path, flags)
            try:
                return self.process.install(file)
            except OSError:
                file.put()
                raise

    def close(self, fd: int) -> None:
        with self._call("close"):
            self.process.close(fd)
            self.machine.changed.notify_all()

    def dup(self, fd: int) -> int:
        with self._call("dup"):
            file = self.process.file(fd)
            file.get()
            return self.process.install(file)

    def ioctl(self, fd: int, request: int, arg: int | WriteableBuffer = 0) -> int:
        if not isinstance(arg, int):
            check_argument(request, arg)
        with self._call("ioctl", *_names(request)):
            file = self.process.file(fd)
            return file.ioctl(self.process, request_offset(request), Argument(self.process, arg))

    def prepare(self, fd: int, request: int, arg: WriteableBuffer) -> Callable[[], int]:
        check_argument(request, arg)
        names = _names(request)
        offset, argument = request_offset(request), Argument(self.process, arg)

        def call() -> int:
            with self._call("ioctl", *names):
                return self.process.file(fd).ioctl(self.process, offset, argument)

        return call

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        with self._call("pread"):
            return self.process.file(fd).pread(self.process, length, offset)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        with self._call("pwrite"):
            return self.process.file(fd).pwrite(self.process, bytes(data), offset)

    def mmap(self, fd: int, length: int, offset: int, prot: int) -> Mapping:
        with self._call("mmap"):
            file = self.process.file(fd)
            if length <= 0 or offset % self.page_size:
                raise fail(errno.EINVAL)
            return LockedMapping(self.machine, file.mmap(self.process, length, offset, prot))

    def allocate(self, length: int, page_size: int | None = None) -> Memory:
        with self._call("allocate"):
            return FakeMemory(self.process.memory, length, self.page_of(length, page_size))

    def populate(self, address: int, length: int) -> None:
        with self._call("populate"):
            if self.process.memory.pinnable(address, length) < length:
                raise fail(errno.ENOMEM)

    # --- sysfs, procfs, devtmpfs ---

    def read_text(self, path: str) -> str:
        with self._call("read_text"):
            return self._tree.read_text(self.process, path)

    def write_text(self, path: str, text: str) -> None:
        with self._call("write_text"):
            self._tree.write_text(self.process, path, text)

    def readlink(self, path: str) -> str:
        with self._call("readlink"):
            return self._tree.readlink(self.process, path)

    def listdir(self, path: str) -> list[str]:
        with self._call("listdir"):
            return self._tree.listdir(self.process, path)

    def exists(self, path: str) -> bool:
        with self._call("exists"):
            return self._tree.exists(self.process, path)

    def stat(self, path: str) -> FileStatus:
        with self._call("stat"):
            return self._tree.stat(self.process, path)

    def chown(self, path: str, uid: int, gid: int) -> None:
        with self._call("chown"):
            self._tree.chown(self.process, path, uid, gid)

    def chmod(self, path: str, mode: int) -> None:
        with self._call("chmod"):
            self._tree.chmod(self.process, path, mode)

    def locked(self) -> LockedMemory:
        with self._call("locked"):
            return self.process.locked()

    # --- how ---

    @contextmanager
    def _call(self, *kinds: str) -> Iterator[None]:
        with self.machine.lock:
            self.machine.virqfds.deliver()
            self.machine.hooks.before(*kinds)
            yield

    def page_of(self, length: int, page_size: int | None) -> int:
        """The page of memory that a process asks for: any size that a DMA window can have, and whole ones; else EINVAL."""
        page = self.page_size if page_size is None else page_size
        known = self.machine.topology.iommu.page_sizes | self.page_size
        if length <= 0 or page.bit_count() != 1 or not known & page or (page_size is not None and length % page):
            raise fail(errno.EINVAL)
        return page


class LockedMapping(Mapping):
    """A mapping whose accesses are calls to the model, and so take its lock."""

    def __init__(self, machine: Machine, inner: Mapping) -> None:
        self.length = inner.length
        self._machine, self.inner = machine, inner

    def load(self, offset: int, width: int) -> int:
        with self._machine.lock:
            self._machine.virqfds.deliver()
            return self.inner.load(offset, width)

    def store(self, offset: int, width: int, value: int) -> None:
        with self._machine.lock:
            self._machine.virqfds.deliver()
            self.inner.store(offset, width, value)

    def close(self) -> None:
        with self._machine.lock:
            self.inner.close()
            self._machine.changed.notify_all()


def from_url(url: str) -> FakeBackend:
    """The backend of a URL such as ``fake:power8?page_size=65536&kernel=7.2``, on a machine of its own."""
    from vfio.fake import presets

    machine, process = presets.machine(url)
    return FakeBackend(machine, process, url)
