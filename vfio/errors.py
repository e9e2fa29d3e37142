"""What failed, why, and what to do about it.

Every error of the library is an OSError that keeps its errno.  The class says what kind of thing failed; the message
has up to three parts: what was tried, which rule was broken (with the values), and the command or change that mends
it.  The parts stand alone too: `error.what`, `error.why`, `error.remedy`.
"""

from __future__ import annotations

import errno as E
import os
import shlex
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


def size(count: int) -> str:
    """`count` bytes for a person: exact in the largest binary unit that divides it."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count and count % (1 << shift) == 0:
            return f"{count >> shift} {unit}"
    return f"{count} bytes"


def span(start: int, length: int) -> str:
    """A range of addresses, half open, in hex."""
    return f"{start:#x}..{start + length:#x}"


class VfioError(OSError):
    """Base of all errors of this library."""

    def __init__(self, errno: int, what: str, why: str = "", remedy: str = "") -> None:
        super().__init__(errno, what)
        self.what = what
        self.why = why or os.strerror(errno)
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.what}: {self.why} [{E.errorcode.get(self.errno or 0, self.errno)}]"
        return f"{text}\n  {self.remedy}" if self.remedy else text


class CallFailed(VfioError):
    """A call failed for a reason that has no class of its own; the message names the call and its object."""


class UnexpectedAnswer(VfioError):
    """The kernel answered a positive number where that means that it did not do what was asked."""


class InvalidAddress(VfioError, ValueError):
    """Text that is not the address of a PCI device."""

    def __init__(self, text: str) -> None:
        super().__init__(
            E.EINVAL,
            f"{text!r} is not a PCI address",
            "expected domain:bus:device.function in hex",
            "for example 0001:01:00.0; vfio list shows the devices of this host",
        )


class NoSuchBackend(VfioError, ValueError):
    """A backend URL that nobody understands, or a backend that cannot be reached."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__(
            E.EINVAL, f"no backend {url!r}", why, "set VFIO_BACKEND or --backend to kernel: or leave it out"
        )


class NoServer(NoSuchBackend):
    """Nobody serves a modelled kernel at this socket."""

    def __init__(self, url: str, path: str) -> None:
        super().__init__(url, f"nobody serves at {path}")
        self.remedy = f'start a server:  eval "$(vfio fake serve --detach --socket {shlex.quote(path)})"'


class AlreadyServed(VfioError):
    """There is a server at the socket."""

    def __init__(self, path: str, pid: int) -> None:
        self.pid = pid
        super().__init__(
            E.EADDRINUSE,
            f"cannot serve at {path}",
            f"process {pid} does",
            f"end it:  vfio fake stop --socket {shlex.quote(path)};  or serve elsewhere:  --socket PATH",
        )


class ServerGone(VfioError):
    """The server of the modelled kernel has ended, and its machine with it."""

    def __init__(self, path: str) -> None:
        super().__init__(
            E.ENOTCONN,
            f"the machine at {path} is gone",
            "its server has ended, or has ended the connection",
            "vfio fake serve starts another, with a machine that remembers nothing",
        )


class ServerRefused(VfioError):
    """The server of the modelled kernel does not serve this program."""

    def __init__(self, path: str, errno: int, why: str, remedy: str) -> None:
        super().__init__(errno, f"the server at {path} refuses this program", why, remedy)


# --- The host -------------------------------------------------------------------------------------------------------


class NoVfio(VfioError):
    """The kernel has no VFIO, or its module is not loaded."""

    def __init__(self, path: str, errno: int = E.ENOENT) -> None:
        super().__init__(
            errno,
            f"cannot open {path}",
            "the kernel has no VFIO, or its modules are not loaded",
            "modprobe vfio-pci (on POWER also vfio_iommu_spapr_tce); the kernel needs CONFIG_VFIO and CONFIG_VFIO_PCI",
        )


