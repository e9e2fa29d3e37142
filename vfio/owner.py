"""Users and groups: whom a device node is given to, and who this process is."""

from __future__ import annotations

import grp
import pwd
from typing import NamedTuple

from vfio import errors
from vfio.backend import Backend

_HIGHEST = (1 << 32) - 2  # the highest number means "no change"


def user_name(uid: int) -> str:
    """The name of a user, or the number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int) -> str:
    """The name of a group of users, or the number where it has none."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def named(uid: int, gid: int) -> str:
    """``user:group``, by name where they have one."""
    return f"{user_name(uid)}:{group_name(gid)}"


class Owner(NamedTuple):
    """Who gets a file."""

    uid: int
    gid: int | None
    """None: the file's group stays."""


def parse(text: str) -> Owner:
    """``USER`` or ``USER:GROUP``, each a name or a number.  Raises `errors.NoSuchUser`."""
    user, colon, group = text.partition(":")
    return Owner(_uid(user, text), _gid(group, text) if colon else None)


class Identity(NamedTuple):
    """Who this process is for the kernel behind a backend, which may be a modelled one."""

    uid: int
    groups: tuple[int, ...]

    def __str__(self) -> str:
        name = user_name(self.uid)
        return f"uid {self.uid}" if name == str(self.uid) else f"{name} (uid {self.uid})"


def me(backend: Backend) -> Identity:
    """Effective user and groups of this process.  (proc_pid_status(5))"""
    fields = dict(line.split(":", 1) for line in backend.read_text("/proc/self/status").splitlines() if ":" in line)
    _real, uid, *_ = map(int, fields["Uid"].split())
    _real, gid, *_ = map(int, fields["Gid"].split())
    return Identity(uid, (gid, *map(int, fields["Groups"].split())))


def _uid(text: str, whole: str) -> int:
    try:
        return pwd.getpwnam(text).pw_uid
    except (KeyError, ValueError):
        return _number(text, whole, "user")


def _gid(text: str, whole: str) -> int:
    try:
        return grp.getgrnam(text).gr_gid
    except (KeyError, ValueError):
        return _number(text, whole, "group")


def _number(text: str, whole: str, kind: str) -> int:
    if text.isascii() and text.isdecimal() and int(text) <= _HIGHEST:
        return int(text)
    raise errors.NoSuchUser(whole, f"this host has no {kind} {text!r}")
