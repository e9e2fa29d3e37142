"""Hot reset: the whole slot or bus of a device, which resets every device on it.

It reaches devices that have no reset of their own (`Device.reset`), but it belongs to who holds them all: each device on
the bus has to be on a VFIO driver, and its group has to be among those that the caller shows.

What a reset leaves behind.  Both resets keep configuration space: the kernel saves it before and puts it back after, the
BARs, COMMAND with its bus-master bit, and the messages of MSI and MSI-X, so that interrupts stay enabled.  The device's
own registers are as after power-on, mapped BARs stay mapped, and DMA mappings are untouched.

Source: drivers/vfio/pci/vfio_pci_core.c, "VFIO_DEVICE_PCI_HOT_RESET"; include/uapi/linux/vfio.h.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from vfio import errors, sysfs, uapi

if TYPE_CHECKING:
    from vfio.device import Device
    from vfio.group import Group

_HEADER = uapi.sizeof(uapi.vfio_pci_hot_reset_info)
_ENTRY = uapi.sizeof(uapi.vfio_pci_dependent_device)


def affected(device: Device) -> list[errors.Affected]:
    """The devices that a hot reset of `device` resets, this one among them, each with its group.

    Raises `errors.CallFailed`: ENODEV where neither slot nor bus can be reset, as on a root bus; EPERM where one of the
    devices is in no group.
    """
    what = f"cannot tell what a hot reset of {device.address} resets"
    count = 1
    while True:  # the kernel says how many there are, and one more may be plugged in before it is asked again
        size = _HEADER + count * _ENTRY
        info = uapi.vfio_pci_hot_reset_info.sized(size)
        try:
            device.backend.ioctl(device.fd, uapi.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, uapi.buffer(info))
            break
        except OSError as error:
            if error.errno == errno.ENOSPC and info.count > count:
                count = info.count
                continue
            raise _explained(device, error, what) from error
    return [
        errors.Affected(f"{each.segment:04x}:{each.bus:02x}:{each.devfn >> 3:02x}.{each.devfn & 7}", each.group_id)
        for each in info.devices[0 : info.count]
    ]


def hot_reset(device: Device, groups: Iterable[Group] | None = None) -> None:
    """Reset the slot or bus of `device`.  `groups` are those of all devices on it (default: the device's own alone).

    Raises `errors.HotResetRefused` (EINVAL), which names the groups that have to be given and the devices that have to
    be on a VFIO driver; `errors.CallFailed`: ENODEV where neither slot nor bus can be reset, EBUSY while somebody else
    uses one of the devices; `errors.Closed` for a closed group.
    """
    held = list(groups) if groups is not None else [device.group]
    fds = [group.fd for group in held]
    size = uapi.offsetof(uapi.vfio_pci_hot_reset, "group_fds") + 4 * len(fds)
    argument = uapi.vfio_pci_hot_reset.sized(size, count=len(fds), group_fds=fds)
    try:
        device.backend.ioctl(device.fd, uapi.VFIO_DEVICE_PCI_HOT_RESET, uapi.buffer(argument))
    except OSError as error:
        if error.errno == errno.EINVAL and (refused := _refused(device, held)):
            raise refused from error
        raise _explained(device, error, f"cannot hot-reset {device.address}") from error


def _refused(device: Device, held: Sequence[Group]) -> errors.HotResetRefused | None:
    """Which device is in the way; None where none is."""
    numbers = {group.number for group in held}
    everyone = affected(device)
    missing = [each for each in everyone if each.group not in numbers]
    foreign = []
    for each in everyone:
        found = sysfs.device(device.backend, each.address)
        if not found.on_vfio:
            foreign.append(errors.Blocker(each.address, found.driver or ""))
    return errors.HotResetRefused(device.address, missing, foreign) if missing or foreign else None


def _explained(device: Device, error: OSError, what: str) -> errors.VfioError:
    number = error.errno or errno.EIO
    why = remedy = ""
    if number == errno.ENODEV:
        why = "neither its slot nor its bus can be reset: it is on a root bus, or the bridge above cannot do it"
        remedy = "device.reset() resets the function, if it can be reset" if device.can_reset else ""
    elif number == errno.EPERM:
        why = "a device on its bus is in no IOMMU group"
    elif number == errno.EBUSY:
        why = "somebody else is using a device on its bus at this moment"
        remedy = "try again"
    elif number == errno.EINVAL:
        why = "more groups were given than there are devices on its bus"
    return errors.CallFailed(number, what, why, remedy)
