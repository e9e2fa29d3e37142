"""Configuration space as the hardware has it: bytes, and which of their bits a write changes.

Offsets and widths are in bytes; values are little-endian, as on the bus.  Names are those of the PCI specifications.
"""

from __future__ import annotations

from collections.abc import Iterator

STANDARD_SIZE, EXPRESS_SIZE = 256, 4096

VENDOR_ID, DEVICE_ID, COMMAND, STATUS, REVISION, CLASS = 0x00, 0x02, 0x04, 0x06, 0x08, 0x09
CACHE_LINE_SIZE, HEADER_TYPE, BAR0, SUBSYSTEM, ROM_BAR = 0x0C, 0x0E, 0x10, 0x2C, 0x30
CAPABILITIES, INTERRUPT_LINE, INTERRUPT_PIN = 0x34, 0x3C, 0x3D
HEADER_END = 0x40

COMMAND_IO, COMMAND_MEMORY, COMMAND_MASTER, COMMAND_SERR, COMMAND_INTX_DISABLE = 0x1, 0x2, 0x4, 0x100, 0x400
STATUS_INTERRUPT, STATUS_CAP_LIST = 0x08, 0x10
_COMMAND_WRITABLE = COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER | COMMAND_SERR | COMMAND_INTX_DISABLE
_STATUS_ERRORS = 0xF900

CAP_PM, CAP_VPD, CAP_MSI, CAP_VENDOR, CAP_EXPRESS, CAP_MSIX, CAP_AF = 0x01, 0x03, 0x05, 0x09, 0x10, 0x11, 0x13
EXT_CAP_AER, EXT_CAP_DSN = 0x01, 0x03

PM_CTRL, PM_STATE, PM_NO_SOFT_RESET = 4, 0x3, 0x8
MSI_FLAGS, MSI_ENABLE, MSI_QUEUE_MAX, MSI_QUEUE_SIZE, MSI_64BIT, MSI_MASKABLE = 2, 0x1, 0xE, 0x70, 0x80, 0x100
MSIX_FLAGS, MSIX_TABLE, MSIX_PBA, MSIX_ENABLE, MSIX_MASK_ALL, MSIX_SIZE = 2, 4, 8, 0x8000, 0x4000, 0x7FF
EXP_FLAGS, EXP_DEVCAP, EXP_DEVCTL, EXP_DEVCAP_FLR, EXP_DEVCTL_FLR = 2, 4, 8, 1 << 28, 0x8000
_ROOT_PORT = 4
ROOT_COMPLEX_ENDPOINT = 9  # device/port type of a function that sits on the root bus itself
AF_CAP, AF_CTRL, AF_CAP_TP, AF_CAP_FLR = 3, 4, 1, 2


