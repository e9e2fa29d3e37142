"""Make a host what a plan says: compare, show the difference, change what differs, all or nothing.

    desired = vfio.desired.load("plan.toml")
    comparison = vfio.apply.compare(desired)      # looks, and changes nothing
    print("\\n".join(comparison.diff()))
    done = vfio.apply.apply(desired)              # the same comparison, carried out
    assert not vfio.apply.apply(desired).changed  # and there is nothing left to do

Changes go through the journal of `vfio.assign`: `assign.restore` puts back what the devices and nodes were before.
"""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vfio import assign, changes, desired, errors, journal, owner, persist, plan, sysfs
from vfio.backend import Backend, default

_NOT_THERE = "/dev/null"


class Record(NamedTuple):
    """One thing that differs: how it is, and how it is to be."""

    kind: str
    """``device``, ``node`` or ``file``."""
    name: str
    """The address of the device, or the path."""
    before: Mapping[str, str] | None
    """Of a device ``driver`` and ``driver_override`` (``none``; ``host``: whichever driver the kernel finds), of a node
    ``owner`` and ``mode``, of a file ``text``; None: it does not exist."""
    after: Mapping[str, str] | None

    @property
    def before_text(self) -> str:
        """The same as lines."""
        return _lines(self.before)

    @property
    def after_text(self) -> str:
        """The same as lines."""
        return _lines(self.after)

    def diff(self) -> list[str]:
        """The difference as lines in unified format."""
        return list(
            difflib.unified_diff(
                self.before_text.splitlines(),
                self.after_text.splitlines(),
                _NOT_THERE if self.before is None else self.name,
                _NOT_THERE if self.after is None else self.name,
                lineterm="",
            )
        )


@dataclass
class Comparison:
    """What a host has to become to be what a plan says; after `apply`, what it became."""

    plan: plan.Plan = field(default_factory=plan.Plan)
    """The changes themselves."""
    done: bool = False
    """Whether they were made."""

    @property
    def changed(self) -> bool:
        """Whether there is (or was) anything to change."""
        return bool(self.plan.moves or self.plan.gifts or self.plan.files)

    @property
    def notes(self) -> list[str]:
        """What else the caller should know, as sentences."""
        return self.plan.notes

    def records(self) -> list[Record]:
        """What differs, in the order in which it is changed."""
        return [
            *(Record("file", each.path, _file(each.before), _file(each.after)) for each in self.plan.files),
            *(_moved(each) for each in self.plan.moves),
            *(
                Record("node", sysfs.node(each.after.group), _node(each.before), _node(each.after))
                for each in self.plan.gifts
            ),
        ]

    def diff(self) -> list[str]:
        """All differences as lines in unified format; none when nothing differs."""
        return [line for record in self.records() for line in record.diff()]

    def shell(self) -> list[str]:
        """The equivalent shell commands."""
        return self.plan.shell()

    def as_dict(self) -> dict[str, Any]:
        """All of this for JSON: ``changed``, ``done``, ``diff`` (a list of records), ``commands``, ``notes``."""
        return {
            "changed": self.changed,
            "done": self.done,
            "diff": [record._asdict() for record in self.records()],
            "commands": self.shell(),
            "notes": self.notes,
        }


def compare(
    wanted: desired.Desired,
    backend: Backend | None = None,
    *,
    force: bool = False,
    persist_dir: str | os.PathLike[str] | None = None,
) -> Comparison:
    """What differs between a plan and the host, without changing anything.  Needs no privilege.

    `persist_dir` is the directory of the files that make it survive a reboot (else VFIO_CONFIG_DIR, else /etc of the
    host itself).  Raises `errors.BadPlan`; and `errors.Refused`, `errors.ModuleMissing`, where `apply` would be refused.
    """
    backend = backend or default()
    book = journal.load(backend)
    return _compare(wanted, backend, book, force, persist.directory(backend, persist_dir))


def apply(
    wanted: desired.Desired,
    backend: Backend | None = None,
    *,
    check: bool = False,
    force: bool = False,
    wait: float = 0.0,
    persist_dir: str | os.PathLike[str] | None = None,
) -> Comparison:
    """Make the host what the plan says; with `check` only compare.

    A device that the host has in use (a disk mounted or under swap, dm, md; a network interface up) is refused unless
    `force`.  One that a process has open through VFIO is waited for, `wait` seconds at most, if it has to leave VFIO.

    Raises what `compare` raises, and `errors.Busy` for such a process; nothing is changed then.  When a change fails,
    those before it are put back: `errors.RolledBack`, or `errors.NotPutBack` where that failed too.
    """
    backend = backend or default()
    where = persist.directory(backend, persist_dir)
    comparison = compare(wanted, backend, force=force, persist_dir=where)
    if check or not comparison.changed:
        return comparison
    groups = [move.device.group for move in comparison.plan.moves if move.device.on_vfio]
    with assign.nobody_has(backend, groups, wait), journal.locked(backend) as book:
        return _carried_out(backend, book, _compare(wanted, backend, book, force, where), groups)


