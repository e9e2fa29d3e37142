"""Bridges: any PCI-to-PCI bridge, and the PCI Express root ports of QEMU's POWER machines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfio.fake import registers as reg
from vfio.fake.devices.model import PciModel

if TYPE_CHECKING:
    from vfio import topology
    from vfio.fake.pci import PciDevice

_PHB3 = 0x03DC
_CAP_BRIDGE_SUBSYSTEM, _ROOT_PORT = 0x0D, 4
_ARI_FORWARDING = 0x20


class Bridge(PciModel):
    """A bridge to the bus that its topology names; no BARs, no interrupt."""

    subsystem = (0, 0)  # in a capability, with header type 1

    def __init__(self, device: topology.Device) -> None:
        super().__init__(device)
        multifunction = self.registers.get(reg.HEADER_TYPE, 1) & 0x80
        self.registers.field(reg.HEADER_TYPE, 1, 1 | multifunction)
        below = device.secondary_bus or 0
        primary = int(device.address.split(":")[1], 16)
        self.registers.field(0x18, 3, primary | below << 8 | below << 16, 0xFFFFFF)
        self.registers.field(0x1C, 2, 0x0000, 0xF0F0)
        self.registers.field(0x20, 4, 0, 0xFFF0FFF0)
        self.registers.field(0x24, 4, 0, 0xFFF0FFF0)
        self.registers.field(0x3E, 2, 0, 0x0FFF)  # bridge control


class RootPort(Bridge):
    """A root port of a PHB, whose only bus below is 1, as firmware and kernel have set it up.

    PHB3 (POWER8) differs from later ones in its windows and in the errors that it reports.
    """

    config_size = reg.EXPRESS_SIZE

    def __init__(self, device: topology.Device) -> None:
        super().__init__(device)
        registers = self.registers
        phb3 = device.device == _PHB3
        domain = int(device.address.split(":")[0], 16)
        registers.field(reg.COMMAND, 2, 0x0107, 0x0547)
        registers.field(0x18, 3, 0x010100, 0xFFFFFF)
        registers.field(0x1C, 2, 0x00F0 if phb3 else 0x01F1, 0xF0F0)  # I/O base and limit: none
        registers.field(0x20, 4, 0xFFE08000, 0xFFF0FFF0)  # memory base and limit
        low, high, limit = _prefetchable(phb3, domain)
        registers.field(0x24, 4, limit << 16 | 1, 0xFFF0FFF0)
        registers.field(0x28, 4, low, 0xFFFFFFFF)
        registers.field(0x2C, 4, high, 0xFFFFFFFF)
        registers.field(0x3E, 2, 0x0002, 0x0FFF)  # bridge control: SERR forwarded
        registers.add_capability(_CAP_BRIDGE_SUBSYSTEM, 0x40, 8)
        registers.field(0x44, 4, device.vendor)
        registers.add_express(0x48, port=_ROOT_PORT)
        registers.field(0x50, 2, 0x000F, 0xFFFF)  # device control: all errors reported
        registers.field(0x5A, 2, 0x2011)  # link status: the data link is active
        registers.field(0x5C, 4, 0x0002007B | domain << 19)  # slot capabilities, with the slot's number
        registers.field(0x60, 2, 0x01C0, 0x1FFF)
        registers.field(0x62, 2, 0x0040)  # slot status: something is in it
        registers.field(0x64, 2, 0x0007 if phb3 else 0, 0x001F)  # root control
        registers.field(0x6C, 4, 0x0030_0020)
        registers.field(0x70, 2, _ARI_FORWARDING, 0x8000 | _ARI_FORWARDING)
        registers.add_aer(0x100, severity=0x00072030 if phb3 else 0x00472030)
        registers.field(0x114, 4, 0x2000 if phb3 else 0xE000, 0xF1C1)
        registers.field(0x118, 4, 0x3E0, 0x140)
        registers.field(0x12C, 4, 0x7, 0x7)  # root error command
        if not phb3:  # which has half of the space only
            registers.value[0x800:] = b"\xff" * 0x800
            registers.writable[0x800:] = bytes(0x800)

    def found_below(self, child: PciDevice) -> None:
        """The kernel finds a function on the bus below: one of PCI Express without ARI gets none (pci_configure_ari)."""
        if child.is_express and not child.function:
            self.registers.change(0x70, 2, clear_bits=_ARI_FORWARDING)


def _prefetchable(phb3: bool, domain: int) -> tuple[int, int, int]:
    """Upper words of base and limit of the prefetchable window, and the lower half of the limit."""
    if phb3:
        base = 0x0003D000 + 0x10 * domain
        return base, base + 0xF, 0xDFF1
    base = 0x00060000 + 0x40 * domain
    return base, base + 0x3F, 0xBFF1 if domain == 0 else 0x7FF1