class ConfigRegisters:
    """256 or 4096 bytes of registers.  Where nothing is said, the header is read-only and the rest plain storage."""

    def __init__(self, size: int = STANDARD_SIZE) -> None:
        self.size = size
        self.value = bytearray(size)
        self.writable = bytearray(HEADER_END) + bytearray(b"\xff" * (size - HEADER_END))
        """Bits that a write sets."""
        self.clears = bytearray(size)
        """Bits that writing a one clears."""
        self.field(COMMAND, 2, 0, _COMMAND_WRITABLE)
        self.field(STATUS, 2, 0, clears=_STATUS_ERRORS)
        self.field(CACHE_LINE_SIZE, 1, 0, 0xFF)
        self.field(INTERRUPT_LINE, 1, 0, 0xFF)
        if size == EXPRESS_SIZE:
            self.field(STANDARD_SIZE, 4, 0)  # an empty list of extended capabilities

    def field(self, offset: int, width: int, value: int, writable: int = 0, clears: int = 0) -> None:
        """Define a field: its value, the bits that can be written, and those that writing a one clears."""
        span = slice(offset, offset + width)
        self.value[span] = value.to_bytes(width, "little")
        self.writable[span] = writable.to_bytes(width, "little")
        self.clears[span] = clears.to_bytes(width, "little")

    def get(self, offset: int, width: int) -> int:
        """The value of a field."""
        return int.from_bytes(self.value[offset : offset + width], "little")

    def set(self, offset: int, width: int, value: int) -> None:
        """Set a field, writable or not: what the hardware itself does."""
        self.value[offset : offset + width] = value.to_bytes(width, "little")

    def change(self, offset: int, width: int, set_bits: int = 0, clear_bits: int = 0) -> None:
        """Set and clear bits of a field, writable or not."""
        self.set(offset, width, self.get(offset, width) & ~clear_bits | set_bits)

    def write(self, offset: int, width: int, value: int) -> None:
        """A configuration write: only what is writable changes."""
        for at, byte in enumerate(value.to_bytes(width, "little"), start=offset):
            kept = self.value[at] & ~self.writable[at]
            self.value[at] = (kept | byte & self.writable[at]) & ~(byte & self.clears[at])

    # --- capabilities ---

    def add_capability(self, identity: int, offset: int, length: int) -> int:
        """Put a capability of `length` read-only bytes in front of the list; returns `offset`."""
        first = self.get(CAPABILITIES, 1) if self.get(STATUS, 2) & STATUS_CAP_LIST else 0
        self.field(offset, length, identity | first << 8)
        self.set(CAPABILITIES, 1, offset)
        self.change(STATUS, 2, STATUS_CAP_LIST)
        return offset

    def remove_capability(self, offset: int) -> None:
        """Take the capability at `offset` from the list; its bytes stay."""
        following = self.value[offset + 1]
        before = next((at + 1 for at, _ in self.capabilities() if self.value[at + 1] == offset), CAPABILITIES)
        self.set(before, 1, following)
        if not self.get(CAPABILITIES, 1):
            self.change(STATUS, 2, clear_bits=STATUS_CAP_LIST)

    def add_extended(self, identity: int, version: int, offset: int, length: int) -> int:
        """Put an extended capability of `length` read-only bytes at the end of the list; returns `offset`."""
        last = [at for at, _ in self.extended_capabilities()][-1:]
        self.field(offset, length, identity | version << 16)
        for at in last:
            self.change(at, 4, offset << 20)
        return offset

    def capabilities(self) -> Iterator[tuple[int, int]]:
        """Offset and ID of each capability, in the order of the list."""
        at = self.get(CAPABILITIES, 1) & 0xFC if self.get(STATUS, 2) & STATUS_CAP_LIST else 0
        for _ in range((STANDARD_SIZE - HEADER_END) // 4):
            if not at:
                return
            yield at, self.value[at]
            at = self.value[at + 1] & 0xFC

    def extended_capabilities(self) -> Iterator[tuple[int, int]]:
        """Offset and ID of each extended capability, in the order of the list."""
        at = STANDARD_SIZE if self.size == EXPRESS_SIZE and self.get(STANDARD_SIZE, 4) else 0
        for _ in range((EXPRESS_SIZE - STANDARD_SIZE) // 8):
            if at < STANDARD_SIZE:
                return
            header = self.get(at, 4)
            yield at, header & 0xFFFF
            at = header >> 20 & 0xFFC

    def find(self, identity: int) -> int:
        """Offset of the first capability with this ID; 0 without one."""
        return next((at for at, found in self.capabilities() if found == identity), 0)

    # --- well-known capabilities ---

    def add_pm(self, offset: int, capabilities: int, control: int = 0, writable: int = PM_STATE) -> None:
        """Power management."""
        self.add_capability(CAP_PM, offset, 8)
        self.field(offset + 2, 2, capabilities)
        self.field(offset + PM_CTRL, 2, control, writable, clears=0x8000 if writable & 0x100 else 0)

    def add_msi(self, offset: int, vectors: int = 1, bits64: bool = True, maskable: bool = False) -> None:
        """MSI with a power of two of vectors, 1 to 32."""
        length = (14 if bits64 else 10) + (10 if maskable else 0)
        self.add_capability(CAP_MSI, offset, length)
        flags = (vectors.bit_length() - 1) << 1 | (MSI_64BIT if bits64 else 0) | (MSI_MASKABLE if maskable else 0)
        queue = MSI_QUEUE_SIZE if vectors > 1 else 0
        self.field(offset + MSI_FLAGS, 2, flags, MSI_ENABLE | queue)
        self.field(offset + 4, 4, 0, 0xFFFF_FFFC)
        if bits64:
            self.field(offset + 8, 4, 0, 0xFFFF_FFFF)
        data = offset + (12 if bits64 else 8)
        self.field(data, 2, 0, 0xFFFF)
        if maskable:
            self.field(data + 4, 4, 0, (1 << vectors) - 1)

    def add_msix(self, offset: int, vectors: int, bar: int, table: int, pba: int) -> None:
        """MSI-X with `vectors` entries (1 to 2048) in a table at byte `table` of `bar`, pending bits at byte `pba`."""
        self.add_capability(CAP_MSIX, offset, 12)
        self.field(offset + MSIX_FLAGS, 2, vectors - 1, MSIX_ENABLE | MSIX_MASK_ALL)
        self.field(offset + MSIX_TABLE, 4, table | bar)
        self.field(offset + MSIX_PBA, 4, pba | bar)

    def add_express(
        self, offset: int, *, version: int = 2, port: int = 0, devcap: int = 0x8000, flr: bool = False
    ) -> None:
        """PCI Express with a link of one lane at 2.5 GT/s; `port` is the device/port type (0: endpoint)."""
        self.add_capability(CAP_EXPRESS, offset, 0x3C if version > 1 else 0x14)
        self.field(offset + EXP_FLAGS, 2, version | port << 4 | (0x100 if port == _ROOT_PORT else 0))
        self.field(offset + EXP_DEVCAP, 4, devcap | (EXP_DEVCAP_FLR if flr else 0))
        self.field(offset + EXP_DEVCTL, 2, 0, EXP_DEVCTL_FLR if flr else 0)
        self.field(offset + 0xC, 4, 0x411)  # link capabilities: ASPM L0s, one lane, 2.5 GT/s
        self.field(offset + 0x12, 2, 0x11)  # link status
        if version > 1:
            self.field(offset + 0x24, 4, 0x0030_0000)  # device capabilities 2: two end-end TLP prefixes
            self.field(offset + 0x28, 2, 0, 0x8000)

    def add_aer(self, offset: int, version: int = 2, *, severity: int = 0x00462030) -> None:
        """Advanced error reporting."""
        self.add_extended(EXT_CAP_AER, version, offset, 0x48)
        uncorrectable, correctable = 0x03FF_F030, 0xF1C1
        self.field(offset + 0x04, 4, 0, clears=uncorrectable)
        self.field(offset + 0x0C, 4, severity, uncorrectable)
        self.field(offset + 0x10, 4, 0, clears=correctable)
        self.field(offset + 0x14, 4, 0xE000, correctable)
        self.field(offset + 0x18, 4, 0xA0, 0x140)

    def reset(self) -> None:
        """What a function level reset or a bus reset leaves: decoding, interrupts and bus mastering off, no BARs."""
        self.change(COMMAND, 2, clear_bits=_COMMAND_WRITABLE)
        self.change(STATUS, 2, clear_bits=_STATUS_ERRORS)
        self.set(CACHE_LINE_SIZE, 1, 0)
        self.set(INTERRUPT_LINE, 1, 0)
        for bar in (*range(BAR0, BAR0 + 24, 4), ROM_BAR):
            self.write(bar, 4, 0)
        if msi := self.find(CAP_MSI):
            self.write(msi + MSI_FLAGS, 2, 0)
            for at in range(msi + 4, msi + self.msi_length(msi), 2):
                self.write(at, 2, 0)
        if msix := self.find(CAP_MSIX):
            self.write(msix + MSIX_FLAGS, 2, 0)

    def msi_length(self, offset: int) -> int:
        """Bytes of the MSI capability at `offset`: 10, 14, 20 or 24."""
        flags = self.get(offset + MSI_FLAGS, 2)
        return 10 + (4 if flags & MSI_64BIT else 0) + (10 if flags & MSI_MASKABLE else 0)
