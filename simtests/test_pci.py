"""Configuration space, decoded from bytes: fields by name, capabilities, and lists that lie."""

from __future__ import annotations

import errno

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vfio import errors, pci
from vfio.fake.devices.endpoint import Endpoint
from vfio.fake.registers import ConfigRegisters
from vfio.topology import Device


@pytest.fixture
def registers() -> ConfigRegisters:
    """An endpoint with every capability that has a class."""
    found = ConfigRegisters(4096)
    found.field(0x00, 4, 0x123410DE)
    found.field(0x2C, 4, 0xBEEFCAFE)
    found.field(0x10, 4, 0xF000000C)
    found.field(0x14, 4, 0x00000012)
    found.field(0x18, 4, 0x0000E001)
    found.field(0x24, 4, 0xFEBF0000)
    found.add_capability(0x09, 0xE0, 8)
    found.field(0xE2, 6, 0x0102030408)
    found.add_capability(0x03, 0xD0, 8)
    found.field(0xD2, 2, 0x8010)
    found.field(0xD4, 4, 0x11223344)
    found.add_msix(0xC0, vectors=65, bar=4, table=0x2000, pba=0x3008)
    found.add_express(0x60, flr=True)
    found.field(0x68, 2, 0x2936)
    found.field(0x6A, 2, 0x0009)
    found.add_msi(0xA0, vectors=8, maskable=True)
    found.field(0xA4, 4, 0xFEE00000)
    found.field(0xA8, 4, 0x5)
    found.field(0xAC, 2, 0x4021)
    found.add_pm(0x50, capabilities=0xC803, control=0x8103)
    found.add_aer(0x100)
    found.field(0x104, 4, 1 << 12 | 1 << 20)
    found.field(0x11C, 16, 0x00000004_00000003_00000002_40000001)
    found.add_extended(0x03, 1, 0x150, 12)
    found.field(0x154, 8, 0x0011223344556677)
    found.add_extended(0x0B, 2, 0x160, 16)
    found.field(0x164, 4, 0x01030042)
    return found


@pytest.fixture
def config(registers: ConfigRegisters) -> pci.ConfigSpace:
    return pci.ConfigSpace(bytes(registers.value))


def cut(registers: ConfigRegisters, size: int) -> pci.ConfigSpace:
    return pci.ConfigSpace(bytes(registers.value[:size]))


# --- The header ---


def test_header_of_a_function(config):
    assert (config.vendor, config.device) == (0x10DE, 0x1234)
    assert isinstance(config.header, pci.FunctionHeader)
    assert (config.header.subsystem_vendor, config.header.subsystem_device) == (0xCAFE, 0xBEEF)
    assert config.header_type.layout == 0
    assert not config.header_type.multifunction


def test_bars_tell_kind_address_and_width(config):
    assert config.bars == [
        pci.Bar(0, 0x12_F0000000, io=False, bits64=True, prefetchable=True),
        pci.Bar(2, 0xE000, io=True, bits64=False, prefetchable=False),
        pci.Bar(5, 0xFEBF0000, io=False, bits64=False, prefetchable=False),
    ]
    assert list(map(str, config.bars)) == [
        "64-bit memory at 0x12f0000000, prefetchable",
        "I/O at 0xe000",
        "32-bit memory at 0xfebf0000",
    ]


def test_last_bar_that_claims_a_second_half_has_none(registers):
    registers.field(0x24, 4, 0xFEBF0004)
    assert cut(registers, 256).bars[-1] == pci.Bar(5, 0xFEBF0000, io=False, bits64=True, prefetchable=False)


def test_header_of_a_bridge(registers):
    registers.field(0x0E, 1, 0x81)
    registers.field(0x18, 3, 0x050302)
    registers.field(0x1E, 2, 0x2000)
    registers.field(0x3E, 2, 0x0042)
    config = cut(registers, 256)
    bridge = config.header
    assert isinstance(bridge, pci.BridgeHeader)
    assert (bridge.primary_bus, bridge.secondary_bus, bridge.subordinate_bus) == (2, 3, 5)
    assert bridge.secondary_status.received_master_abort
    assert (bridge.bridge_control.bus_reset, bridge.bridge_control.serr) == (True, True)
    assert [bar.number for bar in config.bars] == [0]
    assert "header of a bridge" in str(config)


def test_header_of_an_unknown_layout_shows_what_all_have(registers):
    registers.field(0x0E, 1, 0x05)
    config = cut(registers, 256)
    assert config.bars == []
    assert "bar0" not in config.header.as_dict()
    assert config.header.as_dict()["vendor"] == 0x10DE


