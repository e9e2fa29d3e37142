"""What assignment changed, and how it was before: the file that makes undo exact, even after a crash.

One file a backend, in ``/run/vfio`` for root, else in ``$XDG_RUNTIME_DIR/vfio`` or ``~/.local/state/vfio``; the
environment variable ``VFIO_STATE_DIR`` names another directory.  It is written, and on the disk, before anything is
changed, locked (flock) while something changes, replaced as a whole, and gone when nothing is left to restore.  A
reboot undoes all assignment, so a journal of an earlier boot is stale: it is ignored, and replaced by the next change.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vfio import address as addresses
from vfio import errors, sysfs
from vfio.backend import Backend, missing

DIRECTORY = "VFIO_STATE_DIR"
"""Environment variable that names the directory of the journals."""

_VERSION = 1
_LOCK_SECONDS = 10.0
_DRIVER = re.compile(r"[^/\x00-\x1f]{1,255}")
_ID = re.compile(r"[0-9a-f]{4} [0-9a-f]{4}( [0-9a-f]{4} [0-9a-f]{4})?")


@dataclass(frozen=True)
class DeviceState:
    """How a device was before it was first changed."""

    address: str
    group: int | None
    driver: str | None
    override: str | None
    new_id: str | None = None
    """The id that was added to vfio-pci for it, where it has no driver_override."""


@dataclass(frozen=True)
class NodeState:
    """Owner and mode of ``/dev/vfio/N`` before they were first changed."""

    group: int
    uid: int = 0
    gid: int = 0
    mode: int = 0o600
    """Permission bits.  The defaults are those that the kernel gives a new node."""
    unprotected: bool = False
    """Whether it is ``/dev/vfio/noiommu-N``."""

    @property
    def path(self) -> str:
        return sysfs.node(self.group, self.unprotected)


@dataclass
class Journal:
    """The content of a journal, and its file."""

    path: Path
    boot_id: str
    devices: dict[str, DeviceState] = field(default_factory=dict)
    """By address, in the order in which they were changed."""
    nodes: dict[int, NodeState] = field(default_factory=dict)
    """By group."""
    stale: int = 0
    """How many devices a journal of an earlier boot names; they are not in `devices`."""

    def save(self) -> None:
        """Replace the file, and have it on the disk; without content the file goes.  Raises `errors.NoJournal`."""
        try:
            if self.devices or self.nodes:
                self._replace()
            else:
                self.path.unlink(missing_ok=True)
        except OSError as error:
            raise errors.NoJournal(str(self.path.parent), error) from error

    def _replace(self) -> None:
        content = {
            "version": _VERSION,
            "boot_id": self.boot_id,
            "devices": [asdict(device) for device in self.devices.values()],
            "nodes": [asdict(node) for node in self.nodes.values()],
        }
        new = self.path.with_suffix(".new")
        with new.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path)
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def directory() -> Path:
    """Where the journals of this user are."""
    if named := os.environ.get(DIRECTORY):
        return Path(named)
    if os.geteuid() == 0:
        return Path("/run/vfio")
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "vfio"
    return Path.home() / ".local" / "state" / "vfio"


def path(backend: Backend) -> Path:
    """The journal's file for this backend."""
    return directory() / (quote(backend.unwrapped().url.removesuffix(":"), safe="") + ".json")


def load(backend: Backend) -> Journal:
    """The journal as it is now, empty where there is none or only a stale one.

    Raises `errors.JournalCorrupt` for a file that is no journal.
    """
    where = path(backend)
    boot_id = _boot_id(backend)
    try:
        text = where.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Journal(where, boot_id)
    except UnicodeDecodeError as error:
        raise errors.JournalCorrupt(str(where), str(error)) from None
    try:
        found = _parse(where, json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise errors.JournalCorrupt(str(where), f"{type(error).__name__}: {error}") from None
    if found.boot_id != boot_id:
        return Journal(where, boot_id, stale=len(found.devices))
    return found


@contextlib.contextmanager
def locked(backend: Backend) -> Iterator[Journal]:
    """The journal, for changes: nobody else changes assignments of this backend meanwhile.

    Raises `errors.Busy` when somebody else holds the lock for more than 10 seconds.
    """
    lock_path = path(backend).with_suffix(".lock")
    try:
        lock_path.parent.mkdir(0o755, parents=True, exist_ok=True)
        fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise errors.NoJournal(str(lock_path.parent), error) from error
    try:
        _lock(fd, lock_path)
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        yield load(backend)
    finally:
        os.close(fd)  # and with it goes the lock


def _lock(fd: int, lock_path: Path) -> None:
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise errors.Busy(
                    f"cannot lock {lock_path}",
                    _lock_holder(fd),
                    "another vfio command is changing assignments: try again when it is done",
                    errno.EAGAIN,
                ) from None
        time.sleep(0.02)


def _lock_holder(fd: int) -> list[errors.Holder]:
    text = os.pread(fd, 32, 0).strip()
    return [errors.Holder(int(text), "vfio")] if text.isdigit() else []


def _boot_id(backend: Backend) -> str:
    try:
        return backend.read_text("/proc/sys/kernel/random/boot_id").strip()
    except OSError as error:
        if missing(error):
            return ""
        raise


def _parse(where: Path, content: Any) -> Journal:
    """The journal in decoded JSON.  What it says ends up in paths, so nothing is taken on trust."""
    if content["version"] != _VERSION:
        raise ValueError(f"version {content['version']!r} is not {_VERSION}")
    journal = Journal(where, content["boot_id"])
    for item in content["devices"]:
        state = DeviceState(**item)
        if not addresses.is_address(state.address):
            raise ValueError(f"{state.address!r} is not an address")
        for name in (state.driver, state.override):
            if name is not None and (not _DRIVER.fullmatch(name) or name in (".", "..")):
                raise ValueError(f"{name!r} is not the name of a driver")
        if state.new_id is not None and not _ID.fullmatch(state.new_id):
            raise ValueError(f"{state.new_id!r} is not a device id")
        if state.group is not None:
            _check_numbers(state.group)
        journal.devices[state.address] = state
    for item in content["nodes"]:
        node = NodeState(**item)
        _check_numbers(node.group, node.uid, node.gid, node.mode)
        if not isinstance(node.unprotected, bool):
            raise ValueError(f"{node.unprotected!r} is not true or false")
        if node.mode & ~0o7777:
            raise ValueError(f"{node.mode:#o} is not a file mode")
        journal.nodes[node.group] = node
    return journal


def _check_numbers(*values: Any) -> None:
    for value in values:
        if type(value) is not int or value < 0:
            raise ValueError(f"{value!r} is not a natural number")
