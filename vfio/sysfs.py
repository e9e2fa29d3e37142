"""PCI devices, IOMMU groups and drivers, as the driver core shows them in sysfs.  Everything here only reads.

Sources: the kernel's Documentation/ABI/testing/sysfs-bus-pci and sysfs-kernel-iommu_groups.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from vfio import address as addresses
from vfio import errors, usage
from vfio.backend import Backend, missing

DEVICES = "/sys/bus/pci/devices"
DRIVERS = "/sys/bus/pci/drivers"
GROUPS = "/sys/kernel/iommu_groups"
SLOTS = "/sys/bus/pci/slots"

# Drivers that leave DMA to the user of the group: the kernel sets driver_managed_dma for them (and for VFIO drivers).
_HARMLESS_DRIVERS = frozenset({"pci-stub", "pcieport"})
_PCI_BRIDGE = 0x0604
_NO_OVERRIDE = ("(null)", "")
# The name that POWER gives a group: domain in decimal, PE in hex.
_PE_NAME = re.compile(r"domain(\d+)-pe([0-9a-f]+)")
_EEH_FILES = ("eeh_mode", "eeh_pe_config_addr", "eeh_pe_state")


class PciDevice(NamedTuple):
    """One PCI function, as sysfs shows it."""

    address: str
    """As sysfs spells it: ``dddd:bb:dd.f``."""
    vendor: int
    device: int
    subsystem_vendor: int
    subsystem_device: int
    class_code: int
    """24 bits: base class, subclass, programming interface."""
    revision: int
    driver: str | None
    overridable: bool
    """Whether there is a driver_override file."""
    driver_override: str | None
    group: int | None
    """Number of its IOMMU group; bridges and root ports have none on POWER."""
    parent: str | None
    """Address of the bridge above it; None on a root bus."""
    is_bridge: bool
    """A PCI-to-PCI bridge with the header of one (type 1): VFIO does not take it."""
    phb: int | None
    """POWER: the PCI host bridge (its domain number)."""
    pe: int | None
    """POWER: the partitionable endpoint, the unit that EEH isolates and recovers."""
    vfio_dev: str | None
    """Its name in /sys/class/vfio-dev while a VFIO driver has it."""

    @property
    def id(self) -> str:
        """``vendor:device``, in hex."""
        return f"{self.vendor:04x}:{self.device:04x}"

    @property
    def on_vfio(self) -> bool:
        """Whether vfio-pci, or a variant driver of it, has the device."""
        return self.vfio_dev is not None or self.driver == "vfio-pci"

    @property
    def does_host_dma(self) -> bool:
        """Whether its driver does DMA on behalf of the host, which keeps the whole group from being viable."""
        return self.driver is not None and self.driver not in _HARMLESS_DRIVERS and not self.on_vfio


def path(address: str, *names: str) -> str:
    """The path of a device's directory, or of a file in it.  Raises `errors.InvalidAddress`."""
    return "/".join((DEVICES, addresses.parse(address), *names))


def node(group: int, unprotected: bool = False) -> str:
    """The character device of a group; `unprotected`: of one without an IOMMU."""
    return f"/dev/vfio/{'noiommu-' if unprotected else ''}{group:d}"


def unprotected(backend: Backend, group: int) -> bool:
    """Whether the kernel made this group for a device that no IOMMU keeps from the host's memory."""
    return _text(backend, f"{GROUPS}/{group:d}/name") == "vfio-noiommu"


def node_of(backend: Backend, group: int) -> str:
    """The character device that a group has on this host."""
    return node(group, unprotected(backend, group))


def _text(backend: Backend, name: str) -> str | None:
    """What is in a file; None where there is none."""
    try:
        return backend.read_text(name).strip()
    except OSError as error:
        if missing(error):
            return None
        raise


def _link(backend: Backend, name: str) -> str | None:
    """The last part of what a link points to; None where there is none."""
    try:
        return os.path.basename(backend.readlink(name))
    except OSError as error:
        if missing(error):
            return None
        raise


def _names(backend: Backend, name: str) -> list[str]:
    """What is in a directory; empty where there is none."""
    try:
        return backend.listdir(name)
    except OSError as error:
        if missing(error):
            return []
        raise


def kernel_release(backend: Backend) -> str:
    """What ``uname -r`` says."""
    return backend.read_text("/proc/sys/kernel/osrelease").strip()


def on_power(backend: Backend) -> bool:
    """Whether the kernel runs on POWER."""
    return backend.exists("/proc/powerpc")


def driver_loaded(backend: Backend, driver: str) -> bool:
    """Whether the driver is registered with the PCI bus."""
    return backend.exists(f"{DRIVERS}/{driver}")


def module_of(backend: Backend, driver: str) -> str | None:
    """The kernel module that the driver is in; None for one that is built in, or not loaded."""
    return _link(backend, f"{DRIVERS}/{driver}/module")


def slots(backend: Backend) -> dict[str, str | None]:
    """The physical slots by name: where in PCI each is (``dddd:bb:dd``, all functions there); None for one where that is
    not known, because it is empty.

    A host shows its slots once it has the driver for them: pnv-php, or rpaphp in a PAPR guest.  (drivers/pci/slot.c)
    """
    found = {name: _text(backend, f"{SLOTS}/{name}/address") for name in _names(backend, SLOTS)}
    return {name: where if where and where.count(":") == 2 else None for name, where in found.items()}


