"""The DMA engine of an edu, by pread and pwrite of its registers alone: it shows where an IOVA leads."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

from simtests.conformance.raw import Member, Program

if TYPE_CHECKING:
    from simtests.conformance.raw import Container

_CONFIG, _COMMAND, _MASTER = 7 << 40, 4, 4  # BAR 0 is region 0 at offset 0, configuration space region 7
_ID, _SOURCE, _DESTINATION, _COUNT, _DMA = 0x00, 0x80, 0x88, 0x90, 0x98
_RUN, _TO_MEMORY = 1, 2
_BUFFER = 0x40000


class Engine:
    """Bus master is on from here on."""

    def __init__(self, container: Container, member: Member) -> None:
        self._program: Program = container.program
        self.fd = container.group.device(member.address)
        assert self.fd >= 0
        self.master(True)
        first = self._program.backend.pread(self.fd, 4, _ID)
        self._order: Literal["little", "big"] = "little" if first[:2] == b"\xed\x00" else "big"

    def master(self, on: bool) -> None:
        backend = self._program.backend
        command = int.from_bytes(backend.pread(self.fd, 2, _CONFIG + _COMMAND), "little")
        command = command | _MASTER if on else command & ~_MASTER
        backend.pwrite(self.fd, command.to_bytes(2, "little"), _CONFIG + _COMMAND)

    def load(self, iova: int, length: int = 16) -> None:
        """Read memory into the device."""
        self._transfer(iova, _BUFFER, length, _RUN)

    def store(self, iova: int, length: int = 16) -> None:
        """Write to memory from the device."""
        self._transfer(_BUFFER, iova, length, _RUN | _TO_MEMORY)

    def _transfer(self, source: int, destination: int, length: int, command: int) -> None:
        for register, value in ((_SOURCE, source), (_DESTINATION, destination), (_COUNT, length), (_DMA, command)):
            self._program.backend.pwrite(self.fd, value.to_bytes(8, self._order), register)
        while int.from_bytes(self._program.backend.pread(self.fd, 8, _DMA), self._order) & _RUN:
            time.sleep(0.002)
