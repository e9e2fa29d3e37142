"""PCI functions as the host sees them: identity, registers, BARs, interrupts, power; and where the host puts BARs."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vfio import topology
from vfio.fake import error_injection
from vfio.fake import registers as reg
from vfio.fake.kernel_error import fail

if TYPE_CHECKING:
    from vfio.fake.devices.model import PciModel
    from vfio.fake.eeh_pe import EehPe
    from vfio.fake.iommu_group import IommuGroup
    from vfio.fake.machine import Machine
    from vfio.fake.pe import Pe
    from vfio.fake.vfio_pci_device import VfioPciDevice

BARS, ROM = 6, 6
"""Number of BARs, and the index of the expansion ROM behind them."""

_IORESOURCE_IO, _IORESOURCE_MEM, _IORESOURCE_PREFETCH, _IORESOURCE_MEM_64 = 0x100, 0x200, 0x2000, 0x100000
_IORESOURCE_READONLY, _IORESOURCE_SIZEALIGN = 0x4000, 0x40000


@dataclass
class Bar:
    """A BAR: `size` bytes, a power of two, decoded by `index` 0 to 5 (6: the expansion ROM)."""

    index: int
    size: int
    io: bool = False
    bits64: bool = False
    prefetch: bool = False
    start: int = 0
    """CPU address; 0 where the host assigned none."""
    bus_address: int = 0

    @property
    def register(self) -> int:
        """Offset in configuration space."""
        return reg.ROM_BAR if self.index == ROM else reg.BAR0 + 4 * self.index

    @property
    def type_bits(self) -> int:
        """The read-only low bits of the register (0 for the ROM)."""
        return 0 if self.index == ROM else self.io | self.bits64 << 2 | self.prefetch << 3

    @property
    def end(self) -> int:
        """CPU address of the last byte."""
        return self.start + self.size - 1

    @property
    def resource_flags(self) -> int:
        """What the third column of sysfs's `resource` shows (include/linux/ioport.h)."""
        if self.io:
            return _IORESOURCE_IO | 1 | _IORESOURCE_SIZEALIGN
        flags = _IORESOURCE_MEM | self.type_bits | (0 if self.start_aligned else _IORESOURCE_SIZEALIGN)
        if self.index == ROM:
            return flags | _IORESOURCE_PREFETCH | _IORESOURCE_READONLY
        return flags | (_IORESOURCE_MEM_64 if self.bits64 else 0) | (_IORESOURCE_PREFETCH if self.prefetch else 0)

    start_aligned: bool = False
    """The host aligned it to more than its size (powernv: to a page)."""


