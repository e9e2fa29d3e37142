"""vfio config: a device's configuration space."""

from __future__ import annotations

import click

import vfio
from vfio import pci

from . import output
from .options import Options, common, pci_address


@click.command()
@click.argument("address", type=pci_address)
@click.option("--decode", "form", flag_value="decode", default="decode", help="Name every register (the default).")
@click.option("--hex", "form", flag_value="hex", help="Dump the bytes, as lspci -xxxx does.")
@click.option(
    "--vfio", "opens", is_flag=True, help="Open the device, which resets it, and show what a user of it sees."
)
@common
def config(options: Options, address: str, form: str, opens: bool) -> None:
    """Show a device's configuration space, as the host has it in sysfs: the device is not opened.

    With --vfio it is opened, and what is shown is what vfio-pci makes of it: BARs that can be written, capabilities that
    are hidden. Of 4096 bytes sysfs shows the first 64 to who is not root.

    \b
    Examples:
      vfio config 0001:01:00.0
      vfio config 0001:01:00.0 --hex
      vfio config 0001:01:00.0 --vfio --json
    """
    found = _opened(options, address) if opens else pci.of(options.backend, address)
    if options.json:
        seen = {"address": address, "source": "vfio" if opens else "sysfs"}
        output.as_json(
            {**seen, "size": found.size, "bytes": found.raw().hex()} if form == "hex" else {**seen, **found.as_dict()}
        )
    elif form == "hex":
        for line in pci.hex_lines(found.raw()):
            click.echo(line)
    else:
        click.echo(found)
    if found.cut:
        output.note(f"only root can read more than the first {found.size} bytes: capabilities are not shown")


def _opened(options: Options, address: str) -> pci.ConfigSpace:
    output.note(f"opening {address} resets it")
    with vfio.open_device(address, backend=options.backend) as device:
        return device.pci.snapshot()


COMMANDS = (config,)
