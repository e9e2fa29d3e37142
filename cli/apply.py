"""vfio apply, export: assignment by a plan."""

from __future__ import annotations

import sys
from dataclasses import replace

import click

from vfio import apply as applying
from vfio import desired
from vfio import export as exporting

from . import output
from .options import Options, common

_COLORS = {"+": "green", "-": "red", "@": "cyan"}

_config_dir = click.option(
    "--config-dir",
    metavar="DIR",
    help="Where udev/rules.d and modprobe.d are (default: /etc of the host itself; the environment variable "
    "VFIO_CONFIG_DIR names another).",
)


@click.command("apply")
@click.argument("plan", metavar="[PLAN.toml]", required=False)
@click.option("--check", is_flag=True, help="Show what differs, and change nothing.")
@click.option("--persist", is_flag=True, help="As if every device of the plan said persistent = true.")
@click.option("--forget", is_flag=True, help="Without a plan: remove all that makes assignments survive a reboot.")
@click.option("--force", is_flag=True, help="Take devices even if the host has them in use (mounted, swap, up).")
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="SECONDS",
    help="Wait that long for a process that has open what has to leave VFIO (default: do not).",
)
@_config_dir
@common
def apply(
    options: Options,
    plan: str | None,
    check: bool,
    persist: bool,
    forget: bool,
    force: bool,
    wait: float,
    config_dir: str | None,
) -> None:
    """Make this host what a plan says: drivers, owners and modes of devices. PLAN.toml may be - for standard input.

    Shows what differs, and changes it in order; if anything fails, nothing stays changed. The last line is "changed:
    true" or "changed: false": applied twice, a plan changes nothing the second time. The exit status is 0 either way, 2
    for a plan that breaks a rule, and 1 if a change failed.

    \b
    A plan:
      [[device]]
      address = "0001:01:00.0"   # or id = "1b36:0010", slot = "C5", class = "0108"
      driver = "vfio-pci"        # or another driver, "none", or "host": as it was
      whole_group = true
      owner = "alice:kvm"
      mode = 0o660
      persistent = true          # survives a reboot: rules of udev in /etc
      optional = true            # may be missing

    Only driver = "vfio-pci" and no flag are the defaults; owner and mode stay as they are unless they are given.

    \b
    Examples:
      vfio apply plan.toml --check
      vfio apply plan.toml
      vfio export | vfio apply --check -
      vfio apply --forget
    """
    if forget == (plan is not None):
        raise click.UsageError("name a plan (- is standard input), or say --forget")
    if plan is None:
        if persist:
            raise click.UsageError("--persist needs a plan")
        _report(options, applying.forget(options.backend, check=check, persist_dir=config_dir), check)
        return
    wanted = desired.parse(sys.stdin.read(), "<stdin>") if plan == "-" else desired.load(plan)
    if persist:
        wanted = replace(wanted, devices=tuple(replace(each, persistent=True) for each in wanted.devices))
    done = applying.apply(wanted, options.backend, check=check, force=force, wait=wait, persist_dir=config_dir)
    _report(options, done, check)


@click.command("export")
@click.option("--all", "everything", is_flag=True, help="All devices, not only those that were assigned.")
@_config_dir
@common
def export(options: Options, everything: bool, config_dir: str | None) -> None:
    """Print the plan that describes this host as it is: devices on VFIO, and others that were assigned.

    \b
    Example:
      vfio export > plan.toml
      vfio apply plan.toml
    """
    backend = options.backend
    wanted = exporting.export(backend, everything=everything, persist_dir=config_dir)
    if options.json:
        output.as_json({"device": [exporting.entry(each) for each in wanted.devices]})
        return
    click.echo(exporting.toml(wanted, backend), nl=False)


COMMANDS = (apply, export)


def _report(options: Options, done: applying.Comparison, check: bool) -> None:
    if options.json:
        output.as_json({"check": check, **done.as_dict()})
        return
    for text in done.notes:
        output.note(text)
    for line in done.diff():
        click.echo(click.style(line, fg=_COLORS.get(line[:1]), bold=line.startswith(("---", "+++")) or None))
    click.echo(f"changed: {'true' if done.changed else 'false'}{' (only checked)' if check and done.changed else ''}")
