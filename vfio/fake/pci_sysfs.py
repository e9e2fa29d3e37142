"""The PCI bus in sysfs.  (drivers/pci/pci-sysfs.c, drivers/base/bus.c, arch/powerpc/kernel/eeh_sysfs.c)

These do something when they are written:

    /sys/bus/pci/drivers_probe, rescan, drivers_autoprobe
    /sys/bus/pci/drivers/D/bind, unbind, new_id, remove_id
    /sys/bus/pci/devices/A/driver_override, remove, rescan, reset, reset_method, enable, eeh_pe_state, ...
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from vfio.fake import registers as reg
from vfio.fake import reset
from vfio.fake.kernel_error import fail
from vfio.fake.kernfs import Attribute, Child, Directory, Link, Node, directory, text

if TYPE_CHECKING:
    from vfio import topology
    from vfio.fake.machine import Machine
    from vfio.fake.pci import PciDevice

_RESOURCES = 17
"""Lines of `resource` of a bridge; a plain function has 13."""
_MODE_BRIDGE, _MODE_DEVICE, _MODE_REMOVED = 0x203, 0x200, 0x400


class PciBus:
    """What sysfs shows of the PCI bus of a machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.core = machine.driver_core

    # --- /sys/bus/pci ---

    def bus(self) -> Directory:
        core = self.core
        return directory(
            {
                "devices": Directory(lambda: core.devices, self._link_to_device),
                "drivers": Directory(lambda: core.drivers, self._driver),
                "drivers_autoprobe": Attribute(lambda: f"{core.autoprobe:d}\n", self._set_autoprobe),
                "drivers_probe": Attribute(store=core.probe),
                "rescan": Attribute(store=lambda given: core.rescan() if _number(given) else None),
                "slots": self._slots,
                "uevent": Attribute(store=_uevent),
            }
        )

    def _slots(self) -> Directory:
        """The physical slots, those without a device too.  (drivers/pci/slot.c)"""
        described = self.machine.topology.devices
        found = {each.physical_slot: each.address.rpartition(".")[0] for each in described if each.physical_slot}
        return directory({name: directory({"address": text(where)}) for name, where in found.items()})

    def _set_autoprobe(self, given: str) -> None:
        self.core.autoprobe = not given.startswith("0")

    def _link_to_device(self, address: str) -> Node | None:
        pci = self.core.devices.get(address)
        return Link(f"../../..{path(pci).removeprefix('/sys')}") if pci else None

    def _driver(self, name: str) -> Node | None:
        core = self.core
        driver = core.drivers.get(name)
        if driver is None:
            return None
        bound = {
            pci.address: Link(f"../../../..{path(pci).removeprefix('/sys')}")
            for pci in core.devices.values()
            if pci.driver == name
        }
        return directory(
            {
                **bound,
                "bind": Attribute(store=lambda given: core.bind(driver, given)),
                "unbind": Attribute(store=lambda given: core.unbind(driver, given)),
                "new_id": Attribute(store=lambda given: core.new_id(driver, given)),
                "remove_id": Attribute(store=driver.remove_id),
                "uevent": Attribute(store=_uevent),
                "module": Link(f"../../../../module/{driver.module}"),
            }
        )

    # --- /sys/devices/pciDDDD:BB ---

    def roots(self) -> list[str]:
        """The root buses."""
        return sorted({_root(pci) for pci in self.core.devices.values() if pci.parent is None})

    def root(self, name: str) -> Node | None:
        """A root bus."""
        return self._children(name, None, dict) if name in self.roots() else None

    def _children(self, root: str, parent: PciDevice | None, own: Callable[[], dict[str, Child]]) -> Directory:
        """The directory of a root bus or a device: the devices below it, and its own files."""

        def is_below(pci: PciDevice) -> bool:
            return pci.parent is parent and (parent is not None or _root(pci) == root)

        def names() -> list[str]:
            below = [pci.address for pci in self.core.devices.values() if is_below(pci)]
            return [*below, *directory(own()).names()]

        def lookup(name: str) -> Node | None:
            pci = self.core.devices.get(name)
            return self._device(pci) if pci is not None and is_below(pci) else directory(own()).lookup(name)

        return Directory(names, lookup)

    # --- a device ---

    def _device(self, pci: PciDevice) -> Directory:
        return self._children("", pci, lambda: self._files(pci))

    def _files(self, pci: PciDevice) -> dict[str, Child]:
        described = self.machine.topology.device(pci.address)
        up = "../" * (path(pci).count("/") - 1)  # to /sys
        driver = None if pci.address in self.core.releasing else pci.driver
        files = self.core.host.files[pci.address]

        def set_parity(given: str) -> None:
            files.broken_parity_status = bool(_number(given))

        return {
            **self._identity(pci, described),
            **self._state(pci),
            **self._actions(pci),
            **self._bars(pci),
            **(self._bridge(pci) if pci.is_bridge else {}),
            **(self._eeh(pci, described) if self._has_eeh(described) else {}),
            **self._uses(pci),
            "broken_parity_status": Attribute(lambda: f"{files.broken_parity_status:d}\n", set_parity),
            "driver": Link(f"{up}bus/pci/drivers/{driver}") if driver else None,
            "driver_override": self._override(pci) if described.overridable else None,
            "iommu_group": Link(f"{up}kernel/iommu_groups/{pci.group.number}") if pci.group else None,
            "local_cpulist": text("0"),
            "local_cpus": text("1"),
            "power": directory({}),
            "subsystem": Link(f"{up}bus/pci"),
            "uevent": Attribute(lambda: _describe(pci), _uevent, 0o644),
            "vfio-dev": self._vfio_dev(pci, up),
            "waiting_for_supplier": None if driver else text(f"{self.core.waits_for_supplier(pci):d}"),
        }

    def _identity(self, pci: PciDevice, described: topology.Device) -> dict[str, Child]:
        vendor, device = pci.subsystem_vendor, pci.subsystem_device
        if pci.is_bridge:  # theirs is in a capability, if they have any
            vendor, device = described.subsystem_vendor or 0, described.subsystem_device or 0
        return {
            "class": text(f"{pci.device_class:#08x}"),
            "config": Attribute(pci.host_config, mode=0o644, public=reg.HEADER_END),
            "device": text(f"{pci.device:#06x}"),
            "modalias": text(_modalias(pci)),
            "revision": text(f"{pci.revision:#04x}"),
            "subsystem_device": text(f"{device:#06x}"),
            "subsystem_vendor": text(f"{vendor:#06x}"),
            "vendor": text(f"{pci.vendor:#06x}"),
        }

    def _state(self, pci: PciDevice) -> dict[str, Child]:
        files = self.core.host.files[pci.address]

        def set_msi(given: str) -> None:
            files.msi_bus = bool(_number(given))

        def set_node(given: str) -> None:
            node = _signed(given)
            if node not in (-1, 0):
                raise fail(errno.EINVAL)
            files.numa_node = node

        bits = text(f"{files.dma_mask_bits}")
        return {
            "ari_enabled": text("0"),
            "consistent_dma_mask_bits": bits,
            "dma_mask_bits": bits,
            "enable": Attribute(lambda: f"{pci.enable_count}\n", lambda given: self._enable(pci, given)),
            "irq": text(f"{pci.irq}"),
            "msi_bus": Attribute(lambda: f"{files.msi_bus:d}\n", set_msi),
            "numa_node": Attribute(lambda: f"{files.numa_node}\n", set_node),
            "power_state": Attribute(lambda: f"{_power(pci)}\n"),
        }

    def _enable(self, pci: PciDevice, given: str) -> None:
        wanted = _number(given)
        if pci.driver is not None:
            raise fail(errno.EBUSY)
        if wanted:
            pci.enable()
        elif pci.enable_count:
            pci.disable()
        else:
            raise fail(errno.EIO)

    def _override(self, pci: PciDevice) -> Attribute:
        return Attribute(
            lambda: f"{pci.driver_override or '(null)'}\n", lambda given: self.core.set_override(pci, given)
        )

    def _actions(self, pci: PciDevice) -> dict[str, Child]:
        core = self.core
        known = self.machine.topology.device(pci.address).reset

        def reset_now(given: str) -> None:
            if _number(given) != 1:
                raise fail(errno.EINVAL)
            if not reset.reset_function(pci):
                raise fail(errno.ENOTTY)

        def set_methods(given: str) -> None:
            names = given.split()
            usable = tuple(method for method in known if method != "bus" or len(pci.same_bus) == 1)
            if names == ["default"]:
                pci.reset_methods = usable
            elif all(name in usable for name in names):
                pci.reset_methods = tuple(names)
            else:
                raise fail(errno.EINVAL)

        def show_methods() -> str:
            return f"{' '.join(pci.reset_methods)}\n" if pci.reset_methods else ""

        def remove(given: str) -> None:
            if _number(given):
                core.remove(pci)
                core.host.forget(path(pci))

        return {
            "remove": Attribute(store=remove, mode=0o220),
            "rescan": Attribute(store=lambda given: core.rescan(pci.domain, pci.bus) if _number(given) else None),
            "reset": Attribute(store=reset_now) if known else None,
            "reset_method": Attribute(show_methods, set_methods) if known else None,
        }

    def _bars(self, pci: PciDevice) -> dict[str, Child]:
        def resource() -> str:
            lines = [(0, 0, 0)] * (_RESOURCES if pci.is_bridge else 13)
            for bar in pci.bars.values():
                if bar.start:
                    lines[bar.index] = bar.start, bar.end, bar.resource_flags
            return "".join(f"{start:#018x} {end:#018x} {flags:#018x}\n" for start, end, flags in lines)

        def unreadable() -> str:
            raise fail(errno.EIO)  # memory is for mmap only, which the seam has for VFIO's files

        files: dict[str, Child] = {"resource": Attribute(resource)}
        for bar in pci.bars.values():
            if bar.start and bar.index < 6:
                files[f"resource{bar.index}"] = Attribute(unreadable, mode=0o600)
        return files

    def _bridge(self, pci: PciDevice) -> dict[str, Child]:
        below = [other for other in self.core.devices.values() if _is_below(other, pci)]
        secondary = self.machine.topology.device(pci.address).secondary_bus or 0
        last = max((other.bus for other in below), default=secondary)
        return {
            "secondary_bus_number": text(f"{secondary}"),
            "subordinate_bus_number": text(f"{max(last, secondary)}"),
        }

    # --- EEH ---

    def _has_eeh(self, described: topology.Device) -> bool:
        return self.machine.topology.platform.eeh and described.pe is not None

    def _eeh(self, pci: PciDevice, described: topology.Device) -> dict[str, Child]:
        pe = pci.eeh
        assert pe is not None

        def state() -> str:
            bits = pe.look()  # which counts: from now on the kernel believes that somebody takes care of it
            return f"{bits:#010x} {pe.flags:#010x}\n"

        def thaw(given: str) -> None:
            if pe.isolated:
                pe.thaw()
                pe.clear("isolated")

        mode = (_MODE_BRIDGE if pci.is_bridge else _MODE_DEVICE) | (_MODE_REMOVED if pe.removed else 0)
        return {
            "eeh_mode": text(f"{mode:#x}"),
            "eeh_pe_config_addr": text(f"{described.pe:#x}"),
            "eeh_pe_state": Attribute(state, thaw),
        }

    # --- what drivers made of the device ---

    def _vfio_dev(self, pci: PciDevice, up: str) -> Directory | None:
        number = self.core.vfio_devices.get(pci.address)
        if number is None:
            return None
        return directory(
            {
                f"vfio{number}": directory(
                    {
                        "device": Link(f"../../../{pci.address}"),
                        "power": directory({}),
                        "subsystem": Link(f"{up}../../class/vfio-dev"),
                        "uevent": Attribute(lambda: "", _uevent, 0o644),
                    }
                )
            }
        )

    def _uses(self, pci: PciDevice) -> dict[str, Child]:
        """Network interfaces and disks, while an ordinary driver has the device."""
        host = self.core.host
        if not self.core.on_host_driver(pci.address):
            return {}
        nets = {
            name: directory(
                {"flags": text("0x1003" if net.up else "0x1002"), "device": Link(f"../../../{pci.address}")}
            )
            for name, (address, net) in host.interfaces.items()
            if address == pci.address
        }
        disks = {
            name: block_device(disk)
            for name, (address, disk) in host.disks.items()
            if address == pci.address and not disk.multipath
        }
        found: dict[str, Child] = {}
        if nets:
            found["net"] = directory(nets)
        if disks and is_nvme(pci):
            found["nvme"] = directory({controller(self.machine, pci): directory(disks)})
        elif disks:
            found["block"] = directory(disks)
        return found


