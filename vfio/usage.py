"""What the host uses a PCI device for: network interfaces that are up, disks that are mounted or otherwise in use.

Block devices and network interfaces name the PCI device they sit on in the path that their sysfs link points to:
that finds them behind any driver, virtio, SCSI, USB or NVMe.  Kernel users of a disk that sysfs and /proc do not show
(a ZFS pool) are not found.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

from vfio import address as addresses
from vfio.backend import Backend, missing

NET = "/sys/class/net"
BLOCK = "/sys/class/block"
BTRFS = "/sys/fs/btrfs"

_IFF_UP = 1
_NVME_SUBSYSTEM = re.compile(r"/virtual/nvme-subsystem/(nvme-subsys\d+)/")


def of_devices(backend: Backend) -> dict[str, list[str]]:
    """For each PCI address that the host depends on, what it is in use for, as phrases for a person."""
    uses: dict[str, list[str]] = {}
    for name in _list(backend, NET):
        for address in _addresses(backend, f"{NET}/{name}"):
            if int(_text(backend, f"{NET}/{name}/flags") or "0", 16) & _IFF_UP:
                uses.setdefault(address, []).append(f"network interface {name} is up")
    busy = _busy_disks(backend)
    for name in sorted(_list(backend, BLOCK)):
        phrases = busy.get(_text(backend, f"{BLOCK}/{name}/dev") or "", [])
        above = [each for each in sorted(_list(backend, f"{BLOCK}/{name}/holders")) if each != name]
        phrases = [*phrases, *(f"in use by {each}" for each in above)]
        if phrases:
            for address in _addresses(backend, f"{BLOCK}/{name}"):
                uses.setdefault(address, []).extend(f"disk {name} is {phrase}" for phrase in phrases)
    return uses


def _busy_disks(backend: Backend) -> dict[str, list[str]]:
    """What the block devices are in use for, by ``major:minor``."""
    busy: dict[str, list[str]] = {}

    def add(number: str | None, phrase: str) -> None:
        if number is not None and phrase not in busy.setdefault(number, []):
            busy[number].append(phrase)

    for line in (_text(backend, "/proc/self/mountinfo") or "").splitlines():
        mount, _, source = line.partition(" - ")
        fields, source_fields = mount.split(" "), source.split(" ")
        if len(fields) > 4:
            phrase = f"mounted on {_unescape(fields[4])}"
            add(fields[2], phrase)
            # btrfs mounts have a number of their own; their source is the disk.
            if len(source_fields) > 1 and source_fields[1].startswith("/dev/"):
                add(_number(backend, _unescape(source_fields[1])), phrase)
    for line in (_text(backend, "/proc/swaps") or "").splitlines()[1:]:
        add(_number(backend, _unescape(line.split()[0])), "swap")
    for filesystem in _list(backend, BTRFS):
        for name in _list(backend, f"{BTRFS}/{filesystem}/devices"):
            add(_text(backend, f"{BLOCK}/{name}/dev"), "part of a mounted btrfs")
    return busy


def _addresses(backend: Backend, link: str) -> Iterator[str]:
    """The PCI devices that a class device sits on: the last address in its path, bridges come before it."""
    try:
        target = backend.readlink(link)
    except OSError as error:
        if missing(error):
            return
        raise
    found = [part for part in target.split("/") if addresses.is_address(part)]
    if found:
        yield found[-1]
        return
    # A namespace that several controllers could serve hangs under its subsystem, which links to the controllers.
    subsystem = _NVME_SUBSYSTEM.search(target)
    if subsystem:
        where = f"/sys/class/nvme-subsystem/{subsystem.group(1)}"
        for name in _list(backend, where):
            if re.fullmatch(r"nvme\d+", name):
                yield from _addresses(backend, f"{where}/{name}")


def _number(backend: Backend, path: str) -> str | None:
    try:
        rdev = backend.stat(path).rdev
    except OSError:
        return None
    return f"{os.major(rdev)}:{os.minor(rdev)}" if rdev else None


def _unescape(field: str) -> str:
    """Blanks in /proc/self/mountinfo and /proc/swaps are octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), field)


def _text(backend: Backend, path: str) -> str | None:
    try:
        return backend.read_text(path).strip()
    except OSError as error:
        # An interface that is just going away answers EINVAL.
        if missing(error) or isinstance(error, PermissionError) or error.errno == errno.EINVAL:
            return None
        raise


def _list(backend: Backend, path: str) -> list[str]:
    try:
        return backend.listdir(path)
    except OSError as error:
        if missing(error):
            return []
        raise
