"""A host as assignment meets it, on the modelled kernel: devices, drivers, groups, uses and processes.

`Host` is a `FakeBackend` that remembers what was changed, and can let the n-th change fail.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import vfio
from vfio import topology
from vfio.backend import Backend
from vfio.fake.backend import FakeBackend
from vfio.fake.driver import Driver as LoadedDriver
from vfio.fake.group import VfioGroup
from vfio.fake.kernel_error import fail
from vfio.fake.machine import Machine
from vfio.fake.pci import PciDevice
from vfio.fake.process import Process
from vfio.topology import Driver

__all__ = ["Driver", "Function", "Host", "power_host"]

BOOT_ID = "5f0b"


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
    below: int | None = None
    """Of a bridge: number of the bus below it."""
    device_class: int = 0x00FF00
    slot: str | None = None
    """The physical slot that it is in."""

    @property
    def described(self) -> topology.Device:
        return topology.Device(
            model="bridge" if self.bridge else "endpoint",
            address=self.address,
            vendor=self.id[0],
            device=self.id[1],
            device_class=0x060400 if self.bridge else self.device_class,
            subsystem_vendor=0x1AF4,
            subsystem_device=0x1100,
            revision=0x10,
            secondary_bus=self.below,
            group=self.group,
            pe=0xFD,
            driver=self.driver,
            driver_override=self.override,
            overridable=self.overridable,
            physical_slot=self.slot,
        )


class Host(FakeBackend):
    """The host, seen by a process of its root."""

    def __init__(self, *functions: Function, drivers: tuple[Driver, ...] = (), eeh: bool = False) -> None:
        domains = dict.fromkeys(int(each.address.split(":")[0], 16) for each in functions)
        like = topology.load("power8")
        described = topology.Topology(
            name="host",
            description="",
            platform=topology.Platform("PowerNV", "POWER8", "Hash", eeh),
            iommu=like.iommu,
            machine=None,
            phbs=tuple(
                topology.Phb(
                    index,
                    domain,
                    tuple(each.described for each in functions if int(each.address.split(":")[0], 16) == domain),
                )
                for index, domain in enumerate(domains)
            ),
            drivers=drivers,
        )
        machine = Machine(described)
        super().__init__(machine, Process(machine, pid=os.getpid()), "sim:")
        self.host.boot_id = BOOT_ID
        self.changes: list[str] = []
        """Every path that something was written to, or whose owner or mode was set."""
        self.fault: Callable[[int], int] = lambda n: 0
        """Errno with which the n-th of these fails, or 0."""
        self.hidden: set[str] = set()
        """Files that this host does not have."""

    @property
    def host(self):  # type: ignore[no-untyped-def]
        """What the host is besides its devices: `vfio.fake.host.Host`."""
        return self.machine.driver_core.host

    @property
    def devices(self) -> dict[str, PciDevice]:
        return self.machine.driver_core.devices

    @property
    def drivers(self) -> dict[str, LoadedDriver]:
        return self.machine.driver_core.drivers

    @property
    def nodes(self) -> dict[int, VfioGroup]:
        return self.machine.vfio.groups

    def snapshot(self) -> object:
        """All that assignment can change."""
        return (
            {each.address: (each.driver, each.driver_override) for each in self.devices.values()},
            {number: (node.uid, node.gid, node.mode) for number, node in self.nodes.items()},
            {driver.name: frozenset(driver.dynamic_ids) for driver in self.drivers.values()},
        )

    # --- what tests arrange ---

    def move(self, address: str, driver: str | None, override: str | None = None) -> None:
        """Bring a device to a driver (or to none), behind the back of what is tested."""
        core = self.machine.driver_core
        device = self.devices[address]
        if device.driver is not None:
            core.release(device)
        if driver is not None:
            device.driver_override = driver
            core.bind(core.drivers[driver], address)
        device.driver_override = override

    def unplug(self, address: str) -> None:
        """The device is not there any more."""
        self.machine.driver_core.remove(self.devices[address])

    def network(self, name: str, address: str, *, up: bool) -> None:
        """A network interface on a device."""
        self.host.network(address, name, up=up)

    def disk(self, name: str, address: str, number: str, **uses: object) -> None:
        """A disk on a device, with what the host uses it for."""
        self.host.disk(address, name, number, **uses)

    def hold(
        self, pid: int, command: str, group: int, *, device: str | None = None, only_device: bool = False
    ) -> Callable[[], None]:
        """A process opens a group, or a device of it too; what is returned ends the process."""
        other = FakeBackend(self.machine, Process(self.machine, pid=pid), self.url)
        self.host.commands[pid] = command
        if device is None:
            other.open(f"/dev/vfio/{group}", os.O_RDWR)
        else:
            opened = vfio.open_device(device, backend=other)
            if only_device:
                opened.group.close()
            self._keep = [*getattr(self, "_keep", []), opened]
        return other.exit

    # --- the calls ---

    def write_text(self, path: str, text: str) -> None:
        self._changing(path)
        super().write_text(path, text)

    def chown(self, path: str, uid: int, gid: int) -> None:
        self._changing(path)
        super().chown(path, uid, gid)

    def chmod(self, path: str, mode: int) -> None:
        self._changing(path)
        super().chmod(path, mode)

    def read_text(self, path: str) -> str:
        self._check_hidden(path)
        return super().read_text(path)

    def exists(self, path: str) -> bool:
        return path not in self.hidden and super().exists(path)

    def _check_hidden(self, path: str) -> None:
        if path in self.hidden:
            raise fail(2)

    def _changing(self, path: str) -> None:
        self.changes.append(path)
        if number := self.fault(len(self.changes) - 1):
            raise OSError(number, os.strerror(number), path)


def power_host() -> Host:
    """A POWER host: a card of two functions with a network driver, a disk, a device without a driver, and bridges."""
    return Host(
        Function("0000:00:00.0", "pcieport", bridge=True, below=1),
        Function("0000:01:00.0", "tg3", group=7, id=(0x14E4, 0x1657)),
        Function("0000:01:00.1", "tg3", group=7, id=(0x14E4, 0x1657)),
        Function("0001:00:00.0", "pcieport", group=2, bridge=True, below=1),
        Function("0001:01:00.0", "nvme", group=2, id=(0x1B36, 0x0010)),
        Function("0002:00:00.0", group=3, override="other"),
    )


def never(backend: Backend, *names: str) -> None:
    """Let these calls of a backend be mistakes."""

    def refuse(*arguments: object) -> NoReturn:
        raise AssertionError(f"there is no reason to make this call: {arguments}")

    for name in names:
        setattr(backend, name, refuse)
