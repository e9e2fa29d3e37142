"""The files of the machine, as its processes reach them: paths, links, permissions; and what /sys consists of.

Errnos are those of a real kernel: EISDIR, ENOTDIR, ELOOP, and EACCES even for root where a file of sysfs has no bit for
what is wanted.
"""

from __future__ import annotations

import errno
import itertools
import os
import posixpath
import stat
from typing import TYPE_CHECKING

from vfio.backend import FileStatus
from vfio.fake import debugfs, devtmpfs, pci_sysfs, procfs
from vfio.fake.host import Inode
from vfio.fake.kernel_error import fail
from vfio.fake.kernfs import Attribute, AttributeFile, DeviceNode, Directory, Link, Node, directory, text

if TYPE_CHECKING:
    from vfio.fake.file import File
    from vfio.fake.iommu_group import IommuGroup
    from vfio.fake.machine import Machine
    from vfio.fake.pci import PciDevice
    from vfio.fake.process import Process

_READ, _WRITE, _SEARCH = 4, 2, 1
_MOST_LINKS = 40
_ISA_BRIDGE = 0x0601
_NOIOMMU = "enable_unsafe_noiommu_mode"
_GROUP_TYPES = ("identity", "DMA", "DMA-FQ")


class FileTree:
    """/sys, /proc and /dev of a machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    # --- the calls ---

    def open(self, process: Process, path: str, flags: int) -> File:
        """An open file, with the reference that the caller takes over."""
        where, node = self._walk(process, path)
        wanted = {os.O_RDONLY: _READ, os.O_WRONLY: _WRITE}.get(flags & os.O_ACCMODE, _READ | _WRITE)
        if isinstance(node, Directory):
            raise fail(errno.EISDIR)
        if isinstance(node, DeviceNode):
            self._check(process, where, node, wanted)
            if node.opens is None:
                raise fail(errno.ENXIO)
            return node.opens(flags)
        assert isinstance(node, Attribute)
        self._check(process, where, node, wanted)
        return AttributeFile(node, where, self.machine.page_size)

    def read_text(self, process: Process, path: str) -> str:
        file = self.open(process, path, os.O_RDONLY)
        try:
            return file.pread(process, 1 << 30, 0).decode("utf-8", "replace")
        finally:
            file.put()

    def write_text(self, process: Process, path: str, text: str) -> None:
        file = self.open(process, path, os.O_WRONLY)
        core = self.machine.driver_core
        before, core.caller = core.caller, process
        try:
            file.pwrite(process, text.encode(), 0)
        finally:
            core.caller = before
            file.put()

    def readlink(self, process: Process, path: str) -> str:
        _, node = self._walk(process, path, follow=False)
        if not isinstance(node, Link):
            raise fail(errno.EINVAL)
        return node.target

    def listdir(self, process: Process, path: str) -> list[str]:
        where, node = self._walk(process, path)
        if not isinstance(node, Directory):
            raise fail(errno.ENOTDIR)
        self._check(process, where, node, _READ)
        return list(node.names())

    def exists(self, process: Process, path: str) -> bool:
        try:
            self._walk(process, path)
        except OSError:
            return False
        return True

    def stat(self, process: Process, path: str) -> FileStatus:
        where, node = self._walk(process, path)
        inode = self._inode(where, node)
        return FileStatus(stat.S_IFMT(node.mode) | inode.mode, inode.uid, inode.gid, node.rdev)

    def chown(self, process: Process, path: str, uid: int, gid: int) -> None:
        """Set the owner and the group (-1: it stays).  EPERM for anybody but root, and the owner who gives it to another
        group of theirs (setattr_prepare)."""
        where, node = self._walk(process, path)
        inode = self._inode(where, node)
        new = Inode(inode.uid if uid == -1 else uid, inode.gid if gid == -1 else gid, inode.mode)
        if process.uid not in (0, inode.uid):
            raise fail(errno.EPERM)
        if process.uid != 0 and (new.uid != inode.uid or new.gid not in (inode.gid, *process.groups)):
            raise fail(errno.EPERM)
        self._keep(where, node, new)

    def chmod(self, process: Process, path: str, mode: int) -> None:
        """Set the permission bits; EPERM for anybody but root and the owner."""
        where, node = self._walk(process, path)
        inode = self._inode(where, node)
        if process.uid not in (0, inode.uid):
            raise fail(errno.EPERM)
        self._keep(where, node, Inode(inode.uid, inode.gid, mode & 0o7777))

    # --- paths ---

    def _walk(self, process: Process, path: str, follow: bool = True) -> tuple[str, Node]:
        """What `path` leads to, and its path without links; a link at the end itself if not `follow`."""
        if not path.startswith("/") or "\0" in path:
            raise fail(errno.ENOENT)
        root = _root(self.machine, process)
        node: Node = root
        trail: list[tuple[str, Node]] = []
        left = [part for part in path.split("/") if part]
        links = 0
        while left:
            part = left.pop(0)
            here = "/" + "/".join(name for name, _ in trail)
            if not isinstance(node, Directory):
                raise fail(errno.ENOTDIR)
            self._check(process, here, node, _SEARCH)
            if part == ".":
                continue
            if part == "..":
                if trail:
                    trail.pop()
                node = trail[-1][1] if trail else root
                continue
            found = node.lookup(part)
            if found is None:
                raise fail(errno.ENOENT)
            if isinstance(found, Link) and (left or follow or path.endswith("/")):
                links += 1
                if links > _MOST_LINKS:
                    raise fail(errno.ELOOP)
                left = [name for name in found.target.split("/") if name] + left
                if found.target.startswith("/"):
                    trail, node = [], root
                continue
            trail.append((part, found))
            node = found
        if path.endswith("/") and not isinstance(node, Directory):
            raise fail(errno.ENOTDIR)
        return "/" + "/".join(name for name, _ in trail), node

    # --- permissions ---

    def _inode(self, where: str, node: Node) -> Inode:
        return self.machine.driver_core.host.inodes.get(where) or Inode(node.uid, node.gid, stat.S_IMODE(node.mode))

    def _keep(self, where: str, node: Node, inode: Inode) -> None:
        group = devtmpfs.group_of(self.machine, where)
        if group is not None:
            group.uid, group.gid, group.mode = inode.uid, inode.gid, inode.mode
        else:
            self.machine.driver_core.host.inodes[where] = inode

    def _check(self, process: Process, where: str, node: Node, wanted: int) -> None:
        """EACCES unless the process may; in sysfs, root too needs a bit of anybody's (kernfs_fop_open)."""
        inode = self._inode(where, node)
        if not process.may(wanted, inode.uid, inode.gid, inode.mode):
            raise fail(errno.EACCES)
        anybody = inode.mode >> 6 | inode.mode >> 3 | inode.mode
        if where.startswith("/sys/") and isinstance(node, Attribute) and anybody & wanted != wanted:
            raise fail(errno.EACCES)


