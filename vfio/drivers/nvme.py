"""An NVMe disk: read, write, flush, many commands at a time, and recovery from a freeze.

    with vfio.open_device("0002:01:00.0") as device, Nvme(device) as disk:
        print(disk.controller.model, disk.namespaces[0].size)
        disk.write(0, bytes(4096))
        disk.flush()

NVM Express Base Specification 1.4.  `nvme_controller` sets the controller up, `nvme_queue` has its rings, `nvme_protocol`
the numbers and layouts.
"""

from __future__ import annotations

import contextlib
import errno
import time

from vfio import errors
from vfio.device import Device
from vfio.dma import Dma
from vfio.drivers import nvme_protocol as nvm
from vfio.drivers.nvme_controller import BOUNCE, CLASS, Interrupt, NvmeController, Stopped
from vfio.drivers.nvme_protocol import CommandFailed, Controller, Namespace
from vfio.drivers.nvme_queue import Command

__all__ = [
    "CLASS",
    "Command",
    "CommandFailed",
    "Controller",
    "Interrupt",
    "Namespace",
    "Nvme",
    "Stopped",
]

_ALIGNMENT = 4
"""Bytes, of where data is: a PRP entry has no bits below."""


class Nvme(NvmeController):
    """An NVMe controller, enabled and ready for I/O until it is closed.

    `window` is the DMA window for the queues and for the data of `read` and `write` (default: the first of the device's
    container); `depth` how many I/O commands can be on their way at a time; `interrupt` how completions are noticed
    (default: the first of MSI-X, MSI, INTx that the device and the host have, else polling); `timeout` the seconds
    that a command may take.

    Addresses on the disk are in logical blocks (`Namespace.block_size` bytes, commonly 512 or 4096) from LBA 0 on.  A
    namespace is named by its number; without one the first is meant.

    `read`, `write` and `flush` wait, and are for one thread.  `start_read` and its like return a `Command` to `wait` for,
    with data in memory of the caller's.  Raises `CommandFailed` with the controller's status, `errors.TimedOut`,
    `errors.DeviceFrozen`, and `Stopped` after one of the last two until it was reset.

    Recovery from an EEH freeze, by `vfio.eeh.recover`, calls `on_error`, `on_reset` and `on_resume`: commands that were
    on their way are issued again, so that a write that this driver has accepted happens, and one that was completed
    stays (a controller keeps its volatile write cache in a reset; only `flush` makes it survive a loss of power).
    """

    # --- data ---

    def read(self, lba: int, blocks: int, namespace: int | None = None) -> bytes:
        """The bytes of `blocks` blocks from `lba` on.  Raises ValueError for blocks that the namespace does not have."""
        space = self._checked(namespace, lba, blocks)
        found = []
        for at, count in self._steps(space, lba, blocks):
            command = self._bounce_command(nvm.READ, space, at, count)
            self.wait(command)
            found.append(bytes(self._bounce.view[: command.length]))
        return b"".join(found)

    def write(self, lba: int, data: bytes | bytearray | memoryview, namespace: int | None = None) -> None:
        """Write `data`, whole blocks, from `lba` on; as `read`.  It may be volatile until `flush`."""
        space = self.namespace(namespace)
        view = memoryview(data).cast("B")
        blocks, rest = divmod(len(view), space.block_size)
        if rest:
            raise ValueError(f"{len(view)} bytes are no whole blocks: namespace {space.number} has {space.block_size}")
        self._checked(namespace, lba, blocks)
        for at, count in self._steps(space, lba, blocks):
            start = (at - lba) * space.block_size
            self._free_bounce()
            self._bounce.view[: count * space.block_size] = view[start : start + count * space.block_size]
            self.wait(self._bounce_command(nvm.WRITE, space, at, count))

    def flush(self, namespace: int | None = None) -> None:
        """Make what was written survive a loss of power."""
        self.wait(self.start_flush(namespace))

    def start_read(self, lba: int, blocks: int, dma: Dma, offset: int = 0, namespace: int | None = None) -> Command:
        """Begin to read `blocks` blocks from `lba` on into `dma`, `offset` bytes (a multiple of 4) behind its begin.

        `dma` is mapped memory of the device's container, and stays mapped and untouched until the command is done.
        Raises ValueError for blocks that the namespace does not have, for more than `largest_transfer` and for memory
        that is too short or misaligned, and `errors.Busy` while `depth` commands are on their way.
        """
        return self._start_transfer(nvm.READ, lba, blocks, dma, offset, namespace)

    def start_write(self, lba: int, blocks: int, dma: Dma, offset: int = 0, namespace: int | None = None) -> Command:
        """Begin to write `blocks` blocks from `lba` on out of `dma`; as `start_read`."""
        return self._start_transfer(nvm.WRITE, lba, blocks, dma, offset, namespace)

    def start(self, command: Command) -> Command:
        """Issue an I/O command of your own making, in which nothing is checked; its data is one stretch of IOVA.

        Raises `Stopped`, and `errors.Busy` (EAGAIN) while `depth` commands are on their way.
        """
        with self.lock:
            self._check_open()
            if self._stopped:
                raise Stopped(command.text, self._stopped)
            if self._io.full:
                raise errors.Busy(
                    command.text, [], f"{self.depth} commands are on their way: wait for one", errno.EAGAIN
                )
            self._io.issue(command)
        return command

    def start_flush(self, namespace: int | None = None) -> Command:
        """Begin to flush."""
        space = self.namespace(namespace)
        return self.start(Command(f"flush of namespace {space.number}", nvm.FLUSH, space.number))

    def drain(self) -> None:
        """Wait until nothing is on its way, however it ends, so that memory for data can be unmapped.

        What a controller does not end, because it is frozen or hung, is given up: it may do no more DMA, and no recovery
        issues that again.
        """
        if self._closed:
            return
        try:
            self._settle(self._io, self.lost, None)
        except OSError:
            with contextlib.suppress(OSError):
                self.device.enable_bus_master(False)
            with self.lock:
                self._io.give_up()

    def poll(self, timeout: float = 0.0) -> list[Command]:
        """The I/O commands that are done and that no `poll` or `wait` has told of; waits up to `timeout` seconds for one.

        Raises `errors.DeviceFrozen` and `Stopped` where nothing is done and nothing can be.
        """
        end = time.monotonic() + timeout
        while True:
            with self.lock:
                self._check_open()
                self._take(self._io)
                found, self._untold = list(self._untold), {}
            if found:
                return found
            self._look()
            left = end - time.monotonic()
            if left <= 0:
                return found
            self._sleep(self._io, left)

    def wait(self, *commands: Command, timeout: float | None = None) -> None:
        """Wait until all of `commands` are done.

        Raises `CommandFailed` for the first that failed, `errors.TimedOut` after `timeout` seconds (default: the
        driver's), `errors.DeviceFrozen`, `Stopped`; commands that are not done then stay on their way.
        """
        if not all(command.done for command in commands):
            self._check_open()
            self._settle(self._io, commands, timeout)
        for command in commands:
            self._untold.pop(command, None)
        for command in commands:
            command.check()

    def namespace(self, number: int | None = None) -> Namespace:
        """The namespace of that number, the first for None.  Raises ValueError where there is none that can be used."""
        for space in self.namespaces:
            if number in (None, space.number):
                if space.metadata:
                    raise ValueError(f"namespace {space.number} has {space.metadata} bytes of metadata a block")
                return space
        there = ", ".join(str(space.number) for space in self.namespaces) or "none"
        raise ValueError(f"{self.device.address} has no namespace {number or ''}; there are: {there}")

    # --- recovery ---

    @property
    def lost(self) -> tuple[Command, ...]:
        """The I/O commands that are on their way, oldest first; while the driver is stopped, those to be issued again."""
        return tuple(self._io.pending.values())

    def on_error(self, log: object = None) -> None:
        """The device has failed: issue nothing more.  Completions that made it into memory still count."""
        with self.lock:
            self._stopped = "its device is being recovered"
            self._take(self._io, tell=False)
            self._take(self._admin, tell=False)

    def on_reset(self, device: Device | None = None) -> None:
        """The device has been reset, and answers: set it up as it was.  Raises as the driver's start does, and
        `errors.CallFailed` (ENODEV) where another controller answers."""
        with self.lock:
            self._admin.give_up()
            self._start()
            found = self._identify_controller()
            if (found.serial, found.model) != (self.controller.serial, self.controller.model):
                what = f"{self.device.address} is not the controller that it was"
                raise errors.CallFailed(errno.ENODEV, what, f"its serial number is {found.serial!r}")

    def on_resume(self) -> None:
        """Issue again, in their order, the commands that were on their way, and wait until they are done.

        A write that is repeated writes the same bytes.  Nothing else is issued before the last of them is done, so that
        none can overtake a younger one.
        """
        with self.lock:
            lost = self.lost
            for command in lost:
                self._io.issue_again(command)
        self._settle(self._io, lost, None)
        with self.lock:
            self._stopped = ""

    def reset(self) -> None:
        """Reset the function and set it up again; commands that were on their way are issued again.

        The way out after `errors.TimedOut` and `Stopped`; a frozen PE takes `vfio.eeh.recover`.
        """
        self.on_error()
        self.device.reset()
        self.on_reset(self.device)
        self.on_resume()

    # --- commands ---

    def _checked(self, number: int | None, lba: int, blocks: int) -> Namespace:
        space = self.namespace(number)
        if lba < 0 or blocks < 1 or lba + blocks > space.blocks:
            raise ValueError(
                f"{blocks} blocks from LBA {lba}: namespace {space.number} has {space.blocks} blocks, 0 to {space.blocks - 1}"
            )
        return space

    def _steps(self, space: Namespace, lba: int, blocks: int) -> list[tuple[int, int]]:
        """First block and number of blocks of each command."""
        most = max(1, min(BOUNCE, self.largest_transfer) // space.block_size)
        return [(at, min(most, lba + blocks - at)) for at in range(lba, lba + blocks, most)]

    def _bounce_command(self, opcode: int, space: Namespace, lba: int, blocks: int) -> Command:
        self._free_bounce()
        self._bounced = self._transfer(opcode, space, lba, blocks, self._bounce.iova)
        return self._bounced

    def _free_bounce(self) -> None:
        """The last command that used this driver's own memory has to be done before the next does."""
        if self._bounced and not self._bounced.done:
            self._settle(self._io, [self._bounced], None)

    def _start_transfer(
        self, opcode: int, lba: int, blocks: int, dma: Dma, offset: int, namespace: int | None
    ) -> Command:
        space = self._checked(namespace, lba, blocks)
        length = blocks * space.block_size
        if length > self.largest_transfer:
            raise ValueError(f"{length} bytes by one command: {self.largest_transfer} are the most that it moves")
        if offset < 0 or offset + length > dma.length:
            raise ValueError(f"{length} bytes at offset {offset} are outside the memory's {dma.length}")
        if not dma.mapped or dma.window.iommu is not self.device.iommu:
            what = f"{self.device.address} cannot reach the memory"
            raise errors.NotMapped(what, dma.iova, dma.length)
        if (dma.iova + offset) % _ALIGNMENT:
            what = f"cannot transfer to or from {self.device.address}"
            raise errors.Misaligned(what, f"IOVA {dma.iova + offset:#x}", _ALIGNMENT, "words")
        return self._transfer(opcode, space, lba, blocks, dma.iova + offset)

    def _transfer(self, opcode: int, space: Namespace, lba: int, blocks: int, iova: int) -> Command:
        verb = "read" if opcode == nvm.READ else "write"
        text = f"{verb} of {blocks} blocks at LBA {lba}, namespace {space.number} of {self.device.address}"
        dwords = (lba & 0xFFFF_FFFF, lba >> 32, blocks - 1)
        return self.start(Command(text, opcode, space.number, iova, blocks * space.block_size, dwords))
