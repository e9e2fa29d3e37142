"""What a real kernel lets a user see and change of configuration space, byte by byte.

    python -m hwtests.config_space record powernv8 [powernv8-64k ...]

boots each target of the lab, writes and reads back every byte of each of its devices, and stores
``simtests/config_space/TARGET.json``, with which `simtests.conformance.test_pci_config_bytes` compares the fake, and
the kernel again.
"""

from __future__ import annotations

import json
import sys

import click

from hwtests.lab import frames, machine
from hwtests.lab.errors import LabError
from hwtests.lab.progress import Progress
from hwtests.lab.targets import System, target
from simtests.conformance import config_bytes
from simtests.conformance.pci_calls import on_vfio, opened
from vfio import sysfs
from vfio.backends import kernel


@click.group()
def main() -> None:
    """Record what configuration space is on real kernels."""


@main.command()
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
def record(targets: tuple[str, ...]) -> None:
    """Measure on each TARGET of the lab, and store it."""
    for name in targets:
        found: list[bytes] = []

        def take(channel: str, payload: bytes, found: list[bytes] = found) -> None:
            if channel == frames.OUTPUT:
                found.append(payload)
            else:
                sys.stderr.buffer.write(payload)

        try:
            with Progress() as progress:
                command = ["python3", "-m", "hwtests.config_space", "measure", name]
                outcome = machine.run(target(name), command, take, progress.report)
        except LabError as error:
            raise click.ClickException(str(error)) from error
        if outcome.status or outcome.lost:
            raise click.ClickException(f"{name}: nothing was stored")
        path = config_bytes.path(name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"".join(found))
        click.echo(f"{path}: {path.stat().st_size} bytes")


@main.command(hidden=True)
@click.argument("name", metavar="TARGET")
def measure(name: str) -> None:
    """In the machine: print what is to be stored."""
    backend, topology = kernel.THIS, System.of_target(name).topology
    assert topology is not None
    devices: dict[str, object] = {}
    for described in topology.devices:
        if described.model in config_bytes.MODELS and described.model not in devices:
            with on_vfio(backend, described.address) as address, opened(backend, address) as device:
                devices[described.model] = config_bytes.measure(device)
    document = {"target": name, "kernel": sysfs.kernel_release(backend), "devices": devices}
    click.echo(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