def _root(machine: Machine, process: Process) -> Directory:
    return directory(
        {
            "dev": lambda: devtmpfs.root(machine, process),
            "proc": lambda: procfs.root(machine, process),
            "sys": lambda: _sys(machine),
        }
    )


def _sys(machine: Machine) -> Directory:
    bus = pci_sysfs.PciBus(machine)

    def devices(name: str) -> Node | None:
        return _virtual(machine) if name == "virtual" else bus.root(name)

    groups = Directory(
        lambda: [str(number) for number in machine.iommu_groups],
        lambda name: (
            _group(machine, machine.iommu_groups[int(name)])
            if name.isdecimal() and int(name) in machine.iommu_groups and str(int(name)) == name
            else None
        ),
    )
    return directory(
        {
            "bus": lambda: directory({"pci": bus.bus}),
            "class": lambda: _classes(machine),
            "devices": Directory(lambda: [*bus.roots(), "virtual"], devices),
            "fs": lambda: directory({"btrfs": _btrfs(machine)}),
            "kernel": directory({"debug": lambda: debugfs.root(machine), "iommu_groups": groups}),
            "module": lambda: _modules(machine),
        }
    )


_FILESYSTEM = "5a5d0b3e-0f0d-4c0a-9a51-6f0b8d3a7c11"
"""The one btrfs that the model has."""


