"""vfio nvme: what is on an NVMe disk, read, written and timed by the library's own driver."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO, NamedTuple

import click

import vfio
from vfio import assign, errors
from vfio.drivers import nvme_bench
from vfio.drivers.nvme import Interrupt, Nvme

from . import output
from .options import Options, common, pci_address

_WINDOW = 1 << 28
"""Bytes of the 64-bit window: no partition is too small for it."""
_PERCENTILES = (50, 90, 99, 99.9)


class How(NamedTuple):
    """The way to the disk that was asked for."""

    window: str
    interrupt: Interrupt | None
    bind: bool


def _number(text: str) -> int:
    """The type of an LBA or a size: decimal, or hexadecimal with 0x."""
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if value < 0:
        raise click.BadParameter(f"{text!r} is no number from 0 on")
    return value


_window = click.option(
    "--window",
    type=click.Choice(["default", "64"]),
    default="default",
    help="The DMA window to go through: the platform's own, or one above 4 GiB (sPAPR v2).",
)
_interrupt = click.option(
    "--interrupt",
    type=click.Choice(["MSI-X", "MSI", "INTx", "polling"], case_sensitive=False),
    help="How completions are noticed (default: the first of these that works).",
)
_bind = click.option("--bind", is_flag=True, help="Bind the device's group for the duration, and restore it exactly.")
_namespace = click.option("--namespace", type=click.IntRange(min=1), help="Its number (default: the first).")
_destroy = click.option("--destroy-data", is_flag=True, help="Yes, overwrite what is on the disk.")


def _how(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of every way to the disk; it gets them as `how`."""

    def command(*words: Any, window: str, interrupt: Interrupt | None, bind: bool, **others: Any) -> None:
        function(*words, how=How(window, interrupt, bind), **others)

    functools.update_wrapper(command, function)
    return _window(_interrupt(_bind(command)))


@contextmanager
def _disk(options: Options, how: How, depth: int = 32) -> Iterator[Nvme]:
    """The disk, opened and closed again; what the driver finds wrong with an argument is a usage error."""
    above = click.get_current_context().parent
    address = above.params["address"] if above else ""
    with ExitStack() as undo:
        if how.bind:
            undo.enter_context(assign.bound([address], backend=options.backend))
        device = undo.enter_context(vfio.open_device(address, backend=options.backend))
        through = None
        if how.window == "64":
            if not isinstance(device.iommu, (vfio.SpaprTce, vfio.SpaprTceV2)):
                raise errors.CallFailed(errno.ENODEV, "no 64-bit window", f"{device.iommu.name} has one window only")
            through = undo.enter_context(device.iommu.create_window(_WINDOW))
        disk = undo.enter_context(Nvme(device, window=through, depth=depth, interrupt=how.interrupt))
        try:
            yield disk
        except ValueError as error:
            if isinstance(error, OSError):
                raise
            raise click.UsageError(str(error)) from None


@click.group()
@click.argument("address", type=pci_address)
@common
def nvme(options: Options, address: str) -> None:
    """Use an NVMe disk through the library's own driver.

    The device has to be on vfio-pci (vfio bind ADDRESS, or --bind), which takes it from the host; opening it resets it.

    \b
    Examples:
      vfio nvme 0002:01:00.0 identify
      vfio nvme 0002:01:00.0 read 0 8
      vfio nvme 0002:01:00.0 bench --seconds 10 --depth 64
      vfio nvme 0002:01:00.0 write 2048 image.raw --destroy-data
    """


@nvme.command()
@_how
@common
def identify(options: Options, how: How) -> None:
    """Show the controller and its namespaces.

    \b
    Example:
      vfio nvme 0002:01:00.0 identify --json
    """
    with _disk(options, how) as disk:
        found, spaces = disk.controller, disk.namespaces
        queue = {
            "page": disk.page,
            "depth": disk.depth,
            "largest_transfer": disk.largest_transfer,
            "interrupt": disk.interrupt,
            "window": str(disk.window) if disk.window else None,
        }
    if options.json:
        described = {**found._asdict(), "version": ".".join(map(str, found.version))}
        named = [{**space._asdict(), "size": space.size} for space in spaces]
        output.as_json({"controller": described, "namespaces": named, "driver": queue})
        return
    output.record(
        {
            "model": found.model,
            "serial number": found.serial,
            "firmware": found.firmware,
            "NVM Express": ".".join(map(str, found.version)),
            "PCI vendor": f"{found.vendor:04x}, subsystem {found.subsystem_vendor:04x}",
            "write cache": "volatile" if found.write_cache else "none",
            "largest transfer": errors.size(found.largest_transfer) if found.largest_transfer else "unlimited",
            "completions by": str(queue["interrupt"]),
            "DMA through": str(queue["window"] or "the IOMMU"),
        }
    )
    click.echo()
    output.table(
        ["NAMESPACE", "SIZE", "BLOCKS", "BLOCK SIZE", "METADATA"],
        [
            [
                str(space.number),
                errors.size(space.size),
                str(space.blocks),
                errors.size(space.block_size),
                errors.size(space.metadata) if space.metadata else "-",
            ]
            for space in spaces
        ],
    )


