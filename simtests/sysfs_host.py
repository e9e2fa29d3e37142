"""A host as assignment meets it: PCI devices, drivers, IOMMU groups and processes, behind the file calls of a Backend.

Its files are made from its state at each call.  These do something when written:

    /sys/bus/pci/drivers_probe                  a driver is looked for
    /sys/bus/pci/drivers/D/bind, unbind         one driver, one device
    /sys/bus/pci/drivers/D/new_id, remove_id    ids that the driver takes too
    /sys/bus/pci/devices/B/driver_override      the only driver that may have the device

and these come and go: ``/dev/vfio/N`` with the first and the last device of group N on a VFIO driver; the links
``driver`` and ``vfio-dev`` of a device.
"""

from __future__ import annotations

import errno
import os
import posixpath
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from vfio.backend import Backend, FileStatus, LockedMemory, Mapping, Memory

DEVICES = "/sys/bus/pci/devices"
DRIVERS = "/sys/bus/pci/drivers"


@dataclass
class Function:
    """One PCI function."""

    address: str
    driver: str | None = None
    group: int | None = None
    id: tuple[int, int] = (0x1234, 0x11E8)
    override: str | None = None
    overridable: bool = True
    bridge: bool = False
    parent: str | None = None
    open_by: int | None = None
    """The process that has the device itself open."""


@dataclass
class Driver:
    """A PCI driver: what it matches, and whether it leaves DMA to userspace."""

    name: str
    ids: set[tuple[int, int]] = field(default_factory=set)
    harmless: bool = False
    added: set[tuple[int, ...]] = field(default_factory=set)
    probe_error: int = 0

    def matches(self, device: Function) -> bool:
        if device.override is not None:
            return device.override == self.name
        return device.id in self.ids or any(each[:2] == device.id for each in self.added)


@dataclass
class Node:
    """``/dev/vfio/N``."""

    uid: int = 0
    gid: int = 0
    mode: int = 0o600
    owner_fd: int | None = None
    """The descriptor that has it open: there can be one."""


