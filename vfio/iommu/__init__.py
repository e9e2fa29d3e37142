"""IOMMU models: what a container does with memory.  One file a model.

On POWER there are two: sPAPR TCE v2 (`SpaprTceV2`: memory is registered once, then mapped in one or two DMA
windows) and the older v1 (`SpaprTce`: enable, then map in the one window of the platform).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfio import errors

if TYPE_CHECKING:
    from vfio.container import Container
    from vfio.iommu.model import Iommu


_ATTACH = "container.attach(group) first"


def choose(container: Container) -> Iommu:
    """Set the best model that the kernel accepts for `container`.

    The kernel claims both sPAPR versions on every platform, so each is tried, and the one that SET_IOMMU accepts has to
    answer GET_INFO too: a model of another family may have the same number.  Raises `errors.NoIommuModel`.
    """
    from vfio.iommu.spapr_v1 import SpaprTce
    from vfio.iommu.spapr_v2 import SpaprTceV2

    if not container.groups:
        raise errors.CallFailed(errno.EINVAL, "cannot choose an IOMMU", "the container has no group", _ATTACH)
    tried = []
    for model in (SpaprTceV2, SpaprTce):
        try:
            return container.set_iommu(model)
        except errors.VfioError as error:
            tried.append((model.name, error.errno or 0))
    raise errors.NoIommuModel(tried, "on POWER: modprobe vfio_iommu_spapr_tce, and one group a container for v1")