class ModuleMissing(VfioError):
    """A kernel module that has to be there is not loaded."""

    def __init__(self, what: str, module: str, errno: int = E.ENODEV) -> None:
        super().__init__(errno, what, f"the {module} module is not loaded", f"modprobe {module}")


class KernelTooOld(VfioError):
    """VFIO is broken on POWER in kernels older than 6.4."""

    def __init__(self, errno: int, what: str, release: str) -> None:
        super().__init__(
            errno,
            what,
            f"this is kernel {release}, and VFIO does not work on POWER in kernels older than 6.4",
            "boot a kernel 6.4 or later",
        )


class AccessDenied(VfioError):
    """The file's owner and mode keep this user out."""

    def __init__(self, path: str, owner: str, mode: int, user: str, errno: int = E.EACCES) -> None:
        super().__init__(
            errno,
            f"cannot open {path}",
            f"it belongs to {owner} with mode {mode & 0o7777:04o}, and this process is {user}",
            f"as root: chown {user} {path}    (or: vfio bind ADDRESS --group --user {user})",
        )


class LockedMemoryLimit(VfioError):
    """RLIMIT_MEMLOCK does not allow the charge."""

    def __init__(self, what: str, needed: int, locked: int, limit: int | None, errno: int = E.ENOMEM) -> None:
        kib = (locked + needed + 1023) // 1024
        super().__init__(
            errno,
            what,
            f"it locks {size(needed)}, {size(locked)} are locked already, and RLIMIT_MEMLOCK is "
            + ("unlimited" if limit is None else size(limit)),
            f"in the shell: ulimit -l {kib};  in /etc/security/limits.conf: USER - memlock {kib};  "
            f"in a systemd unit: LimitMEMLOCK={kib}K;  or give the process CAP_IPC_LOCK",
        )


# --- Devices and groups ---------------------------------------------------------------------------------------------


class NoSuchDevice(VfioError):
    """No PCI device has this address."""

    def __init__(self, address: str, errno: int = E.ENODEV) -> None:
        super().__init__(
            errno, f"no device {address}", "it is not in sysfs", "vfio list shows the devices of this host"
        )


class NoGroup(VfioError):
    """The device has no IOMMU group, so VFIO cannot isolate it."""

    def __init__(self, address: str) -> None:
        super().__init__(
            E.ENODEV,
            f"{address} cannot be assigned",
            "it is in no IOMMU group",
            "bridges and root ports have none; elsewhere the IOMMU must be on (x86: intel_iommu=on or amd_iommu=on)",
        )


class NotBound(VfioError):
    """The device is not on a VFIO driver."""

    def __init__(self, address: str, driver: str | None, errno: int = E.ENODEV) -> None:
        super().__init__(
            errno,
            f"{address} cannot be opened",
            f"it is on {driver}" if driver else "it is on no driver",
            f"vfio bind {address} --group",
        )


class Blocker(NamedTuple):
    """A device that keeps its group from being viable."""

    address: str
    driver: str
    note: str = ""
    """What the device is in use for, if known."""


class GroupNotViable(VfioError):
    """Some device of the group is on a driver that does DMA on behalf of the host."""

    def __init__(self, group: int, blockers: Sequence[Blocker], errno: int = E.EPERM) -> None:
        self.blockers = tuple(blockers)
        names = [f"{b.address} is on {b.driver}" + (f" ({b.note})" if b.note else "") for b in blockers]
        super().__init__(
            errno,
            f"group {group} is not viable",
            "; ".join(names) or "the host uses a device of it",
            "free it:  vfio bind " + " ".join(b.address for b in blockers)
            if blockers
            else "vfio list shows its devices",
        )


