"""Measure the fake, and a real kernel beside it."""

import json
import subprocess
import sys

import click

Figures = dict[str, float | None]

_URL = "fake:power8"
_ADDRESS = "0000:01:00.0"


def figures(command: list[str]) -> Figures:
    """What the measuring program prints."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} ended with status {done.returncode}")
    return dict(json.loads(line) for line in done.stdout.splitlines())


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f} bytes" if name.startswith("bytes") else f"{value * 1e6:.1f} us"


@click.command()
@click.option("--beside", metavar="TARGET", help="Make the same calls on this target of the lab.")
def main(beside: str | None) -> None:
    """Print what calls cost on the fake (fake:power8), and on a real kernel."""
    measure = ["-m", "simtests.bench.measure"]
    fake = figures([sys.executable, *measure, _URL, _ADDRESS])
    real: Figures = {}
    if beside:
        lab = [sys.executable, "-m", "hwtests.lab", "run", beside, "--", "python3"]
        real = figures([*lab, *measure, "kernel:", _ADDRESS])
    width = max(map(len, fake))
    click.echo(f"{'':{width}}  {'fake':>12}  {f'kernel, {beside}' if beside else '':>22}")
    for name, value in fake.items():
        click.echo(f"{name:{width}}  {_shown(name, value):>12}  {_shown(name, real.get(name)) if beside else '':>22}")
    one = fake["map or unmap one page, a call"]
    if one:
        click.echo(f"{1 / one:,.0f} map or unmap calls a second on the fake")


if __name__ == "__main__":
    main()
