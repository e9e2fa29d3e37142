"""The one seam: everything the library does to a device is a Linux call, and this is the list of them.

Above the seam nobody imports ``fcntl`` or ``mmap`` or touches ``/dev``, ``/sys`` or ``/proc``; below it nobody knows
what a container is.  A backend is chosen by a URL::

    kernel:              the real calls (the default)
    trace:URL            any other backend, each call printed to standard error
    fake:MACHINE         a kernel modelled in Python, in this process (fake:power8?page_size=65536&kernel=7.2)
    unix:PATH            such a kernel in a process of its own, shared by many programs (vfio fake serve)
    SCHEME:...           a backend that an installed package offers under the entry-point group ``vfio.backends``

The environment variable ``VFIO_BACKEND`` names the URL where a program names none.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from vfio import errors, uapi
from vfio.closing import Closing

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

DEFAULT_URL = "kernel:"
ENVIRONMENT = "VFIO_BACKEND"
ENTRY_POINTS = "vfio.backends"

# The arguments of these two are a file descriptor and a name; every other VFIO struct begins with its argsz.
_WITHOUT_ARGSZ = frozenset({uapi.VFIO_GROUP_SET_CONTAINER, uapi.VFIO_GROUP_GET_DEVICE_FD})


class FileStatus(NamedTuple):
    """What ``stat(2)`` tells and the library needs."""

    mode: int
    """Type and permission bits."""
    uid: int
    gid: int
    rdev: int
    """Device number of a device node."""


class LockedMemory(NamedTuple):
    """The locked-memory account of this process, in bytes (VmLck, RLIMIT_MEMLOCK, CAP_IPC_LOCK)."""

    locked: int
    limit: int | None
    """The soft limit; None where there is none."""
    unlimited: bool
    """True with CAP_IPC_LOCK: the kernel charges, but does not refuse."""


class Mapping(ABC):
    """Device memory, mapped.  One call of `load` or `store` is exactly one access of the device.

    Values are as the CPU sees them (native byte order); `vfio.Region` knows the device's order.
    """

    length: int

    @abstractmethod
    def load(self, offset: int, width: int) -> int:
        """Read one value of `width` (1, 2, 4 or 8) bytes at `offset`, which is a multiple of `width`."""

    @abstractmethod
    def store(self, offset: int, width: int, value: int) -> None:
        """Write one value of `width` (1, 2, 4 or 8) bytes at `offset`, which is a multiple of `width`."""

    def view(self, width: int) -> memoryview | None:
        """The mapping as a memoryview of items of `width` bytes; None where each access has to be a call."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Unmap.  Views that were given out are released; closing twice is harmless."""


class Memory(Closing, ABC):
    """Memory of this process that a device may be given: an address, a length and the size of its pages, in bytes."""

    address: int
    length: int
    page_size: int

    @property
    @abstractmethod
    def view(self) -> memoryview:
        """The bytes."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back; closing twice is harmless."""