# --- Capabilities ---


def test_capabilities_come_in_the_order_of_their_lists(config):
    assert [(each.name, each.offset) for each in config.capabilities] == [
        ("PM", 0x50),
        ("MSI", 0xA0),
        ("PCI Express", 0x60),
        ("MSI-X", 0xC0),
        ("VPD", 0xD0),
        ("vendor", 0xE0),
        ("AER", 0x100),
        ("serial number", 0x150),
        ("vendor", 0x160),
    ]
    assert config.faults == []


def test_power_management(config):
    found = config[pci.PowerManagement]
    assert found.control.state == 3
    assert found.control.pme_enable
    assert found.control.pme_status
    assert (found.capabilities.version, found.capabilities.pme_d3hot, found.capabilities.d1) == (3, True, False)
    assert "state D3hot" in str(found.control)


def test_msi_has_its_data_where_the_width_of_its_addresses_puts_it(config, registers):
    found = config[pci.Msi]
    assert (found.vectors, found.address, found.data) == (8, 0x5_FEE00000, 0x4021)
    registers.field(0xA2, 2, 0x0006)  # 32 bits, not maskable
    registers.field(0xA8, 2, 0x4022)
    found = cut(registers, 256)[pci.Msi]
    assert (found.address, found.data, found.mask, found.pending) == (0xFEE00000, 0x4022, None, None)
    assert set(found.as_dict()) == {"control", "address_low", "data"}


def test_msix_tells_vectors_and_where_its_table_is(config):
    found = config[pci.Msix]
    assert found.vectors == 65
    assert found.table_location == pci.Location(4, 0x2000)
    assert found.pending_location == pci.Location(4, 0x3008)
    assert (found.control.enable, found.control.mask_all) == (False, False)


def test_express_of_an_endpoint_has_neither_slot_nor_root(config, registers):
    found = config[pci.Express]
    assert found.device_capabilities.function_reset
    assert str(found.device_control) == (
        "report non fatal, report fatal, relaxed ordering, max payload 256 bytes, extended tag, no snoop, "
        "max read request 512 bytes"
    )
    assert found.device_status.correctable_error
    assert found.device_status.unsupported_request
    assert not {name for name, _ in found.present() if name.startswith(("slot", "root"))}
    assert "device_control_2" in found.as_dict()
    registers.field(0x62, 2, 0x0001)  # version 1
    assert "device_control_2" not in cut(registers, 256)[pci.Express].as_dict()


def test_express_of_a_root_port_with_a_slot(registers):
    registers.field(0x62, 2, 0x0142)
    found = cut(registers, 256)[pci.Express].as_dict()
    assert {"slot_capabilities", "slot_status", "root_control", "root_status"} <= set(found)


def test_errors_and_the_packet_that_failed(config):
    found = config[pci.AdvancedErrors]
    assert str(found.uncorrectable_status) == "poisoned packet, unsupported request"
    assert found.uncorrectable_severity.flow_control
    assert found.header_log == (0x40000001, 2, 3, 4)
    assert found.version == 2


@pytest.mark.parametrize(("port", "at_root"), [(0, False), (4, True), (5, False), (6, False), (10, True)])
def test_messages_of_errors_are_told_where_they_end(registers, port, at_root):
    registers.add_express(0x60, port=port)
    found = cut(registers, 4096)[pci.AdvancedErrors]
    names = {name for name in found.as_dict() if name.startswith("root")}
    wanted = {"root_command", "root_status", "root_correctable_source", "root_uncorrectable_source"}
    assert names == (wanted if at_root else set())


def test_errors_at_a_root_port_tell_what_came_and_from_whom(registers):
    registers.add_express(0x60, port=4)
    registers.field(0x12C, 4, 0x00000006)
    registers.field(0x130, 4, 0x0800_0055)
    registers.field(0x134, 4, 0x0512_01A3)
    image = pci.Image(bytes(registers.value))
    config = pci.ConfigSpace(image)
    found = config[pci.AdvancedErrors]
    command, status = found.root_command, found.root_status
    assert (command.correctable, command.non_fatal, command.fatal) == (False, True, True)
    assert (status.correctable, status.several_correctable, status.uncorrectable) == (True, False, True)
    assert (status.several_uncorrectable, status.first_uncorrectable_fatal) == (False, True)
    assert (status.non_fatal, status.fatal, status.message_number) == (False, True, 1)
    assert str(found.root_correctable_source) == "01:14.3"
    assert str(found.root_uncorrectable_source) == "05:02.2"
    lines = str(config).splitlines()
    assert "  12c  root command                0x00000006  non fatal, fatal" in lines
    assert "  136  root uncorrectable source   0x0512      05:02.2" in lines
    assert status.clear() == 0x55
    assert image.data[0x130:0x134] == bytes.fromhex("55000008")  # ones are written: the device clears them
    command.correctable = True
    assert image.data[0x12C] == 7


