"""What every command takes: `--json`, `--backend`, `--trace`, before the command's name or after it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO, cast

import click

from vfio import address as addresses
from vfio import backend as backends
from vfio import errors


@dataclass
class Options:
    """The common options of one run."""

    json: bool = False
    url: str | None = None
    trace: str | None = None

    @functools.cached_property
    def backend(self) -> backends.Backend:
        """The kernel that answers, traced if wanted.  Raises `errors.NoSuchBackend`, and OSError for the trace's file."""
        inner = backends.open_backend(self.url)
        if self.trace is None:
            return inner
        from vfio.backends.trace import JsonTrace, TextTrace, TraceBackend

        if self.trace == "-":
            return TraceBackend(inner, TextTrace(sys.stderr))
        file = cast(TextIO, click.open_file(self.trace, "w", encoding="utf-8"))
        click.get_current_context().call_on_close(file.close)
        return TraceBackend(inner, JsonTrace(file) if self.trace.endswith(".jsonl") else TextTrace(file))


def pci_address(text: str) -> str:
    """The type of an argument that is the address of a PCI device."""
    try:
        return addresses.parse(text)
    except errors.InvalidAddress as error:
        raise click.BadParameter(f"{error.what}: {error.why}, {error.remedy}") from None


def _trace_file(text: str) -> str:
    """The type of --trace, whose optional FILE is easily mistaken for what comes after the option."""
    try:
        addresses.parse(text)
    except errors.InvalidAddress:
        return text
    raise click.BadParameter(f"{text!r} is an address, not a file: put --trace last, or say --trace=FILE")


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, errors too.")
_backend = click.option(
    "--backend",
    "url",
    metavar="URL",
    help="The kernel to ask, such as kernel: (the default; the environment variable VFIO_BACKEND sets another).",
)
_trace = click.option(
    "--trace",
    type=_trace_file,
    metavar="[FILE]",
    is_flag=False,
    flag_value="-",
    help="Print every call to the kernel on standard error, or to FILE; as JSON lines if it ends in .jsonl.",
)


def common(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the common options; it gets them as its first argument."""

    def command(ctx: click.Context, /, as_json: bool, url: str | None, trace: str | None, **arguments: Any) -> None:
        above = ctx.obj or Options()
        # Where nothing is said again it stays the same object, with the backend that it may have opened.
        said = as_json or url or trace
        ctx.obj = Options(as_json or above.json, url or above.url, trace or above.trace) if said else above
        function(ctx.obj, **arguments)

    functools.update_wrapper(command, function)
    return _json(_backend(_trace(click.pass_context(command))))
