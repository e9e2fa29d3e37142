"""URLs of the served fake, and what is said where nobody answers."""

from __future__ import annotations

import os
from typing import NamedTuple
from urllib.parse import quote, unquote

from vfio import errors

SCHEME = "unix:"
_HIGHEST_ID = (1 << 32) - 2


class Address(NamedTuple):
    """Where a server is, and who a program says it is there; None is for what it really is."""

    path: str
    uid: int | None = None
    groups: tuple[int, ...] | None = None
    memlock: int | None = None
    """Bytes; -1 is unlimited."""
    ipc_lock: bool | None = None


def make(path: str, uid: int | None = None) -> str:
    """The URL of the server at `path`."""
    return SCHEME + quote(path, safe="/._-~+@:,=") + ("" if uid is None else f"?uid={uid}")


def parse(url: str) -> Address:
    """What a URL says.  Raises `errors.NoSuchBackend` for an option that there is not."""
    path, question, query = url.removeprefix(SCHEME).partition("?")
    if not path:
        raise _bad(url, "it names no socket")
    found: dict[str, int | bool | tuple[int, ...]] = {}
    for item in query.split("&") if question else ():
        name, _, text = item.partition("=")
        number = _number(text)
        numbers = tuple(_number(each) for each in text.split(","))
        if name in found:
            raise _bad(url, f"{name} is said twice")
        if name == "uid" and number is not None and number <= _HIGHEST_ID:
            found[name] = number
        elif name == "groups" and all(each is not None and each <= _HIGHEST_ID for each in numbers):
            found[name] = numbers  # type: ignore[assignment]
        elif name == "memlock" and (text == "unlimited" or (number is not None and number < 1 << 63)):
            found[name] = -1 if number is None else number
        elif name == "ipc_lock" and text in ("0", "1"):
            found[name] = text == "1"
        else:
            raise _bad(url, f"no option {item!r}; there are uid=N, groups=N,..., memlock=BYTES|unlimited, ipc_lock=0|1")
    return Address(os.path.abspath(unquote(path)), **found)  # type: ignore[arg-type]


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 21 else None


def forbidden(url: str, path: str, cause: OSError) -> errors.NoSuchBackend:
    """The file's mode keeps this user out."""
    error = errors.NoSuchBackend(url, f"{path}: {os.strerror(cause.errno or 0)}: the server is another user's")
    error.remedy = "vfio fake serve --socket PATH starts one of your own; say ?uid=N to be another user on its machine"
    return error


def turned_away(url: str, path: str) -> errors.NoSuchBackend:
    """The other side ended the connection without a word."""
    error = errors.NoSuchBackend(
        url, f"what listens at {path} is no server of vfio, or serves its owner and root alone"
    )
    error.remedy = "vfio fake serve --socket PATH starts one of your own"
    return error


def _bad(url: str, why: str) -> errors.NoSuchBackend:
    error = errors.NoSuchBackend(url, why)
    error.remedy = "unix:PATH?OPTIONS, as vfio fake serve prints it"
    return error
