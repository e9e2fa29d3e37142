"""Measure the fake, and a real kernel beside it."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from simtests.bench import many
from vfio.backends import remote, remote_url

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


def served(measure: list[str]) -> tuple[Figures, str]:
    """The figures of the same machine through a socket, and what many clients get from it."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "socket")
        machine = _URL.removeprefix("fake:")
        serve = [sys.executable, "-m", "vfio_cli.main", "fake", "serve", "--detach", "--machine", machine]
        subprocess.run([*serve, "--socket", path], stdout=subprocess.DEVNULL, check=True)
        try:
            url = remote_url.make(str(path), 0)
            return figures([sys.executable, *measure, url, _ADDRESS]), many.told(url)
        finally:
            remote.stop(str(path))


@click.command()
@click.option("--beside", metavar="TARGET", help="Make the same calls on this target of the lab.")
def main(beside: str | None) -> None:
    """Print what calls cost on the fake (fake:power8), on the same machine served, and on a real kernel."""
    measure = ["-m", "simtests.bench.measure"]
    columns = {"fake": figures([sys.executable, *measure, _URL, _ADDRESS])}
    columns["served"], clients = served(measure)
    if beside:
        lab = [sys.executable, "-m", "hwtests.lab", "run", beside, "--", "python3"]
        columns[f"kernel, {beside}"] = figures([*lab, *measure, "kernel:", _ADDRESS])
    names = list(columns["fake"])
    width = max(map(len, names))
    click.echo(f"{'':{width}}" + "".join(f"  {title:>16}" for title in columns))
    for name in names:
        cells = (_shown(name, figures_.get(name)) for figures_ in columns.values())
        click.echo(f"{name:{width}}" + "".join(f"  {cell:>16}" for cell in cells))
    one = columns["fake"]["map or unmap one page, a call"]
    if one:
        click.echo(f"{1 / one:,.0f} map or unmap calls a second on the fake")
    click.echo(clients)


if __name__ == "__main__":
    main()
