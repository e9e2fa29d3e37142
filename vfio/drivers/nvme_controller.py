"""An NVMe controller set up and taken down: registers, queues, admin commands, interrupts.

NVM Express Base Specification 1.4, sections 3.1 (registers), 5 (admin commands), 7.3 and 7.6 (reset and initialization).
All memory that the controller is told of, beside the data, is in one buffer that is mapped once.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Literal

from vfio import errors
from vfio.closing import Closing
from vfio.device import BAR0, Device
from vfio.dma import Dma, DmaBuffer, DmaMemory
from vfio.drivers import nvme_protocol as nvm
from vfio.drivers.nvme_protocol import Controller, Namespace
from vfio.drivers.nvme_queue import Command, Pool, QueuePair
from vfio.iommu.spapr import Spapr
from vfio.iommu.spapr_v2 import SpaprTceV2
from vfio.iommu.window import DmaWindow
from vfio.irq import Irq, Vectors

Interrupt = Literal["MSI-X", "MSI", "INTx", "polling"]

CLASS = 0x010802
"""PCI class of NVMe controllers."""
BOUNCE = 128 << 10
"""Bytes of the driver's own memory for data."""
_ADMIN_DEPTH = 8
_LARGEST_TRANSFER = 1 << 20
"""Bytes of one command, where the controller has no lower limit: so much fits into one PRP list."""
_LOOK = 0.5
"""Seconds after which a controller that is waited for is asked whether it still lives."""
_PAUSE = 0.0002
"""Seconds between looks where there is no interrupt."""
_SHUTDOWN = 5.0
"""Seconds that a controller gets to shut down."""


