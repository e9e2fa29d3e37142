"""A class for each struct of <linux/vfio.h>, under the kernel's names.

Generated from _uapi_build.py by "python -m vfio._uapi_build": change that file, not this one.
"""

from __future__ import annotations

from vfio._uapi_types import ArrayField, Struct, StructField

__all__ = [
    "vfio_bitmap",
    "vfio_device_attach_iommufd_pt",
    "vfio_device_bind_iommufd",
    "vfio_device_detach_iommufd_pt",
    "vfio_device_feature",
    "vfio_device_feature_bus_master",
    "vfio_device_feature_dma_logging_control",
    "vfio_device_feature_dma_logging_range",
    "vfio_device_feature_dma_logging_report",
    "vfio_device_feature_mig_data_size",
    "vfio_device_feature_mig_state",
    "vfio_device_feature_migration",
    "vfio_device_gfx_plane_info",
    "vfio_device_info",
    "vfio_device_info_cap_pci_atomic_comp",
    "vfio_device_ioeventfd",
    "vfio_device_low_power_entry_with_wakeup",
    "vfio_device_migration_info",
    "vfio_eeh_pe_err",
    "vfio_eeh_pe_op",
    "vfio_group_status",
    "vfio_info_cap_header",
    "vfio_iommu_spapr_register_memory",
    "vfio_iommu_spapr_tce_create",
    "vfio_iommu_spapr_tce_ddw_info",
    "vfio_iommu_spapr_tce_info",
    "vfio_iommu_spapr_tce_remove",
    "vfio_iommu_type1_dirty_bitmap",
    "vfio_iommu_type1_dirty_bitmap_get",
    "vfio_iommu_type1_dma_map",
    "vfio_iommu_type1_dma_unmap",
    "vfio_iommu_type1_info",
    "vfio_iommu_type1_info_cap_iova_range",
    "vfio_iommu_type1_info_cap_migration",
    "vfio_iommu_type1_info_dma_avail",
    "vfio_iova_range",
    "vfio_irq_info",
    "vfio_irq_set",
    "vfio_pci_dependent_device",
    "vfio_pci_hot_reset",
    "vfio_pci_hot_reset_info",
    "vfio_precopy_info",
    "vfio_region_gfx_edid",
    "vfio_region_info",
    "vfio_region_info_cap_nvlink2_lnkspd",
    "vfio_region_info_cap_nvlink2_ssatgt",
    "vfio_region_info_cap_sparse_mmap",
    "vfio_region_info_cap_type",
    "vfio_region_sparse_mmap_area",
]


class vfio_info_cap_header(Struct):
    """First bytes of each capability in the chain that an info call returns."""

    id: int = 0  # VFIO_*_CAP_*: one number space for each info call
    version: int = 0
    next: int = 0  # from the start of the info struct, bytes; 0 ends the chain


class vfio_group_status(Struct):
    """Argument of VFIO_GROUP_GET_STATUS."""

    argsz: int = 0
    flags: int = 0  # VFIO_GROUP_FLAGS_*


class vfio_device_info(Struct):
    """Argument of VFIO_DEVICE_GET_INFO."""

    argsz: int = 0
    flags: int = 0  # VFIO_DEVICE_FLAGS_*
    num_regions: int = 0
    num_irqs: int = 0  # interrupt indexes, not vectors
    cap_offset: int = 0  # first capability, bytes; 0 for none
    pad: int = 0


class vfio_device_info_cap_pci_atomic_comp(Struct):
    """VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP: AtomicOp widths that the root port completes."""

    header: StructField[vfio_info_cap_header] = StructField()
    flags: int = 0  # VFIO_PCI_ATOMIC_COMP*
    reserved: int = 0


class vfio_region_info(Struct):
    """Argument of VFIO_DEVICE_GET_REGION_INFO; the caller sets index."""

    argsz: int = 0
    flags: int = 0  # VFIO_REGION_INFO_FLAG_*
    index: int = 0  # VFIO_PCI_*_REGION_INDEX for a PCI device
    cap_offset: int = 0  # first capability, bytes; 0 for none
    size: int = 0  # bytes; 0 when the device has no such region
    offset: int = 0  # where it starts in the device file, bytes


class vfio_region_sparse_mmap_area(Struct):
    """One part of a region that may be mapped."""

    offset: int = 0  # from the start of the region, bytes
    size: int = 0  # bytes


class vfio_region_info_cap_sparse_mmap(Struct):
    """VFIO_REGION_INFO_CAP_SPARSE_MMAP: the only parts of a region that may be mapped."""

    header: StructField[vfio_info_cap_header] = StructField()
    nr_areas: int = 0
    reserved: int = 0
    areas: ArrayField[vfio_region_sparse_mmap_area] = ArrayField()


