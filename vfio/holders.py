"""Which processes have a file of VFIO open, as /proc shows them.

Processes that this one may not look into are skipped: only root sees all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from vfio import errors
from vfio.backend import Backend

_DEVICE_FD = "anon_inode:[vfio-device]"
_GROUP_FD = re.compile(r"/dev/vfio/(?:noiommu-)?\d+( \(deleted\))?")
_COMMAND_LENGTH = 60


def of(backend: Backend, path: str) -> list[errors.Holder]:
    """Who keeps ``/dev/vfio/N`` busy, to be asked when opening it gave EBUSY.

    An open device keeps its group busy after the group's file is closed, and no kernel before 7.2 tells which device
    a descriptor stands for.  So where nobody has the group itself open, those are named who have some VFIO device,
    and no group, open.
    """
    links = _all_links(backend)
    found = _having(links, path) or [pid for pid, open_files in links.items() if _has_bare_device(open_files)]
    return [errors.Holder(pid, _command(backend, pid)) for pid in sorted(found)]


def having_open(backend: Backend, path: str) -> list[errors.Holder]:
    """The processes that have `path` open."""
    return [errors.Holder(pid, _command(backend, pid)) for pid in sorted(_having(_all_links(backend), path))]


def _all_links(backend: Backend) -> dict[int, list[str]]:
    return {pid: _links(backend, pid) for pid in _pids(backend)}


def _having(links: dict[int, list[str]], path: str) -> list[int]:
    return [pid for pid, open_files in links.items() if path in open_files or f"{path} (deleted)" in open_files]


def _has_bare_device(links: list[str]) -> bool:
    return _DEVICE_FD in links and not any(_GROUP_FD.fullmatch(link) for link in links)


def _pids(backend: Backend) -> Iterator[int]:
    return (int(name) for name in backend.listdir("/proc") if name.isdecimal())


def _links(backend: Backend, pid: int) -> list[str]:
    try:
        names = backend.listdir(f"/proc/{pid}/fd")
    except OSError:
        return []
    links = []
    for name in names:
        try:
            links.append(backend.readlink(f"/proc/{pid}/fd/{name}"))
        except OSError:
            continue  # closed since
    return links


def _command(backend: Backend, pid: int) -> str:
    for name in ("cmdline", "comm"):
        try:
            text = backend.read_text(f"/proc/{pid}/{name}").replace("\0", " ").strip()
        except OSError:
            continue
        if text:
            return text if len(text) <= _COMMAND_LENGTH else text[: _COMMAND_LENGTH - 3] + "..."
    return "?"
