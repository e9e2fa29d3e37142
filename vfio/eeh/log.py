"""The log of a freeze: what froze and why, what was done about it, and how that ended.

It prints for a person, and is kept as JSON (`Log.save`, `Log.load`).
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from vfio import errors, pci

_VERSION = 1
_ERRORS = 0xF
"""The bits of the PCI Express device status that tell errors."""
_UNREADABLE = "configuration space could not be read"


@dataclass
class Step:
    """One thing that was done."""

    name: str
    begin: float
    """Seconds since the recovery began."""
    seconds: float
    """How long it took."""
    detail: str

    def __str__(self) -> str:
        return f"{self.begin:8.3f} s  {self.name:10}  {self.seconds:7.3f} s  {self.detail}"


@dataclass
class DeviceLog:
    """One device of the PE: its configuration space at the freeze, with MMIO thawed and before any reset."""

    address: str
    config: str = ""
    """Its bytes in hex; empty where they could not be read."""
    unreadable: str = ""
    """Why not."""
    after: str = ""
    """The same when all was done."""

    @property
    def space(self) -> pci.ConfigSpace | None:
        """Configuration space at the freeze, decoded."""
        return pci.ConfigSpace(bytes.fromhex(self.config)) if self.config else None

    @property
    def identity(self) -> str:
        """Vendor and device in hex."""
        space = self.space
        return f"{space.vendor:04x}:{space.device:04x}" if space else ""

    @property
    def reasons(self) -> list[str]:
        """What the device's error registers say; empty where they say nothing."""
        space = self.space
        return list(_reasons(space)) if space else [f"{_UNREADABLE}: {self.unreadable}"]


