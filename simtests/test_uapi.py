"""The structs of vfio.uapi and the module as a whole; test_uapi_header.py holds the numbers against the real header."""

import fcntl
import gc
import os
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from vfio import uapi


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Structs


def test_new_struct_has_argsz_filled_in_and_zero_elsewhere():
    status = uapi.vfio_group_status()
    assert (status.argsz, status.flags) == (8, 0)
    assert bytes(uapi.buffer(status)) == struct.pack("=II", 8, 0)


def test_new_struct_takes_fields_by_name():
    dma = uapi.vfio_iommu_type1_dma_map(flags=3, vaddr=0x7FFF_0000_0000, iova=1 << 59, size=1 << 20)
    assert bytes(uapi.buffer(dma)) == struct.pack("=IIQQQ", 32, 3, 0x7FFF_0000_0000, 1 << 59, 1 << 20)


def test_argsz_given_is_kept():
    assert uapi.vfio_group_status(argsz=7).argsz == 7


def test_struct_without_argsz_is_all_zero():
    assert bytes(uapi.buffer(uapi.vfio_iova_range())) == bytes(16)


def test_nested_struct_may_be_a_dict():
    info = uapi.vfio_iommu_spapr_tce_info(flags=1, ddw={"pgsizes": 0x11000, "levels": 5})
    assert (info.ddw.pgsizes, info.ddw.max_dynamic_windows_supported, info.ddw.levels) == (0x11000, 0, 5)


def test_nested_struct_may_be_one_made_on_its_own():
    operation = uapi.vfio_eeh_pe_op(op=9, err=uapi.vfio_eeh_pe_err(type=1, func=7, mask=0xFF))
    assert bytes(uapi.buffer(operation)) == struct.pack("=IIIxxxxIIQQ", 40, 0, 9, 1, 7, 0, 0xFF)


def test_nested_struct_may_come_out_of_another_struct():
    operation = uapi.vfio_eeh_pe_op(err={"addr": 5})
    assert uapi.vfio_eeh_pe_op(op=9, err=operation.err).err.addr == 5


def test_members_of_an_anonymous_union_share_their_bytes():
    device = uapi.vfio_pci_dependent_device(group_id=26)
    assert device.devid == 26


def test_unknown_field_raises_type_error_naming_struct_and_field():
    with pytest.raises(TypeError, match=r"struct vfio_group_status has no field flag: did you mean flags\?"):
        uapi.vfio_group_status(flag=1)
    with pytest.raises(TypeError, match=r"struct vfio_group_status has no field zzz: it has argsz, flags$"):
        uapi.vfio_group_status(zzz=1)


def test_unknown_field_of_a_nested_struct_raises_type_error_naming_it():
    with pytest.raises(TypeError, match="struct vfio_eeh_pe_err has no field mode"):
        uapi.vfio_eeh_pe_op(op=9, err={"type": 1, "mode": 1})


def test_unknown_field_of_an_element_raises_type_error():
    with pytest.raises(TypeError, match="an element of the array of struct vfio_pci_hot_reset_info has no such field"):
        uapi.vfio_pci_hot_reset_info(devices=[{"zzz": 1}])
    with pytest.raises(TypeError, match="an element of the array of struct vfio_pci_hot_reset_info has no such field"):
        uapi.vfio_pci_hot_reset_info.sized(20, devices=[{"zzz": 1}])


@pytest.mark.parametrize("value", [-1, 1 << 32])
def test_value_out_of_range_raises_overflow_error(value):
    with pytest.raises(OverflowError):
        uapi.vfio_group_status(flags=value)


def test_isinstance_knows_a_struct_by_its_class():
    irq_set = uapi.vfio_irq_set()
    assert isinstance(irq_set, uapi.vfio_irq_set)
    assert isinstance(irq_set, uapi.Struct)
    assert not isinstance(irq_set, uapi.vfio_irq_info)
    assert not isinstance(b"", uapi.Struct)
    assert isinstance(uapi.vfio_eeh_pe_op().err, uapi.vfio_eeh_pe_err)
    assert uapi.struct_type(irq_set) is uapi.vfio_irq_set


# Room behind a struct


def test_sized_makes_room_and_sets_argsz():
    irq_set = uapi.vfio_irq_set.sized(32, flags=4, count=3)
    irq_set.data[0:12] = struct.pack("=iii", 5, -1, 7)
    assert uapi.sizeof(irq_set) == 32
    assert bytes(uapi.buffer(irq_set)) == struct.pack("=IIIIIiii", 32, 4, 0, 0, 3, 5, -1, 7)


def test_sized_takes_the_content_of_the_array():
    irq_set = uapi.vfio_irq_set.sized(24, data=b"\1\2")
    assert bytes(uapi.buffer(irq_set)) == struct.pack("=IIIII4s", 24, 0, 0, 0, 0, b"\1\2\0\0")


