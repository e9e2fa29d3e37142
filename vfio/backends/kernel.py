"""The real kernel: each method is the system call that its name says."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import mmap
import os
import resource
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from vfio.backend import Backend, FileStatus, LockedMemory, Mapping, Memory, check_argument

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_MAP_HUGETLB = 0x40000
_MAP_HUGE_SHIFT = 26
_MADV_POPULATE_WRITE = 23
_CAP_IPC_LOCK = 1 << 14
_ITEM: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}

_libc = ctypes.CDLL(None, use_errno=True)
# Declared with fewer arguments than it is called with: ctypes then makes a variadic call, which has an ABI of
# its own on ppc64le and AArch64.
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class KernelMapping(Mapping):
    """Device memory through ``mmap``: an item of a cast memoryview is loaded or stored by one instruction."""

    def __init__(self, fd: int, length: int, offset: int, prot: int) -> None:
        self.length = length
        self._mmap = mmap.mmap(fd, length, flags=mmap.MAP_SHARED, prot=prot, offset=offset)
        self._views: dict[int, memoryview] = {}

    def view(self, width: int) -> memoryview:
        found = self._views.get(width)
        if found is None:
            with memoryview(self._mmap) as whole:
                found = self._views[width] = whole[: self.length // width * width].cast(_ITEM[width])
        return found

    def load(self, offset: int, width: int) -> int:
        value: int = self.view(width)[offset // width]
        return value

    def store(self, offset: int, width: int, value: int) -> None:
        self.view(width)[offset // width] = value

    def close(self) -> None:
        while self._views:
            self._views.popitem()[1].release()
        self._mmap.close()


class KernelMemory(Memory):
    """Anonymous memory.  Shared, so that a fork leaves parent and child on the page that the device was given."""

    def __init__(self, length: int, page_size: int | None) -> None:
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
        if page_size is not None and page_size != mmap.PAGESIZE:
            flags |= _MAP_HUGETLB | (page_size.bit_length() - 1) << _MAP_HUGE_SHIFT
        self.length = length
        self.page_size = page_size or mmap.PAGESIZE
        self._mmap = mmap.mmap(-1, length, flags=ctypes.c_int(flags).value)
        self._view = memoryview(self._mmap)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mmap))

    @property
    def view(self) -> memoryview:
        return self._view

    def close(self) -> None:
        self._view.release()
        self._mmap.close()


class KernelBackend(Backend):
    """The calls of this process to the kernel it runs on."""

    url = "kernel:"
    page_size = mmap.PAGESIZE

    def open(self, path: str, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC)

    def close(self, fd: int) -> None:
        os.close(fd)

    def dup(self, fd: int) -> int:
        return os.dup(fd)

    def ioctl(self, fd: int, request: int, arg: int | WriteableBuffer = 0) -> int:
        if isinstance(arg, int):
            # fcntl.ioctl takes integers of 31 bits only.
            result: int = _libc.ioctl(fd, request, ctypes.c_ulong(arg))
            if result < 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
            return result
        check_argument(request, arg)
        if fd < 0:  # which fcntl takes for a mistake in the program, and the kernel for a bad descriptor
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return int(fcntl.ioctl(fd, request, arg, True))

    def prepare(self, fd: int, request: int, arg: WriteableBuffer) -> Callable[[], int]:
        check_argument(request, arg)
        return functools.partial(fcntl.ioctl, fd, request, arg, True)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        return os.pread(fd, length, offset)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def mmap(self, fd: int, length: int, offset: int, prot: int) -> Mapping:
        return KernelMapping(fd, length, offset, prot)

    def allocate(self, length: int, page_size: int | None = None) -> Memory:
        return KernelMemory(length, page_size)

    def populate(self, address: int, length: int) -> None:
        if _libc.madvise(address, length, _MADV_POPULATE_WRITE):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def read_text(self, path: str) -> str:
        # sysfs hands out what the hardware says: names in it are not always UTF-8.
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()

    def write_text(self, path: str, text: str) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def readlink(self, path: str) -> str:
        return os.readlink(path)

    def listdir(self, path: str) -> list[str]:
        return os.listdir(path)

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def stat(self, path: str) -> FileStatus:
        found = os.stat(path)
        return FileStatus(found.st_mode, found.st_uid, found.st_gid, found.st_rdev)

    def chown(self, path: str, uid: int, gid: int) -> None:
        os.chown(path, uid, gid)

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(path, mode)

    def locked(self) -> LockedMemory:
        fields = dict(line.split(":", 1) for line in self.read_text("/proc/self/status").splitlines() if ":" in line)
        soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        return LockedMemory(
            locked=int(fields["VmLck"].split()[0]) * 1024,
            limit=None if soft == resource.RLIM_INFINITY else soft,
            unlimited=bool(int(fields["CapEff"], 16) & _CAP_IPC_LOCK),
        )


THIS = KernelBackend()
"""The kernel that this process runs on."""
