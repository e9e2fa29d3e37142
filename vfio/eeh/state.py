"""The states of a PE: what VFIO_EEH_PE_GET_STATE answers, and what sysfs shows of any PE without opening anything.

Sources: arch/powerpc/include/asm/eeh.h, arch/powerpc/kernel/eeh_sysfs.c, eeh_pe_get_state in arch/powerpc/kernel/eeh.c.
"""

from __future__ import annotations

import errno
from enum import IntEnum, IntFlag
from typing import NamedTuple

from vfio import address as addresses
from vfio import errors, sysfs, uapi
from vfio.backend import Backend, missing

_NUMBER = "eeh_pe_config_addr"


class State(IntEnum):
    """What VFIO_EEH_PE_GET_STATE answers."""

    NORMAL = uapi.VFIO_EEH_PE_STATE_NORMAL
    RESET = uapi.VFIO_EEH_PE_STATE_RESET
    STOPPED = uapi.VFIO_EEH_PE_STATE_STOPPED
    STOPPED_DMA = uapi.VFIO_EEH_PE_STATE_STOPPED_DMA
    UNAVAIL = uapi.VFIO_EEH_PE_STATE_UNAVAIL

    @property
    def words(self) -> str:
        """The state for a person."""
        return _WORDS[self]


_WORDS = {
    State.NORMAL: "MMIO and DMA work",
    State.RESET: "held in reset",
    State.STOPPED: "MMIO and DMA are frozen",
    State.STOPPED_DMA: "DMA is frozen, MMIO works",
    State.UNAVAIL: "unavailable: MMIO alone is frozen, or the host recovers the PE above",
}


class Enabled(IntFlag):
    """The first number of ``eeh_pe_state``: what the hardware lets through (EEH_STATE_*)."""

    UNAVAILABLE = 1 << 0
    NOT_SUPPORT = 1 << 1
    RESET_ACTIVE = 1 << 2
    MMIO_ACTIVE = 1 << 3
    DMA_ACTIVE = 1 << 4
    MMIO_ENABLED = 1 << 5
    DMA_ENABLED = 1 << 6


class Noted(IntFlag):
    """The second number of ``eeh_pe_state``: what the kernel has written down of the PE (EEH_PE_*)."""

    ISOLATED = 1 << 0
    RECOVERING = 1 << 1
    CFG_BLOCKED = 1 << 2
    RESET = 1 << 3
    KEEP = 1 << 8
    CFG_RESTRICTED = 1 << 9
    REMOVED = 1 << 10
    PRI_BUS = 1 << 11


class Mode(IntFlag):
    """``eeh_mode``: what the kernel has written down of the device (EEH_DEV_*)."""

    BRIDGE = 1 << 0
    ROOT_PORT = 1 << 1
    DS_PORT = 1 << 2
    IRQ_DISABLED = 1 << 3
    DISCONNECTED = 1 << 4
    NO_HANDLER = 1 << 8
    SYSFS = 1 << 9
    REMOVED = 1 << 10


class PeName(NamedTuple):
    """The PE of a device."""

    address: str
    pe: int
    """Number of the PE below its PHB (``eeh_pe_config_addr``)."""

    @property
    def phb(self) -> int:
        """The PHB: the PCI domain of the device."""
        return int(self.address.partition(":")[0], 16)

    @property
    def name(self) -> str:
        """As the kernel's log has it: ``PHB#1-PE#fd``."""
        return f"PHB#{self.phb:x}-PE#{self.pe:x}"


