"""The module with VFIO's IOMMU driver, of a modelled machine: what modprobe does."""

from __future__ import annotations

from collections.abc import Callable

from vfio.fake.machine import Machine


def unload(machine: Machine) -> str | None:
    """None, or the errno: EAGAIN while a container uses it."""
    core = machine.vfio
    if any(container.iommu for container in core.containers):
        return "EAGAIN"
    core.iommu_drivers.clear()
    return None


def load(machine: Machine) -> None:
    """Harmless where it is loaded."""
    machine.vfio.iommu_drivers[:] = [machine.vfio.platform_driver]


ACTIONS: dict[str, Callable[[Machine], str | None]] = {"unload_iommu": unload, "load_iommu": load}