@dataclass
class Log:
    """What happened to a PE, from the freeze to its end."""

    address: str
    """The device whose recovery this was."""
    group: int
    """Of the PE that was frozen, which in a container of several groups may be another device's."""
    date: float
    """When it was noticed: seconds since the epoch."""
    pe: str = ""
    """As the kernel's log has it: ``PHB#1-PE#fd``; empty where sysfs does not tell."""
    noticed: str = ""
    """How it was noticed, if that was said."""
    before: str = ""
    """State of the PE at the beginning: a name of `State`."""
    after: str = ""
    """The same at the end."""
    host: dict[str, str] = field(default_factory=dict)
    """The EEH files of the device in sysfs, at the beginning."""
    count: int = 0
    """The how-manieth freeze within an hour it is."""
    limit: int = 0
    reset: str = ""
    """The reset that did it: hot or fundamental."""
    outcome: str = ""
    """``recovered``, ``not frozen``, or why it failed."""
    seconds: float = 0.0
    devices: list[DeviceLog] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)
    """What a reset had cleared and was put back."""
    kernel: list[str] = field(default_factory=list)
    """What the kernel's log said of the PE before; the host says nothing of one that a process has open."""

    @property
    def recovered(self) -> bool:
        return self.outcome == "recovered"

    def as_dict(self) -> dict[str, Any]:
        """All of it for JSON, with what the registers say; `from_dict` makes a log of it again."""
        found = asdict(self)
        for device, each in zip(self.devices, found["devices"], strict=True):
            each["reasons"] = device.reasons
        return {"version": _VERSION, **found}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Log:
        """The log that `as_dict` made.  Raises ValueError for anything else."""
        try:
            content = dict(found)
            if content.pop("version") != _VERSION:
                raise ValueError(f"version {found['version']!r} is not {_VERSION}")
            devices = [{name: each[name] for name in each if name != "reasons"} for each in content.pop("devices")]
            steps = content.pop("steps")
            log = cls(
                **content, devices=[DeviceLog(**each) for each in devices], steps=[Step(**each) for each in steps]
            )
            for device in log.devices:
                bytes.fromhex(device.config + device.after)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no log of a freeze: {error}") from error
        return log

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, as JSON."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.as_dict(), file, indent=1)
            file.write("\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Log:
        """Read what `save` wrote.  Raises `errors.CallFailed` (EINVAL) for a file that is no log."""
        with open(path, encoding="utf-8") as file:
            try:
                return cls.from_dict(json.load(file))
            except ValueError as error:
                raise errors.CallFailed(errno.EINVAL, f"cannot read the log {os.fspath(path)}", str(error)) from error

    def __str__(self) -> str:
        """All of it for a person; the configuration spaces as dumps."""
        return "\n".join(self._text())

    def _text(self) -> Iterator[str]:
        where = f"{self.pe or f'group {self.group}'} ({self.address})"
        if self.outcome == "not frozen":
            yield f"{where} is not frozen: nothing was done"
            return
        how = "was recovered" if self.recovered else f"was not recovered: {self.outcome}"
        yield f"{where} froze, and {how}"
        yield f"  when      {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime(self.date))}, for {self.seconds:.3f} s"
        yield f"  freezes   {self.count} in the last hour, {self.limit} are allowed"
        if self.noticed:
            yield f"  noticed   {self.noticed}"
        yield f"  state     {self.before} -> {self.after}" + (f" by a {self.reset} reset" if self.reset else "")
        if self.host:
            yield "  in sysfs  " + ", ".join(f"{name} {text}" for name, text in self.host.items())
        for device in self.devices:
            yield f"why, as {f'{device.address} {device.identity}'.strip()} tells"
            yield from (f"  {reason}" for reason in device.reasons or [_SILENT])
        if self.kernel:
            yield "what the kernel's log says of it"
            yield from (f"  {text}" for text in self.kernel)
        if self.steps:
            yield "what was done"
            yield from (f"{step}".rstrip() for step in self.steps)
        if self.restored:
            yield "what the reset had cleared and was put back"
            yield from (f"  {text}" for text in self.restored)
        for device in self.devices:
            if device.config:
                yield f"configuration space of {device.address} at the freeze"
                yield from (f"  {line}" for line in pci.hex_lines(bytes.fromhex(device.config)))


_SILENT = "no error register of it is set: the PHB stopped it (a DMA outside its windows is told by no device)"


def _reasons(space: pci.ConfigSpace) -> Iterator[str]:
    status = space.status
    named = {
        "master_parity_error": "parity error while it was master",
        "signalled_target_abort": "aborted an access to it",
        "received_target_abort": "an access of its own was aborted",
        "received_master_abort": "an access of its own was answered by nobody",
        "signalled_serr": "signalled a system error",
        "parity_error": "parity error",
    }
    if told := [words for name, words in named.items() if getattr(status, name)]:
        yield f"status {status.value:#06x}: {', '.join(told)}"
    if space.cut:
        yield "only the header could be read: root sees the error registers behind it"
    yield from space.faults
    if (express := space.find(pci.Express)) and express.device_status.value & _ERRORS:
        yield f"PCI Express device status {express.device_status.value:#06x}: {express.device_status}"
    if aer := space.find(pci.AdvancedErrors):
        yield from _aer(aer)


def _aer(aer: pci.AdvancedErrors) -> Iterator[str]:
    if uncorrectable := aer.uncorrectable_status.value:
        fatal = uncorrectable & aer.uncorrectable_severity.value
        kind = "fatal" if fatal else "not fatal"
        first = 1 << aer.control.first_error
        names = [
            f"{bit.name.replace('_', ' ')}{' (the first)' if first == 1 << bit.low else ''}"
            for bit in aer.uncorrectable_status.fields
            if bit.of(uncorrectable)
        ]
        yield f"AER uncorrectable status {uncorrectable:#010x}, {kind}: {', '.join(names)}"
        if any(aer.header_log):
            yield f"  the packet that failed: {' '.join(f'{word:08x}' for word in aer.header_log)}"
    if correctable := aer.correctable_status.value:
        yield f"AER correctable status {correctable:#010x}: {aer.correctable_status}"
