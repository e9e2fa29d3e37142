"""The capabilities of PCI functions, one class each; of a capability without a class only the name is known.

PCI Express Base Specification 5.0, chapter 7; PCI Local Bus Specification 3.0, section 6.8 and appendix I (VPD).
Offsets are from the beginning of the capability.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

from vfio._pci_register import Bit, Bits, Number, Part, Register, Source, Structure

_STATES = {0: "D0", 1: "D1", 2: "D2", 3: "D3hot"}
_SIZES = {n: f"{128 << n} bytes" for n in range(6)}
_SPEEDS = {1: "2.5 GT/s", 2: "5 GT/s", 3: "8 GT/s", 4: "16 GT/s", 5: "32 GT/s", 6: "64 GT/s"}
_ASPM = {0: "none", 1: "L0s", 2: "L1", 3: "L0s and L1"}
_ROOT_PORT, _DOWNSTREAM_PORT, _EVENT_COLLECTOR = 4, 6, 10
_PORTS = {
    0: "endpoint",
    1: "legacy endpoint",
    _ROOT_PORT: "root port",
    5: "upstream port",
    _DOWNSTREAM_PORT: "downstream port",
    7: "PCI Express to PCI bridge",
    8: "PCI to PCI Express bridge",
    9: "root complex endpoint",
    _EVENT_COLLECTOR: "root complex event collector",
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


class MsixLocation(Register, width=4, read_only=True):
    bar = Bits(0, 3)
    offset_8 = Bits(3, 29)

    def __str__(self) -> str:
        return f"BAR{self.bar} at {self.offset_8 << 3:#x}"


class Msix(Capability):
    id = 0x11
    control = Part(2, MsixControl)
    table = Part(4, MsixLocation)
    pending = Part(8, MsixLocation)

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


# --- PCI Express ---


class ExpressFlags(Register, width=2, read_only=True):
    version = Bits(0, 4)
    type = Bits(4, 4, _PORTS)
    slot = Bit(8)
    message = Bits(9, 5)


class DeviceCapabilities(Register, width=4, read_only=True):
    max_payload = Bits(0, 3, _SIZES)
    phantom_functions = Bits(3, 2)
    extended_tag = Bit(5)
    l0s_latency = Bits(6, 3)
    l1_latency = Bits(9, 3)
    role_based_errors = Bit(15)
    power_limit = Bits(18, 8)
    power_limit_scale = Bits(26, 2)
    function_reset = Bit(28)


class DeviceControl(Register, width=2):
    report_correctable = Bit(0)
    report_non_fatal = Bit(1)
    report_fatal = Bit(2)
    report_unsupported = Bit(3)
    relaxed_ordering = Bit(4)
    max_payload = Bits(5, 3, _SIZES)
    extended_tag = Bit(8)
    phantom_functions = Bit(9)
    aux_power = Bit(10)
    no_snoop = Bit(11)
    max_read_request = Bits(12, 3, _SIZES)
    function_reset = Bit(15)


class DeviceStatus(Register, width=2, clears=0x000F):
    correctable_error = Bit(0)
    non_fatal_error = Bit(1)
    fatal_error = Bit(2)
    unsupported_request = Bit(3)
    aux_power = Bit(4)
    transactions_pending = Bit(5)


class LinkCapabilities(Register, width=4, read_only=True):
    speed = Bits(0, 4, _SPEEDS)
    lanes = Bits(4, 6)
    aspm = Bits(10, 2, _ASPM)
    clock_power_management = Bit(18)
    surprise_down = Bit(19)
    active_reporting = Bit(20)
    bandwidth_notification = Bit(21)
    port = Bits(24, 8)


class LinkControl(Register, width=2):
    aspm = Bits(0, 2, _ASPM)
    read_completion_128 = Bit(3)
    disabled = Bit(4)
    retrain = Bit(5)
    common_clock = Bit(6)
    extended_synch = Bit(7)
    clock_power_management = Bit(8)


class LinkStatus(Register, width=2, clears=0xC000):
    speed = Bits(0, 4, _SPEEDS)
    lanes = Bits(4, 6)
    training = Bit(11)
    slot_clock = Bit(12)
    active = Bit(13)
    bandwidth_managed = Bit(14)
    bandwidth_changed = Bit(15)


class SlotCapabilities(Register, width=4, read_only=True):
    attention_button = Bit(0)
    power_controller = Bit(1)
    attention_indicator = Bit(3)
    power_indicator = Bit(4)
    surprise = Bit(5)
    hot_plug = Bit(6)
    number = Bits(19, 13)


class SlotControl(Register, width=2):
    attention_indicator = Bits(6, 2)
    power_indicator = Bits(8, 2)
    power_off = Bit(10)


class SlotStatus(Register, width=2, clears=0x011F):
    attention_button = Bit(0)
    power_fault = Bit(1)
    presence_changed = Bit(3)
    command_completed = Bit(4)
    present = Bit(6)
    link_changed = Bit(8)


class RootControl(Register, width=2):
    serr_on_correctable = Bit(0)
    serr_on_non_fatal = Bit(1)
    serr_on_fatal = Bit(2)
    pme_interrupt = Bit(3)


class RootStatus(Register, width=4, clears=0x10000):
    pme_requester = Bits(0, 16)
    pme = Bit(16)
    pme_pending = Bit(17)


class DeviceCapabilities2(Register, width=4, read_only=True):
    completion_timeout_ranges = Bits(0, 4)
    completion_timeout_disable = Bit(4)
    ari_forwarding = Bit(5)
    atomic_routing = Bit(6)
    atomic_32 = Bit(7)
    atomic_64 = Bit(8)
    cas_128 = Bit(9)
    latency_tolerance = Bit(11)
    extended_format = Bit(20)
    end_to_end_prefix = Bit(21)
    prefixes = Bits(22, 2)


class DeviceControl2(Register, width=2):
    completion_timeout = Bits(0, 4)
    completion_timeout_disable = Bit(4)
    ari_forwarding = Bit(5)
    atomic_requester = Bit(6)
    atomic_egress_blocking = Bit(7)
    ido_request = Bit(8)
    ido_completion = Bit(9)
    latency_tolerance = Bit(10)
    end_to_end_prefix_blocking = Bit(15)


class Express(Capability):
    """PCI Express."""

    id = 0x10
    flags = Part(0x02, ExpressFlags)
    device_capabilities = Part(0x04, DeviceCapabilities)
    device_control = Part(0x08, DeviceControl)
    device_status = Part(0x0A, DeviceStatus)
    link_capabilities = Part(0x0C, LinkCapabilities)
    link_control = Part(0x10, LinkControl)
    link_status = Part(0x12, LinkStatus)
    slot_capabilities = Part(0x14, SlotCapabilities)
    slot_control = Part(0x18, SlotControl)
    slot_status = Part(0x1A, SlotStatus)
    root_control = Part(0x1C, RootControl)
    root_status = Part(0x20, RootStatus)
    device_capabilities_2 = Part(0x24, DeviceCapabilities2)
    device_control_2 = Part(0x28, DeviceControl2)
    link_capabilities_2 = Number(0x2C, 4)
    link_control_2 = Number(0x30, 2, writable=True)
    link_status_2 = Number(0x32, 2)

    def has(self, name: str) -> bool:
        """Slots and roots are for ports; the second half came with version 2."""
        flags = self.flags
        if name.startswith("slot"):
            return flags.slot and flags.type in (_ROOT_PORT, _DOWNSTREAM_PORT)
        if name.startswith("root"):
            return flags.type in (_ROOT_PORT, _EVENT_COLLECTOR)
        return not name.endswith("_2") or flags.version >= 2


# --- Extended capabilities ---


class Uncorrectable(Register, width=4):
    """Errors that lose a transaction."""

    data_link_protocol = Bit(4)
    surprise_down = Bit(5)
    poisoned_packet = Bit(12)
    flow_control = Bit(13)
    completion_timeout = Bit(14)
    completer_abort = Bit(15)
    unexpected_completion = Bit(16)
    receiver_overflow = Bit(17)
    malformed_packet = Bit(18)
    ecrc = Bit(19)
    unsupported_request = Bit(20)
    acs_violation = Bit(21)
    internal = Bit(22)
    multicast_blocked = Bit(23)
    atomic_egress_blocked = Bit(24)
    prefix_blocked = Bit(25)
    poisoned_egress_blocked = Bit(26)


class UncorrectableStatus(Uncorrectable, clears=0x07FF_F030):
    pass


class Correctable(Register, width=4):
    """Errors that the hardware mended."""

    receiver_error = Bit(0)
    bad_packet = Bit(6)
    bad_data_link_packet = Bit(7)
    replay_rollover = Bit(8)
    replay_timeout = Bit(12)
    advisory_non_fatal = Bit(13)
    internal = Bit(14)
    header_log_overflow = Bit(15)


class CorrectableStatus(Correctable, clears=0xF1C1):
    pass


class AerControl(Register, width=4):
    first_error = Bits(0, 5)
    ecrc_generation_capable = Bit(5)
    ecrc_generation = Bit(6)
    ecrc_check_capable = Bit(7)
    ecrc_check = Bit(8)
    multiple_headers_capable = Bit(9)
    multiple_headers = Bit(10)
    prefix_logged = Bit(11)


class AdvancedErrors(Capability):
    """Advanced error reporting (AER)."""

    id, extended = 0x01, True
    uncorrectable_status = Part(0x04, UncorrectableStatus)
    uncorrectable_mask = Part(0x08, Uncorrectable)
    uncorrectable_severity = Part(0x0C, Uncorrectable)
    correctable_status = Part(0x10, CorrectableStatus)
    correctable_mask = Part(0x14, Correctable)
    control = Part(0x18, AerControl)
    header_log_0 = Number(0x1C, 4)
    header_log_1 = Number(0x20, 4)
    header_log_2 = Number(0x24, 4)
    header_log_3 = Number(0x28, 4)

    @property
    def header_log(self) -> tuple[int, ...]:
        """The packet that failed first: four words, most significant byte first, as PCI Express numbers its bytes."""
        return self.header_log_0, self.header_log_1, self.header_log_2, self.header_log_3


class SerialNumber(Capability):
    id, extended = 0x03, True
    serial = Number(4, 8)


class ExtendedVendorHeader(Register, width=4, read_only=True):
    id = Bits(0, 16)
    revision = Bits(16, 4)
    length = Bits(20, 12)


class ExtendedVendor(Capability):
    """Whatever the vendor put there, with an ID of the vendor's."""

    id, extended = 0x0B, True
    header = Part(4, ExtendedVendorHeader)


