"""vfio eeh: which PEs are frozen, and what brings them back.

`status` and `watch` open nothing: opening a device resets and thaws it.  `recover`, `reset` and `inject` open the group,
but no device of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntFlag
from typing import Any, get_args

import click

from vfio import errors, sysfs
from vfio.backend import Backend
from vfio.container import Container
from vfio.eeh import ErrorFunction, Log, PeStatus, ResetKind, State, host, recover_idle, status, statuses
from vfio.eeh.history import LIMIT, FreezeFile
from vfio.eeh.recovery import TIMEOUT
from vfio.eeh.state import Noted
from vfio.group import Group

from . import output
from .options import Options, common, pci_address

_ADDRESS = click.argument("address", type=pci_address)
_KIND = click.option(
    "--reset", "kind", type=click.Choice(get_args(ResetKind)), default="hot", help="The reset (default: hot)."
)


def _number(text: str) -> int:
    """The type of an address: decimal, or hexadecimal with 0x."""
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 64:
        raise click.BadParameter(f"{text!r} is no number of 64 bits")
    return value


_FUNCTIONS = {function.name.lower().replace("_", "-"): function for function in ErrorFunction}


@click.group("eeh")
@common
def eeh(options: Options) -> None:
    """See which PEs an I/O error has frozen, and bring them back (POWER).

    \b
    Examples:
      vfio eeh status
      vfio eeh watch
      vfio eeh recover 0001:01:00.0
    """


@eeh.command("status")
@click.argument("address", type=pci_address, required=False)
@click.option("--all", "everything", is_flag=True, help="All devices that have a PE (the default).")
@common
def show_status(options: Options, address: str | None, everything: bool) -> None:
    """Show the state of PEs, as sysfs has it: nothing is opened.

    A PE that is found frozen counts from then on as known to the host, which does not begin to recover it by itself any
    more; its owner, or vfio eeh recover, has to.

    \b
    Examples:
      vfio eeh status
      vfio eeh status 0001:01:00.0 --json
    """
    if everything and address:
        raise click.UsageError("name a device, or say --all")
    backend = options.backend
    found = [status(backend, address)] if address else statuses(backend)
    told = [_as_json(backend, each) for each in found]
    if options.json:
        output.as_json(told[0] if address else told)
    elif address:
        output.record(_record(told[0]))
    else:
        output.table(
            ["ADDRESS", "PE", "STATE", "DRIVER", "WHAT"],
            [[one["address"], one["name"], one["state"], one["driver"] or "-", one["words"]] for one in told],
        )
    if not options.json:
        for each, one in zip(found, told, strict=True):
            if one["remedy"]:
                output.note(f"{each.address} ({each.name}): {one['words']}\n  {one['remedy']}")


@eeh.command()
@_ADDRESS
@_KIND
@click.option("--limit", type=click.IntRange(min=0), default=LIMIT, help="Freezes allowed in an hour (default: 5).")
@click.option(
    "--timeout", type=click.FloatRange(min=0), default=TIMEOUT, metavar="SECONDS", help="Give up after (default: 60)."
)
@common
def recover(options: Options, address: str, kind: ResetKind, limit: int, timeout: float) -> None:
    """Bring back a frozen PE that no process has open: thaw, log, reset, configure, see that it answers.

    The log tells what froze it and what was done. A hot reset that does not help is followed by a fundamental one. The
    device has to be on vfio-pci. A device in use is recovered by its owner, in Python: vfio.eeh.recover(device, driver).

    \b
    Examples:
      vfio eeh recover 0001:01:00.0
      vfio eeh recover 0001:01:00.0 --reset fundamental --json
    """
    backend = options.backend
    with _container(backend, address, "recover") as container:
        try:
            log = recover_idle(
                container, address, reset=kind, limit=limit, timeout=timeout, freezes=FreezeFile(backend)
            )
        except errors.RecoveryFailed as error:
            _show_log(options, error.log)
            raise
    _show_log(options, log)


@eeh.command()
@_ADDRESS
@_KIND
@common
def reset(options: Options, address: str, kind: ResetKind) -> None:
    """Reset the PE of a device that no process has open, frozen or not: assert, hold, deassert, configure.

    \b
    Example:
      vfio eeh reset 0001:01:00.0 --reset fundamental
    """
    with _container(options.backend, address, "reset") as container:
        began, before = time.monotonic(), container.eeh.state
        container.eeh.reset(kind)
        container.eeh.configure()
        _tell(options, address, f"{kind} reset", before, container.eeh.state, time.monotonic() - began)


@eeh.command()
@_ADDRESS
@click.argument("function", type=click.Choice(list(_FUNCTIONS)), metavar="FUNCTION")
@click.option("--at", type=_number, default="0", metavar="BUS_ADDRESS", help="The address that it hits (default: 0).")
@click.option("--mask", type=_number, default="0", metavar="BITS", help="Which of its bits count (default: none).")
@click.option("--bits", type=click.Choice(["32", "64"]), default="32", help="Width of addresses (default: 32).")
@common
def inject(options: Options, address: str, function: str, at: int, mask: int, bits: str) -> None:
    """Let the next access of a kind fail, which freezes the PE: a test of what recovers it.

    FUNCTION is ld- (load) or st- (store) with mem-, io- or cfg-addr or -data, or dma-rd- or dma-wr- with addr, data,
    master or target. Which of them work depends on the PHB: POWER8 takes memory, configuration and DMA, POWER9
    configuration only.

    \b
    Example:
      vfio eeh inject 0001:01:00.0 ld-cfg-addr
    """
    with _container(options.backend, address, "inject an error into") as container:
        began, before = time.monotonic(), container.eeh.state
        container.eeh.inject(_FUNCTIONS[function], at, mask, bits=64 if bits == "64" else 32)
        _tell(options, address, f"injected {function}", before, container.eeh.state, time.monotonic() - began)


@eeh.command()
@click.argument("address", type=pci_address, required=False)
@click.option("--all", "everything", is_flag=True, help="The whole host (the default).")
@click.option(
    "--poll",
    type=click.FloatRange(min=0.01),
    default=host.POLL,
    metavar="SECONDS",
    help="How often to look (default: 1).",
)
@common
def watch(options: Options, address: str | None, everything: bool, poll: float) -> None:
    """Print what happens to PEs as it happens, from sysfs and the kernel's log, until Ctrl-C.

    Nothing is opened. The state is asked only of PEs that a process has open: the host leaves those to their owner, and
    its log says nothing of them. With --json an object a line.

    \b
    Examples:
      vfio eeh watch
      vfio eeh watch 0001:01:00.0 --json
    """
    if everything and address:
        raise click.UsageError("name a device, or say --all")
    with suppress(KeyboardInterrupt), host.HostWatch(options.backend, address, poll) as watched:
        for event in watched:
            if options.json:
                click.echo(json.dumps(event._asdict()))
            elif event.kind == "note":
                output.note(event.text)
            else:
                when = time.strftime("%H:%M:%S", time.localtime(event.date))
                click.echo(f"{when}  {event.address or '-':12}  {event.text}")


COMMANDS = (eeh,)


@contextmanager
def _container(backend: Backend, address: str, verb: str) -> Iterator[Container]:
    """A container with the device's group, and no device of it open: that would reset and thaw it."""
    what = f"cannot {verb} {address}"
    device = sysfs.device(backend, address)
    status(backend, address)  # raises where it has no PE
    if device.group is None:
        raise errors.NoGroup(address)
    if not device.on_vfio:
        raise errors.NotBound(address, device.driver)
    with Container(backend) as container:
        try:
            group = Group(device.group, backend)
        except errors.Busy as error:
            raise errors.Busy(what, error.holders, _OWNER) from error
        with group:
            container.attach(group)
            container.choose_iommu()
            yield container


