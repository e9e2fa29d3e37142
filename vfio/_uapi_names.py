"""Values of ``<linux/vfio.h>`` turned back into the kernel's names for them, for traces and messages.

A name belongs to a field: 1 is READ among the flags of a mapping and RESET among those of a device. So each field that
holds flags, or one of several values, has its vocabulary here: the constants whose names begin and end in some way.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

from vfio import _uapi_constants as constants
from vfio._uapi_ioctl import request_info
from vfio._uapi_types import Struct, struct_type

__all__ = [
    "eeh_op_name",
    "eeh_state_name",
    "extension_name",
    "feature_name",
    "flag_names",
    "irq_name",
    "region_name",
    "value_name",
]

# The flags of each struct that has some. Masks are no flags: they have several bits.
_FLAGS = {
    "vfio_group_status": "VFIO_GROUP_FLAGS_",
    "vfio_device_info": "VFIO_DEVICE_FLAGS_",
    "vfio_device_info_cap_pci_atomic_comp": "VFIO_PCI_ATOMIC_",
    "vfio_region_info": "VFIO_REGION_INFO_FLAG_",
    "vfio_irq_info": "VFIO_IRQ_INFO_",
    "vfio_irq_set": "VFIO_IRQ_SET_",
    "vfio_pci_hot_reset_info": "VFIO_PCI_HOT_RESET_FLAG_",
    "vfio_device_gfx_plane_info": "VFIO_GFX_PLANE_TYPE_",
    "vfio_device_ioeventfd": "VFIO_DEVICE_IOEVENTFD_",
    "vfio_device_feature": "VFIO_DEVICE_FEATURE_",
    "vfio_device_feature_migration": "VFIO_MIGRATION_",
    "vfio_iommu_type1_info": "VFIO_IOMMU_INFO_",
    "vfio_iommu_type1_dma_map": "VFIO_DMA_MAP_FLAG_",
    "vfio_iommu_type1_dma_unmap": "VFIO_DMA_UNMAP_FLAG_",
    "vfio_iommu_type1_dirty_bitmap": "VFIO_IOMMU_DIRTY_PAGES_FLAG_",
    "vfio_iommu_spapr_tce_info": "VFIO_IOMMU_SPAPR_INFO_",
}


class _Vocabulary(NamedTuple):
    begins: tuple[str, ...]
    ends: str = ""
    but: tuple[str, ...] = ()
    """Beginnings of names that are something else."""


_EXTENSIONS = _Vocabulary(("VFIO_EEH", "VFIO_UNMAP_ALL", "VFIO_UPDATE_VADDR"), but=("VFIO_EEH_",))
_IOMMUS = _Vocabulary(("VFIO_",), "_IOMMU")
_EEH_OPS = _Vocabulary(("VFIO_EEH_PE_",), but=("VFIO_EEH_PE_STATE_",))
_EEH_STATES = _Vocabulary(("VFIO_EEH_PE_STATE_",))
_REGIONS = _Vocabulary(("VFIO_PCI_",), "_REGION_INDEX")
_IRQS = _Vocabulary(("VFIO_PCI_",), "_IRQ_INDEX")
_BUS_MASTER = _Vocabulary(("VFIO_DEVICE_FEATURE_",), "_MASTER", but=("VFIO_DEVICE_FEATURE_BUS_",))
_FEATURES = _Vocabulary(
    ("VFIO_DEVICE_FEATURE_",),
    but=tuple(f"VFIO_DEVICE_FEATURE_{name}" for name in ("MASK", "GET", "SET", "PROBE", "CLEAR_MASTER")),
)
_REGION_TYPES = _Vocabulary(("VFIO_REGION_TYPE_",), but=("VFIO_REGION_TYPE_PCI_",))
_LINK_STATES = _Vocabulary(("VFIO_DEVICE_GFX_LINK_STATE_",))
_MIGRATION_STATES = _Vocabulary(
    ("VFIO_DEVICE_STATE_",), but=tuple(f"VFIO_DEVICE_STATE_{name}" for name in ("V1_", "MASK", "NR"))
)

_FIELDS = {
    ("vfio_region_info", "index"): _REGIONS,
    ("vfio_irq_info", "index"): _IRQS,
    ("vfio_irq_set", "index"): _IRQS,
    ("vfio_eeh_pe_op", "op"): _EEH_OPS,
    ("vfio_region_info_cap_type", "type"): _REGION_TYPES,
    ("vfio_region_gfx_edid", "link_state"): _LINK_STATES,
    ("vfio_device_feature_mig_state", "device_state"): _MIGRATION_STATES,
    ("vfio_device_feature_bus_master", "op"): _BUS_MASTER,
}


@functools.cache
def _names(words: _Vocabulary) -> Mapping[int, str]:
    return {
        value: name
        for name, value in vars(constants).items()
        if isinstance(value, int)
        and name.startswith(words.begins)
        and name.endswith(words.ends)
        and not name.startswith(words.but)
    }


def flag_names(what: Struct | type[Struct] | str, value: int, *, short: bool = False) -> tuple[str, ...]:
    """The names of the flags that are set in `value`, for the flags field of a struct or of a request's argument.

    ``flag_names("VFIO_IOMMU_MAP_DMA", 3)`` is ``VFIO_DMA_MAP_FLAG_READ`` and ``VFIO_DMA_MAP_FLAG_WRITE``, or with
    `short` ``READ`` and ``WRITE``. Those of `vfio_device_feature` begin with the name of the feature. Bits without a
    name come last, as one number in hexadecimal. KeyError for an unknown request.
    """
    if isinstance(what, str):
        struct = request_info(what).argument
    elif isinstance(what, type):
        struct = what
    else:
        struct = struct_type(what)
    prefix = _FLAGS.get(struct.__name__ if struct else "")
    found = []
    if prefix:
        if prefix == "VFIO_DEVICE_FEATURE_":
            found.append(feature_name(value & constants.VFIO_DEVICE_FEATURE_MASK))
            value &= ~constants.VFIO_DEVICE_FEATURE_MASK
        for bit, name in _names(_Vocabulary((prefix,))).items():
            if bit.bit_count() == 1 and value & bit:
                found.append(name)
                value &= ~bit
    if short and prefix:
        found = [name.removeprefix(prefix) for name in found]
    return (*found, hex(value)) if value else tuple(found)


def value_name(struct: Struct | type[Struct], field: str, value: int) -> str | None:
    """The name of the value of a field such as the op of `vfio_eeh_pe_op` or the index of `vfio_region_info` (of a PCI
    device); None where the kernel has no name for it."""
    name = (struct if isinstance(struct, type) else struct_type(struct)).__name__
    words = _FIELDS.get((name, field))
    return _names(words).get(value) if words else None


def extension_name(value: int) -> str:
    """The name of an extension or IOMMU type (``VFIO_SPAPR_TCE_v2_IOMMU``); the number itself when it has none."""
    return _names(_IOMMUS).get(value) or _names(_EXTENSIONS).get(value, str(value))


def eeh_op_name(value: int) -> str:
    """The name of an EEH operation (``VFIO_EEH_PE_RESET_HOT``); the number itself when it has none."""
    return _names(_EEH_OPS).get(value, str(value))


def eeh_state_name(value: int) -> str:
    """The name of what VFIO_EEH_PE_GET_STATE returned (``VFIO_EEH_PE_STATE_STOPPED``); the number when it has none."""
    return _names(_EEH_STATES).get(value, str(value))


def feature_name(value: int) -> str:
    """The name of a device feature (``VFIO_DEVICE_FEATURE_MIGRATION``); the number itself when it has none."""
    return _names(_FEATURES).get(value, str(value))


def region_name(index: int) -> str:
    """The name of a region of a PCI device (``VFIO_PCI_BAR0_REGION_INDEX``); the number itself when it has none."""
    return _names(_REGIONS).get(index, str(index))


def irq_name(index: int) -> str:
    """The name of an interrupt index of a PCI device (``VFIO_PCI_MSI_IRQ_INDEX``); the number when it has none."""
    return _names(_IRQS).get(index, str(index))
