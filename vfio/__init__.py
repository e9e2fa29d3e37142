"""Linux userspace device access on POWER.

    import vfio

    with vfio.open_device("0000:01:00.0") as device:
        with device.iommu.map(vfio.DmaBuffer(1 << 20)) as dma:
            bar = device.region(vfio.BAR0)
            bar.write64(0x80, dma.iova)

`open_device` does the whole dance; `Container`, `Group` and `Device` are its steps.  `open_backend` chooses the kernel that
answers.  Assignment (bind, unbind, restore) is in `vfio.assign`, the kernel's structs and numbers are in `vfio.uapi`.
"""

from vfio import errors, uapi
from vfio.backend import Backend, open_backend
from vfio.container import Container
from vfio.device import BAR0, BAR1, BAR2, BAR3, BAR4, BAR5, CONFIG, ROM, Device
from vfio.dma import Dma, DmaBuffer, MemoryRange
from vfio.errors import VfioError
from vfio.group import Group
from vfio.iommu.mapper import Mapper
from vfio.iommu.spapr_v1 import SpaprTce
from vfio.iommu.spapr_v2 import SpaprTceV2
from vfio.iommu.type1 import Type1, Type1v2
from vfio.iommu.window import DmaWindow
from vfio.irq import Irq, Vector, Vectors
from vfio.region import Region
from vfio.session import open_device

__all__ = [
    "BAR0",
    "BAR1",
    "BAR2",
    "BAR3",
    "BAR4",
    "BAR5",
    "CONFIG",
    "ROM",
    "Backend",
    "Container",
    "Device",
    "Dma",
    "DmaBuffer",
    "DmaWindow",
    "Group",
    "Irq",
    "Mapper",
    "MemoryRange",
    "Region",
    "SpaprTce",
    "SpaprTceV2",
    "Type1",
    "Type1v2",
    "Vector",
    "Vectors",
    "VfioError",
    "errors",
    "open_backend",
    "open_device",
    "uapi",
]
