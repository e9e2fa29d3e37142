"""What vfio-pci makes virtual and what it lets a user write, by capability.  (vfio_pci_config.c)"""

from __future__ import annotations

from vfio.fake import registers as reg

CAP_PCIX = 0x07
PMC_PME, PMCSR_PME = 0xF800, 0x8100
"""PME support, and PME enable and status: the host's business."""

_EXT_POWER, _EXT_VENDOR, _EXT_DVSEC = 0x04, 0x0B, 0x23


class Permissions:
    """Masks for the bytes of a capability: nothing virtual, nothing writable, but for the fields that are named."""

    def __init__(self, length: int) -> None:
        length = -(-length // 4) * 4
        self._virtual, self._writable = bytearray(length), bytearray(length)

    def field(self, offset: int, width: int, virtual: int, writable: int) -> None:
        """The masks of a field."""
        self._virtual[offset : offset + width] = virtual.to_bytes(width, "little")
        self._writable[offset : offset + width] = writable.to_bytes(width, "little")

    def virtual(self, offset: int, width: int) -> int:
        """Bits that are the shadow copy's."""
        return int.from_bytes(self._virtual[offset : offset + width], "little")

    def writable(self, offset: int, width: int) -> int:
        """Bits that a user can change."""
        return int.from_bytes(self._writable[offset : offset + width], "little")


def _header() -> Permissions:
    found = Permissions(reg.HEADER_END)
    found.field(reg.VENDOR_ID, 4, 0xFFFF_FFFF, 0)
    found.field(reg.COMMAND, 2, reg.COMMAND_INTX_DISABLE, 0xFFFF)
    found.field(reg.STATUS, 2, reg.STATUS_CAP_LIST, 0)
    for at in (0x0C, 0x0D, 0x0F):  # cache line size, latency timer, BIST
        found.field(at, 1, 0, 0xFF)
    for at in (*range(reg.BAR0, reg.BAR0 + 24, 4), reg.ROM_BAR):
        found.field(at, 4, 0xFFFF_FFFF, 0xFFFF_FFFF)
    found.field(reg.CAPABILITIES, 1, 0xFF, 0)
    found.field(reg.INTERRUPT_LINE, 1, 0xFF, 0xFF)
    found.field(reg.INTERRUPT_PIN, 1, 0xFF, 0)
    return found


def _capability(length: int) -> Permissions:
    found = Permissions(length)
    found.field(1, 1, 0xFF, 0)  # the pointer to the next
    return found


def _power_management() -> Permissions:
    found = _capability(8)
    found.field(2, 2, PMC_PME, 0)
    found.field(reg.PM_CTRL, 4, PMCSR_PME, 0xFFFF_FFFF & ~(PMCSR_PME | reg.PM_STATE))
    return found


def _vital_product_data() -> Permissions:
    found = _capability(8)
    found.field(2, 2, 0xFFFF, 0xFFFF)
    found.field(4, 4, 0xFFFF_FFFF, 0xFFFF_FFFF)
    return found


def _pci_x() -> Permissions:
    found = _capability(24)
    found.field(2, 2, 0, 0xFFFF)  # command
    found.field(8, 4, 0, 0xFFFF_FFFF)  # ECC control and status
    return found


def _express() -> Permissions:
    found = _capability(60)
    # The payload size is for the host to say; phantom functions would confuse the IOMMU.
    found.field(reg.EXP_DEVCTL, 2, reg.EXP_DEVCTL_FLR | 0x00E0 | 0x7000, 0xFFFF & ~0x0200)
    found.field(0x28, 2, 0, 0xFFFF & ~0x0020)  # device control 2, but for ARI
    return found


def _advanced_features() -> Permissions:
    found = _capability(6)
    found.field(reg.AF_CTRL, 1, 1, 1)
    return found


def msi(flags: int) -> Permissions:
    """Of the MSI capability whose message control is `flags`."""
    found = _capability(24)
    found.field(reg.MSI_FLAGS, 1, 0xFF, 0xFF)
    found.field(4, 4, 0xFFFF_FFFF, 0xFFFF_FFFF)
    data = 8
    if flags & reg.MSI_64BIT:
        found.field(8, 4, 0xFFFF_FFFF, 0xFFFF_FFFF)
        data = 12
    found.field(data, 2, 0xFFFF, 0xFFFF)
    if flags & reg.MSI_MASKABLE:
        found.field(data + 4, 4, 0, 0xFFFF_FFFF)
        found.field(data + 8, 4, 0, 0xFFFF_FFFF)
    return found


def _error_reporting() -> Permissions:
    found = Permissions(44)
    found.field(0, 4, 0xFFFF_FFFF, 0)
    for at in (0x04, 0x08, 0x0C):  # uncorrectable: status, mask, severity
        found.field(at, 4, 0, 0x03FF_F031)
    for at in (0x10, 0x14):  # correctable: status, mask
        found.field(at, 4, 0, 0x0000_F1C1)
    found.field(0x18, 4, 0, 0x140)  # ECRC generation and checking
    return found


def _power_budgeting() -> Permissions:
    found = Permissions(16)
    found.field(0, 4, 0xFFFF_FFFF, 0)
    found.field(8, 1, 0, 0xFF)
    return found


STANDARD = {
    0: _header(),
    reg.CAP_PM: _power_management(),
    reg.CAP_VPD: _vital_product_data(),
    CAP_PCIX: _pci_x(),
    reg.CAP_EXPRESS: _express(),
    reg.CAP_AF: _advanced_features(),
}
"""By capability ID; 0 is the header."""

EXTENDED = {reg.EXT_CAP_AER: _error_reporting(), _EXT_POWER: _power_budgeting()}
"""By extended capability ID."""

EXTENDED_RAW = frozenset({_EXT_VENDOR, _EXT_DVSEC})
"""Extended capabilities whose bytes are written as they are."""