def block_device(disk: topology.Disk) -> Directory:
    """The directory of a block device."""
    return directory(
        {
            "dev": text(f"{disk.number[0]}:{disk.number[1]}"),
            "holders": directory({name: Link(f"../../../../../../virtual/block/{name}") for name in disk.holders}),
        }
    )


def is_nvme(pci: PciDevice) -> bool:
    return pci.device_class == 0x010802


def controller(machine: Machine, pci: PciDevice) -> str:
    """The name of an NVMe controller."""
    core = machine.driver_core
    shared = {address for address, disk in core.host.disks.values() if disk.multipath}
    all_of_them = [each.address for each in core.devices.values() if is_nvme(each) or each.address in shared]
    return f"nvme{all_of_them.index(pci.address)}"


def path(pci: PciDevice) -> str:
    """The directory of a device, below all bridges."""
    return f"{path(pci.parent)}/{pci.address}" if pci.parent else f"/sys/devices/{_root(pci)}/{pci.address}"


def _root(pci: PciDevice) -> str:
    """The root bus that the device is below."""
    return _root(pci.parent) if pci.parent else f"pci{pci.domain:04x}:{pci.bus:02x}"


def _is_below(pci: PciDevice, bridge: PciDevice) -> bool:
    return pci.parent is not None and (pci.parent is bridge or _is_below(pci.parent, bridge))


