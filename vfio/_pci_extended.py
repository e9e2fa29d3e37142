"""The capabilities of PCI Express from 256 on.  PCI Express Base Specification 5.0, chapters 7 and 9."""

from __future__ import annotations

from vfio._pci_capability import Capability
from vfio._pci_register import Bit, Bits, Number, Part, Register


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
