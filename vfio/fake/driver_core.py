"""The driver core and the PCI bus: which device is on which driver, and how that changes.  (drivers/base, drivers/pci)

Errnos and their order are those of Linux 6.12, as seen on a real kernel.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from contextlib import suppress
from copy import deepcopy
from typing import TYPE_CHECKING

from vfio import topology
from vfio.fake import registers as reg
from vfio.fake import vfio_pci
from vfio.fake.driver import BUILT_IN, KNOWN, DeviceId, Driver, identity
from vfio.fake.host import Files, Host
from vfio.fake.kernel_error import fail
from vfio.fake.pci import PciDevice, make_device
from vfio.fake.pe import make_pe

if TYPE_CHECKING:
    from vfio.fake.device_file import VfioDevice
    from vfio.fake.machine import Machine
    from vfio.fake.process import Process

VFIO_PCI = "vfio-pci"
_FIRST_GOOD_ON_POWER = (6, 4)


class DriverCore:
    """Devices, drivers, and the host around them."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.host = Host.of(machine)
        self.devices: dict[str, PciDevice] = {}
        """The PCI functions that are there, by address, parents before their children."""
        self.drivers: dict[str, Driver] = {}
        """The drivers that are loaded, in the order in which they were."""
        self.autoprobe = True
        """Whether a driver that is loaded takes the free devices that it matches."""
        self.releasing: set[str] = set()
        """Devices whose VFIO driver is being taken from them, which takes as long as somebody has them open."""
        self.caller: Process | None = None
        """The process whose write is being carried out."""

    def boot(self) -> None:
        """Find all devices, and load the drivers that the topology names, which take their devices."""
        described = self.machine.topology
        for phb in described.phbs:
            self._scan(phb)
        self.drivers[VFIO_PCI] = Driver(VFIO_PCI, vfio=True)
        self.autoprobe = False  # who has what is said, and not to be found out
        for name in (*BUILT_IN, *(["pcieport"] if self._is_guest else [])):
            self.load(name)
        for each in described.drivers:
            self.load(each.name, ids=each.ids, vfio=each.vfio)
        for device in described.devices:
            if device.driver is not None:
                pci = self.devices[device.address]
                driver = self.load(device.driver)
                if not driver.vfio and not driver.takes(identity(pci)):
                    driver.ids += (DeviceId(device.vendor, device.device),)
                self._probe(driver, pci)
        for device in described.devices:
            self.devices[device.address].driver_override = device.driver_override
        self.autoprobe = True

    @property
    def _is_guest(self) -> bool:
        return self.machine.topology.platform.name == "pSeries"

    # --- drivers ---

    def load(
        self, name: str, *, ids: Iterable[tuple[int, int]] = (), vfio: bool = False, managed_dma: bool = False
    ) -> Driver:
        """Load a driver (modprobe): it takes the free devices that it matches.

        `ids` are vendor and device; `nvme`, `e1000e`, `pci-stub` and other drivers of `driver.KNOWN` bring theirs.
        Harmless for a driver that is loaded.
        """
        if name in self.drivers:
            return self.drivers[name]
        driver = deepcopy(KNOWN[name]) if name in KNOWN else Driver(name, vfio=vfio, managed_dma=managed_dma)
        if name == VFIO_PCI:
            driver.vfio = True
        driver.ids += tuple(DeviceId(vendor, device) for vendor, device in ids)
        self.drivers[name] = driver
        if self.autoprobe:
            self._attach_all(driver)
        return driver

    def unload(self, name: str) -> None:
        """Unload a driver (modprobe -r): its devices are on none then."""
        driver = self.drivers[name]
        for pci in list(self.devices.values()):
            if pci.driver == name:
                self.release(pci)
        del self.drivers[driver.name]

    def driver_of(self, pci: PciDevice) -> Driver | None:
        """The driver that has the device."""
        return None if pci.driver is None else self.drivers[pci.driver]

    def on_host_driver(self, address: str) -> bool:
        """Whether a driver has the device that does DMA for the host: then its disks and interfaces are there."""
        pci = self.devices.get(address)
        driver = None if pci is None else self.driver_of(pci)
        return driver is not None and driver.host_dma

    # --- what is written to the files of drivers ---

    def bind(self, driver: Driver, text: str) -> None:
        """``bind``: ENODEV for an unknown device or one that does not match, EBUSY for one that has a driver; errors of
        the probe as they are."""
        pci = self._named(text)
        if not driver.matches(pci):
            raise fail(errno.ENODEV)
        if pci.driver is not None:
            raise fail(errno.EBUSY)
        self._probe(driver, pci)

    def unbind(self, driver: Driver, text: str) -> None:
        """``unbind``: ENODEV for a device that is not on this driver.  Waits while the device is open."""
        pci = self._named(text)
        if pci.driver != driver.name:
            raise fail(errno.ENODEV)
        self.release(pci)

    def probe(self, text: str) -> None:
        """``drivers_probe``: ENODEV for an unknown device.  Whether a driver was found is not told; EINVAL where one was
        kept from probing."""
        pci = self._named(text)
        try:
            self._attach(pci)
        except OSError:
            raise fail(errno.EINVAL) from None

    def new_id(self, driver: Driver, text: str) -> None:
        """``new_id``: the driver takes one more id, and at once all free devices that match."""
        driver.add_id(text)
        self._attach_all(driver)

    def set_override(self, pci: PciDevice, text: str) -> None:
        """``driver_override``: up to the first newline; EINVAL for a page less one byte, or more."""
        if len(text.encode()) >= self.machine.page_size - 1:
            raise fail(errno.EINVAL)
        name = text.split("\n", 1)[0].split("\0", 1)[0]
        pci.driver_override = name or None

    # --- devices that come and go ---

    def remove(self, pci: PciDevice) -> None:
        """``remove``: the device, and all below it, is taken from its driver, and gone."""
        for other in list(self.devices.values()):
            if other.parent is pci:
                self.remove(other)
        if pci.driver is not None:
            self.release(pci)
        del self.devices[pci.address]
        self.host.files.pop(pci.address, None)
        self.machine.eeh.leave(pci)
        self._leave_group(pci)

    def ask_back(self, pci: PciDevice) -> VfioDevice | None:
        """The host wants to remove a device that a user may have open: the file to wait for; None for no user."""
        device = self.machine.vfio.devices.get(pci)
        if device is None or not device.files:
            return None
        self.releasing.add(pci.address)
        self.machine.vfio.ask_back(device)
        return device

    def rescan(self, domain: int | None = None, bus: int | None = None) -> None:
        """``rescan``: what is plugged in but unknown appears, on all buses or on this one and those below it."""
        for phb in self.machine.topology.phbs:
            if domain in (None, phb.domain):
                for pci in self._scan(phb, bus):
                    with suppress(OSError):
                        self._attach(pci)

    def _scan(self, phb: topology.Phb, bus: int | None = None) -> list[PciDevice]:
        """Make the devices of a PHB that are not there, bridges before what is below them."""
        found = []
        buses = {bus}
        for device in sorted(phb.functions, key=lambda each: (_depth(phb, each), each.address)):
            parent = phb.parent(device)
            if bus is not None and device.bus not in buses:
                continue
            buses.add(device.secondary_bus)
            if device.address in self.devices or device.address in self.machine.eeh.lost:
                continue
            if parent is not None and parent.address not in self.devices:
                continue
            pci = make_device(device, self.machine, phb)
            pci.parent = self.devices[parent.address] if parent is not None else None
            _identify(pci, device)
            self._join_group(pci, device, phb)
            if pci.pe is not None:
                self.machine.eeh.join(pci, pci.pe.eeh)
            elif device.pe is not None:
                self.machine.eeh.join(pci, self.machine.eeh.pe(phb.domain, device.pe))
            self.devices[device.address] = pci
            self.host.files[device.address] = Files(
                numa_node=-1 if self.machine.topology.platform.name in ("pSeries", "PC") else 0
            )
            found.append(pci)
        self.devices = dict(sorted(self.devices.items(), key=lambda item: (item[1].domain, item[0])))
        return found

    def _join_group(self, pci: PciDevice, device: topology.Device, phb: topology.Phb) -> None:
        if device.group is None:
            return
        for pe in self.machine.pes:
            if pe.phb.domain == phb.domain and pe.devices and self._described(pe.devices[0]).group == device.group:
                break
        else:
            number = device.group
            while number in self.machine.iommu_groups:
                number += 1
            pe = make_pe(self.machine, phb, device.pe, number)
        pci.pe = pe
        pci.group = pe.group
        pe.group.devices.append(pci)
        pe.group.devices.sort(key=lambda each: each.address)

    def _leave_group(self, pci: PciDevice) -> None:
        if pci.group is None or pci.pe is None:
            return
        pci.group.devices.remove(pci)
        if not pci.group.devices:
            del self.machine.iommu_groups[pci.group.number]
            self.machine.pes.remove(pci.pe)

    def _described(self, pci: PciDevice) -> topology.Device:
        return self.machine.topology.device(pci.address)

    # --- binding ---

    def _named(self, text: str) -> PciDevice:
        """The device of this name, which may end in a newline; ENODEV for any other."""
        try:
            return self.devices[text.split("\0", 1)[0].removesuffix("\n")]
        except KeyError:
            raise fail(errno.ENODEV) from None

    def _attach(self, pci: PciDevice) -> None:
        """Look for a driver.  A driver whose probe fails is passed over; what keeps it from probing is raised."""
        if pci.driver is not None:
            return
        for driver in list(self.drivers.values()):
            if driver.matches(pci):
                self._before_probe(driver, pci)
                try:
                    self._call_probe(driver, pci)
                except OSError:
                    self._after_failed_probe(pci)
                    continue
                return

    def _attach_all(self, driver: Driver) -> None:
        for pci in list(self.devices.values()):
            if pci.driver is None and driver.matches(pci):
                with suppress(OSError):
                    self._probe(driver, pci)

    def _probe(self, driver: Driver, pci: PciDevice) -> None:
        self._before_probe(driver, pci)
        try:
            self._call_probe(driver, pci)
        except OSError:
            self._after_failed_probe(pci)
            raise

    def _before_probe(self, driver: Driver, pci: PciDevice) -> None:
        """What has to be there before a driver may probe: suppliers (EAGAIN), and the DMA of the group (EBUSY)."""
        if self.waits_for_supplier(pci):
            raise fail(errno.EAGAIN)
        if pci.group is not None:
            pci.group.use_default_domain(driver.name)

    def _call_probe(self, driver: Driver, pci: PciDevice) -> None:
        self.machine.hooks.before(f"probe {driver.name}")
        pci.driver = driver.name
        if driver.vfio:
            if (
                self.machine.topology.platform.name in ("PowerNV", "pSeries")
                and self.host.version < _FIRST_GOOD_ON_POWER
            ):
                raise fail(errno.EINVAL)
            vfio_pci.probe(self.machine, pci)
            return
        if driver.knows_its_own and not driver.takes(identity(pci)):
            raise fail(errno.ENODEV)
        if driver.name != "pci-stub":
            pci.enable()
            self.host.files[pci.address].dma_mask_bits = 64

    def _after_failed_probe(self, pci: PciDevice) -> None:
        pci.driver = None

    def release(self, pci: PciDevice) -> None:
        """Take a device from its driver.  Waits while a VFIO user has it open; `KernelWouldBlock`, and nothing is changed,
        if that is the caller itself."""
        driver = self.drivers[pci.driver or ""]
        if driver.vfio:
            self.releasing.add(pci.address)
            try:
                vfio_pci.remove(self.machine, pci)
            finally:
                self.releasing.discard(pci.address)
        elif driver.name != "pci-stub":
            pci.disable()
        self._released(pci)

    def _released(self, pci: PciDevice) -> None:
        pci.driver = None
        if pci.power_state == 0 and self.machine.topology.platform.name != "PC":
            pci.power_state = None  # nobody knows what it does from now on

    @property
    def vfio_devices(self) -> dict[str, int]:
        """Number of the object in /sys/class/vfio-dev, by the address of its device."""
        found = self.machine.vfio.devices
        return {pci.address: device.index for pci, device in found.items() if pci.address not in self.releasing}

    def waits_for_supplier(self, pci: PciDevice) -> bool:
        """QEMU's POWER root ports name a supplier in the device tree that never comes: no driver can probe them."""
        phb = next(each for each in self.machine.topology.phbs if each.domain == pci.domain)
        return phb.root_port is not None and phb.root_port.address == pci.address


def _identify(pci: PciDevice, device: topology.Device) -> None:
    """What a topology says of a function's identity, where its model would have other values."""
    fields = pci.registers.field
    if device.revision is not None:
        fields(reg.REVISION, 1, device.revision)
    if not pci.is_bridge:
        if device.subsystem_vendor is not None:
            fields(reg.SUBSYSTEM, 2, device.subsystem_vendor)
        if device.subsystem_device is not None:
            fields(reg.SUBSYSTEM + 2, 2, device.subsystem_device)


def _depth(phb: topology.Phb, device: topology.Device) -> int:
    parent = phb.parent(device)
    return 0 if parent is None else 1 + _depth(phb, parent)
