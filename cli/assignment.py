"""vfio bind, unbind, restore."""

from __future__ import annotations

from typing import Any

import click

from vfio import assign, owner
from vfio.plan import Plan

from . import output
from .options import Options, common, pci_address

_wait = click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="SECONDS",
    help="Wait that long for a process that has the group open (default: do not).",
)
_dry_run = click.option("--dry-run", is_flag=True, help="Print the equivalent shell commands and change nothing.")


@click.command()
@click.argument("addresses", metavar="ADDRESS...", type=pci_address, nargs=-1, required=True)
@click.option("--group", "whole_group", is_flag=True, help="Bind all devices of the groups; bridges are left alone.")
@click.option("--user", metavar="USER[:GROUP]", help="Give /dev/vfio/N to this user: a name or a number.")
@click.option("--force", is_flag=True, help="Take devices even if the host has them in use (mounted, swap, up).")
@_dry_run
@common
def bind(
    options: Options, addresses: tuple[str, ...], whole_group: bool, user: str | None, force: bool, dry_run: bool
) -> None:
    """Take devices from their drivers to vfio-pci.

    How everything was before is kept in a journal, from which `vfio restore` puts it back. If anything fails, nothing
    stays changed.

    \b
    Example:
      vfio bind 0001:01:00.0 --group --user alice
    """
    changed = assign.bind(
        addresses, whole_group=whole_group, user=user, force=force, dry_run=dry_run, backend=options.backend
    )
    _report(options, changed, dry_run)


@click.command()
@click.argument("addresses", metavar="ADDRESS...", type=pci_address, nargs=-1, required=True)
@_wait
@_dry_run
@common
def unbind(options: Options, addresses: tuple[str, ...], wait: float, dry_run: bool) -> None:
    """Release devices from VFIO.

    They are on no driver afterwards, and free to be bound to any; `vfio restore` puts them back on the driver that they
    had before. A device that a process has open is refused, and the process named, unless it ends in time.

    \b
    Example:
      vfio unbind 0001:01:00.0 --wait 10
    """
    changed = assign.unbind(addresses, wait=wait, dry_run=dry_run, backend=options.backend)
    _report(options, changed, dry_run)


@click.command()
@click.argument("addresses", metavar="[ADDRESS...]", type=pci_address, nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Restore all that the journal knows.")
@_wait
@_dry_run
@common
def restore(options: Options, addresses: tuple[str, ...], everything: bool, wait: float, dry_run: bool) -> None:
    """Put devices back as they were before the first bind or unbind: driver, override, owner and mode.

    \b
    Examples:
      vfio restore 0001:01:00.0
      vfio restore --all
    """
    if everything == bool(addresses):
        raise click.UsageError("name the devices to restore, or say --all")
    changed = assign.restore(None if everything else addresses, wait=wait, dry_run=dry_run, backend=options.backend)
    _report(options, changed, dry_run)


COMMANDS = (bind, unbind, restore)


def _report(options: Options, changed: Plan, dry_run: bool) -> None:
    if options.json:
        output.as_json({"dry_run": dry_run, **_as_json(changed)})
        return
    for text in changed.notes:
        output.note(text)
    if dry_run:
        click.echo("\n".join(changed.shell()) or "# nothing to change")
        return
    for move in changed.moves:
        device = move.device
        click.echo(f"{device.address}: {device.driver or 'no driver'} -> {move.driver or 'no driver'}")
    for gift in changed.gifts:
        belongs_to = owner.named(gift.after.uid, gift.after.gid)
        click.echo(f"{gift.after.path}: belongs to {belongs_to}, mode {gift.after.mode:04o}")
    if not changed.moves and not changed.gifts:
        click.echo("nothing to change")


def _as_json(changed: Plan) -> dict[str, Any]:
    return {
        "devices": [
            {
                "address": move.device.address,
                "group": move.device.group,
                "from": move.device.driver,
                "to": move.driver,
            }
            for move in changed.moves
        ],
        "nodes": [
            {
                "path": gift.after.path,
                "uid": gift.after.uid,
                "gid": gift.after.gid,
                "mode": f"{gift.after.mode:04o}",
            }
            for gift in changed.gifts
        ],
        "commands": changed.shell(),
        "notes": changed.notes,
    }