_OWNER = (
    "recovery of a device in use belongs in the process that has it open:\n"
    "    log = vfio.eeh.recover(device, driver)\n"
    "  or end that process: closing the device resets and thaws it"
)


def _show_log(options: Options, log: Log) -> None:
    if options.json:
        output.as_json(log.as_dict())
    else:
        click.echo(log)


def _tell(options: Options, address: str, done: str, before: State, after: State, seconds: float) -> None:
    if options.json:
        told = {"address": address, "done": done, "before": before.name, "after": after.name, "seconds": seconds}
        output.as_json(told)
    else:
        click.echo(f"{address}: {done} in {seconds:.2f} s, {before.name} -> {after.name}")


def _as_json(backend: Backend, pe: PeStatus) -> dict[str, Any]:
    device = sysfs.device(backend, pe.address)
    holders = host.held(backend, pe)
    return {
        "address": pe.address,
        "phb": pe.phb,
        "pe": pe.pe,
        "name": pe.name,
        "state": "REMOVED" if pe.removed else pe.state.name,
        "words": pe.words,
        "driver": device.driver,
        "group": device.group,
        "held_by": [each._asdict() for each in holders],
        "recovering": pe.recovering,
        "enabled": _flags(pe.enabled),
        "noted": _flags(pe.noted),
        "mode": _flags(pe.mode),
        "remedy": _remedy(pe, device, bool(holders)),
    }


def _flags(value: IntFlag) -> list[str]:
    return [flag.name or "" for flag in type(value) if flag in value]


def _record(told: dict[str, Any]) -> dict[str, str]:
    fields = {
        "address": told["address"],
        "PE": told["name"],
        "state": f"{told['state']}: {told['words']}",
        "driver": told["driver"] or "none",
        "held by": ", ".join(f"pid {each['pid']} ({each['command']})" for each in told["held_by"]),
        "hardware lets through": " ".join(told["enabled"]) or "nothing",
        "kernel's notes": " ".join(told["noted"]),
        "device's notes": " ".join(told["mode"]),
    }
    return {name: text for name, text in fields.items() if text}


def _remedy(pe: PeStatus, device: sysfs.PciDevice, held: bool) -> str | None:
    """What brings a PE back that does not work; None for one that does."""
    if pe.removed:
        return "close the device, mend or replace it, then as root: echo 1 > /sys/bus/pci/rescan"
    if pe.recovering and not held:
        return "wait: the host is at it; vfio eeh watch shows how it goes"
    thaw = f"as root: echo 1 > {sysfs.path(pe.address, 'eeh_pe_state')}"
    if pe.state is State.NORMAL and Noted.CFG_BLOCKED not in pe.noted:
        return f"{thaw} ends that" if pe.forgotten and not held else None
    if held:
        return "its owner has to recover it: vfio.eeh.recover(device, driver)"
    if device.on_vfio:
        return f"vfio eeh recover {pe.address}"
    return f"it is for the host to recover it; if it does not, {thaw} thaws it"
