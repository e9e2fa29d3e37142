"""What has to be changed to bind, unbind or restore devices, and what is refused.  Everything here only reads.

A plan says how things were and will be; `vfio.assign` carries it out, and a dry run shows it as shell commands.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from vfio import changes as change
from vfio import errors, journal, owner, persist, sysfs, usage
from vfio.backend import Backend, missing

NONE = "none"
"""As a driver: no driver at all."""
HOST = "host"
"""As a driver: the one that the device had before it was first taken from the host."""


class Target(NamedTuple):
    """Where a device is to be."""

    device: sysfs.PciDevice
    """As it is."""
    driver: str
    """The name of a driver, or `NONE` or `HOST`."""


class Access(NamedTuple):
    """Who may open a group; what is None stays as it is."""

    uid: int | None = None
    gid: int | None = None
    mode: int | None = None
    """Permission bits."""

    @classmethod
    def like(cls, node: journal.NodeState) -> Access:
        """All as it is with this node."""
        return cls(node.uid, node.gid, node.mode)

    def of(self, node: journal.NodeState) -> journal.NodeState:
        """The node with this access."""
        return replace(
            node,
            uid=node.uid if self.uid is None else self.uid,
            gid=node.gid if self.gid is None else self.gid,
            mode=node.mode if self.mode is None else self.mode,
        )


@dataclass(frozen=True)
class Move:
    """One device, from the driver that has it to another."""

    device: sysfs.PciDevice
    """As it was before."""
    driver: str | None
    override: str | None
    probe: bool = False
    """Whether the kernel then looks for a driver of its own choice; with `driver` None."""

    @property
    def steps(self) -> list[change.Change]:
        """The changes, in order."""
        return change.moves(self.device, self.driver, self.override, self.probe)

    @property
    def before(self) -> journal.DeviceState:
        """How the device was, for the journal."""
        device = self.device
        adds_id = not device.overridable and self.driver == change.VFIO_PCI
        return journal.DeviceState(
            device.address,
            device.group,
            device.driver,
            device.driver_override,
            change.new_id(device) if adds_id else None,
        )


@dataclass(frozen=True)
class Gift:
    """The node of one group, from its owner to another."""

    before: journal.NodeState
    wanted: Access

    @property
    def after(self) -> journal.NodeState:
        """How the node is to be."""
        return self.wanted.of(self.before)

    def anew(self, now: journal.NodeState | None) -> Gift:
        """The same for a node that turned out to be like this: it may have come anew, or not, and udev may have had it."""
        return self if now is None else Gift(now, self.wanted)

    @property
    def steps(self) -> list[change.Change]:
        """The changes, in order."""
        before, after, node = self.before, self.after, self.after.path
        steps: list[change.Change] = []
        if (before.uid, before.gid) != (after.uid, after.gid):
            steps.append(change.Chown(node, after.uid, after.gid))
        if before.mode != after.mode:
            steps.append(change.Chmod(node, after.mode))
        return steps


@dataclass
class Plan:
    """What is to be changed; once it was carried out, what was changed."""

    moves: list[Move] = field(default_factory=list)
    gifts: list[Gift] = field(default_factory=list)
    nodes: list[journal.NodeState] = field(default_factory=list)
    """How the nodes of all these groups were before; a node comes and goes with the group's first and last device."""
    notes: list[str] = field(default_factory=list)
    """What else the caller should know, as sentences."""
    files: list[persist.FileChange] = field(default_factory=list)
    """What makes it survive a reboot; written before anything moves, so that udev goes by it from then on."""
    put_back: list[str] = field(default_factory=list)
    """Addresses, nodes and files that were changed, and put back when a later change failed."""

    def shell(self) -> list[str]:
        """The equivalent shell commands."""
        steps = [move.steps for move in self.moves] + [gift.steps for gift in self.gifts]
        return [file.shell() for file in self.files] + [step.shell() for each in steps for step in each]


