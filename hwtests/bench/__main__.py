"""Build the C loop for the guest, boot a target, and measure in it."""

import subprocess
import sys
import tempfile
from pathlib import Path

import click

from hwtests.lab import frames, machine
from hwtests.lab.errors import LabError
from hwtests.lab.progress import Progress
from hwtests.lab.targets import Target, target

_COMPILER = "powerpc64le-linux-gnu-gcc"
_GUEST_LIBRARY = "/lab/map_loop.so"


def build(directory: Path) -> Path:
    """The C loop as a shared library for ppc64le.  Raises LabError where that cannot be compiled."""
    library = directory / "map_loop.so"
    source = Path(__file__).with_name("map_loop.c")
    try:
        subprocess.run([_COMPILER, "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    except FileNotFoundError as error:
        raise LabError(f"{_COMPILER} is not installed: apt-get install gcc-powerpc64le-linux-gnu") from error
    except subprocess.CalledProcessError as error:
        raise LabError(f"{_COMPILER} could not compile {source.name}") from error
    return library


def measure(where: Target) -> int:
    """Boot, bind the first edu, measure; the exit status of the guest's command."""
    edu = next(device.address for device in where.machine().devices if device.model == "edu")
    script = f"vfio bind {edu} >/dev/null && python3 -m hwtests.bench.measure {edu} {_GUEST_LIBRARY}"
    with tempfile.TemporaryDirectory() as directory, Progress() as progress:
        options = machine.Options(extra_files={build(Path(directory)): _GUEST_LIBRARY})
        return machine.run(where, ["sh", "-c", script], _show, progress.report, options).status


def _show(channel: str, payload: bytes) -> None:
    stream = sys.stdout if channel == frames.OUTPUT else sys.stderr
    stream.buffer.write(payload)
    stream.buffer.flush()


@click.command()
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
def main(targets: tuple[str, ...]) -> None:
    """Measure on each TARGET of the lab, such as powernv8 (python -m hwtests.lab targets lists them)."""
    for name in targets:
        try:
            where = target(name)
            click.echo(f"{where.name}: {where.description}")
            status = measure(where)
        except LabError as error:
            raise click.ClickException(str(error)) from error
        if status:
            sys.exit(status)


if __name__ == "__main__":
    main()
