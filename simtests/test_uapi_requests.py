"""Request numbers of vfio.uapi on each machine, and the way from numbers back to the kernel's names."""

import os

import ioctl_opt
import pytest

from vfio import uapi

GENERIC = ["x86_64", "i686", "aarch64", "arm64", "armv7l", "riscv64", "s390x", "loongarch64"]
POWERPC = ["ppc64le", "ppc64", "ppc", "ppc64el", "powerpc64le", "mips64", "sparc64", "alpha"]


# Numbers


def test_vfio_base_is_100_and_the_type_a_semicolon():
    assert (uapi.VFIO_BASE, uapi.VFIO_TYPE) == (100, 0x3B)


@pytest.mark.parametrize("machine", GENERIC)
def test_generic_encoding_has_no_direction_bits(machine):
    assert uapi.request("VFIO_GET_API_VERSION", machine) == 0x3B64
    assert uapi.request("VFIO_EEH_PE_OP", machine) == 0x3B79


@pytest.mark.parametrize("machine", POWERPC)
def test_powerpc_encoding_says_none_in_bit_29(machine):
    assert uapi.request("VFIO_GET_API_VERSION", machine) == 0x20003B64
    assert uapi.request("VFIO_EEH_PE_OP", machine) == 0x20003B79


def test_encode_moves_size_and_direction():
    assert uapi.encode(0x80086601, "ppc64le") == 0x40086601  # FS_IOC_GETFLAGS, _IOR('f', 1, long)
    assert uapi.encode(0x40086602, "ppc64le") == 0x80086602  # FS_IOC_SETFLAGS, _IOW('f', 2, long)
    assert uapi.encode(0xC0185879, "ppc64le") == 0xC0185879  # FITRIM, _IOWR('X', 121, 24 bytes)
    assert uapi.encode(0x80086601, "x86_64") == 0x80086601


def test_encode_refuses_a_size_that_powerpc_cannot_say():
    number = ioctl_opt.IOC(ioctl_opt.IOC_READ, ord("f"), 1, 1 << 13)
    with pytest.raises(ValueError, match="8192 bytes does not fit in 13 bits"):
        uapi.encode(number, "ppc64le")


def test_constants_are_the_numbers_of_this_machine():
    for name in uapi.REQUESTS:
        assert getattr(uapi, name) == uapi.request(name) == uapi.request(name, os.uname().machine), name


def test_unknown_machine_raises_value_error_listing_the_known():
    with pytest.raises(ValueError, match=r"machine 'pdp11'; known are .*\bppc64le\b.*\bx86_64\b"):
        uapi.request("VFIO_IOMMU_MAP_DMA", "pdp11")


@pytest.mark.parametrize("ask", [uapi.request, uapi.request_info, uapi.argument])
def test_unknown_request_raises_key_error_with_what_is_spelt_like_it(ask):
    with pytest.raises(KeyError) as raised:
        ask("VFIO_IOMMU_MAP_DMAA")
    assert str(raised.value).startswith(
        "no VFIO request is called VFIO_IOMMU_MAP_DMAA: did you mean VFIO_IOMMU_MAP_DMA"
    )


def test_unknown_request_like_no_other_says_only_that():
    with pytest.raises(KeyError) as raised:
        uapi.request("zzz")
    assert str(raised.value) == "no VFIO request is called zzz"


@pytest.mark.parametrize("machine", ["x86_64", "ppc64le"])
def test_number_shared_by_requests_gives_all_their_names(machine):
    number = uapi.request("VFIO_IOMMU_GET_INFO", machine)
    assert set(uapi.request_names(number, machine)) == {
        "VFIO_IOMMU_GET_INFO",
        "VFIO_IOMMU_SPAPR_TCE_GET_INFO",
        "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO",
    }
    assert uapi.request_names(number, machine, file="device") == ("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO",)
    assert uapi.request_names(number, machine, file="container", iommu="spapr") == ("VFIO_IOMMU_SPAPR_TCE_GET_INFO",)
    assert uapi.request_names(number, machine, file="container", iommu="type1") == ("VFIO_IOMMU_GET_INFO",)


def test_file_and_iommu_model_leave_one_name_for_each_number():
    for name, known in uapi.REQUESTS.items():
        for iommu in known.iommu or ("type1", "spapr"):
            assert uapi.request_names(uapi.request(name), file=known.file, iommu=iommu) == (name,)


@pytest.mark.parametrize("number", [0, 0x3B63, 0x3B7A, 0x20003B63, 0x20003B7A, 0xC0103B64])
def test_number_of_no_request_has_no_names(number):
    assert uapi.request_names(number) == ()


