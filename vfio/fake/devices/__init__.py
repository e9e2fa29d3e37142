"""The devices of the modelled machine, one a file; `model.PciModel` says how to write another."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from vfio.fake.devices.bridge import Bridge, RootPort
from vfio.fake.devices.chipset import Ahci, HostBridge, IsaBridge, SmBus
from vfio.fake.devices.e1000e import E1000e
from vfio.fake.devices.edu import Edu
from vfio.fake.devices.endpoint import Endpoint
from vfio.fake.devices.ivshmem import Ivshmem
from vfio.fake.devices.model import PciModel
from vfio.fake.devices.nvme import Nvme
from vfio.fake.devices.testdev import TestDevice
from vfio.fake.devices.virtio_rng import VirtioRng
from vfio.fake.pci import ROM

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
    "ivshmem-plain": Ivshmem,
    "pnv-phb-root-port": RootPort,
    "virtio-rng-pci": VirtioRng,
    "mch": HostBridge,
    "ICH9-LPC": IsaBridge,
    "ich9-ahci": Ahci,
    "ICH9-SMB": SmBus,
}
"""By the name that a topology uses, which is QEMU's where QEMU has the device."""


_BRIDGE_CLASSES = (0x0604, 0x0609)  # PCI to PCI, transparent or not


class UnknownModel(ValueError):
    """A topology names a class of your own that cannot be loaded."""


def make_model(device: topology.Device) -> PciModel:
    """The device behind a function of a topology: one of `MODELS`, or ``module:Class`` of your own; with the BARs, the
    MSI-X table and the expansion ROM that the topology says, else with the model's own.

    Any other name is a device that nobody models: a plain bridge by its class, else a plain endpoint.  Raises
    `UnknownModel` for a class that cannot be had.
    """
    model = _class_of(device)(device)
    if device.bars is not None:
        model.replace_bars(device.bars)
    if device.msix is not None:
        model.replace_msix(device.msix)
    if device.rom:
        model.add_bar(ROM, device.rom)
    return model


def _class_of(device: topology.Device) -> type[PciModel]:
    module, colon, name = device.model.partition(":")
    if not colon:
        plain = Bridge if device.device_class >> 8 in _BRIDGE_CLASSES else Endpoint
        return MODELS.get(device.model, plain)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UnknownModel(f"{device.address}: device {device.model!r} cannot be loaded: {error}") from error
    if not (isinstance(found, type) and issubclass(found, PciModel)):
        raise UnknownModel(f"{device.address}: {device.model} is not a PciModel")
    return found