class Holder(NamedTuple):
    """A process that has a file open."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.command})"


class Busy(VfioError):
    """Somebody else holds the group or the device."""

    def __init__(self, what: str, holders: Sequence[Holder], remedy: str = "", errno: int = E.EBUSY) -> None:
        self.holders = tuple(holders)
        super().__init__(
            errno,
            what,
            "held by " + ", ".join(map(str, holders)) if holders else "it is in use (root can see by whom)",
            remedy or "end that process, or close its files, and try again",
        )


class Refused(VfioError):
    """A change that would hurt the running host, refused unless forced."""

    def __init__(self, what: str, why: str, remedy: str, errno: int = E.EBUSY) -> None:
        super().__init__(errno, what, why, remedy)


class Closed(VfioError):
    """The object was closed."""

    def __init__(self, what: str) -> None:
        super().__init__(E.EBADF, what, "it is closed", "open it again")


# --- IOMMU ----------------------------------------------------------------------------------------------------------


class NoIommuModel(VfioError):
    """SET_IOMMU accepted none of the models that were tried."""

    def __init__(self, tried: Iterable[tuple[str, int]], remedy: str) -> None:
        tried = list(tried)
        why = ", ".join(f"{name}: {E.errorcode.get(number, number)}" for name, number in tried)
        super().__init__(tried[-1][1] if tried else E.ENODEV, "no IOMMU model fits this container", why, remedy)


class NotEnabled(VfioError):
    """sPAPR v1 before ENABLE."""

    def __init__(self, what: str) -> None:
        super().__init__(E.EPERM, what, "the container is not enabled", "call iommu.enable() first")


class OutsideWindow(VfioError):
    """The IOVA range is in no DMA window, or runs past the end of one."""

    def __init__(self, what: str, iova: int, length: int, windows: Sequence[str], errno: int = E.ENXIO) -> None:
        super().__init__(
            errno,
            what,
            f"IOVA {span(iova, length)} is inside no DMA window; windows: {', '.join(windows) or 'none'}",
            "choose an IOVA inside a window, or create one: iommu.create_window(size=...)",
        )


class Misaligned(VfioError, ValueError):
    """An address or a length that is not a multiple of a page."""

    def __init__(self, what: str, values: str, page: int, page_of: str) -> None:
        super().__init__(E.EINVAL, what, f"{values} must be multiples of {page_of} of {size(page)}")


class NotRegistered(VfioError):
    """Memory that is in no registration (sPAPR v2)."""

    def __init__(self, what: str, address: int, length: int) -> None:
        super().__init__(
            E.EINVAL,
            what,
            f"no single registration of this process holds all of the memory at {span(address, length)}",
            "register it first: iommu.register(buffer)",
        )


class PageTooLarge(VfioError):
    """The window's page is larger than the pages behind the memory."""

    def __init__(self, what: str, window_page: int, memory_page: int, why: str = "") -> None:
        super().__init__(
            E.EINVAL,
            what,
            why or f"the window's pages are {size(window_page)}, but the memory is in pages of {size(memory_page)}",
            f"use memory with pages of {size(window_page)} (DmaBuffer(..., page_size={window_page})), "
            f"or a window with pages of {size(memory_page)}",
        )


class NoFreeWindow(VfioError):
    """All DMA windows of the container are in use."""

    def __init__(self, windows: Sequence[str], limit: int, errno: int = E.ENOSPC) -> None:
        super().__init__(
            errno,
            "cannot create a DMA window",
            f"all {limit} are in use: {', '.join(windows)}",
            "remove one first: window.close() (the default window too can be removed)",
        )


class BadWindow(VfioError, ValueError):
    """A page size, size or number of levels that cannot be a DMA window here."""

    def __init__(self, why: str, remedy: str, errno: int = E.EINVAL) -> None:
        super().__init__(errno, "cannot create a DMA window", why, remedy)


class AlreadyMapped(VfioError):
    """The IOVA range overlaps a mapping; sPAPR kernels would replace it without a word."""

    def __init__(self, what: str, iova: int, length: int) -> None:
        super().__init__(
            E.EEXIST,
            what,
            f"IOVA {span(iova, length)} overlaps a range that is in use",
            "unmap it first, or leave iova out",
        )


