"""Bring a frozen PE back: the procedure of the kernel's VFIO document, complete.

Steps, in the log under these names: confirm, stop (the driver), thaw, collect, count, reset, configure, restore, verify,
start (the driver), exercise, resume (the driver), and confirm again.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol

from vfio import errors, sysfs
from vfio.eeh import history, host, operations, restore
from vfio.eeh import state as states
from vfio.eeh.clock import SYSTEM, Clock
from vfio.eeh.log import DeviceLog, Log, Step
from vfio.eeh.operations import HOLD, Eeh, ResetKind
from vfio.eeh.restore import DmaEngine, Idle, Opened
from vfio.eeh.state import State

if TYPE_CHECKING:
    from vfio.container import Container
    from vfio.device import Device

LOGGER = logging.getLogger("vfio.eeh")
LOGGER.addHandler(logging.NullHandler())  # who wants to read it says where it goes

TIMEOUT = 60.0
_READY_INTERVAL = 0.1
_NOT_FROZEN, _RECOVERED, _UNKNOWN = "not frozen", "recovered", "unknown"


class Driver(Protocol):
    """What `recover` calls of a driver; each of the three may be missing."""

    def on_error(self, log: Log) -> None:
        """The PE is frozen: start nothing more.  The log has its beginning; the rest is filled in later."""

    def on_reset(self, device: Device) -> None:
        """The device has been reset, its registers, interrupts and mappings are back: set it up, start nothing."""

    def on_resume(self) -> None:
        """All works: go on, and begin with what was lost."""


def recover(
    device: Device,
    driver: object | Mapping[Device, object] | None = None,
    *,
    reset: ResetKind = "hot",
    limit: int = history.LIMIT,
    timeout: float = TIMEOUT,
    log: Log | None = None,
    noticed: str = "",
    engine: DmaEngine | None = None,
    freezes: history.Freezes = history.PROCESS,
    clock: Clock = SYSTEM,
) -> Log:
    """Recover the PE of `device` and return the log; a PE that works is left alone.

    All open devices of the container are restored: a reset goes to all its PEs.  `driver` gets the calls of `Driver`,
    with a mapping each device's own.  `reset` is tried first; after a hot one that does not help, a fundamental one is.
    After `limit` freezes of the PE in an hour (each call that finds one counts) it is left frozen.  `timeout` (seconds)
    is looked at before each step; a reset itself is one call that lasts some seconds.  `log` is an own one to fill in,
    `noticed` says how the freeze was noticed.  `engine` moves data through every window and from what is mapped there,
    before the driver resumes.

    May be called again, after a success and after a failure, and by several threads: one recovers, the others then find
    nothing to do.

    Raises `errors.NoEeh`, `errors.TooManyFreezes`, `errors.RecoveryFailed`; the latter two have the log and say in which
    state the PE was left.  `errors.TimedOut` where another thread was not done with it in time.
    """
    eeh = operations.of(device)
    drivers = driver if isinstance(driver, Mapping) else {device: driver}
    log = log or Log(device.address, device.group.number, clock.date())
    log.noticed = noticed or log.noticed
    if not eeh.recovering.acquire(timeout=timeout):
        raise errors.TimedOut(f"waiting for the recovery of {device.address} by another thread", timeout)
    try:
        opened = [each for group in eeh.container.groups for each in group.devices]
        parts = [Opened(each, eeh.unrestored) for each in opened]
        return _Recovery(eeh, log, parts, drivers, _kinds(reset), limit, timeout, engine, freezes, clock).run()
    finally:
        eeh.recovering.release()


def recover_idle(
    container: Container,
    address: str,
    *,
    reset: ResetKind = "hot",
    limit: int = history.LIMIT,
    timeout: float = TIMEOUT,
    freezes: history.Freezes = history.PROCESS,
    clock: Clock = SYSTEM,
) -> Log:
    """`recover` for a PE of which no device is open: what the host has of configuration space goes into the log.

    The container has the group of the device `address`, and an IOMMU.  The host may recover such a PE by itself: while
    it does, it is waited for.
    """
    group = sysfs.group_of(container.backend, address)
    members = sysfs.group_devices(container.backend, group) if group is not None else []
    log = Log(address, -1 if group is None else group, clock.date(), kernel=host.said(container.backend, address))
    parts = [Idle(container.backend, each.address) for each in members]
    return _Recovery(container.eeh, log, parts, {}, _kinds(reset), limit, timeout, None, freezes, clock).run()


def _kinds(first: ResetKind) -> tuple[ResetKind, ...]:
    """The resets to try."""
    return ("hot", "fundamental") if first == "hot" else (first,)


class _Recovery:
    def __init__(
        self,
        eeh: Eeh,
        log: Log,
        parts: Sequence[Opened | Idle],
        drivers: Mapping[Device, object],
        kinds: tuple[ResetKind, ...],
        limit: int,
        timeout: float,
        engine: DmaEngine | None,
        freezes: history.Freezes,
        clock: Clock,
    ) -> None:
        self.eeh, self.log, self.parts, self.drivers, self.kinds = eeh, log, parts, drivers, kinds
        self.limit, self.timeout, self.engine, self.freezes, self.clock = limit, timeout, engine, freezes, clock
        self.begin = clock.now()
        self.in_reset = False
        self.collected: dict[str, bytes] = {}
        self.log.limit = limit

    # --- the procedure ---

    def run(self) -> Log:
        try:
            if not self._confirm():
                self.log.outcome = _NOT_FROZEN
                return self._done()
            for act in (
                self._stop,
                self._thaw,
                self._collect,
                self._count,
                self._reset,
                self._configure,
                self._restore,
                self._verify,
                self._start,
                self._exercise,
                self._resume,
                self._confirm_again,
            ):
                self._check_time()
                act()
        except errors.NoEeh:
            raise
        except BaseException as error:
            self._failed(error)
            raise
        self.eeh.unrestored.clear()
        self.log.outcome = _RECOVERED
        return self._done()

    def _confirm(self) -> bool:
        """Whether there is anything to do; waits while the host is busy with a PE above."""
        with self._step("confirm") as told:
            found = self.eeh.answer()
            self.log.before = found.state.name
            if found.group is not None:
                self.log.group = found.group
            pe = states.of_group(self.eeh.backend, self.log.group)
            self.log.pe = pe.name if pe else ""
            self.log.host = sysfs.eeh(self.eeh.backend, pe.address if pe else self.log.address)
            told.append(f"{found.state.name}: {pe.words if pe else found.state.words}")
            self.eeh.check_not_removed("cannot bring it back")
            if len(self.eeh.container.groups) > 1 and found.group is not None:
                told.append(f"group {found.group} answered")
            if self.eeh.wait_available(self._left(), self.clock):
                told.append("waited for the host to recover the PE above")
                return True
            self._wait_for_host(told)
            unrestored = any(part.before is not None for part in self.parts)
            return self.eeh.state is not State.NORMAL or unrestored or self._blocked()

    def _wait_for_host(self, told: list[str]) -> None:
        """Of a PE that nobody has open the host may be at work itself."""
        if any(isinstance(part, Opened) for part in self.parts):
            return
        while (pe := states.of_group(self.eeh.backend, self.log.group)) is not None and pe.recovering:
            if self._left() <= 0:
                raise errors.TimedOut(f"waiting for the host to recover {self._name}", self.timeout)
            told[1:] = ["waited for the host, which recovers it itself"]
            self.clock.sleep(_READY_INTERVAL)

    def _blocked(self) -> bool:
        """Whether configuration space is out of reach though the PE works: somebody left it in reset, and thawed."""
        try:
            for part in self.parts:
                part.check_answers()
        except OSError:
            return True
        return False

    def _stop(self) -> None:
        self._call("stop", "on_error", lambda device: (self.log,))

    def _thaw(self) -> None:
        with self._step("thaw") as told:
            with suppress(errors.CallFailed):  # then there is less in the log, and a reset helps all the same
                self.eeh.unfreeze_io()
            told.append(self.eeh.state.name)

    def _collect(self) -> None:
        with self._step("collect") as told:
            for part in self.parts:
                found = DeviceLog(part.address)
                try:
                    data = part.configuration()
                except OSError as error:
                    found.unreadable = getattr(error, "why", "") or str(error)
                else:
                    found.config = data.hex()
                    self.collected[part.address] = data
                self.log.devices.append(found)
                told.append(f"{part.address}: {'; '.join(found.reasons) or 'no error register is set'}")
        for each in self.log.devices:
            LOGGER.warning("%s: %s", each.address, "; ".join(each.reasons) or "no error register is set")

    def _count(self) -> None:
        backend, group = self.eeh.backend, self.log.group
        with self._step("count") as told:
            now = self.clock.date()
            self.log.count = self.freezes.count(backend, group, now) + 1
            told.append(f"{self.log.count} of {self.limit}")
            if self.log.count <= self.limit:
                self.freezes.add(backend, group, now)
                return
        raise errors.TooManyFreezes(self._name, self.log.count, self.limit, self._state(), self.log)

    def _reset(self) -> None:
        for kind in self.kinds:
            try:
                with self._step(f"reset {kind}") as told:
                    self._reset_once(kind)
                    told.append(self.eeh.state.name)
                self.log.reset = kind
                return
            except errors.Harmful:
                raise
            except OSError:
                if kind == self.kinds[-1]:
                    raise
                self._check_time()

    def _reset_once(self, kind: ResetKind) -> None:
        for part in self.parts:
            if part.address in self.collected:
                part.keep(self.collected[part.address])
            part.disarm()
        self.in_reset = True
        self.eeh.assert_reset(kind)
        self.clock.sleep(HOLD)
        self.eeh.deassert_reset()
        self.in_reset = False
        for part in self.parts:
            self._wait_ready(part)
        if (found := self.eeh.answer()).state is not State.NORMAL:
            raise errors.CallFailed(errno.EIO, f"a {kind} reset did not help", f"the state is {found.state.name}")

    def _wait_ready(self, part: Opened | Idle) -> None:
        """A device may take its time after a reset: it has answered when configuration space is not all ones."""
        while True:
            try:
                part.check_answers()
                return
            except errors.CallFailed as error:
                if error.errno != errno.EIO or self._left() <= 0:
                    raise
            self.clock.sleep(_READY_INTERVAL)

    def _configure(self) -> None:
        with self._step("configure"):
            self.eeh.configure()

    def _restore(self) -> None:
        with self._step("restore") as told:
            for part in self.parts:
                self.log.restored += part.put_back()
            told.append(f"{len(self.log.restored)} registers and interrupts")

    def _verify(self) -> None:
        with self._step("verify") as told:
            for part in self.parts:
                if part.before and restore.identity(part.before) != part.identity():
                    what = f"{part.address} is not the device that it was"
                    raise errors.CallFailed(errno.ENODEV, what, "its class or revision changed")
                told.append(f"{part.address} {part.probe()}")
            self.eeh.check_state()

    def _start(self) -> None:
        self._call("start", "on_reset", lambda device: (device,))
        self.eeh.check_state()

    def _exercise(self) -> None:
        opened = [part.device for part in self.parts if isinstance(part, Opened)]
        if self.engine is not None and opened:
            with self._step("exercise") as told:
                told += restore.windows(opened[0], self.engine)
                self.eeh.check_state()

    def _resume(self) -> None:
        self._call("resume", "on_resume", lambda device: ())

    def _confirm_again(self) -> None:
        with self._step("confirm") as told:
            self.eeh.check_state()
            told.append(State.NORMAL.name)

    # --- how it is told ---

    @property
    def _name(self) -> str:
        return f"{self.log.pe or f'group {self.log.group}'} ({self.log.address})"

    @contextmanager
    def _step(self, name: str) -> Iterator[list[str]]:
        """One step, timed and logged; what is put into the list is its detail."""
        began, told = self.clock.now(), list[str]()
        try:
            yield told
        except BaseException as error:
            told.append(f"failed: {error}" if isinstance(error, Exception) else type(error).__name__)
            raise
        finally:
            now = self.clock.now()
            step = Step(name, began - self.begin, now - began, "; ".join(told).replace("\n", " "))
            self.log.steps.append(step)
            LOGGER.info("%s: %s, %.3f s: %s", self._name, name, step.seconds, step.detail)

    def _call(self, step: str, hook: str, arguments: Any) -> None:
        for device, driver in self.drivers.items():
            if (call := getattr(driver, hook, None)) is not None:
                with self._step(step) as told:
                    told.append(f"{type(driver).__name__}.{hook}")
                    call(*arguments(device))

    def _left(self) -> float:
        return self.begin + self.timeout - self.clock.now()

    def _check_time(self) -> None:
        if self._left() <= 0:
            raise errors.TimedOut(f"recovering {self._name}", self.timeout)

    def _state(self) -> str:
        try:
            return self.eeh.state.name
        except OSError as error:
            return f"{_UNKNOWN} ({error.strerror})"

    def _done(self) -> Log:
        self.log.seconds = self.clock.now() - self.begin
        self.log.after = self._state()
        for each, part in zip(self.log.devices, self.parts, strict=False):
            with suppress(OSError):
                each.after = part.configuration().hex()
        level = logging.INFO if self.log.outcome == _NOT_FROZEN else logging.WARNING
        LOGGER.log(level, "%s: %s in %.3f s", self._name, self.log.outcome, self.log.seconds)
        return self.log

    def _failed(self, error: BaseException) -> None:
        """End a reset that was begun, write down in which state all is left, and say so."""
        step = self.log.steps[-1].name if self.log.steps else "confirm"
        held = False
        if self.in_reset:
            try:
                self.eeh.deassert_reset()
                self.in_reset = False
            except OSError:
                held = True
        reset = bool(self.log.reset) or any(each.name.startswith("reset") for each in self.log.steps)
        why = error.reason if isinstance(error, errors.RecoveryFailed) else getattr(error, "why", "") or str(error)
        self.log.outcome = f"{step}: {why or type(error).__name__}".replace("\n", " ")
        self._done()
        if isinstance(error, Exception) and not isinstance(error, errors.RecoveryFailed):
            remedy = self._remedy(held, reset)
            raise errors.RecoveryFailed(self._name, step, error, self.log.after, remedy, self.log) from error

    def _remedy(self, held: bool, reset: bool) -> str:
        pe = states.of_group(self.eeh.backend, self.log.group)
        if pe.removed if pe else self.log.after.startswith(_UNKNOWN):
            return "the host has given the device up: close it, mend or replace it, and echo 1 > /sys/bus/pci/rescan"
        if held:
            return "it is held in reset: eeh.deassert_reset() ends that, or recover again"
        if self.log.after == State.NORMAL.name:
            return (
                "the PE works, but the device was reset and is not restored: recover again"
                if reset
                else "recover again"
            )
        return "nothing gets through to the device: recover again, or close it, which thaws and resets it"
