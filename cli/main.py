"""The entry point: the group of all commands, and what becomes of errors."""

from __future__ import annotations

import errno
import json
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import click

from vfio import errors

from . import apply, assignment, config, demo, eeh, fake, inventory, nvme, output, testing, window
from .options import Options, common

USAGE = 2
"""Exit status for what the user typed; 1 is an operation that failed."""

_TYPED = (errors.BadPlan, errors.InvalidAddress, errors.NoSuchUser, errors.NoSuchBackend)


class Commands(click.Group):
    """A group that turns errors of the library and the kernel into messages."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line; with `standalone_mode`, end the process with its exit status."""
        typed = list(sys.argv[1:] if args is None else args)
        if not standalone_mode:
            return super().main(typed, prog_name, complete_var, standalone_mode, **extra)
        json_wanted = "--json" in typed
        try:
            status = super().main(typed, prog_name, complete_var, False, **extra)
        except click.Abort:
            click.echo("Aborted!", err=True)
            sys.exit(1)
        except click.ClickException as error:
            if json_wanted:
                described = {"class": "Usage", "errno": None, "what": error.format_message(), "why": "", "remedy": None}
                click.echo(json.dumps({"error": described}, indent=2), err=True)
            else:
                error.show()
            sys.exit(error.exit_code)
        except OSError as error:
            if error.errno == errno.EPIPE and not isinstance(error, errors.VfioError):
                raise  # whoever read our output has gone
            output.failure(error, json_wanted=json_wanted)
            sys.exit(USAGE if isinstance(error, _TYPED) else 1)
        sys.exit(status or 0)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vfio", prog_name="vfio")
@common
def cli(options: Options) -> None:
    """Assign PCI devices to userspace through VFIO, on POWER and elsewhere.

    \b
    Examples:
      vfio demo
      vfio list
      vfio bind 0001:01:00.0 --group --user alice
      vfio selftest 0001:01:00.0
      vfio restore --all

    Every command has --help with an example.
    """


for module in (inventory, assignment, apply, config, testing, demo, nvme, eeh, window, fake):
    for command in module.COMMANDS:
        cli.add_command(command)


def main() -> None:
    """The console script.  A terminated command cleans up like an interrupted one."""

    def terminated(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, terminated)
    cli(prog_name="vfio")


if __name__ == "__main__":
    main()