class PeStatus(NamedTuple):
    """A device and its PE as sysfs shows them."""

    address: str
    pe: int
    """Number of the PE below its PHB (``eeh_pe_config_addr``)."""
    enabled: Enabled
    noted: Noted
    mode: Mode

    @property
    def phb(self) -> int:
        """The PHB: the PCI domain of the device."""
        return PeName(self.address, self.pe).phb

    @property
    def state(self) -> State:
        """What GET_STATE would answer for this PE, were no PE above it in trouble."""
        mmio, dma = Enabled.MMIO_ENABLED in self.enabled, Enabled.DMA_ENABLED in self.enabled
        if Enabled.RESET_ACTIVE in self.enabled:
            return State.RESET
        if mmio and dma:
            return State.NORMAL
        if mmio:
            return State.STOPPED_DMA
        return State.UNAVAIL if dma else State.STOPPED

    @property
    def half_frozen(self) -> bool:
        """Whether MMIO alone is frozen, which GET_STATE cannot tell from unavailable."""
        return self.state is State.UNAVAIL

    @property
    def removed(self) -> bool:
        """Whether the host has given the device up."""
        return Noted.REMOVED in self.noted or Mode.REMOVED in self.mode

    @property
    def recovering(self) -> bool:
        """Whether the host is recovering the PE, with its own drivers."""
        return Noted.RECOVERING in self.noted and not self.removed

    @property
    def forgotten(self) -> bool:
        """Whether it works, and yet counts as frozen with the host: it was thawed by halves, and not by ENABLE."""
        return self.state is State.NORMAL and Noted.ISOLATED in self.noted and not (self.recovering or self.removed)

    @property
    def name(self) -> str:
        """As the kernel's log has it: ``PHB#1-PE#fd``."""
        return PeName(self.address, self.pe).name

    @property
    def words(self) -> str:
        """All of it for a person."""
        found = []
        if self.removed:
            found.append("given up by the host after too many failures")
        elif self.recovering:
            found.append("the host is recovering it")
        if Enabled.NOT_SUPPORT in self.enabled:
            found.append("permanently unavailable")
        elif Enabled.UNAVAILABLE in self.enabled:
            found.append("temporarily unavailable")
        elif self.half_frozen:
            found.append("MMIO is frozen, DMA works")
        elif self.state is not State.NORMAL:
            found.append(self.state.words)
        if Noted.CFG_BLOCKED in self.noted:
            found.append("configuration space is blocked")
        if self.forgotten:
            found += [self.state.words, "the host still counts it as frozen, and would not notice a freeze"]
        return "; ".join(found) or self.state.words


def status(backend: Backend, address: str) -> PeStatus:
    """The PE of a device, from sysfs.

    Reading has one effect: a PE that is wholly frozen counts from then on as known to the host, which then does not
    begin to recover it by itself (pnv_eeh_get_pe_state).  Raises `errors.NoSuchDevice`, `errors.InvalidAddress`, and
    `errors.NoEeh` where the device has no PE.
    """
    found = sysfs.eeh(backend, sysfs.device(backend, address).address)
    parsed = _parse(addresses.parse(address), found)
    if parsed is None:
        raise errors.NoEeh(f"no EEH state of {address}", why_not(backend))
    return parsed


def statuses(backend: Backend) -> list[PeStatus]:
    """The PEs of all devices, in the order of their addresses; as `status`.

    Raises `errors.NoEeh` on a host without EEH.
    """
    devices = sysfs.devices(backend)
    found = [_parse(device.address, sysfs.eeh(backend, device.address)) for device in devices]
    if not any(found):
        raise errors.NoEeh("no EEH state", why_not(backend))
    return [each for each in found if each is not None]


def names(backend: Backend, address: str | None = None) -> list[PeName]:
    """The PEs of one device or of all, without asking for any state.  Raises `errors.NoEeh` where there is none."""
    devices = sysfs.devices(backend) if address is None else [sysfs.device(backend, address)]
    found = []
    for device in devices:
        try:
            found.append(PeName(device.address, int(backend.read_text(sysfs.path(device.address, _NUMBER)), 16)))
        except OSError as error:
            if not missing(error):
                raise
    if not found:
        raise errors.NoEeh(f"no EEH state of {address}" if address else "no EEH state", why_not(backend))
    return found


def of_group(backend: Backend, group: int) -> PeStatus | None:
    """The PE of an IOMMU group; None where sysfs has none (no EEH, or the device is gone)."""
    try:
        members = backend.listdir(f"{sysfs.GROUPS}/{group:d}/devices")
    except OSError as error:
        if missing(error):
            return None
        raise
    for address in sorted(members):
        if found := _parse(address, sysfs.eeh(backend, address)):
            return found
    return None


def why_not(backend: Backend) -> str:
    """Why this host, or this device, has no EEH."""
    if not sysfs.on_power(backend):
        return "this is not a POWER host, and EEH is POWER's"
    if not any(backend.exists(sysfs.path(device.address, _NUMBER)) for device in sysfs.devices(backend)):
        return "this kernel has EEH for no device: a PAPR guest under QEMU or an IOMMU of another kind has none"
    return "the kernel has EEH, but no PE for this device"


def _parse(address: str, files: dict[str, str]) -> PeStatus | None:
    try:
        enabled, noted = (int(text, 16) for text in files["eeh_pe_state"].split())
        return PeStatus(
            address,
            int(files[_NUMBER], 16),
            Enabled(enabled),
            Noted(noted),
            Mode(int(files["eeh_mode"], 16)),
        )
    except KeyError:
        return None
    except ValueError as error:
        raise errors.CallFailed(errno.EIO, f"cannot understand the EEH files of {address}", str(error)) from error