class vfio_region_info_cap_type(Struct):
    """VFIO_REGION_INFO_CAP_TYPE: what a region beyond the fixed ones is."""

    header: StructField[vfio_info_cap_header] = StructField()
    type: int = 0  # VFIO_REGION_TYPE_*, or the vendor bit and a PCI vendor id
    subtype: int = 0  # VFIO_REGION_SUBTYPE_*


class vfio_region_gfx_edid(Struct):
    """Start of a region of type GFX, subtype EDID: the monitor of a virtual display."""

    edid_offset: int = 0  # from the start of the region, bytes
    edid_max_size: int = 0  # bytes
    edid_size: int = 0  # bytes
    max_xres: int = 0  # pixels; 0 for no limit
    max_yres: int = 0  # pixels; 0 for no limit
    link_state: int = 0  # VFIO_DEVICE_GFX_LINK_STATE_*


class vfio_device_migration_info(Struct):
    """Start of the migration region of the first, deprecated migration protocol."""

    device_state: int = 0  # VFIO_DEVICE_STATE_V1_*
    reserved: int = 0
    pending_bytes: int = 0
    data_offset: int = 0  # from the start of the region, bytes
    data_size: int = 0  # bytes


class vfio_region_info_cap_nvlink2_ssatgt(Struct):
    """VFIO_REGION_INFO_CAP_NVLINK2_SSATGT (deprecated): where a GPU's memory is on the system bus."""

    header: StructField[vfio_info_cap_header] = StructField()
    tgt: int = 0  # compressed real address


class vfio_region_info_cap_nvlink2_lnkspd(Struct):
    """VFIO_REGION_INFO_CAP_NVLINK2_LNKSPD (deprecated): the speed of an NVLink."""

    header: StructField[vfio_info_cap_header] = StructField()
    link_speed: int = 0
    __pad: int = 0


class vfio_irq_info(Struct):
    """Argument of VFIO_DEVICE_GET_IRQ_INFO; the caller sets index."""

    argsz: int = 0
    flags: int = 0  # VFIO_IRQ_INFO_*
    index: int = 0  # VFIO_PCI_*_IRQ_INDEX for a PCI device
    count: int = 0  # vectors; 0 when the device has no such interrupt


class vfio_irq_set(Struct):
    """Argument of VFIO_DEVICE_SET_IRQS."""

    argsz: int = 0
    flags: int = 0  # VFIO_IRQ_SET_*: one DATA and one ACTION
    index: int = 0  # VFIO_PCI_*_IRQ_INDEX for a PCI device
    start: int = 0  # first vector
    count: int = 0  # vectors; 0 with DATA_NONE and ACTION_TRIGGER disables the index
    data: ArrayField[int] = ArrayField()  # count bytes (DATA_BOOL) or 32-bit descriptors (DATA_EVENTFD, -1 for none)


class vfio_pci_dependent_device(Struct):
    """One device that a hot reset would reset too."""

    group_id: int = 0
    devid: int = 0  # instead of group_id when VFIO_PCI_HOT_RESET_FLAG_DEV_ID is set
    segment: int = 0  # PCI domain
    bus: int = 0
    devfn: int = 0  # device << 3 | function


class vfio_pci_hot_reset_info(Struct):
    """Argument of VFIO_DEVICE_GET_PCI_HOT_RESET_INFO; ENOSPC when it lacks room for all devices."""

    argsz: int = 0
    flags: int = 0  # VFIO_PCI_HOT_RESET_FLAG_*
    count: int = 0  # devices that a reset touches
    devices: ArrayField[vfio_pci_dependent_device] = ArrayField()


class vfio_pci_hot_reset(Struct):
    """Argument of VFIO_DEVICE_PCI_HOT_RESET."""

    argsz: int = 0
    flags: int = 0  # 0
    count: int = 0  # descriptors; 0 for a device opened by its own node
    group_fds: ArrayField[int] = ArrayField()  # every group that the reset touches, as proof of owning it


class vfio_device_gfx_plane_info(Struct):
    """Argument of VFIO_DEVICE_QUERY_GFX_PLANE: what a virtual display shows."""

    argsz: int = 0
    flags: int = 0  # VFIO_GFX_PLANE_TYPE_*
    drm_plane_type: int = 0  # DRM_PLANE_TYPE_*, set by the caller
    drm_format: int = 0  # DRM_FORMAT_*
    drm_format_mod: int = 0
    width: int = 0  # pixels
    height: int = 0  # pixels
    stride: int = 0  # bytes
    size: int = 0  # bytes, whole pages
    x_pos: int = 0  # of the cursor plane, pixels
    y_pos: int = 0  # of the cursor plane, pixels
    x_hot: int = 0  # of the cursor's hot spot, pixels; 0xffffffff for unknown
    y_hot: int = 0  # of the cursor's hot spot, pixels; 0xffffffff for unknown
    region_index: int = 0  # with VFIO_GFX_PLANE_TYPE_REGION
    dmabuf_id: int = 0  # with VFIO_GFX_PLANE_TYPE_DMABUF
    reserved: int = 0


