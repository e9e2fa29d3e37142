"""The two rings through which an NVMe controller is told what to do and tells what it has done.

NVM Express Base Specification 1.4, section 4.1.  Entries are written by one side and read by the other, in memory that
both reach; a doorbell, a register of the device, says how far.
"""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

from vfio.closing import Closing
from vfio.dma import Dma
from vfio.drivers import nvme_protocol as nvm
from vfio.region import Region


class Piece(NamedTuple):
    """Memory that the device reaches at `iova`, and this process by `view`."""

    iova: int
    view: memoryview


class Pool(Closing):
    """Hands out pieces of one mapped buffer.  Closing it ends their views; the buffer stays."""

    def __init__(self, dma: Dma) -> None:
        self._dma = dma
        self._used = 0
        self._pieces: list[Piece] = []

    def take(self, length: int, alignment: int) -> Piece:
        """`length` bytes, whose IOVA is a multiple of `alignment` (a power of two)."""
        start = self._used + -(self._dma.iova + self._used) % alignment
        self._used = start + length
        assert self._used <= self._dma.length
        self._pieces.append(Piece(self._dma.iova + start, self._dma.view[start : self._used]))
        return self._pieces[-1]

    def close(self) -> None:
        for piece in self._pieces:
            piece.view.release()


class Command:
    """A command and what became of it.  `status` is None until the controller has completed it, and 0 if it succeeded."""

    __slots__ = ("begun", "cid", "dwords", "ended", "iova", "length", "namespace", "opcode", "result", "status", "text")

    def __init__(
        self, text: str, opcode: int, namespace: int = 0, iova: int = 0, length: int = 0, dwords: tuple[int, ...] = ()
    ) -> None:
        self.text = text
        self.opcode = opcode
        self.namespace = namespace
        self.iova = iova
        self.length = length
        self.dwords = dwords
        self.cid: int | None = None
        self.status: int | None = None
        self.result = 0
        self.begun = self.ended = 0.0
        """When it was first issued, and when its completion was taken; seconds of the monotonic clock."""

    @property
    def done(self) -> bool:
        return self.status is not None

    def check(self) -> None:
        """Raise `CommandFailed` if the controller did not succeed."""
        if self.status:
            raise nvm.CommandFailed(self.text, self.status)

    def __repr__(self) -> str:
        state = "on its way" if self.status is None else nvm.status_text(self.status)
        return f"<Command {self.text}: {state}>"


class QueuePair:
    """Submission queue `number` and the completion queue of the same number, with up to `depth` commands on their way."""

    def __init__(
        self, bar: Region, pool: Pool, number: int, depth: int, page: int, stride: int, list_size: int, vector: int
    ) -> None:
        self.number = number
        self.depth = depth
        self.entries = depth + 1  # a ring is full while one entry is still free
        self.vector = vector
        self.submission = pool.take(self.entries * nvm.SUBMISSION, page)
        self.completion = pool.take(self.entries * nvm.COMPLETION, page)
        self.pending: dict[int, Command] = {}
        """Commands on their way by their identifier, in the order in which they were issued."""
        self._bar = bar
        self._page = page
        # A list of a power of two bytes, aligned to that, never crosses a page.
        self._lists = [pool.take(list_size, list_size) for _ in range(depth if list_size else 0)]
        self._tail_doorbell = nvm.DOORBELLS + 2 * number * stride
        self._head_doorbell = self._tail_doorbell + stride
        self.reset()

    def reset(self) -> None:
        """As after the controller was enabled: both rings empty.  What is pending stays so, to be issued again."""
        self.submission.view[:] = bytes(len(self.submission.view))
        self.completion.view[:] = bytes(len(self.completion.view))
        self._tail = self._head = 0
        self._phase = 1
        self._free = [cid for cid in range(self.depth) if cid not in self.pending]

    @property
    def full(self) -> bool:
        return not self._free

    def issue(self, command: Command) -> None:
        """Put a command into the ring and tell the controller; there has to be room."""
        command.begun = time.perf_counter()
        command.cid = self._free.pop()
        self.pending[command.cid] = command
        self.issue_again(command)

    def issue_again(self, command: Command) -> None:
        """The same for one that is pending already."""
        assert command.cid is not None
        pages = nvm.prps(command.iova, command.length, self._page)
        second = pages[1] if len(pages) == 2 else 0
        if len(pages) > 2:
            table = self._lists[command.cid]
            table.view[: 8 * (len(pages) - 1)] = b"".join(page.to_bytes(8, "little") for page in pages[1:])
            second = table.iova
        entry = nvm.entry(command.opcode, command.cid, command.namespace, pages[0], second, command.dwords)
        start = self._tail * nvm.SUBMISSION
        self.submission.view[start : start + nvm.SUBMISSION] = entry
        self._tail = (self._tail + 1) % self.entries
        # The doorbell's barrier lets the controller see the entry, the list and the data before the new tail.
        self._bar.doorbell32(self._tail_doorbell, self._tail)

    def take(self, *, tell: bool = True) -> list[Command]:
        """The commands that the controller has completed since; with `tell` it learns that there is room again."""
        arrived = 0
        head, phase = self._head, self._phase
        while self.completion.view[head * nvm.COMPLETION + 14] & 1 == phase and arrived < self.depth:
            arrived += 1
            head = (head + 1) % self.entries
            if head == 0:
                phase ^= 1
        if not arrived:
            return []
        _order_loads()
        now = time.perf_counter()
        taken = []
        for n in range(arrived):
            start = (self._head + n) % self.entries * nvm.COMPLETION
            found = nvm.completion(self.completion.view[start : start + nvm.COMPLETION])
            command = self.pending.pop(found.cid, None)
            if command is not None:
                self._free.append(found.cid)
                command.result, command.status, command.ended = found.result, found.status, now
                taken.append(command)
        self._head, self._phase = head, phase
        if tell:
            self._bar.doorbell32(self._head_doorbell, head)
        return taken

    def give_up(self) -> None:
        """What is pending ends as aborted: nobody will complete it."""
        for command in self.pending.values():
            command.status = nvm.ABORTED
        self.pending.clear()


_fence = threading.Lock()


def _order_loads() -> None:
    """What is loaded from memory after this is as new as what was loaded and compared before it.

    POWER may load the rest of a completion, or the data that it is about, before the phase bit that says that they are
    there.  Taking a lock ends with the barrier (``isync`` after a branch) that forbids it.
    """
    with _fence:
        pass
