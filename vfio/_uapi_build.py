"""The structs of ``<linux/vfio.h>`` (Linux 6.12) in C, and the command that turns them into two Python modules.

This text is the one place where the layout of a struct is written down. From it ``python -m vfio._uapi_build`` makes

- ``_uapi_cffi.py``: prepared cffi definitions, so that nothing parses C when a program starts;
- ``_uapi_structs.py``: a class for each struct, its fields annotated for type checkers and editors.

Both are committed; run the command again after changing the text (``--check`` only compares). Only this command needs
the whole of cffi: a program needs no more than ``_cffi_backend``. A comment before a struct becomes its docstring, and
a comment after a field stays with the field. The simtests hold all of it against the real header and the C compiler.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import tempfile
from pathlib import Path

import cffi

# The kernel gives __aligned_u64 an alignment of 8 even where the ABI would be content with 4 (i386). cffi has no such
# attribute and needs none: in every struct here those fields lie at a multiple of 8 anyway, and padding is explicit.
TYPES = {
    "__u8": "uint8_t",
    "__u16": "uint16_t",
    "__u32": "uint32_t",
    "__s32": "int32_t",
    "__u64": "uint64_t",
    "__aligned_u64": "uint64_t",
}

STRUCTS = r"""
/* First bytes of each capability in the chain that an info call returns. */
struct vfio_info_cap_header {
    __u16 id;                   /* VFIO_*_CAP_*: one number space for each info call */
    __u16 version;
    __u32 next;                 /* from the start of the info struct, bytes; 0 ends the chain */
};

/* Argument of VFIO_GROUP_GET_STATUS. */
struct vfio_group_status {
    __u32 argsz;
    __u32 flags;                /* VFIO_GROUP_FLAGS_* */
};

/* Argument of VFIO_DEVICE_GET_INFO. */
struct vfio_device_info {
    __u32 argsz;
    __u32 flags;                /* VFIO_DEVICE_FLAGS_* */
    __u32 num_regions;
    __u32 num_irqs;             /* interrupt indexes, not vectors */
    __u32 cap_offset;           /* first capability, bytes; 0 for none */
    __u32 pad;
};

/* VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP: AtomicOp widths that the root port completes. */
struct vfio_device_info_cap_pci_atomic_comp {
    struct vfio_info_cap_header header;
    __u32 flags;                /* VFIO_PCI_ATOMIC_COMP* */
    __u32 reserved;
};

/* Argument of VFIO_DEVICE_GET_REGION_INFO; the caller sets index. */
struct vfio_region_info {
    __u32 argsz;
    __u32 flags;                /* VFIO_REGION_INFO_FLAG_* */
    __u32 index;                /* VFIO_PCI_*_REGION_INDEX for a PCI device */
    __u32 cap_offset;           /* first capability, bytes; 0 for none */
    __aligned_u64 size;         /* bytes; 0 when the device has no such region */
    __aligned_u64 offset;       /* where it starts in the device file, bytes */
};

/* One part of a region that may be mapped. */
struct vfio_region_sparse_mmap_area {
    __aligned_u64 offset;       /* from the start of the region, bytes */
    __aligned_u64 size;         /* bytes */
};

/* VFIO_REGION_INFO_CAP_SPARSE_MMAP: the only parts of a region that may be mapped. */
struct vfio_region_info_cap_sparse_mmap {
    struct vfio_info_cap_header header;
    __u32 nr_areas;
    __u32 reserved;
    struct vfio_region_sparse_mmap_area areas[];
};

/* VFIO_REGION_INFO_CAP_TYPE: what a region beyond the fixed ones is. */
struct vfio_region_info_cap_type {
    struct vfio_info_cap_header header;
    __u32 type;                 /* VFIO_REGION_TYPE_*, or the vendor bit and a PCI vendor id */
    __u32 subtype;              /* VFIO_REGION_SUBTYPE_* */
};

/* Start of a region of type GFX, subtype EDID: the monitor of a virtual display. */
struct vfio_region_gfx_edid {
    __u32 edid_offset;          /* from the start of the region, bytes */
    __u32 edid_max_size;        /* bytes */
    __u32 edid_size;            /* bytes */
    __u32 max_xres;             /* pixels; 0 for no limit */
    __u32 max_yres;             /* pixels; 0 for no limit */
    __u32 link_state;           /* VFIO_DEVICE_GFX_LINK_STATE_* */
};