class Backend(ABC):
    """The kernel as this process sees it.  Failures are OSErrors with the kernel's errno."""

    url: str
    """What `open_backend` made this from; names the backend's journal too."""
    page_size: int
    """Host page size in bytes: the unit of locked-memory accounting."""

    @abstractmethod
    def open(self, path: str, flags: int) -> int: ...

    @abstractmethod
    def close(self, fd: int) -> None: ...

    @abstractmethod
    def dup(self, fd: int) -> int: ...

    @abstractmethod
    def ioctl(self, fd: int, request: int, arg: int | WriteableBuffer = 0) -> int:
        """Make one ioctl; returns what the kernel returned (0 or more).

        `request` is the number for the machine that the process runs on.  An integer goes through as it is, all 64
        bits, as a value or an address, good or bad.  A writable buffer goes by its address and holds the C struct in
        native layout.  Raises ValueError for a buffer that is shorter than the argsz written in it: the kernel would
        write past its end.
        """

    def prepare(self, fd: int, request: int, arg: WriteableBuffer) -> Callable[[], int]:
        """The same ioctl on the same buffer, to be made many times: checked now, so that each call is cheap."""
        check_argument(request, arg)
        return functools.partial(self.ioctl, fd, request, arg)

    @abstractmethod
    def pread(self, fd: int, length: int, offset: int) -> bytes: ...

    @abstractmethod
    def pwrite(self, fd: int, data: bytes, offset: int) -> int: ...

    @abstractmethod
    def mmap(self, fd: int, length: int, offset: int, prot: int) -> Mapping:
        """Map device memory, shared; `prot` is PROT_READ (1) | PROT_WRITE (2)."""

    @abstractmethod
    def allocate(self, length: int, page_size: int | None = None) -> Memory:
        """Zeroed memory of `length` bytes, aligned to its page: ordinary, or hugetlb pages of `page_size` bytes."""

    @abstractmethod
    def populate(self, address: int, length: int) -> None:
        """Make every page of this process's range present and writable (MADV_POPULATE_WRITE), or raise OSError."""

    @abstractmethod
    def read_text(self, path: str) -> str: ...

    @abstractmethod
    def write_text(self, path: str, text: str) -> None:
        """One write(2) of the whole text to an existing file, as sysfs wants it."""

    @abstractmethod
    def readlink(self, path: str) -> str: ...

    @abstractmethod
    def listdir(self, path: str) -> list[str]: ...

    @abstractmethod
    def exists(self, path: str) -> bool: ...

    @abstractmethod
    def stat(self, path: str) -> FileStatus: ...

    @abstractmethod
    def chown(self, path: str, uid: int, gid: int) -> None: ...

    @abstractmethod
    def chmod(self, path: str, mode: int) -> None: ...

    @abstractmethod
    def locked(self) -> LockedMemory: ...

    def unwrapped(self) -> Backend:
        """The backend that makes the calls: itself, or the one it wraps."""
        return self


def check_argument(request: int, arg: WriteableBuffer) -> None:
    """Raise ValueError where the kernel would write behind `arg`."""
    if request in _WITHOUT_ARGSZ:
        return
    with memoryview(arg) as view:
        if view.nbytes < 4:
            raise ValueError(f"ioctl {request:#x}: a buffer of {view.nbytes} bytes has no room for argsz")
        argsz = int.from_bytes(view.cast("B")[:4], sys.byteorder)
        if argsz > view.nbytes:
            raise ValueError(f"ioctl {request:#x}: argsz is {argsz} but the buffer has only {view.nbytes} bytes")


def open_backend(url: str | None = None) -> Backend:
    """The backend named by `url`, else by VFIO_BACKEND, else ``kernel:``.

    Raises `errors.NoSuchBackend` for a scheme that nobody offers.
    """
    url = url or os.environ.get(ENVIRONMENT) or DEFAULT_URL
    scheme, colon, rest = url.partition(":")
    if not colon:
        raise errors.NoSuchBackend(url, f"a backend is named by a URL such as {DEFAULT_URL!r}")
    if scheme == "kernel":
        if rest:
            raise errors.NoSuchBackend(url, "the kernel backend takes no options: say kernel:")
        from vfio.backends import kernel

        return kernel.THIS  # one object: registrations belong to the process, whoever opens its backend
    if scheme == "trace":
        from vfio.backends.trace import TextTrace, TraceBackend

        return TraceBackend(open_backend(rest or DEFAULT_URL), TextTrace(sys.stderr))
    if scheme == "fake":
        from vfio.fake.backend import from_url

        return from_url(url)
    if scheme == "unix":
        from vfio.backends import remote

        return remote.from_url(url)
    return _third_party(scheme, url)


def _third_party(scheme: str, url: str) -> Backend:
    from importlib.metadata import entry_points  # 10 ms that only such a URL has to pay

    found = entry_points(group=ENTRY_POINTS)
    for entry in found:
        if entry.name == scheme:
            backend: Backend = entry.load()(url)
            return backend
    known = sorted({"fake", "kernel", "trace", "unix", *(entry.name for entry in found)})
    raise errors.NoSuchBackend(url, f"known schemes are {', '.join(known)}")


@functools.cache
def _shared(url: str) -> Backend:
    return open_backend(url)


def default() -> Backend:
    """The backend of VFIO_BACKEND (else ``kernel:``), one for the whole process; objects made without one use it."""
    return _shared(os.environ.get(ENVIRONMENT) or DEFAULT_URL)


def missing(error: OSError) -> bool:
    """Whether `error` says that a file or a device is not there (any more)."""
    return error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ENOTDIR)
