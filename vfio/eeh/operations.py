"""The EEH operations of a container (VFIO_EEH_PE_OP), under their kernel names."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING, Literal, NamedTuple
from weakref import WeakKeyDictionary

from vfio import errors, sysfs, uapi
from vfio.eeh import state as states
from vfio.eeh.clock import SYSTEM, Clock
from vfio.eeh.state import PeStatus, State

if TYPE_CHECKING:
    from vfio.container import Container
    from vfio.device import Device

ResetKind = Literal["hot", "fundamental"]

HOLD = 0.25
"""Seconds that a reset is held before it is ended, as the kernel's own recovery does."""

_RESETS = {"hot": uapi.VFIO_EEH_PE_RESET_HOT, "fundamental": uapi.VFIO_EEH_PE_RESET_FUNDAMENTAL}


class ErrorFunction(IntEnum):
    """Where INJECT_ERR puts an error: the access that it hits (EEH_ERR_FUNC_*, arch/powerpc/include/uapi/asm/eeh.h)."""

    LD_MEM_ADDR = 0
    LD_MEM_DATA = 1
    LD_IO_ADDR = 2
    LD_IO_DATA = 3
    LD_CFG_ADDR = 4
    LD_CFG_DATA = 5
    ST_MEM_ADDR = 6
    ST_MEM_DATA = 7
    ST_IO_ADDR = 8
    ST_IO_DATA = 9
    ST_CFG_ADDR = 10
    ST_CFG_DATA = 11
    DMA_RD_ADDR = 12
    DMA_RD_DATA = 13
    DMA_RD_MASTER = 14
    DMA_RD_TARGET = 15
    DMA_WR_ADDR = 16
    DMA_WR_DATA = 17
    DMA_WR_MASTER = 18
    DMA_WR_TARGET = 19


class Answer(NamedTuple):
    """The state of a container's PEs, and whose it is."""

    state: State
    group: int | None
    """The group whose PE answered; None while all work, or where sysfs does not tell."""
    pe: PeStatus | None
    """That PE as sysfs shows it."""


