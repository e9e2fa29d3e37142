"""The devices of the modelled machine, as their registers show them."""

from __future__ import annotations

import errno
import math
import struct
from dataclasses import replace

import pytest
from fake_pci import CONFIG, EVENTFD, INTX, MSIX, TRIGGER, Host, Opened, eventfd, refused, taken

from vfio import topology
from vfio.fake import devices
from vfio.fake import registers as reg
from vfio.fake.devices import PciModel, UnknownModel, make_model
from vfio.fake.kernel_error import KernelWouldBeHurt

EDU, TESTDEV, EDU_ALONE, NVME = "0000:01:00.0", "0000:01:00.1", "0001:01:00.0", "0002:01:00.0"


def word(value: int) -> bytes:
    """A register of edu's, as a POWER machine has it."""
    return struct.pack(">I", value)


@pytest.fixture
def edu() -> Opened:
    opened = Host().open(EDU)
    opened.set_config(reg.COMMAND, b"\x06\x01")
    return opened


# What real kernels on QEMU 7.2 showed in sysfs after boot: rows of 16 bytes that are not all zero.
SEEN = {
    ("power8", EDU): """
        000 3412e811000110001000ff0000008000  010 00000080000000000000000000000000
        020 000000000000000000000000f41a0011  030 00000000400000000000000000010000
        040 05008000000000000000000000000000""",
    ("power8", EDU_ALONE): """
        000 3412e811000110001000ff0000000000  010 00000080000000000000000000000000
        020 000000000000000000000000f41a0011  030 00000000400000000000000000010000
        040 05008000000000000000000000000000""",
    ("power8", TESTDEV): """
        000 361b0500000100000000ff0000000000  010 00001080010000000000000000000000
        020 000000000000000000000000f41a0011""",
    ("power8", NVME): """
        000 361b1000000110000202080100000000  010 04000080000000000000000000000000
        020 000000000000000000000000f41a0011  030 00000000400000000000000000010000
        040 11804000002000000030000000000000  060 01000300080000000000000000000000
        080 10600200008000100000000011040000  090 00001100000000000000000000000000
        0a0 00000000000030000000000000000000""",
    ("pseries", "0000:00:00.0"): """
        000 3412e811000010001000ff0000000000  010 00000080000000000000000000000000
        020 000000000000000000000000f41a0011  030 00000000400000000000000000010000
        040 05008000000000000000000000000000""",
    ("pseries", "0001:00:00.0"): """
        000 8680d310000010000000000200000000  010 00000080000002800110000000000480
        020 00000000000000000000000086800000  030 00000000c80000000000000000010000
        0a0 11000400030000000320000000000000  0c0 000000000000000001d0220000000000
        0d0 05e08000000000000000000000000000  0e0 10a00100008000000000000011040000
        0f0 00001100000000000000000000000000  100 01000214000000000000000030204600
        110 0000000000e00000a000000000000000  140 03000100563412ffff00545200000000""",
    ("power8", "0001:00:00.0"): """
        000 1410dc03070110000000040600000100  010 000000000000000000010100f0000000
        020 0080e0ff0100f1df10d003001fd00300  030 00000000480000000000000000000200
        040 0d000000141000001040420100800000  050 0f00000011040000000011207b000a00
        060 c0014000070000000000000020003000  070 20000000000000000000000000000000
        100 01000200000000000000000030200700  110 0000000000200000e003000000000000
        120 00000000000000000000000007000000""",
    ("power9", "0002:00:00.0"): """
        000 1410c104070110000000040600000100  010 000000000000000000010100f1010000
        020 0080e0ff0100f17f80000600bf000600  030 00000000480000000000000000000200
        040 0d000000141000001040420100800000  050 0f00000011040000000011207b001200
        060 c0014000000000000000000020003000  100 01000200000000000000000030204700
        110 0000000000e00000e003000000000000  120 00000000000000000000000007000000""",
}


@pytest.mark.parametrize(("machine", "address"), SEEN)
def test_config_space_after_boot_is_the_real_one(machine: str, address: str) -> None:
    pci = Host(machine).machine.device(address)
    expected = bytearray(0x800 if (machine, address) == ("power9", "0002:00:00.0") else pci.config_size)
    rows = SEEN[machine, address].split()
    for offset, row in zip(rows[::2], rows[1::2], strict=True):
        expected[int(offset, 16) : int(offset, 16) + 16] = bytes.fromhex(row)
    assert pci.registers.value[: len(expected)].hex(" ", 4) == expected.hex(" ", 4)


