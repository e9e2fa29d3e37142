"""What all capabilities of PCI functions have, and the names of those that there are.

PCI Code and ID Assignment Specification; offsets are from the beginning of the capability.
"""

from __future__ import annotations

from typing import ClassVar

from vfio._pci_register import Bits, Register, Source, Structure

STANDARD_NAMES = {
    0x00: "null",
    0x01: "PM",
    0x02: "AGP",
    0x03: "VPD",
    0x04: "slot ID",
    0x05: "MSI",
    0x06: "CompactPCI hot swap",
    0x07: "PCI-X",
    0x08: "HyperTransport",
    0x09: "vendor",
    0x0A: "debug port",
    0x0B: "CompactPCI resource control",
    0x0C: "hot plug",
    0x0D: "bridge subsystem",
    0x0E: "AGP 8x",
    0x0F: "secure device",
    0x10: "PCI Express",
    0x11: "MSI-X",
    0x12: "SATA",
    0x13: "AF",
    0x14: "enhanced allocation",
    0x15: "flattening portal bridge",
}
EXTENDED_NAMES = {
    0x0001: "AER",
    0x0002: "virtual channel",
    0x0003: "serial number",
    0x0004: "power budgeting",
    0x0005: "root complex link declaration",
    0x0006: "root complex internal link control",
    0x0007: "root complex event collector",
    0x0008: "multi-function virtual channel",
    0x0009: "virtual channel",
    0x000A: "root complex register block",
    0x000B: "vendor",
    0x000D: "ACS",
    0x000E: "ARI",
    0x000F: "ATS",
    0x0010: "SR-IOV",
    0x0011: "MR-IOV",
    0x0012: "multicast",
    0x0013: "page request",
    0x0015: "resizable BAR",
    0x0016: "dynamic power allocation",
    0x0017: "TPH requester",
    0x0018: "latency tolerance",
    0x0019: "secondary PCI Express",
    0x001B: "PASID",
    0x001D: "downstream port containment",
    0x001E: "L1 substates",
    0x001F: "precision time measurement",
    0x0023: "designated vendor",
    0x0025: "data link feature",
    0x0026: "16 GT/s",
    0x0027: "lane margining",
    0x002A: "32 GT/s",
}


class Capability(Structure):
    """One capability; `offset` is where it begins."""

    id: ClassVar[int | None] = None
    extended: ClassVar[bool] = False

    def __init__(self, source: Source, offset: int, identity: int, version: int | None = None) -> None:
        super().__init__(source, offset)
        self.identity = identity
        """Its ID; standard and extended capabilities have IDs of their own."""
        self.version = version
        """0 to 15; None for a standard capability."""

    @property
    def name(self) -> str:
        names = EXTENDED_NAMES if self.version is not None else STANDARD_NAMES
        return names.get(self.identity, f"capability {self.identity:#04x}")

    def __repr__(self) -> str:
        return f"<{self.name} at {self.offset:#x}>"


class PlaceInBar(Register, width=4, read_only=True):
    """Where in the memory of a BAR something is."""

    bar = Bits(0, 3)
    offset_8 = Bits(3, 29)

    def __str__(self) -> str:
        return f"BAR{self.bar} at {self.offset_8 << 3:#x}"
