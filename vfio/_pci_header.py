"""The header of configuration space, of functions (type 0) and of bridges (type 1).

PCI Local Bus Specification 3.0, section 6.2; PCI-to-PCI Bridge Architecture Specification 1.2, section 3.2.
"""

from __future__ import annotations

from typing import NamedTuple

from vfio._pci_register import Bit, Bits, Number, Part, Register, Source, Structure

STANDARD_SIZE, EXPRESS_SIZE = 256, 4096
"""Bytes of configuration space without and with extended capabilities."""
HEADER_SIZE = 64
"""Bytes of the header: all that Linux shows of a device to who is not root."""

_LAYOUTS = {0: "function", 1: "bridge", 2: "CardBus bridge"}
_PINS = {0: "none", 1: "INTA", 2: "INTB", 3: "INTC", 4: "INTD"}


class Command(Register, width=2):
    """What the function may do."""

    io = Bit(0)
    memory = Bit(1)
    bus_master = Bit(2)
    special_cycles = Bit(3)
    write_invalidate = Bit(4)
    palette_snoop = Bit(5)
    parity_response = Bit(6)
    serr = Bit(8)
    fast_back_to_back = Bit(9)
    intx_disable = Bit(10)


class Status(Register, width=2, clears=0xF900):
    """What has happened to it."""

    intx = Bit(3)
    capabilities = Bit(4)
    mhz66 = Bit(5)
    fast_back_to_back = Bit(7)
    master_parity_error = Bit(8)
    devsel = Bits(9, 2)
    signalled_target_abort = Bit(11)
    received_target_abort = Bit(12)
    received_master_abort = Bit(13)
    signalled_serr = Bit(14)
    parity_error = Bit(15)


class HeaderType(Register, width=1, read_only=True):
    """Which header it is."""

    layout = Bits(0, 7, _LAYOUTS)
    multifunction = Bit(7)


class InterruptPin(Register, width=1, read_only=True):
    """The line interrupt."""

    pin = Bits(0, 8, _PINS)


class BridgeControl(Register, width=2):
    """What a bridge does with its secondary bus."""

    parity_response = Bit(0)
    serr = Bit(1)
    isa = Bit(2)
    vga = Bit(3)
    vga_16_bit = Bit(4)
    master_abort = Bit(5)
    bus_reset = Bit(6)
    fast_back_to_back = Bit(7)


_IO, _BITS64, _PREFETCHABLE = 1, 4, 8


class Bar(NamedTuple):
    """A base address register that is not zero."""

    number: int
    address: int
    io: bool
    bits64: bool
    prefetchable: bool

    def __str__(self) -> str:
        kind = "I/O" if self.io else "64-bit memory" if self.bits64 else "32-bit memory"
        return f"{kind} at {self.address:#x}" + (", prefetchable" if self.prefetchable else "")


def bars(source: Source, offset: int, count: int) -> list[Bar]:
    """Those of `count` base address registers from `offset` on that are not zero."""
    words = [int.from_bytes(source.read(offset + 4 * n, 4), "little") for n in range(count)]
    found, index = [], 0
    while index < len(words):
        low = words[index]
        io, bits64 = bool(low & _IO), low & 7 == _BITS64
        address = low & (~3 if io else ~15)
        if bits64 and index + 1 < len(words):
            address |= words[index + 1] << 32
        if low or address:
            found.append(Bar(index, address, io, bits64, not io and bool(low & _PREFETCHABLE)))
        index += 2 if bits64 else 1
    return found


class Header(Structure):
    """What both types have in the same place."""

    vendor = Number(0x00, 2)
    device = Number(0x02, 2)
    command = Part(0x04, Command)
    status = Part(0x06, Status)
    revision = Number(0x08, 1)
    class_code = Number(0x09, 3)
    cache_line_size = Number(0x0C, 1, writable=True)
    latency_timer = Number(0x0D, 1, writable=True)
    header_type = Part(0x0E, HeaderType)
    bist = Number(0x0F, 1, writable=True)
    capabilities_pointer = Number(0x34, 1)
    interrupt_line = Number(0x3C, 1, writable=True)
    interrupt_pin = Part(0x3D, InterruptPin)


class FunctionHeader(Header):
    """Type 0."""

    bar0 = Number(0x10, 4, writable=True)
    bar1 = Number(0x14, 4, writable=True)
    bar2 = Number(0x18, 4, writable=True)
    bar3 = Number(0x1C, 4, writable=True)
    bar4 = Number(0x20, 4, writable=True)
    bar5 = Number(0x24, 4, writable=True)
    cardbus_cis = Number(0x28, 4)
    subsystem_vendor = Number(0x2C, 2)
    subsystem_device = Number(0x2E, 2)
    rom = Number(0x30, 4, writable=True)
    min_grant = Number(0x3E, 1)
    max_latency = Number(0x3F, 1)


class BridgeHeader(Header):
    """Type 1."""

    bar0 = Number(0x10, 4, writable=True)
    bar1 = Number(0x14, 4, writable=True)
    primary_bus = Number(0x18, 1, writable=True)
    secondary_bus = Number(0x19, 1, writable=True)
    subordinate_bus = Number(0x1A, 1, writable=True)
    secondary_latency_timer = Number(0x1B, 1, writable=True)
    io_base = Number(0x1C, 1, writable=True)
    io_limit = Number(0x1D, 1, writable=True)
    secondary_status = Part(0x1E, Status)
    memory_base = Number(0x20, 2, writable=True)
    memory_limit = Number(0x22, 2, writable=True)
    prefetchable_base = Number(0x24, 2, writable=True)
    prefetchable_limit = Number(0x26, 2, writable=True)
    prefetchable_base_upper = Number(0x28, 4, writable=True)
    prefetchable_limit_upper = Number(0x2C, 4, writable=True)
    io_base_upper = Number(0x30, 2, writable=True)
    io_limit_upper = Number(0x32, 2, writable=True)
    rom = Number(0x38, 4, writable=True)
    bridge_control = Part(0x3E, BridgeControl)


HEADERS: dict[int, type[Header]] = {0: FunctionHeader, 1: BridgeHeader}
"""By the layout that the header type tells; of any other layout nothing but `Header` is known."""