class Eeh:
    """EEH of a container; made by `Container.eeh`.

    An operation goes to the PEs of all groups of the container: a reset resets them all.  GET_STATE asks the newest
    group first, and answers with the first state that is not NORMAL; `answer` says whose it was.

    Every operation raises `errors.NoEeh` where the platform has none, and `errors.CallFailed`: EINVAL while the container
    has no group or no IOMMU, EPERM for another process's container, EIO where the hardware refuses.
    """

    def __init__(self, container: Container) -> None:
        self.container = container
        self.backend = container.backend
        self.recovering = threading.RLock()
        """Held by `recover`: one recovery at a time."""
        self.unrestored: WeakKeyDictionary[Device, bytes] = WeakKeyDictionary()
        """Configuration space as a recovery that did not get to its end has still to restore it."""

    @property
    def available(self) -> bool:
        """Whether the kernel has EEH on this platform (CHECK_EXTENSION of VFIO_EEH)."""
        return self.container.check_extension(uapi.VFIO_EEH)

    @property
    def state(self) -> State:
        """GET_STATE: the first state that is not NORMAL, asked of the newest group first.

        Not blocked by a reset that another thread is making.
        """
        found = self._op(uapi.VFIO_EEH_PE_GET_STATE, "cannot get the EEH state")
        try:
            return State(found)
        except ValueError:
            raise errors.UnexpectedAnswer(
                errno.EPROTO, "cannot get the EEH state", f"the kernel answered {found}, which is no state"
            ) from None

    def answer(self) -> Answer:
        """GET_STATE, and whose state it is."""
        found = self.state
        if found is State.NORMAL:
            return Answer(found, None, None)
        groups = list(reversed(self.container.groups))
        for group in groups:
            pe = states.of_group(self.backend, group.number)
            if pe is not None and pe.state is not State.NORMAL:
                return Answer(found, group.number, pe)
        if len(groups) == 1:  # a PE above it is in trouble
            return Answer(found, groups[0].number, states.of_group(self.backend, groups[0].number))
        return Answer(found, None, None)

    def check(self, value: int, width: int = 4) -> int:
        """`value`, which was read from `width` bytes of a register; costs nothing unless it is all ones.

        Raises `errors.PeFrozen` where it is all ones because the PE is frozen.
        """
        if value == (1 << 8 * width) - 1:
            self.check_state()
        return value

    def check_state(self) -> None:
        """Raises `errors.PeFrozen` unless the state is NORMAL."""
        found = self.answer()
        if found.state is not State.NORMAL:
            raise errors.PeFrozen(self._named(found), found.state.name, found.state.words)

    def enable(self) -> None:
        """ENABLE: a frozen PE is thawed; nothing happens to one that works."""
        self._op(uapi.VFIO_EEH_PE_ENABLE, "cannot enable EEH")

    def disable(self) -> None:
        """DISABLE: the kernel takes it and does nothing."""
        self._op(uapi.VFIO_EEH_PE_DISABLE, "cannot disable EEH")

    def unfreeze_io(self) -> None:
        """UNFREEZE_IO: MMIO works again, DMA does not (STOPPED becomes STOPPED_DMA)."""
        self._op(uapi.VFIO_EEH_PE_UNFREEZE_IO, "cannot thaw MMIO")

    def unfreeze_dma(self) -> None:
        """UNFREEZE_DMA: DMA works again.

        A PE that is thawed by halves still counts as frozen with the host, which will not notice its next freeze once it
        is the host's again; `enable` on a frozen PE, or a reset, ends that.
        """
        self._op(uapi.VFIO_EEH_PE_UNFREEZE_DMA, "cannot thaw DMA")

    def assert_reset(self, kind: ResetKind = "hot") -> None:
        """RESET_HOT or RESET_FUNDAMENTAL: the PE is frozen, its devices lose their state, configuration space is ENODEV.

        Blocks for seconds.  Until `deassert_reset` nothing works, whatever else thaws the PE; not even closing
        everything ends it.  Raises `errors.Harmful` for a device that the host has given up: the kernel would wait for
        ever for its lock, and nothing could end this process.
        """
        self.check_not_removed(f"cannot begin a {kind} reset")
        self._op(_RESETS[kind], f"cannot begin a {kind} reset")

    def check_not_removed(self, what: str) -> None:
        """Raises `errors.Harmful` where the host has given up a device of the container and waits for its last close."""
        for group in self.container.groups:
            pe = states.of_group(self.backend, group.number)
            if pe is not None and pe.removed:
                why = f"the host has given {pe.name} ({pe.address}) up after too many failures"
                raise errors.Harmful(what, why, "close its devices; then mend or replace it")

    def deassert_reset(self) -> None:
        """RESET_DEACTIVATE: the PE is thawed, BARs are as before; what the reset cleared is off: bus mastering, MSI.

        Harmless without a reset.
        """
        self._op(uapi.VFIO_EEH_PE_RESET_DEACTIVATE, "cannot end the reset")

    @contextmanager
    def held_in_reset(self, kind: ResetKind = "hot") -> Iterator[None]:
        """The PE is in reset inside the ``with`` block; what it loses is said at `deassert_reset`."""
        try:
            self.assert_reset(kind)
            yield
        finally:
            self.deassert_reset()

    def reset(self, kind: ResetKind = "hot", hold: float = HOLD, clock: Clock = SYSTEM) -> None:
        """Reset: assert, hold for `hold` seconds, deassert.  `recover` also restores what that clears."""
        with self.held_in_reset(kind):
            clock.sleep(hold)

    def configure(self) -> None:
        """CONFIGURE: set up the bridges of the PE after a reset."""
        self._op(uapi.VFIO_EEH_PE_CONFIGURE, "cannot configure the PE")

    def inject(
        self, function: ErrorFunction | int, address: int = 0, mask: int = 0, *, bits: Literal[32, 64] = 32
    ) -> None:
        """INJECT_ERR: the next access of the kind `function` at `address` (bus address) fails, which freezes the PE.

        `mask` says which bits of the address count (0: any address, on hardware that has no choice), `bits` the width of
        addresses.  Which functions work depends on the PHB: POWER8 has memory, configuration and DMA, POWER9
        configuration only.  Raises `errors.CallFailed` with EIO where the firmware refuses, ENXIO where it injects
        nothing.
        """
        argument = uapi.vfio_eeh_pe_op(
            argsz=uapi.sizeof(uapi.vfio_eeh_pe_op),
            op=uapi.VFIO_EEH_PE_INJECT_ERR,
            err={"type": int(bits == 64), "func": int(function), "addr": address, "mask": mask},
        )
        name = function.name if isinstance(function, ErrorFunction) else str(function)
        self._call(argument, f"cannot inject {name}, {bits} bits, at {address:#x}")

    def wait_available(self, timeout: float, clock: Clock = SYSTEM, interval: float = 0.2) -> bool:
        """Wait until the state is another one than UNAVAIL, which it is while the host recovers a PE above.

        A PE of which MMIO alone is frozen has that state too, and is not waited for.  Returns whether there was
        anything to wait for; raises `errors.TimedOut` after `timeout` seconds.
        """
        end, waited = clock.now() + timeout, False
        while self.state is State.UNAVAIL:
            found = self.answer()
            if found.pe is not None and found.pe.half_frozen:
                break
            if clock.now() >= end:
                raise errors.TimedOut(f"waiting for {self._named(found)}, which is UNAVAIL", timeout)
            clock.sleep(interval)
            waited = True
        return waited

    def _named(self, answer: Answer) -> str:
        if answer.pe is None:
            return f"{self.container!r}"
        return f"{answer.pe.name} ({answer.pe.address})"

    def _op(self, op: int, what: str) -> int:
        argument = uapi.vfio_eeh_pe_op(argsz=uapi.offsetof(uapi.vfio_eeh_pe_op, "op") + 4, op=op)
        return self._call(argument, what)

    def _call(self, argument: uapi.vfio_eeh_pe_op, what: str) -> int:
        fd = self.container.fd
        try:
            return self.backend.ioctl(fd, uapi.VFIO_EEH_PE_OP, uapi.buffer(argument))
        except OSError as error:
            raise self._explained(error, what) from error

    def _explained(self, error: OSError, what: str) -> errors.VfioError:
        number = error.errno or errno.EIO
        if number in (errno.ENODEV, errno.ENOTTY):
            return errors.NoEeh(what, states.why_not(self.backend), number)
        if number == errno.EINVAL and not self.container.groups:
            return errors.CallFailed(number, what, "the container has no group", "container.attach(group) first")
        if number == errno.EINVAL and self.container.iommu is None:
            return errors.CallFailed(number, what, "the container has no IOMMU", "container.choose_iommu() first")
        if number == errno.EINVAL and any(
            sysfs.group_devices(self.backend, group.number) == [] for group in self.container.groups
        ):
            return errors.CallFailed(number, what, "the host has removed the device", "close it")
        if number == errno.EIO:
            return errors.CallFailed(number, what, "the hardware or its firmware refused")
        return errors.CallFailed(number, what)


def of(device: Device) -> Eeh:
    """EEH of the container that an open device is in.  Raises `errors.Closed` where it is in none."""
    container = device.group.container
    if container is None:
        raise errors.Closed(f"container of {device.address}")
    return container.eeh
