"""A device that vfio-pci has: what an open enables and the last close gives back.  (vfio_pci_core.c)"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfio.fake import registers as reg
from vfio.fake import reset
from vfio.fake.bars import Bars
from vfio.fake.config_space import ConfigSpace
from vfio.fake.interrupts import INTX, REQ, Interrupts
from vfio.fake.kernel_error import fail

if TYPE_CHECKING:
    from vfio.fake.eventfd import EventFd
    from vfio.fake.pci import PciDevice

# Intel's i40e and X550 report INTx wrongly, so the kernel hides it from users (vfio_pci_nointx).
_BROKEN_INTX = frozenset({0x1563, 0x1572, 0x1574, 0x1580, 0x1581, *range(0x1583, 0x158C), 0x37D0, 0x37D1, 0x37D2})


class VfioPciDevice:
    """The driver's data of one device; opened by `users` descriptors, which share all of it."""

    config: ConfigSpace
    interrupts: Interrupts
    bars: Bars

    def __init__(self, pci: PciDevice) -> None:
        self.pci = pci
        self.users = 0
        self.reset_works = False
        """The function could be reset at the first open."""
        self.needs_reset = False
        """It was used, and not reset since."""
        self._saved = self._at_rest = b""
        self._before_d3: bytes | None = None
        self.low_power = False
        """A user let the device go into low power (VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY)."""
        self._suspended = self._intx_masked = False
        self._wakeup: EventFd | None = None

    @property
    def hides_intx(self) -> bool:
        """Whether a user is told that there is no INTx."""
        pci = self.pci
        broken = pci.vendor == 0x8086 and pci.device in _BROKEN_INTX
        return broken or (pci.machine.kernel >= (7, 2) and not pci.irq)

    # --- open and close ---

    def open(self) -> None:
        """ENODEV while the device's PE is in reset."""
        if self.users == 0:
            self._enable()
        self.users += 1

    def close(self) -> None:
        self.users -= 1
        if self.users == 0:
            self._disable()

    def _enable(self) -> None:
        pci = self.pci
        if pci.blocked:
            raise fail(errno.ENODEV)
        pci.change_command(clear_bits=reg.COMMAND_MASTER)
        pci.enable()
        self.reset_works = reset.reset_function(pci)
        self._saved = pci.save()
        pci.change_command(clear_bits=reg.COMMAND_INTX_DISABLE)
        self.interrupts = Interrupts(self)
        self.bars = Bars(self)
        self.config = ConfigSpace(self)
        if pci.eeh:
            pci.eeh.change_owner()
            pci.eeh.passed += 1

    def _disable(self) -> None:
        pci = self.pci
        if pci.eeh:
            pci.eeh.passed -= 1
            pci.eeh.change_owner()
        self.leave_low_power()
        self.set_power_state(0)
        pci.change_command(clear_bits=reg.COMMAND_MASTER)
        self.interrupts.close()
        self.bars.close()
        self.needs_reset = True
        pci.change_command(clear_bits=0xFFFF, set_bits=reg.COMMAND_INTX_DISABLE)
        if self.reset_works and not pci.blocked and reset.reset_unsaved(pci):
            self.needs_reset = False
        pci.restore(self._saved)
        pci.disable()
        reset.reset_idle_bus(pci)
        pci.set_power_state(3)
        self.interrupts.forget()

    # --- resets and power ---

    def reset(self) -> int:
        """VFIO_DEVICE_RESET."""
        if not self.reset_works:
            raise fail(errno.EINVAL)
        self.set_power_state(0)
        self.try_reset()
        return 0

    def try_reset(self) -> None:
        """Reset the function, keeping its configuration."""
        if not self.pci.blocked:
            reset.reset_function(self.pci)

    def set_power_state(self, state: int) -> None:
        """D0 to D3hot (0 to 3).  What a function would forget in D3hot is kept for it."""
        pci = self.pci
        pm = pci.registers.find(reg.CAP_PM)
        forgets = pm and not pci.registers.get(pm + reg.PM_CTRL, 2) & reg.PM_NO_SOFT_RESET
        before = pci.power_state or 0
        saved = pci.save() if forgets and before < 3 <= state else None
        pci.set_power_state(state)
        if saved is not None:
            self._before_d3 = saved
        elif forgets and before == 3 and state == 0 and self._before_d3:
            pci.restore(self._before_d3)
            self._before_d3 = None

    # --- low power (VFIO_DEVICE_FEATURE_LOW_POWER_*) ---

    def enter_low_power(self, wakeup: EventFd | None) -> None:
        """EINVAL if it is there.  The device sleeps from the end of this call on, until it is touched."""
        if self.low_power:
            raise fail(errno.EINVAL)
        self.low_power, self._wakeup = True, wakeup
        self.rest()

    def leave_low_power(self) -> None:
        """The user wants the device back."""
        self.wake()
        self.low_power = False
        self._drop_wakeup()

    def wake(self) -> None:
        """Something touches the device: it resumes, and the user who asked for it is told, and is out of low power."""
        if not self._suspended:
            return
        self._suspended = False
        self.pci.set_power_state(0)
        self.pci.restore(self._at_rest)
        if self._wakeup:
            self._wakeup.signal()
            self._drop_wakeup()
            self.low_power = False
        if self._intx_masked:
            self._intx_masked = False
            self.interrupts.unmask_intx()

    def touch(self) -> None:
        """A call of a process begins."""
        self.wake()

    def rest(self) -> None:
        """The call that woke the device is over; it sleeps again where its user still wants that."""
        if self.low_power and not self._suspended:
            self._suspended = True
            self.set_power_state(0)
            self._intx_masked = self.interrupts.active == INTX and self.interrupts.mask_intx()
            self._at_rest = self.pci.save()
            self.pci.set_power_state(3)

    def _drop_wakeup(self) -> None:
        if self._wakeup:
            self._wakeup.put()
            self._wakeup = None

    # --- for accesses ---

    @property
    def memory_enabled(self) -> bool:
        """Whether the user may reach memory BARs."""
        return (self.pci.power_state or 0) < 3 and bool(self.config.command & reg.COMMAND_MEMORY)

    @property
    def unmapped_because(self) -> str:
        """Why a mapped BAR is not there; empty while it is."""
        if self.low_power:
            return "the device is in low power: say VFIO_DEVICE_FEATURE_LOW_POWER_EXIT first"
        if (self.pci.power_state or 0) >= 3:
            return "the device is in D3hot: set it to D0 first"
        if not self.config.command & reg.COMMAND_MEMORY:
            return "memory decode is off: set bit 1 of COMMAND first"
        return ""

    def request(self) -> None:
        """The host wants the device back."""
        if self.users:
            self.interrupts.signal(REQ)
