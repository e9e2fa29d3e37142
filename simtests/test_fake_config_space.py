"""Configuration space as a user of vfio-pci sees it: what is virtual, what is hardware, what is hidden."""

from __future__ import annotations

import errno
import struct
from typing import ClassVar

import pytest
from fake_pci import CONFIG, EVENTFD, MSI, NONE, TRIGGER, Host, Opened, eventfd, refused

from vfio import topology
from vfio.fake import devices
from vfio.fake import registers as reg
from vfio.fake.devices import PciModel

EDU, NVME = "0000:01:00.0", "0002:01:00.0"
E1000E = "0001:00:00.0"


@pytest.fixture
def edu() -> Opened:
    return Host().open(EDU)


@pytest.fixture
def nvme() -> Opened:
    return Host().open(NVME)


@pytest.fixture
def e1000e() -> Opened:
    return Host("pseries").open(E1000E)


def word(opened: Opened, offset: int) -> int:
    return int.from_bytes(opened.config(offset, 4), "little")


# --- ranges and pieces ---


def test_access_that_leaves_config_space_raises_efault_and_moves_nothing(edu: Opened) -> None:
    for offset, count in ((256, 1), (254, 4), (0, 257), (0xFFFF, 1)):
        with refused(errno.EFAULT):
            edu.config(offset, count)
        with refused(errno.EFAULT):
            edu.set_config(offset, b"\xff" * count)
    assert edu.config(254, 2) == bytes(2)


def test_whole_config_space_is_read_at_once(edu: Opened, nvme: Opened) -> None:
    assert len(edu.config(0, 256)) == 256
    assert len(nvme.config(0, 4096)) == 4096


def test_odd_ranges_are_assembled_from_aligned_pieces(edu: Opened) -> None:
    assert edu.config(1, 7) == edu.config(0, 8)[1:]
    assert edu.set_config(0x81, b"abcdefg") == 7
    assert edu.config(0x80, 9) == b"\0abcdefg\0"


# --- header ---


def test_command_after_open_has_memory_on_and_bus_master_off(edu: Opened) -> None:
    assert edu.config(reg.COMMAND, 2) == b"\x02\x01"


def test_command_shows_what_the_device_keeps_of_it(edu: Opened) -> None:
    edu.set_config(reg.COMMAND, b"\xff\xff")
    assert edu.config(reg.COMMAND, 2) == struct.pack("<H", 0x0507)


def test_status_cannot_be_written(edu: Opened) -> None:
    edu.set_config(reg.STATUS, b"\xff\xff")
    assert edu.config(reg.STATUS, 2) == b"\x10\x00"


@pytest.mark.parametrize("offset", [0x00, 0x02, 0x08, 0x0A, 0x0E, 0x28, 0x2C, 0x2E, 0x34, 0x3D, 0x3E])
def test_read_only_fields_ignore_writes(edu: Opened, offset: int) -> None:
    before = edu.config(offset, 2)
    edu.set_config(offset, bytes(~byte & 0xFF for byte in before[:1]))
    assert edu.config(offset, 2) == before


def test_bars_are_sized_as_on_hardware_and_the_real_ones_never_change(edu: Opened) -> None:
    real = edu.pci.registers.get(reg.BAR0, 4)
    edu.set_config(reg.BAR0, b"\xff" * 4)
    assert word(edu, reg.BAR0) == 0xFFF00000
    edu.set_config(reg.BAR0 + 1, b"\x12\x34\x56")
    assert word(edu, reg.BAR0) == 0x56300000
    assert edu.pci.registers.get(reg.BAR0, 4) == real


def test_bars_of_64_bits_take_two_registers(nvme: Opened) -> None:
    nvme.set_config(reg.BAR0, b"\xff" * 8)
    assert nvme.config(reg.BAR0, 8) == struct.pack("<Q", 0xFFFF_FFFF_FFFF_C004)


def test_io_bar_is_sized_where_the_host_assigned_it(e1000e: Opened) -> None:
    e1000e.set_config(0x18, b"\xff" * 4)
    assert word(e1000e, 0x18) == 0xFFFFFFE1


def test_io_bar_that_the_host_did_not_assign_reads_zero() -> None:
    testdev = Host().open("0000:01:00.1")
    testdev.set_config(0x14, b"\xff" * 4)
    assert word(testdev, 0x14) == 0


def test_interrupt_line_is_virtual(edu: Opened) -> None:
    edu.set_config(reg.INTERRUPT_LINE, b"\x55")
    assert edu.config(reg.INTERRUPT_LINE, 1) == b"\x55"
    assert edu.pci.registers.get(reg.INTERRUPT_LINE, 1) == 0