def test_root_registers_need_the_express_capability_to_be_there(registers):
    registers.field(0x34, 1, 0xFC)
    registers.field(0xFC, 2, 0x0010)  # a capability of PCI Express that ends before its type
    config = pci.ConfigSpace(bytes(registers.value[:0xFE]) + bytes(2) + bytes(registers.value[0x100:]))
    assert "root_status" not in config[pci.AdvancedErrors].as_dict()
    registers.field(0x34, 1, 0)
    assert "root_status" not in cut(registers, 4096)[pci.AdvancedErrors].as_dict()


@pytest.fixture
def virtual(registers):
    """SR-IOV as of an Intel 82576: eight virtual functions, two enabled, every second one from 384 on."""
    registers.add_extended(0x10, 1, 0x180, 0x40)
    registers.field(0x184, 4, 0x00600002)
    registers.field(0x188, 2, 0x0019)
    registers.field(0x18C, 4, 0x0008_0007)
    registers.field(0x190, 4, 0x01_0002)
    registers.field(0x194, 4, 0x0002_0180)
    registers.field(0x19A, 2, 0x10CA)
    registers.field(0x19C, 4, 0x553)
    registers.field(0x1A0, 4, 0x010)
    registers.field(0x1A4, 4, 0xC204_000C)
    registers.field(0x1A8, 4, 0x0000_0001)
    registers.field(0x1B0, 4, 0xFEB0_0000)
    registers.field(0x1BC, 4, 0x0000_200B)
    return pci.ConfigSpace(pci.Image(bytes(registers.value)))


def test_virtual_functions_and_where_they_are(virtual):
    found = virtual[pci.SrIov]
    assert (found.name, found.offset, found.version) == ("SR-IOV", 0x180, 1)
    assert (found.capabilities.migration, found.capabilities.ari_preserved) == (False, True)
    assert found.capabilities.migration_message_number == 3
    control = found.control
    assert (control.enable, control.migration, control.migration_interrupt) == (True, False, False)
    assert (control.memory, control.ari, control.tag_10_bit_requester) == (True, True, False)
    assert (found.initial_functions, found.total_functions, found.functions, found.dependency_link) == (7, 8, 2, 1)
    assert (found.first_offset, found.stride, found.function_device) == (0x180, 2, 0x10CA)
    assert found.page_sizes == [4096, 8192, 65536, 262144, 1 << 20, 1 << 22]
    assert found.page_size == 65536
    assert found.bars == [
        pci.Bar(0, 0x1_C204_0000, io=False, bits64=True, prefetchable=True),
        pci.Bar(3, 0xFEB0_0000, io=False, bits64=False, prefetchable=False),
    ]
    assert str(found.migration_state) == "BAR3 at 0x2008"


def test_virtual_functions_have_routing_ids_of_their_own(virtual):
    found = virtual[pci.SrIov]
    assert [found.routing_id(0x0100, n) for n in range(2)] == [0x0280, 0x0282]
    for number in (-1, 2):
        with pytest.raises(IndexError, match="there are 2"):
            found.routing_id(0x0100, number)


def test_what_can_be_set_of_virtual_functions(virtual):
    found, data = virtual[pci.SrIov], virtual.source.data
    found.functions = 5
    found.system_page_size = 1
    found.control.enable = False
    assert (data[0x190:0x192], data[0x1A0:0x1A4], data[0x188:0x18A]) == (b"\5\0", b"\1\0\0\0", b"\x18\0")
    for name in ("total_functions", "stride", "bar0"):
        with pytest.raises(AttributeError, match="read-only"):
            setattr(found, name, 1)
    with pytest.raises(AttributeError, match="read-only"):
        found.capabilities.ari_preserved = True
    found.system_page_size = 0
    assert found.page_size == 0


