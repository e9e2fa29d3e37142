"""The capabilities of PCI functions, one class each; of a capability without a class only the name is known."""

from __future__ import annotations

from typing import Any

from vfio._pci_capability import Capability
from vfio._pci_express import Express
from vfio._pci_extended import (
    AccessControlServices,
    AdvancedErrors,
    AlternativeRouting,
    DesignatedVendor,
    ExtendedVendor,
    SerialNumber,
    SrIov,
)
from vfio._pci_register import Source
from vfio._pci_standard import (
    AdvancedFeatures,
    BridgeSubsystem,
    Location,
    Msi,
    Msix,
    PowerManagement,
    Vendor,
    VitalProductData,
)

__all__ = [
    "CLASSES",
    "AccessControlServices",
    "AdvancedErrors",
    "AdvancedFeatures",
    "AlternativeRouting",
    "BridgeSubsystem",
    "Capability",
    "DesignatedVendor",
    "Express",
    "ExtendedVendor",
    "Location",
    "Msi",
    "Msix",
    "PowerManagement",
    "SerialNumber",
    "SrIov",
    "Vendor",
    "VitalProductData",
    "make",
]


def _classes() -> dict[tuple[bool, int], type[Capability]]:
    found: dict[tuple[bool, int], type[Capability]] = {}
    for kind in Capability.__subclasses__():
        if kind.id is not None:
            found[kind.extended, kind.id] = kind
    return found


CLASSES: dict[tuple[bool, int], type[Capability]] = _classes()
"""By (extended, ID)."""


def make(source: Source, offset: int, identity: int, version: int | None = None) -> Capability:
    """The capability at `offset`; `version` is that of an extended one."""
    kind: Any = CLASSES.get((version is not None, identity), Capability)
    found: Capability = kind(source, offset, identity, version)
    return found