def test_bars_lost_behind_the_drivers_back_come_back_with_the_next_command_write(edu: Opened) -> None:
    real = edu.pci.registers.get(reg.BAR0, 4)
    edu.pci.hardware_reset()
    assert edu.pci.registers.get(reg.BAR0, 4) == 0
    edu.set_config(reg.COMMAND, b"\x06\x01")
    assert edu.pci.registers.get(reg.BAR0, 4) == real


def test_interrupt_pin_is_hidden_without_a_host_interrupt_on_7_2_only() -> None:
    for kernel, pin in (((6, 12), b"\1"), ((7, 2), b"\0")):
        host = Host(kernel=kernel)
        host.machine.device(EDU).irq = 0
        assert host.open(EDU).config(reg.INTERRUPT_PIN, 1) == pin


# --- capabilities ---


def test_msi_enable_does_not_stick_while_msi_is_inactive(edu: Opened) -> None:
    edu.set_config(0x42, b"\xff\xff")
    assert edu.config(0x42, 2) == struct.pack("<H", 0x008E)
    assert not edu.pci.model.msi_enabled


def test_msi_enable_sticks_while_msi_is_active(edu: Opened) -> None:
    with eventfd() as fd:
        edu.set_irqs(MSI, EVENTFD | TRIGGER, fd)
        assert edu.config(0x42, 2) == b"\x80\x00"
        edu.set_config(0x42, b"\x81\x00")
        assert edu.config(0x42, 2) == b"\x81\x00"
        edu.set_config(0x42, b"\x80\x00")
        assert not edu.pci.model.msi_enabled
        edu.set_irqs(MSI, NONE | TRIGGER, count=0)


def test_msi_address_and_data_are_virtual(edu: Opened) -> None:
    edu.set_config(0x44, b"0123456789")
    assert edu.config(0x44, 10) == b"0123456789"
    assert edu.pci.registers.get(0x44, 4) == 0


def test_msix_control_cannot_be_written(nvme: Opened) -> None:
    nvme.set_config(0x42, b"\xff\xff")
    assert nvme.config(0x42, 2) == b"\x40\x00"


def test_pme_is_hidden_and_the_power_state_is_real(e1000e: Opened) -> None:
    e1000e.set_config(0xCC, b"\xff\xff")
    assert e1000e.config(0xCC, 2) == struct.pack("<H", 0x1E03)
    assert e1000e.pci.power_state == 3
    e1000e.set_config(0xCC, b"\0\0")
    assert e1000e.pci.power_state == 0


def test_power_states_that_the_device_lacks_are_ignored(nvme: Opened) -> None:
    for state in (1, 2):
        nvme.set_config(0x64, bytes((state,)))
        assert nvme.config(0x64, 1) == b"\x08"
        assert nvme.pci.power_state == 0


def test_memory_is_out_of_reach_in_d3hot(nvme: Opened) -> None:
    nvme.set_config(0x64, b"\3")
    with refused(errno.EIO):
        nvme.read(0, 4)
    nvme.set_config(0x64, b"\0")
    assert nvme.read(0, 4) == bytes.fromhex("ff07010f")


def test_function_level_reset_bit_resets_and_reads_zero(nvme: Opened) -> None:
    nvme.pci.model.reset = lambda: reset.append(1)  # type: ignore[method-assign]
    reset: list[int] = []
    nvme.set_config(0x88, b"\x00\x80")
    assert nvme.config(0x88, 2) == bytes(2)
    assert reset == [1]
    assert nvme.config(reg.COMMAND, 2) == b"\x02\x01"


def test_function_level_reset_bit_without_the_ability_does_nothing(e1000e: Opened) -> None:
    e1000e.set_config(0x84 + 0x64, b"\x00\x80")
    assert e1000e.config(0xE8, 2) == bytes(2)


def test_payload_size_is_virtual_and_phantom_functions_cannot_be_had(nvme: Opened) -> None:
    nvme.set_config(0x88, b"\xe0\x72")
    assert nvme.config(0x88, 2) == b"\xe0\x70"
    assert nvme.pci.registers.get(0x88, 2) == 0


def test_device_control_2_is_writable_but_for_ari(nvme: Opened) -> None:
    nvme.set_config(0xA8, b"\xff\xff")
    assert nvme.config(0xA8, 2) == b"\x00\x80"