def driver_of(backend: Backend, address: str) -> str | None:
    """The driver that has the device."""
    return _link(backend, path(address, "driver"))


def override_of(backend: Backend, address: str) -> str | None:
    """The driver_override of the device; None where it is unset or cannot be set."""
    text = _text(backend, path(address, "driver_override"))
    return None if text in (None, *_NO_OVERRIDE) else text


def group_of(backend: Backend, address: str) -> int | None:
    """The number of the device's IOMMU group; None where it has none (or does not exist)."""
    name = _link(backend, path(address, "iommu_group"))
    return int(name) if name is not None and name.isdecimal() else None


def device(backend: Backend, address: str) -> PciDevice:
    """The device with this address.

    Raises `errors.InvalidAddress`, and `errors.NoSuchDevice`, which names the addresses that come nearest.
    """
    address = addresses.parse(address)
    if not backend.exists(path(address)):
        raise _no_such_device(backend, address)
    try:
        return _read(backend, address)
    except OSError as error:
        if missing(error):
            raise _no_such_device(backend, address) from None
        raise


def devices(backend: Backend) -> list[PciDevice]:
    """All PCI devices, in the order of their addresses."""
    return _read_all(backend, _names(backend, DEVICES))


def groups(backend: Backend) -> list[int]:
    """The numbers of all IOMMU groups."""
    return sorted(int(name) for name in _names(backend, GROUPS) if name.isdecimal())


def group_devices(backend: Backend, group: int) -> list[PciDevice]:
    """The PCI devices of a group, bridges too; empty where there is no such group."""
    return _read_all(backend, _names(backend, f"{GROUPS}/{group:d}/devices"))


def blockers(backend: Backend, group: int, uses: Mapping[str, Sequence[str]] | None = None) -> list[errors.Blocker]:
    """The devices that keep the group from being viable: those on a driver that does DMA on behalf of the host.

    `uses` is the answer of `usage.of_devices`, from who asks for many groups.
    """
    blocking = [each for each in group_devices(backend, group) if each.does_host_dma]
    if uses is None:
        uses = usage.of_devices(backend) if blocking else {}
    return [errors.Blocker(each.address, each.driver or "", "; ".join(uses.get(each.address, ()))) for each in blocking]


def assignable(device: PciDevice, blockers: Iterable[errors.Blocker]) -> tuple[bool, str]:
    """Whether `vfio bind` can assign the device, and why not, or what it has to take along.

    `blockers` are those of the device's group.
    """
    if device.is_bridge:
        return False, "a bridge stays with the host"
    if device.group is None:
        return False, "in no IOMMU group"
    blockers = list(blockers)
    for each in blockers:
        if each.note:
            return False, each.note if each.address == device.address else f"{each.address}: {each.note}"
    others = [f"{each.address} ({each.driver})" for each in blockers if each.address != device.address]
    return True, f"only together with {', '.join(others)}" if others else ""


def eeh(backend: Backend, address: str) -> dict[str, str]:
    """POWER: the EEH files of a device, by name; empty where the host has no EEH."""
    found = {name: _text(backend, path(address, name)) for name in _EEH_FILES}
    return {name: text for name, text in found.items() if text is not None}


def _read_all(backend: Backend, names: Iterable[str]) -> list[PciDevice]:
    found = []
    for name in sorted(filter(addresses.is_address, names), key=_order):
        try:
            found.append(_read(backend, name))
        except OSError as error:
            if not missing(error):  # else it was unplugged while we looked
                raise
    return found


def _order(address: str) -> tuple[int, str]:
    domain, _, rest = address.partition(":")
    return int(domain, 16), rest


def _read(backend: Backend, address: str) -> PciDevice:
    where = path(address)

    def number(name: str) -> int:
        return int(backend.read_text(f"{where}/{name}"), 16)

    class_code = number("class")
    group = group_of(backend, address)
    phb, pe = _pe(backend, group)
    parent = os.path.basename(os.path.dirname(backend.readlink(where)))
    vfio_dev = _names(backend, f"{where}/vfio-dev")
    return PciDevice(
        address=address,
        vendor=number("vendor"),
        device=number("device"),
        subsystem_vendor=number("subsystem_vendor"),
        subsystem_device=number("subsystem_device"),
        class_code=class_code,
        revision=number("revision"),
        driver=driver_of(backend, address),
        overridable=backend.exists(f"{where}/driver_override"),
        driver_override=override_of(backend, address),
        group=group,
        parent=parent if addresses.is_address(parent) else None,
        # The kernel shows this file for devices whose header is a bridge's.
        is_bridge=class_code >> 8 == _PCI_BRIDGE and backend.exists(f"{where}/secondary_bus_number"),
        phb=phb,
        pe=pe,
        vfio_dev=vfio_dev[0] if vfio_dev else None,
    )


def _pe(backend: Backend, group: int | None) -> tuple[int | None, int | None]:
    name = None if group is None else _text(backend, f"{GROUPS}/{group:d}/name")
    match = _PE_NAME.fullmatch(name or "")
    return (int(match.group(1)), int(match.group(2), 16)) if match else (None, None)


def _no_such_device(backend: Backend, address: str) -> errors.NoSuchDevice:
    import difflib  # only where somebody mistyped

    near = difflib.get_close_matches(address, filter(addresses.is_address, _names(backend, DEVICES)), n=3)
    error = errors.NoSuchDevice(address)
    if near:
        error.remedy = f"the nearest are {', '.join(near)}; {error.remedy}"
    return error