def test_number_of_another_machine_has_no_names():
    assert uapi.request_names(0x3B71, "ppc64le") == ()
    assert uapi.request_names(0x20003B71, "x86_64") == ()


def test_argument_is_the_struct_or_none():
    assert uapi.argument("VFIO_IOMMU_SPAPR_TCE_CREATE") is uapi.vfio_iommu_spapr_tce_create
    assert uapi.argument("VFIO_SET_IOMMU") is None
    assert uapi.argument("VFIO_IOMMU_ENABLE") is None


def test_request_info_says_which_file_and_what_argument():
    assert uapi.request_info("VFIO_CHECK_EXTENSION")[2:] == ("container", None, "value", ())
    assert uapi.request_info("VFIO_GROUP_SET_CONTAINER")[2:] == ("group", None, "int*", ())
    assert uapi.request_info("VFIO_GROUP_GET_DEVICE_FD")[2:] == ("group", None, "string", ())
    assert uapi.request_info("VFIO_DEVICE_RESET")[2:] == ("device", None, "nothing", ())
    assert uapi.request_info("VFIO_MIG_GET_PRECOPY_INFO").file == "migration"
    assert uapi.request_info("VFIO_IOMMU_MAP_DMA").iommu == ("type1", "spapr")
    assert uapi.request_info("VFIO_EEH_PE_OP").iommu == ("spapr",)


def test_every_request_with_a_struct_has_an_argsz_in_it():
    for request in uapi.REQUESTS.values():
        assert (request.takes == "struct") == (request.argument is not None)
        if request.argument:
            assert uapi.fields(request.argument)[0] == ("argsz", 0, 4, "u32"), request.name


# Names for values


@pytest.mark.parametrize(
    ("what", "value", "names"),
    [
        ("VFIO_GROUP_GET_STATUS", 3, ("VFIO_GROUP_FLAGS_VIABLE", "VFIO_GROUP_FLAGS_CONTAINER_SET")),
        (uapi.vfio_device_info, 0x82, ("VFIO_DEVICE_FLAGS_PCI", "VFIO_DEVICE_FLAGS_CAPS")),
        (uapi.vfio_region_info(), 5, ("VFIO_REGION_INFO_FLAG_READ", "VFIO_REGION_INFO_FLAG_MMAP")),
        (uapi.vfio_irq_info, 9, ("VFIO_IRQ_INFO_EVENTFD", "VFIO_IRQ_INFO_NORESIZE")),
        ("VFIO_DEVICE_SET_IRQS", 0x24, ("VFIO_IRQ_SET_DATA_EVENTFD", "VFIO_IRQ_SET_ACTION_TRIGGER")),
        ("VFIO_IOMMU_MAP_DMA", 3, ("VFIO_DMA_MAP_FLAG_READ", "VFIO_DMA_MAP_FLAG_WRITE")),
        ("VFIO_IOMMU_UNMAP_DMA", 2, ("VFIO_DMA_UNMAP_FLAG_ALL",)),
        ("VFIO_IOMMU_SPAPR_TCE_GET_INFO", 1, ("VFIO_IOMMU_SPAPR_INFO_DDW",)),
        ("VFIO_IOMMU_GET_INFO", 3, ("VFIO_IOMMU_INFO_PGSIZES", "VFIO_IOMMU_INFO_CAPS")),
        ("VFIO_IOMMU_DIRTY_PAGES", 4, ("VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP",)),
        ("VFIO_DEVICE_IOEVENTFD", 4, ("VFIO_DEVICE_IOEVENTFD_32",)),
        (
            "VFIO_DEVICE_FEATURE",
            0x50001,
            ("VFIO_DEVICE_FEATURE_MIGRATION", "VFIO_DEVICE_FEATURE_GET", "VFIO_DEVICE_FEATURE_PROBE"),
        ),
        ("VFIO_DEVICE_FEATURE", 0x20000, ("VFIO_DEVICE_FEATURE_PCI_VF_TOKEN", "VFIO_DEVICE_FEATURE_SET")),
        (uapi.vfio_iommu_spapr_tce_create, 0, ()),
        (uapi.vfio_iommu_spapr_tce_create, 6, ("0x6",)),
        ("VFIO_DEVICE_RESET", 0, ()),
    ],
)
def test_flags_are_named_as_the_kernel_does(what, value, names):
    assert uapi.flag_names(what, value) == names


def test_short_flag_names_leave_out_what_all_begin_with():
    assert uapi.flag_names("VFIO_IOMMU_MAP_DMA", 3, short=True) == ("READ", "WRITE")
    assert uapi.flag_names("VFIO_DEVICE_FEATURE", 0x10002, short=True) == ("MIG_DEVICE_STATE", "GET")


