"""What only an open device tells: its regions, interrupts and capabilities, and the IOMMU behind it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import click

import vfio
from vfio import errors, uapi
from vfio.backend import Backend
from vfio.info import Capability
from vfio.iommu.spapr import Spapr, SpaprInfo

from . import output


@dataclass(frozen=True)
class Opened:
    """A device as it was while it was open."""

    flags: tuple[str, ...]
    capabilities: list[dict[str, Any]]
    pci_capabilities: list[dict[str, Any]]
    regions: list[dict[str, Any]]
    irqs: list[dict[str, Any]]
    iommu: str
    info: SpaprInfo | None
    windows: list[dict[str, Any]]


def look(backend: Backend, address: str) -> Opened:
    """Open the device, which resets it, look, and close it again; warns first."""
    output.note(f"opening {address} resets it")
    with vfio.open_device(address, backend=backend) as device:
        iommu = device.iommu
        spapr = iommu if isinstance(iommu, Spapr) else None
        return Opened(
            flags=uapi.flag_names(uapi.vfio_device_info, device.info.flags, short=True),
            capabilities=_capabilities("VFIO_DEVICE_INFO_CAP_", device.info.capabilities),
            pci_capabilities=[
                {"id": each.identity, "offset": each.offset, "name": each.name}
                for each in device.pci.snapshot().capabilities
            ],
            regions=[
                {
                    "index": region.index,
                    "name": region.name,
                    "size": region.size,
                    "flags": uapi.flag_names(uapi.vfio_region_info, region.flags, short=True),
                    "mappable": [area._asdict() for area in region.mappable],
                    "capabilities": _capabilities("VFIO_REGION_INFO_CAP_", region.capabilities),
                }
                for region in device.regions()
            ],
            irqs=[
                {
                    "index": irq.index,
                    "name": irq.name,
                    "count": irq.count,
                    "flags": uapi.flag_names(uapi.vfio_irq_info, irq.flags, short=True),
                }
                for irq in device.irqs()
            ],
            iommu=iommu.name,
            info=spapr.info if spapr else None,
            windows=[
                {
                    "start": window.start,
                    "size": window.size,
                    "page_size": window.page_size,
                    "levels": window.levels,
                    "default": window.default,
                }
                for window in (spapr.windows if spapr else ())
            ],
        )


def as_json(found: Opened) -> dict[str, Any]:
    """What was seen, as JSON has it; sizes and addresses in bytes."""
    return {
        "flags": list(found.flags),
        "capabilities": found.capabilities,
        "pci_capabilities": found.pci_capabilities,
        "regions": found.regions,
        "irqs": found.irqs,
        "iommu": {
            "model": found.iommu,
            **(found.info._asdict() if found.info else {}),
            "windows": found.windows,
        },
    }


def show(found: Opened) -> None:
    """What was seen, for a person."""
    click.echo()
    fields = {
        "VFIO flags": " ".join(found.flags),
        "VFIO capabilities": ", ".join(each["name"] for each in found.capabilities),
        "PCI capabilities": ", ".join(f"{each['name']} at {each['offset']:#x}" for each in found.pci_capabilities),
        "IOMMU model": found.iommu,
    }
    if found.info:
        sizes = ", ".join(map(errors.size, found.info.page_sizes))
        fields |= {
            "window page sizes": sizes or "fixed",
            "windows at most": str(found.info.max_windows or 1),
            "table levels": str(found.info.levels or 1),
        }
    output.record({name: text for name, text in fields.items() if text})
    click.echo()
    output.table(
        ["REGION", "SIZE", "FLAGS", "MAPPABLE", "CAPABILITIES"],
        [
            [
                each["name"],
                errors.size(each["size"]),
                " ".join(each["flags"]),
                _areas(each),
                ", ".join(capability["name"] for capability in each["capabilities"]) or "-",
            ]
            for each in found.regions
        ],
    )
    click.echo()
    output.table(
        ["INTERRUPT", "COUNT", "FLAGS"],
        [[each["name"], str(each["count"]), " ".join(each["flags"])] for each in found.irqs],
    )
    if found.windows:
        click.echo()
        output.table(
            ["DMA WINDOW", "SIZE", "PAGES", "LEVELS"],
            [
                [
                    errors.span(each["start"], each["size"]),
                    errors.size(each["size"]),
                    errors.size(each["page_size"]),
                    str(each["levels"]),
                ]
                for each in found.windows
            ],
        )


def _areas(region: dict[str, Any]) -> str:
    areas = region["mappable"]
    if areas == [{"offset": 0, "size": region["size"]}]:
        return "all"
    return ", ".join(errors.span(area["offset"], area["size"]) for area in areas) or "no"


def _capabilities(prefix: str, found: Iterable[Capability]) -> list[dict[str, Any]]:
    """The capabilities of an info struct under the kernel's names."""
    names = {getattr(uapi, name): name.removeprefix(prefix) for name in dir(uapi) if name.startswith(prefix)}
    return [{"id": each.id, "version": each.version, "name": names.get(each.id, str(each.id))} for each in found]