/* Start of the migration region of the first, deprecated migration protocol. */
struct vfio_device_migration_info {
    __u32 device_state;         /* VFIO_DEVICE_STATE_V1_* */
    __u32 reserved;
    __aligned_u64 pending_bytes;
    __aligned_u64 data_offset;  /* from the start of the region, bytes */
    __aligned_u64 data_size;    /* bytes */
};

/* VFIO_REGION_INFO_CAP_NVLINK2_SSATGT (deprecated): where a GPU's memory is on the system bus. */
struct vfio_region_info_cap_nvlink2_ssatgt {
    struct vfio_info_cap_header header;
    __aligned_u64 tgt;          /* compressed real address */
};

/* VFIO_REGION_INFO_CAP_NVLINK2_LNKSPD (deprecated): the speed of an NVLink. */
struct vfio_region_info_cap_nvlink2_lnkspd {
    struct vfio_info_cap_header header;
    __u32 link_speed;
    __u32 __pad;
};

/* Argument of VFIO_DEVICE_GET_IRQ_INFO; the caller sets index. */
struct vfio_irq_info {
    __u32 argsz;
    __u32 flags;                /* VFIO_IRQ_INFO_* */
    __u32 index;                /* VFIO_PCI_*_IRQ_INDEX for a PCI device */
    __u32 count;                /* vectors; 0 when the device has no such interrupt */
};

/* Argument of VFIO_DEVICE_SET_IRQS. */
struct vfio_irq_set {
    __u32 argsz;
    __u32 flags;                /* VFIO_IRQ_SET_*: one DATA and one ACTION */
    __u32 index;                /* VFIO_PCI_*_IRQ_INDEX for a PCI device */
    __u32 start;                /* first vector */
    __u32 count;                /* vectors; 0 with DATA_NONE and ACTION_TRIGGER disables the index */
    __u8 data[];                /* count bytes (DATA_BOOL) or 32-bit descriptors (DATA_EVENTFD, -1 for none) */
};

/* One device that a hot reset would reset too. */
struct vfio_pci_dependent_device {
    union {
        __u32 group_id;
        __u32 devid;            /* instead of group_id when VFIO_PCI_HOT_RESET_FLAG_DEV_ID is set */
    };
    __u16 segment;              /* PCI domain */
    __u8 bus;
    __u8 devfn;                 /* device << 3 | function */
};

/* Argument of VFIO_DEVICE_GET_PCI_HOT_RESET_INFO; ENOSPC when it lacks room for all devices. */
struct vfio_pci_hot_reset_info {
    __u32 argsz;
    __u32 flags;                /* VFIO_PCI_HOT_RESET_FLAG_* */
    __u32 count;                /* devices that a reset touches */
    struct vfio_pci_dependent_device devices[];
};

/* Argument of VFIO_DEVICE_PCI_HOT_RESET. */
struct vfio_pci_hot_reset {
    __u32 argsz;
    __u32 flags;                /* 0 */
    __u32 count;                /* descriptors; 0 for a device opened by its own node */
    __s32 group_fds[];          /* every group that the reset touches, as proof of owning it */
};

/* Argument of VFIO_DEVICE_QUERY_GFX_PLANE: what a virtual display shows. */
struct vfio_device_gfx_plane_info {
    __u32 argsz;
    __u32 flags;                /* VFIO_GFX_PLANE_TYPE_* */
    __u32 drm_plane_type;       /* DRM_PLANE_TYPE_*, set by the caller */
    __u32 drm_format;           /* DRM_FORMAT_* */
    __aligned_u64 drm_format_mod;
    __u32 width;                /* pixels */
    __u32 height;               /* pixels */
    __u32 stride;               /* bytes */
    __u32 size;                 /* bytes, whole pages */
    __u32 x_pos;                /* of the cursor plane, pixels */
    __u32 y_pos;                /* of the cursor plane, pixels */
    __u32 x_hot;                /* of the cursor's hot spot, pixels; 0xffffffff for unknown */
    __u32 y_hot;                /* of the cursor's hot spot, pixels; 0xffffffff for unknown */
    union {
        __u32 region_index;     /* with VFIO_GFX_PLANE_TYPE_REGION */
        __u32 dmabuf_id;        /* with VFIO_GFX_PLANE_TYPE_DMABUF */
    };
    __u32 reserved;
};

/* Argument of VFIO_DEVICE_IOEVENTFD: a register write that the kernel makes when an eventfd fires. */
struct vfio_device_ioeventfd {
    __u32 argsz;
    __u32 flags;                /* VFIO_DEVICE_IOEVENTFD_*: one width */
    __aligned_u64 offset;       /* in the device file, bytes */
    __aligned_u64 data;         /* the value to write */
    __s32 fd;                   /* the eventfd; -1 takes the write away again */
    __u32 reserved;
};

