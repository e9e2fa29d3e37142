"""Devices and their groups, regions, interrupts and resets."""

from __future__ import annotations

import errno as E
from collections.abc import Sequence
from typing import NamedTuple

from vfio.errors.base import VfioError, size


class InvalidAddress(VfioError, ValueError):
    """Text that is not the address of a PCI device."""

    def __init__(self, text: str) -> None:
        super().__init__(
            E.EINVAL,
            f"{text!r} is not a PCI address",
            "expected domain:bus:device.function in hex",
            "for example 0001:01:00.0; vfio list shows the devices of this host",
        )


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
            "bridges and root ports have none; elsewhere the IOMMU must be on (x86: intel_iommu=on or amd_iommu=on), or the "
            "device is given away unprotected, by hand: vfio.iommu.noiommu tells how",
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