class NotMapped(VfioError):
    """Nothing that this object mapped is there."""

    def __init__(self, what: str, iova: int, length: int) -> None:
        super().__init__(E.ENOENT, what, f"{span(iova, length)} is not the range of a mapping")


class StillMapped(VfioError):
    """Memory is not given back while a device can reach it: the kernel would leak the registration."""

    def __init__(self, what: str, count: int) -> None:
        super().__init__(E.EBUSY, what, f"{count} mapping(s) of it are still in place", "unmap it first")


class NoSpace(VfioError):
    """There is no free range of this length."""

    def __init__(
        self, what: str, length: int, largest: int, remedy: str = "unmap something, or create a larger window"
    ) -> None:
        super().__init__(
            E.ENOSPC,
            what,
            f"the largest free range is {size(largest)} and {size(length)} are needed",
            remedy,
        )


class Harmful(VfioError):
    """A call that is known to hurt a real kernel; it was not made."""

    def __init__(self, what: str, why: str, remedy: str = "") -> None:
        super().__init__(E.EINVAL, what, why, remedy)


# --- Regions and interrupts -----------------------------------------------------------------------------------------


class NoSuchRegion(VfioError):
    """The device does not have this region."""

    def __init__(self, what: str, why: str, errno: int = E.EINVAL) -> None:
        super().__init__(errno, what, why)


class OutsideRegion(VfioError, IndexError):
    """An access that is not wholly inside its region, or not aligned to its width."""

    def __init__(self, what: str, offset: int, length: int, region_size: int, why: str = "") -> None:
        super().__init__(
            E.EINVAL,
            what,
            why or f"offset {offset:#x} + {length} is outside its {size(region_size)} ({region_size:#x})",
        )


class NoCapability(VfioError):
    """The device has no such PCI capability."""

    def __init__(self, wanted: str, there: Sequence[str], *, cut: bool) -> None:
        super().__init__(
            E.ENOENT,
            f"no capability {wanted}",
            f"there are {', '.join(there)}" if there else "only the header could be read" if cut else "there are none",
            "root can read more than the header" if cut else "",
        )


class NoInterrupt(VfioError):
    """The device does not have this interrupt, or not in a state in which it can be used."""

    def __init__(self, what: str, why: str, remedy: str = "", errno: int = E.EINVAL) -> None:
        super().__init__(errno, what, why, remedy)


class TimedOut(VfioError, TimeoutError):
    """What was waited for did not happen in time."""

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(E.ETIMEDOUT, what, f"nothing happened for {seconds:g} s")


# --- Reset ----------------------------------------------------------------------------------------------------------


class Affected(NamedTuple):
    """A device that is reset together with another one."""

    address: str
    group: int


class HotResetRefused(VfioError):
    """A hot reset would touch devices that are not the caller's."""

    def __init__(
        self, address: str, missing: Sequence[Affected], not_on_vfio: Sequence[Blocker], errno: int = E.EINVAL
    ) -> None:
        self.missing = tuple(missing)
        """Devices whose groups were not given."""
        self.not_on_vfio = tuple(not_on_vfio)
        """Devices that are not on a VFIO driver."""
        groups = sorted({each.group for each in missing})
        why = [f"it resets {each.address} too, whose group {each.group} is not among those given" for each in missing]
        why += [f"it resets {each.address} too, which is on {each.driver or 'no driver'}" for each in not_on_vfio]
        remedies = []
        if not_on_vfio:
            remedies.append("vfio bind " + " ".join(each.address for each in not_on_vfio))
        if groups:
            opened = ", ".join(f"Group({number})" for number in groups)
            remedies.append(f"open {opened} and give them too: device.hot_reset([device.group, {opened}])")
        super().__init__(errno, f"cannot hot-reset {address}", "; ".join(why), "\n  ".join(remedies))


