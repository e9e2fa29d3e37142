"""How the modelled kernel refuses, and how it says that a real one would have been hurt."""

from __future__ import annotations

import os


def fail(number: int) -> OSError:
    """What a call that fails with this errno raises: ``raise fail(errno.EINVAL)``."""
    return OSError(number, os.strerror(number))


class KernelWouldBeHurt(RuntimeError):
    """The call would corrupt or hang a real kernel.

    Raised by a strict machine (the default), so that a test finds the program that makes such a call; a machine with
    ``strict=0`` answers what the real kernel returned.
    """


class KernelWouldBlock(RuntimeError):
    """The call would wait for something that only the caller itself can do."""
