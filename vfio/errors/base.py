"""What every error of the library is: an OSError with what failed, why, and what to do about it."""

from __future__ import annotations

import errno as E
import os


def size(count: int) -> str:
    """`count` bytes for a person: exact in the largest binary unit that divides it."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count and count % (1 << shift) == 0:
            return f"{count >> shift} {unit}"
    return f"{count} bytes"


def span(start: int, length: int) -> str:
    """A range of addresses, half open, in hex."""
    return f"{start:#x}..{start + length:#x}"


class VfioError(OSError):
    """Base of all errors of this library."""

    def __init__(self, errno: int, what: str, why: str = "", remedy: str = "") -> None:
        super().__init__(errno, what)
        self.what = what
        self.why = why or os.strerror(errno)
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.what}: {self.why} [{E.errorcode.get(self.errno or 0, self.errno)}]"
        return f"{text}\n  {self.remedy}" if self.remedy else text


class CallFailed(VfioError):
    """A call failed for a reason that has no class of its own; the message names the call and its object."""


class UnexpectedAnswer(VfioError):
    """The kernel answered a positive number where that means that it did not do what was asked."""


class Closed(VfioError):
    """The object was closed."""

    def __init__(self, what: str) -> None:
        super().__init__(E.EBADF, what, "it is closed", "open it again")


class TimedOut(VfioError, TimeoutError):
    """What was waited for did not happen in time."""

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(E.ETIMEDOUT, what, f"nothing happened for {seconds:g} s")


class Refused(VfioError):
    """A change that would hurt the running host, refused unless forced."""

    def __init__(self, what: str, why: str, remedy: str, errno: int = E.EBUSY) -> None:
        super().__init__(errno, what, why, remedy)
