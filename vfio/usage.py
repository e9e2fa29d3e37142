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
from typing import NamedTuple

from vfio import address as addresses
from vfio.backend import Backend, missing

NET = "/sys/class/net"
BLOCK = "/sys/class/block"
BTRFS = "/sys/fs/btrfs"

_IFF_UP = 1
_NVME_SUBSYSTEM = re.compile(r"/virtual/nvme-subsystem/(nvme-subsys\d+)/")


class Interface(NamedTuple):
    """A network interface, and the PCI device it sits on."""

    name: str
    up: bool
    address: str


class Disk(NamedTuple):
    """A block device (a partition too), the PCI devices it sits on, and what it is in use for."""

    name: str
    number: str
    """``major:minor``"""
    addresses: tuple[str, ...]
    """More than one for a namespace that several NVMe controllers can serve."""
    multipath: bool
    """Whether it hangs under such a subsystem."""
    mounted: tuple[str, ...]
    """Where, most recent last."""
    swap: bool
    btrfs: bool
    """A member of a mounted btrfs."""
    holders: tuple[str, ...]
    """What is built on it, such as dm-0 or md0."""

    @property
    def uses(self) -> list[str]:
        """What it is in use for, as phrases for a person."""
        return [
            *(f"mounted on {where}" for where in self.mounted),
            *(["swap"] if self.swap else []),
            *(["part of a mounted btrfs"] if self.btrfs else []),
            *(f"in use by {name}" for name in self.holders),
        ]


def of_devices(backend: Backend) -> dict[str, list[str]]:
    """For each PCI address that the host depends on, what it is in use for, as phrases for a person."""
    uses: dict[str, list[str]] = {}
    for interface in interfaces(backend):
        if interface.up:
            uses.setdefault(interface.address, []).append(f"network interface {interface.name} is up")
    for disk in disks(backend):
        for address in disk.addresses:
            for phrase in disk.uses:
                uses.setdefault(address, []).append(f"disk {disk.name} is {phrase}")
    return uses


def interfaces(backend: Backend) -> list[Interface]:
    """The network interfaces that sit on PCI devices."""
    found = []
    for name in _list(backend, NET):
        for address in _addresses(backend, f"{NET}/{name}"):
            up = int(_text(backend, f"{NET}/{name}/flags") or "0", 16) & _IFF_UP
            found.append(Interface(name, bool(up), address))
    return found


def disks(backend: Backend) -> list[Disk]:
    """The block devices that sit on PCI devices, by name."""
    mounted, swaps, btrfs = _mounts(backend), _swaps(backend), _btrfs_members(backend)
    found = []
    for name in sorted(_list(backend, BLOCK)):
        if addresses := tuple(_addresses(backend, f"{BLOCK}/{name}")):
            number = _text(backend, f"{BLOCK}/{name}/dev") or ""
            holders = sorted(each for each in _list(backend, f"{BLOCK}/{name}/holders") if each != name)
            multipath = _NVME_SUBSYSTEM.search(_link(backend, f"{BLOCK}/{name}")) is not None
            where = tuple(dict.fromkeys(mounted.get(number, ())))
            found.append(
                Disk(name, number, addresses, multipath, where, number in swaps, number in btrfs, tuple(holders))
            )
    return found


def _mounts(backend: Backend) -> dict[str, list[str]]:
    """Where block devices are mounted, by ``major:minor``."""
    mounts: dict[str, list[str]] = {}
    for line in (_text(backend, "/proc/self/mountinfo") or "").splitlines():
        mount, _, source = line.partition(" - ")
        fields, source_fields = mount.split(" "), source.split(" ")
        if len(fields) > 4:
            mounts.setdefault(fields[2], []).append(_unescape(fields[4]))
            # btrfs mounts have a number of their own; their source is the disk.
            if len(source_fields) > 1 and source_fields[1].startswith("/dev/"):
                number = _number(backend, _unescape(source_fields[1]))
                if number is not None and number != fields[2]:
                    mounts.setdefault(number, []).append(_unescape(fields[4]))
    return mounts


def _swaps(backend: Backend) -> set[str | None]:
    lines = (_text(backend, "/proc/swaps") or "").splitlines()[1:]
    return {_number(backend, _unescape(line.split()[0])) for line in lines}


def _btrfs_members(backend: Backend) -> set[str | None]:
    return {
        _text(backend, f"{BLOCK}/{name}/dev")
        for filesystem in _list(backend, BTRFS)
        for name in _list(backend, f"{BTRFS}/{filesystem}/devices")
    }


def _addresses(backend: Backend, link: str) -> Iterator[str]:
    """The PCI devices that a class device sits on: the last address in its path, bridges come before it."""
    target = _link(backend, link)
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


def _link(backend: Backend, path: str) -> str:
    try:
        return backend.readlink(path)
    except OSError as error:
        if missing(error):
            return ""
        raise


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
