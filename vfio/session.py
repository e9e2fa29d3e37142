"""The whole way to one device, and back."""

from __future__ import annotations

from contextlib import ExitStack

from vfio import address as addresses
from vfio import errors, sysfs
from vfio.backend import Backend, default
from vfio.container import Container
from vfio.device import Device
from vfio.group import Group
from vfio.iommu.model import Iommu


class OpenDevice(Device):
    """A device with a group and a container of its own, which are closed with it; made by `open_device`."""

    undo: ExitStack

    def close(self) -> None:
        """Undo what `open_device` did: unmap, close the device, its group and its container."""
        try:
            if self._fd is not None:
                container = self.group.container
                if container and container.iommu:
                    container.iommu.close()
        finally:
            try:
                super().close()
            finally:
                self.undo.close()


def open_device(address: str, backend: Backend | None = None, model: type[Iommu] | None = None) -> Device:
    """Open the PCI device `address` with its group in a container of its own, ready for DMA.

    `model` is the IOMMU model (default: the best that the platform accepts).  The device has to be on a VFIO driver
    (``vfio bind ADDRESS``).  Opening resets a device that can be reset, and leaves its bus-master bit off: see
    `Device.enable_bus_master`.  Closing the device closes all of it.

    Raises `errors.InvalidAddress`, `errors.NoSuchDevice`, `errors.NoGroup`, `errors.NotBound`, `errors.Busy`,
    `errors.AccessDenied`, `errors.GroupNotViable`, `errors.NoIommuModel`; whatever was opened is closed again.
    """
    backend = backend or default()
    address = addresses.parse(address)
    found = sysfs.device(backend, address)
    if found.group is None:
        raise errors.NoGroup(address)
    if not found.on_vfio:
        raise errors.NotBound(address, found.driver)
    with ExitStack() as undo:
        container = undo.enter_context(Container(backend))
        group = undo.enter_context(Group(found.group, backend))
        container.attach(group)
        if model is None:
            container.choose_iommu()
        else:
            container.set_iommu(model)
        device = group.device(address, OpenDevice)
        device.undo = undo.pop_all()
        return device