@nvme.command()
@click.argument("lba", type=_number)
@click.argument("count", type=_number, default="1")
@click.option("-o", "--output", "file", type=click.Path(dir_okay=False, writable=True), help="Write the bytes to FILE.")
@_namespace
@_how
@common
def read(options: Options, lba: int, count: int, file: str | None, namespace: int | None, how: How) -> None:
    """Read COUNT blocks from LBA on (numbers decimal, or hexadecimal with 0x).

    On a terminal they are shown in hexadecimal; in a pipe, and with --output, they are bytes.

    \b
    Example:
      vfio nvme 0002:01:00.0 read 0 8 --output first.raw
    """
    with _disk(options, how) as disk:
        space = disk.namespace(namespace)
        data = disk.read(lba, count, namespace)
    if file:
        with open(file, "wb") as stream:
            stream.write(data)
        if not options.json:
            output.note(f"{errors.size(len(data))} from LBA {lba} of namespace {space.number} are in {file}")
    if options.json:
        described = {"namespace": space.number, "lba": lba, "blocks": count, "block_size": space.block_size}
        output.as_json({**described, "file": file} if file else {**described, "bytes": data.hex()})
    elif not file and sys.stdout.isatty():
        for line in hexdump(data, lba * space.block_size):
            click.echo(line)
    elif not file:
        click.echo(data, nl=False)


@nvme.command()
@click.argument("lba", type=_number)
@click.argument("file", type=click.File("rb"))
@_destroy
@_namespace
@_how
@common
def write(
    options: Options,
    lba: int,
    file: BinaryIO,
    destroy_data: bool,
    namespace: int | None,
    how: How,
) -> None:
    """Write FILE (- is standard input), which has to be whole blocks, from LBA on, and read it back to compare.

    It overwrites what is on the disk, and does so only with --destroy-data.

    \b
    Example:
      vfio nvme 0002:01:00.0 write 2048 image.raw --destroy-data
    """
    if not destroy_data:
        raise click.UsageError(f"writing destroys what is on the disk from LBA {lba} on: say --destroy-data")
    data = file.read()
    if not data:
        raise click.UsageError("there is nothing to write: FILE is empty")
    with _disk(options, how) as disk:
        space = disk.namespace(namespace)
        disk.write(lba, data, namespace)
        disk.flush(namespace)
        blocks = len(data) // space.block_size
        _compare(disk.read(lba, blocks, namespace), data, lba, space.block_size)
    if options.json:
        described = {"namespace": space.number, "lba": lba, "blocks": blocks, "block_size": space.block_size}
        output.as_json({**described, "verified": True})
    else:
        click.echo(f"{blocks} blocks from LBA {lba} of namespace {space.number} written, read back and the same")


def _compare(found: bytes, wanted: bytes, lba: int, size: int) -> None:
    for start in range(0, len(wanted), size):
        if found[start : start + size] != wanted[start : start + size]:
            block = lba + start // size
            raise errors.CallFailed(errno.EIO, f"LBA {block} does not hold what was written", "it reads otherwise")


@nvme.command()
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=5.0, show_default=True)
@click.option("--block-size", type=_number, default="4096", show_default=True, help="Bytes of one command.")
@click.option("--depth", type=click.IntRange(1, 1024), default=32, show_default=True, help="Commands on their way.")
@click.option("--pattern", type=click.Choice(["random", "sequential"]), default="random", show_default=True)
@click.option("--write", "writes", is_flag=True, help="Write; only together with --destroy-data.")
@_destroy
@_namespace
@_how
@common
def bench(
    options: Options,
    seconds: float,
    block_size: int,
    depth: int,
    pattern: nvme_bench.Pattern,
    writes: bool,
    destroy_data: bool,
    namespace: int | None,
    how: How,
) -> None:
    """Read all over the disk for a while, and tell how fast that was.

    \b
    Example:
      vfio nvme 0002:01:00.0 bench --seconds 10 --block-size 65536 --depth 8
    """
    if writes and not destroy_data:
        raise click.UsageError("writing destroys what is on the disk: say --destroy-data")
    if destroy_data and not writes:
        raise click.UsageError("nothing is destroyed without --write: say that too, or leave --destroy-data out")
    with _disk(options, how, depth=depth) as disk:
        found = nvme_bench.run(disk, seconds, block=block_size, pattern=pattern, write=writes, namespace=namespace)
        depth, noticed = disk.depth, disk.interrupt
    times = {
        "min": found.latencies[0],
        **{f"p{n:g}": found.latency(n) for n in _PERCENTILES},
        "max": found.latencies[-1],
    }
    if options.json:
        described: dict[str, Any] = {
            "operation": "write" if writes else "read",
            "pattern": pattern,
            "block_size": block_size,
        }
        described |= {"depth": depth, "interrupt": noticed, "commands": found.commands, "seconds": found.seconds}
        described |= {"iops": found.iops, "bytes_per_second": found.bandwidth, "latency_seconds": times}
        output.as_json(described)
        return
    output.record(
        {
            "done": f"{found.commands} {pattern} {'writes' if writes else 'reads'} of {errors.size(block_size)}, "
            f"{depth} at a time, in {found.seconds:.2f} s, completions by {noticed}",
            "IOPS": f"{found.iops:.0f}",
            "MB/s": f"{found.bandwidth / 1e6:.1f}",
            "latency": ", ".join(f"{name} {seconds * 1e6:.0f} us" for name, seconds in times.items()),
        }
    )


def hexdump(data: bytes, offset: int) -> Iterator[str]:
    """16 bytes a line, from byte `offset` of the disk on; lines that repeat are one asterisk."""
    last, starred = b"", False
    for start in range(0, len(data), 16):
        row = data[start : start + 16]
        if row == last and start + 16 < len(data):
            if not starred:
                yield "*"
            starred = True
            continue
        last, starred = row, False
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        yield f"{offset + start:010x}  {row[:8].hex(' '):23}  {row[8:].hex(' '):23}  |{text}|"


COMMANDS = (nvme,)
