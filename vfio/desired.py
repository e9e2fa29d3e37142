"""A plan: what a host's devices are to be, said once, in a file or in Python; `vfio.apply` makes it so.

    [[device]]                    # by one of: address, id, slot, class
    address = "0001:01:00.0"
    whole_group = true            # with all other devices of its group; default: false
    driver = "vfio-pci"           # the default; or another driver's name, "none", or "host": the one it had before
    owner = "alice:kvm"           # who gets /dev/vfio/N: USER or USER:GROUP, names or numbers; default: as it is
    mode = 0o660                  # of /dev/vfio/N; default: as it is
    persistent = true             # survives a reboot; default: false; "keep": as it is

    [[device]]
    id = "1b36:0010"              # every device with this vendor and device id
    optional = true               # it is no error if there is none; default: false

    [[device]]
    slot = "C5"                   # every function in this physical slot (/sys/bus/pci/slots)
    driver = "none"

    [[device]]
    class = "0108"                # every device of this class: 2, 4 or 6 hexadecimal digits
    driver = "host"

Devices that no entry names are left alone, and so are bridges.  All errors are `errors.BadPlan`.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from vfio import address as addresses
from vfio import changes, errors, owner, persist, plan, sysfs
from vfio.backend import Backend
from vfio.topology_table import Origin, Table

_SELECTORS = ("address", "id", "slot", "class")
_ID = re.compile(r"([0-9a-f]{4}):([0-9a-f]{4})", re.IGNORECASE)
_CLASS = re.compile(r"(?:[0-9a-f]{2}){1,3}", re.IGNORECASE)
_MOST_MODE = 0o777
_MANY = 8
KEEP = "keep"
"""As `persistent` in a file: as it is."""


@dataclass(frozen=True)
class DesiredDevice:
    """One entry of a plan: which devices, by exactly one of the first four, and what they are to be."""

    address: str | None = None
    """As in `vfio.address.parse`."""
    id: str | None = None
    """``vendor:device``, four hexadecimal digits each."""
    slot: str | None = None
    """The name of a physical slot."""
    device_class: str | None = None
    """Base class, or with subclass, or with programming interface: 2, 4 or 6 hexadecimal digits."""
    driver: str = changes.VFIO_PCI
    """The name of a driver; ``none``: no driver; ``host``: the one it had before it was first taken from the host."""
    whole_group: bool = False
    """Whether the other devices of their groups are meant too."""
    owner: str | None = None
    """Who gets the groups' nodes: ``USER`` or ``USER:GROUP``.  None: as it is."""
    mode: int | None = None
    """Permission bits of the groups' nodes, up to 0o777.  None: as it is."""
    persistent: bool | None = False
    """Whether it survives a reboot; False takes away what made it.  None: as it is."""
    optional: bool = False
    """Whether it is no error that there is no such device."""

    @property
    def selector(self) -> tuple[str, str]:
        """The key that selects, and what it has to be."""
        key, value = next((key, value) for key, value in self._selectors.items() if value is not None)
        return key, value.lower() if key in ("id", "class") else addresses.parse(value) if key == "address" else value

    @property
    def _selectors(self) -> dict[str, str | None]:
        return dict(zip(_SELECTORS, (self.address, self.id, self.slot, self.device_class), strict=True))


