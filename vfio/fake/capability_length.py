"""How many bytes of configuration space a capability takes, and 0 for those that vfio-pci hides.  (vfio_pci_config.c)"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfio.fake import registers as reg

if TYPE_CHECKING:
    from vfio.fake.pci import PciDevice

_AGP, _PCIX, _HYPERTRANSPORT, _SATA = 0x02, 0x07, 0x08, 0x12
_FIXED = {reg.CAP_PM: 8, _AGP: 12, reg.CAP_VPD: 8, reg.CAP_MSIX: 12, reg.CAP_AF: 6}

_EXT_VC, _EXT_MFVC, _EXT_VC9, _EXT_VENDOR = 0x02, 0x08, 0x09, 0x0B
_EXT_ACS, _EXT_REBAR, _EXT_DPA, _EXT_TPH, _EXT_DVSEC = 0x0D, 0x15, 0x16, 0x17, 0x23
_EXT_FIXED = {
    reg.EXT_CAP_AER: 44,
    reg.EXT_CAP_DSN: 12,
    0x04: 16,  # power budgeting
    0x0E: 8,  # alternative routing ID
    0x0F: 8,  # address translation services
    0x10: 64,  # single-root I/O virtualisation
    0x12: 40,  # multicast
    0x13: 16,  # page request
    0x18: 8,  # latency tolerance
}


def standard(pci: PciDevice, identity: int, at: int) -> int:
    """Bytes of the capability `identity` at offset `at`."""

    def read(offset: int, width: int) -> int:
        return pci.config_read(at + offset, width)

    if identity == reg.CAP_MSI:
        return pci.registers.msi_length(at)
    if identity == _PCIX:
        return 24 if read(2, 2) & 0x3000 else 8
    if identity == reg.CAP_VENDOR:
        return read(2, 1)
    if identity == reg.CAP_EXPRESS:
        flags = read(reg.EXP_FLAGS, 2)
        integrated = flags >> 4 & 0xF == reg.ROOT_COMPLEX_ENDPOINT
        if flags & 0xF == 1:
            return 12 if integrated else 20
        return 44 if integrated else 60
    if identity == _HYPERTRANSPORT:
        return 24 if read(3, 1) & 0xE0 else 28
    if identity == _SATA:
        return 16 if read(4, 1) & 0xF == 0xF else 8
    return _FIXED.get(identity, 0)


def extended(pci: PciDevice, identity: int, at: int) -> int:
    """Bytes of the extended capability `identity` at offset `at`."""

    def read(offset: int, width: int) -> int:
        return pci.config_read(at + offset, width)

    if identity == _EXT_VENDOR:
        return read(4, 4) >> 20
    if identity == _EXT_DVSEC:
        return read(4, 4) >> 20
    if identity in (_EXT_VC, _EXT_MFVC, _EXT_VC9):
        return _virtual_channel(read(4, 4), read(8, 4))
    if identity == _EXT_ACS:
        if not read(4, 1) & 0x20:
            return 8
        bits = -(-read(5, 1) // 32) * 32 or 256
        return 8 + bits // 8
    if identity == _EXT_REBAR:
        return 4 + (read(8, 1) >> 5 & 7) * 8
    if identity == _EXT_DPA:
        return 16 + (read(4, 1) & 0x1F) + 1
    if identity == _EXT_TPH:
        capable = read(4, 4)
        return 12 + ((capable >> 16 & 0x7FF) * 2 + 2 if capable & 0x600 == 0x200 else 0)
    return _EXT_FIXED.get(identity, 0)


def _virtual_channel(port1: int, port2: int) -> int:
    phases = next((n for n, bit in ((128, 8), (64, 4), (32, 2)) if port2 & bit), 0)
    length = 16 + (1 + (port1 & 7)) * 12
    if phases:
        length = -(-length // 16) * 16 + phases * 4 // 8
    return length
