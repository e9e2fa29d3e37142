"""What a device is made of.  A device of your own is a class with a few lines::

    from vfio.fake.devices import PciModel


    class Doorbell(PciModel):
        '''A register that interrupts when it is written.'''

        def __init__(self, device):
            super().__init__(device)
            self.add_bar(0, 4096)
            self.registers.add_msi(0x40)
            self.rung = 0

        def bar_read(self, bar, offset, width):
            return self.rung

        def bar_write(self, bar, offset, width, value):
            self.rung += 1
            self.raise_msi(0)

A topology names it by module and class: ``model = "my.devices:Doorbell"``.  Constructing it changes nothing outside.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from vfio import topology
from vfio.fake import registers as reg
from vfio.fake.devices.plain_memory import PlainMemory
from vfio.fake.pci import Bar
from vfio.fake.registers import ConfigRegisters

if TYPE_CHECKING:
    from vfio.fake.pci import PciDevice

_FREE = 0xB0
"""Where no model without MSI-X has a capability."""
_ENTRY, _MASKED = 16, 1
"""Bytes of an entry of the MSI-X table, and the mask bit of its last word."""


class PciModel:
    """A PCI function with no engine: configuration space of its own, BARs that read zero.

    `device` gives the identity.  Subclasses add BARs and capabilities, and answer `bar_read` and `bar_write`.
    """

    config_size = reg.STANDARD_SIZE
    revision = 0
    subsystem = (0x1AF4, 0x1100)
    """Subsystem vendor and device; those that QEMU gives where a device has none."""
    interrupt_pin = 0
    """1 for INTA; 0 for a function without INTx."""
    bars_at: Mapping[int, int] = {}
    """Where a PC's firmware puts BARs, by index, if not where there is room."""

    pci: PciDevice

    def __init__(self, device: topology.Device) -> None:
        self.properties = dict(device.properties)
        self.bars: list[Bar] = []
        self.memory: dict[int, PlainMemory] = {}
        """By index, the BARs that are nothing but memory: programs of other processes map it for themselves."""
        self.registers = ConfigRegisters(self.config_size)
        fields = self.registers.field
        fields(reg.VENDOR_ID, 2, device.vendor)
        fields(reg.DEVICE_ID, 2, device.device)
        fields(reg.REVISION, 1, self.revision)
        fields(reg.CLASS, 3, device.device_class)
        fields(reg.HEADER_TYPE, 1, 0x80 if self.properties.get("multifunction") == "on" else 0)
        fields(reg.SUBSYSTEM, 2, self.subsystem[0])
        fields(reg.SUBSYSTEM + 2, 2, self.subsystem[1])
        fields(reg.INTERRUPT_PIN, 1, self.interrupt_pin)
        self.vpd = bytearray()
        """What the VPD capability gives access to, if there is one."""
        self._rom = topology.option_rom(device.rom) if device.rom else b""
        self._table = bytearray()
        self._pending: set[int] = set()

    # --- for subclasses to answer ---

    def bar_read(self, bar: int, offset: int, width: int) -> int:
        """A load of `width` bytes (1, 2, 4 or 8) at byte `offset`, a multiple of it, as a little-endian value."""
        return self.memory[bar].read(offset, width) if bar in self.memory else 0

    def bar_write(self, bar: int, offset: int, width: int, value: int) -> None:
        """A store, as `bar_read`."""
        if bar in self.memory:
            self.memory[bar].write(offset, width, value)

    def reset(self) -> None:
        """The function is reset: registers of the device go back to what they are after power-on."""

    def found_below(self, child: PciDevice) -> None:
        """The kernel found `child` on the bus below this bridge."""

    def rom(self) -> bytes:
        """The image behind the expansion ROM, if there is a BAR for it (index 6); empty without one."""
        return self._rom

    # --- for subclasses to use ---

    def add_bar(self, index: int, size: int, *, io: bool = False, bits64: bool = False, prefetch: bool = False) -> None:
        """Decode `size` bytes, a power of two, by BAR `index` (6: the expansion ROM)."""
        bar = Bar(index, size, io, bits64, prefetch)
        self.bars.append(bar)
        if index == 6:
            self.registers.field(bar.register, 4, 0, -size & 0xFFFF_FFFF | 1)
        else:
            self.registers.field(bar.register, 4, bar.type_bits, -size & 0xFFFF_FFFF)
        if bits64:
            self.registers.field(bar.register + 4, 4, 0, (-size >> 32) & 0xFFFF_FFFF)

    def replace_bars(self, bars: Iterable[topology.Bar]) -> None:
        """Have these BARs instead.  An MSI-X table stays where it is if that is memory still, and goes otherwise."""
        for bar in self.bars:
            self.registers.field(bar.register, 8 if bar.bits64 else 4, 0)
        self.bars = []
        for each in bars:
            self.add_bar(each.index, each.size, io=each.io, bits64=each.bits64, prefetch=each.prefetchable)
        if at := self.registers.find(reg.CAP_MSIX):
            index, start = self.registers.get(at + reg.MSIX_TABLE, 4) & 7, self.registers.get(at + reg.MSIX_PBA, 4) & ~7
            if not any(bar.index == index and not bar.io and bar.size > start for bar in self.bars):
                self.registers.remove_capability(at)

    def replace_msix(self, msix: topology.Msix) -> None:
        """Have this MSI-X table instead, or none."""
        at = self.registers.find(reg.CAP_MSIX)
        if at:
            self.registers.remove_capability(at)
        if msix.vectors:
            self.registers.add_msix(at or _FREE, msix.vectors, msix.bar, msix.table, msix.pba)

    def dma_read(self, address: int, length: int) -> bytes:
        """Read `length` bytes of memory over the bus: zeros where they cannot be had."""
        return self.pci.dma_read(address, length)

    def dma_write(self, address: int, data: bytes) -> None:
        """Write memory over the bus: dropped where that cannot be."""
        self.pci.dma_write(address, data)

    def raise_intx(self, level: bool) -> None:
        """Assert the INTx line, or let it go."""
        self.pci.set_line(level)

    def raise_msi(self, vector: int) -> None:
        """Send message `vector`, by MSI-X or MSI, whichever is enabled; a masked one stays pending."""
        if self.msix_enabled:
            if self._masked(vector):
                self._pending.add(vector)
            else:
                self.pci.message(vector)
        elif self.msi_enabled:
            at = self.registers.find(reg.CAP_MSI)
            flags = self.registers.get(at + reg.MSI_FLAGS, 2)
            vector %= 1 << ((flags & reg.MSI_QUEUE_SIZE) >> 4)
            mask = at + (16 if flags & reg.MSI_64BIT else 12)
            if flags & reg.MSI_MASKABLE and self.registers.get(mask, 4) >> vector & 1:
                self.registers.change(mask + 4, 4, set_bits=1 << vector)
            else:
                self.pci.message(vector)

    @property
    def msi_enabled(self) -> bool:
        at = self.registers.find(reg.CAP_MSI)
        return bool(at and self.registers.get(at + reg.MSI_FLAGS, 2) & reg.MSI_ENABLE)

    @property
    def msix_enabled(self) -> bool:
        at = self.registers.find(reg.CAP_MSIX)
        return bool(at and self.registers.get(at + reg.MSIX_FLAGS, 2) & reg.MSIX_ENABLE)

    # --- BARs, with the MSI-X table in one of them ---

    def load(self, bar: int, offset: int, width: int) -> int:
        """A load from a BAR: from the MSI-X table, the pending bits, or the device's own registers."""
        if table := self._in_table(bar, offset, width):
            return int.from_bytes(self._entries()[table], "little")
        if pending := self._in_pending(bar, offset, width):
            bits = sum(1 << vector for vector in self._pending)
            return int.from_bytes((bits.to_bytes(256, "little"))[pending], "little")
        return self.bar_read(bar, offset, width)

    def store(self, bar: int, offset: int, width: int, value: int) -> None:
        """A store to a BAR, as `load`."""
        value &= (1 << 8 * width) - 1
        if table := self._in_table(bar, offset, width):
            self._entries()[table] = value.to_bytes(width, "little")
            self._send_pending()
        elif not self._in_pending(bar, offset, width):
            self.bar_write(bar, offset, width, value)

    def set_entry(self, vector: int, address: int, data: int, masked: bool) -> None:
        """What the host writes to the MSI-X table."""
        entry = address.to_bytes(8, "little") + data.to_bytes(4, "little") + bytes((masked, 0, 0, 0))
        self._entries()[_ENTRY * vector : _ENTRY * (vector + 1)] = entry
        self._send_pending()

    def hardware_reset(self) -> None:
        """A reset reaches the function: the MSI-X table is masked again, and then it is the device's turn."""
        self._table = bytearray()
        self._pending.clear()
        self.reset()

    def config_written(self, offset: int, width: int) -> None:
        """Configuration space was written.  Messages and INTx exclude each other: enabling those lets the line go."""
        msi, msix = self.registers.find(reg.CAP_MSI), self.registers.find(reg.CAP_MSIX)
        in_msi = msi and msi < offset + width and offset < msi + self.registers.msi_length(msi)
        in_msix = msix and offset <= msix + reg.MSIX_FLAGS + 1 < offset + width
        if (in_msi and self.msi_enabled) or (in_msix and self.msix_enabled):
            self.pci.set_line(False)
        self._send_pending()

    @property
    def vectors(self) -> int:
        """Entries of the MSI-X table."""
        at = self.registers.find(reg.CAP_MSIX)
        return (self.registers.get(at + reg.MSIX_FLAGS, 2) & reg.MSIX_SIZE) + 1 if at else 0

    def _entries(self) -> bytearray:
        if not self._table:
            self._table = bytearray((bytes(12) + bytes((_MASKED, 0, 0, 0))) * self.vectors)
        return self._table

    def _masked(self, vector: int) -> bool:
        at = self.registers.find(reg.CAP_MSIX)
        all_masked = self.registers.get(at + reg.MSIX_FLAGS, 2) & reg.MSIX_MASK_ALL
        return bool(all_masked or self._entries()[_ENTRY * vector + 12] & _MASKED)

    def _send_pending(self) -> None:
        if self._pending and self.msix_enabled:
            for vector in sorted(self._pending):
                if not self._masked(vector):
                    self._pending.discard(vector)
                    self.pci.message(vector)

    def _in_table(self, bar: int, offset: int, width: int) -> slice | None:
        return self._within(reg.MSIX_TABLE, _ENTRY * self.vectors, bar, offset, width)

    def _in_pending(self, bar: int, offset: int, width: int) -> slice | None:
        return self._within(reg.MSIX_PBA, -(-self.vectors // 64) * 8, bar, offset, width)

    def _within(self, pointer: int, length: int, bar: int, offset: int, width: int) -> slice | None:
        at = self.registers.find(reg.CAP_MSIX) if length else 0
        if not at:
            return None
        place = self.registers.get(at + pointer, 4)
        start = offset - (place & ~7)
        return slice(start, start + width) if bar == place & 7 and 0 <= start <= length - width else None