class SysfsHost(Backend):
    """The host; `files` and `links` are whatever else it has."""

    url = "sim:"
    page_size = 4096

    def __init__(self, *devices: Function, drivers: tuple[Driver, ...] = (), power: bool = True) -> None:
        self.devices = {device.address: device for device in devices}
        self.drivers = {driver.name: driver for driver in (*drivers, Driver("vfio-pci", harmless=True))}
        self.nodes: dict[int, Node] = {}
        self.power = power
        self.uid = 0
        self.owned: set[int] = set()
        """Groups that a container owns."""
        self.files = {
            "/proc/sys/kernel/random/boot_id": "5f0b\n",
            "/proc/sys/kernel/osrelease": "6.12.107+deb13-powerpc64le\n",
            "/proc/self/mountinfo": "",
            "/proc/swaps": "Filename Type Size Used Priority\n",
            "/dev/vfio/vfio": "",
            **({"/proc/powerpc/eeh": ""} if power else {}),
        }
        self.links: dict[str, str] = {}
        self.device_numbers: dict[str, int] = {}
        self.processes: dict[int, tuple[str, list[str]]] = {}
        self.changes: list[str] = []
        """Every path that something was written to, or whose owner or mode was set."""
        self.fault: Callable[[int], int] = lambda n: 0
        """Errno with which the n-th of these fails, or 0."""
        self._next_fd = 5000
        for device in devices:
            self._node_follows(device.group)

    # --- what tests look at and arrange ---

    def snapshot(self) -> object:
        """All that assignment can change."""
        return (
            {each.address: (each.driver, each.override) for each in self.devices.values()},
            {number: (node.uid, node.gid, node.mode) for number, node in self.nodes.items()},
            {driver.name: frozenset(driver.added) for driver in self.drivers.values()},
        )

    def network(self, name: str, address: str, *, up: bool) -> None:
        """A network interface on a device."""
        self.links[f"/sys/class/net/{name}"] = f"../../devices/{self._below(address)}/net/{name}"
        self.files[f"/sys/devices/{self._below(address)}/net/{name}/flags"] = "0x1003\n" if up else "0x1002\n"

    def disk(self, name: str, address: str, number: str, *holders: str) -> None:
        """A disk on a device, with what is built on it."""
        where = f"/sys/devices/{self._below(address)}/nvme/nvme0/{name}"
        self.links[f"/sys/class/block/{name}"] = "../.." + where.removeprefix("/sys")
        self.files[f"{where}/dev"] = f"{number}\n"
        self.files[f"/dev/{name}"] = ""
        major, minor = map(int, number.split(":"))
        self.device_numbers[f"/dev/{name}"] = os.makedev(major, minor)
        for holder in holders:
            self.links[f"{where}/holders/{holder}"] = f"../../{holder}"

    def hold(self, pid: int, command: str, group: int) -> Callable[[], None]:
        """A process opens a group; what is returned closes it."""
        fd = self.open(f"/dev/vfio/{group}", os.O_RDWR)
        self.processes[pid] = (command, ["/dev/null", f"/dev/vfio/{group}"])

        def release() -> None:
            self.close(fd)
            del self.processes[pid]

        return release

    # --- the tree ---

    def _below(self, address: str) -> str:
        device = self.devices[address]
        root = f"pci{address[:7]}"
        return f"{self._below(device.parent)}/{address}" if device.parent else f"{root}/{address}"

    def _tree(self) -> tuple[dict[str, str], dict[str, str]]:
        """All files with what is in them, and all links with where they point."""
        files, links = dict(self.files), dict(self.links)
        files["/sys/bus/pci/drivers_probe"] = ""
        for name in self.drivers:
            for file in ("bind", "unbind", "new_id", "remove_id"):
                files[f"{DRIVERS}/{name}/{file}"] = ""
        for device in self.devices.values():
            self._add_device(device, files, links)
        for number in self.nodes:
            files[f"/dev/vfio/{number}"] = ""
        for pid, (command, open_files) in self.processes.items():
            files[f"/proc/{pid}/cmdline"] = command.replace(" ", "\0") + "\0"
            links |= {f"/proc/{pid}/fd/{fd}": target for fd, target in enumerate(open_files)}
        return files, links

    def _add_device(self, device: Function, files: dict[str, str], links: dict[str, str]) -> None:
        where = f"/sys/devices/{self._below(device.address)}"
        links[f"{DEVICES}/{device.address}"] = "../../.." + where.removeprefix("/sys")
        files |= {
            f"{where}/vendor": f"{device.id[0]:#06x}\n",
            f"{where}/device": f"{device.id[1]:#06x}\n",
            f"{where}/subsystem_vendor": "0x1af4\n",
            f"{where}/subsystem_device": "0x1100\n",
            f"{where}/class": "0x060400\n" if device.bridge else "0x00ff00\n",
            f"{where}/revision": "0x10\n",
        }
        if device.overridable:
            files[f"{where}/driver_override"] = f"{device.override or '(null)'}\n"
        if device.bridge:
            files[f"{where}/secondary_bus_number"] = "1\n"
        if device.driver:
            links[f"{where}/driver"] = f"../../../bus/pci/drivers/{device.driver}"
        if device.driver == "vfio-pci":
            files[f"{where}/vfio-dev/vfio0/dev"] = "245:0\n"
        if device.group is not None:
            group = f"/sys/kernel/iommu_groups/{device.group}"
            links[f"{where}/iommu_group"] = f"../../../kernel/iommu_groups/{device.group}"
            links[f"{group}/devices/{device.address}"] = where
            if self.power:
                files[f"{group}/name"] = f"domain{int(device.address[:4], 16)}-pefd\n"

    def _resolve(self, path: str, links: dict[str, str], last: bool = True) -> str:
        """The path with its links followed; the last part only if `last`."""
        done = "/"
        parts = path.strip("/").split("/")
        for n, part in enumerate(parts):
            done = posixpath.normpath(posixpath.join(done, part))
            if done in links and (last or n < len(parts) - 1):
                done = self._resolve(posixpath.normpath(posixpath.join(posixpath.dirname(done), links[done])), links)
        return done

    # --- the calls ---

    def read_text(self, path: str) -> str:
        files, links = self._tree()
        try:
            return files[self._resolve(path, links)]
        except KeyError:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None

    def readlink(self, path: str) -> str:
        _, links = self._tree()
        try:
            return links[self._resolve(path, links, last=False)]
        except KeyError:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None

    def listdir(self, path: str) -> list[str]:
        files, links = self._tree()
        head = self._resolve(path, links).rstrip("/") + "/"
        names = {name[len(head) :].split("/")[0] for name in (*files, *links) if name.startswith(head)}
        if not names:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return list(names)

    def exists(self, path: str) -> bool:
        files, links = self._tree()
        where = self._resolve(path, links)
        return any(name == where or name.startswith(where + "/") for name in (*files, *links))

    def stat(self, path: str) -> FileStatus:
        if path in self.device_numbers:
            return FileStatus(0o060660, 0, 6, self.device_numbers[path])
        node = self._node(path)
        return FileStatus(0o020000 | node.mode, node.uid, node.gid, os.makedev(246, 0))

    def chown(self, path: str, uid: int, gid: int) -> None:
        self._changing(path, errno.EPERM)
        node = self._node(path)
        node.uid, node.gid = uid, gid

    def chmod(self, path: str, mode: int) -> None:
        self._changing(path, errno.EPERM)
        self._node(path).mode = mode

    def open(self, path: str, flags: int) -> int:
        node = self._node(path)
        if self.uid not in (0, node.uid):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)
        if node.owner_fd is not None:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        self._next_fd += 1
        node.owner_fd = self._next_fd
        return self._next_fd

    def close(self, fd: int) -> None:
        for node in self.nodes.values():
            if node.owner_fd == fd:
                node.owner_fd = None

    def write_text(self, path: str, text: str) -> None:
        files, links = self._tree()
        where = self._resolve(path, links)
        if where not in files:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        self._changing(path, errno.EACCES)
        directory, _, name = where.rpartition("/")
        text = text.removesuffix("\n")
        if name == "driver_override":
            self.devices[posixpath.basename(directory)].override = text or None
        elif name == "drivers_probe":
            self._probe(text)
        elif directory.startswith(DRIVERS):
            driver = self.drivers[posixpath.basename(directory)]
            {"bind": self._bind, "unbind": self._unbind, "new_id": self._new_id, "remove_id": self._remove_id}[name](
                driver, text
            )
        else:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)

    # --- the driver core ---

    def _probe(self, address: str) -> None:
        device = self._device(address)
        if device.driver is None:
            for driver in self.drivers.values():
                if driver.matches(device):
                    try:
                        self._attach(driver, device)
                    except OSError as error:
                        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from error
                    return

    def _bind(self, driver: Driver, address: str) -> None:
        device = self._device(address)
        if not driver.matches(device):
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        if device.driver is not None:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        self._attach(driver, device)

    def _unbind(self, driver: Driver, address: str) -> None:
        device = self._device(address)
        if device.driver != driver.name:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        if device.open_by is not None:
            raise AssertionError(f"unbinding {address} blocks until process {device.open_by} closes it")
        device.driver = None
        self._node_follows(device.group)

    def _new_id(self, driver: Driver, text: str) -> None:
        id = tuple(int(number, 16) for number in text.split())
        if len(id) < 2:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if id[:2] in driver.ids or id in driver.added:
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        driver.added.add(id)
        for device in self.devices.values():
            if device.driver is None and driver.matches(device):
                self._attach(driver, device)

    def _remove_id(self, driver: Driver, text: str) -> None:
        id = tuple(int(number, 16) for number in text.split())
        if id not in driver.added:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        driver.added.remove(id)

    def _attach(self, driver: Driver, device: Function) -> None:
        if driver.probe_error:
            raise OSError(driver.probe_error, os.strerror(driver.probe_error))
        if not driver.harmless and device.group in self.owned:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        if driver.name == "vfio-pci" and device.bridge:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        device.driver = driver.name
        self._node_follows(device.group)

    def _node_follows(self, group: int | None) -> None:
        if group is None:
            return
        if any(each.group == group and each.driver == "vfio-pci" for each in self.devices.values()):
            self.nodes.setdefault(group, Node())
        else:
            self.nodes.pop(group, None)

    def _device(self, address: str) -> Function:
        try:
            return self.devices[address]
        except KeyError:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV)) from None

    def _node(self, path: str) -> Node:
        try:
            return self.nodes[int(path.removeprefix("/dev/vfio/"))]
        except (KeyError, ValueError):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None

    def _changing(self, path: str, denied: int) -> None:
        if self.uid != 0:
            raise OSError(denied, os.strerror(denied), path)
        self.changes.append(path)
        if number := self.fault(len(self.changes) - 1):
            raise OSError(number, os.strerror(number), path)

    def locked(self) -> LockedMemory:
        return LockedMemory(0, None, True)

    # --- calls that assignment never makes ---

    def _never(self, *arguments: object) -> NoReturn:
        raise AssertionError(f"assignment has no reason to make this call: {arguments}")

    def dup(self, fd: int) -> int:
        self._never(fd)

    def ioctl(self, fd: int, request: int, arg: object = 0) -> int:
        self._never(fd, request, arg)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        self._never(fd, length, offset)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        self._never(fd, data, offset)

    def mmap(self, fd: int, length: int, offset: int, prot: int) -> Mapping:
        self._never(fd, length, offset, prot)

    def allocate(self, length: int, page_size: int | None = None) -> Memory:
        self._never(length, page_size)

    def populate(self, address: int, length: int) -> None:
        self._never(address, length)
