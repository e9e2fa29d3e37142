"""IOMMU models: what a container does with memory.  One file a model.

On POWER there are two: sPAPR TCE v2 (`SpaprTceV2`: memory is registered once, then mapped in one or two DMA
windows) and the older v1 (`SpaprTce`: enable, then map in the one window of the platform).  x86 and most others have Type1
(`Type1v2`, `Type1`: one space of IOVA, mapped and pinned at once).  Freescale's PAMU (`pamu.Pamu`) no kernel ever merged: the
model alone has it.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

from vfio import errors

if TYPE_CHECKING:
    from vfio.container import Container
    from vfio.iommu.model import Iommu


_ATTACH = "container.attach(group) first"


def choose(container: Container) -> Iommu:
    """Set the best model that the kernel accepts for `container`.

    A model that was passed over for a lesser one is told in `Iommu.passed_over`, and logged.

    The kernel claims both sPAPR versions on every platform, so each is tried, and the one that SET_IOMMU accepts has to
    answer GET_INFO too: a model of another family may have the same number.  Raises `errors.NoIommuModel`.
    """
    from vfio.iommu.noiommu import NoIommu
    from vfio.iommu.spapr_v1 import SpaprTce
    from vfio.iommu.spapr_v2 import SpaprTceV2
    from vfio.iommu.type1 import Type1, Type1v2

    if not container.groups:
        raise errors.CallFailed(errno.EINVAL, "cannot choose an IOMMU", "the container has no group", _ATTACH)
    if any(group.unprotected for group in container.groups):
        return container.set_iommu(NoIommu)
    refused: list[tuple[type[Iommu], errors.VfioError]] = []
    for model in (SpaprTceV2, SpaprTce):
        try:
            found = container.set_iommu(model)
        except errors.VfioError as error:
            refused.append((model, error))
            continue
        found.passed_over = tuple(str(why) for _, why in refused)
        for text in found.passed_over:
            logging.getLogger("vfio").info("%s is used: %s", found.name, text)
        return found
    for other in (Type1v2, Type1):
        if container.check_extension(other.extension):
            return container.set_iommu(other)
    from vfio.iommu.pamu import Pamu  # which no kernel has, so that kernels are asked last

    if container.check_extension(Pamu.extension):
        return container.set_iommu(Pamu)
    tried = [(model.name, why.errno or 0) for model, why in refused]
    raise errors.NoIommuModel(tried, "on POWER: modprobe vfio_iommu_spapr_tce, and one group a container for v1")