class Stopped(errors.VfioError):
    """The driver issues nothing: a command is overdue, the controller failed, or recovery is under way."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(errno.EIO, what, why, "reset() resets the controller and issues again what was on its way")


class NvmeController(Closing):
    """A controller with one admin and one I/O queue pair, enabled until it is closed; what `nvme.Nvme` does I/O with."""

    def __init__(
        self,
        device: Device,
        *,
        window: DmaWindow | None = None,
        depth: int = 32,
        interrupt: Interrupt | None = None,
        timeout: float = 30.0,
    ) -> None:
        found = device.config.read32(8) >> 8
        if found != CLASS:
            why = f"its class is {found:06x}, and that of an NVMe controller {CLASS:06x}"
            raise errors.CallFailed(errno.ENODEV, f"{device.address} is no NVMe controller", why)
        if depth < 1:
            raise ValueError(f"a queue for {depth} commands: 1 or more are possible")
        self.device = device
        self.timeout = timeout
        self.lock = threading.RLock()
        self._stopped = ""  # why nothing is issued
        self.bar = device.region(BAR0)
        self.capabilities = nvm.Capabilities(self._read(nvm.CAP) | self._read(nvm.CAP + 4, alive=False) << 32)
        self.depth = min(depth, self.capabilities.queue_entries - 1)
        self._wanted = interrupt
        self._fired = 0
        self.vectors: Vectors | None = None
        """The enabled interrupts, of which the last is that of the I/O queue; None where completions are polled for."""
        self._bounced: Command | None = None  # the last command that used the driver's own memory for data
        self._untold: dict[Command, None] = {}  # done, and nobody was told
        # PRP entries are per page of the controller's: the larger its pages, the fewer entries.  The host's page is as
        # good as any, because memory that is mapped at all is contiguous for the device.
        smallest, largest = self.capabilities.smallest_page, self.capabilities.largest_page
        self.page = page = min(max(device.backend.page_size, smallest), largest)
        """Bytes of a memory page of the controller's (CC.MPS)."""
        iommu = device.iommu
        self.window = window or (iommu.windows[0] if isinstance(iommu, Spapr) and iommu.windows else None)
        """Where the controller's memory is mapped; None for an IOMMU without windows."""
        self._undo = ExitStack()
        self._started = self._closed = False
        try:
            pool = self._memory(self._undo)
            stride, lists = self.capabilities.doorbell_stride, _LARGEST_TRANSFER // page * 8
            self._admin = QueuePair(self.bar, pool, 0, _ADMIN_DEPTH, page, stride, 0, vector=0)
            self._io = QueuePair(self.bar, pool, 1, self.depth, page, stride, lists, vector=1)
            self._identity = pool.take(nvm.IDENTIFY_SIZE, page)
            self._bounce = pool.take(BOUNCE, page)
            self._started = True
            self._start()
            self.controller = self._identify_controller()
            self.namespaces: tuple[Namespace, ...] = tuple(map(self._identify_namespace, self._active_namespaces()))
            limit = self.controller.largest_transfer or _LARGEST_TRANSFER
            self.largest_transfer = min(limit, _LARGEST_TRANSFER)
            """Bytes that one command can move."""
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let what is on its way end, shut the controller down, and unmap.  Never raises for a device that is gone."""
        if self._closed:
            return
        self._closed = True
        with self._undo:
            try:
                if self._started:
                    self._shut_down()
            except OSError:
                pass  # it is frozen, gone or hung, or its file was closed first: what is left is to stop its DMA
            finally:
                with contextlib.suppress(OSError):
                    self.device.enable_bus_master(False)
                self._disarm()
                if self._started:
                    self._io.give_up()

    def _check_open(self) -> None:
        if self._closed:
            raise errors.Closed(f"driver of {self.device.address}")

    # --- the controller (sections 3.1, 7.3, 7.6) ---

    def _start(self) -> None:
        """From whatever state it is in to enabled, with its I/O queues."""
        self._disable()
        self.device.enable_bus_master()  # not before: whoever had it last may have left it with queues
        self._admin.reset()
        self._io.reset()
        self._disarm()
        vectors = self._arm()
        size = self._admin.entries - 1
        self._write(nvm.AQA, size << 16 | size)
        self._write64(nvm.ASQ, self._admin.submission.iova)
        self._write64(nvm.ACQ, self._admin.completion.iova)
        shift = self.page.bit_length() - 1 - 12
        self._write(nvm.CC, nvm.CC_ENTRY_SIZES | shift << 7 | nvm.CC_ENABLE)
        self._wait_status(nvm.CSTS_READY, nvm.CSTS_READY, self.capabilities.timeout, "becoming ready")
        self.admin("asking for one I/O queue pair", nvm.SET_FEATURES, dwords=(nvm.NUMBER_OF_QUEUES, 0))
        pair, last = self._io, self._io.entries - 1
        pair.vector = vectors - 1
        contiguous, interrupts = 1, 2
        place = (pair.number | last << 16, pair.vector << 16 | (interrupts if self.vectors else 0) | contiguous)
        self.admin("creating the completion queue", nvm.CREATE_COMPLETION, pair.completion.iova, dwords=place)
        place = (pair.number | last << 16, pair.number << 16 | contiguous)
        self.admin("creating the submission queue", nvm.CREATE_SUBMISSION, pair.submission.iova, dwords=place)

    def _disable(self) -> None:
        """Reset the controller, if it is enabled: it forgets its queues, and does no DMA."""
        settings = self._read(nvm.CC)
        if settings & nvm.CC_ENABLE:
            self._write(nvm.CC, settings & ~(nvm.CC_ENABLE | nvm.CC_SHUTDOWN_MASK))
        self._wait_status(nvm.CSTS_READY, 0, self.capabilities.timeout, "being reset")

    def _shut_down(self) -> None:
        """In good order where it still answers; else as a reset does it."""
        if not self._stopped:
            self._settle(self._io, list(self._io.pending.values()), None)
            self.admin("deleting the submission queue", nvm.DELETE_SUBMISSION, dwords=(self._io.number,))
            self.admin("deleting the completion queue", nvm.DELETE_COMPLETION, dwords=(self._io.number,))
            self._write(nvm.CC, self._read(nvm.CC) & ~nvm.CC_SHUTDOWN_MASK | nvm.CC_SHUTDOWN)
            self._wait_status(nvm.CSTS_SHUTDOWN_MASK, nvm.CSTS_SHUTDOWN_DONE, _SHUTDOWN, "shutting down")
        self._disable()

    def _wait_status(self, mask: int, wanted: int, timeout: float, what: str) -> None:
        """Wait for bits of CSTS."""
        end = time.monotonic() + timeout
        while (status := self._read(nvm.CSTS)) & mask != wanted:
            if status & nvm.CSTS_FATAL and wanted:
                raise self._stop(self._failed(status))
            if time.monotonic() > end:
                raise self._stop(errors.TimedOut(f"{what}: controller {self.device.address}", timeout))
            time.sleep(0.001)

    def _identify_controller(self) -> Controller:
        data = self._identify("identify controller", nvm.IDENTIFY_CONTROLLER)
        return nvm.controller(data, self._read(nvm.VS), self.capabilities.smallest_page)

    def _active_namespaces(self) -> Sequence[int]:
        if self.controller.version < (1, 1, 0):
            return range(1, self.controller.namespaces + 1)
        data = self._identify("identify active namespaces", nvm.IDENTIFY_ACTIVE_NAMESPACES)
        numbers = (int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4))
        return [number for number in numbers if number]

    def _identify_namespace(self, number: int) -> Namespace:
        what = f"identify namespace {number}"
        return nvm.namespace(number, self._identify(what, nvm.IDENTIFY_NAMESPACE, number))

    def _identify(self, what: str, which: int, namespace: int = 0) -> bytes:
        self.admin(what, nvm.IDENTIFY, self._identity.iova, namespace, dwords=(which,))
        return bytes(self._identity.view)

    def admin(self, what: str, opcode: int, iova: int = 0, namespace: int = 0, dwords: tuple[int, ...] = ()) -> int:
        """An admin command, from beginning to end, with data in one page at `iova`; its result.

        Raises `CommandFailed`, `errors.TimedOut`, `errors.DeviceFrozen`, `Stopped`.
        """
        command = Command(f"{what} of {self.device.address}", opcode, namespace, iova, 0, dwords)
        with self.lock:
            self._admin.issue(command)
        self._settle(self._admin, [command], None)
        command.check()
        return command.result

    # --- waiting ---

    def _settle(self, queue: QueuePair, commands: Sequence[Command], timeout: float | None) -> None:
        """Wait until all are done, however they ended."""
        seconds = self.timeout if timeout is None else timeout
        end = time.monotonic() + seconds
        while True:
            with self.lock:
                self._take(queue)
            left = next((command for command in commands if not command.done), None)
            if left is None:
                return
            self._look()
            remaining = end - time.monotonic()
            if remaining <= 0:
                raise self._stop(errors.TimedOut(left.text, seconds))
            self._sleep(queue, remaining)

    def _take(self, queue: QueuePair, *, tell: bool = True) -> None:
        """Take completions; the lock is held."""
        for command in queue.take(tell=tell):
            if queue is self._io:
                self._untold[command] = None

    def _sleep(self, queue: QueuePair, seconds: float) -> None:
        """Until an interrupt says that there may be completions, but not long."""
        vectors = self.vectors
        if vectors is None:
            time.sleep(min(seconds, _PAUSE))
            return
        with contextlib.suppress(errors.TimedOut, errors.Closed, errors.NoInterrupt):  # a recovery makes new ones
            if vectors.irq is self.device.intx:
                vectors.irq.unmask()  # the kernel masked it when it fired; with completions to take it fires at once
            fired = vectors[queue.vector].wait(min(seconds, _LOOK))
            self._fired += fired if queue.vector == self._io.vector else 0

    # --- interrupts ---

    def _arm(self) -> int:
        """Enable interrupts; how many vectors there are to choose from (1 where there are none)."""
        kinds: dict[Interrupt, tuple[Callable[[], Irq], int]] = {
            "MSI-X": (lambda: self.device.msix, 2),
            "MSI": (lambda: self.device.msi, 1),
            "INTx": (lambda: self.device.intx, 1),
        }
        wanted = (self._wanted,) if self._wanted else tuple(kinds)
        for kind in wanted:
            if kind == "polling":
                break
            find, most = kinds[kind]
            try:
                irq = find()
                self.vectors = irq.enable(max(1, min(most, irq.count)))
            except errors.NoInterrupt:
                if self._wanted:
                    raise
                continue
            return len(self.vectors)
        return 1

    def _disarm(self) -> None:
        vectors, self.vectors = self.vectors, None
        if vectors is not None:
            with contextlib.suppress(OSError):  # the kernel disables what a device that is gone had
                vectors.close()

    @property
    def interrupt(self) -> str:
        """How completions are noticed: MSI-X, MSI, INTx or polling."""
        return self.vectors.irq.name if self.vectors else "polling"

    @property
    def interrupts(self) -> int:
        """How often the interrupt of the I/O queue has fired."""
        if self.vectors is not None:
            self._fired += self.vectors[self._io.vector].take()
        return self._fired

    # --- registers ---

    def _read(self, offset: int, *, alive: bool = True) -> int:
        value = self.bar.read32(offset)
        if alive and value == nvm.ALL_ONES:
            raise self._stop(errors.DeviceFrozen(self.device.address))
        return value

    def _write(self, offset: int, value: int) -> None:
        self.bar.doorbell32(offset, value)  # behind the stores to the queues that it is about

    def _write64(self, offset: int, value: int) -> None:
        """Two writes: not every controller takes one of 64 bits."""
        self._write(offset, value & 0xFFFF_FFFF)
        self._write(offset + 4, value >> 32)

    def _look(self) -> None:
        """Raise where the controller is frozen, has failed, or is no longer enabled."""
        with self.lock:  # not in the middle of a recovery by another thread
            status = self._read(nvm.CSTS)
            if status & nvm.CSTS_FATAL or not status & nvm.CSTS_READY:
                raise self._stop(self._failed(status))

    def _failed(self, status: int) -> Stopped:
        reason = "reports a fatal error" if status & nvm.CSTS_FATAL else "is not ready: something has reset it"
        return Stopped(f"controller {self.device.address}", f"it {reason} (status {status:#x})")

    def _stop(self, error: errors.VfioError) -> errors.VfioError:
        self._stopped = self._stopped or error.why
        return error

    # --- memory ---

    def _memory(self, undo: ExitStack) -> Pool:
        """All memory of the controller's, in one mapped buffer."""
        host = self.device.backend.page_size
        large = self.window.page_size if self.window and self.window.page_size > host else None
        sizes = [
            *(
                depth * entry
                for depth in (_ADMIN_DEPTH + 1, self.depth + 1)
                for entry in (nvm.SUBMISSION, nvm.COMPLETION)
            ),
            self.depth * (_LARGEST_TRANSFER // self.page * 8),
            nvm.IDENTIFY_SIZE,
            BOUNCE,
        ]
        length = sum(-(-size // self.page) * self.page for size in sizes) + self.page
        buffer = undo.enter_context(DmaBuffer(length, large, self.device.backend))
        return undo.enter_context(Pool(undo.enter_context(self.map(buffer))))

    def map(self, memory: DmaMemory) -> Dma:
        """Map memory for data in the driver's window; raises what `DmaWindow.map` raises.

        Before it is unmapped, what moves data in it has to be done: `drain`.
        """
        iommu = self.device.iommu
        if self.window is None or not isinstance(iommu, SpaprTceV2):
            return iommu.map(memory)
        registration = iommu.register(memory)
        try:
            dma = self.window.map(memory)
        except BaseException:
            registration.close()
            raise
        dma.on_unmapped(registration.close)
        return dma
