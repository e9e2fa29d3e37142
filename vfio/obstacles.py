"""What stands in the way of opening a device through VFIO: the errors that would be raised, found without opening it."""

from __future__ import annotations

import errno

from vfio import changes, diagnose, errors, holders, owner, sysfs
from vfio.backend import Backend, missing

_CONTAINER = "/dev/vfio/vfio"


def of(backend: Backend, address: str) -> list[errors.VfioError]:
    """Why this process cannot open the device, the most basic reason first; empty when nothing is known against it.

    Raises `errors.NoSuchDevice`.
    """
    device = sysfs.device(backend, address)
    if device.group is None or device.is_bridge:
        return [errors.NoGroup(device.address) if device.group is None else errors.IsBridge(device.address)]
    found: list[errors.VfioError] = []
    if not backend.exists(_CONTAINER):
        found.append(errors.NoVfio(_CONTAINER))
    if release := diagnose.broken_on_power(backend):
        found.append(errors.KernelTooOld(errno.EINVAL, f"cannot bind {device.address} to vfio-pci", release))
    if not device.on_vfio and not sysfs.driver_loaded(backend, changes.VFIO_PCI):
        found.append(errors.ModuleMissing(f"cannot bind {device.address} to vfio-pci", changes.VFIO_PCI))
    if blockers := sysfs.blockers(backend, device.group):
        found.append(_not_viable(device.group, blockers))
    if not device.on_vfio:
        if not device.does_host_dma:  # else it is among the blockers
            found.append(errors.NotBound(device.address, device.driver))
        return found
    node = sysfs.node_of(backend, device.group)
    if having := holders.having_open(backend, node):
        found.append(errors.Busy(f"group {device.group} is in use", having))
    if denied := _denied(backend, node):
        found.append(denied)
    return found


def _not_viable(group: int, blockers: list[errors.Blocker]) -> errors.GroupNotViable:
    error = errors.GroupNotViable(group, blockers)
    if any(blocker.note for blocker in blockers):
        error.remedy += " --force      (takes it from under the host: better put it out of use first)"
    return error


def _denied(backend: Backend, node: str) -> errors.AccessDenied | None:
    """What an open of the node by this process would raise."""
    try:
        status = backend.stat(node)
    except OSError as error:
        if missing(error):
            return None
        raise
    me = owner.me(backend)
    if me.uid == status.uid:
        bits = status.mode >> 6
    elif status.gid in me.groups:
        bits = status.mode >> 3
    else:
        bits = status.mode
    if me.uid == 0 or bits & 0o6 == 0o6:
        return None
    belongs_to = owner.named(status.uid, status.gid)
    return errors.AccessDenied(node, belongs_to, status.mode, owner.user_name(me.uid))
