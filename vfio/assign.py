"""Assign devices to userspace, and give them back exactly as they were.

    bind      takes devices from their drivers to vfio-pci, and gives their groups to a user
    unbind    releases devices from vfio-pci; they are then on no driver
    restore   puts everything back as it was before the first bind or unbind

Each holds the lock of the journal, writes there how things are before it changes anything, and puts back what it
changed if it fails half way.  Bridges stay with the host.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace

from vfio import address as addresses
from vfio import changes as change
from vfio import errors, holders, journal, owner, persist, plan, sysfs
from vfio.backend import Backend, default, missing

_POLL_SECONDS = 0.1


def bind(
    wanted: Iterable[str],
    *,
    whole_group: bool = False,
    user: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    backend: Backend | None = None,
) -> plan.Plan:
    """Take devices to vfio-pci; those that are on a VFIO driver already stay there.

    `whole_group` takes all devices of their groups.  `user` (``USER[:GROUP]``, names or numbers) becomes the owner of
    the groups' ``/dev/vfio/N``, whose mode stays.  A device that the host has in use (a disk mounted or under swap,
    dm, md; a network interface up) is refused unless `force`.

    Raises `errors.NoSuchDevice`, `errors.NoGroup`, `errors.Refused`, `errors.ModuleMissing`, `errors.NotPrivileged`,
    `errors.KernelTooOld` and others; nothing is changed then.
    """
    backend = backend or default()
    to = owner.parse(user) if user is not None else None
    wanted = _unique(wanted)
    planned = plan.bind(backend, wanted, whole_group, to, force)
    if dry_run:
        return planned
    with journal.locked(backend) as book:
        planned = plan.bind(backend, wanted, whole_group, to, force)
        carry_out(backend, book, planned)
    return planned


def unbind(
    wanted: Iterable[str], *, wait: float = 0.0, dry_run: bool = False, backend: Backend | None = None
) -> plan.Plan:
    """Release devices from VFIO and clear their override: they are on no driver then, until `restore` or a probe.

    The kernel would block while a process has the device open: raises `errors.Busy` with its pid when that lasts
    longer than `wait` seconds, and `errors.Refused` for a device that is on another driver.
    """
    backend = backend or default()
    wanted = _unique(wanted)
    planned = plan.unbind(backend, wanted)
    if dry_run:
        return planned
    groups = [each.device.group for each in planned.moves if each.device.on_vfio]
    with nobody_has(backend, groups, wait), journal.locked(backend) as book:
        planned = plan.unbind(backend, wanted)
        carry_out(backend, book, planned)
    return planned


def restore(
    wanted: Iterable[str] | None = None, *, wait: float = 0.0, dry_run: bool = False, backend: Backend | None = None
) -> plan.Plan:
    """Put devices (None: all that the journal knows) back as they were: driver, override, owner and mode.

    A device that cannot be put back does not keep the others from it: raises `errors.NotRestored` at the end, and the
    journal keeps what is left.  A device that has been unplugged is a note.  Restoring twice is harmless.
    """
    backend = backend or default()
    chosen = None if wanted is None else _unique(wanted)
    book = journal.load(backend)
    for address in chosen or ():
        if address not in book.devices:
            sysfs.device(backend, address)  # a typing error, rather than nothing to do
    planned = plan.restore(backend, book, chosen)
    plan.note_stale(planned, book)
    if dry_run or not (book.devices or book.nodes or book.stale):
        return planned
    failures: list[tuple[str, OSError]] = []
    held: dict[int | None, OSError] = {}
    with contextlib.ExitStack() as stack:
        for group in dict.fromkeys(move.device.group for move in planned.moves if move.device.on_vfio):
            try:
                stack.enter_context(nobody_has(backend, [group], wait))
            except OSError as error:
                held[group] = error
        known, book = book, stack.enter_context(journal.locked(backend))
        for state in reversed(list(book.devices.values())):
            # What was bound since we looked is not held open against others by us: it stays.
            if state.address in known.devices and (chosen is None or state.address in chosen):
                try:
                    if state.group in held:
                        raise held[state.group]
                    if state.new_id is not None:
                        change.forget_id(backend, state.new_id)
                    _return(backend, state)
                except OSError as error:
                    failures.append((state.address, error))
        _prune(backend, book, list(book.devices), ())
        failures += _return_nodes(backend, plan.nodes_to_return(book, plan.groups_of(backend, known, chosen)))
        _prune(backend, book, (), list(book.nodes))
        book.save()
    if failures:
        raise errors.NotRestored(failures)
    return planned


@contextlib.contextmanager
def bound(
    wanted: Iterable[str], *, whole_group: bool = True, force: bool = False, backend: Backend | None = None
) -> Iterator[plan.Plan]:
    """Devices on vfio-pci for as long as the context lasts; what was bound before stays bound afterwards."""
    backend = backend or default()
    changes = bind(wanted, whole_group=whole_group, force=force, backend=backend)
    try:
        yield changes
    finally:
        undo(changes, backend=backend)


def undo(changes: plan.Plan, *, wait: float = 0.0, backend: Backend | None = None) -> None:
    """Put back what one `bind` or `unbind` changed, and no more.  Raises `errors.NotRestored`."""
    backend = backend or default()
    with journal.locked(backend) as book:
        failures = _put_back(backend, changes.moves, changes.nodes, wait)
        _forget(backend, book, changes)
        book.save()
    if failures:
        raise errors.NotRestored(failures)


def _unique(wanted: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(map(addresses.parse, wanted)))


# --- Carrying out -------------------------------------------------------------------------------------------------


def carry_out(backend: Backend, book: journal.Journal, planned: plan.Plan, held: Collection[int | None] = ()) -> None:
    """Make the changes; if one fails, put back those made before it, and note in the plan what was.

    `held` are groups that the caller has open (`nobody_has`).  Raises what failed, or `errors.NotPutBack`.
    """
    plan.note_stale(planned, book)
    for move in planned.moves:
        book.devices.setdefault(move.device.address, move.before)
    for node in planned.nodes:
        book.nodes.setdefault(node.group, node)
    book.save()
    moved: list[plan.Move] = []
    try:
        for file in planned.files:
            file.make()
        for move in planned.moves:
            moved.append(move)
            _make(backend, move.steps)
            address = move.device.address
            book.devices[address] = replace(book.devices[address], new_id=None)  # withdrawn by now
        for gift in planned.gifts:
            _make(backend, gift.anew(plan.node_state(backend, gift.after.group)).steps)
    except BaseException as error:
        changed = _changed(backend, planned)
        failures = _put_back(backend, moved, planned.nodes, held=held) + _take_back(planned.files)
        failed = {name for name, _ in failures}
        planned.put_back = [name for name in changed if name not in failed]
        if failures and isinstance(error, OSError):
            raise errors.NotPutBack(error, failures) from error
        raise
    else:
        for move in planned.moves:
            if move.probe:  # it is the host's now, and there is nothing to go back to
                del book.devices[move.device.address]
    finally:
        _forget(backend, book, planned)
        book.save()


def _changed(backend: Backend, planned: plan.Plan) -> list[str]:
    """The devices, nodes and files of a plan that are not as they were before it."""
    found: list[str] = []
    with contextlib.suppress(OSError):  # it is for a message
        found += [file.path for file in planned.files if file.made]
        found += [move.device.address for move in planned.moves if not _is_back(backend, move.before)]
        for node in planned.nodes:
            if plan.node_state(backend, node.group) not in (None, node):
                found.append(node.path)
    return found


def _take_back(files: Sequence[persist.FileChange]) -> list[tuple[str, OSError]]:
    """Give files their former content.  Returns what could not be done, and why."""
    failures: list[tuple[str, OSError]] = []
    for file in reversed(files):
        try:
            if file.made:
                file.undo()
        except OSError as error:
            failures.append((file.path, error))
    return failures


def _make(backend: Backend, steps: Iterable[change.Change]) -> None:
    for step in steps:
        step.make(backend)


def _put_back(
    backend: Backend,
    moved: Sequence[plan.Move],
    nodes: Sequence[journal.NodeState],
    wait: float = 0.0,
    held: Collection[int | None] = (),
) -> list[tuple[str, OSError]]:
    """Take back these moves, the last one first, then the nodes.  Returns what could not be done, and why.

    Nobody else has the groups in `held`.
    """
    failures: list[tuple[str, OSError]] = []
    for move in reversed(moved):
        try:
            now = sysfs.device(backend, move.device.address)
            leaves = now.on_vfio and now.driver != move.device.driver and now.group not in held
            groups = [now.group] if leaves else []
            with nobody_has(backend, groups, wait):
                _return(backend, move.before)
        except OSError as error:
            failures.append((move.device.address, error))
    return failures + _return_nodes(backend, nodes)


def _return(backend: Backend, state: journal.DeviceState) -> None:
    """Bring a device back to a state; nothing where it is in that state, or gone."""
    try:
        device = sysfs.device(backend, state.address)
    except errors.NoSuchDevice:
        return
    _make(backend, change.moves(device, state.driver, state.override))


def _return_nodes(backend: Backend, nodes: Iterable[journal.NodeState]) -> list[tuple[str, OSError]]:
    """Bring nodes back to their owner and mode; those that do not exist need nothing."""
    failures: list[tuple[str, OSError]] = []
    for node in nodes:
        try:
            now = plan.node_state(backend, node.group)
            if now is not None:
                _make(backend, plan.Gift(now, plan.Access.like(node)).steps)
        except OSError as error:
            failures.append((node.path, error))
    return failures


def _forget(backend: Backend, book: journal.Journal, changes: plan.Plan) -> None:
    _prune(backend, book, [move.device.address for move in changes.moves], [node.group for node in changes.nodes])


def _prune(backend: Backend, book: journal.Journal, devices: Iterable[str], groups: Iterable[int]) -> None:
    """Drop from the journal what is as it was before."""
    for address in devices:
        state = book.devices.get(address)
        if state is not None and _is_back(backend, state):
            del book.devices[address]
    in_use = {state.group for state in book.devices.values()}
    for group in groups:
        if group not in in_use and group in book.nodes and plan.node_state(backend, group) in (None, book.nodes[group]):
            del book.nodes[group]


def _is_back(backend: Backend, state: journal.DeviceState) -> bool:
    if not backend.exists(sysfs.path(state.address)):
        return True
    driver, override = sysfs.driver_of(backend, state.address), sysfs.override_of(backend, state.address)
    return (driver, override) == (state.driver, state.override)


@contextlib.contextmanager
def nobody_has(backend: Backend, groups: Iterable[int | None], wait: float) -> Iterator[None]:
    """No process has these groups open, now or while the context lasts.

    A group can be opened once: so we open it ourselves.  That does not keep its devices from being unbound, as an
    open device would.
    """
    deadline = time.monotonic() + wait
    with contextlib.ExitStack() as stack:
        for group in dict.fromkeys(groups):
            if group is not None:
                fd = _open_when_free(backend, group, deadline)
                if fd is not None:
                    stack.callback(backend.close, fd)
        yield


def _open_when_free(backend: Backend, group: int, deadline: float) -> int | None:
    node = sysfs.node_of(backend, group)
    while True:
        try:
            return backend.open(node, os.O_RDWR)
        except OSError as error:
            if missing(error):
                return None  # on a VFIO driver without a group's node, or just going away
            if error.errno in (errno.EACCES, errno.EPERM):
                raise errors.NotPrivileged(f"release group {group}", str(owner.me(backend)), error.errno) from error
            if error.errno != errno.EBUSY:
                raise
        if time.monotonic() >= deadline:
            raise errors.Busy(
                f"group {group} is in use",
                holders.of(backend, node),
                "end that process, or wait for it: --wait SECONDS",
            )
        time.sleep(_POLL_SECONDS)
