"""The core of VFIO: containers, groups, and the devices that bus drivers offer.  (drivers/vfio/vfio_main.c)"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from vfio.fake.container import Container, ContainerFile
from vfio.fake.device_file import HeldMapping, VfioDevice
from vfio.fake.group import VfioGroup
from vfio.fake.iommu_group import IommuGroup
from vfio.fake.kernel_error import KernelWouldBlock, fail
from vfio.fake.kernel_log import INFO, WARNING
from vfio.fake.pamu import PamuDomain
from vfio.fake.registration import Registrations
from vfio.fake.spapr import SpaprTce
from vfio.fake.type1 import Type1

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vfio.fake.bus_driver import VfioDeviceOps
    from vfio.fake.file import File
    from vfio.fake.iommu_driver import IommuDriver
    from vfio.fake.machine import Machine
    from vfio.fake.pci import PciDevice
    from vfio.fake.pe import Pe
    from vfio.fake.process import Process

TAINT_USER = 1 << 6
"""Of /proc/sys/kernel/tainted: the user asked for it."""
REQUEST_INTERVAL = 10.0
"""Seconds between two requests to a user to let go of a device."""
_LOOK_AGAIN = 0.1  # seconds of real time: how soon a blocked call notices that the virtual clock was moved
_MEMORY = 2 << 30  # bytes of memory of a machine whose topology does not say


class VfioCore:
    """What the VFIO modules of a machine know."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.groups: dict[int, VfioGroup] = {}
        """By the number of the IOMMU group: the nodes /dev/vfio/N."""
        self.containers: list[Container] = []
        """Open, or with a group."""
        self.iommu_drivers: list[type[IommuDriver]] = [self.platform_driver]
        """Registered IOMMU drivers; empty while no such module is loaded."""
        self.noiommu = False
        """The module's parameter enable_unsafe_noiommu_mode, which a kernel built with CONFIG_VFIO_NOIOMMU has."""
        self.devices: dict[PciDevice, VfioDevice] = {}
        """What bus drivers have registered."""
        self.mappings: dict[Process, list[HeldMapping]] = {}
        """Device memory that processes have mapped."""
        self._registrations: dict[Process, Registrations] = {}
        self._minors: set[int] = set()
        self._opened = 0

    @property
    def platform_driver(self) -> type[IommuDriver]:
        """The IOMMU driver that hosts of this kind load."""
        iommu = self.machine.topology.iommu
        if iommu.ranges:
            return Type1
        return PamuDomain if iommu.pamu else SpaprTce

    # --- files ---

    def open_container(self, process: Process) -> File:
        """/dev/vfio/vfio: a new container."""
        self._opened += 1
        return ContainerFile(Container(self, self._opened - 1, process))

    def open_group(self, process: Process, number: int) -> File:
        """/dev/vfio/N: ENOENT, EACCES by the node's mode, EBUSY while it is open."""
        group = self.groups.get(number)
        if group is None:
            raise fail(errno.ENOENT)
        return group.open(process)

    # --- devices ---

    def register_device(self, pci: PciDevice, ops: VfioDeviceOps, data: Any) -> VfioDevice:
        """A bus driver has `pci` and offers it to users: its group gets a node with the first.

        EINVAL for a device without an IOMMU group, unless such are allowed, or one that is registered.
        """
        if pci in self.devices:
            raise fail(errno.EINVAL)
        alone = pci.group is None
        if pci.group is None:
            if not self.noiommu:
                raise fail(errno.EINVAL)
            pci.group = self._group_without_iommu(pci)
        group = self.groups.get(pci.group.number)
        if group is None:
            group = self.groups[pci.group.number] = VfioGroup(self, pci.group, self._free(self._minors))
            self._minors.add(group.minor)
            group.noiommu = alone
        group.drivers += 1
        device = VfioDevice(group, pci, ops, data, self._free(known.index for known in self.devices.values()))
        group.devices.insert(0, device)
        self.devices[pci] = device
        return device

    def _group_without_iommu(self, pci: PciDevice) -> IommuGroup:
        """A new group for a device that has none; from now on the kernel is tainted.  (vfio_noiommu_group_alloc)"""
        machine = self.machine
        number = self._free(machine.iommu_groups)
        group = machine.iommu_groups[number] = IommuGroup(number, "vfio-noiommu", [pci])
        name = f"vfio-pci {pci.address}"
        machine.log.write(INFO, f"{name}: Adding to iommu group {number}")
        machine.log.write(WARNING, f"{name}: Adding kernel taint for vfio-noiommu group on device")
        machine.tainted |= TAINT_USER
        return group

    def unregister_device(self, pci: PciDevice, process: Process | None = None) -> None:
        """The bus driver takes `pci` back.  Nobody can open it any more; users are asked to close it, and waited for.

        `process` is who wants it (default: whose write the driver core is carrying out).  Raises `KernelWouldBlock`,
        with nothing changed, if that process itself has the device open or mapped: it would wait for itself.
        """
        device = self.devices[pci]
        process = process or self.machine.driver_core.caller
        if device.files and (process is None or process in self.holders(device)):
            raise KernelWouldBlock(
                f"taking {pci.address} from its driver waits until it is closed and unmapped, and it is the caller "
                "that has it open: close the device, and its mappings, first"
            )
        if device in device.group.devices:
            device.group.devices.remove(device)
        count, asked = 0, self.machine.clock.now()
        if device.files:
            device.ops.request(device.data, count)
        while device.files:
            self.machine.changed.wait(_LOOK_AGAIN)
            self.machine.clock.catch_up()
            if self.machine.clock.now() - asked >= REQUEST_INTERVAL:
                count, asked = count + 1, self.machine.clock.now()
                device.ops.request(device.data, count)
        self._removed(device)

    def ask_back(self, device: VfioDevice, count: int = 0) -> None:
        """Ask the users of a device to close it, again and again, and let nobody open it; does not wait for them."""
        if device in device.group.devices:
            device.group.devices.remove(device)
        if device.files:
            device.ops.request(device.data, count)
            self.machine.clock.after(REQUEST_INTERVAL, lambda: self.ask_back(device, count + 1))

    def holders(self, device: VfioDevice) -> list[Process]:
        """The processes that have a device open or mapped."""
        return [
            process
            for process in self.machine.processes
            if any(file in device.files for file in process.files.values())
            or any(mapping.file in device.files for mapping in self.mappings.get(process, ()))
        ]

    def _removed(self, device: VfioDevice) -> None:
        del self.devices[device.pci]
        group = device.group
        group.drivers -= 1
        if not group.drivers:
            del self.groups[group.number]
            group.revoke()
            if group.noiommu:
                del self.machine.iommu_groups[group.number]
                device.pci.group = None
                self.machine.log.write(INFO, f"vfio-pci {device.pci.address}: Removing from iommu group {group.number}")

    def free_minor(self, group: VfioGroup) -> None:
        """Nothing refers to the group any more."""
        self._minors.discard(group.minor)

    @staticmethod
    def _free(taken: Iterable[int]) -> int:
        """The smallest number that is not taken."""
        used = set(taken)
        return next(number for number in range(len(used) + 1) if number not in used)

    # --- address spaces ---

    def registrations(self, process: Process) -> Registrations:
        """What is registered in the address space of a process."""
        if process not in self._registrations:
            described = self.machine.topology.machine
            self._registrations[process] = Registrations(process, described.memory if described else _MEMORY)
        return self._registrations[process]

    def process_gone(self, process: Process) -> None:
        """A process has ended, and its files are closed: so are its mappings, and its registrations are dropped."""
        for mapping in list(self.mappings.get(process, ())):
            mapping.close()
        self._registrations.pop(process, None)

    def eeh_pe(self, group: IommuGroup) -> Pe | None:
        """The PE that EEH knows for a group; None where the platform has no EEH, or the group no device."""
        if not self.machine.topology.platform.eeh or not group.devices:
            return None
        return next((pe for pe in self.machine.pes if pe.group is group), None)

    # --- looking in ---

    def describe(self) -> dict[str, Any]:
        """All that is held, as plain data: containers with their groups, windows and mappings, registrations."""
        from vfio.fake import introspection

        return introspection.describe(self)

    def held(self) -> list[str]:
        """What is still held, in words: mappings, windows, registrations, charges.  Empty on a clean machine."""
        from vfio.fake import introspection

        return introspection.held(self)
