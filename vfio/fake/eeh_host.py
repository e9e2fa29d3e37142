"""How the host notices frozen PEs, and recovers those that no user has open.  (arch/powerpc/kernel/eeh_driver.c)

A PE that a VFIO user has open is the user's: the host leaves it frozen and says nothing.  Any other is recovered by a
kernel thread, on the virtual clock: the drivers of its devices are asked, and by their answers it is thawed, or reset,
or its devices are removed and found again; more than `max_freezes` times within an hour, and it is given up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from vfio.fake import eeh, vfio_pci
from vfio.fake.device_file import VfioDevice
from vfio.fake.eeh_pe import EehPe
from vfio.fake.kernel_log import ERR, INFO, WARNING

if TYPE_CHECKING:
    from vfio.fake.eeh_pe import Freeze
    from vfio.fake.machine import Machine
    from vfio.fake.pci import PciDevice

DETECTION = 0.01
"""Seconds from a freeze to the interrupt of the PHB that tells the host."""

_HOTPLUG = 5.0
"""Seconds for programs to notice that a device is gone, before it comes back."""
_MAX_FREEZES = 5

_ANSWERS = ("none", "recovered", "can recover", "need reset")
"""What drivers report, the stronger after the weaker."""
_AWARE = {"nvme": "need reset", "e1000e": "need reset", "tg3": "need reset", "pcieport": "need reset"}
"""Drivers that can carry on after a reset, and what they report of an error."""

Work = Iterator[float | VfioDevice]
"""What the kernel thread does.  It yields for how many seconds it sleeps, or the device that it waits to be closed."""


class EehHost:
    """EEH of a machine.  `freeze`, `thaw` and `fail` are for tests."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.remembers_freezes = machine.freezes or machine.topology.platform.cpu not in ("POWER7", "POWER8")
        """Whether a PE can be frozen at all: in QEMU's PHB3 it cannot, and a PE in reset seems to work."""
        self.max_freezes = _MAX_FREEZES
        """Freezes within an hour that the host recovers from: debugfs's `eeh_max_freezes`."""
        self.freeze_count = 0
        """How often hardware, or a test, has frozen a PE since boot."""
        self.lost: set[str] = set()
        """Addresses of devices that failed for good: until the next boot, no scan finds them."""
        self._pes: dict[tuple[int, int], EehPe] = {}
        self._work: deque[Work] = deque()
        self._busy = False

    # --- for tests ---

    def freeze(self, address: str, what: Freeze = "both") -> None:
        """Freeze the PE of the device at `address`, or a half of it, as a hardware error does."""
        pe = self.of(address)
        if what == "both":
            self.hardware_error(pe)
        else:
            pe.freeze = what

    def thaw(self, address: str) -> None:
        """Thaw the PE of a device, and forget that it was ever frozen."""
        pe = self.of(address)
        pe.freeze = "none"
        pe.clear("isolated")

    def fail(self, address: str) -> None:
        """Let the PE of a device fail for good, whoever has it."""
        pe = self.of(address)
        pe.freeze = "both"
        pe.freeze_count, pe.first_freeze = self.max_freezes, self.machine.clock.now()
        self.force_recovery(pe)

    def of(self, address: str) -> EehPe:
        """The PE of the device at `address`; KeyError without such a device, LookupError for one without a PE."""
        pe = self.machine.device(address).eeh
        if pe is None:
            raise LookupError(f"{address} is in no PE that EEH knows")
        return pe

    # --- PEs ---

    def pe(self, domain: int, number: int) -> EehPe:
        """The PE `number` below the PHB of a PCI domain, made when it is first asked for."""
        return self._pes.setdefault((domain, number), EehPe(self.machine, domain, number))

    def find(self, domain: int, number: int) -> EehPe | None:
        """The same, if it is there."""
        return self._pes.get((domain, number))

    def join(self, pci: PciDevice, pe: EehPe) -> None:
        """The kernel found a function of a PE."""
        pci.eeh = pe
        pe.devices.append(pci)
        pe.has_bus = True
        above = pci.parent.eeh if pci.parent else None
        if above and above is not pe and pe.parent is None:
            pe.parent = above
            above.children.append(pe)

    def leave(self, pci: PciDevice) -> None:
        """The function is removed."""
        if pci.eeh:
            pci.eeh.devices.remove(pci)
            pci.eeh = None

    # --- noticing ---

    def hardware_error(self, pe: EehPe) -> None:
        """The hardware freezes a PE; on a machine that does so by itself, an interrupt tells the host soon."""
        self.freeze_count += 1
        pe.freeze = "both"
        if self.machine.freezes and self.machine.topology.platform.eeh:
            self._later(DETECTION, lambda: self._start(self._next_error(pe)))

    def _next_error(self, pe: EehPe) -> Work:
        """The PHB says that a PE is frozen (pnv_eeh_next_error); one above comes first if it is frozen too."""
        while not (pe.isolated or pe.passed or pe.freeze == "none"):
            self._say(ERR, f"Frozen PE#{pe.number:x} on PHB#{pe.domain:x} detected")
            pe.mark(isolated=True, recovering=True)
            yield from self._recover(self._topmost(pe))

    def check_failure(self, pci: PciDevice) -> int:
        """The kernel read all ones: is the PE frozen?  1 if it is, and the host's to recover (eeh_dev_check_failure)."""
        pe = pci.eeh
        if pe is None or not self.machine.topology.platform.eeh or pe.passed:
            return 0
        if pe.isolated:
            return 1  # somebody is taking care of it, the kernel believes
        if pe.active:
            return 0
        pe = self._topmost(pe)
        pe.mark(isolated=True)
        self.force_recovery(pe)
        return 1

    def force_recovery(self, pe: EehPe) -> None:
        """Give the PE to the thread that recovers, frozen or not, open or not (eeh_force_recover)."""
        pe.mark(recovering=True)
        self._start(self._recover(pe))

    @staticmethod
    def _topmost(pe: EehPe) -> EehPe:
        """The highest PE that is frozen: it or one above."""
        found, above = pe, pe.parent
        while above:
            if not above.active:
                found = above
            above = above.parent
        return found

    # --- the kernel thread ---

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        def due() -> None:
            with self.machine.lock:
                call()
                self.machine.changed.notify_all()

        self.machine.clock.after(seconds, due)

    def _start(self, work: Work) -> None:
        self._work.append(work)
        if not self._busy:
            self._busy = True
            self._carry_on()

    def _carry_on(self) -> None:
        """Go on with what the thread does, until it sleeps or has nothing to do."""
        while self._work:
            awaited = next(self._work[0], None)
            if isinstance(awaited, VfioDevice):
                awaited.when_closed = self._carry_on
                return
            if awaited is not None:
                self._later(awaited, self._carry_on)
                return
            self._work.popleft()
        self._busy = False

    def _recover(self, pe: EehPe) -> Work:
        """One freeze (eeh_handle_normal_event)."""
        if not any(each.devices for each in pe.tree()):
            self._say(WARNING, f"Frozen {pe} is empty!")
            yield from self._give_up(pe)
            return
        self._say(ERR, f"Recovering {pe}")
        self._say(ERR, f"Frozen {pe} detected")
        count = pe.count_freeze()
        if count > self.max_freezes:
            self._say(ERR, f"{pe} has failed {count} times in the last hour and has been permanently disabled.")
            yield from self._give_up(pe)
            return
        self._say(WARNING, f"{pe}: freeze {count} within an hour; it is given up after {self.max_freezes}")
        answer = self._report(pe, "error_detected(IO frozen)", self._error_detected)
        if answer == "none":
            yield from self._reset(pe, aware=False)
        elif answer == "can recover":
            pe.thaw_mmio()
            self._report(pe, "mmio_enabled", lambda pci: "none")
            pe.thaw_dma()
            pe.clear("isolated")
        else:
            yield from self._reset(pe, aware=True)
            self._report(pe, "slot_reset", lambda pci: "recovered" if pci.driver in _AWARE else "none")
        self._report(pe, "resume", lambda pci: "none")
        self._say(INFO, "Recovery successful.")
        pe.clear("recovering")

    def _reset(self, pe: EehPe, aware: bool) -> Work:
        """Reset the PE; devices of drivers that would not survive it are removed before, and found again after
        (eeh_reset_device)."""
        self._say(INFO, f"Reset with{'out' if aware else ''} hotplug activity")
        pe.mark(kept=True)
        open_below = any(each.passed for each in pe.tree())
        leaving = [pci for pci in self._actionable(pe) if not pci.is_bridge and not (aware and pci.driver in _AWARE)]
        if not aware and not open_below:
            leaving = [pci for each in pe.tree() for pci in each.devices]
        for pci in leaving:
            if pci.address in self.machine.driver_core.devices:
                self._say(INFO, f"Removing {pci.address} without EEH sensitive driver")
                self.machine.driver_core.remove(pci)
        pe.mark(resetting=True)
        pe.assert_reset()
        yield eeh.hot_reset_seconds(pe)
        pe.deactivate_reset(passed=False)
        for each in pe.tree():
            if each.passed:
                self._say(INFO, f"Passed-through PE {each} was thawed by reset, re-freezing for safety.")
                each.freeze = "both"
        pe.clear("resetting", "blocked")
        for each in pe.tree():
            if not each.passed:
                each.thaw()
        pe.clear("isolated", passed=False)
        if not aware or leaving:
            yield _HOTPLUG
            if not aware:
                pe.clear("has_bus")
            self.machine.driver_core.rescan(pe.domain)
        pe.clear("kept")

    def _give_up(self, pe: EehPe) -> Work:
        """It has failed for good: its devices go, as soon as their users let them."""
        self._say(ERR, f"Unable to recover from failure from {pe}.")
        pe.thaw_mmio()
        self._report(pe, "error_detected(permanent failure)", self._failure)
        pe.mark(removed=True)
        devices = [pci for each in pe.tree() for pci in each.devices]
        self.lost.update(pci.address for pci in devices)
        # One after the other: the thread waits for the users of each.
        for pci in devices:
            if device := self.machine.driver_core.ask_back(pci):
                yield device
            if pci.address in self.machine.driver_core.devices:
                self.machine.driver_core.remove(pci)

    # --- asking drivers ---

    @staticmethod
    def _actionable(pe: EehPe) -> list[PciDevice]:
        return [pci for each in pe.tree() for pci in each.devices if not each.passed]

    def _report(self, root: EehPe, name: str, ask: Callable[[PciDevice], str]) -> str:
        """Tell the drivers of all devices; their strongest answer."""
        self._say(INFO, f"Beginning: '{name}'")
        strongest = "none"
        for pe in root.tree():
            for pci in list(pe.devices):
                if pe.passed:
                    told = "not actionable (1,1,0)"
                elif pci.driver is None:
                    told = "no driver"
                elif pci.driver not in _AWARE and not self.machine.driver_core.drivers[pci.driver].vfio:
                    told = "driver not EEH aware"
                else:
                    answer = ask(pci)
                    told = f"{pci.driver} driver reports: '{answer}'"
                    strongest = max(strongest, answer, key=_ANSWERS.index)
                self.machine.log.write(INFO, f"PCI {pci.address}#{pe.number:04x}: EEH: {told}")
        self._say(INFO, f"Finished:'{name}'")
        return strongest

    @staticmethod
    def _error_detected(pci: PciDevice) -> str:
        if pci.driver in _AWARE:
            return _AWARE[pci.driver]
        vfio_pci.error_detected(pci)
        return "can recover"

    @staticmethod
    def _failure(pci: PciDevice) -> str:
        if pci.driver not in _AWARE:
            vfio_pci.error_detected(pci)
        return "none"

    def _say(self, level: int, text: str) -> None:
        self.machine.log.write(level, f"EEH: {text}")
