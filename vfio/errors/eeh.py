"""PEs that froze, and recoveries that did not get to their end."""

from __future__ import annotations

import errno as E
from typing import Any

from vfio.errors.base import VfioError


class NoEeh(VfioError):
    """EEH is asked of a host, or of a device, that has none."""

    def __init__(self, what: str, why: str, errno: int = E.ENODEV) -> None:
        super().__init__(errno, what, why, "EEH is there on POWER hosts that run on the bare metal (PowerNV)")


class PeFrozen(VfioError):
    """An I/O error has frozen the PE: reads give all ones, writes and DMA go nowhere."""

    def __init__(self, name: str, state: str, words: str) -> None:
        self.state = state
        super().__init__(E.EIO, f"{name} is frozen", f"its state is {state}: {words}", "eeh.recover(device, driver)")


class DeviceFrozen(VfioError):
    """The device reads as all ones: its PE is frozen, or it is gone.  EEH recovery may bring it back."""

    def __init__(self, address: str) -> None:
        super().__init__(
            E.EIO,
            f"{address} does not answer",
            "its registers read all ones: its PE is frozen, or it is gone",
            "vfio.eeh.recover(device, driver) brings a frozen device back, and what was on its way",
        )


class RecoveryFailed(VfioError):
    """A PE could not be brought back; says at which step, and in which state it is now."""

    def __init__(
        self, name: str, step: str, cause: BaseException | str, state: str, remedy: str, log: Any, errno: int = 0
    ) -> None:
        self.step = step
        self.state = state
        """The state of the PE now: a name of `vfio.eeh.State`, or why it could not be told."""
        self.log = log
        """The `vfio.eeh.Log` as far as it got."""
        self.reason = (
            f"{cause.what}: {cause.why}" if isinstance(cause, VfioError) else str(cause) or type(cause).__name__
        )
        number = errno or (cause.errno if isinstance(cause, OSError) else None) or E.EIO
        super().__init__(
            number, f"cannot recover {name}", f"step {step!r} failed ({self.reason}); its state is now {state}", remedy
        )


class TooManyFreezes(RecoveryFailed):
    """The PE froze more often in the last hour than is allowed; it was left frozen."""

    def __init__(self, name: str, count: int, limit: int, state: str, log: Any) -> None:
        self.count = count
        self.limit = limit
        super().__init__(
            name,
            "count",
            f"it froze {count} times in the last hour, and {limit} are allowed",
            state,
            "see in the log what froze it, and mend or replace that; recover(..., limit=N) tries all the same, "
            "and closing the device thaws and resets it",
            log,
        )