@dataclass(frozen=True)
class Desired:
    """A plan.  Raises `errors.BadPlan` for one that breaks a rule that needs no host to be seen."""

    devices: tuple[DesiredDevice, ...] = ()
    origin: Origin = field(default=Origin("<plan>", "", errors.BadPlan), repr=False)
    """Where it was read from, for errors."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "devices", tuple(self.devices))
        seen: dict[tuple[str, str], int] = {}
        for index, each in enumerate(self.devices):
            self._check(index, each)
            if (first := seen.setdefault(each.selector, index)) != index:
                key, value = each.selector
                raise self.error(index, key, f"{value} is {self._place(first)} already")

    def error(self, index: int, key: str, rule: str) -> ValueError:
        """The error that a key of an entry breaks a rule."""
        return self.origin.error(("device", index, key), rule)

    def contradiction(self, index: int, key: str, first: int, what: str) -> ValueError:
        """The error that two entries want different things."""
        return self.error(index, key, f"{what}: {self._place(first)} says otherwise")

    def _place(self, index: int) -> str:
        line = self.origin.line(("device", index))
        return f"device[{index}]" if line is None else f"device[{index}] (line {line})"

    def _check(self, index: int, each: DesiredDevice) -> None:
        given = [key for key, value in each._selectors.items() if value is not None]
        if len(given) != 1:
            raise self.error(
                index,
                given[-1] if given else "address",
                f"an entry selects by exactly one of {', '.join(_SELECTORS)}; "
                + (f"this one has {' and '.join(given)}" if given else "this one has none"),
            )
        if each.address is not None:
            try:
                addresses.parse(each.address)
            except errors.InvalidAddress as error:
                raise self.error(index, "address", f"{error.what}; {error.why}") from None
        if each.id is not None and not _ID.fullmatch(each.id):
            raise self.error(index, "id", f"{each.id!r} is not of the form 14e4:1657 (vendor:device, hexadecimal)")
        if each.device_class is not None and not _CLASS.fullmatch(each.device_class):
            raise self.error(index, "class", f"{each.device_class!r} is not 2, 4 or 6 hexadecimal digits, such as 0108")
        for key, name in (("slot", each.slot), ("driver", each.driver)):
            if name is not None and (not name or "/" in name or not name.isprintable() or name in (".", "..")):
                raise self.error(index, key, f"{name!r} is not a name")
        if each.mode is not None and not 0 <= each.mode <= _MOST_MODE:
            raise self.error(index, "mode", _mode_rule(each.mode))
        if each.persistent and not persist.usable(each.driver):
            raise self.error(index, "driver", f"{each.driver!r} cannot stand in a rule of udev")
        for key, value in (("owner", each.owner), ("mode", each.mode)):
            if value is not None and "vfio" not in each.driver:
                raise self.error(index, key, f"there is no /dev/vfio/N to give away with driver = {each.driver!r}")


def load(path: str | PathLike[str]) -> Desired:
    """The plan in a TOML file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise errors.BadPlan(str(path), f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return parse(text, str(path))


def parse(text: str, file: str = "<plan>") -> Desired:
    """The plan in the text of a TOML file; `file` is its name in errors."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise errors.BadPlan(file, f"not TOML: {error}") from error
    origin = Origin(file, text, errors.BadPlan)
    root = Table(data, (), origin)
    devices = tuple(map(_device, root.optional_tables("device")))
    root.end()
    return Desired(devices, origin)


def _device(table: Table) -> DesiredDevice:
    def text(key: str) -> str | None:
        return table.text(key) if table.has(key) else None

    def flag(key: str) -> bool:
        return table.boolean(key) if table.has(key) else False

    device = DesiredDevice(
        address=text("address"),
        id=text("id"),
        slot=text("slot"),
        device_class=text("class"),
        driver=table.text("driver") if table.has("driver") else changes.VFIO_PCI,
        whole_group=flag("whole_group"),
        owner=text("owner"),
        mode=table.integer("mode") if table.has("mode") else None,
        persistent=_persistent(table),
        optional=flag("optional"),
    )
    table.end()
    return device


def _persistent(table: Table) -> bool | None:
    if table.is_text("persistent"):
        table.text("persistent", one_of=(KEEP,))
        return None
    return table.boolean("persistent") if table.has("persistent") else False


def _mode_rule(mode: int) -> str:
    digits = str(mode)
    meant = mode > 0 and set(digits) <= set("01234567") and int(digits, 8) <= _MOST_MODE
    rule = f"{mode:#o} ({mode}) is not in 0o0..{_MOST_MODE:#o}"
    return f"{rule}; did you mean 0o{digits}?" if meant else rule


# --- On a host ----------------------------------------------------------------------------------------------------


@dataclass
class Resolved:
    """A plan on one host: devices instead of selectors."""

    targets: dict[str, plan.Target] = field(default_factory=dict)
    """By address."""
    access: dict[int, plan.Access] = field(default_factory=dict)
    """By group."""
    own_access: dict[str, plan.Access] = field(default_factory=dict)
    """By address: what the entries that mean the device itself want of its group's node."""
    persistent: dict[str, bool] = field(default_factory=dict)
    """By address: whether it is to survive a reboot, where that is not to stay as it is."""
    ids: dict[str, list[str]] = field(default_factory=dict)
    """Ids that entries select by, all of whose devices are to be on vfio-pci after a reboot: their addresses."""
    notes: list[str] = field(default_factory=list)
    """What was left out, as sentences."""


def resolve(desired: Desired, backend: Backend) -> Resolved:
    """The devices that the plan means on this host.

    Raises `errors.BadPlan` for an entry that means no device of this host, or one that cannot be had, for an owner that
    this host does not know, and for entries that want different things of one device or group.
    """
    found = Resolved()
    everything = sysfs.devices(backend)
    of_device: dict[str, int] = {}
    of_group: dict[int, int] = {}
    for index, each in enumerate(desired.devices):
        selected = _selected(desired, index, backend, everything)
        if not selected:
            found.notes.append(f"there is no device with {' '.join(each.selector)}, which is optional")
        access = _access(desired, index)
        for device in selected:
            _check_device(desired, index, device)
            address, group = device.address, device.group
            first = of_device.setdefault(address, index)
            target = plan.Target(device, each.driver)
            if found.targets.setdefault(address, target).driver != each.driver:
                raise desired.contradiction(index, "driver", first, f"{address} is to be on {each.driver}")
            if each.persistent is not None and found.persistent.setdefault(address, each.persistent) != each.persistent:
                what = "is" if each.persistent else "is not"
                raise desired.contradiction(index, "persistent", first, f"{address} {what} to survive a reboot")
            if group is not None and access != plan.Access():
                merged = _merged(found.access.get(group, plan.Access()), access)
                if isinstance(merged, str):
                    what = f"{sysfs.node(group)} can have only one {merged}"
                    raise desired.contradiction(index, merged, of_group[group], what)
                of_group.setdefault(group, index)
                found.access[group] = merged
                own = _merged(found.own_access.get(address, plan.Access()), access)
                assert not isinstance(own, str), "what fits the group's fits each of them"
                found.own_access[address] = own
        if each.id is not None and each.persistent and each.driver == changes.VFIO_PCI and selected:
            found.ids[each.id.lower()] = [one.address for one in selected if one.id == each.id.lower()]
    return found


def _selected(
    desired: Desired, index: int, backend: Backend, everything: Iterable[sysfs.PciDevice]
) -> list[sysfs.PciDevice]:
    """The devices that an entry means, with the rest of their groups where it says so."""
    entry = desired.devices[index]
    key, value = entry.selector
    why = "no device of this host has it"
    if key == "address":
        selected = [device for device in everything if device.address == value]
        near = difflib.get_close_matches(value, [device.address for device in everything], n=3)
        why = "no device of this host is there" + (f"; the nearest are {', '.join(near)}" if near else "")
    elif key == "slot":
        slots = sysfs.slots(backend)
        where = slots.get(value)
        selected = [] if where is None else [one for one in everything if one.address.startswith(f"{where}.")]
        why = "there is nothing in that slot"
        if value not in slots:
            why = f"this host has no such slot; it has {_some(slots) or 'none (modprobe pnv-php or rpaphp may show them)'}"
    elif key == "id":
        selected = [device for device in everything if device.id == value]
    else:
        selected = [device for device in everything if f"{device.class_code:06x}".startswith(value)]
    chosen = [device for device in selected if key == "address" or not device.is_bridge]
    if selected and not chosen:
        why = "only bridges have it, and they stay with the host"
    if not chosen and not entry.optional:
        raise desired.error(index, key, f"{value}: {why} (optional = true: it may be missing)")
    if entry.whole_group:
        groups = {device.group for device in chosen if device.group is not None}
        known = {device.address for device in chosen}
        chosen += [
            device
            for device in everything
            if device.group in groups and not device.is_bridge and device.address not in known
        ]
    return chosen


def _some(names: Iterable[str]) -> str:
    """The first of many names."""
    names = sorted(names)
    return ", ".join(names[:_MANY]) + (f" and {len(names) - _MANY} more" if len(names) > _MANY else "")


def _check_device(desired: Desired, index: int, device: sysfs.PciDevice) -> None:
    entry = desired.devices[index]
    key = entry.selector[0]
    if device.is_bridge:
        raise desired.error(index, key, f"{device.address} is a bridge, and bridges stay with the host")
    if device.group is None and "vfio" in entry.driver:
        raise desired.error(index, key, f"{device.address} is in no IOMMU group, so that VFIO cannot have it")


def _access(desired: Desired, index: int) -> plan.Access:
    entry = desired.devices[index]
    if entry.owner is None:
        return plan.Access(mode=entry.mode)
    try:
        to = owner.parse(entry.owner)
    except errors.NoSuchUser as error:
        raise desired.error(index, "owner", error.why) from None
    return plan.Access(to.uid, to.gid, entry.mode)


def _merged(one: plan.Access, other: plan.Access) -> plan.Access | str:
    """What both want, or the key in which they differ."""
    for name, old, new in zip(plan.Access._fields, one, other, strict=True):
        if old is not None and new is not None and old != new:
            return "mode" if name == "mode" else "owner"
    return plan.Access(*(old if new is None else new for old, new in zip(one, other, strict=True)))
