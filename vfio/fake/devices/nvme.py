"""An endpoint of the shape of QEMU's nvme: 64-bit BAR with an MSI-X table in it, function level reset, no engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfio.fake import registers as reg
from vfio.fake.devices.model import PciModel

if TYPE_CHECKING:
    from vfio import topology


_CAPABILITIES, _VERSION = 0x0040_1820_0F01_07FF, 0x0001_0400
_REGISTERS = _CAPABILITIES.to_bytes(8, "little") + _VERSION.to_bytes(4, "little")


class Nvme(PciModel):
    """65 vectors, INTx, power management that keeps its state in D3hot.

    Its registers are those of a controller that is not enabled; stores to them are dropped.
    """

    config_size = reg.EXPRESS_SIZE
    revision = 2
    interrupt_pin = 1

    def __init__(self, device: topology.Device) -> None:
        super().__init__(device)
        self.add_bar(0, 0x4000, bits64=True)
        self.registers.add_pm(0x60, capabilities=0x0003, control=reg.PM_NO_SOFT_RESET)
        self.registers.add_express(0x80, flr=True)
        self.registers.add_msix(0x40, vectors=65, bar=0, table=0x2000, pba=0x3000)

    def bar_read(self, bar: int, offset: int, width: int) -> int:
        return 0 if bar else int.from_bytes(_REGISTERS[offset : offset + width], "little")