def test_flags_without_a_name_come_last_in_hexadecimal():
    assert uapi.flag_names("VFIO_IOMMU_MAP_DMA", 0x80000101) == ("VFIO_DMA_MAP_FLAG_READ", "0x80000100")
    assert uapi.flag_names("VFIO_DEVICE_FEATURE", 0x8FFFF) == ("65535", "0x80000")


def test_flag_names_of_an_unknown_request_raise_key_error():
    with pytest.raises(KeyError, match="VFIO_IOMMU_MAP"):
        uapi.flag_names("VFIO_IOMMU_MAP", 1)


def test_extensions_have_the_names_of_the_header():
    assert [uapi.extension_name(value) for value in range(12)] == [
        "0",
        "VFIO_TYPE1_IOMMU",
        "VFIO_SPAPR_TCE_IOMMU",
        "VFIO_TYPE1v2_IOMMU",
        "VFIO_DMA_CC_IOMMU",
        "VFIO_EEH",
        "VFIO_TYPE1_NESTING_IOMMU",
        "VFIO_SPAPR_TCE_v2_IOMMU",
        "VFIO_NOIOMMU_IOMMU",
        "VFIO_UNMAP_ALL",
        "VFIO_UPDATE_VADDR",
        "11",
    ]


def test_eeh_operations_and_states_are_told_apart():
    assert uapi.eeh_op_name(4) == "VFIO_EEH_PE_GET_STATE"
    assert uapi.eeh_state_name(4) == "VFIO_EEH_PE_STATE_STOPPED_DMA"
    assert [uapi.eeh_op_name(value) for value in (0, 9, 10)] == ["VFIO_EEH_PE_DISABLE", "VFIO_EEH_PE_INJECT_ERR", "10"]
    assert [uapi.eeh_state_name(value) for value in (0, 3, 5)] == [
        "VFIO_EEH_PE_STATE_NORMAL",
        "3",
        "VFIO_EEH_PE_STATE_UNAVAIL",
    ]


def test_pci_regions_and_interrupts_have_names():
    assert [uapi.region_name(index) for index in (0, 5, 6, 7, 8, 9)] == [
        "VFIO_PCI_BAR0_REGION_INDEX",
        "VFIO_PCI_BAR5_REGION_INDEX",
        "VFIO_PCI_ROM_REGION_INDEX",
        "VFIO_PCI_CONFIG_REGION_INDEX",
        "VFIO_PCI_VGA_REGION_INDEX",
        "9",
    ]
    assert [uapi.irq_name(index) for index in (0, 2, 4, 5)] == [
        "VFIO_PCI_INTX_IRQ_INDEX",
        "VFIO_PCI_MSIX_IRQ_INDEX",
        "VFIO_PCI_REQ_IRQ_INDEX",
        "5",
    ]


def test_features_have_names():
    assert [uapi.feature_name(value) for value in (0, 3, 10, 11)] == [
        "VFIO_DEVICE_FEATURE_PCI_VF_TOKEN",
        "VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY",
        "VFIO_DEVICE_FEATURE_BUS_MASTER",
        "11",
    ]


@pytest.mark.parametrize(
    ("struct_class", "field", "value", "name"),
    [
        (uapi.vfio_eeh_pe_op, "op", 6, "VFIO_EEH_PE_RESET_HOT"),
        (uapi.vfio_eeh_pe_op(), "op", 99, None),
        (uapi.vfio_region_info, "index", 7, "VFIO_PCI_CONFIG_REGION_INDEX"),
        (uapi.vfio_irq_set, "index", 1, "VFIO_PCI_MSI_IRQ_INDEX"),
        (uapi.vfio_irq_set, "start", 1, None),
        (uapi.vfio_device_feature_mig_state, "device_state", 0, "VFIO_DEVICE_STATE_ERROR"),
        (uapi.vfio_device_feature_mig_state, "device_state", 7, "VFIO_DEVICE_STATE_PRE_COPY_P2P"),
        (uapi.vfio_device_feature_mig_state, "device_state", 8, None),
        (uapi.vfio_device_feature_bus_master, "op", 1, "VFIO_DEVICE_FEATURE_SET_MASTER"),
        (uapi.vfio_region_info_cap_type, "type", 2, "VFIO_REGION_TYPE_CCW"),
        (uapi.vfio_region_gfx_edid, "link_state", 2, "VFIO_DEVICE_GFX_LINK_STATE_DOWN"),
    ],
)
def test_value_of_a_field_has_the_name_of_the_header(struct_class, field, value, name):
    assert uapi.value_name(struct_class, field, value) == name
