"""vfio selftest."""

from __future__ import annotations

import contextlib

import click

from vfio import assign, selftest

from . import output
from .options import Options, common, pci_address


@click.command("selftest")
@click.argument("address", type=pci_address)
@click.option("--bind", is_flag=True, help="Bind the device's group for the duration, and restore it exactly.")
@common
def run(options: Options, address: str, bind: bool) -> None:
    """Open a device, map memory, move data through every window that the platform has, take interrupts.

    The device is reset by that. Data moves if there is a driver for the device (QEMU's edu); otherwise mapping and
    interrupts are tested. Nothing is left behind. The exit status is 1 if a step failed.

    \b
    Example:
      vfio selftest 0001:01:00.0 --bind
    """
    backend = options.backend
    steps: list[selftest.Step] = []
    with assign.bound([address], backend=backend) if bind else contextlib.nullcontext():
        for step in selftest.steps(address, backend):
            steps.append(step)
            if not options.json:
                color = {"ok": "green", "failed": "red"}.get(step.status)
                status = click.style(f"{step.status:7}", fg=color)
                click.echo(f"{status}  {step.name:24}  {step.seconds:6.2f} s  {step.detail}")
    passed = bool(steps) and not any(step.status == "failed" for step in steps)
    if options.json:
        output.as_json({"address": address, "passed": passed, "steps": [step._asdict() for step in steps]})
    if not passed:
        click.get_current_context().exit(1)


COMMANDS = (run,)
