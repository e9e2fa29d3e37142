"""What a reset of a PE clears, put back: configuration registers and interrupts; and whether the device works again.

The kernel restores BARs and turns decoding on (eeh_pe_reenable_devices); all else is the owner's.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

from vfio import errors, pci, uapi
from vfio.backend import Backend
from vfio.dma import DmaBuffer
from vfio.iommu.spapr import Spapr
from vfio.iommu.spapr_v2 import SpaprTceV2

if TYPE_CHECKING:
    from vfio.device import Device
    from vfio.iommu.window import DmaWindow

_STATUS = 0x06
_IDENTITY = slice(0x08, 0x0C)
"""Revision and class: the first bytes that vfio-pci reads from the hardware, and not from a copy of its own."""
_FUNCTION_RESET = 1 << 15
"""Of the PCI Express device control register: writing a one resets the function."""
_BUS_MASTER = 1 << 2


class DmaEngine(Protocol):
    """What moves data for a test, as `vfio.drivers.edu.Edu` does."""

    capacity: int
    """How many bytes the device can hold."""

    def load(self, iova: int, length: int) -> None:
        """Let the device read `length` bytes from `iova` into itself (DMA read)."""

    def store(self, iova: int, length: int) -> None:
        """Let the device write `length` bytes of what it holds to `iova` (DMA write)."""


class Opened:
    """An open device of a PE that is reset."""

    def __init__(self, device: Device, unrestored: MutableMapping[Device, bytes]) -> None:
        self.device = device
        self.address = device.address
        self._unrestored = unrestored

    @property
    def before(self) -> bytes | None:
        """Configuration space as it is to be put back, once it was kept."""
        return self._unrestored.get(self.device)

    def keep(self, data: bytes) -> None:
        """Put this back after the reset; what an earlier try kept is older, and whole."""
        self._unrestored.setdefault(self.device, data)

    def configuration(self) -> bytes:
        """All of configuration space, as the device has it now.

        Raises `errors.CallFailed`: ENODEV while the PE is held in reset or the host has given the device up, EIO where
        it reads all ones.
        """
        return _answering(self.address, self.device.pci.raw(), _STATUS)

    def check_answers(self) -> None:
        """Raises what `configuration` raises, and reads no more than one register."""
        _answering(self.address, self.device.config.read(_STATUS, 2), 0)

    def identity(self) -> bytes:
        """What configuration space has in common with one of the same device, whatever happened to it."""
        return self.device.config.read(_IDENTITY.start, _IDENTITY.stop - _IDENTITY.start)

    def disarm(self) -> None:
        """Disable INTx: the end of a reset lets the line through while VFIO takes it for masked, and a line that is up
        and that nobody answers for is switched off by the host for good (pci_reenable_device)."""
        if self.device.intx.enabled:
            self.device.intx.suspend()

    def put_back(self) -> Iterator[str]:
        """Write registers back and enable interrupts again; tells each."""
        if before := self.before:
            yield from registers(self.device, before)
        yield from interrupts(self.device)

    def probe(self) -> str:
        """Read from the first BAR; what it gave, in words."""
        return memory(self.device)


class Idle:
    """A device that nobody has open, as the host has it; opening it resets it, so nothing has to be put back."""

    before: bytes | None = None

    def __init__(self, backend: Backend, address: str) -> None:
        self.backend = backend
        self.address = address

    def keep(self, data: bytes) -> None:
        self.before = data

    def configuration(self) -> bytes:
        """As `Opened.configuration`; only the header for who is not root."""
        return _answering(self.address, pci.of(self.backend, self.address).raw(), _STATUS)

    def check_answers(self) -> None:
        self.configuration()

    def identity(self) -> bytes:
        return identity(self.configuration())

    def disarm(self) -> None:
        pass

    def put_back(self) -> Iterator[str]:
        return iter(())

    def probe(self) -> str:
        return "configuration space answers"


def _answering(address: str, data: bytes, status: int) -> bytes:
    if data[status : status + 2] == b"\xff\xff":
        raise errors.CallFailed(errno.EIO, f"cannot read configuration space of {address}", "it reads all ones")
    return data


def identity(configuration: bytes) -> bytes:
    """The part of it that is the same for one device, whatever happened to it."""
    return configuration[_IDENTITY]


def registers(device: Device, before: bytes) -> Iterator[str]:
    """Write back the registers that differ from `before`; tells each.

    Raises `errors.CallFailed` where the device does not become bus master again.
    """
    for saved in _cleared(pci.ConfigSpace(before)):
        now = int.from_bytes(device.config.read(saved.offset, saved.width), "little")
        if now == saved.value:
            continue
        device.config.write(saved.offset, saved.value.to_bytes(saved.width, "little"))
        kept = int.from_bytes(device.config.read(saved.offset, saved.width), "little")
        digits = 2 + 2 * saved.width
        text = f"{device.address} {saved.name} {now:#0{digits}x} -> {kept:#0{digits}x}"
        yield text if kept == saved.value else f"{text} (it was {saved.value:#0{digits}x})"
        if saved.name == "command" and saved.value & ~kept & _BUS_MASTER:
            raise errors.CallFailed(errno.EIO, f"{device.address} does not become bus master again", text)


class _Saved:
    """A register of a copy of configuration space: where it is, and the value to write back."""

    def __init__(self, space: pci.ConfigSpace, name: str, offset: int, width: int, never: int = 0) -> None:
        self.name, self.offset, self.width = name, offset, width
        self.value = int.from_bytes(space.source.read(offset, width), "little") & ~never


def _cleared(space: pci.ConfigSpace) -> Iterator[_Saved]:
    """The registers that a reset clears and an owner may set; the one that lets DMA go is last."""
    yield _Saved(space, "cache line size", 0x0C, 1)
    yield _Saved(space, "latency timer", 0x0D, 1)
    if express := space.find(pci.Express):
        at = express.offset
        yield _Saved(space, "device control", at + 0x08, 2, never=_FUNCTION_RESET)
        if express.flags.version >= 2:
            yield _Saved(space, "device control 2", at + 0x28, 2)
    if aer := space.find(pci.AdvancedErrors):
        for name, offset in (
            ("uncorrectable mask", 0x08),
            ("uncorrectable severity", 0x0C),
            ("correctable mask", 0x14),
        ):
            yield _Saved(space, f"AER {name}", aer.offset + offset, 4)
    yield _Saved(space, "command", 0x04, 2)


def interrupts(device: Device) -> Iterator[str]:
    """Disable and enable again what was enabled, with the same eventfds; tells each."""
    for irq in device.irqs():
        if irq.enabled and irq.cleared_by_reset:
            yield f"{irq}: {irq.rearm()} eventfds"


def memory(device: Device) -> str:
    """Read from the first BAR, where decoding of memory is on; what it gave, in words.

    Through the file and not the mapping: a mapped access while decoding is off would end the process.
    """
    if not pci.ConfigSpace(device.config.read(0, pci.HEADER_SIZE)).command.memory:
        return "memory decoding is off"
    for region in device.regions():
        if region.index <= uapi.VFIO_PCI_BAR5_REGION_INDEX and region.readable and region.size >= 4:
            data = device.backend.pread(device.fd, 4, region.file_offset)
            return f"{region.name} reads {int.from_bytes(data, region.byteorder):#010x}"
    return "it has no BAR to read"


def windows(device: Device, engine: DmaEngine) -> Iterator[str]:
    """Let the device read what is mapped in each window and move data through it; tells each window.

    What is mapped is only read.  Raises `errors.CallFailed` (EIO) where the device sees something else than this
    process, and what the engine raises.
    """
    iommu = device.iommu
    for window in iommu.windows if isinstance(iommu, Spapr) else ():
        with ExitStack() as undo:
            try:
                scratch = _scratch(device, window, undo)
            except OSError as error:
                yield f"{window}: not tried, for want of memory to try it with: {error}"
                continue
            pattern = os.urandom(min(engine.capacity, scratch.length))
            scratch[: len(pattern)] = pattern
            _carry(window, engine, scratch.iova, scratch, pattern)
            tried = [dma for dma in window.mapped if isinstance(dma.memory, DmaBuffer) and dma.memory is not scratch]
            for dma in tried:
                _carry(window, engine, dma.iova, scratch, dma[: min(engine.capacity, scratch.length, dma.length)])
            yield f"{window}: data moves, {len(tried)} mappings lead where they did"


def _scratch(device: Device, window: DmaWindow, undo: ExitStack) -> DmaBuffer:
    """A page of memory, mapped in the window; for a window of large pages, a large page."""
    page_size = max(window.page_size, device.backend.page_size)
    huge = page_size if page_size > device.backend.page_size else None
    buffer = undo.enter_context(DmaBuffer(page_size, huge, device.backend))
    if isinstance(window.iommu, SpaprTceV2):
        undo.enter_context(window.iommu.register(buffer))
    undo.enter_context(window.map(buffer))
    return buffer


def _carry(window: DmaWindow, engine: DmaEngine, iova: int, scratch: DmaBuffer, expected: bytes) -> None:
    """Let the device read at `iova` and write what it read to the scratch page."""
    engine.load(iova, len(expected))
    scratch[: len(expected)] = bytes(len(expected))
    engine.store(scratch.iova, len(expected))
    if scratch[: len(expected)] != expected:
        what = f"the device does not see the memory at IOVA {iova:#x} of {window}"
        raise errors.CallFailed(errno.EIO, what, f"{len(expected)} bytes came back changed")
