"""The requests of ``<linux/vfio.h>`` (Linux 6.12), each the number that it has on the running machine.

In a row: the number from VFIO_BASE, the kind of file, the argument, and on containers the IOMMU models that know it.
"""

from vfio import _uapi_structs as _s
from vfio._uapi_ioctl import define as _define

VFIO_GET_API_VERSION = _define("VFIO_GET_API_VERSION", 0, "container", "nothing")
VFIO_CHECK_EXTENSION = _define("VFIO_CHECK_EXTENSION", 1, "container", "value")
VFIO_SET_IOMMU = _define("VFIO_SET_IOMMU", 2, "container", "value")

VFIO_GROUP_GET_STATUS = _define("VFIO_GROUP_GET_STATUS", 3, "group", _s.vfio_group_status)
VFIO_GROUP_SET_CONTAINER = _define("VFIO_GROUP_SET_CONTAINER", 4, "group", "int*")
VFIO_GROUP_UNSET_CONTAINER = _define("VFIO_GROUP_UNSET_CONTAINER", 5, "group", "nothing")
VFIO_GROUP_GET_DEVICE_FD = _define("VFIO_GROUP_GET_DEVICE_FD", 6, "group", "string")

VFIO_DEVICE_GET_INFO = _define("VFIO_DEVICE_GET_INFO", 7, "device", _s.vfio_device_info)
VFIO_DEVICE_GET_REGION_INFO = _define("VFIO_DEVICE_GET_REGION_INFO", 8, "device", _s.vfio_region_info)
VFIO_DEVICE_GET_IRQ_INFO = _define("VFIO_DEVICE_GET_IRQ_INFO", 9, "device", _s.vfio_irq_info)
VFIO_DEVICE_SET_IRQS = _define("VFIO_DEVICE_SET_IRQS", 10, "device", _s.vfio_irq_set)
VFIO_DEVICE_RESET = _define("VFIO_DEVICE_RESET", 11, "device", "nothing")
VFIO_DEVICE_GET_PCI_HOT_RESET_INFO = _define(
    "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", 12, "device", _s.vfio_pci_hot_reset_info
)
VFIO_DEVICE_PCI_HOT_RESET = _define("VFIO_DEVICE_PCI_HOT_RESET", 13, "device", _s.vfio_pci_hot_reset)
VFIO_DEVICE_QUERY_GFX_PLANE = _define("VFIO_DEVICE_QUERY_GFX_PLANE", 14, "device", _s.vfio_device_gfx_plane_info)
VFIO_DEVICE_GET_GFX_DMABUF = _define("VFIO_DEVICE_GET_GFX_DMABUF", 15, "device", "int*")
VFIO_DEVICE_IOEVENTFD = _define("VFIO_DEVICE_IOEVENTFD", 16, "device", _s.vfio_device_ioeventfd)
VFIO_DEVICE_FEATURE = _define("VFIO_DEVICE_FEATURE", 17, "device", _s.vfio_device_feature)
VFIO_DEVICE_BIND_IOMMUFD = _define("VFIO_DEVICE_BIND_IOMMUFD", 18, "device", _s.vfio_device_bind_iommufd)
VFIO_DEVICE_ATTACH_IOMMUFD_PT = _define("VFIO_DEVICE_ATTACH_IOMMUFD_PT", 19, "device", _s.vfio_device_attach_iommufd_pt)
VFIO_DEVICE_DETACH_IOMMUFD_PT = _define("VFIO_DEVICE_DETACH_IOMMUFD_PT", 20, "device", _s.vfio_device_detach_iommufd_pt)
VFIO_MIG_GET_PRECOPY_INFO = _define("VFIO_MIG_GET_PRECOPY_INFO", 21, "migration", _s.vfio_precopy_info)

VFIO_IOMMU_GET_INFO = _define("VFIO_IOMMU_GET_INFO", 12, "container", _s.vfio_iommu_type1_info, "type1")
VFIO_IOMMU_MAP_DMA = _define("VFIO_IOMMU_MAP_DMA", 13, "container", _s.vfio_iommu_type1_dma_map, "type1 spapr")
VFIO_IOMMU_UNMAP_DMA = _define("VFIO_IOMMU_UNMAP_DMA", 14, "container", _s.vfio_iommu_type1_dma_unmap, "type1 spapr")
VFIO_IOMMU_DIRTY_PAGES = _define("VFIO_IOMMU_DIRTY_PAGES", 17, "container", _s.vfio_iommu_type1_dirty_bitmap, "type1")

VFIO_IOMMU_SPAPR_TCE_GET_INFO = _define(
    "VFIO_IOMMU_SPAPR_TCE_GET_INFO", 12, "container", _s.vfio_iommu_spapr_tce_info, "spapr"
)
VFIO_IOMMU_ENABLE = _define("VFIO_IOMMU_ENABLE", 15, "container", "nothing", "spapr")
VFIO_IOMMU_DISABLE = _define("VFIO_IOMMU_DISABLE", 16, "container", "nothing", "spapr")
VFIO_IOMMU_SPAPR_REGISTER_MEMORY = _define(
    "VFIO_IOMMU_SPAPR_REGISTER_MEMORY", 17, "container", _s.vfio_iommu_spapr_register_memory, "spapr"
)
VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY = _define(
    "VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY", 18, "container", _s.vfio_iommu_spapr_register_memory, "spapr"
)
VFIO_IOMMU_SPAPR_TCE_CREATE = _define(
    "VFIO_IOMMU_SPAPR_TCE_CREATE", 19, "container", _s.vfio_iommu_spapr_tce_create, "spapr"
)
VFIO_IOMMU_SPAPR_TCE_REMOVE = _define(
    "VFIO_IOMMU_SPAPR_TCE_REMOVE", 20, "container", _s.vfio_iommu_spapr_tce_remove, "spapr"
)
VFIO_EEH_PE_OP = _define("VFIO_EEH_PE_OP", 21, "container", _s.vfio_eeh_pe_op, "spapr")