def _power(pci: PciDevice) -> str:
    if pci.power_state is None:
        return "unknown"
    return "D3hot" if pci.power_state == 3 else f"D{pci.power_state}"


def _modalias(pci: PciDevice) -> str:
    kind = pci.device_class
    return (
        f"pci:v{pci.vendor:08X}d{pci.device:08X}sv{pci.subsystem_vendor:08X}sd{pci.subsystem_device:08X}"
        f"bc{kind >> 16:02X}sc{kind >> 8 & 0xFF:02X}i{kind & 0xFF:02X}"
    )


def _describe(pci: PciDevice) -> str:
    lines = [f"DRIVER={pci.driver}"] if pci.driver else []
    lines += [
        f"PCI_CLASS={pci.device_class:X}",
        f"PCI_ID={pci.vendor:04X}:{pci.device:04X}",
        f"PCI_SUBSYS_ID={pci.subsystem_vendor:04X}:{pci.subsystem_device:04X}",
        f"PCI_SLOT_NAME={pci.address}",
        f"MODALIAS={_modalias(pci)}",
    ]
    return "\n".join(lines) + "\n"


_ACTIONS = re.compile(r"(add|remove|change|move|online|offline|bind|unbind)\n?")


def _uevent(given: str) -> None:
    """Nobody listens, but the kernel looks at what is asked for."""
    if not _ACTIONS.fullmatch(given):
        raise fail(errno.EINVAL)


def _signed(given: str) -> int:
    """The number in a write, as kstrtol(…, 0, …) reads it; EINVAL for anything else."""
    match = re.fullmatch(r"([+-]?)(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)\n?", given.split("\0", 1)[0])
    if not match:
        raise fail(errno.EINVAL)
    digits = match[2].lower()
    value = int(digits, 16 if digits.startswith("0x") else 8 if digits.startswith("0") else 10)
    return -value if match[1] == "-" else value


def _number(given: str) -> int:
    """The same, without a minus."""
    value = _signed(given)
    if value < 0:
        raise fail(errno.EINVAL)
    return value