class vfio_device_ioeventfd(Struct):
    """Argument of VFIO_DEVICE_IOEVENTFD: a register write that the kernel makes when an eventfd fires."""

    argsz: int = 0
    flags: int = 0  # VFIO_DEVICE_IOEVENTFD_*: one width
    offset: int = 0  # in the device file, bytes
    data: int = 0  # the value to write
    fd: int = 0  # the eventfd; -1 takes the write away again
    reserved: int = 0


class vfio_device_feature(Struct):
    """Argument of VFIO_DEVICE_FEATURE; what data holds depends on the feature."""

    argsz: int = 0
    flags: int = 0  # a VFIO_DEVICE_FEATURE_* number, and GET, SET or PROBE
    data: ArrayField[int] = ArrayField()


class vfio_device_bind_iommufd(Struct):
    """Argument of VFIO_DEVICE_BIND_IOMMUFD (devices opened by their own node)."""

    argsz: int = 0
    flags: int = 0  # 0
    iommufd: int = 0
    out_devid: int = 0  # set by the kernel: the device's id in that iommufd


class vfio_device_attach_iommufd_pt(Struct):
    """Argument of VFIO_DEVICE_ATTACH_IOMMUFD_PT."""

    argsz: int = 0
    flags: int = 0  # 0
    pt_id: int = 0  # an address space or page table of the iommufd; the kernel returns the one attached


class vfio_device_detach_iommufd_pt(Struct):
    """Argument of VFIO_DEVICE_DETACH_IOMMUFD_PT."""

    argsz: int = 0
    flags: int = 0  # 0


class vfio_device_feature_migration(Struct):
    """Data of VFIO_DEVICE_FEATURE_MIGRATION."""

    flags: int = 0  # VFIO_MIGRATION_*


class vfio_device_feature_mig_state(Struct):
    """Data of VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE."""

    device_state: int = 0  # VFIO_DEVICE_STATE_*
    data_fd: int = 0  # set by the kernel when the new state moves data, else -1


class vfio_precopy_info(Struct):
    """Argument of VFIO_MIG_GET_PRECOPY_INFO, on the descriptor of a migration stream."""

    argsz: int = 0
    flags: int = 0
    initial_bytes: int = 0
    dirty_bytes: int = 0


class vfio_device_low_power_entry_with_wakeup(Struct):
    """Data of VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP."""

    wakeup_eventfd: int = 0
    reserved: int = 0


class vfio_device_feature_dma_logging_control(Struct):
    """Data of VFIO_DEVICE_FEATURE_DMA_LOGGING_START."""

    page_size: int = 0  # bytes wished for a bit; the device may take another
    num_ranges: int = 0
    __reserved: int = 0
    ranges: int = 0  # address of the vfio_device_feature_dma_logging_range array


class vfio_device_feature_dma_logging_range(Struct):
    """A range of IOVAs whose writes are logged."""

    iova: int = 0  # bytes
    length: int = 0  # bytes


class vfio_device_feature_dma_logging_report(Struct):
    """Data of VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT."""

    iova: int = 0  # bytes
    length: int = 0  # bytes
    page_size: int = 0  # bytes for each bit
    bitmap: int = 0  # address of the bitmap that the kernel adds to


class vfio_device_feature_mig_data_size(Struct):
    """Data of VFIO_DEVICE_FEATURE_MIG_DATA_SIZE."""

    stop_copy_length: int = 0  # bytes, estimated


class vfio_device_feature_bus_master(Struct):
    """Data of VFIO_DEVICE_FEATURE_BUS_MASTER (CDX devices)."""

    op: int = 0  # VFIO_DEVICE_FEATURE_CLEAR_MASTER or SET_MASTER


class vfio_iommu_type1_info(Struct):
    """Argument of VFIO_IOMMU_GET_INFO (Type1)."""

    argsz: int = 0
    flags: int = 0  # VFIO_IOMMU_INFO_*
    iova_pgsizes: int = 0  # bit n set: pages of 1 << n bytes
    cap_offset: int = 0  # first capability, bytes; 0 for none
    pad: int = 0


class vfio_iova_range(Struct):
    """A range of usable IOVAs, both ends included."""

    start: int = 0
    end: int = 0


class vfio_iommu_type1_info_cap_iova_range(Struct):
    """VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE: the IOVAs that may be mapped."""

    header: StructField[vfio_info_cap_header] = StructField()
    nr_iovas: int = 0
    reserved: int = 0
    iova_ranges: ArrayField[vfio_iova_range] = ArrayField()


