"""Devices that cannot be taken from the host or given back, and plans and journals of that."""

from __future__ import annotations

import errno as E
import os
from collections.abc import Sequence

from vfio.errors.base import VfioError


class IsBridge(VfioError):
    """Bridges stay with the host."""

    def __init__(self, address: str) -> None:
        super().__init__(
            E.EINVAL,
            f"{address} cannot be assigned",
            "it is a bridge, and bridges stay with the host",
            "name the devices below it; bridges do not keep a group from being viable",
        )


class NotPrivileged(VfioError):
    """A change that only root may make."""

    def __init__(self, what: str, user: str, errno: int = E.EACCES) -> None:
        super().__init__(errno, what, f"only root may do that, and this process is {user}", "run it with sudo")


class NoSuchUser(VfioError, ValueError):
    """Text that names no user (or group) of this host."""

    def __init__(self, text: str, why: str) -> None:
        super().__init__(E.EINVAL, f"cannot give a device to {text!r}", why, "say USER or USER:GROUP, names or numbers")


class NoJournal(VfioError):
    """The directory of the journals cannot be written."""

    def __init__(self, directory: str, cause: OSError) -> None:
        super().__init__(
            cause.errno or E.EIO,
            f"cannot keep a journal in {directory}",
            os.strerror(cause.errno or E.EIO),
            ("run it with sudo" if os.geteuid() else "it is needed to put things back")
            + "; the environment variable VFIO_STATE_DIR can name another directory",
        )


class JournalCorrupt(VfioError):
    """The journal cannot be understood, so that nothing can be restored from it."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(
            E.EINVAL,
            f"cannot read the journal {path}",
            why,
            "nothing was changed; see what vfio list --driver vfio-pci shows, put that right by hand, "
            f"and remove the journal: rm {path}",
        )


class NotRestored(VfioError):
    """Some of what had to be put back could not be; the rest was."""

    def __init__(self, failures: Sequence[tuple[str, OSError]]) -> None:
        self.failures = tuple(failures)
        first = failures[0][1]
        # An error of ours has its own remedy, on lines of its own.
        super().__init__(
            first.errno or E.EIO,
            "not everything could be put back",
            "; ".join(f"{name}: {_short(error)}" for name, error in failures),
            (getattr(first, "remedy", "") + "\n  " if getattr(first, "remedy", "") else "")
            + "the journal keeps what is left: vfio restore --all tries again",
        )


class NotPutBack(VfioError):
    """A change failed, and what had been changed until then could not all be put back."""

    def __init__(self, cause: OSError, failures: Sequence[tuple[str, OSError]]) -> None:
        self.failures = tuple(failures)
        super().__init__(
            cause.errno or E.EIO,
            _short(cause),
            "and not everything could be put back: "
            + "; ".join(f"{name}: {_short(error)}" for name, error in failures),
            "the journal keeps what is left: vfio restore --all tries again",
        )


class RolledBack(VfioError):
    """A change failed, and all that had been changed until then was put back."""

    def __init__(self, cause: OSError, names: Sequence[str]) -> None:
        self.names = tuple(names)
        """What was put back: addresses of devices, and paths of nodes and files."""
        mends = f"{cause.remedy}\n  " if isinstance(cause, VfioError) and cause.remedy else ""
        super().__init__(
            cause.errno or E.EIO,
            cause.what if isinstance(cause, VfioError) else str(cause.filename or "the change failed"),
            cause.why if isinstance(cause, VfioError) else cause.strerror or str(cause),
            mends + (f"put back as before: {', '.join(names)}" if names else "nothing had been changed"),
        )


class BadPlan(VfioError, ValueError):
    """A plan that breaks a rule, or that does not fit this host; nothing was changed."""

    def __init__(self, where: str, rule: str) -> None:
        super().__init__(E.EINVAL, where, rule, "nothing was changed")


def _short(error: OSError) -> str:
    return f"{error.what}: {error.why}" if isinstance(error, VfioError) else str(error)
