"""Configuration space, decoded: the header, the capabilities, and every field of theirs by its name.

    config = device.pci  # of an open device; `of` looks at any device through sysfs, `ConfigSpace(data)` at a copy
    config.command.bus_master = True
    if msix := config.find(pci.Msix):
        print(msix.vectors, msix.table_location)
    print(config)

Each access of a register is one access of the device, of the register's own width; setting a field reads and writes
its register.  Nothing here trusts what it reads: lists that run in a circle or lead nowhere end there, and
`ConfigSpace.faults` says so.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Any, TypeVar

from vfio import errors, sysfs
from vfio._pci_capabilities import (
    AccessControlServices,
    AdvancedErrors,
    AdvancedFeatures,
    AlternativeRouting,
    BridgeSubsystem,
    Capability,
    DesignatedVendor,
    Express,
    ExtendedVendor,
    Location,
    Msi,
    Msix,
    PowerManagement,
    SerialNumber,
    SrIov,
    Vendor,
    VitalProductData,
    make,
)
from vfio._pci_header import (
    EXPRESS_SIZE,
    HEADER_SIZE,
    HEADERS,
    STANDARD_SIZE,
    Bar,
    BridgeHeader,
    FunctionHeader,
    Header,
    bars,
)
from vfio._pci_lists import extended, standard
from vfio._pci_register import Image, Line, Register, Source, Structure
from vfio.backend import Backend

__all__ = [
    "EXPRESS_SIZE",
    "HEADER_SIZE",
    "STANDARD_SIZE",
    "AccessControlServices",
    "AdvancedErrors",
    "AdvancedFeatures",
    "AlternativeRouting",
    "Bar",
    "BridgeHeader",
    "BridgeSubsystem",
    "Capability",
    "ConfigSpace",
    "DesignatedVendor",
    "Express",
    "ExtendedVendor",
    "FunctionHeader",
    "Header",
    "Image",
    "Line",
    "Location",
    "Msi",
    "Msix",
    "PowerManagement",
    "Register",
    "SerialNumber",
    "Source",
    "SrIov",
    "Structure",
    "Vendor",
    "VitalProductData",
    "hex_lines",
    "of",
]

C = TypeVar("C", bound=Capability)


class ConfigSpace(Header):
    """Configuration space of a device, or a copy of it: 256 or 4096 bytes, and 64 where no more could be read.

    `errors.OutsideRegion` is raised for a register that is behind the end.
    """

    def __init__(self, source: Source | bytes) -> None:
        super().__init__(Image(source) if isinstance(source, bytes | bytearray) else source, 0)

    @property
    def size(self) -> int:
        """Bytes that can be read."""
        return self.source.size

    @property
    def cut(self) -> bool:
        """Whether only the header is here, as of a device in sysfs for who is not root."""
        return self.size < STANDARD_SIZE

    @property
    def header(self) -> Header:
        """A `FunctionHeader` or a `BridgeHeader`, as the device says."""
        return HEADERS.get(self.header_type.layout, Header)(self.source, 0)

    @property
    def bars(self) -> list[Bar]:
        """The base address registers that are not zero."""
        count = {FunctionHeader: 6, BridgeHeader: 2}.get(type(self.header), 0)
        return bars(self.source, 0x10, count)

    # --- capabilities ---

    @property
    def capabilities(self) -> list[Capability]:
        """All that can be reached, standard ones first, each list in its order."""
        return self._walk()[0]

    @property
    def faults(self) -> list[str]:
        """What is wrong with the lists of capabilities, or with the device; empty where nothing is."""
        return self._walk()[1]

    def find(self, kind: type[C]) -> C | None:
        """The first capability of this kind; None without one."""
        return next((each for each in self.capabilities if isinstance(each, kind)), None)

    def __getitem__(self, kind: type[C]) -> C:
        """As `find`; raises `errors.NoCapability` without one."""
        found = self.find(kind)
        if found is None:
            raise errors.NoCapability(kind.__name__, [each.name for each in self.capabilities], cut=self.cut)
        return found

    def _walk(self) -> tuple[list[Capability], list[str]]:
        faults: list[str] = []
        if self.vendor == 0xFFFF:
            return [], ["the device does not answer: all ones is what a frozen, reset or missing device reads"]
        found = [make(self.source, at, identity) for at, identity in standard(self.source, faults)]
        found += (make(self.source, at, *each) for at, *each in extended(self.source, faults))
        return found, faults

    # --- the whole ---

    def raw(self) -> bytes:
        """All bytes."""
        return self.source.read(0, self.size)

    def snapshot(self) -> ConfigSpace:
        """A copy of it as it is now, which can be looked at without touching the device."""
        return ConfigSpace(self.raw())

    def as_dict(self) -> dict[str, Any]:
        """All of it for JSON; numbers are numbers."""
        found, faults = self._walk()
        return {
            "size": self.size,
            "header": self.header.as_dict(),
            "bars": [bar._asdict() for bar in self.bars],
            "capabilities": [
                {
                    "offset": each.offset,
                    "id": each.identity,
                    "name": each.name,
                    "version": each.version,
                    "registers": each.as_dict(),
                }
                for each in found
            ],
            "faults": faults,
            "bytes": self.raw().hex(),
        }

    def __str__(self) -> str:
        """All of it for a person, a register a line: where it is, its name, value and fields."""
        return "\n".join(self._text())

    def _text(self) -> Iterator[str]:
        header, bars = self.header, {f"bar{bar.number}": bar for bar in self.bars}
        layout = HEADERS.get(self.header_type.layout)
        yield "header" + ("" if layout is None else " of a function" if layout is FunctionHeader else " of a bridge")
        for line in header.lines():
            bar = bars.get(line.name)
            yield _row(line._replace(words=str(bar)) if bar else line)
        found, faults = self._walk()
        for each in found:
            version = "" if each.version is None else f" (version {each.version})"
            yield f"{each.name} at {each.offset:#x}{version}"
            yield from map(_row, each.lines())
        for fault in faults:
            yield f"fault: {fault}"


def _row(line: Line) -> str:
    return f"  {line.offset:03x}  {line.name:26}  {line.value:10}  {line.words}".rstrip()


def hex_lines(data: bytes) -> Iterator[str]:
    """A dump, 16 bytes a line, as lspci and setpci have it; lines like the one before are left out behind a ``*``."""
    before, skipped = b"", False
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        if row == before and at + 16 < len(data):
            if not skipped:
                yield "*"
            skipped = True
            continue
        before, skipped = row, False
        yield f"{at:03x}: {row.hex(' ')}"


def of(backend: Backend, address: str) -> ConfigSpace:
    """A copy of a device's configuration space as the host has it, from sysfs: the device is not opened.

    Who is not root gets the first 64 bytes (`ConfigSpace.cut`).  Raises `errors.NoSuchDevice`, `errors.InvalidAddress`,
    and `errors.CallFailed` with the kernel's errno.
    """
    path = sysfs.path(sysfs.device(backend, address).address, "config")
    try:
        fd = backend.open(path, os.O_RDONLY)
        try:
            data = backend.pread(fd, EXPRESS_SIZE, 0)
        finally:
            backend.close(fd)
    except OSError as error:
        raise errors.CallFailed(error.errno or errno.EIO, f"cannot read {path}") from error
    if len(data) < HEADER_SIZE:
        raise errors.CallFailed(errno.EIO, f"cannot read {path}", f"it has only {len(data)} bytes")
    return ConfigSpace(data)