/* Argument of VFIO_DEVICE_FEATURE; what data holds depends on the feature. */
struct vfio_device_feature {
    __u32 argsz;
    __u32 flags;                /* a VFIO_DEVICE_FEATURE_* number, and GET, SET or PROBE */
    __u8 data[];
};

/* Argument of VFIO_DEVICE_BIND_IOMMUFD (devices opened by their own node). */
struct vfio_device_bind_iommufd {
    __u32 argsz;
    __u32 flags;                /* 0 */
    __s32 iommufd;
    __u32 out_devid;            /* set by the kernel: the device's id in that iommufd */
};

/* Argument of VFIO_DEVICE_ATTACH_IOMMUFD_PT. */
struct vfio_device_attach_iommufd_pt {
    __u32 argsz;
    __u32 flags;                /* 0 */
    __u32 pt_id;                /* an address space or page table of the iommufd; the kernel returns the one attached */
};

/* Argument of VFIO_DEVICE_DETACH_IOMMUFD_PT. */
struct vfio_device_detach_iommufd_pt {
    __u32 argsz;
    __u32 flags;                /* 0 */
};

/* Data of VFIO_DEVICE_FEATURE_MIGRATION. */
struct vfio_device_feature_migration {
    __aligned_u64 flags;        /* VFIO_MIGRATION_* */
};

/* Data of VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE. */
struct vfio_device_feature_mig_state {
    __u32 device_state;         /* VFIO_DEVICE_STATE_* */
    __s32 data_fd;              /* set by the kernel when the new state moves data, else -1 */
};

/* Argument of VFIO_MIG_GET_PRECOPY_INFO, on the descriptor of a migration stream. */
struct vfio_precopy_info {
    __u32 argsz;
    __u32 flags;
    __aligned_u64 initial_bytes;
    __aligned_u64 dirty_bytes;
};

/* Data of VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP. */
struct vfio_device_low_power_entry_with_wakeup {
    __s32 wakeup_eventfd;
    __u32 reserved;
};

/* Data of VFIO_DEVICE_FEATURE_DMA_LOGGING_START. */
struct vfio_device_feature_dma_logging_control {
    __aligned_u64 page_size;    /* bytes wished for a bit; the device may take another */
    __u32 num_ranges;
    __u32 __reserved;
    __aligned_u64 ranges;       /* address of the vfio_device_feature_dma_logging_range array */
};

/* A range of IOVAs whose writes are logged. */
struct vfio_device_feature_dma_logging_range {
    __aligned_u64 iova;         /* bytes */
    __aligned_u64 length;       /* bytes */
};

/* Data of VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT. */
struct vfio_device_feature_dma_logging_report {
    __aligned_u64 iova;         /* bytes */
    __aligned_u64 length;       /* bytes */
    __aligned_u64 page_size;    /* bytes for each bit */
    __aligned_u64 bitmap;       /* address of the bitmap that the kernel adds to */
};

/* Data of VFIO_DEVICE_FEATURE_MIG_DATA_SIZE. */
struct vfio_device_feature_mig_data_size {
    __aligned_u64 stop_copy_length; /* bytes, estimated */
};

/* Data of VFIO_DEVICE_FEATURE_BUS_MASTER (CDX devices). */
struct vfio_device_feature_bus_master {
    __u32 op;                   /* VFIO_DEVICE_FEATURE_CLEAR_MASTER or SET_MASTER */
};

/* Argument of VFIO_IOMMU_GET_INFO (Type1). */
struct vfio_iommu_type1_info {
    __u32 argsz;
    __u32 flags;                /* VFIO_IOMMU_INFO_* */
    __aligned_u64 iova_pgsizes; /* bit n set: pages of 1 << n bytes */
    __u32 cap_offset;           /* first capability, bytes; 0 for none */
    __u32 pad;
};

/* A range of usable IOVAs, both ends included. */
struct vfio_iova_range {
    __u64 start;
    __u64 end;
};

/* VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE: the IOVAs that may be mapped. */
struct vfio_iommu_type1_info_cap_iova_range {
    struct vfio_info_cap_header header;
    __u32 nr_iovas;
    __u32 reserved;
    struct vfio_iova_range iova_ranges[];
};

/* VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION: dirty pages can be logged. */
struct vfio_iommu_type1_info_cap_migration {
    struct vfio_info_cap_header header;
    __u32 flags;
    __u64 pgsize_bitmap;        /* bit n set: a bit of the bitmap may stand for 1 << n bytes */
    __u64 max_dirty_bitmap_size; /* bytes */
};

/* VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL: how many mappings are left. */
struct vfio_iommu_type1_info_dma_avail {
    struct vfio_info_cap_header header;
    __u32 avail;
};

/* Argument of VFIO_IOMMU_MAP_DMA (every IOMMU model). */
struct vfio_iommu_type1_dma_map {
    __u32 argsz;
    __u32 flags;                /* VFIO_DMA_MAP_FLAG_*, as the device sees it */
    __u64 vaddr;                /* address in this process */
    __u64 iova;                 /* address that the device uses */
    __u64 size;                 /* bytes */
};

/* One bit a page: where pages were written to. */
struct vfio_bitmap {
    __u64 pgsize;               /* bytes for each bit */
    __u64 size;                 /* of the bitmap, bytes */
    __u64 *data;
};

/* Argument of VFIO_IOMMU_UNMAP_DMA (every IOMMU model). */
struct vfio_iommu_type1_dma_unmap {
    __u32 argsz;
    __u32 flags;                /* VFIO_DMA_UNMAP_FLAG_*, Type1 only */
    __u64 iova;                 /* address that the device uses */
    __u64 size;                 /* bytes; Type1 returns what it unmapped */
    __u8 data[];                /* a vfio_bitmap with VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP */
};

/* Argument of VFIO_IOMMU_DIRTY_PAGES (Type1). */
struct vfio_iommu_type1_dirty_bitmap {
    __u32 argsz;
    __u32 flags;                /* one of VFIO_IOMMU_DIRTY_PAGES_FLAG_* */
    __u8 data[];                /* a vfio_iommu_type1_dirty_bitmap_get with GET_BITMAP */
};

/* Data of VFIO_IOMMU_DIRTY_PAGES with VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP. */
struct vfio_iommu_type1_dirty_bitmap_get {
    __u64 iova;
    __u64 size;                 /* bytes */
    struct vfio_bitmap bitmap;
};

/* What Dynamic DMA Windows a sPAPR IOMMU can make. */
struct vfio_iommu_spapr_tce_ddw_info {
    __u64 pgsizes;              /* bit n set: TCEs for pages of 1 << n bytes */
    __u32 max_dynamic_windows_supported;
    __u32 levels;               /* most levels that a TCE table may have */
};

/* Argument of VFIO_IOMMU_SPAPR_TCE_GET_INFO. */
struct vfio_iommu_spapr_tce_info {
    __u32 argsz;
    __u32 flags;                /* VFIO_IOMMU_SPAPR_INFO_DDW: ddw is filled in */
    __u32 dma32_window_start;   /* of the default window, an IOVA */
    __u32 dma32_window_size;    /* of the default window, bytes */
    struct vfio_iommu_spapr_tce_ddw_info ddw;
};

/* What VFIO_EEH_PE_INJECT_ERR injects. */
struct vfio_eeh_pe_err {
    __u32 type;                 /* 0 for 32-bit addresses, 1 for 64-bit */
    __u32 func;                 /* EEH error function, 0 to 19 */
    __u64 addr;
    __u64 mask;
};

/* Argument of VFIO_EEH_PE_OP. */
struct vfio_eeh_pe_op {
    __u32 argsz;
    __u32 flags;                /* 0 */
    __u32 op;                   /* VFIO_EEH_PE_*, not one of the states */
    union {
        struct vfio_eeh_pe_err err; /* only for VFIO_EEH_PE_INJECT_ERR */
    };
};

/* Argument of VFIO_IOMMU_SPAPR_REGISTER_MEMORY and VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY. */
struct vfio_iommu_spapr_register_memory {
    __u32 argsz;
    __u32 flags;                /* 0 */
    __u64 vaddr;                /* address in this process */
    __u64 size;                 /* bytes */
};

/* Argument of VFIO_IOMMU_SPAPR_TCE_CREATE: a new DMA window. */
struct vfio_iommu_spapr_tce_create {
    __u32 argsz;
    __u32 flags;                /* 0 */
    __u32 page_shift;           /* TCEs for pages of 1 << page_shift bytes */
    __u32 __resv1;
    __u64 window_size;          /* bytes, a power of two */
    __u32 levels;               /* of the TCE table */
    __u32 __resv2;
    __u64 start_addr;           /* set by the kernel: first IOVA of the window */
};

