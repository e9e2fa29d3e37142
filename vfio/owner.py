"""Whom a device node is given to: users and groups of this host."""

from __future__ import annotations

import grp
import os
import pwd
from typing import NamedTuple

from vfio import diagnose, errors

_HIGHEST = (1 << 32) - 2  # the highest number means "no change"


class Owner(NamedTuple):
    """Who gets a file."""

    uid: int
    gid: int | None
    """None: the file's group stays."""


def parse(text: str) -> Owner:
    """``USER`` or ``USER:GROUP``, each a name or a number.  Raises `errors.NoSuchUser`."""
    user, colon, group = text.partition(":")
    return Owner(_uid(user, text), _gid(group, text) if colon else None)


def me() -> str:
    """Who this process is, for a person."""
    uid = os.geteuid()
    name = diagnose.user_name(uid)
    return f"uid {uid}" if name == str(uid) else f"{name} (uid {uid})"


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
