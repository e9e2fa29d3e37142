"""vfio window plan: what DMA windows cost."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import click

import vfio
from vfio import errors, sysfs, topology
from vfio.backend import Backend
from vfio.iommu import tce
from vfio.iommu.spapr import Spapr, platform, platform_name

from . import output
from .options import Options, common, pci_address

_PLATFORMS = ("power8", "power9", "power10", "pseries", "power7")
_HOST_PAGES = {"4K": 4096, "64K": 65536}
_UNITS = "KMGTPE"
_FIXED = "has no Dynamic DMA Windows: its one window is fixed"


@dataclass(frozen=True)
class Planned:
    """The windows that one machine could have."""

    machine: str
    host_page: int
    windows: list[tce.Planned]
    why_none: str = ""


def size(text: str) -> int:
    """The type of the option: bytes, a power of two, with K, M, G, T, P or E for units of 1024."""
    match = re.fullmatch(
        rf"(0x[0-9a-f]{{1,16}}|[0-9]{{1,20}})(?:([{_UNITS}])(?:i?B)?)?", text, re.ASCII | re.IGNORECASE
    )
    if match is None:
        raise click.BadParameter(f"{text!r} is no size: a number of bytes, or for example 64G")
    value = int(match[1], 0 if match[1].startswith(("0x", "0X")) else 10)
    value <<= 10 * (_UNITS.index(match[2].upper()) + 1) if match[2] else 0
    if not 4096 <= value < 1 << 64 or value & (value - 1):
        raise click.BadParameter(f"{text!r}: a window is a power of two, from 4K to 8E")
    return value


@click.group()
@common
def window(options: Options) -> None:
    """DMA windows of POWER: what they cost.

    \b
    Example:
      vfio window plan --size 64G
    """


@window.command()
@click.argument("address", type=pci_address, required=False)
@click.option("--size", "wanted", type=size, required=True, help="Bytes of the window, a power of two: 64G, 0x100000.")
@click.option(
    "--platform",
    "platforms",
    type=click.Choice(_PLATFORMS),
    multiple=True,
    help="A platform to plan for (may be given several times; default: this machine, or all if it is no POWER host).",
)
@click.option(
    "--host-page",
    type=click.Choice(list(_HOST_PAGES)),
    help="Page of the platform's kernel (default: as the platform is described).",
)
@common
def plan(options: Options, address: str | None, wanted: int, platforms: tuple[str, ...], host_page: str | None) -> None:
    """Show what a window of a size would cost, by page size and number of table levels, and whether it is allowed.

    This machine is judged if it is a POWER host: the shape of the table, and the locked memory that this process may
    still have. With ADDRESS its kernel is asked what windows it has for the device (the device's group is opened, not the
    device, so nothing is reset); without, the platform is taken as it is known. Other platforms are named by --platform;
    of them the shape alone is judged. TABLE is what the hardware reads; CHARGED is the locked memory, in which powernv
    counts a second copy.

    \b
    Examples:
      vfio window plan --size 64G
      vfio window plan --size 1T --platform power9 --json
      vfio window plan 0001:01:00.0 --size 64G
    """
    page = _HOST_PAGES[host_page] if host_page else None
    if address is not None:
        if platforms or host_page:
            raise click.UsageError("ADDRESS is this machine: --platform and --host-page are for others")
        found = [_of_machine(options.backend, address, wanted)]
    elif platforms or host_page or (here := _of_this_host(options.backend, wanted)) is None:
        found = [_of_platform(name, wanted, page) for name in dict.fromkeys(platforms or _PLATFORMS)]
    else:
        found = [here]
    if options.json:
        output.as_json({"size": wanted, "machines": [_as_json(each) for each in found]})
        return
    for n, each in enumerate(found):
        if n:
            click.echo()
        _show(each, wanted)


def _of_machine(backend: Backend, address: str, wanted: int) -> Planned:
    """What the kernel says of the group, and the locked-memory account of this process."""
    group = sysfs.device(backend, address).group
    if group is None:
        raise errors.NoGroup(address)
    with vfio.Container(backend) as container, vfio.Group(group, backend) as opened:
        container.attach(opened)
        iommu = container.choose_iommu()
        name = f"{address} on this machine"
        if not isinstance(iommu, Spapr):
            return Planned(name, backend.page_size, [], f"{iommu.name} has no DMA windows of sPAPR")
        if not iommu.info.max_windows:
            return Planned(name, backend.page_size, [], f"{platform_name(backend)} {_FIXED} ({iommu.name})")
        info = iommu.info
        memory = _memory(backend) if info.levels == 1 else None
        planned = tce.plan(wanted, info.page_sizes, info.levels, backend.page_size, memory)
        return Planned(name, backend.page_size, [_within_limit(backend, each) for each in planned])


def _of_this_host(backend: Backend, wanted: int) -> Planned | None:
    """Its platform as it is known, and the locked-memory account of this process; None where the platform is not known."""
    host = platform(backend)
    known = host and ("pseries" if host.name == "pSeries" else host.cpu.lower())
    if known not in _PLATFORMS:
        return None
    memory = _memory(backend) if known == "pseries" else None
    planned = _of_platform(known, wanted, backend.page_size, memory)
    windows = [_within_limit(backend, each) for each in planned.windows]
    return replace(planned, machine=f"this machine, {platform_name(backend)}", windows=windows)


def _within_limit(backend: Backend, planned: tce.Planned) -> tce.Planned:
    account = backend.locked()
    if planned.problem or account.unlimited or account.limit is None:
        return planned
    if account.locked + planned.charged <= account.limit:
        return planned
    return planned._replace(
        problem=f"RLIMIT_MEMLOCK is {errors.size(account.limit)}, of which {errors.size(account.locked)} are in use"
    )


def _of_platform(name: str, wanted: int, host_page: int | None, memory: int | None = None) -> Planned:
    described = topology.load(name)
    page = host_page or described.platform.page_size
    iommu = described.iommu
    if not iommu.dynamic_windows:
        return Planned(name, page, [], f"{described.platform.cpu} {_FIXED}")
    sizes = [1 << shift for shift in range(64) if iommu.page_sizes >> shift & 1]
    return Planned(name, page, tce.plan(wanted, sizes, iommu.levels, page, memory))


def _memory(backend: Backend) -> int | None:
    found = re.search(r"^MemTotal:\s*(\d+) kB", backend.read_text("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _as_json(planned: Planned) -> dict[str, Any]:
    return {
        "machine": planned.machine,
        "host_page_size": planned.host_page,
        "why_none": planned.why_none or None,
        "windows": [
            {
                "page_size": each.page_size,
                "levels": each.levels,
                "table_bytes": each.table,
                "charged_bytes": each.charged,
                "allowed": not each.problem,
                "why_not": each.problem or None,
            }
            for each in planned.windows
        ],
    }


def _show(planned: Planned, wanted: int) -> None:
    click.echo(f"{planned.machine}, {errors.size(planned.host_page)} host pages: a window of {errors.size(wanted)}")
    if planned.why_none:
        click.echo(f"  {planned.why_none}")
        return
    output.table(["PAGES", "LEVELS", "TABLE", "CHARGED", "ALLOWED"], list(_rows(planned.windows)))


def _rows(windows: Iterable[tce.Planned]) -> Iterable[list[str]]:
    for each in windows:
        yield [
            errors.size(each.page_size),
            str(each.levels),
            errors.size(each.table) if each.table else "-",
            errors.size(each.charged) if each.charged else "-",
            f"no: {each.problem}" if each.problem else "yes",
        ]


COMMANDS = (window,)