def _btrfs(machine: Machine) -> Directory:
    members = [name for name, (_, disk) in machine.driver_core.host.disks.items() if disk.btrfs]
    devices = directory({name: Link(f"../../../../class/block/{name}") for name in members})
    return directory({_FILESYSTEM: directory({"devices": devices})} if members else {})


def _group(machine: Machine, group: IommuGroup) -> Directory:
    """/sys/kernel/iommu_groups/N."""
    vfio_group = machine.vfio.groups.get(group.number)
    chosen = bool(machine.topology.iommu.ranges) and not (vfio_group and vfio_group.noiommu)

    def set_type(given: str) -> None:
        kind = given.removesuffix("\n")
        if kind not in (*_GROUP_TYPES, "auto"):
            raise fail(errno.EINVAL)
        if group.dma_claimed:
            raise fail(errno.EPERM)
        if chosen:
            group.domain_type = "DMA" if kind == "auto" else kind
        elif kind != "auto":  # POWER has the platform's own domain and no other
            raise fail(errno.EINVAL)

    return directory(
        {
            "devices": directory(
                {pci.address: Link(f"../../../..{pci_sysfs.path(pci).removeprefix('/sys')}") for pci in group.devices}
            ),
            **({"name": text(group.name)} if group.name else {}),
            "reserved_regions": Attribute(lambda: _reserved(machine, group) if chosen else ""),
            "type": Attribute(lambda: f"{group.domain_type}\n" if chosen else "unknown\n", set_type),
        }
    )


def _reserved(machine: Machine, group: IommuGroup) -> str:
    """On a PC the addresses between the ranges of IOVA, at which interrupts are signalled; with an ISA bridge also the
    first 16 MiB, to which its DMA would go straight; and what firmware uses devices for."""
    ranges = machine.topology.iommu.ranges
    found = [(before[1] + 1, after[0] - 1, "msi") for before, after in itertools.pairwise(ranges)]
    if found and any(pci.device_class >> 8 == _ISA_BRIDGE for pci in group.devices):
        found.append((0, 0xFFFFFF, "direct-relaxable"))
    found += [(start, end, "direct") for start, end in group.reserved]
    return "".join(f"{start:#018x} {end:#018x} {kind}\n" for start, end, kind in sorted(found))


def _classes(machine: Machine) -> Directory:
    core = machine.driver_core

    def below(address: str, *names: str) -> Link:
        where = pci_sysfs.path(core.devices[address]).removeprefix("/sys/")
        return Link(posixpath.join("../..", where, *names))

    def net() -> Directory:
        found = {
            name: below(address, "net", name)
            for name, (address, _) in core.host.interfaces.items()
            if core.on_host_driver(address)
        }
        return directory({"lo": Link("../../devices/virtual/net/lo"), **found})

    def block() -> Directory:
        found: dict[str, Node | None] = {}
        for name, (address, disk) in core.host.disks.items():
            if not core.on_host_driver(address):
                continue
            pci = core.devices[address]
            if disk.multipath:
                found[name] = Link(f"../../devices/virtual/nvme-subsystem/{_subsystem(machine, pci)}/{name}")
            elif pci_sysfs.is_nvme(pci):
                found[name] = below(address, "nvme", pci_sysfs.controller(machine, pci), name)
            else:
                found[name] = below(address, "block", name)
        return directory(found)

    def vfio_dev() -> Directory:
        numbers = core.vfio_devices.items()
        return directory({f"vfio{n}": below(address, "vfio-dev", f"vfio{n}") for address, n in numbers})

    vfio = [group.node for group in machine.vfio.groups.values()]
    return directory(
        {
            "block": block,
            "misc": directory({"vfio": Link("../../devices/virtual/misc/vfio") if _has_vfio(machine) else None}),
            "net": net,
            "nvme-subsystem": lambda: directory(
                {name: Link(f"../../devices/virtual/nvme-subsystem/{name}") for name in _subsystems(machine)}
            ),
            "vfio": directory({name: Link(f"../../devices/virtual/vfio/{name}") for name in vfio}),
            "vfio-dev": vfio_dev,
        }
    )


