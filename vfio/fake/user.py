"""The argument of an ioctl, as the kernel sees it: a value, or an address in the caller's memory."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, TypeVar

from vfio import uapi
from vfio.fake.kernel_error import fail

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from vfio.fake.process import Process

S = TypeVar("S", bound=uapi.Struct)

_U64 = (1 << 64) - 1


class Argument:
    """What was passed as the third argument of ioctl(2)."""

    def __init__(self, process: Process, arg: int | WriteableBuffer) -> None:
        self._process = process
        self._buffer = None if isinstance(arg, int) else memoryview(arg).cast("B")
        self.value = arg & _U64 if isinstance(arg, int) else 0
        """The argument by value; 0 for a buffer, whose address means nothing to the model."""

    def copy_in(self, length: int, offset: int = 0) -> bytes:
        """`length` bytes from the argument's address; EFAULT where they cannot be read.

        What lies behind a buffer is read as zeros: the kernel would find whatever is there.
        """
        if self._buffer is None:
            return self._process.memory.read(self.value + offset, length)
        return bytes(self._buffer[offset : offset + length]).ljust(length, b"\0")

    def copy_out(self, data: bytes, offset: int = 0) -> None:
        """Write `data` at the argument's address; EFAULT where that cannot be."""
        if self._buffer is None:
            self._process.memory.write(self.value + offset, data)
        elif offset + len(data) > len(self._buffer):
            raise fail(errno.EFAULT)
        else:
            self._buffer[offset : offset + len(data)] = data

    def read(self, struct: type[S], minsz: int | None = None) -> S:
        """The struct at the argument's address, a copy: EFAULT for `minsz` unreadable bytes, EINVAL for a shorter argsz.

        `minsz` (default: the whole struct) is how many of its bytes the kernel copies; the rest is zero.
        """
        size = uapi.sizeof(struct)
        data = self.copy_in(size if minsz is None else minsz)
        found = struct()
        uapi.buffer(found)[:size] = data.ljust(size, b"\0")
        if found.argsz < len(data):  # type: ignore[attr-defined]
            raise fail(errno.EINVAL)
        return found

    def string(self, limit: int) -> str:
        """The NUL-terminated string at the argument's address; EINVAL if it is longer than `limit` - 1 bytes."""
        if self._buffer is not None:
            text = bytes(self._buffer).split(b"\0", 1)[0]
        else:
            text = b""
            while b"\0" not in text and len(text) < limit:
                # A page at a time at the most: the string may end just before a page that cannot be read.
                at = self.value + len(text)
                text += self.copy_in(min(64 - at % 64, limit - len(text)), len(text))
            text = text.split(b"\0", 1)[0] if b"\0" in text else text
        if len(text) >= limit:
            raise fail(errno.EINVAL)
        return text.decode("latin-1")
