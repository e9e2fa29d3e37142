"""The capability of PCI Express: device, link, slot and root.  PCI Express Base Specification 5.0, section 7.5.3."""

from __future__ import annotations

from vfio._pci_capability import Capability
from vfio._pci_lists import standard
from vfio._pci_register import Bit, Bits, Number, Part, Register, Source

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

    @property
    def at_root(self) -> bool:
        """Whether messages of errors end here: a root port, or an event collector."""
        return self.flags.type in (_ROOT_PORT, _EVENT_COLLECTOR)

    def has(self, name: str) -> bool:
        """Slots and roots are for ports; the second half came with version 2."""
        flags = self.flags
        if name.startswith("slot"):
            return flags.slot and flags.type in (_ROOT_PORT, _DOWNSTREAM_PORT)
        if name.startswith("root"):
            return self.at_root
        return not name.endswith("_2") or flags.version >= 2


def of(source: Source) -> Express | None:
    """The capability of PCI Express of a function; None where it has none, or not enough of it is here."""
    for at, identity in standard(source, []):
        if identity == Express.id and at + Express.device_capabilities.offset <= source.size:
            return Express(source, at, identity)
    return None