def test_sized_takes_structs_for_the_array():
    info = uapi.vfio_pci_hot_reset_info.sized(28, count=1, devices=[{"group_id": 26, "bus": 1}])
    assert bytes(uapi.buffer(info)) == struct.pack("=IIIIHBB8x", 28, 0, 1, 26, 0, 1, 0)


def test_sized_refuses_content_that_does_not_fit():
    with pytest.raises(ValueError, match="22 bytes of struct vfio_irq_set have room for 2 data, not 3"):
        uapi.vfio_irq_set.sized(22, data=b"\1\2\3")


def test_sized_struct_without_an_array_has_room_for_capabilities():
    info = uapi.vfio_region_info.sized(100, index=2)
    assert info.argsz == len(uapi.buffer(info)) == 100
    assert bytes(uapi.buffer(info)[32:]) == bytes(68)


def test_sized_struct_keeps_its_room_when_the_kernel_raises_argsz():
    info = uapi.vfio_device_info.sized(64)
    info.argsz = 4096
    assert len(uapi.buffer(info)) == 64


def test_sized_room_is_rounded_up_to_whole_elements():
    info = uapi.vfio_pci_hot_reset_info.sized(21)
    assert (info.argsz, len(uapi.buffer(info)), len(info.devices)) == (21, 28, 2)


def test_element_outside_the_room_raises_index_error():
    reset = uapi.vfio_pci_hot_reset.sized(20, count=2, group_fds=[3, 4])
    assert list(reset.group_fds) == [3, 4]
    with pytest.raises(IndexError):
        reset.group_fds[2]


def test_sized_smaller_than_the_struct_raises_value_error():
    with pytest.raises(ValueError, match="struct vfio_irq_set has 20 bytes: 19 are too few"):
        uapi.vfio_irq_set.sized(19)


def test_sized_of_exactly_the_struct_is_the_struct():
    for cls in uapi.STRUCTS.values():
        assert uapi.sizeof(cls.sized(uapi.sizeof(cls))) == uapi.sizeof(cls), cls


def test_sized_of_a_struct_that_nothing_follows_raises_value_error():
    with pytest.raises(ValueError, match="struct vfio_bitmap has 24 bytes and nothing behind them"):
        uapi.vfio_bitmap.sized(25)


def test_array_given_to_a_new_struct_counts_in_argsz():
    assert uapi.vfio_pci_hot_reset(count=2, group_fds=[3, 4]).argsz == 20


# Bytes


def test_buffer_is_the_struct_itself():
    irq_info = uapi.vfio_irq_info()
    uapi.buffer(irq_info)[8:12] = struct.pack("=I", 2)
    assert irq_info.index == 2


def test_buffer_keeps_the_struct_alive():
    buffer = uapi.buffer(uapi.vfio_irq_info(index=0x01020304))
    gc.collect()
    assert struct.unpack_from("=I", buffer, 8) == (0x01020304,)


def test_ioctl_writes_into_the_buffer():
    reader, writer = os.pipe()
    try:
        os.write(writer, b"12345")
        status = uapi.vfio_group_status()
        fcntl.ioctl(reader, termios.FIONREAD, uapi.buffer(status))
        assert (status.argsz, status.flags) == (5, 0)
    finally:
        os.close(reader)
        os.close(writer)


def test_address_is_where_the_fields_are():
    operation = uapi.vfio_eeh_pe_op()
    assert uapi.address(operation.err) == uapi.address(operation) + uapi.offsetof(uapi.vfio_eeh_pe_op, "err")
    assert len(uapi.buffer(operation.err)) == uapi.sizeof(uapi.vfio_eeh_pe_err)


def test_sizeof_and_offsetof():
    assert uapi.sizeof(uapi.vfio_group_status) == 8
    assert uapi.sizeof(uapi.vfio_eeh_pe_op) == 40
    assert uapi.offsetof(uapi.vfio_eeh_pe_op, "err") == 16
    assert uapi.offsetof(uapi.vfio_iommu_spapr_tce_info, "ddw.levels") == 28


def test_offsetof_an_unknown_field_raises_type_error_naming_it():
    with pytest.raises(TypeError, match="struct vfio_group_status has no field flag"):
        uapi.offsetof(uapi.vfio_group_status, "flag")
    with pytest.raises(TypeError, match="struct vfio_iommu_spapr_tce_ddw_info has no field level"):
        uapi.offsetof(uapi.vfio_iommu_spapr_tce_info, "ddw.level")


def test_from_buffer_sees_and_changes_the_bytes():
    info = uapi.vfio_device_info.sized(40)
    header = uapi.from_buffer(uapi.vfio_info_cap_header, uapi.buffer(info), 24)
    header.id, header.next = 5, 32
    assert bytes(uapi.buffer(info)[24:]) == struct.pack("=HHI8x", 5, 0, 32)