class vfio_iommu_type1_info_cap_migration(Struct):
    """VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION: dirty pages can be logged."""

    header: StructField[vfio_info_cap_header] = StructField()
    flags: int = 0
    pgsize_bitmap: int = 0  # bit n set: a bit of the bitmap may stand for 1 << n bytes
    max_dirty_bitmap_size: int = 0  # bytes


class vfio_iommu_type1_info_dma_avail(Struct):
    """VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL: how many mappings are left."""

    header: StructField[vfio_info_cap_header] = StructField()
    avail: int = 0


class vfio_iommu_type1_dma_map(Struct):
    """Argument of VFIO_IOMMU_MAP_DMA (every IOMMU model)."""

    argsz: int = 0
    flags: int = 0  # VFIO_DMA_MAP_FLAG_*, as the device sees it
    vaddr: int = 0  # address in this process
    iova: int = 0  # address that the device uses
    size: int = 0  # bytes


class vfio_bitmap(Struct):
    """One bit a page: where pages were written to."""

    pgsize: int = 0  # bytes for each bit
    size: int = 0  # of the bitmap, bytes
    data: ArrayField[int] = ArrayField()


class vfio_iommu_type1_dma_unmap(Struct):
    """Argument of VFIO_IOMMU_UNMAP_DMA (every IOMMU model)."""

    argsz: int = 0
    flags: int = 0  # VFIO_DMA_UNMAP_FLAG_*, Type1 only
    iova: int = 0  # address that the device uses
    size: int = 0  # bytes; Type1 returns what it unmapped
    data: ArrayField[int] = ArrayField()  # a vfio_bitmap with VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP


class vfio_iommu_type1_dirty_bitmap(Struct):
    """Argument of VFIO_IOMMU_DIRTY_PAGES (Type1)."""

    argsz: int = 0
    flags: int = 0  # one of VFIO_IOMMU_DIRTY_PAGES_FLAG_*
    data: ArrayField[int] = ArrayField()  # a vfio_iommu_type1_dirty_bitmap_get with GET_BITMAP


class vfio_iommu_type1_dirty_bitmap_get(Struct):
    """Data of VFIO_IOMMU_DIRTY_PAGES with VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP."""

    iova: int = 0
    size: int = 0  # bytes
    bitmap: StructField[vfio_bitmap] = StructField()


class vfio_iommu_spapr_tce_ddw_info(Struct):
    """What Dynamic DMA Windows a sPAPR IOMMU can make."""

    pgsizes: int = 0  # bit n set: TCEs for pages of 1 << n bytes
    max_dynamic_windows_supported: int = 0
    levels: int = 0  # most levels that a TCE table may have


class vfio_iommu_spapr_tce_info(Struct):
    """Argument of VFIO_IOMMU_SPAPR_TCE_GET_INFO."""

    argsz: int = 0
    flags: int = 0  # VFIO_IOMMU_SPAPR_INFO_DDW: ddw is filled in
    dma32_window_start: int = 0  # of the default window, an IOVA
    dma32_window_size: int = 0  # of the default window, bytes
    ddw: StructField[vfio_iommu_spapr_tce_ddw_info] = StructField()


class vfio_eeh_pe_err(Struct):
    """What VFIO_EEH_PE_INJECT_ERR injects."""

    type: int = 0  # 0 for 32-bit addresses, 1 for 64-bit
    func: int = 0  # EEH error function, 0 to 19
    addr: int = 0
    mask: int = 0


class vfio_eeh_pe_op(Struct):
    """Argument of VFIO_EEH_PE_OP."""

    argsz: int = 0
    flags: int = 0  # 0
    op: int = 0  # VFIO_EEH_PE_*, not one of the states
    err: StructField[vfio_eeh_pe_err] = StructField()  # only for VFIO_EEH_PE_INJECT_ERR


class vfio_iommu_spapr_register_memory(Struct):
    """Argument of VFIO_IOMMU_SPAPR_REGISTER_MEMORY and VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY."""

    argsz: int = 0
    flags: int = 0  # 0
    vaddr: int = 0  # address in this process
    size: int = 0  # bytes


class vfio_iommu_spapr_tce_create(Struct):
    """Argument of VFIO_IOMMU_SPAPR_TCE_CREATE: a new DMA window."""

    argsz: int = 0
    flags: int = 0  # 0
    page_shift: int = 0  # TCEs for pages of 1 << page_shift bytes
    __resv1: int = 0
    window_size: int = 0  # bytes, a power of two
    levels: int = 0  # of the TCE table
    __resv2: int = 0
    start_addr: int = 0  # set by the kernel: first IOVA of the window


class vfio_iommu_spapr_tce_remove(Struct):
    """Argument of VFIO_IOMMU_SPAPR_TCE_REMOVE."""

    argsz: int = 0
    flags: int = 0  # 0
    start_addr: int = 0  # first IOVA of the window
