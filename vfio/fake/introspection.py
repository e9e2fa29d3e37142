"""What the VFIO modules hold, for tests and for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vfio.fake.pamu import PamuDomain
from vfio.fake.spapr import SpaprTce
from vfio.fake.type1 import Type1

if TYPE_CHECKING:
    from vfio.fake.container import Container
    from vfio.fake.core import VfioCore
    from vfio.fake.registration import Registrations
    from vfio.fake.tce import TceTable

_MOST = 64  # mappings of a window that are told one by one


def describe(core: VfioCore) -> dict[str, Any]:
    """Containers with groups, windows and mappings; registrations and locked pages of processes; open devices.

    Addresses and sizes are in bytes.  A window with very many mappings shows only the first of them.
    """
    return {
        "containers": [_container(container) for container in core.containers],
        "processes": [_process(process.pid, regions) for process, regions in core._registrations.items()],
        "devices": [
            {
                "address": pci.address,
                "group": device.group.number,
                "opened": device.open_count,
                "holders": [process.pid for process in core.holders(device)],
            }
            for pci, device in core.devices.items()
        ],
    }


def held(core: VfioCore) -> list[str]:
    """What is still held, a line each."""
    found = []
    for container in core.containers:
        name = f"container {container.number} (opened by process {container.opener.pid})"
        for group in container.groups:
            found.append(f"{name}: group {group.number} is attached")
        iommu = container.iommu
        if isinstance(iommu, Type1):
            found += [f"{name}: {what}" for what in iommu.held()]
        elif isinstance(iommu, (SpaprTce, PamuDomain)):
            found += [f"{name}: {_window_text(table)}" for table in iommu.tables if table is not None]
    for process, registrations in core._registrations.items():
        for region in registrations:
            size, by = region.end - region.start, f"process {process.pid}"
            users = f"{region.holders} containers hold it, {region.mapped} TCEs point into it"
            if not _holders(core, registrations, region):
                users = f"leaked: it was unregistered while mapped; {region.mapped} TCEs point into it"
            found.append(f"{by}: {size} bytes registered at {region.start:#x} ({users})")
        if registrations.leaked_pages:
            found.append(
                f"process {process.pid}: {registrations.leaked_pages} pages charged for windows that were refused"
            )
    for pci, device in core.devices.items():
        if device.open_count:
            pids = ", ".join(str(process.pid) for process in core.holders(device))
            found.append(f"device {pci.address}: open {device.open_count} times, by process {pids}")
    return found


def _holders(core: VfioCore, registrations: Registrations, region: object) -> list[Container]:
    return [
        c for c in core.containers if isinstance(c.iommu, SpaprTce) and any(held is region for held in c.iommu.regions)
    ]


def _container(container: Container) -> dict[str, Any]:
    iommu = container.iommu
    shown: dict[str, Any] = {
        "number": container.number,
        "opener": container.opener.pid,
        "groups": [group.number for group in container.groups],
    }
    if isinstance(iommu, (PamuDomain, Type1)):
        shown |= iommu.describe()
    elif isinstance(iommu, SpaprTce):
        shown["iommu"] = f"sPAPR TCE v{iommu.version}"
        shown["owner"] = iommu.owner.pid if iommu.owner else None
        shown["enabled"] = iommu.enabled
        shown["default_window_pending"] = iommu.default_window_pending
        shown["windows"] = [_window(table) for table in iommu.tables if table is not None]
    return shown


def _window(table: TceTable) -> dict[str, Any]:
    shift = table.page_shift
    mappings: list[dict[str, Any]] = []
    for extent in table.extents:
        if len(mappings) == _MOST:
            break
        mappings.append(
            {
                "iova": extent.start << shift,
                "size": (extent.end - extent.start) << shift,
                "vaddr": extent.value & ~3,
                "access": {1: "r", 2: "w", 3: "rw"}[extent.value & 3],
            }
        )
    return {
        "start": table.start,
        "size": table.size,
        "page_size": table.page_size,
        "levels": table.levels,
        "tables": table.tables,
        "charged": table.allocated_size,
        "mapped": table.extents.covered << shift,
        "extents": len(table.extents),
        "mappings": mappings,
    }


def _process(pid: int, registrations: Registrations) -> dict[str, Any]:
    return {
        "pid": pid,
        "locked_pages": registrations.process.locked_pages,
        "leaked_pages": registrations.leaked_pages,
        "regions": [
            {
                "vaddr": region.start,
                "size": region.end - region.start,
                "largest_page": 1 << region.page_shift,
                "holders": region.holders,
                "mapped": region.mapped,
            }
            for region in registrations
        ],
    }


def _window_text(table: TceTable) -> str:
    text = f"window {table.start:#x}..{table.start + table.size:#x} of {table.page_size}-byte pages"
    first = next(iter(table.extents), None)
    if first is None:
        return text
    iova = first.start << table.page_shift
    size = (first.end - first.start) << table.page_shift
    runs = len(table.extents)
    more = f" and {runs - 1} more" if runs > 1 else ""
    return f"{text}, with {table.extents.covered} pages mapped: IOVA {iova:#x}, {size} bytes{more}"
