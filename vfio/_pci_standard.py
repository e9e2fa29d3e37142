"""The capabilities in the first 256 bytes of configuration space, but for PCI Express itself.

PCI Express Base Specification 5.0, chapter 7; PCI Local Bus Specification 3.0, section 6.8 and appendix I (VPD).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from vfio._pci_capability import Capability, PlaceInBar
from vfio._pci_register import Bit, Bits, Number, Part, Register

_STATES = {0: "D0", 1: "D1", 2: "D2", 3: "D3hot"}


class PowerCapabilities(Register, width=2, read_only=True):
    version = Bits(0, 3)
    pme_clock = Bit(3)
    immediate_readiness = Bit(4)
    device_specific_initialization = Bit(5)
    aux_current = Bits(6, 3)
    d1 = Bit(9)
    d2 = Bit(10)
    pme_d0 = Bit(11)
    pme_d1 = Bit(12)
    pme_d2 = Bit(13)
    pme_d3hot = Bit(14)
    pme_d3cold = Bit(15)


class PowerControl(Register, width=2, clears=0x8000):
    state = Bits(0, 2, _STATES)
    no_soft_reset = Bit(3)
    pme_enable = Bit(8)
    data_select = Bits(9, 4)
    data_scale = Bits(13, 2)
    pme_status = Bit(15)


class PowerManagement(Capability):
    id = 0x01
    capabilities = Part(2, PowerCapabilities)
    control = Part(4, PowerControl)


class VpdAddress(Register, width=2):
    address = Bits(0, 15)
    flag = Bit(15)


class VitalProductData(Capability):
    """Data is read by writing an address with the flag 0, and is there when the flag is 1."""

    id = 0x03
    address = Part(2, VpdAddress)
    data = Number(4, 4, writable=True)


class MsiControl(Register, width=2):
    enable = Bit(0)
    capable_log2 = Bits(1, 3)
    enabled_log2 = Bits(4, 3)
    bits64 = Bit(7)
    maskable = Bit(8)
    extended_data = Bit(9)
    extended_data_enable = Bit(10)


class Msi(Capability):
    """Where data and masks are depends on whether addresses have 64 bits."""

    id = 0x05
    control = Part(2, MsiControl)
    address_low = Number(4, 4, writable=True)

    @property
    def vectors(self) -> int:
        """How many it can have, 1 to 32."""
        return 1 << self.control.capable_log2

    @property
    def address(self) -> int:
        return self.address_high << 32 | self.address_low

    @property
    def address_high(self) -> int:
        return self._number("address_high") or 0

    @property
    def data(self) -> int:
        return self._number("data") or 0

    @property
    def mask(self) -> int | None:
        """A bit for each vector that is masked; None where they cannot be."""
        return self._number("mask")

    @property
    def pending(self) -> int | None:
        """A bit for each masked vector that is waiting; None where they cannot be."""
        return self._number("pending")

    def present(self) -> Iterator[tuple[str, Number | Part[Any]]]:
        yield from super().present()
        for name, place in self._places().items():
            if self.offset + place.offset + place.width <= self.source.size:
                yield name, place

    def _places(self) -> dict[str, Number]:
        control = self.control
        high = 4 if control.bits64 else 0
        found = {"address_high": Number(8, 4)} if high else {}
        found["data"] = Number(8 + high, 2)
        if control.maskable:
            found |= {"mask": Number(12 + high, 4), "pending": Number(16 + high, 4)}
        return found

    def _number(self, name: str) -> int | None:
        place = self._places().get(name)
        if place is None:
            return None
        return int.from_bytes(self.source.read(self.offset + place.offset, place.width), "little")


class Location(NamedTuple):
    """A place in a BAR."""

    bar: int
    offset: int


class MsixControl(Register, width=2):
    last_vector = Bits(0, 11)
    mask_all = Bit(14)
    enable = Bit(15)


class Msix(Capability):
    id = 0x11
    control = Part(2, MsixControl)
    table = Part(4, PlaceInBar)
    pending = Part(8, PlaceInBar)

    @property
    def vectors(self) -> int:
        """How many it has, 1 to 2048."""
        return self.control.last_vector + 1

    @property
    def table_location(self) -> Location:
        """Where the table is: 16 bytes a vector."""
        return Location(self.table.bar, self.table.offset_8 << 3)

    @property
    def pending_location(self) -> Location:
        """Where the pending bits are."""
        return Location(self.pending.bar, self.pending.offset_8 << 3)


class Vendor(Capability):
    """Whatever the vendor put there."""

    id = 0x09
    length = Number(2, 1)

    @property
    def data(self) -> bytes:
        """All of it, from its ID on, as far as it lies within the 256 bytes."""
        end = min(self.offset + max(self.length, 3), self.source.size, 0x100)
        return self.source.read(self.offset, end - self.offset)


class BridgeSubsystem(Capability):
    id = 0x0D
    subsystem_vendor = Number(4, 2)
    subsystem_device = Number(6, 2)


class AdvancedFeatureCapabilities(Register, width=1, read_only=True):
    transactions_pending = Bit(0)
    function_reset = Bit(1)


class AdvancedFeatureControl(Register, width=1):
    function_reset = Bit(0)


class AdvancedFeatureStatus(Register, width=1, read_only=True):
    transactions_pending = Bit(0)


class AdvancedFeatures(Capability):
    """Conventional PCI's function level reset."""

    id = 0x13
    length = Number(2, 1)
    capabilities = Part(3, AdvancedFeatureCapabilities)
    control = Part(4, AdvancedFeatureControl)
    status = Part(5, AdvancedFeatureStatus)