def test_power9_root_port_has_no_registers_from_0x800_on() -> None:
    assert bytes(Host("power9").machine.device("0000:00:00.0").registers.value[0x800:]) == b"\xff" * 0x800


# --- edu ---


def test_edu_identifies_itself_big_endian(edu: Opened) -> None:
    assert edu.read(0, 4) == word(0x010000ED)


def test_edu_inverts(edu: Opened) -> None:
    edu.write(4, word(0x12345678))
    assert edu.read(4, 4) == word(0xEDCBA987)


@pytest.mark.parametrize("n", [0, 1, 5, 12, 13, 33, 34, 0xFFFFFFFF])
def test_edu_computes_factorials_modulo_2_to_the_32(edu: Opened, n: int) -> None:
    edu.write(8, word(n))
    assert edu.read(8, 4) == word(math.factorial(n) % (1 << 32) if n < 100 else 0)


def test_edu_answers_ones_for_registers_it_lacks(edu: Opened) -> None:
    assert edu.read(0x0C, 4) == b"\xff" * 4
    assert edu.read(0xFFFFC, 4) == b"\xff" * 4


def test_edu_answers_8_byte_reads_below_0x80_with_ones(edu: Opened) -> None:
    assert edu.read(0, 8) == b"\xff" * 8
    assert edu.read(0x80, 8) == bytes(8)


def test_edu_has_no_narrow_registers(edu: Opened) -> None:
    assert edu.read(0, 1) == b"\0"
    assert edu.read(1, 3) == bytes(3)
    edu.write(4, b"\1")
    assert edu.read(4, 4) == bytes(4)


def test_edu_dma_registers_keep_64_bits(edu: Opened) -> None:
    edu.write(0x80, struct.pack(">Q", 0x0123456789ABCDEF))
    assert edu.read(0x80, 8) == struct.pack(">Q", 0x0123456789ABCDEF)
    assert edu.read(0x80, 4) == word(0x89ABCDEF)


def test_edu_raises_and_acknowledges_interrupts(edu: Opened) -> None:
    edu.write(0x60, word(0x5))
    assert edu.read(0x24, 4) == word(5)
    edu.write(0x64, word(0x4))
    assert edu.read(0x24, 4) == word(1)


def test_edu_interrupts_when_a_factorial_is_computed(edu: Opened) -> None:
    edu.write(0x20, word(0x80))
    edu.write(8, word(3))
    assert edu.read(0x24, 4) == word(1)
    assert edu.read(0x20, 4) == word(0x80)


@pytest.mark.parametrize(
    ("local", "count"), [(0x40000, 4096), (0x40000, 0), (0x40FFF, 1), (0x3FFFF, 1), (0x41000, 1), (0, 4)]
)
def test_edu_transfer_that_ends_qemu_raises(edu: Opened, local: int, count: int) -> None:
    for at, value in ((0x80, 0), (0x88, local), (0x90, count)):
        edu.write(at, struct.pack(">Q", value))
    with pytest.raises(KernelWouldBeHurt, match="QEMU ends"):
        edu.write(0x98, struct.pack(">Q", 1))


def transfer(edu: Opened, source: int, destination: int, count: int, command: int) -> None:
    for at, value in ((0x80, source), (0x88, destination), (0x90, count), (0x98, command)):
        edu.write(at, struct.pack(">Q", value))


class Bus:
    """Memory behind a PE."""

    def __init__(self) -> None:
        self.memory = bytearray(range(256)) * 256

    def dma_read(self, address: int, length: int) -> bytes:
        return bytes(self.memory[address : address + length])

    def dma_write(self, address: int, data: bytes) -> None:
        self.memory[address : address + len(data)] = data


def test_edu_transfers_both_ways_at_once(edu: Opened) -> None:
    bus = edu.pci.pe = Bus()  # type: ignore[assignment]
    transfer(edu, 0x110, 0x40000, 4095, 1)
    assert edu.read(0x98, 8) == bytes(8)
    transfer(edu, 0x40010, 0x8000, 16, 3)
    assert bus.memory[0x8000:0x8010] == bytes(range(0x20, 0x30))  # type: ignore[attr-defined]


