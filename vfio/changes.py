"""Changes of the driver core's state, one write (or chown) each, and what they are as shell commands.

The flow is that of the kernel's Documentation/ABI/testing/sysfs-bus-pci: driver_override names the only driver that
may have the device, unbind takes it from its driver, drivers_probe has the kernel look for one again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
from dataclasses import dataclass
from typing import Protocol

from vfio import diagnose, errors, holders, owner, sysfs
from vfio.backend import Backend

VFIO_PCI = "vfio-pci"
PROBE = "/sys/bus/pci/drivers_probe"


class Change(Protocol):
    """One change."""

    def make(self, backend: Backend) -> None:
        """Make it, or raise OSError and leave things as they were."""

    def shell(self) -> str:
        """The equivalent shell command."""


@dataclass(frozen=True)
class Write:
    """A line written to a file of sysfs."""

    path: str
    text: str

    def make(self, backend: Backend) -> None:
        try:
            backend.write_text(self.path, self.text + "\n")
        except OSError as error:
            raise _explained(backend, error, self) from error

    def shell(self) -> str:
        return f"echo {shlex.quote(self.text) + ' ' if self.text else ''}> {self.path}"


@dataclass(frozen=True)
class Chown:
    """The owner of a device node."""

    path: str
    uid: int
    gid: int

    def make(self, backend: Backend) -> None:
        try:
            backend.chown(self.path, self.uid, self.gid)
        except OSError as error:
            raise _explained(backend, error, self) from error

    def shell(self) -> str:
        return f"chown {owner.named(self.uid, self.gid)} {self.path}"


@dataclass(frozen=True)
class Chmod:
    """The mode of a device node."""

    path: str
    mode: int

    def make(self, backend: Backend) -> None:
        try:
            backend.chmod(self.path, self.mode)
        except OSError as error:
            raise _explained(backend, error, self) from error

    def shell(self) -> str:
        return f"chmod {self.mode:04o} {self.path}"


@dataclass(frozen=True)
class Probe:
    """The kernel looks for a driver for a driverless device."""

    address: str
    driver: str | None
    """The one that has to take it; None: whichever fits may, or none."""

    def make(self, backend: Backend) -> None:
        # drivers_probe hides why a probe failed (EINVAL for all), and that nothing matched (no error at all).
        try:
            Write(PROBE, self.address).make(backend)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        if self.driver is not None and sysfs.driver_of(backend, self.address) != self.driver:
            Bind(self.address, self.driver).make(backend)

    def shell(self) -> str:
        return f"echo {self.address} > {PROBE}"


@dataclass(frozen=True)
class Bind:
    """A driver is told to take a driverless device."""

    address: str
    driver: str

    @property
    def _write(self) -> Write:
        return Write(f"{sysfs.DRIVERS}/{self.driver}/bind", self.address)

    def make(self, backend: Backend) -> None:
        try:
            self._write.make(backend)
        except OSError as error:
            raise self._why(backend, error) from error

    def shell(self) -> str:
        return self._write.shell()

    def _why(self, backend: Backend, error: OSError) -> OSError:
        what = f"cannot bind {self.address} to {self.driver}"
        number = error.errno or errno.EIO
        if not sysfs.driver_loaded(backend, self.driver):
            return errors.ModuleMissing(what, self.driver)
        if number == errno.EINVAL and self.driver == VFIO_PCI and (release := diagnose.broken_on_power(backend)):
            return errors.KernelTooOld(number, what, release)
        if number == errno.EBUSY:
            group = sysfs.group_of(backend, self.address)
            found = [] if group is None else holders.of(backend, sysfs.node_of(backend, group))
            if found:
                return errors.Busy(f"{what}: group {group} is in use through VFIO", found)
        if number == errno.ENODEV:
            return errors.CallFailed(
                number, what, "the driver does not match the device, or its probe found no hardware"
            )
        if isinstance(error, errors.NotPrivileged):
            return error
        return errors.CallFailed(number, what, os.strerror(number), "the kernel's log may say more: dmesg | tail")


@dataclass(frozen=True)
class NewId:
    """vfio-pci takes a device by its id, which is withdrawn at once so that nothing else follows the device there."""

    address: str
    id: str

    def make(self, backend: Backend) -> None:
        try:
            Write(f"{sysfs.DRIVERS}/{VFIO_PCI}/new_id", self.id).make(backend)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
        else:
            forget_id(backend, self.id)
        if sysfs.driver_of(backend, self.address) != VFIO_PCI:
            Bind(self.address, VFIO_PCI).make(backend)

    def shell(self) -> str:
        where = f"{sysfs.DRIVERS}/{VFIO_PCI}"
        return f"echo '{self.id}' > {where}/new_id; echo '{self.id}' > {where}/remove_id"


def forget_id(backend: Backend, id: str) -> None:
    """Take an id back from vfio-pci; harmless where it is not there.  Devices that it brought stay bound."""
    with contextlib.suppress(FileNotFoundError):
        try:
            backend.write_text(f"{sysfs.DRIVERS}/{VFIO_PCI}/remove_id", f"{id}\n")
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise


def new_id(device: sysfs.PciDevice) -> str:
    """The id of a device as new_id takes it, with the subsystem, so that it fits as few other devices as possible."""
    ids = (device.vendor, device.device, device.subsystem_vendor, device.subsystem_device)
    return " ".join(f"{number:04x}" for number in ids)


def moves(device: sysfs.PciDevice, driver: str | None, override: str | None, probe: bool = False) -> list[Change]:
    """What takes the device from where it is to a driver (or to none) with this driver_override; may be nothing.

    `probe`: from none, the kernel then looks for a driver of its own choice.
    """
    address = device.address
    changes: list[Change] = []
    now = device.driver_override

    def set_override(name: str | None) -> None:
        nonlocal now
        if device.overridable and name != now:
            changes.append(Write(sysfs.path(address, "driver_override"), name or ""))
            now = name

    if device.driver != driver:
        if driver is not None:
            set_override(driver)  # first, so that nothing else can take the device in between
        if device.driver is not None:
            changes.append(Write(f"{sysfs.DRIVERS}/{device.driver}/unbind", address))
        if driver is not None:
            if device.overridable:
                changes.append(Probe(address, driver))
            elif driver == VFIO_PCI:
                changes.append(NewId(address, new_id(device)))
            else:
                changes.append(Bind(address, driver))
    set_override(override)
    if probe:
        changes.append(Probe(address, None))
    return changes


def _explained(backend: Backend, error: OSError, change: Change) -> OSError:
    number = error.errno or errno.EIO
    if number in (errno.EACCES, errno.EPERM):
        return errors.NotPrivileged(change.shell(), str(owner.me(backend)), number)
    return errors.CallFailed(number, change.shell(), os.strerror(number))