def bind(backend: Backend, wanted: Sequence[str], whole_group: bool, to: owner.Owner | None, force: bool) -> Plan:
    """Devices to vfio-pci, and their groups to a user; see `vfio.assign.bind`."""
    chosen = {address: sysfs.device(backend, address) for address in wanted}
    groups: list[int] = []
    for device in chosen.values():
        if device.is_bridge:
            raise errors.IsBridge(device.address)
        if device.group is None:
            raise errors.NoGroup(device.address)
        if device.group not in groups:
            groups.append(device.group)
    if whole_group:
        for group in groups:
            members = sysfs.group_devices(backend, group)
            chosen |= {each.address: each for each in members if not each.is_bridge and each.address not in chosen}
    access = {} if to is None else dict.fromkeys(groups, Access(to.uid, to.gid))
    return assign(backend, {}, [Target(device, change.VFIO_PCI) for device in chosen.values()], access, force)


def assign(
    backend: Backend,
    before: Mapping[str, journal.DeviceState],
    targets: Iterable[Target],
    access: Mapping[int, Access],
    force: bool,
    command: str = "bind",
) -> Plan:
    """Each device to its driver, and groups to who is to have them; `before` is what the journal knows of devices.

    A device on a variant driver of vfio-pci that is to be on vfio-pci stays.  Raises `errors.ModuleMissing` and
    `errors.Refused`, for a device that the host has in use unless `force`; `command` is what a user would repeat then.
    """
    targets = list(targets)
    moves = [move for target in targets if (move := _move(before, target)) is not None]
    for move in moves:
        if move.driver is not None and not sysfs.driver_loaded(backend, move.driver):
            raise errors.ModuleMissing(f"cannot bind {move.device.address}", move.driver)
    moving = [move.device for move in moves]
    if not force:
        _refuse_what_is_in_use(backend, moving, command)
    _refuse_to_catch_others(backend, [move.device for move in moves if move.driver == change.VFIO_PCI])
    # Those that come to VFIO first: then the node of a group that also loses a device stays.
    planned = Plan(sorted(moves, key=lambda move: move.driver != change.VFIO_PCI))
    for group, wanted in access.items():
        states = [node_state(backend, group) or journal.NodeState(group)]
        if _goes(backend, group, planned.moves):
            states.append(journal.NodeState(group))  # it may come anew, on another VFIO driver
        differs = next((state for state in states if wanted.of(state) != state), None)
        if differs is not None:
            planned.gifts.append(Gift(differs, wanted))
    _add_nodes(backend, planned)
    _note_blockers(backend, planned, [target.device for target in targets if target.driver == change.VFIO_PCI], moving)
    return planned


def _move(before: Mapping[str, journal.DeviceState], target: Target) -> Move | None:
    """What brings a device to its driver; None where it is there."""
    device, driver = target
    state = before.get(device.address)
    if driver == HOST and state is not None:
        move = Move(device, state.driver, state.override)
        return move if move.steps else None
    if driver == HOST:
        return Move(device, None, None, probe=True) if device.on_vfio else None
    if driver == NONE:
        return None if device.driver is None else _release(device)
    if device.driver == driver or (device.on_vfio and driver == change.VFIO_PCI):
        return None
    return Move(device, driver, driver)


def _release(device: sysfs.PciDevice) -> Move:
    """To no driver; an override that would bring it back goes, another stays."""
    override = device.driver_override
    return Move(device, None, None if override in (change.VFIO_PCI, device.driver) else override)


def _note_blockers(
    backend: Backend, planned: Plan, chosen: Iterable[sysfs.PciDevice], moving: Collection[sysfs.PciDevice]
) -> None:
    """Tell which groups will not be viable yet."""
    for group in dict.fromkeys(device.group for device in chosen):
        if group is None:
            continue
        blockers = [each for each in sysfs.blockers(backend, group) if each.address not in {d.address for d in moving}]
        if blockers:
            error = errors.GroupNotViable(group, blockers)
            planned.notes.append(f"{error.what} yet: {error.why}; {error.remedy}")


def _add_nodes(backend: Backend, planned: Plan) -> None:
    groups = [each.device.group for each in planned.moves] + [each.before.group for each in planned.gifts]
    for group in dict.fromkeys(groups):
        if group is not None:
            planned.nodes.append(node_state(backend, group) or journal.NodeState(group))