def test_aer_is_writable_within_its_masks(e1000e: Opened) -> None:
    for offset, kept in ((0x10C, 0x03FFF030), (0x114, 0x0000F1C1), (0x118, 0x1E0), (0x104, 0), (0x110, 0)):
        e1000e.set_config(offset, b"\xff" * 4)
        assert word(e1000e, offset) == kept


def test_heads_of_extended_capabilities_cannot_be_written(e1000e: Opened) -> None:
    for offset, head in ((0x100, 0x14020001), (0x140, 0x00010003)):
        e1000e.set_config(offset, b"\xff" * 4)
        assert word(e1000e, offset) == head


def test_gaps_are_the_hardwares(edu: Opened) -> None:
    edu.set_config(0x60, b"\xde\xad")
    assert edu.pci.registers.get(0x60, 2) == 0xADDE
    assert edu.config(0x60, 2) == b"\xde\xad"


# --- EEH ---


def test_blocked_config_space_raises_enodev_but_for_virtual_fields(edu: Opened) -> None:
    assert edu.pci.pe
    edu.pci.eeh.blocked = True
    assert edu.config(0, 4) == bytes.fromhex("3412e811")
    assert edu.config(reg.BAR0, 4) == b"\x00\x00\x00\x80"
    for offset in (reg.COMMAND, 0x08, 0x40, 0x80):
        with refused(errno.ENODEV):
            edu.config(offset, 2)
    for offset in (reg.COMMAND, 0x80):
        with refused(errno.ENODEV):
            edu.set_config(offset, b"\0\0")
    edu.set_config(reg.BAR0, b"\xff" * 4)
    edu.pci.eeh.blocked = False
    assert word(edu, reg.BAR0) == 0xFFF00000


# --- capabilities that no device at hand has ---


class Odd(PciModel):
    """A device with what real ones have and QEMU's at hand have not."""

    config_size = reg.EXPRESS_SIZE
    interrupt_pin = 1
    order: ClassVar[list[str]] = []

    def __init__(self, device: topology.Device) -> None:
        super().__init__(device)
        self.add_bar(0, 0x10000)
        self.add_bar(6, 0x1000)
        self.resets = 0
        registers = self.registers
        at = registers.add_capability(reg.CAP_AF, 0xC0, 6)
        registers.field(at + 2, 2, 6 | 3 << 8)
        registers.field(at + 4, 1, 0, 1)
        registers.add_capability(reg.CAP_VPD, 0xB0, 8)
        self.vpd = bytearray(b"serial 1")
        registers.add_capability(0x0D, 0xA8, 8)  # subsystem of a bridge: hidden
        registers.field(registers.add_capability(reg.CAP_VENDOR, 0xA0, 8) + 2, 2, 8 | 0x1100, 0xFF00)
        registers.field(0xA4, 4, 0, 0xFFFF_FFFF)
        registers.add_msi(0x80, vectors=4, maskable=True)
        registers.add_express(0x40, flr=True)
        registers.add_capability(0x0C, 0x7C, 4)  # CompactPCI hot swap: hidden
        registers.add_extended(0x1B, 1, 0x100, 8)  # PASID: hidden, but the head of the list
        registers.add_extended(0x19, 1, 0x110, 16)  # secondary PCI Express: hidden
        at = registers.add_extended(0x0B, 1, 0x120, 12)
        registers.field(at + 4, 4, 12 << 20)
        registers.field(at + 8, 4, 0, 0xFFFF_FFFF)
        at = registers.add_extended(0x04, 1, 0x140, 16)
        registers.field(at + 8, 1, 0, 0xFF)
        registers.field(registers.add_extended(0x0D, 1, 0x160, 8) + 6, 2, 0, 0xFFFF)

    def reset(self) -> None:
        self.resets += 1

    def rom(self) -> bytes:
        return b"\x55\xaa\x01" + bytes(509)


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> Opened:
    monkeypatch.setitem(devices.MODELS, "nvme", Odd)
    return Host().open(NVME)


def capabilities(opened: Opened) -> list[int]:
    found, at = [], opened.config(0x34, 1)[0]
    while at:
        found.append(opened.config(at, 1)[0])
        at = opened.config(at + 1, 1)[0]
    return found


def test_hidden_capabilities_are_unlinked_and_their_bytes_are_gaps(odd: Opened) -> None:
    assert capabilities(odd) == [0x10, 0x05, 0x09, 0x03, 0x13]
    assert odd.pci.registers.find(0x0D) == 0xA8
    assert odd.config(0xA8, 2) == odd.pci.registers.value[0xA8:0xAA]


