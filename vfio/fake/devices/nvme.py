"""QEMU's NVMe controller: registers, queues, interrupts.  What the commands do is in `nvme_commands`.

NVM Express Base Specification 1.4, sections 3 and 4; where that leaves a choice, and for what it says of itself, QEMU
7.2's nvme is what was compared.  Commands are done when their doorbell is rung.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from vfio.fake import registers as reg
from vfio.fake.devices import nvme_commands as commands
from vfio.fake.devices.model import PciModel
from vfio.fake.devices.nvme_disk import Disk, FileDisk, SparseDisk

if TYPE_CHECKING:
    from vfio import topology

_CAPABILITIES, _VERSION = 0x0040_1820_0F01_07FF, 0x0001_0400
_LARGEST_PAGE_SHIFT, _COMMAND_SETS = 16, (0, 6, 7)
_INTMS, _INTMC, _CC, _AQA, _ASQ, _ACQ, _DOORBELLS = 0x0C, 0x10, 0x14, 0x24, 0x28, 0x30, 0x1000
_ENABLE, _SHUTDOWN = 1, 3 << 14
_READY, _FATAL, _SHUTDOWN_STATUS, _SHUTDOWN_COMPLETE = 1, 2, 3 << 2, 2 << 2
_ENTRY, _COMPLETION = 64, 16
_REGISTERS = struct.Struct("<Q8IQQ")
_DISK = 1 << 30
"""Bytes of a disk whose topology names no size."""


class Completions:
    """A completion queue."""

    def __init__(self, address: int, size: int, vector: int, interrupts: bool) -> None:
        self.address, self.size, self.vector, self.interrupts = address, size, vector, interrupts
        self.head = self.tail = 0
        self.phase = 1
        self.waiting: list[tuple[Submissions, int, int, int]] = []
        """What is done and found no room: queue, command identifier, status, result."""

    @property
    def full(self) -> bool:
        return (self.tail + 1) % self.size == self.head


class Submissions:
    """A submission queue; its completions go to the queue `completions`."""

    def __init__(self, number: int, address: int, size: int, completions: int) -> None:
        self.number, self.address, self.size, self.completions = number, address, size, completions
        self.head = self.tail = 0
        self.busy = 0
        """Commands fetched whose completion is not written yet; there can be `size` of them."""


class Nvme(PciModel):
    """The controller: 65 vectors, INTx, function level reset, power management that keeps its state in D3hot.

    Its disk is the topology's `drive`, in bytes.  Properties: ``serial``; ``logical_block_size`` (512 bytes where none is
    said); ``file``, a file of the host's that is the disk; ``namespaces``, sizes in bytes of further ones, with commas.
    """

    config_size = reg.EXPRESS_SIZE
    revision = 2
    interrupt_pin = 1
    queues = 64
    """I/O queues of each kind, numbered from 1 on."""
    queue_entries = 0x800
    """Most entries of one."""

    def __init__(self, device: topology.Device) -> None:
        super().__init__(device)
        self.add_bar(0, 0x4000, bits64=True)
        self.registers.add_pm(0x60, capabilities=0x0003, control=reg.PM_NO_SOFT_RESET)
        self.registers.add_express(0x80, flr=True)
        self.registers.add_msix(0x40, vectors=65, bar=0, table=0x2000, pba=0x3000)
        self.serial = str(self.properties.get("serial", ""))
        self.block_size = int(str(self.properties.get("logical_block_size", "512")), 0)
        self.disks: dict[int, Disk] = {1: self._first_disk(device.drive or _DISK)}
        """By namespace.  A reset leaves them alone."""
        for size in filter(None, str(self.properties.get("namespaces", "")).split(",")):
            self.disks[len(self.disks) + 1] = SparseDisk(int(size, 0))
        self.features: dict[int, int] = {}
        """Those that the host has set; a reset does not change them, as it does not on QEMU."""
        self._admin_sizes = self._admin_submissions = self._admin_completions = 0
        self.reset()

    def _first_disk(self, size: int) -> Disk:
        path = self.properties.get("file")
        return FileDisk(str(path), size) if path else SparseDisk(size)

    def reset(self) -> None:
        """What disabling it does too: queues are gone, and nothing is interrupted for any more."""
        self.submissions: dict[int, Submissions] = {}
        self.completions: dict[int, Completions] = {}
        self.page_size = 0
        self.events_wanted = 0
        """Asynchronous event requests that are held."""
        self.configuration = self._status = self._masked_vectors = self._raised = 0

    # --- registers ---

    def bar_read(self, bar: int, offset: int, width: int) -> int:
        if bar:  # a topology may give it others
            return 0
        masked = self._masked_vectors
        status = (_CAPABILITIES, _VERSION, masked, masked, self.configuration, 0, self._status, 0)
        whole = _REGISTERS.pack(*status, self._admin_sizes, self._admin_submissions, self._admin_completions)
        return int.from_bytes(whole[offset : offset + width], "little")

    def bar_write(self, bar: int, offset: int, width: int, value: int) -> None:
        if bar:
            return
        low = value & 0xFFFF_FFFF
        if offset >= _DOORBELLS:
            self._doorbell(offset - _DOORBELLS, value & 0xFFFF)
        elif offset == _INTMS:
            self._masked_vectors |= low
            self._update_line()
        elif offset == _INTMC:
            self._masked_vectors &= ~low
            self._update_line()
        elif offset == _CC:
            self._configure(low)
        elif offset == _AQA:
            self._admin_sizes = low
        elif offset in (_ASQ, _ASQ + 4):
            self._admin_submissions = _stored(self._admin_submissions, offset - _ASQ, width, value)
        elif offset in (_ACQ, _ACQ + 4):
            self._admin_completions = _stored(self._admin_completions, offset - _ACQ, width, value)

    def _configure(self, value: int) -> None:
        """A store to CC: shut down, start, or reset the controller."""
        before, self.configuration = self.configuration, value
        if value & _SHUTDOWN and not before & _SHUTDOWN:
            for disk in self.disks.values():
                disk.flush()
            self._status = self._status & ~_SHUTDOWN_STATUS | _SHUTDOWN_COMPLETE
        elif before & _SHUTDOWN and not value & _SHUTDOWN:
            self._status &= ~_SHUTDOWN_STATUS
        if value & _ENABLE and not before & _ENABLE:
            self._status = _READY if self._start() else _FATAL
        elif before & _ENABLE and not value & _ENABLE:
            self.reset()
            self._update_line()

    def _start(self) -> bool:
        """Make the admin queues; False where what the host has set up cannot be."""
        shift = 12 + (self.configuration >> 7 & 0xF)
        page = 1 << shift
        submission_size, completion_size = self._admin_sizes & 0xFFF, self._admin_sizes >> 16 & 0xFFF
        entry_sizes = (self.configuration >> 16 & 0xF, self.configuration >> 20 & 0xF)
        if (
            (self._admin_submissions | self._admin_completions) & (page - 1)
            or (self.configuration >> 4 & 7) not in _COMMAND_SETS
            or shift > _LARGEST_PAGE_SHIFT
            or entry_sizes != (6, 4)
            or not submission_size
            or not completion_size
        ):
            return False
        self.page_size = page
        self.completions[0] = Completions(self._admin_completions, completion_size + 1, 0, True)
        self.submissions[0] = Submissions(0, self._admin_submissions, submission_size + 1, 0)
        return True

    @property
    def admin_only(self) -> bool:
        """The host has chosen a command set without I/O."""
        return self.configuration >> 4 & 7 == 7

    # --- queues ---

    def create_submissions(self, number: int, address: int, size: int, completions: int) -> None:
        """`size` entries at `address`, whose completions go to the queue of that number."""
        self.submissions[number] = Submissions(number, address, size, completions)

    def create_completions(self, number: int, address: int, size: int, vector: int, interrupts: bool) -> None:
        self.completions[number] = Completions(address, size, vector, interrupts)

    def delete_completions(self, number: int) -> None:
        del self.completions[number]
        self._let_line_go()

    def _doorbell(self, offset: int, value: int) -> None:
        """A new tail or head, of the queue at `offset` bytes behind the first doorbell; nonsense is ignored."""
        number, is_head = offset >> 3, offset & 4
        if offset & 3:
            return
        if is_head:
            completions = self.completions.get(number)
            if completions and value < completions.size:
                self._take_head(completions, value)
        else:
            submissions = self.submissions.get(number)
            if submissions and value < submissions.size:
                submissions.tail = value
                self._process(submissions)

    def _take_head(self, queue: Completions, head: int) -> None:
        was_full, queue.head = queue.full, head
        if queue.head == queue.tail:
            self._let_line_go()
        if was_full:
            self._post(queue)
            for submissions in list(self.submissions.values()):
                if self.completions.get(submissions.completions) is queue:
                    self._process(submissions)

    def _process(self, queue: Submissions) -> None:
        completions = self.completions[queue.completions]
        while queue.head != queue.tail and queue.busy < queue.size and not self._status & _FATAL:
            try:
                entry = self.fetch(queue.address + queue.head * _ENTRY, _ENTRY)
            except commands.TransferFailed:
                self._status = _FATAL
                return
            queue.head = (queue.head + 1) % queue.size
            queue.busy += 1
            command = commands.Command(entry)
            done = commands.admin(self, command) if queue.number == 0 else commands.io(self, command)
            if done is not None:
                completions.waiting.append((queue, command.cid, *done))
        self._post(completions)

    def _post(self, queue: Completions) -> None:
        """Write completions while there is room, and interrupt."""
        while queue.waiting and not queue.full:
            submissions, cid, status, result = queue.waiting[0]
            place = queue.address + queue.tail * _COMPLETION
            state = status << 1 | queue.phase
            try:
                self.deliver(place, struct.pack("<IIHHHH", result, 0, submissions.head, submissions.number, cid, state))
            except commands.TransferFailed:
                self._status = _FATAL
                return
            queue.waiting.pop(0)
            submissions.busy -= 1
            queue.tail += 1
            if queue.tail == queue.size:
                queue.tail, queue.phase = 0, queue.phase ^ 1
        if queue.tail != queue.head and queue.interrupts:
            if self.msix_enabled:
                self.raise_msi(queue.vector)
            else:
                self._raised |= 1 << queue.vector
                self._update_line()

    def _let_line_go(self) -> None:
        """INTx falls when no queue that interrupts has completions that the host has not taken."""
        if not any(queue.interrupts and queue.head != queue.tail for queue in self.completions.values()):
            self._raised = 0
            self._update_line()

    def _update_line(self) -> None:
        if not self.msix_enabled:
            self.raise_intx(bool(self._raised & ~self._masked_vectors))

    # --- memory ---

    def fetch(self, address: int, length: int) -> bytes:
        """Read memory; raises `commands.TransferFailed` where that is not to be had."""
        before = self._reach()
        data = self.dma_read(address, length)
        if self._reach() != before or not before[0]:
            raise commands.TransferFailed
        return data

    def deliver(self, address: int, data: bytes) -> None:
        """Write memory, as `fetch`."""
        before = self._reach()
        self.dma_write(address, data)
        if self._reach() != before or not before[0]:
            raise commands.TransferFailed

    def _reach(self) -> tuple[bool, int, object]:
        """Whether it may reach memory; and the faults of its PE so far, which tell whether it did."""
        pe = self.pci.pe
        if pe is None or pe.freeze in ("dma", "both") or not self.registers.get(reg.COMMAND, 2) & reg.COMMAND_MASTER:
            return False, 0, None
        return True, len(pe.dma_faults), pe.dma_faults[-1] if pe.dma_faults else None


def _stored(value: int, at: int, width: int, data: int) -> int:
    """A 64-bit register after a store of `width` bytes at byte `at` of it."""
    width = min(max(width, 2), 8) if at == 0 else 4  # no narrower stores reach it, and its high half is one word
    mask = (1 << 8 * width) - 1 << 8 * at
    return (value & ~mask | data << 8 * at & mask) & (1 << 64) - 1
