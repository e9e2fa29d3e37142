"""What the host is and does besides VFIO: its release, what it uses its devices for, who runs on it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vfio import topology

if TYPE_CHECKING:
    from vfio.fake.machine import Machine
    from vfio.fake.process import Process

_RELEASES = {(6, 12): "6.12.107+deb13", (7, 2): "7.2.13+deb14"}


@dataclass
class Inode:
    """Owner and permission bits of a file, once they were changed."""

    uid: int
    gid: int
    mode: int


@dataclass
class Files:
    """What was written to the files of a device, where nothing but the files knows."""

    msi_bus: bool = True
    broken_parity_status: bool = False
    numa_node: int = 0
    dma_mask_bits: int = 32


@dataclass
class Host:
    """The host around the devices.  Tests change it at will."""

    release: str
    """What uname -r says."""
    memory: int
    """Bytes of RAM."""
    boot_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    interfaces: dict[str, tuple[str, topology.Interface]] = field(default_factory=dict)
    """By name: the address of the device, and the interface."""
    disks: dict[str, tuple[str, topology.Disk]] = field(default_factory=dict)
    commands: dict[int, str] = field(default_factory=dict)
    """What processes run, by pid, where it is not this very program."""
    inodes: dict[str, Inode] = field(default_factory=dict)
    """Owners and modes that were changed, by path."""
    files: dict[str, Files] = field(default_factory=dict)
    """By the address of the device."""

    @classmethod
    def of(cls, machine: Machine) -> Host:
        """The host that the topology describes."""
        found = machine.topology
        release = found.platform.release
        if release is None:
            flavour = "amd64" if found.platform.name == "PC" else "powerpc64le"
            release = f"{_RELEASES[machine.kernel]}-{flavour}{'-64k' if machine.page_size == 65536 else ''}"
        host = cls(release, found.memory)
        for device in found.devices:
            for interface in device.interfaces:
                host.interfaces[interface.name] = device.address, interface
            for disk in device.disks:
                host.disks[disk.name] = device.address, disk
        return host

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor number of the release."""
        major, minor = self.release.split("-")[0].split(".")[:2]
        return int(major), int(minor)

    def network(self, address: str, name: str, *, up: bool = True) -> None:
        """Give the device a network interface; it is there while an ordinary driver of the host's has the device."""
        self.interfaces[name] = address, topology.Interface(name, up)

    def disk(
        self,
        address: str,
        name: str,
        number: str,
        *,
        mounted: tuple[str, ...] = (),
        swap: bool = False,
        btrfs: bool = False,
        multipath: bool = False,
        holders: tuple[str, ...] = (),
    ) -> None:
        """Give the device a disk (or a partition) ``major:minor``, and the host a use for it."""
        major, minor = map(int, number.split(":"))
        self.disks[name] = address, topology.Disk(name, (major, minor), mounted, swap, btrfs, holders, multipath)

    def command(self, process: Process) -> list[str]:
        """The command line of a process."""
        if process.pid in self.commands:
            return self.commands[process.pid].split(" ")
        try:
            with open(f"/proc/{process.memory.pid}/cmdline", encoding="utf-8", errors="replace") as file:
                return file.read().rstrip("\0").split("\0")
        except OSError:
            return [""]  # it has ended

    def forget(self, path: str) -> None:
        """The file at `path`, or the directory with all that is in it, has gone."""
        for known in list(self.inodes):
            if known == path or known.startswith(f"{path}/"):
                del self.inodes[known]