class PciDevice:
    """A PCI function on a modelled machine.

    `model` is the device behind it, `pe` and `group` what isolates it (None for a bridge), `driver` the name of the
    driver that has it.
    """

    def __init__(self, machine: Machine, address: str, model: PciModel, *, parent: PciDevice | None = None) -> None:
        self.machine = machine
        self.address = address
        self.model = model
        self.parent = parent
        """The bridge above; None on a root bus."""
        self.domain, self.bus, self.slot, self.function = _parts(address)
        self.registers = model.registers
        self.bars: dict[int, Bar] = {bar.index: bar for bar in model.bars}
        self.pe: Pe | None = None
        self.eeh: EehPe | None = None
        """The PE that EEH knows it in; bridges have one too."""
        self.group: IommuGroup | None = None
        self.driver: str | None = None
        self.driver_override: str | None = None
        self.reset_methods: tuple[str, ...] = ()
        """How its function is reset, in the order in which it is tried: sysfs's `reset_method` ("flr", "pm", "bus")."""
        self.irq = 0
        """Number of its INTx line on the host; 0 without one."""
        self.enable_count = 0
        """How many drivers have enabled it: sysfs's `enable`."""
        self.power_state: int | None = None
        """0 to 3 for D0 to D3hot; None while the kernel has not looked (sysfs shows "unknown")."""
        self.intx_handler: Callable[[], None] | None = None
        self.vector_handlers: dict[int, Callable[[], None]] = {}
        """Who gets message n (MSI or MSI-X, whichever is enabled)."""
        self.vfio: VfioPciDevice | None = None
        """What vfio-pci knows of it, while it is that driver's."""
        self._line = False
        self._level = False  # of the line as the interrupt controller saw it last
        self._msi_queue: int | None = None  # logarithm of the MSI vectors that the host set up
        self._messages: dict[int, bool] | None = None  # MSI-X vectors that the host set up: whether masked
        self._message_address = 0
        self._at_boot = b""
        model.pci = self

    def __repr__(self) -> str:
        return f"<PciDevice {self.address} {self.vendor:04x}:{self.device:04x}>"

    # --- identity ---

    @property
    def vendor(self) -> int:
        return self.registers.get(reg.VENDOR_ID, 2)

    @property
    def device(self) -> int:
        return self.registers.get(reg.DEVICE_ID, 2)

    @property
    def device_class(self) -> int:
        """24 bits."""
        return self.registers.get(reg.CLASS, 3)

    @property
    def revision(self) -> int:
        return self.registers.get(reg.REVISION, 1)

    @property
    def subsystem_vendor(self) -> int:
        return 0 if self.is_bridge else self.registers.get(reg.SUBSYSTEM, 2)

    @property
    def subsystem_device(self) -> int:
        return 0 if self.is_bridge else self.registers.get(reg.SUBSYSTEM + 2, 2)

    @property
    def devfn(self) -> int:
        return self.slot << 3 | self.function

    @property
    def is_bridge(self) -> bool:
        """Header type 1."""
        return self.registers.get(reg.HEADER_TYPE, 1) & 0x7F == 1

    @property
    def is_express(self) -> bool:
        return bool(self.registers.find(reg.CAP_EXPRESS))

    @property
    def config_size(self) -> int:
        """256 or 4096 bytes."""
        return self.registers.size

    @property
    def same_bus(self) -> list[PciDevice]:
        """The functions of its bus, itself included, by slot and function."""
        found = [d for d in self.machine.driver_core.devices.values() if (d.domain, d.bus) == (self.domain, self.bus)]
        return sorted(found, key=lambda device: device.devfn)

    # --- configuration space ---

    @property
    def command(self) -> int:
        return self.registers.get(reg.COMMAND, 2)

    @property
    def blocked(self) -> bool:
        """Whether EEH keeps configuration space out of reach: its PE is in reset, or has failed for good."""
        return self.eeh is not None and (self.eeh.blocked or self.eeh.removed)

    def config_read(self, offset: int, width: int) -> int:
        """A read on the bus; ENODEV while it is blocked."""
        if self.blocked:
            raise fail(errno.ENODEV)
        return self._config_ones(width) if self._config_hit(write=False) else self.registers.get(offset, width)

    def host_read(self, offset: int, width: int) -> int:
        """A read by kernel code that does not look whether it failed: all ones while it is blocked."""
        ones = self.blocked or self._config_hit(write=False)
        return self._config_ones(width) if ones else self.registers.get(offset, width)

    def config_write(self, offset: int, width: int, value: int) -> None:
        """A write on the bus, with what the hardware does about it: resets, masks, power states.  ENODEV while it is
        blocked."""
        if self.blocked:
            raise fail(errno.ENODEV)
        if self._config_hit(write=True):
            return
        was_in_d3 = self._hardware_power() == 3
        self.registers.write(offset, width, value)
        express = self.registers.find(reg.CAP_EXPRESS)
        if express and self.registers.get(express + reg.EXP_DEVCTL, 2) & reg.EXP_DEVCTL_FLR:
            self.hardware_reset()
            self.registers.change(express + reg.EXP_DEVCTL, 2, clear_bits=reg.EXP_DEVCTL_FLR)
        if was_in_d3 and self._hardware_power() == 0 and not self._keeps_state_in_d3():
            self.model.reset()
        self.model.config_written(offset, width)
        self.check_line()

    def host_config(self) -> bytes:
        """All of it as the host reads it for sysfs: all ones while it is out of reach."""
        if self.blocked or self._config_hit(write=False):
            return self._config_ones(self.config_size).to_bytes(self.config_size, "little")
        data = bytes(self.registers.value)
        if any(data[at : at + 4] == _ONES for at in range(0, len(data), 4)):
            self.machine.eeh.check_failure(self)
        return data

    def _config_hit(self, write: bool) -> bool:
        """Whether a configuration access comes to nothing, because of a freeze or an injected error."""
        if self.eeh is not None and self.eeh.stops_config:
            return True
        address = error_injection.config_address(self.bus, self.devfn)
        return error_injection.hit(self.eeh, "config", write, address)

    def _config_ones(self, width: int) -> int:
        """What the host reads where nothing answers.  It makes the kernel look whether the PE is frozen."""
        if not self.blocked:
            self.machine.eeh.check_failure(self)
        return (1 << 8 * width) - 1

    def hardware_reset(self) -> None:
        """The function forgets everything: registers as after power-on, but for what a reset keeps."""
        self._line = self._level = False
        self.registers.reset()
        self.registers.change(reg.STATUS, 2, clear_bits=reg.STATUS_INTERRUPT)
        self.model.hardware_reset()

    def keep_in_d0(self) -> None:
        """The firmware lets nobody change the power state."""
        if pm := self.registers.find(reg.CAP_PM):
            self.registers.writable[pm + reg.PM_CTRL] &= ~reg.PM_STATE

    def _hardware_power(self) -> int:
        pm = self.registers.find(reg.CAP_PM)
        return self.registers.get(pm + reg.PM_CTRL, 2) & reg.PM_STATE if pm else 0

    def _keeps_state_in_d3(self) -> bool:
        pm = self.registers.find(reg.CAP_PM)
        return bool(self.registers.get(pm + reg.PM_CTRL, 2) & reg.PM_NO_SOFT_RESET)

    # --- what the host's PCI core does ---

    def enable(self) -> None:
        """pci_enable_device(): full power, and decoding of the BARs that have an address."""
        self.enable_count += 1
        if self.enable_count > 1:
            return
        self.set_power_state(0)
        self.change_command(set_bits=self._decoding)

    @property
    def _decoding(self) -> int:
        """The bits of COMMAND that its BARs need."""
        bars = [bar for bar in self.bars.values() if bar.start and bar.index != ROM]
        wanted = reg.COMMAND_IO if any(bar.io for bar in bars) else 0
        return wanted | (reg.COMMAND_MEMORY if any(not bar.io for bar in bars) else 0)

    def disable(self) -> None:
        """pci_disable_device(): the last one stops bus mastering; decoding stays on."""
        self.enable_count -= 1
        if self.enable_count == 0:
            self.change_command(clear_bits=reg.COMMAND_MASTER)

    def change_command(self, set_bits: int = 0, clear_bits: int = 0) -> None:
        """Change bits of the COMMAND register, on the hardware; without effect while it is out of reach."""
        if not self.blocked and self.command != (new := self.command & ~clear_bits | set_bits):
            self.config_write(reg.COMMAND, 2, new)

    def set_power_state(self, state: int) -> None:
        """pci_set_power_state(): `state` is 0 to 3.  What the function does not take leaves it where it is."""
        pm = self.registers.find(reg.CAP_PM)
        if self.blocked:
            return
        if pm:
            capable = self.registers.get(pm + 2, 2)
            if (state == 1 and not capable & 0x200) or (state == 2 and not capable & 0x400):
                return
            # Down from a deeper state only through D0 (pci_set_low_power_state).
            if state and self.power_state and state < self.power_state:
                return
            control = self.registers.get(pm + reg.PM_CTRL, 2)
            if control & reg.PM_STATE != state:
                self.config_write(pm + reg.PM_CTRL, 2, control & ~reg.PM_STATE | state)
            self.power_state = self._hardware_power()
        else:
            self.power_state = 0

    def save(self) -> bytes:
        """pci_save_state(): what `restore` puts back."""
        return bytes(self.registers.value)

    def restore(self, saved: bytes) -> None:
        """pci_restore_state(): the header, PCI Express controls, AER masks, and the messages that the host set up."""
        if self.blocked:
            return
        spans = [(0, reg.HEADER_END)]
        for at, identity in self.registers.capabilities():
            if identity == reg.CAP_EXPRESS:
                spans.append((at + reg.EXP_DEVCTL, at + reg.EXP_DEVCTL + 2))
                if self.registers.get(at + reg.EXP_FLAGS, 2) & 0xF > 1:
                    spans.append((at + 0x28, at + 0x2A))
        for at, identity in self.registers.extended_capabilities():
            if identity == reg.EXT_CAP_AER:
                spans.append((at + 8, at + 0x10))
                spans.append((at + 0x14, at + 0x1C))
        # COMMAND comes last: nothing is decoded before the BARs are back.
        for start, end in [*reversed(spans), (reg.COMMAND, reg.COMMAND + 2)]:
            for at in range(start, end, 2):
                if at != reg.STATUS and (at != reg.COMMAND or end == reg.COMMAND + 2):
                    self.config_write(at, 2, int.from_bytes(saved[at : at + 2], "little"))
        if self._msi_queue is not None:
            self.change_command(set_bits=reg.COMMAND_INTX_DISABLE)
            self.enable_msi(self._message_address, self._msi_queue)
        if self._messages is not None:
            self.change_command(set_bits=reg.COMMAND_INTX_DISABLE)
            self._write_msix(self._messages)

    def booted(self) -> None:
        """The host has assigned the BARs: from now on EEH knows what to restore (eeh_save_bars)."""
        self._at_boot = self.save()

    def eeh_reset(self) -> None:
        """The PE is reset: the function forgets its configuration."""
        self.hardware_reset()

    def eeh_restore(self) -> None:
        """The PE's reset is over: BARs as at boot, decoding on.  MSI stays off (eeh_restore_device_bars)."""
        for at in (*range(reg.BAR0, reg.BAR0 + 24, 4), reg.ROM_BAR, reg.CACHE_LINE_SIZE, reg.INTERRUPT_LINE):
            self.registers.write(at, 4, int.from_bytes(self._at_boot[at : at + 4], "little"))
        at_boot = int.from_bytes(self._at_boot[reg.COMMAND : reg.COMMAND + 2], "little")
        self.registers.write(reg.COMMAND, 2, self.command & ~reg.COMMAND_SERR | at_boot & reg.COMMAND_SERR)
        if self.enable_count:
            self.registers.change(reg.COMMAND, 2, self._decoding)

    # --- BARs ---

    def bar_read(self, index: int, offset: int, width: int) -> int:
        """A load from a BAR: all ones while its PE is frozen or nothing decodes it."""
        if self._unreachable(index, offset, write=False):
            return (1 << 8 * width) - 1
        return self.model.load(index, offset, width) & ((1 << 8 * width) - 1)

    def bar_write(self, index: int, offset: int, width: int, value: int) -> None:
        """A store to a BAR: dropped while its PE is frozen or nothing decodes it."""
        if not self._unreachable(index, offset, write=True):
            self.model.store(index, offset, width, value)

    def _unreachable(self, index: int, offset: int, write: bool) -> bool:
        bar = self.bars[index]
        if self.eeh is not None and self.eeh.stops_mmio:
            return True
        if not bar.io and error_injection.hit(self.eeh, "memory", write, bar.bus_address + offset):
            return True
        if self._hardware_power() == 3:
            return True
        return not self.command & (reg.COMMAND_IO if bar.io else reg.COMMAND_MEMORY)

    # --- DMA ---

    def dma_read(self, address: int, length: int) -> bytes:
        """Read memory over the bus; zeros where the function may not or its PE does not translate."""
        if not self._may_master():
            return bytes(length)
        return self.pe.dma_read(address, length) if self.pe else bytes(length)

    def dma_write(self, address: int, data: bytes) -> None:
        """Write memory over the bus; dropped where the function may not or its PE does not translate."""
        if self._may_master() and self.pe:
            self.pe.dma_write(address, data)

    def _may_master(self) -> bool:
        return bool(self.command & reg.COMMAND_MASTER) and not self._dma_stopped

    @property
    def _dma_stopped(self) -> bool:
        return self.eeh is not None and self.eeh.stops_dma

    # --- interrupts ---

    @property
    def line_asserted(self) -> bool:
        """Whether the function pulls its INTx line (COMMAND's DisINTx hides that from the host, not from STATUS)."""
        return self._line

    def set_line(self, level: bool) -> None:
        """The function raises or lowers INTx."""
        self._line = level and bool(self.registers.get(reg.INTERRUPT_PIN, 1))
        bits = {"set_bits": reg.STATUS_INTERRUPT} if self._line else {"clear_bits": reg.STATUS_INTERRUPT}
        self.registers.change(reg.STATUS, 2, **bits)
        self.check_line()

    def message(self, vector: int) -> None:
        """Message `vector` arrives at the host: a write on the bus, so it takes a bus master that is not frozen."""
        handler = self.vector_handlers.get(vector)
        if handler and self._may_master() and (self.pe is None or self.pe.message_arrives(vector)):
            handler()

    def enable_msi(self, address: int, queue: int) -> None:
        """The host sets up MSI with 2**`queue` vectors."""
        self._msi_queue, self._message_address = queue, address
        at = self.registers.find(reg.CAP_MSI)
        flags = self.registers.get(at + reg.MSI_FLAGS, 2)
        self.config_write(at + 4, 4, address & 0xFFFF_FFFF)
        if flags & reg.MSI_64BIT:
            self.config_write(at + 8, 4, address >> 32)
        flags = flags & ~reg.MSI_QUEUE_SIZE | queue << 4 | reg.MSI_ENABLE
        self.config_write(at + reg.MSI_FLAGS, 2, flags)

    def enable_msix(self, address: int, vectors: int) -> None:
        """The host sets up `vectors` entries of MSI-X, all masked."""
        self._messages, self._message_address = dict.fromkeys(range(vectors), True), address
        self._write_msix(self._messages)

    def _write_msix(self, messages: dict[int, bool]) -> None:
        for vector, masked in messages.items():
            self.model.set_entry(vector, self._message_address, vector, masked)
        at = self.registers.find(reg.CAP_MSIX)
        flags = self.registers.get(at + reg.MSIX_FLAGS, 2)
        self.config_write(at + reg.MSIX_FLAGS, 2, flags & ~reg.MSIX_MASK_ALL | reg.MSIX_ENABLE)

    def set_vector(self, vector: int, handler: Callable[[], None] | None) -> None:
        """Who gets a message; None for nobody, which masks it where that can be."""
        if handler:
            self.vector_handlers[vector] = handler
        else:
            self.vector_handlers.pop(vector, None)
        if self._messages is not None:
            self._messages[vector] = handler is None
            self.model.set_entry(vector, self._message_address, vector, masked=handler is None)

    def disable_messages(self) -> None:
        """The host gives MSI or MSI-X up."""
        self._messages = self._msi_queue = None
        if self.blocked:
            return
        if at := self.registers.find(reg.CAP_MSI):
            self.registers.change(at + reg.MSI_FLAGS, 2, clear_bits=reg.MSI_ENABLE)
        if at := self.registers.find(reg.CAP_MSIX):
            self.registers.change(at + reg.MSIX_FLAGS, 2, clear_bits=reg.MSIX_ENABLE)

    def check_line(self) -> None:
        """Show the interrupt controller the INTx line, unless DisINTx or a freeze keeps it from that; it interrupts if
        somebody listens.

        The XICS of a POWER8 interrupts for as long as the line is asserted.  The XIVE of a POWER9 does so when the line
        rises: one that was asserted before its interrupt was enabled says nothing.
        """
        level = self._line and not self.command & reg.COMMAND_INTX_DISABLE and not self._dma_stopped
        rises, self._level = level and not self._level, level
        if level and self.intx_handler and (rises or self.has_xics):
            self.intx_handler()

    @property
    def has_xics(self) -> bool:
        """Whether the machine's interrupt controller is an XICS, and not a XIVE."""
        return self.machine.topology.platform.cpu.startswith(_XICS)