/* Argument of VFIO_IOMMU_SPAPR_TCE_REMOVE. */
struct vfio_iommu_spapr_tce_remove {
    __u32 argsz;
    __u32 flags;                /* 0 */
    __u64 start_addr;           /* first IOVA of the window */
};
"""

# Calls take more bytes than the struct has: capability chains, and whatever later kernels add. cffi remembers the
# length of an allocation when its struct ends in an array, so each struct with an argsz gets one that takes no room.
ROOM = "__room"

GENERATED = '''"""{what}

Generated from _uapi_build.py by "python -m vfio._uapi_build": change that file, not this one.
"""
'''

_STRUCT = re.compile(r"/\* (?P<doc>[^*]*) \*/\nstruct (?P<name>\w+) \{\n(?P<body>.*?)\n\};\n", re.DOTALL)
_FIELD = re.compile(
    r" +(?P<type>(struct )?\w+) (?P<pointer>\*?)(?P<name>\w+)(?P<array>\[\])?;( +/\* (?P<about>.*) \*/)?"
)


def cdef() -> str:
    """The C text that cffi is given: types, structs, and the room behind each struct with an argsz."""

    def with_room(struct: re.Match[str]) -> str:
        if "argsz;" not in struct["body"] or "[];" in struct["body"]:
            return struct[0]
        return f"struct {struct['name']} {{\n{struct['body']}\n    __u8 {ROOM}[];\n}};\n"

    types = "".join(f"typedef {c} {kernel};\n" for kernel, c in TYPES.items())
    return types + _STRUCT.sub(with_room, STRUCTS)


def cffi_module() -> str:
    """The text of _uapi_cffi.py."""
    ffi = cffi.FFI()
    ffi.cdef(cdef())
    ffi.set_source("vfio._uapi_cffi", None)
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        made = Path(directory) / "made.py"
        ffi.emit_python_code(str(made))
        code = made.read_text()
    code = code.partition("\n")[2]  # cffi's own first line says only that it is generated
    return "# ruff: noqa\n# fmt: off\n" + GENERATED.format(what="Prepared cffi definitions of <linux/vfio.h>.") + code


def structs_module() -> str:
    """The text of _uapi_structs.py."""
    lines = [
        GENERATED.format(what="A class for each struct of <linux/vfio.h>, under the kernel's names."),
        "from __future__ import annotations\n",
        "from vfio._uapi_types import ArrayField, Struct, StructField\n",
        "__all__ = [",
        *sorted(f'    "{struct["name"]}",' for struct in _STRUCT.finditer(STRUCTS)),
        "]",
    ]
    if rest := _STRUCT.sub("", STRUCTS).strip():
        raise ValueError(f"not of the form that this generator reads: {rest}")
    for struct in _STRUCT.finditer(STRUCTS):
        lines += ["", "", f"class {struct['name']}(Struct):", f'    """{struct["doc"]}"""', ""]
        for line in struct["body"].splitlines():
            if field := _FIELD.fullmatch(line):
                about = f"  # {field['about']}" if field["about"] else ""
                lines.append(f"    {field['name']}: {_python_type(field)}{about}")
            elif line.strip() not in ("union {", "};"):  # members of an anonymous union are fields of the struct
                raise ValueError(f"struct {struct['name']}: no field in {line!r}")
    return "\n".join(lines) + "\n"


def _python_type(field: re.Match[str]) -> str:
    """The annotation and default of a field, as type checkers should see it."""
    nested = field["type"].removeprefix("struct ")
    item = nested if nested != field["type"] else "int"
    if field["array"] or field["pointer"]:
        return f"ArrayField[{item}] = ArrayField()"
    return f"StructField[{item}] = StructField()" if item != "int" else "int = 0"


def main(arguments: list[str]) -> int:
    """Write both modules, or with --check only say which is not what would be written (exit status 1)."""
    if arguments not in ([], ["--check"]):
        print("usage: python -m vfio._uapi_build [--check]", file=sys.stderr)
        return 2
    stale = 0
    for name, text in (("_uapi_cffi.py", cffi_module()), ("_uapi_structs.py", structs_module())):
        path = Path(__file__).with_name(name)
        if path.exists() and path.read_text() == text:
            continue
        if arguments:
            print(f"{name} is not what _uapi_build.py describes: run python -m vfio._uapi_build", file=sys.stderr)
            stale = 1
        else:
            path.write_text(text)
            print(f"wrote {path}")
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
