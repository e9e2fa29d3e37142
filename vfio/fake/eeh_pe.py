"""What EEH knows of a PE: what of it is frozen, and who is doing what about it.  (arch/powerpc/kernel/eeh_pe.c, eeh.c)

`freeze` is the hardware's: the two bits that stop MMIO and DMA.  All else is the kernel's bookkeeping, which follows
the hardware only when somebody looks: a PE is `isolated` from when its state was first asked for while both halves
were frozen, and thawing it by halves does not end that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from vfio import uapi

if TYPE_CHECKING:
    from vfio.fake.error_injection import InjectedError
    from vfio.fake.machine import Machine
    from vfio.fake.pci import PciDevice

Freeze = Literal["none", "mmio", "dma", "both"]
"""What of a PE is stopped."""

_MMIO, _DMA = 0x28, 0x50  # "active" and "enabled", of each
_STATES = {
    "none": uapi.VFIO_EEH_PE_STATE_NORMAL,
    "both": uapi.VFIO_EEH_PE_STATE_STOPPED,
    "dma": uapi.VFIO_EEH_PE_STATE_STOPPED_DMA,
    "mmio": uapi.VFIO_EEH_PE_STATE_UNAVAIL,
}
_HOUR = 3600  # seconds


class EehPe:
    """The EEH side of a PE; `number` is the one that sysfs's `eeh_pe_config_addr` shows."""

    def __init__(self, machine: Machine, domain: int, number: int) -> None:
        self.machine = machine
        self.domain = domain
        self.number = number
        self.parent: EehPe | None = None
        """The PE of the bridge above; None below a PHB."""
        self.children: list[EehPe] = []
        self.devices: list[PciDevice] = []
        """The functions in it, bridges too, as the kernel found them."""
        self.passed = 0
        """How many of its functions VFIO users have open: then the host leaves its errors to them."""
        self.isolated = False
        """The kernel has seen it frozen, and nobody has recovered it since."""
        self.recovering = False
        """The host is recovering it."""
        self.blocked = False
        """Configuration space is out of reach: a reset is asserted."""
        self.resetting = False
        """The host itself resets it; its state counts as normal meanwhile."""
        self.kept = False
        """Its devices have been removed to come back."""
        self.removed = False
        """It has failed for good."""
        self.has_bus = True
        """The kernel remembers its bus."""
        self.freeze_count = 0
        """How often the host handled a freeze since `first_freeze`; freezes that users handle do not count."""
        self.first_freeze = 0.0
        """Seconds since boot."""
        self.injected: InjectedError | None = None
        """An error that waits for an access which it can hit."""
        self._freeze: Freeze = "none"

    def __repr__(self) -> str:
        return f"<EehPe {self}>"

    def __str__(self) -> str:
        """As the kernel names it."""
        return f"PHB#{self.domain:x}-PE#{self.number:x}"

    def tree(self) -> Iterator[EehPe]:
        """Itself, and all PEs below."""
        yield self
        for child in self.children:
            yield from child.tree()

    # --- the hardware ---

    @property
    def freeze(self) -> Freeze:
        """What is stopped."""
        return self._freeze

    @freeze.setter
    def freeze(self, what: Freeze) -> None:
        self._freeze = what if self.machine.eeh.remembers_freezes else "none"
        for device in self.devices:
            device.check_line()

    @property
    def stops_mmio(self) -> bool:
        """Whether loads give all ones and stores are dropped: on a machine that isolates what it freezes."""
        return self.machine.freezes and self._freeze in ("mmio", "both")

    @property
    def stops_dma(self) -> bool:
        """Whether DMA and interrupts are dropped, likewise."""
        return self.machine.freezes and self._freeze in ("dma", "both")

    @property
    def stops_config(self) -> bool:
        """Whether configuration space reads all ones meanwhile: the P7IOC of a POWER7 keeps that off too."""
        return self.stops_mmio and self.machine.topology.platform.cpu == "POWER7"

    @property
    def bits(self) -> int:
        """The state as the powernv platform has it: the first number in sysfs's `eeh_pe_state`."""
        if self.resetting:
            return _MMIO | _DMA
        return (0 if self._freeze in ("mmio", "both") else _MMIO) | (0 if self._freeze in ("dma", "both") else _DMA)

    def look(self) -> int:
        """`bits`, asked for by the kernel: a PE that is found frozen is isolated from now on (get_state)."""
        bits = self.bits
        if not bits:
            self.mark(isolated=True)
        return bits

    @property
    def active(self) -> bool:
        """Whether both halves work, looked at."""
        return self.look() == _MMIO | _DMA

    # --- the kernel's flags ---

    def mark(self, **flags: bool) -> None:
        """Set these flags of it and of all PEs below; those of a PE that has failed for good stay."""
        for pe in self.tree():
            if not pe.removed:
                vars(pe).update(flags)

    def clear(self, *flags: str, passed: bool = True) -> None:
        """Clear these flags likewise, of PEs that users have open only where `passed`."""
        for pe in self.tree():
            if not pe.removed and (passed or not pe.passed):
                vars(pe).update(dict.fromkeys(flags, False))

    @property
    def flags(self) -> int:
        """The second number in sysfs's `eeh_pe_state` (arch/powerpc/include/asm/eeh.h)."""
        bits = (
            (0x001, self.isolated),
            (0x002, self.recovering),
            (0x004, self.blocked),
            (0x008, self.resetting),
            (0x100, self.kept),
            (0x400, self.removed),
            (0x800, self.has_bus),
        )
        return sum(bit for bit, there in bits if there)

    # --- what users and the host do with it (arch/powerpc/kernel/eeh.c) ---

    @property
    def state(self) -> int:
        """What VFIO_EEH_PE_GET_STATE returns (eeh_pe_get_state)."""
        if self.parent and not self.removed and (self.parent.isolated or self.parent.recovering):
            return uapi.VFIO_EEH_PE_STATE_UNAVAIL
        self.look()
        return _STATES["none" if self.resetting else self._freeze]

    def thaw_mmio(self) -> None:
        """EEH_OPT_THAW_MMIO."""
        if not self.look() & _MMIO:
            self.freeze = "dma" if self._freeze == "both" else "none"

    def thaw_dma(self) -> None:
        """EEH_OPT_THAW_DMA."""
        if not self.look() & _DMA:
            self.freeze = "mmio" if self._freeze == "both" else "none"

    def thaw(self) -> None:
        """Both halves, which still leaves it isolated (eeh_unfreeze_pe)."""
        self.thaw_mmio()
        self.thaw_dma()

    def change_owner(self) -> None:
        """It passes between host and user, or a user enables EEH: if it is frozen it works again."""
        if self.active:
            return
        if any((device.vendor, device.device) in _RESET_BY_OWNER for device in self.devices):
            saved = [(device, device.save()) for device in self.devices]
            self.assert_reset()
            self.deactivate_reset()
            for device, state in saved:
                device.restore(state)
        else:
            self.thaw()
            self.clear("isolated")

    def assert_reset(self, reaches_devices: bool = True) -> None:
        """Begin a hot or fundamental reset: it freezes, and configuration space is out of reach and loses its contents.

        QEMU's fundamental reset does not reach the devices.
        """
        self.freeze = "both"
        self.mark(blocked=True)
        if not reaches_devices:
            return
        for pe in self.tree():
            for device in pe.devices:
                if not device.is_bridge:
                    device.eeh_reset()

    def deactivate_reset(self, passed: bool = True) -> None:
        """End a reset: configuration space is back, with BARs as they were and COMMAND as after boot."""
        self.clear("blocked", passed=passed)
        for pe in self.tree():
            for device in pe.devices:
                if not device.is_bridge:
                    device.eeh_restore()
        if passed or not self.passed:
            self.thaw()
            self.clear("isolated", passed=passed)

    def count_freeze(self) -> int:
        """The host handles a freeze: how many that makes within an hour (eeh_pe_update_time_stamp)."""
        now = self.machine.clock.now()
        if not self.freeze_count or now - self.first_freeze > _HOUR:
            self.freeze_count, self.first_freeze = 0, now
        self.freeze_count += 1
        return self.freeze_count


_RESET_BY_OWNER = {(0x19A2, 0x0710), (0x10DF, 0xE220), (0x14E4, 0x1657)}
"""Network cards by Emulex and Broadcom that only a reset brings back (eeh_reset_ids)."""