def forget(
    backend: Backend | None = None, *, check: bool = False, persist_dir: str | os.PathLike[str] | None = None
) -> Comparison:
    """Remove all that makes assignments survive a reboot; devices stay as they are.  Raises as `apply` does."""
    backend = backend or default()
    where = _needed(backend, persist.directory(backend, persist_dir))
    if check:
        return Comparison(plan.Plan(files=persist.changes(where, persist.Persistent())))
    with journal.locked(backend) as book:
        return _carried_out(
            backend, book, Comparison(plan.Plan(files=persist.changes(where, persist.Persistent()))), ()
        )


def _carried_out(
    backend: Backend, book: journal.Journal, comparison: Comparison, held: Collection[int | None]
) -> Comparison:
    try:
        assign.carry_out(backend, book, comparison.plan, held)
    except errors.NotPutBack:
        raise
    except OSError as error:
        raise errors.RolledBack(error, comparison.plan.put_back) from error
    comparison.done = comparison.changed
    return comparison


def _compare(
    wanted: desired.Desired, backend: Backend, book: journal.Journal, force: bool, where: Path | None
) -> Comparison:
    resolved = desired.resolve(wanted, backend)
    planned = plan.assign(backend, book.devices, resolved.targets.values(), resolved.access, force, "apply")
    planned.notes[:0] = resolved.notes
    persistent = persist.load(where)
    after = _persistent(backend, book, persistent, resolved)
    if after != persistent:
        planned.files = persist.changes(_needed(backend, where), after)
    return Comparison(planned)


def _needed(backend: Backend, where: Path | None) -> Path:
    if where is None:
        raise errors.Refused(
            "cannot make anything survive a reboot",
            f"the backend {backend.unwrapped().url} is not the kernel of this host, so that /etc is not its own",
            f"name a directory to stand for it: --config-dir DIR, or the environment variable {persist.DIRECTORY}",
            errno.EOPNOTSUPP,
        )
    return where


# --- What survives a reboot ----------------------------------------------------------------------------------------


def _persistent(
    backend: Backend, book: journal.Journal, now: persist.Persistent, resolved: desired.Resolved
) -> persist.Persistent:
    """What the files are to say."""
    after = persist.Persistent(dict(now.rules), dict(now.ids))
    for address, target in resolved.targets.items():
        if address not in resolved.persistent:
            continue
        if resolved.persistent[address] and target.driver != plan.HOST:
            after.rules[address] = _rule(backend, target, resolved.own_access.get(address, plan.Access()))
        else:
            after.rules.pop(address, None)
            after.ids.pop(target.device.id, None)
    for id, found in resolved.ids.items():
        modules = {*now.ids.get(id, ())}
        for address in found:
            state, device = book.devices.get(address), resolved.targets[address].device
            driver = state.driver if state is not None else None if device.on_vfio else device.driver
            if driver is not None and (module := sysfs.module_of(backend, driver)) is not None:
                modules.add(module)
        after.ids[id] = tuple(sorted(modules))
    return after


def _rule(backend: Backend, target: plan.Target, node: plan.Access) -> persist.Rule:
    device, driver = target
    module: str | None = None
    if driver == changes.VFIO_PCI:
        module = driver
    elif driver != plan.NONE:
        module = sysfs.module_of(backend, driver) or driver
    user = None if node.uid is None else owner.user_name(node.uid)
    group = None if node.gid is None else owner.group_name(node.gid)
    return persist.Rule(
        device.address,
        driver,
        module,
        user if user is None or persist.usable(user) else str(node.uid),
        group if group is None or persist.usable(group) else str(node.gid),
        node.mode,
    )


# --- As text ---------------------------------------------------------------------------------------------------------


def _moved(move: plan.Move) -> Record:
    before = {"driver": move.device.driver or plan.NONE, "driver_override": move.device.driver_override or plan.NONE}
    driver = plan.HOST if move.probe else move.driver or plan.NONE
    override = move.override if move.device.overridable else None
    return Record("device", move.device.address, before, {"driver": driver, "driver_override": override or plan.NONE})


def _node(state: journal.NodeState) -> dict[str, str]:
    return {"owner": owner.named(state.uid, state.gid), "mode": f"{state.mode:04o}"}


def _file(text: str | None) -> dict[str, str] | None:
    return None if text is None else {"text": text}


def _lines(content: Mapping[str, str] | None) -> str:
    if content is None:
        return ""
    return content.get("text") or "".join(f"{key}: {value}\n" for key, value in content.items())
