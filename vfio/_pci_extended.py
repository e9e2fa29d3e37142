"""The capabilities of PCI Express from 256 on.  PCI Express Base Specification 5.0, chapters 7 and 9."""

from __future__ import annotations

from vfio import _pci_express
from vfio._pci_capability import Capability, PlaceInBar
from vfio._pci_header import Bar, bars
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


class RootErrorCommand(Register, width=4):
    """Which messages of errors interrupt."""

    correctable = Bit(0)
    non_fatal = Bit(1)
    fatal = Bit(2)


class RootErrorStatus(Register, width=4, clears=0x7F):
    """Which messages of errors have come."""

    correctable = Bit(0)
    several_correctable = Bit(1)
    uncorrectable = Bit(2)
    several_uncorrectable = Bit(3)
    first_uncorrectable_fatal = Bit(4)
    non_fatal = Bit(5)
    fatal = Bit(6)
    message_number = Bits(27, 5)


class Requester(Register, width=2, read_only=True):
    """Who sent a message."""

    bus = Bits(8, 8)
    slot = Bits(3, 5)
    function = Bits(0, 3)

    def __str__(self) -> str:
        return f"{self.bus:02x}:{self.slot:02x}.{self.function}"


class AdvancedErrors(Capability):
    """Advanced error reporting (AER); what begins with `root` is of root ports and event collectors."""

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
    root_command = Part(0x2C, RootErrorCommand)
    root_status = Part(0x30, RootErrorStatus)
    root_correctable_source = Part(0x34, Requester)
    root_uncorrectable_source = Part(0x36, Requester)

    def has(self, name: str) -> bool:
        """Messages end at the root: there alone is it known who sent one."""
        if not name.startswith("root"):
            return True
        express = _pci_express.of(self.source)
        return express is not None and express.at_root

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


class SrIovCapabilities(Register, width=4, read_only=True):
    migration = Bit(0)
    ari_preserved = Bit(1)
    tag_10_bit_requester = Bit(2)
    migration_message_number = Bits(21, 11)


class SrIovControl(Register, width=2):
    enable = Bit(0)
    migration = Bit(1)
    migration_interrupt = Bit(2)
    memory = Bit(3)
    ari = Bit(4)
    tag_10_bit_requester = Bit(5)


class SrIovStatus(Register, width=2, clears=1):
    migration = Bit(0)


class SrIov(Capability):
    """Single root I/O virtualization: the virtual functions that a physical one can have."""

    id, extended = 0x10, True
    capabilities = Part(0x04, SrIovCapabilities)
    control = Part(0x08, SrIovControl)
    status = Part(0x0A, SrIovStatus)
    initial_functions = Number(0x0C, 2)
    total_functions = Number(0x0E, 2)
    functions = Number(0x10, 2, writable=True)
    """How many are enabled, or will be."""
    dependency_link = Number(0x12, 1)
    first_offset = Number(0x14, 2)
    stride = Number(0x16, 2)
    function_device = Number(0x1A, 2)
    """The device ID that they all have."""
    supported_page_sizes = Number(0x1C, 4)
    system_page_size = Number(0x20, 4, writable=True)
    bar0 = Number(0x24, 4)
    bar1 = Number(0x28, 4)
    bar2 = Number(0x2C, 4)
    bar3 = Number(0x30, 4)
    bar4 = Number(0x34, 4)
    bar5 = Number(0x38, 4)
    migration_state = Part(0x3C, PlaceInBar)

    @property
    def page_sizes(self) -> list[int]:
        """Page sizes, in bytes, that the BARs of the virtual functions can be aligned to."""
        return _pages(self.supported_page_sizes)

    @property
    def page_size(self) -> int:
        """The one that they are aligned to, in bytes; 0 where none is chosen."""
        return next(iter(_pages(self.system_page_size)), 0)

    @property
    def bars(self) -> list[Bar]:
        """Where the first virtual function has its memory, the next ones following; those that are not zero."""
        return bars(self.source, self.offset + SrIov.bar0.offset, 6)

    def routing_id(self, own: int, number: int) -> int:
        """Bus, slot and function (16 bits) of the virtual function `number`, from 0, of the physical function `own`.

        Raises IndexError for one that is not enabled.
        """
        if not 0 <= number < self.functions:
            raise IndexError(f"virtual function {number}: there are {self.functions}")
        return (own + self.first_offset + number * self.stride) & 0xFFFF


def _pages(mask: int) -> list[int]:
    return [4096 << n for n in range(32) if mask >> n & 1]


class DesignatedVendorHeader(Register, width=4, read_only=True):
    vendor = Bits(0, 16)
    revision = Bits(16, 4)
    length = Bits(20, 12)


class DesignatedVendor(Capability):
    """DVSEC: whatever the vendor that it names put there."""

    id, extended = 0x23, True
    header = Part(4, DesignatedVendorHeader)
    dvsec_id = Number(8, 2)
