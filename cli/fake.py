"""vfio fake: machines of the modelled kernel."""

from __future__ import annotations

import click

from . import output
from .options import Options, common


@click.group("fake")
@common
def fake(options: Options) -> None:
    """Make machines for the modelled kernel, which any command runs on: --backend fake:MACHINE.

    \b
    Examples:
      vfio list --backend fake:power9
      vfio fake capture > host.toml
      vfio list --backend fake:host.toml
    """


@fake.command()
@common
def capture(options: Options) -> None:
    """Print this host as a topology: PCI devices with their BARs, groups, PEs, drivers, and what the host uses them for.

    Needs no privilege, and opens no device; captured by root, devices have their own MSI-X tables as well. DMA windows are
    those of the platform: sysfs does not show them.

    \b
    Example:
      vfio fake capture > host.toml
      vfio list --backend fake:host.toml
    """
    from vfio.fake import capture as capturing  # a parser of TOML that other commands do not need

    captured = capturing.capture(options.backend)
    if options.json:
        output.as_json({"topology": captured.toml, "notes": captured.notes})
        return
    click.echo(captured.toml, nl=False)
    for note in captured.notes:
        output.note(note)


COMMANDS = (fake,)