def test_from_buffer_reads_read_only_bytes():
    status = uapi.from_buffer(uapi.vfio_group_status, struct.pack("=xIIx", 8, 3), 1)
    assert (status.argsz, status.flags) == (8, 3)


def test_from_buffer_keeps_the_buffer_alive():
    header = uapi.from_buffer(uapi.vfio_info_cap_header, bytearray(struct.pack("=HHI", 1, 2, 3)))
    gc.collect()
    assert (header.id, header.version, header.next) == (1, 2, 3)


@pytest.mark.parametrize("offset", [-1, 1, 8, 1 << 40])
def test_from_buffer_past_the_end_raises_value_error(offset):
    with pytest.raises(ValueError, match=f"none at offset {offset} of a buffer of 8 bytes"):
        uapi.from_buffer(uapi.vfio_group_status, bytes(8), offset)


def test_from_buffer_of_too_few_bytes_raises_value_error():
    with pytest.raises(
        ValueError, match="struct vfio_group_status has 8 bytes: none at offset 0 of a buffer of 7 bytes"
    ):
        uapi.from_buffer(uapi.vfio_group_status, bytes(7))


def test_array_from_buffer_sees_each_element():
    areas = uapi.array_from_buffer(uapi.vfio_region_sparse_mmap_area, struct.pack("=QQQQQ", 9, 1, 2, 3, 4), 8, 2)
    assert [(area.offset, area.size) for area in areas] == [(1, 2), (3, 4)]
    assert uapi.array_from_buffer(uapi.vfio_iova_range, b"", 0, 0) == []


@pytest.mark.parametrize(("offset", "count"), [(8, 2), (0, 3), (-8, 1), (33, 0), (0, -1)])
def test_array_from_buffer_past_the_end_raises_value_error(offset, count):
    with pytest.raises(ValueError, match="struct vfio_iova_range"):
        uapi.array_from_buffer(uapi.vfio_iova_range, bytes(32), offset, count)


# Fields


def test_fields_take_nested_structs_apart():
    assert [tuple(field) for field in uapi.fields(uapi.vfio_iommu_spapr_tce_info)] == [
        ("argsz", 0, 4, "u32"),
        ("flags", 4, 4, "u32"),
        ("dma32_window_start", 8, 4, "u32"),
        ("dma32_window_size", 12, 4, "u32"),
        ("ddw.pgsizes", 16, 8, "u64"),
        ("ddw.max_dynamic_windows_supported", 24, 4, "u32"),
        ("ddw.levels", 28, 4, "u32"),
    ]


def test_fields_name_every_member_of_a_union_and_the_elements_of_an_array():
    assert [tuple(field) for field in uapi.fields(uapi.vfio_pci_dependent_device)] == [
        ("group_id", 0, 4, "u32"),
        ("devid", 0, 4, "u32"),
        ("segment", 4, 2, "u16"),
        ("bus", 6, 1, "u8"),
        ("devfn", 7, 1, "u8"),
    ]
    assert uapi.fields(uapi.vfio_pci_hot_reset_info)[-1] == ("devices", 12, 0, "vfio_pci_dependent_device[]")
    assert uapi.fields(uapi.vfio_pci_hot_reset)[-1] == ("group_fds", 12, 0, "s32[]")
    assert uapi.fields(uapi.vfio_bitmap)[-1] == ("data", 16, 8, "pointer")


def test_room_behind_a_struct_is_not_a_field():
    assert [field.name for field in uapi.fields(uapi.vfio_group_status)] == ["argsz", "flags"]


# The module


def test_import_needs_no_c_parser():
    modules = run_python("import sys; from vfio import uapi; print(*sys.modules)").split()
    assert "_cffi_backend" in modules
    assert "vfio._uapi_build" not in modules
    assert not {"cffi", "pycparser"} & set(modules)


def test_import_needs_nothing_of_cffi_but_its_backend():
    hidden = "import sys; sys.modules['cffi'] = sys.modules['pycparser'] = None"
    assert run_python(f"{hidden}; from vfio import uapi; print(uapi.VFIO_BASE)") == "100\n"


def test_generated_modules_are_what_the_c_text_describes():
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "vfio/_uapi_build.py", "--check"], capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stderr) == (0, "")


def test_check_names_the_generated_module_that_is_stale(tmp_path):
    root = Path(__file__).parent.parent
    for name in ("_uapi_build.py", "_uapi_cffi.py", "_uapi_structs.py"):
        text = (root / "vfio" / name).read_text()
        (tmp_path / name).write_text(text.replace("__u32 num_irqs;", "__u64 num_irqs;"))
    done = subprocess.run([sys.executable, "_uapi_build.py", "--check"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "_uapi_cffi.py is not what _uapi_build.py describes: run python -m vfio._uapi_build\n"


def test_every_public_name_is_one_of_the_kernels_or_documented():
    for name, value in vars(uapi).items():
        if not name.startswith(("_", "VFIO_")):
            assert isinstance(value, dict) or value.__doc__, name
