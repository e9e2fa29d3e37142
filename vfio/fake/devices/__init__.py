"""The devices of the modelled machine, one a file; `model.PciModel` says how to write another."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from vfio.fake.devices.bridge import Bridge, RootPort
from vfio.fake.devices.e1000e import E1000e
from vfio.fake.devices.edu import Edu
from vfio.fake.devices.endpoint import Endpoint
from vfio.fake.devices.model import PciModel
from vfio.fake.devices.nvme import Nvme
from vfio.fake.devices.testdev import TestDevice

if TYPE_CHECKING:
    from vfio import topology

__all__ = ["MODELS", "PciModel", "UnknownModel", "make_model"]

MODELS: dict[str, type[PciModel]] = {
    "bridge": Bridge,
    "edu": Edu,
    "endpoint": Endpoint,
    "pci-testdev": TestDevice,
    "nvme": Nvme,
    "e1000e": E1000e,
    "pnv-phb-root-port": RootPort,
}
"""By the name that a topology uses, which is QEMU's where QEMU has the device."""


_BRIDGE_CLASSES = (0x0604, 0x0609)  # PCI to PCI, transparent or not


class UnknownModel(ValueError):
    """A topology names a class of your own that cannot be loaded."""


def make_model(device: topology.Device) -> PciModel:
    """The device behind a function of a topology: one of `MODELS`, or ``module:Class`` of your own.

    Any other name is a device that nobody models: a plain bridge by its class, else a plain endpoint.  Raises
    `UnknownModel` for a class that cannot be had.
    """
    module, colon, name = device.model.partition(":")
    if not colon:
        plain = Bridge if device.device_class >> 8 in _BRIDGE_CLASSES else Endpoint
        return MODELS.get(device.model, plain)(device)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UnknownModel(f"{device.address}: device {device.model!r} cannot be loaded: {error}") from error
    if not (isinstance(found, type) and issubclass(found, PciModel)):
        raise UnknownModel(f"{device.address}: {device.model} is not a PciModel")
    return found(device)