def test_vendor_capabilities_give_their_bytes(config, registers):
    assert config[pci.Vendor].data == bytes([0x09, 0x00, 0x08, 0x04, 0x03, 0x02, 0x01, 0x00])
    extended = config[pci.ExtendedVendor]
    assert (extended.header.id, extended.header.revision, extended.header.length) == (0x42, 3, 0x10)
    for length, there in ((0, 3), (1, 3), (0xFF, 0x20)):  # lies
        registers.field(0xE2, 1, length)
        assert len(cut(registers, 4096)[pci.Vendor].data) == there


def test_vital_product_data_and_serial_number(config):
    assert (config[pci.VitalProductData].address.address, config[pci.VitalProductData].address.flag) == (0x10, True)
    assert config[pci.VitalProductData].data == 0x11223344
    assert config[pci.SerialNumber].serial == 0x0011223344556677


def test_capability_that_is_not_there_is_none_or_an_error_that_tells_which_are(config):
    assert config.find(pci.AdvancedFeatures) is None
    with pytest.raises(errors.NoCapability, match=r"there are PM, MSI, PCI Express") as caught:
        config[pci.AdvancedFeatures]
    assert caught.value.errno == errno.ENOENT


# --- Writing ---


def test_setting_a_field_leaves_its_neighbours(config):
    config.command.value = 0x0103
    config.command.bus_master = True
    assert config.command.value == 0x0107
    config.command.io = False
    assert config.command.value == 0x0106
    config[pci.Express].device_control.max_read_request = 5
    assert config[pci.Express].device_control.value == 0x5936


def test_setting_a_field_does_not_clear_the_events_beside_it(registers):
    writes = []

    class Spy(pci.Image):
        def write(self, offset, data):
            writes.append((offset, data))

    config = pci.ConfigSpace(Spy(bytes(registers.value)))
    config[pci.PowerManagement].control.state = 0
    assert writes == [(0x54, b"\x00\x01")]  # PME enable is kept, PME status is not written back as a one


def test_events_are_cleared_by_writing_what_was_read(registers):
    writes = []

    class Spy(pci.Image):
        def write(self, offset, data):
            writes.append((offset, data))

    config = pci.ConfigSpace(Spy(bytes(registers.value)))
    assert config[pci.AdvancedErrors].uncorrectable_status.clear() == 1 << 12 | 1 << 20
    assert writes == [(0x104, b"\x00\x10\x10\x00")]
    with pytest.raises(AttributeError, match=r"uncorrectable_status.clear\(\)"):
        config[pci.AdvancedErrors].uncorrectable_status.poisoned_packet = False
    with pytest.raises(AttributeError, match="nothing that can be cleared"):
        config.command.clear()


def test_what_cannot_be_set_is_refused_by_name(config):
    with pytest.raises(AttributeError, match="vendor is read-only"):
        config.vendor = 1
    with pytest.raises(AttributeError, match="device_capabilities is read-only"):
        config[pci.Express].device_capabilities.max_payload = 1
    with pytest.raises(AttributeError, match="set a field of command"):
        config.command = 7
    with pytest.raises(ValueError, match="max_payload of device_control: 8 is not 0 to 7"):
        config[pci.Express].device_control.max_payload = 8
    with pytest.raises(OverflowError):
        config.command.value = 0x10000


def test_register_behind_the_end_of_a_copy_is_refused(registers):
    config = cut(registers, 64)
    with pytest.raises(errors.OutsideRegion, match="too short"):
        pci.PowerManagement(config.source, 0x50, 1).control.state  # noqa: B018


# --- Lists that lie ---


def test_header_alone_has_no_capabilities_and_is_no_fault(registers):
    config = cut(registers, 64)
    assert config.cut
    assert (config.capabilities, config.faults) == ([], [])
    with pytest.raises(errors.NoCapability, match="only the header could be read"):
        config[pci.Msi]


def test_list_without_the_status_bit_is_not_followed(registers):
    registers.field(0x06, 2, 0)
    assert cut(registers, 256).capabilities == []


def test_list_in_a_circle_ends_where_it_began(registers):
    registers.field(0xE1, 1, 0x60)
    config = cut(registers, 256)
    assert [each.offset for each in config.capabilities] == [0x50, 0xA0, 0x60, 0xC0, 0xD0, 0xE0]
    assert config.faults == ["the list of capabilities runs in a circle, back to 0x60"]


def test_list_into_the_header_ends_there(registers):
    registers.field(0xE1, 1, 0x10)
    assert cut(registers, 256).faults == ["the list of capabilities leads into the header, to 0x10"]


def test_low_bits_of_pointers_are_reserved_and_ignored(registers):
    registers.field(0x34, 1, 0x53)
    assert cut(registers, 256).capabilities[0].offset == 0x50


