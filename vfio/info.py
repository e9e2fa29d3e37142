"""Info ioctls: a struct whose argsz grows until the capability chain fits, and the chain decoded.

Kernel document: include/uapi/linux/vfio.h, "VFIO_INFO_CAP"; the offset of the first capability and each `next` count
from the beginning of the info struct.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

from vfio import errors, uapi
from vfio.backend import Backend

S = TypeVar("S", bound=uapi.Struct)


class Capability(NamedTuple):
    """One capability of an info struct; `data` starts with its header."""

    id: int
    version: int
    data: memoryview


def get(backend: Backend, fd: int, request: int, struct: type[S], what: str, **fields: Any) -> S:
    """Make the info ioctl `request`, once more with a larger buffer where the kernel asks for one."""
    needed = uapi.sizeof(struct)
    while True:
        info: S = struct.sized(needed, **fields)
        try:
            backend.ioctl(fd, request, uapi.buffer(info))
        except OSError as error:
            raise errors.CallFailed(error.errno or errno.EIO, what) from error
        # The struct was made with argsz = needed; only a chain that does not fit makes the kernel raise it.
        wanted: int = info.argsz  # type: ignore[attr-defined]
        if wanted <= needed:
            return info
        needed = wanted


def chain(info: uapi.Struct, first: int, what: str) -> Iterator[Capability]:
    """The capabilities of `info`, the first of which is at byte `first` (0: there are none).

    Raises `errors.CallFailed` for a chain that leaves the struct or runs in a circle.
    """
    whole = memoryview(uapi.buffer(info)).cast("B")
    header_size = uapi.sizeof(uapi.vfio_info_cap_header)
    seen: set[int] = set()
    starts: list[tuple[int, uapi.vfio_info_cap_header]] = []
    offset = first
    while offset:
        if offset in seen:
            raise errors.CallFailed(errno.EIO, what, f"the capability chain runs in a circle at offset {offset}")
        if offset + header_size > whole.nbytes:
            raise errors.CallFailed(
                errno.EIO, what, f"a capability at offset {offset} is outside the {whole.nbytes} bytes"
            )
        seen.add(offset)
        header = uapi.from_buffer(uapi.vfio_info_cap_header, bytes(whole[offset : offset + header_size]))
        starts.append((offset, header))
        offset = header.next
    # A capability does not tell its length: it ends where the next one in memory begins.
    begins = sorted(start for start, _ in starts)
    end_of = dict(zip(begins, [*begins[1:], whole.nbytes], strict=False))
    for start, header in starts:
        yield Capability(header.id, header.version, whole[start : end_of[start]])
