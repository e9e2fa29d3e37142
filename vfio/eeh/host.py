"""Follow EEH of the whole host, opening no device: the state of the PEs in sysfs, and the kernel's log.

Only PEs whose group a process has open are asked for their state: the host says nothing of those, and leaves them to
their owner.  Of all others the kernel's log tells; asking for their state would keep the host from recovering them, as
a PE that is found frozen by that counts as known (pnv_eeh_get_pe_state).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Literal, NamedTuple

from vfio import errors, holders, owner, sysfs
from vfio.backend import Backend
from vfio.closing import Closing
from vfio.eeh import state as states
from vfio.eeh.clock import SYSTEM, Clock
from vfio.eeh.state import PeStatus

POLL = 1.0
_KMSG = "/dev/kmsg"
_RECORD = 8192
"""Bytes: the longest message that there can be."""
_LINES = 100
_PE = re.compile(r"PHB#([0-9a-f]+)-PE#([0-9a-f]+)")
_ADDRESS = re.compile(r"\b([0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])(?:#[0-9a-f]+)?\b")
_EEH = re.compile(
    r"EEH|eeh_|Diag-data \(Version"
    r"|^(brdgCtl|portSts|rootCmplx|RootSts|RootErrSts|PhbSts|UtlSts|nFir|Lem|OutErr|InAErr|InBErr"
    r"|Phb\w*Err|PhbErr|RxeArbErr|RxeMrgErr|RxeTceErr|PblErr|PcieDlp|RegbErr|PE\[ ?[0-9a-f]+\]"
    r"|Please try reseating)"
)


class Event(NamedTuple):
    """Something that the host shows."""

    date: float
    """When it was seen: seconds since the epoch."""
    kind: Literal["state", "log", "note"]
    """A PE changed in sysfs; a line of the kernel's log; or what cannot be followed."""
    address: str | None
    """The device, where it is known."""
    text: str


class KernelLog(Closing):
    """What the kernel's log says of EEH (Documentation/ABI/testing/dev-kmsg), from its oldest message on.

    Raises `errors.CallFailed` where this user may not read it.
    """

    def __init__(self, backend: Backend, names: Mapping[str, str]) -> None:
        """`names` are the PEs' names by the addresses of their devices."""
        self.backend = backend
        self._names = names
        self._about: str | None = None
        self._fd: int | None = None
        try:
            self._fd = backend.open(_KMSG, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise errors.CallFailed(error.errno or errno.EIO, f"cannot read {_KMSG}", "", "root may read it") from error

    def lines(self) -> Iterator[tuple[str | None, str]]:
        """New lines, each with the name of the PE that it is about; one that names none goes on about the last named."""
        for text in self._messages():
            if not _EEH.search(text):
                continue
            if match := _PE.search(text):
                self._about = match[0]
            elif match := _ADDRESS.search(text):
                self._about = self._names.get(match[1], self._about)
            yield self._about, text

    def close(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            self.backend.close(fd)

    def _messages(self) -> Iterator[str]:
        while self._fd is not None:
            try:
                record = self.backend.pread(self._fd, _RECORD, 0)
            except OSError as error:
                if error.errno == errno.EPIPE:  # some were lost
                    continue
                if error.errno == errno.EAGAIN:
                    return
                raise
            yield record.decode("utf-8", "replace").partition(";")[2].partition("\n")[0]


class HostWatch(Closing):
    """What happens to the PEs of the host from now on; to one device's PE with `address`.

    Raises `errors.NoEeh` where no device has a PE.
    """

    def __init__(self, backend: Backend, address: str | None = None, poll: float = POLL, clock: Clock = SYSTEM) -> None:
        self.backend = backend
        self.poll = poll
        self.clock = clock
        self._wanted = address
        members = states.names(backend, address)
        self._groups = {each.address: sysfs.group_of(backend, each.address) for each in members}
        names = {each.address: each.name for each in members}
        self._addresses = {each.name: each.address for each in reversed(members)}
        self._states: dict[str, PeStatus] = {}
        self._notes: list[str] = []
        self._log: KernelLog | None = None
        try:
            self._log = KernelLog(backend, names)
            for _ in self._log.lines():  # what was said before
                pass
        except OSError as error:
            self._notes.append(f"the kernel's log is not followed: {_KMSG}: {error.strerror}; root may read it")
        if owner.me(backend).uid:
            self._notes.append("only root sees which PEs of other users are in use, and follows those")

    def look(self) -> list[Event]:
        """What has happened since the last look."""
        now = self.clock.date()
        found = [Event(now, "note", None, text) for text in self._notes]
        self._notes.clear()
        for name, text in self._log.lines() if self._log else ():
            address = self._addresses.get(name or "")
            if address is not None or self._wanted is None:
                found.append(Event(now, "log", address, text))
        return found + [Event(now, "state", pe.address, text) for pe, text in self._changes()]

    def __iter__(self) -> Iterator[Event]:
        """All that happens, until somebody stops it."""
        while True:
            yield from self.look()
            self.clock.sleep(self.poll)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    def _changes(self) -> Iterator[tuple[PeStatus, str]]:
        """The PEs in use whose files in sysfs are others than before."""
        for address, group in self._groups.items():
            having = holders.having_open(self.backend, sysfs.node_of(self.backend, group)) if group is not None else []
            if not having:
                self._states.pop(address, None)
                continue
            try:
                pe = states.status(self.backend, address)
            except (errors.NoEeh, errors.NoSuchDevice):
                continue
            before = self._states.get(address)
            self._states[address] = pe
            if pe != before and (before is not None or pe.state is not states.State.NORMAL):
                yield pe, f"{pe.name} {pe.state.name}: {pe.words}; held by {', '.join(map(str, having))}"


def said(backend: Backend, address: str) -> list[str]:
    """The last lines of the kernel's log about the PE of a device; none where this user may not read it."""
    try:
        every = states.names(backend)
        with KernelLog(backend, {each.address: each.name for each in every}) as log:
            wanted = next((each.name for each in every if each.address == address), None)
            return [text for name, text in log.lines() if name == wanted][-_LINES:]
    except OSError:
        return []


def held(backend: Backend, pe: PeStatus) -> list[errors.Holder]:
    """The processes that have the group of a device's PE open."""
    with suppress(OSError):
        group = sysfs.group_of(backend, pe.address)
        if group is not None:
            return holders.having_open(backend, sysfs.node_of(backend, group))
    return []