def test_capability_of_all_ones_is_a_fault(registers):
    registers.field(0xE1, 1, 0xF0)
    registers.field(0xF0, 4, 0xFFFFFFFF)
    assert cut(registers, 256).faults == ["the capability at 0xf0 reads all ones"]


@pytest.mark.parametrize(
    ("following", "fault"),
    [
        (0x100, "the list of extended capabilities runs in a circle, back to 0x100"),
        (0x160, "the list of extended capabilities runs in a circle, back to 0x160"),
        (0x040, "the list of extended capabilities leads into the first 256 bytes, to 0x40"),
        (0x800, "the extended capability at 0x800 reads all ones"),
    ],
)
def test_extended_list_that_lies_ends_there(registers, following, fault):
    registers.field(0x800, 4, 0xFFFFFFFF)
    registers.field(0x160, 4, following << 20 | 0x2000B)
    config = cut(registers, 4096)
    assert config.faults == [fault]
    assert config.capabilities[-1].offset == 0x160


def test_extended_list_that_leads_behind_the_end_of_a_copy_ends_there(registers):
    assert cut(registers, 0x150).faults == ["the list of extended capabilities leads to 0x150, behind the end"]


def test_place_holder_of_a_hidden_capability_is_no_capability(registers):
    registers.field(0x100, 4, 0x150 << 20)
    assert [each.name for each in cut(registers, 4096).capabilities][-2:] == ["serial number", "vendor"]


@pytest.mark.parametrize("size", [64, 256, 4096])
def test_device_that_does_not_answer_is_told_so(size):
    config = pci.ConfigSpace(b"\xff" * size)
    assert config.capabilities == []
    assert config.faults == ["the device does not answer: all ones is what a frozen, reset or missing device reads"]
    assert str(config).endswith(config.faults[0])


def test_unknown_capability_is_named_by_its_number(registers):
    registers.field(0xE0, 1, 0x77)
    registers.field(0x160, 2, 0x7777)
    names = [each.name for each in cut(registers, 4096).capabilities]
    assert (names[5], names[-1]) == ("capability 0x77", "capability 0x7777")


_BYTES = st.builds(
    lambda size, start, seed, patches: _patched(size, start, seed, patches),
    st.sampled_from([64, 100, 256, 300, 4096]),
    st.binary(max_size=256),
    st.integers(0, 255),
    st.lists(st.tuples(st.integers(0, 4092), st.binary(min_size=1, max_size=4)), max_size=40),
)


def _patched(size: int, start: bytes, fill: int, patches: list[tuple[int, bytes]]) -> bytes:
    data = bytearray([fill]) * size
    data[: len(start)] = start
    for at, patch in patches:
        data[at : at + len(patch)] = patch
    return bytes(data[:size].ljust(size, b"\0"))


@given(_BYTES)
@example(b"\0" * 64)
@example(b"\x10" * 4096)
def test_no_bytes_make_decoding_fail_or_run_on(data):
    config = pci.ConfigSpace(data)
    assert config.as_dict()["bytes"] == data.hex()
    assert str(config).startswith("header")
    assert len(config.capabilities) <= 48 + 960
    for each in config.capabilities:
        if isinstance(each, pci.Vendor):
            assert len(each.data) <= 256


# --- The whole ---


def test_text_has_a_register_a_line(config):
    lines = str(config).splitlines()
    assert lines[0] == "header of a function"
    assert "  000  vendor                      0x10de" in lines
    assert "  004  command                     0x0000" in lines
    assert "MSI-X at 0xc0" in lines
    assert "  0c4  table                       0x00002004  BAR4 at 0x2000" in lines
    assert "AER at 0x100 (version 2)" in lines
    assert "  104  uncorrectable status        0x00101000  poisoned packet, unsupported request" in lines


def test_dump_leaves_out_lines_like_the_one_before():
    assert list(pci.hex_lines(bytes(range(16)) + bytes(64))) == [
        "000: 00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f",
        "010: 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00",
        "*",
        "040: 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00",
    ]


def test_snapshot_does_not_follow_the_device(config):
    before = config.snapshot()
    config.command.value = 7
    assert before.command.value == 0


def test_decoding_agrees_with_a_model_of_the_fake():
    model = Endpoint(Device("endpoint", "0000:00:01.0", 0x1234, 0x5678, 0xFF0000))
    config = pci.ConfigSpace(bytes(model.registers.value))
    assert config[pci.Msix].vectors == 8
    assert config[pci.Express].device_capabilities.function_reset
