"""vfio fake: machines of the modelled kernel."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from vfio import backend as backends
from vfio import errors
from vfio.backends import remote_url

from . import output
from .options import Options, common


@click.group("fake")
@common
def fake(options: Options) -> None:
    """Make machines for the modelled kernel, which any command runs on: --backend fake:MACHINE.

    Such a machine is there for one command. One that is served (vfio fake serve) is a host of its own, for many.

    \b
    Examples:
      vfio list --backend fake:power9
      eval "$(vfio fake serve --machine power9 --detach)"
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


_socket = click.option(
    "--socket",
    "path",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="The server's socket. Without it: that of VFIO_BACKEND if it is a unix: URL, else "
    "$XDG_RUNTIME_DIR/vfio/fake.sock, or /run/vfio/fake.sock for root.",
)


@fake.command()
@click.option(
    "--machine",
    default="power8",
    metavar="MACHINE",
    help="What to model, as in a fake: URL: power8 (the default), power9?page_size=65536, or a file: ./host.toml.",
)
@click.option(
    "--socket",
    "path",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Where programs connect. Without it: $XDG_RUNTIME_DIR/vfio/fake.sock, or /run/vfio/fake.sock for root.",
)
@click.option("--detach", is_flag=True, help="Serve in the background; return as soon as it does.")
@common
def serve(options: Options, machine: str, path: Path | None, detach: bool) -> None:
    """Be a modelled host that many programs reach, and that remembers what they did, until it is stopped.

    Prints the line that a shell needs so that its commands go there. What a program has open or pinned is given back
    when the program ends, however it ends; drivers, owners of nodes and frozen PEs stay as they are.

    The socket is for its owner and root alone. Programs are the processes that they are, with their own limits. Where
    the server runs as an ordinary user, the line ends in ?uid=0: on the modelled host they are root, so that they may
    bind devices, as with fake:. Say ?uid=N to be somebody else there.

    \b
    Examples:
      eval "$(vfio fake serve --detach)"
      vfio bind 0000:01:00.0 --group
      vfio list --driver vfio-pci
      vfio fake status
      vfio fake stop
    \b
      vfio fake serve --machine 'power9?page_size=65536' --socket /tmp/ci.sock
    """
    from vfio.fake import presets, serving  # the whole model, which other commands do not need

    built = presets.machine_alone(f"fake:{machine}")
    listener = serving.Listener(path or serving.default_path())
    url = remote_url.make(str(listener.path), None if os.geteuid() == 0 else 0)

    def tell(pid: int) -> None:
        if options.json:
            output.as_json({"url": url, "socket": str(listener.path), "pid": pid})
        else:
            click.echo(f"export {backends.ENVIRONMENT}={shlex.quote(url)}")
        sys.stdout.flush()

    if detach:
        tell(serving.detach(built, listener))
    else:
        serving.run(built, listener, lambda: tell(os.getpid()))


@fake.command()
@_socket
@common
def stop(options: Options, path: Path | None) -> None:
    """End the server, and with it the machine. Programs that use it get an error from their next call on.

    \b
    Example:
      vfio fake stop
      vfio fake stop --socket /tmp/ci.sock
    """
    from vfio.backends import remote

    where = _where(options, path)
    with _no_server_is_a_failure():
        remote.stop(where)
    if options.json:
        output.as_json({"stopped": where})


@fake.command()
@_socket
@common
def status(options: Options, path: Path | None) -> None:
    """Show a server: the programs that use it, what they have open, locked and mapped, and what they have changed.

    \b
    Example:
      vfio fake status
      vfio fake status --json | jq .clients
    """
    from vfio.backends import remote

    where = _where(options, path)
    with _no_server_is_a_failure():
        found = remote.status(where)
    if options.json:
        output.as_json(found)
        return
    machine = found["machine"]
    output.record(
        {
            "socket": where,
            "server": f"pid {found['pid']}, for {found['uptime']:.0f} s, {found['requests']} requests",
            "machine": f"{machine['cpu']} {machine['platform']}, {errors.size(machine['page_size'])} pages, "
            f"kernel {machine['kernel']}",
            "open files": str(found["open_files"]),
            "locked memory": errors.size(found["locked"]),
        }
    )
    _show(("PID", "UID", "FILES", "MAPPINGS", "LOCKED", "COMMAND"), [_client(each) for each in found["clients"]])
    _show(("ADDRESS", "GROUP", "DRIVER"), [_binding(each) for each in found["bindings"]])
    _show(
        ("NODE", "UID", "GID", "MODE"),
        [(each["path"], str(each["uid"]), str(each["gid"]), each["mode"]) for each in found["nodes"]],
    )
    for line in found["held"]:
        click.echo(line)


def _show(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if rows:
        click.echo()
        output.table(columns, rows)


def _client(client: dict[str, Any]) -> Sequence[str]:
    files = " ".join(client["files"].values()) or "-"
    numbers = str(client["mappings"]), errors.size(client["locked"])
    return str(client["pid"]), str(client["uid"]), files, *numbers, client["command"]


def _binding(binding: dict[str, Any]) -> Sequence[str]:
    group = binding["group"]
    return binding["address"], "-" if group is None else str(group), binding["driver"] or "-"


def _where(options: Options, path: Path | None) -> str:
    """The socket that is meant."""
    from vfio.fake import serving

    url = options.url or os.environ.get(backends.ENVIRONMENT) or ""
    if path is None and url.startswith(remote_url.SCHEME):
        return remote_url.parse(url).path
    return str((path or serving.default_path()).absolute())


@contextlib.contextmanager
def _no_server_is_a_failure() -> Iterator[None]:
    """Of the operation, not of what was typed."""
    try:
        yield
    except errors.NoSuchBackend as error:
        number = errno.ENOENT if isinstance(error, errors.NoServer) else errno.EACCES
        raise errors.CallFailed(number, "cannot reach a server", error.why, error.remedy) from error


COMMANDS = (fake,)
