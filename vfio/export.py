"""The plan that describes how a host is now: applied to the same host, it changes nothing."""

from __future__ import annotations

import json
import os

from vfio import desired, journal, owner, pciids, persist, plan, sysfs
from vfio.backend import Backend, default

_HEADER = "# The assignments of this host, as a plan.  To have them again: vfio apply THIS-FILE"


def export(
    backend: Backend | None = None, *, everything: bool = False, persist_dir: str | os.PathLike[str] | None = None
) -> desired.Desired:
    """The devices that are on VFIO, that were assigned since boot, or whose assignment survives a reboot.

    `everything`: all devices but bridges.  Needs no privilege.
    """
    backend = backend or default()
    persistent = persist.load(persist.directory(backend, persist_dir))
    known = journal.load(backend).devices
    found = [
        _entry(backend, device, persistent)
        for device in sysfs.devices(backend)
        if not device.is_bridge
        and (everything or device.on_vfio or device.address in known or device.address in persistent.rules)
    ]
    missing = [
        desired.DesiredDevice(address=rule.address, driver=rule.driver, persistent=True, optional=True)
        for rule in persistent.rules.values()
        if not backend.exists(sysfs.path(rule.address))
    ]
    return desired.Desired((*found, *missing))


def toml(wanted: desired.Desired, backend: Backend | None = None) -> str:
    """A plan as a TOML file, which `desired.parse` reads; a `backend` that has its devices tells their names."""
    lines = [_HEADER]
    for each in wanted.devices:
        lines += ["", "[[device]]", *_comment(backend, each)]
        for key, value in entry(each).items():
            lines.append(f"{key} = {f'0o{value:03o}' if key == 'mode' else _value(value)}")
    return "\n".join(lines) + "\n"


def entry(device: desired.DesiredDevice) -> dict[str, str | int | bool]:
    """An entry as a table, without what is by default (but for the driver)."""
    key, value = device.selector
    found: dict[str, str | int | bool] = {key: value, "driver": device.driver}
    if device.owner is not None:
        found["owner"] = device.owner
    if device.mode is not None:
        found["mode"] = device.mode
    if device.persistent is not False:
        found["persistent"] = desired.KEEP if device.persistent is None else True
    for flag in ("whole_group", "optional"):
        if getattr(device, flag):
            found[flag] = True
    return found


def _entry(backend: Backend, device: sysfs.PciDevice, persistent: persist.Persistent) -> desired.DesiredDevice:
    """A device as it is now.  Where a reboot would make it something else, the plan leaves that as it is."""
    driver = device.driver or plan.NONE
    node = plan.node_state(backend, device.group) if device.group is not None and "vfio" in driver else None
    user, group = (None, None) if node is None else (owner.user_name(node.uid), owner.group_name(node.gid))
    mode = None if node is None else node.mode
    rule = persistent.rules.get(device.address)
    keeps: bool | None = False
    if rule is not None:
        agrees = rule.driver == driver and all(
            ruled in (None, is_now) for ruled, is_now in ((rule.user, user), (rule.group, group), (rule.mode, mode))
        )
        keeps = True if agrees else None
        if agrees:
            user, group, mode = rule.user, rule.group, rule.mode
    elif device.id in persistent.ids:
        keeps = None
    return desired.DesiredDevice(
        address=device.address,
        driver=driver,
        owner=user and (f"{user}:{group}" if group else user),
        mode=mode,
        persistent=keeps,
    )


def _comment(backend: Backend | None, each: desired.DesiredDevice) -> list[str]:
    if backend is None or each.address is None or not backend.exists(sysfs.path(each.address)):
        return []
    device = sysfs.device(backend, each.address)
    names = pciids.load()
    name = " ".join(filter(None, (names.vendor(device.vendor), names.device(device.vendor, device.device))))
    group = "" if device.group is None else f", group {device.group}"
    return [f"# {device.id}{group}{f', {name}' if name.isprintable() and name else ''}"]


def _value(value: str | int | bool) -> str:
    """As in TOML; its strings are those of JSON, but for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
