"""Tables, records, JSON and errors.  On a terminal tables are drawn; in a pipe they are columns of plain text."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from vfio.errors import VfioError


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows under a heading."""
    if sys.stdout.isatty():
        from rich import box, console
        from rich.table import Table  # 50 ms that a pipe does not wait for

        drawn = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            drawn.add_row(*row)
        console.Console(markup=False, highlight=False, emoji=False).print(drawn)
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for line in (columns, *rows):
        click.echo("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def record(fields: Mapping[str, str]) -> None:
    """One thing: a name and a value a line."""
    width = max(map(len, fields))
    for name, value in fields.items():
        click.echo(f"{click.style(f'{name:{width}}', bold=True)}  {value}")


def as_json(value: Any) -> None:
    """One JSON document."""
    click.echo(json.dumps(value, indent=2))


def note(text: str) -> None:
    """What the user should know, beside the output."""
    click.echo(f"vfio: {text}", err=True)


def failure(error: OSError, *, json_wanted: bool) -> None:
    """Why the command failed, on standard error."""
    if json_wanted:
        click.echo(json.dumps({"error": describe(error)}, indent=2), err=True)
    elif isinstance(error, VfioError):
        click.echo(f"vfio: {error}", err=True)
    else:
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"vfio: {where}{error.strerror or error} [{_name(error)}]", err=True)


def describe(error: OSError) -> dict[str, Any]:
    """An error as JSON has it."""
    if isinstance(error, VfioError):
        what, why, remedy = error.what, error.why, error.remedy
    else:
        what, why, remedy = str(error.filename or ""), error.strerror or str(error), ""
    return {
        "class": type(error).__name__,
        "errno": _name(error),
        "what": what,
        "why": why,
        "remedy": remedy or None,
    }


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error.errno))