def test_edu_without_bus_mastering_reads_zeros_and_writes_nothing(edu: Opened) -> None:
    bus = edu.pci.pe = Bus()  # type: ignore[assignment]
    edu.set_config(reg.COMMAND, b"\x02\x01")
    transfer(edu, 0, 0x40000, 16, 1)
    transfer(edu, 0x40000, 0x100, 16, 3)
    assert bus.memory[0x100:0x110] == bytes(range(16))  # type: ignore[attr-defined]
    edu.set_config(reg.COMMAND, b"\x06\x01")
    transfer(edu, 0x40000, 0x100, 16, 3)
    assert bus.memory[0x100:0x110] == bytes(16)  # type: ignore[attr-defined]


@pytest.mark.parametrize("freeze", ["dma", "both"])
def test_frozen_pe_drops_dma(edu: Opened, freeze: str) -> None:
    bus = edu.pci.pe = Bus()  # type: ignore[assignment]
    transfer(edu, 0, 0x40000, 16, 1)
    edu.pci.eeh.freeze = freeze  # type: ignore[union-attr, assignment]
    edu.pci.dma_write(0x100, b"x")
    assert bus.memory[0x100] == 0  # type: ignore[attr-defined]
    assert edu.pci.dma_read(0, 4) == bytes(4)


def test_edu_sees_only_the_address_bits_it_has() -> None:
    described = topology.load("power8")
    device = replace(described.device(EDU), properties=(("dma_mask", "0xfff"),))
    host = Host()
    opened = host.open(EDU)
    opened.pci.model.dma_mask = make_model(device).dma_mask  # type: ignore[attr-defined]
    bus = opened.pci.pe = Bus()  # type: ignore[assignment]
    opened.set_config(reg.COMMAND, b"\x06\x01")
    bus.memory[0x234:0x238] = b"abcd"  # type: ignore[attr-defined]
    transfer(opened, 0x7_0000_1234, 0x40000, 4, 1)
    assert opened.pci.model.buffer[:4] == b"abcd"  # type: ignore[attr-defined]
    plain = make_model(replace(device, properties=()))
    assert plain.dma_mask == 0xFFFFFFF  # type: ignore[attr-defined]


def test_edu_is_little_endian_on_machines_that_are_no_power() -> None:
    host = Host()
    platform = replace(host.machine.topology.platform, name="PC")
    host.machine.topology = replace(host.machine.topology, platform=platform)
    assert host.machine.device(EDU).model.bar_read(0, 0, 4) == 0x010000ED


# --- pci-testdev ---


def test_testdev_shows_and_counts_the_selected_test() -> None:
    opened = Host().open(TESTDEV)
    assert opened.read(0, 32) == bytes(32)
    opened.write(0, b"\0")
    assert opened.read(0, 32) == bytes.fromhex("0001000000080000fa00000000000000") + b"mmio-no-eventfd\0"
    opened.write(0x800, b"\xfa")
    opened.write(0x800, b"\x11")
    opened.write(0x800, b"\xfa\xfa\xfa\xfa")
    assert opened.read(12, 4) == b"\2\0\0\0"


def test_testdev_eventfd_swallows_exactly_its_write() -> None:
    opened = Host().open(TESTDEV)
    opened.write(0, b"\1")
    opened.write(0x801, b"\x77")
    assert opened.read(12, 4) == bytes(4)
    opened.write(0x800, b"\x77\x77")
    assert opened.read(12, 4) == b"\1\0\0\0"
    opened.write(0, b"\2")
    opened.write(0x802, b"\xfa")
    assert opened.read(12, 4) == bytes(4)
    opened.write(0x802, b"\xfa\0")
    assert opened.read(8, 8) == bytes.fromhex("fa00000001000000")


def test_testdev_with_an_unknown_test_is_silent() -> None:
    opened = Host().open(TESTDEV)
    opened.write(0, b"\0")
    opened.write(0, b"\3")
    assert opened.read(0, 48) == bytes(48)


# --- endpoints ---


def test_nvme_shows_the_registers_of_an_idle_controller() -> None:
    opened = Host().open(NVME)
    assert opened.read(0, 12) == bytes.fromhex("ff07010f2018400000040100")
    opened.write(0, b"\xff" * 4)
    assert opened.read(0, 4) == bytes.fromhex("ff07010f")


def test_e1000e_registers_repeat_in_narrow_reads() -> None:
    opened = Host("pseries").open("0001:00:00.0")
    assert opened.read(0, 4) == bytes.fromhex("41021400")
    assert opened.read(1, 3) == bytes.fromhex("414102")
    assert opened.read(0x40, 8) == bytes.fromhex("5254001234560080")