def _subsystem(machine: Machine, pci: PciDevice) -> str:
    return f"nvme-subsys{pci_sysfs.controller(machine, pci).removeprefix('nvme')}"


def _subsystems(machine: Machine) -> dict[str, dict[str, Node | None]]:
    """What is in the directories of the NVMe subsystems: their controllers, and namespaces with several paths."""
    core = machine.driver_core
    found: dict[str, dict[str, Node | None]] = {}
    for name, (address, disk) in core.host.disks.items():
        if disk.multipath and core.on_host_driver(address):
            pci = core.devices[address]
            where = pci_sysfs.path(pci).removeprefix("/sys/devices")
            controller = pci_sysfs.controller(machine, pci)
            content = found.setdefault(_subsystem(machine, pci), {})
            content[controller] = Link(f"../../..{where}/nvme/{controller}")
            content[name] = pci_sysfs.block_device(disk)
    return found


def _virtual(machine: Machine) -> Directory:
    """/sys/devices/virtual: devices without hardware of their own."""
    major = devtmpfs.VFIO_MAJOR
    groups = {
        group.node: _class_device(f"{major}:{group.minor}", f"vfio/{group.node}", "../../../../class/vfio")
        for group in machine.vfio.groups.values()
    }
    container = _class_device("10:196", "vfio/vfio", "../../../../class/misc")
    return directory(
        {
            "misc": directory({"vfio": container if _has_vfio(machine) else None}),
            "net": directory({"lo": directory({"flags": text("0x9")})}),
            "nvme-subsystem": directory({name: directory(content) for name, content in _subsystems(machine).items()}),
            "vfio": directory(groups),
        }
    )


def _class_device(number: str, name: str, subsystem: str) -> Directory:
    major, minor = number.split(":")
    return directory(
        {
            "dev": text(number),
            "power": directory({}),
            "subsystem": Link(subsystem),
            "uevent": text(f"MAJOR={major}\nMINOR={minor}\nDEVNAME={name}"),
        }
    )


def _has_vfio(machine: Machine) -> bool:
    return devtmpfs.has_vfio(machine)


def _modules(machine: Machine) -> Directory:
    def set_noiommu(given: str) -> None:
        machine.vfio.noiommu = _boolean(given)

    loaded = {driver.module for driver in machine.driver_core.drivers.values()}
    if _has_vfio(machine):
        loaded |= {"vfio", "vfio_pci_core"}
        platform = "vfio_iommu_type1" if machine.topology.iommu.ranges else "vfio_iommu_spapr_tce"
        loaded |= {platform} if machine.vfio.iommu_drivers else set()
    parameters = {_NOIOMMU: Attribute(lambda: "NY"[machine.vfio.noiommu] + "\n", set_noiommu)}
    with_parameters = directory({"parameters": directory(parameters)})
    has_parameter = {"vfio"} if machine.topology.platform.noiommu else set()
    return directory({name: with_parameters if name in has_parameter else directory({}) for name in sorted(loaded)})


def _boolean(given: str) -> bool:
    """What a parameter of a module understands (kstrtobool): the first letter counts, or two of on and off."""
    for letters, value in (("yYtT1", True), ("nNfF0", False)):
        if given[:1] in tuple(letters):
            return value
    if given[:2].lower() in ("on", "of"):
        return given[1:2].lower() == "n"
    raise fail(errno.EINVAL)