def _refuse_what_is_in_use(backend: Backend, moving: Sequence[sysfs.PciDevice], command: str) -> None:
    uses = usage.of_devices(backend) if any(device.driver for device in moving) else {}
    refused = {device.address: uses[device.address] for device in moving if device.address in uses}
    if refused:
        raise errors.Refused(
            f"cannot bind {', '.join(refused)}: the host has it in use",
            "; ".join(f"{address}: {', '.join(phrases)}" for address, phrases in refused.items()),
            f"put it out of use first (umount, swapoff, ip link set ... down), or insist: vfio {command} --force",
        )


def _refuse_to_catch_others(backend: Backend, moving: Sequence[sysfs.PciDevice]) -> None:
    """An id given to vfio-pci brings every driverless device that it fits."""
    ids = {change.new_id(device): device.address for device in moving if not device.overridable}
    if not ids:
        return
    named = {device.address for device in moving}
    for other in sysfs.devices(backend):
        id = change.new_id(other)
        if id in ids and other.driver is None and other.address not in named:
            raise errors.Refused(
                f"cannot bind {ids[id]}",
                f"it has no driver_override, and its id ({id}) would bring {other.address} along, which is on no driver",
                f"bind that one too: vfio bind {ids[id]} {other.address}",
            )


def unbind(backend: Backend, wanted: Sequence[str]) -> Plan:
    """Devices from VFIO to no driver; see `vfio.assign.unbind`."""
    planned = Plan()
    for address in wanted:
        device = sysfs.device(backend, address)
        if device.driver is not None and not device.on_vfio:
            raise errors.Refused(
                f"cannot unbind {address}",
                f"it is on {device.driver}, which is not a VFIO driver",
                "vfio unbind releases devices from VFIO only",
                errno.EINVAL,
            )
        move = _release(device)
        if move.steps:
            planned.moves.append(move)
    _add_nodes(backend, planned)
    return planned


def restore(backend: Backend, book: journal.Journal, chosen: Sequence[str] | None) -> Plan:
    """Devices (None: all in the journal) to where they were; see `vfio.assign.restore`."""
    planned = Plan()
    for state in reversed(book.devices.values()):
        if chosen is not None and state.address not in chosen:
            continue
        try:
            move = Move(sysfs.device(backend, state.address), state.driver, state.override)
        except errors.NoSuchDevice:
            planned.notes.append(f"{state.address} is not there any more: there is nothing to restore")
            continue
        if move.steps:
            planned.moves.append(move)
    leaving = book.devices if chosen is None else chosen
    for node in nodes_to_return(book, groups_of(backend, book, chosen), leaving):
        now = node_state(backend, node.group)
        if now is not None and now != node and not _goes(backend, node.group, planned.moves):
            planned.gifts.append(Gift(now, Access.like(node)))
    return planned


def groups_of(backend: Backend, book: journal.Journal, chosen: Sequence[str] | None) -> set[int | None] | None:
    """The groups of these devices, unplugged ones too; None stays None, for all."""
    if chosen is None:
        return None
    return {book.devices[a].group if a in book.devices else sysfs.group_of(backend, a) for a in chosen}


def nodes_to_return(
    book: journal.Journal, groups: Collection[int | None] | None, leaving: Collection[str] = ()
) -> list[journal.NodeState]:
    """The nodes of these groups (None: all) that go back: no device of the group is left to be restored."""
    staying = {state.group for address, state in book.devices.items() if address not in leaving}
    return [
        node for node in book.nodes.values() if node.group not in staying and (groups is None or node.group in groups)
    ]


def _goes(backend: Backend, group: int, moves: Iterable[Move]) -> bool:
    """Whether the group's node goes away with these moves."""
    left = {each.address for each in sysfs.group_devices(backend, group) if each.on_vfio}
    return not left - {move.device.address for move in moves}


def node_state(backend: Backend, group: int) -> journal.NodeState | None:
    """Owner and mode of the group's node; None where it does not exist."""
    try:
        unprotected = sysfs.unprotected(backend, group)
        status = backend.stat(sysfs.node(group, unprotected))
    except OSError as error:
        if missing(error):
            return None
        raise
    return journal.NodeState(group, status.uid, status.gid, status.mode & 0o7777, unprotected)


def note_stale(planned: Plan, book: journal.Journal) -> None:
    """Tell that the journal of an earlier boot was ignored, if it was."""
    if book.stale:
        planned.notes.append(
            f"the journal {book.path} was ignored: it is from an earlier boot, and what it says about {book.stale} "
            "device(s) is void"
        )