class AccessControl(Register, width=2):
    source_validation = Bit(0)
    translation_blocking = Bit(1)
    request_redirect = Bit(2)
    completion_redirect = Bit(3)
    upstream_forwarding = Bit(4)
    egress_control = Bit(5)
    direct_translated = Bit(6)


class AccessControlCapabilities(AccessControl, read_only=True):
    egress_vector_size = Bits(8, 8)


class AccessControlServices(Capability):
    id, extended = 0x0D, True
    capabilities = Part(4, AccessControlCapabilities)
    control = Part(6, AccessControl)


class RoutingCapabilities(Register, width=2, read_only=True):
    function_groups = Bit(0)
    acs_function_groups = Bit(1)
    next_function = Bits(8, 8)


class RoutingControl(Register, width=2):
    function_groups = Bit(0)
    acs_function_groups = Bit(1)
    function_group = Bits(4, 3)


class AlternativeRouting(Capability):
    id, extended = 0x0E, True
    capabilities = Part(4, RoutingCapabilities)
    control = Part(6, RoutingControl)


class DesignatedVendorHeader(Register, width=4, read_only=True):
    vendor = Bits(0, 16)
    revision = Bits(16, 4)
    length = Bits(20, 12)


class DesignatedVendor(Capability):
    """DVSEC: whatever the vendor that it names put there."""

    id, extended = 0x23, True
    header = Part(4, DesignatedVendorHeader)
    dvsec_id = Number(8, 2)


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


def _classes() -> dict[tuple[bool, int], type[Capability]]:
    found: dict[tuple[bool, int], type[Capability]] = {}
    for kind in Capability.__subclasses__():
        if kind.id is not None:
            found[kind.extended, kind.id] = kind
    return found


CLASSES: dict[tuple[bool, int], type[Capability]] = _classes()
"""By (extended, ID)."""


def make(source: Source, offset: int, identity: int, version: int | None = None) -> Capability:
    """The capability at `offset`; `version` is that of an extended one."""
    kind: Any = CLASSES.get((version is not None, identity), Capability)
    found: Capability = kind(source, offset, identity, version)
    return found
