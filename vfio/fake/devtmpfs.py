"""/dev: the container's node and the groups' of VFIO, the kernel's log, and the host's disks."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from vfio.fake.kernel_log import KmsgFile
from vfio.fake.kernfs import DeviceNode, Directory, Node, directory

if TYPE_CHECKING:
    from vfio.fake.group import VfioGroup
    from vfio.fake.machine import Machine
    from vfio.fake.process import Process

VFIO_MAJOR = 246
"""Of the groups' nodes: what the kernel gave on the lab's machines."""

_CONTAINER, _KMSG = os.makedev(10, 196), os.makedev(1, 11)
_DISK_GROUP = 6
_DIRECTORY = "/dev/vfio/"


def root(machine: Machine, process: Process) -> Directory:
    """The directory, as a process opens what is in it."""
    host = machine.driver_core.host
    disks = {
        name: DeviceNode(stat.S_IFBLK, os.makedev(*disk.number), 0o660, gid=_DISK_GROUP)
        for name, (address, disk) in host.disks.items()
        if machine.driver_core.on_host_driver(address)
    }
    kmsg = DeviceNode(stat.S_IFCHR, _KMSG, 0o644, opens=lambda flags: KmsgFile(machine.log, process, flags))
    return directory({"kmsg": kmsg, "vfio": _vfio(machine, process) if has_vfio(machine) else None, **disks})


def has_vfio(machine: Machine) -> bool:
    """Whether the module vfio is loaded: some driver needs it."""
    return any(driver.vfio for driver in machine.driver_core.drivers.values())


def group_of(machine: Machine, path: str) -> VfioGroup | None:
    """The VFIO group whose node has this path."""
    name = path.removeprefix(_DIRECTORY)
    number = name.removeprefix("noiommu-")
    if not path.startswith(_DIRECTORY) or not number.isdecimal():
        return None
    group = machine.vfio.groups.get(int(number))
    return group if group and group.node == name else None


def _vfio(machine: Machine, process: Process) -> Directory:
    core = machine.vfio

    def lookup(name: str) -> Node | None:
        if name == "vfio":
            return DeviceNode(stat.S_IFCHR, _CONTAINER, 0o666, opens=lambda _: core.open_container(process))
        group = group_of(machine, _DIRECTORY + name)
        if group is None:
            return None
        return DeviceNode(
            stat.S_IFCHR,
            os.makedev(VFIO_MAJOR, group.minor),
            group.mode,
            group.uid,
            group.gid,
            opens=lambda _: core.open_group(process, group.number),
        )

    return Directory(lambda: ["vfio", *(group.node for group in core.groups.values())], lookup)
