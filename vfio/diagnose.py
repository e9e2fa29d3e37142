"""From a bare errno to the reason: what has to be looked up before the right error can be raised."""

from __future__ import annotations

import errno

from vfio import errors, owner, sysfs
from vfio.backend import Backend, missing

_FIRST_GOOD = (6, 4)


def open_error(backend: Backend, path: str, error: OSError) -> errors.VfioError:
    """Why `path` under /dev/vfio could not be opened."""
    if error.errno in (errno.EACCES, errno.EPERM):
        status = backend.stat(path)
        belongs_to = owner.named(status.uid, status.gid)
        return errors.AccessDenied(path, belongs_to, status.mode, owner.user_name(owner.me(backend).uid), error.errno)
    if missing(error):
        return errors.NoVfio(path, error.errno or errno.ENOENT)
    return errors.CallFailed(error.errno or errno.EIO, f"cannot open {path}")


def broken_on_power(backend: Backend) -> str | None:
    """The kernel's release, if it is one in which VFIO does not work on POWER (before 6.4); else None."""
    if not sysfs.on_power(backend):
        return None
    release = sysfs.kernel_release(backend)
    numbers = release.split("-")[0].split(".")[:2]
    try:
        version = tuple(int(number) for number in numbers)
    except ValueError:
        return None
    return release if version < _FIRST_GOOD else None