def test_list_of_extended_capabilities_skips_the_hidden_ones(odd: Opened) -> None:
    assert word(odd, 0x100) == 0x120_00000  # the anchor: no ID, and what follows the hidden one after it
    assert word(odd, 0x120) == 0x1401000B
    assert word(odd, 0x140) == 0x16010004


def test_vendor_capabilities_are_raw(odd: Opened) -> None:
    odd.set_config(0xA4, b"abcd")
    odd.set_config(0xA3, b"\x99")
    assert odd.config(0xA3, 5) == b"\x99abcd"
    odd.set_config(0x128, b"efgh")
    assert odd.config(0x128, 4) == b"efgh"


def test_power_budget_selector_is_writable_and_access_control_is_not(odd: Opened) -> None:
    odd.set_config(0x148, b"\x07\x07\x07\x07")
    assert odd.config(0x148, 4) == b"\x07\0\0\0"
    odd.set_config(0x166, b"\xff\xff")
    assert odd.config(0x166, 2) == bytes(2)


def test_advanced_features_reset_bit_resets_and_reads_zero(odd: Opened) -> None:
    before = odd.pci.model.resets  # type: ignore[attr-defined]
    odd.set_config(0xC4, b"\1")
    assert odd.config(0xC4, 1) == b"\0"
    assert odd.pci.model.resets == before + 1  # type: ignore[attr-defined]


def test_vpd_is_accessed_with_the_flag_and_says_when_it_is_done(odd: Opened) -> None:
    odd.set_config(0xB2, b"\x00\x00")
    assert odd.config(0xB2, 6) == b"\x00\x80seri"
    odd.set_config(0xB4, b"SERI")
    odd.set_config(0xB2, b"\x00\x80")
    assert odd.config(0xB2, 2) == b"\x00\x00"
    assert bytes(odd.pci.model.vpd) == b"SERIal 1"
    odd.set_config(0xB2, b"\x08\x00")
    assert odd.config(0xB2, 2) == b"\x08\x00"  # past its end: the flag does not toggle


def test_msi_queue_is_no_longer_than_what_was_allocated(odd: Opened) -> None:
    with eventfd() as first, eventfd() as second:
        odd.set_irqs(MSI, EVENTFD | TRIGGER, first, second)
        odd.set_config(0x82, b"\x41\x00")
        assert odd.config(0x82, 1) == b"\x11"
        odd.close()


def test_msi_mask_bits_are_the_hardwares(odd: Opened) -> None:
    odd.set_config(0x90, b"\xff" * 4)
    assert odd.config(0x90, 4) == b"\x0f\0\0\0"


def test_rom_bar_keeps_size_and_enable_bit(odd: Opened) -> None:
    odd.set_config(reg.ROM_BAR, b"\xff" * 4)
    assert word(odd, reg.ROM_BAR) == 0xFFFFF001


def test_rom_is_read_only_and_ends_in_ones(odd: Opened) -> None:
    assert odd.region(6)[1:4] == (1, 0, 0x1000)
    assert odd.read(6 << 40, 4) == b"\x55\xaa\x01\0"
    assert odd.read((6 << 40) + 510, 4) == b"\0\0\xff\xff"
    with refused(errno.EINVAL):
        odd.write(6 << 40, b"x")
    with refused(errno.EINVAL):
        odd.read((6 << 40) + 0x1000, 1)
    odd.set_config(reg.COMMAND, b"\0\0")
    with refused(errno.ENOMEM):
        odd.read(6 << 40, 4)


def test_rom_without_a_signature_is_no_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Odd, "rom", lambda self: b"junk")
    monkeypatch.setitem(devices.MODELS, "nvme", Odd)
    odd = Host().open(NVME)
    assert odd.region(6)[1:4] == (0, 0, 0)
    odd.set_config(reg.ROM_BAR, b"\xff" * 4)
    assert word(odd, reg.ROM_BAR) == 0xFFFFF001
    with refused(errno.ENOMEM):
        odd.read(6 << 40, 1)


def test_device_whose_capabilities_are_all_hidden_has_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hidden(PciModel):
        def __init__(self, device: topology.Device) -> None:
            super().__init__(device)
            self.registers.add_capability(0x0C, 0x40, 4)

    monkeypatch.setitem(devices.MODELS, "edu", Hidden)
    opened = Host().open(EDU)
    assert opened.config(reg.STATUS, 2) == bytes(2)
    assert opened.config(reg.CAPABILITIES, 1) == bytes(1)


def test_config_position_is_the_region_index(edu: Opened) -> None:
    with refused(errno.EINVAL):
        edu.read(9 << 40, 4)
    assert edu.read(CONFIG, 0) == b""
    assert edu.read(9 << 40, 0) == b""
