"""The lab's command line."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import ParamSpec, TypeVar

import click

from hwtests.lab import frames, image, machine
from hwtests.lab.errors import LabError
from hwtests.lab.progress import Progress
from hwtests.lab.targets import TARGETS, Target, target

P = ParamSpec("P")
R = TypeVar("R")

LAB_FAILED = 125  # exit status when the lab, not the command, failed

_EXAMPLES = """
\b
Examples:
  python -m hwtests.lab run powernv8 -- uname -a
  python -m hwtests.lab run powernv8-64k -- vfio list
  python -m hwtests.lab shell pseries
"""


def _target(context: click.Context, parameter: click.Parameter, value: str) -> Target:
    try:
        return target(value)
    except LabError as error:
        raise click.BadParameter(str(error)) from error


def _targets(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[Target]:
    return [_target(context, parameter, value) for value in values]


def _phbs(context: click.Context, parameter: click.Parameter, values: tuple[int, ...]) -> tuple[int, ...] | None:
    """The PHBs to have; None without any. The target, an argument that comes first, knows which there are."""
    try:
        context.params["chosen"].machine(values or None)
    except LabError as error:
        raise click.BadParameter(str(error)) from error
    return values or None


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> int:
    """Bytes of a size like 1024M or 2G; 0 without one."""
    if value is None:
        return 0
    unit = {"M": 1 << 20, "G": 1 << 30}.get(value[-1:].upper(), 1)
    digits = value[:-1] if unit > 1 else value
    if not digits.isdecimal() or int(digits) * unit < 256 << 20:
        raise click.BadParameter(f"{value!r} is not a size of at least 256M, such as 1024M or 2G")
    return int(digits) * unit


def _files(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[Path, str]:
    """Files of the host and the paths that they get in the guest."""
    found = {}
    for value in values:
        host, _, guest = value.partition(":")
        if not guest.startswith("/") or not Path(host).is_file():
            raise click.BadParameter(f"{value!r} is not an existing file, a colon, and an absolute path in the guest")
        found[Path(host)] = guest
    return found


def _machine_options(command: Callable[P, R]) -> Callable[P, R]:
    """The options of every command that boots a machine."""
    for option in reversed(
        [
            click.option("--memory", callback=_size, metavar="SIZE", help="Memory of the machine, such as 4G."),
            click.option(
                "--phb",
                "phbs",
                type=int,
                multiple=True,
                callback=_phbs,
                help="Have only this PHB, a second faster each.",
            ),
            click.option(
                "--file", "files", callback=_files, multiple=True, metavar="HOST:GUEST", help="Have this file as well."
            ),
            click.option("--append", default="", help="Add to the kernel's command line."),
        ]
    ):
        command = option(command)
    return command


@click.group(epilog=_EXAMPLES)
def cli() -> None:
    """Real Debian kernels on emulated POWER machines, with this checkout installed."""


@cli.command()
@click.argument("chosen", metavar="TARGET", callback=_target, is_eager=True)
@click.argument("command", nargs=-1, required=True)
@click.option("--timeout", type=click.FloatRange(min=1), default=machine.TIMEOUT, show_default=True, metavar="SECONDS")
@_machine_options
@click.option("--dmesg", is_flag=True, help="Print the whole kernel log on standard error at the end.")
def run(
    chosen: Target,
    command: tuple[str, ...],
    timeout: float,
    memory: int,
    phbs: tuple[int, ...] | None,
    files: dict[Path, str],
    append: str,
    dmesg: bool,
) -> None:
    """Boot TARGET and run COMMAND in it, as root, in this checkout, with no standard input.

    Its output and exit status are those of this command. Exit status 124: the time was up; 125: the lab failed.

    \b
    Example: python -m hwtests.lab run powernv8 -- python3 -c 'import os; print(os.uname())'
    """
    options = machine.Options(phbs, memory, append, dmesg, files)
    with Progress() as progress:
        outcome = machine.run(chosen, command, _print, progress.report, options, timeout)
    if outcome.timed_out:
        click.echo(f"lab: no end after {timeout:g} s; the command was stopped while it did this:", err=True)
        click.echo(outcome.stuck or "  nothing that could be seen", err=True)
    if outcome.lost:
        click.echo(f"lab: {outcome.lost} pieces of output were lost on the console", err=True)
    log = outcome.boot_log + outcome.kernel_log if dmesg else outcome.kernel_log if outcome.status else ""
    if log:
        click.echo("lab: kernel log" + ("" if dmesg else " while the command ran") + f":\n{log.rstrip()}", err=True)
    sys.exit(outcome.status)


@cli.command()
@click.argument("chosen", metavar="TARGET", callback=_target, is_eager=True)
@_machine_options
def shell(chosen: Target, memory: int, phbs: tuple[int, ...] | None, files: dict[Path, str], append: str) -> None:
    """Boot TARGET and give a root shell on its console. Leave with exit, or with Ctrl-A then X."""
    with Progress() as progress:
        options = machine.Options(phbs, memory, append, extra_files=files)
        sys.exit(machine.shell(chosen, progress.report, options))


@cli.command()
def targets() -> None:
    """List what can be booted."""
    width = max(map(len, TARGETS))
    for one in TARGETS.values():
        click.echo(f"{one.name:{width}}  {one.description}")


@cli.command()
@click.argument("chosen", metavar="[TARGET]...", nargs=-1, callback=_targets)
@click.option("--refresh", is_flag=True, help="Fetch the newest packages even if the cache has some.")
def build(chosen: list[Target], refresh: bool) -> None:
    """Build the images of all targets, or of these, before they are needed."""
    flavours = sorted({one.flavour for one in chosen or TARGETS.values()})
    with Progress() as progress:
        image.build(flavours, progress.report, refresh)
        kernels = [image.kernel(flavour, progress.report) for flavour in flavours]
    for kernel in kernels:
        click.echo(f"{kernel.release}  {kernel.vmlinux.parent}")


@cli.command()
@click.option("--refresh", is_flag=True, help="Fetch the newest package even if the cache has one.")
def headers(refresh: bool) -> None:
    """Print the include directory of the kernel headers of the lab's suite, fetching them if need be."""
    with Progress() as progress:
        directory = image.headers(progress.report, refresh)
    click.echo(directory)


@cli.command()
def clean() -> None:
    """Delete everything that is cached."""
    removed = image.clean()
    click.echo(f"{image.cache_directory()}: " + (f"removed {', '.join(removed)}" if removed else "nothing to remove"))


def _print(channel: str, payload: bytes) -> None:
    stream = sys.stdout if channel == frames.OUTPUT else sys.stderr
    if channel != frames.RECORD:
        stream.buffer.write(payload)
        stream.buffer.flush()


def main() -> None:
    """Run the command line; the lab's own failures are one message and status 125."""

    def terminated(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, terminated)
    try:
        cli(prog_name="python -m hwtests.lab", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except LabError as error:
        click.echo(f"lab: {error}", err=True)
        sys.exit(LAB_FAILED)


if __name__ == "__main__":
    main()