def test_e1000e_io_ports_work_while_memory_is_off() -> None:
    opened = Host("pseries").open("0001:00:00.0")
    opened.set_config(reg.COMMAND, b"\1\0")
    opened.write(2 << 40, b"abcd")
    assert opened.read(2 << 40, 4) == b"abcd"
    with refused(errno.EIO):
        opened.read(0, 4)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Opened:
    monkeypatch.setitem(devices.MODELS, "nvme", devices.MODELS["endpoint"])
    opened = Host().open(NVME)
    opened.set_config(reg.COMMAND, b"\x06\x01")
    return opened


def test_endpoint_copies_between_memory_and_its_buffer(endpoint: Opened) -> None:
    bus = endpoint.pci.pe = Bus()  # type: ignore[assignment]
    for at, value in ((0x10, 0x10), (0x18, 8), (0x20, 1), (0x10, 0x200), (0x20, 2)):
        endpoint.write(at, struct.pack("<Q", value))
    assert endpoint.read(0x1000, 8) == bytes(range(0x10, 0x18))
    assert bus.memory[0x200:0x208] == bytes(range(0x10, 0x18))  # type: ignore[attr-defined]
    assert endpoint.read(0, 4) == struct.pack("<I", 0x1FA4E)


def test_endpoint_doorbell_sends_its_message(endpoint: Opened) -> None:
    with eventfd() as first, eventfd() as second:
        endpoint.set_irqs(MSIX, EVENTFD | TRIGGER, first, -1, second)
        endpoint.write(8, struct.pack("<I", 2))
        endpoint.write(8, struct.pack("<I", 1))
        assert (taken(first), taken(second)) == (0, 1)
        endpoint.close()


def test_masked_message_is_sent_when_it_is_unmasked(endpoint: Opened) -> None:
    with eventfd() as fd:
        endpoint.set_irqs(MSIX, EVENTFD | TRIGGER, fd)
        endpoint.pci.bar_write(0, 0x200C, 4, 1)
        endpoint.write(8, struct.pack("<I", 0))
        assert taken(fd) == 0
        assert endpoint.pci.bar_read(0, 0x3000, 8) == 1
        endpoint.pci.bar_write(0, 0x200C, 4, 0)
        assert taken(fd) == 1
        assert endpoint.pci.bar_read(0, 0x3000, 8) == 0
        endpoint.close()


def test_endpoint_forgets_its_buffer_in_a_reset(endpoint: Opened) -> None:
    endpoint.write(0x1000, b"kept?")
    endpoint.ioctl(11, bytearray(4))
    assert endpoint.read(0x1000, 5) == bytes(5)


# --- devices of one's own ---


class Doorbell(PciModel):
    interrupt_pin = 1

    def __init__(self, device: topology.Device) -> None:
        super().__init__(device)
        self.add_bar(0, 4096)
        self.rung = 0

    def bar_read(self, bar: int, offset: int, width: int) -> int:
        return self.rung

    def bar_write(self, bar: int, offset: int, width: int, value: int) -> None:
        self.rung += 1
        self.raise_intx(True)


def test_topology_names_a_device_of_ones_own_by_module_and_class() -> None:
    device = replace(topology.load("power8").device(EDU), model=f"{__name__}:Doorbell")
    model = make_model(device)
    assert isinstance(model, Doorbell)
    assert model.registers.get(reg.VENDOR_ID, 2) == device.vendor


def test_device_of_ones_own_works_in_a_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(devices.MODELS, "edu", Doorbell)
    opened = Host().open(EDU)
    with eventfd() as fd:
        opened.set_irqs(INTX, EVENTFD | TRIGGER, fd)
        opened.write(0, b"ring")
        assert taken(fd) == 1
        assert opened.read(0, 4) == b"\1\0\0\0"
        opened.close()


@pytest.mark.parametrize("name", ["no.such.module:Thing", f"{__name__}:Nothing", f"{__name__}:Bus", ":Thing"])
def test_class_that_cannot_be_had_is_named_with_its_device(name: str) -> None:
    device = replace(topology.load("power8").device(EDU), model=name)
    with pytest.raises(UnknownModel, match=f"{EDU}.*"):
        make_model(device)


def test_device_that_nobody_models_is_a_plain_endpoint_or_bridge() -> None:
    device = replace(topology.load("power8").device(EDU), model="tg3")
    assert type(make_model(device)).__name__ == "Endpoint"
    assert type(make_model(replace(device, device_class=0x060400))).__name__ == "Bridge"


def test_config_offset_is_not_a_bar(edu: Opened) -> None:
    assert edu.read(CONFIG, 4) == bytes.fromhex("3412e811")
