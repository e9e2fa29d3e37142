"""Resets of functions and of buses: the host's PCI core's (drivers/pci/pci.c), and those that a user asks for."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from vfio import uapi
from vfio.fake import registers as reg
from vfio.fake.kernel_error import fail

if TYPE_CHECKING:
    from vfio.fake.iommu_group import IommuGroup
    from vfio.fake.pci import PciDevice
    from vfio.fake.process import Process
    from vfio.fake.user import Argument

_SECONDS = {"flr": 0.1, "pm": 0.05, "bus": 4.1}
"""How long a reset takes; the bus's goes through the firmware."""

_INFO_MINSZ, _ENTRY = 12, 8


def reset_function(pci: PciDevice) -> bool:
    """pci_try_reset_function(): reset with the first method that works, keeping configuration; whether one did."""
    saved = pci.save()
    pci.set_power_state(0)
    pci.change_command(clear_bits=0xFFFF, set_bits=reg.COMMAND_INTX_DISABLE)
    done = reset_unsaved(pci)
    pci.restore(saved)
    return done


def reset_unsaved(pci: PciDevice) -> bool:
    """Reset with the first method that works; registers are as it leaves them."""
    return any(_METHODS[method](pci) for method in pci.reset_methods if method in _METHODS)


def _function_level(pci: PciDevice) -> bool:
    express = pci.registers.find(reg.CAP_EXPRESS)
    if not express or not pci.registers.get(express + reg.EXP_DEVCAP, 4) & reg.EXP_DEVCAP_FLR:
        return False
    _reset([pci], "flr")
    return True


def _power(pci: PciDevice) -> bool:
    """To D3hot and back, which resets a function that does not keep its state there."""
    pm = pci.registers.find(reg.CAP_PM)
    if not pm or pci.registers.get(pm + reg.PM_CTRL, 2) & reg.PM_NO_SOFT_RESET:
        return False
    pci.set_power_state(3)
    pci.set_power_state(0)
    pci.machine.clock.advance(_SECONDS["pm"])
    return True


def _parent_bus(pci: PciDevice) -> bool:
    """The whole bus, if the function is alone on it."""
    if pci.parent is None or len(pci.same_bus) > 1:
        return False
    _reset([pci], "bus")
    return True


_METHODS = {"flr": _function_level, "pm": _power, "bus": _parent_bus}


def _reset(devices: list[PciDevice], method: str) -> None:
    for device in devices:
        device.hardware_reset()
    devices[0].machine.clock.advance(_SECONDS[method])


def reset_bus(pci: PciDevice) -> None:
    """pci_reset_bus(): all functions of the bus, keeping their configuration."""
    devices = pci.same_bus
    saved = [device.save() for device in devices]
    for device in devices:
        device.set_power_state(0)
    _reset(devices, "bus")
    for device, state in zip(devices, saved, strict=True):
        device.restore(state)


def bus_resettable(pci: PciDevice) -> bool:
    """Whether a reset of its bus is possible, and touches nothing but devices of VFIO drivers."""
    return pci.parent is not None and all(device.vfio for device in pci.same_bus)


def reset_idle_bus(pci: PciDevice) -> None:
    """The last close of a device: if none of its bus is open, and one could not be reset by itself, reset the bus."""
    if not bus_resettable(pci):
        return
    users = [device.vfio for device in pci.same_bus if device.vfio]
    if any(user.users for user in users) or not any(user.needs_reset for user in users):
        return
    reset_bus(pci)
    for user in users:
        user.needs_reset = False


def hot_reset_info(pci: PciDevice, argument: Argument) -> int:
    """VFIO_DEVICE_GET_PCI_HOT_RESET_INFO: which devices a reset of the bus touches."""
    argsz, _, _ = struct.unpack("=3I", argument.copy_in(_INFO_MINSZ))
    if argsz < _INFO_MINSZ:
        raise fail(errno.EINVAL)
    if pci.parent is None:
        raise fail(errno.ENODEV)
    devices = pci.same_bus
    if len(devices) > (argsz - _INFO_MINSZ) // _ENTRY:
        argument.copy_out(struct.pack("=3I", argsz, 0, len(devices)))
        raise fail(errno.ENOSPC)
    entries = b""
    for device in devices:
        if device.group is None:
            raise fail(errno.EPERM)
        entries += struct.pack("=IHBB", device.group.number, device.domain, device.bus, device.devfn)
    argument.copy_out(entries, _INFO_MINSZ)
    argument.copy_out(struct.pack("=3I", argsz, 0, len(devices)))
    return 0


def hot_reset(pci: PciDevice, process: Process, argument: Argument) -> int:
    """VFIO_DEVICE_PCI_HOT_RESET: reset the bus, for whoever holds the groups of all its devices."""
    argsz, flags, count = struct.unpack("=3I", argument.copy_in(_INFO_MINSZ))
    if argsz < _INFO_MINSZ or flags or not count:
        raise fail(errno.EINVAL)
    if pci.parent is None:
        raise fail(errno.ENODEV)
    devices = pci.same_bus
    if count > len(devices):
        raise fail(errno.EINVAL)
    fds = struct.unpack(f"={count}i", argument.copy_in(4 * count, uapi.offsetof(uapi.vfio_pci_hot_reset, "group_fds")))
    groups = [_group(process, fd) for fd in fds]
    if not bus_resettable(pci) or not all(device.group in groups for device in devices):
        raise fail(errno.EINVAL)
    for device in devices:
        assert device.vfio is not None
        device.vfio.set_power_state(0)
    reset_bus(pci)
    return 0


def _group(process: Process, fd: int) -> IommuGroup | None:
    """The group that a descriptor of the caller stands for; EBADF, or EINVAL for a descriptor of anything else."""
    from vfio.fake.group import GroupFile

    file = process.lookup(fd)
    if isinstance(file, GroupFile):
        return file.group.iommu_group
    raise fail(errno.EINVAL)
