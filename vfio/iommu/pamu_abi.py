"""Requests and structs of VFIO on a Freescale PAMU.  No kernel ever merged them: only the model (``fake:p4080``) knows them.

That is why they are not in `vfio.uapi`, which is ``<linux/vfio.h>`` and nothing else.  The request for comments names
``VFIO_IOMMU_SET_ATTR`` and ``VFIO_IOMMU_GET_ATTR`` and gives no numbers.  Names and layouts here are those of the
patches that were posted in 2013; numbers are this project's own: the patches' (IOMMU type 2 or 7, requests
15 to 19) have been given to sPAPR since.  MAP_DMA and UNMAP_DMA are those of Type1, with their structs.
"""

from __future__ import annotations

import struct

from vfio import uapi

VFIO_FSL_PAMU_IOMMU = 0x50414D55
"""The type that SET_IOMMU takes: "PAMU"."""

_FIRST = uapi.VFIO_GET_API_VERSION + 128  # far from what kernels use
VFIO_IOMMU_PAMU_GET_ATTR = _FIRST
VFIO_IOMMU_PAMU_SET_ATTR = _FIRST + 1
VFIO_IOMMU_PAMU_GET_MSI_BANK_COUNT = _FIRST + 2
VFIO_IOMMU_PAMU_MAP_MSI_BANK = _FIRST + 3
VFIO_IOMMU_PAMU_UNMAP_MSI_BANK = _FIRST + 4

ATTR_GEOMETRY, ATTR_WINDOWS, ATTR_STASH = 0, 1, 2

HEADER = struct.Struct("=III4x")
"""struct vfio_pamu_attr: argsz, flags, attribute; then one of the next three, and 32 bytes in all."""
GEOMETRY = struct.Struct("=QQ")
"""First and last address of the aperture."""
WINDOWS = struct.Struct("=I")
STASH = struct.Struct("=II")
"""CPU, and the level of its cache (1, 2; 3 is the platform's)."""
ATTR_SIZE = 32

MSI_BANK_MAP = struct.Struct("=III4xQ")
"""struct vfio_pamu_msi_bank_map: argsz, flags (VFIO_DMA_MAP_FLAG_READ and WRITE), index of the bank, IOVA."""
MSI_BANK_UNMAP = struct.Struct("=IIQ")
"""struct vfio_pamu_msi_bank_unmap: argsz, flags, IOVA."""


def attribute(kind: int, body: bytes = b"") -> bytearray:
    """A struct vfio_pamu_attr."""
    return bytearray((HEADER.pack(ATTR_SIZE, 0, kind) + body).ljust(ATTR_SIZE, b"\0"))