# --- EEH ------------------------------------------------------------------------------------------------------------


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


# --- Assignment -----------------------------------------------------------------------------------------------------


class IsBridge(VfioError):
    """Bridges stay with the host."""

    def __init__(self, address: str) -> None:
        super().__init__(
            E.EINVAL,
            f"{address} cannot be assigned",
            "it is a bridge, and bridges stay with the host",
            "name the devices below it; bridges do not keep a group from being viable",
        )


class NotPrivileged(VfioError):
    """A change that only root may make."""

    def __init__(self, what: str, user: str, errno: int = E.EACCES) -> None:
        super().__init__(errno, what, f"only root may do that, and this process is {user}", "run it with sudo")


class NoSuchUser(VfioError, ValueError):
    """Text that names no user (or group) of this host."""

    def __init__(self, text: str, why: str) -> None:
        super().__init__(E.EINVAL, f"cannot give a device to {text!r}", why, "say USER or USER:GROUP, names or numbers")


class NoJournal(VfioError):
    """The directory of the journals cannot be written."""

    def __init__(self, directory: str, cause: OSError) -> None:
        super().__init__(
            cause.errno or E.EIO,
            f"cannot keep a journal in {directory}",
            os.strerror(cause.errno or E.EIO),
            ("run it with sudo" if os.geteuid() else "it is needed to put things back")
            + "; the environment variable VFIO_STATE_DIR can name another directory",
        )


class JournalCorrupt(VfioError):
    """The journal cannot be understood, so that nothing can be restored from it."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(
            E.EINVAL,
            f"cannot read the journal {path}",
            why,
            "nothing was changed; see what vfio list --driver vfio-pci shows, put that right by hand, "
            f"and remove the journal: rm {path}",
        )


class NotRestored(VfioError):
    """Some of what had to be put back could not be; the rest was."""

    def __init__(self, failures: Sequence[tuple[str, OSError]]) -> None:
        self.failures = tuple(failures)
        first = failures[0][1]
        # An error of ours has its own remedy, on lines of its own.
        super().__init__(
            first.errno or E.EIO,
            "not everything could be put back",
            "; ".join(f"{name}: {_short(error)}" for name, error in failures),
            (getattr(first, "remedy", "") + "\n  " if getattr(first, "remedy", "") else "")
            + "the journal keeps what is left: vfio restore --all tries again",
        )


class NotPutBack(VfioError):
    """A change failed, and what had been changed until then could not all be put back."""

    def __init__(self, cause: OSError, failures: Sequence[tuple[str, OSError]]) -> None:
        self.failures = tuple(failures)
        super().__init__(
            cause.errno or E.EIO,
            _short(cause),
            "and not everything could be put back: "
            + "; ".join(f"{name}: {_short(error)}" for name, error in failures),
            "the journal keeps what is left: vfio restore --all tries again",
        )


class RolledBack(VfioError):
    """A change failed, and all that had been changed until then was put back."""

    def __init__(self, cause: OSError, names: Sequence[str]) -> None:
        self.names = tuple(names)
        """What was put back: addresses of devices, and paths of nodes and files."""
        mends = f"{cause.remedy}\n  " if isinstance(cause, VfioError) and cause.remedy else ""
        super().__init__(
            cause.errno or E.EIO,
            cause.what if isinstance(cause, VfioError) else str(cause.filename or "the change failed"),
            cause.why if isinstance(cause, VfioError) else cause.strerror or str(cause),
            mends + (f"put back as before: {', '.join(names)}" if names else "nothing had been changed"),
        )


class BadPlan(VfioError, ValueError):
    """A plan that breaks a rule, or that does not fit this host; nothing was changed."""

    def __init__(self, where: str, rule: str) -> None:
        super().__init__(E.EINVAL, where, rule, "nothing was changed")


def _short(error: OSError) -> str:
    return f"{error.what}: {error.why}" if isinstance(error, VfioError) else str(error)
