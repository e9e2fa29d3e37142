"""vfio list, show, why: they look, and open nothing (but for show --open)."""

from __future__ import annotations

import errno
from typing import Any

import click

from vfio import errors, obstacles, owner, pciids, sysfs, usage
from vfio.backend import Backend, missing
from vfio.iommu.noiommu import WARNING

from . import opened, output
from .options import Options, common, pci_address

NO_DRIVER = "none"


@click.command("list")
@click.option("--group", type=click.IntRange(min=0), metavar="N", help="Only the devices of this IOMMU group.")
@click.option("--driver", metavar="D", help="Only the devices on this driver (none: on no driver).")
@common
def list_devices(options: Options, group: int | None, driver: str | None) -> None:
    """List PCI devices: group, PE and PHB (on POWER), driver, and whether they can be assigned.

    \b
    Examples:
      vfio list
      vfio list --driver vfio-pci
      vfio list --group 1 --json
    """
    backend = options.backend
    found = sysfs.devices(backend) if group is None else sysfs.group_devices(backend, group)
    if group is not None and not found:
        raise errors.CallFailed(
            errno.ENOENT, f"cannot list group {group}", "there is no such group", "vfio list shows the groups"
        )
    numbers = {device.group for device in found if device.group is not None}
    uses = usage.of_devices(backend)
    blockers: dict[int | None, list[errors.Blocker]] = {
        number: sysfs.blockers(backend, number, uses) for number in numbers
    }
    chosen = [device for device in found if driver is None or (device.driver or NO_DRIVER) == driver]
    judged = [(device, *sysfs.assignable(device, blockers.get(device.group, []))) for device in chosen]
    if options.json:
        output.as_json([{**_as_json(device), "assignable": can, "why": why or None} for device, can, why in judged])
        return
    power = any(device.pe is not None for device in found)
    columns = ["ADDRESS", "GROUP", *(["PHB", "PE"] if power else []), "DRIVER", "ID", "NAME", "ASSIGNABLE"]
    rows = [
        [
            device.address,
            _cell(device.group),
            *([_cell(device.phb), "-" if device.pe is None else f"{device.pe:#x}"] if power else []),
            device.driver or "-",
            f"{device.vendor:04x}:{device.device:04x}",
            _name(device),
            ("yes" if can else "no") + (f", {why}" if can and why else f": {why}" if why else ""),
        ]
        for device, can, why in judged
    ]
    output.table(columns, rows)


@click.command()
@click.argument("address", type=pci_address)
@click.option("--open", "opens", is_flag=True, help="Open the device, which resets it, and show what it tells.")
@common
def show(options: Options, address: str, opens: bool) -> None:
    """Show what sysfs tells of a device and its group, without opening anything.

    \b
    Examples:
      vfio show 0001:01:00.0
      vfio show 0001:01:00.0 --open
    """
    backend = options.backend
    device = sysfs.device(backend, address)
    found = opened.look(backend, address) if opens else None
    uses = usage.of_devices(backend).get(address, [])
    members = [] if device.group is None else sysfs.group_devices(backend, device.group)
    if options.json:
        output.as_json(
            {
                **_as_json(device),
                "eeh": sysfs.eeh(backend, address),
                "in_use_for": uses,
                "node": _node(backend, device.group),
                "group_devices": [{"address": member.address, "driver": member.driver} for member in members],
                **({"open": opened.as_json(found)} if found else {}),
            }
        )
        return
    names = pciids.load()
    node = _node(backend, device.group)
    vendor, product = names.vendor(device.vendor), names.device(device.vendor, device.device)
    fields = {
        "address": device.address,
        "id": f"{device.vendor:04x}:{device.device:04x}",
        "name": ", ".join(name for name in (vendor, product) if name),
        "subsystem": f"{device.subsystem_vendor:04x}:{device.subsystem_device:04x}",
        "class": f"{device.class_code:06x} {names.device_class(device.class_code) or ''}".rstrip(),
        "revision": f"{device.revision:02x}",
        "driver": device.driver or "none",
        "driver override": device.driver_override or "none",
        "bridge above": device.parent or "none",
        "in use for": "; ".join(uses),
        "PHB": "" if device.phb is None else str(device.phb),
        "PE": "" if device.pe is None else f"{device.pe:#x}",
        **{name.replace("_", " "): text for name, text in sysfs.eeh(backend, address).items()},
        "group": "none" if device.group is None else str(device.group),
        "group's devices": ", ".join(f"{member.address} ({_role(member)})" for member in members),
        "group's node": ""
        if node is None
        else f"{node['path']}, {owner.named(node['uid'], node['gid'])} {node['mode']}",
        "VFIO device": device.vfio_dev or "",
    }
    output.record({name: text for name, text in fields.items() if text})
    if found:
        opened.show(found)


@click.command()
@click.argument("address", type=pci_address)
@common
def why(options: Options, address: str) -> None:
    """Tell what keeps a device from being opened through VFIO, and what to do about it.

    \b
    Example:
      vfio why 0001:03:00.0
    """
    found = obstacles.of(options.backend, address)
    if options.json:
        output.as_json({"address": address, "ready": not found, "obstacles": [output.describe(each) for each in found]})
        return
    for each in found:
        click.echo(f"{each.what}: {each.why}" + (f"\n  {each.remedy}" if each.remedy else ""))
    if not found:
        me = owner.me(options.backend)
        seen = "" if me.uid == 0 else "; only root could see whether another user has it open"
        click.echo(f"{address} is ready to be opened by {me}{seen}")
        group = sysfs.group_of(options.backend, address)
        if group is not None and sysfs.unprotected(options.backend, group):
            output.note(WARNING.format(number=group))


COMMANDS = (list_devices, show, why)


def _cell(value: int | None) -> str:
    return "-" if value is None else str(value)


def _role(device: sysfs.PciDevice) -> str:
    return "bridge" if device.is_bridge else device.driver or "no driver"


def _name(device: sysfs.PciDevice) -> str:
    """Vendor and device, else the class, else nothing: as far as this host has the names."""
    names = pciids.load()
    vendor, product = names.vendor(device.vendor), names.device(device.vendor, device.device)
    return f"{vendor} {product}" if vendor and product else vendor or names.device_class(device.class_code) or "-"


def _node(backend: Backend, group: int | None) -> dict[str, Any] | None:
    if group is None:
        return None
    path = sysfs.node_of(backend, group)
    try:
        status = backend.stat(path)
    except OSError as error:
        if missing(error):
            return None
        raise
    return {"path": path, "uid": status.uid, "gid": status.gid, "mode": f"{status.mode & 0o7777:04o}"}


def _as_json(device: sysfs.PciDevice) -> dict[str, Any]:
    names = pciids.load()
    return {
        "address": device.address,
        "group": device.group,
        "phb": device.phb,
        "pe": device.pe,
        "driver": device.driver,
        "driver_override": device.driver_override,
        "on_vfio": device.on_vfio,
        "vfio_dev": device.vfio_dev,
        "vendor": f"{device.vendor:04x}",
        "device": f"{device.device:04x}",
        "subsystem_vendor": f"{device.subsystem_vendor:04x}",
        "subsystem_device": f"{device.subsystem_device:04x}",
        "class": f"{device.class_code:06x}",
        "revision": f"{device.revision:02x}",
        "vendor_name": names.vendor(device.vendor),
        "device_name": names.device(device.vendor, device.device),
        "class_name": names.device_class(device.class_code),
        "parent": device.parent,
        "is_bridge": device.is_bridge,
    }