_ONES = b"\xff" * 4


def make_device(device: topology.Device, machine: Machine, phb: topology.Phb) -> PciDevice:
    """The function that a topology describes, as the host's kernel finds it at boot: BARs assigned, nothing enabled.

    Raises `devices.UnknownModel` for a class that cannot be loaded.
    """
    from vfio.fake import bar_placement, devices

    places = bar_placement.place_bars(machine, phb)
    parent = None
    if phb.root_port and device.address != phb.root_port.address:
        parent = machine.driver_core.devices.get(phb.root_port.address)
    pci = PciDevice(machine, device.address, devices.make_model(device), parent=parent)
    pci.reset_methods = device.reset
    if parent:
        parent.model.found_below(pci)
    for index, (start, bus_address, aligned) in places[device.address].items():
        bar = pci.bars[index]
        bar.start, bar.bus_address, bar.start_aligned = start, bus_address, aligned
        if index == ROM:
            continue  # which is given its address when it is read
        pci.registers.write(bar.register, 4, bus_address & 0xFFFF_FFFF)
        if bar.bits64:
            pci.registers.write(bar.register + 4, 4, bus_address >> 32)
    platform = machine.topology.platform
    if platform.name == "PowerNV" and platform.cpu in _KEPT_IN_D0:
        pci.keep_in_d0()
    if pci.is_bridge:
        pci.enable_count, pci.power_state = 1, 0  # the kernel enables what has a bus below it
    elif platform.name == "PowerNV":
        pci.registers.set(reg.COMMAND, 2, reg.COMMAND_SERR)  # its firmware reports errors by SERR
    elif platform.name == "PC":  # whose firmware turns on what there may be
        pci.registers.set(reg.COMMAND, 2, reg.COMMAND_SERR | reg.COMMAND_MEMORY | reg.COMMAND_IO)
        if (express := pci.registers.find(reg.CAP_EXPRESS)) and parent is None:
            pci.registers.change(express + reg.EXP_FLAGS, 2, set_bits=reg.ROOT_COMPLEX_ENDPOINT << 4)
    if pci.registers.get(reg.INTERRUPT_PIN, 1) and not pci.is_bridge:
        pci.irq = bar_placement.interrupt_number(machine, device.address)
        if platform.name == "PC":
            pci.registers.set(reg.INTERRUPT_LINE, 1, pci.irq)
    pci.booted()
    return pci


_KEPT_IN_D0 = ("POWER9", "POWER10")
"""Hosts whose firmware drops writes to the power state of functions below its PHB4 or PHB5."""


_XICS = ("POWER7", "POWER8")
"""Processors whose machines have an XICS for their interrupt controller; later ones have a XIVE."""


def _parts(address: str) -> tuple[int, int, int, int]:
    domain, bus, rest = address.split(":")
    slot, function = rest.split(".")
    return int(domain, 16), int(bus, 16), int(slot, 16), int(function)
