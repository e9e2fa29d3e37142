"""Interrupts of a device, delivered to eventfds.

    with device.msix.enable(4) as vectors:
        vectors[0].wait(timeout=1.0)

An eventfd counts: `Vector.take` and `Vector.wait` return how often it fired since they were last asked.  Whatever waits
for files can wait for a vector, as select and poll do, and asyncio:

    async def interrupts(vector):
        loop, fired = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(vector, fired.set)
        try:
            while True:
                await fired.wait()
                fired.clear()
                yield vector.take()
        finally:
            loop.remove_reader(vector)

Source: drivers/vfio/pci/vfio_pci_intrs.c; include/uapi/linux/vfio.h, "VFIO_DEVICE_SET_IRQS".
"""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, overload

from vfio import errors, uapi
from vfio.closing import Closing

if TYPE_CHECKING:
    from vfio.device import Device

_NAMES = {
    uapi.VFIO_PCI_INTX_IRQ_INDEX: "INTx",
    uapi.VFIO_PCI_MSI_IRQ_INDEX: "MSI",
    uapi.VFIO_PCI_MSIX_IRQ_INDEX: "MSI-X",
    uapi.VFIO_PCI_ERR_IRQ_INDEX: "ERR",
    uapi.VFIO_PCI_REQ_IRQ_INDEX: "REQ",
}
_EFD = os.EFD_CLOEXEC | os.EFD_NONBLOCK
_TRIGGER_BY_EVENTFD = uapi.VFIO_IRQ_SET_DATA_EVENTFD | uapi.VFIO_IRQ_SET_ACTION_TRIGGER
_UNMASK_BY_EVENTFD = uapi.VFIO_IRQ_SET_DATA_EVENTFD | uapi.VFIO_IRQ_SET_ACTION_UNMASK


class Vector(Closing):
    """One enabled interrupt: an eventfd that counts.  Closing it disables this one, and leaves the others."""

    def __init__(self, irq: Irq, number: int) -> None:
        self.irq = irq
        self.number = number
        """Which of the index's interrupts it is, from 0."""
        self._fd: int | None = os.eventfd(0, _EFD)

    def fileno(self) -> int:
        """The eventfd, for select, poll or an event loop; read it with `take`."""
        if self._fd is None:
            raise errors.Closed(f"{self.irq} vector {self.number}")
        return self._fd

    def take(self) -> int:
        """How often it fired since the last `take` or `wait`; 0 at once if it did not."""
        try:
            return os.eventfd_read(self.fileno())
        except BlockingIOError:
            return 0

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has fired, and return how often.

        `timeout` is in seconds, None waits for ever.  Raises `errors.TimedOut`.
        """
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        if not poll.poll(None if timeout is None else timeout * 1000):
            raise errors.TimedOut(f"waiting for {self.irq} vector {self.number}", timeout or 0)
        return self.take()

    def close(self) -> None:
        if self._fd is not None:
            self.irq.drop(self)

    def release(self) -> None:
        """Close the eventfd; the kernel's reference of it is another one."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def __repr__(self) -> str:
        return f"<Vector {self.number} of {self.irq}>"


class Vectors(Closing, Sequence[Vector]):
    """The vectors that `Irq.enable` made, in the order of their numbers; closing them disables the interrupt.

    With one vector it can be waited for like that vector.
    """

    def __init__(self, irq: Irq, vectors: list[Vector], room: int) -> None:
        self.irq = irq
        self.room = room
        """How many vectors, from 0, the host has allocated: those that `add` and `grow` can have anywhere."""
        self._vectors = vectors

    @overload
    def __getitem__(self, index: int) -> Vector: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Vector]: ...
    def __getitem__(self, index: int | slice) -> Vector | Sequence[Vector]:
        return self._vectors[index]

    def __len__(self) -> int:
        return len(self._vectors)

    def __iter__(self) -> Iterator[Vector]:
        return iter(self._vectors)

    def add(self, number: int) -> Vector:
        """Enable vector `number` too.  Raises as `grow`, and EBUSY for one that is enabled."""
        return self._extend(number, 1)[0]

    def grow(self, count: int = 1) -> list[Vector]:
        """Enable `count` more vectors, behind the last.

        Raises `errors.NoInterrupt`: EINVAL for more than the device has, and for more than `room` where the kernel
        cannot add to what it allocated when the interrupt was enabled (VFIO_IRQ_INFO_NORESIZE: MSI everywhere, MSI-X on
        POWER).
        """
        return self._extend(self._vectors[-1].number + 1 if self._vectors else 0, count)

    def _extend(self, start: int, count: int) -> list[Vector]:
        added = self.irq.extend(self, start, count)
        self._vectors = sorted([*self._vectors, *added], key=lambda vector: vector.number)
        self.room = max(self.room, start + count)
        return added

    def forget(self, vector: Vector) -> None:
        """`vector` was disabled."""
        self._vectors.remove(vector)

    def fileno(self) -> int:
        """The eventfd of the only vector."""
        return self._only().fileno()

    def take(self) -> int:
        """`Vector.take` of the only vector."""
        return self._only().take()

    def wait(self, timeout: float | None = None) -> int:
        """`Vector.wait` of the only vector."""
        return self._only().wait(timeout)

    def _only(self) -> Vector:
        if len(self._vectors) != 1:
            raise errors.NoInterrupt(
                str(self.irq), f"{len(self._vectors)} vectors are enabled", "say which: vectors[n].wait()"
            )
        return self._vectors[0]

    def close(self) -> None:
        """Disable the interrupt and close the eventfds."""
        self.irq.disable()


class Resample(Closing):
    """An eventfd that unmasks INTx when it is written to: by `fire`, or by whoever has it, without a call to VFIO."""

    def __init__(self, irq: Irq) -> None:
        self.irq = irq
        self._fd: int | None = os.eventfd(0, _EFD)

    def fileno(self) -> int:
        """The eventfd; the kernel reads it."""
        if self._fd is None:
            raise errors.Closed(f"resampling of {self.irq}")
        return self._fd

    def fire(self) -> None:
        """Unmask; where the line is still asserted the interrupt fires again."""
        os.eventfd_write(self.fileno(), 1)

    def close(self) -> None:
        if self._fd is not None:
            self.irq.stop_resampling()

    def release(self) -> None:
        """Close the eventfd."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)


class Irq:
    """One interrupt index of a device: INTx, MSI, MSI-X, ERR or REQ, with `count` interrupts in it.

    Of INTx, MSI and MSI-X only one can be enabled at a time.
    """

    def __init__(self, device: Device, index: int) -> None:
        self.device = device
        self.index = index
        self._vectors: Vectors | None = None
        self._resample: Resample | None = None
        info = uapi.vfio_irq_info(index=index)
        try:
            device.backend.ioctl(device.fd, uapi.VFIO_DEVICE_GET_IRQ_INFO, uapi.buffer(info))
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise errors.NoInterrupt(
                    f"{device.address} has no {self.name} interrupt", "the kernel refuses it"
                ) from error
            raise errors.CallFailed(error.errno or errno.EIO, f"cannot get the info of {self}") from error
        self.count: int = info.count
        """How many interrupts the index has; 0 where the device has none of this kind."""
        self.flags: int = info.flags
        """VFIO_IRQ_INFO_*: EVENTFD, MASKABLE, AUTOMASKED, NORESIZE."""

    @property
    def name(self) -> str:
        """INTx, MSI, MSI-X, ERR or REQ."""
        return _NAMES.get(self.index, f"interrupt {self.index}")

    @property
    def enabled(self) -> bool:
        return self._vectors is not None

    @property
    def cleared_by_reset(self) -> bool:
        """Whether a reset of the device clears it: INTx, MSI and MSI-X; ERR and REQ are the host's own, and survive."""
        return self.index <= uapi.VFIO_PCI_MSIX_IRQ_INDEX

    @property
    def resizable(self) -> bool:
        """Whether vectors can be added behind those that were allocated when it was enabled."""
        return not self.flags & uapi.VFIO_IRQ_INFO_NORESIZE

    def enable(self, count: int = 1, *, start: int = 0, room: int | None = None) -> Vectors:
        """Deliver `count` interrupts, from number `start` on, to eventfds of their own.

        The host allocates `room` vectors (default: start + count), so that `Vectors.grow` and `Vectors.add` find some
        later.  Raises `errors.NoInterrupt`: EINVAL for a count that the device does not have or while another kind is
        enabled, EBUSY while it is enabled, ENOSPC where the host has fewer vectors to give.
        """
        what = f"cannot enable {self}"
        room = start + count if room is None else room
        if self._vectors is not None:
            raise errors.NoInterrupt(what, "it is enabled already", "close its vectors first", errno.EBUSY)
        if count < 1 or start < 0 or not start + count <= room <= self.count:
            asked = f"{count} were" if not start and room == count else f"{count} from {start} on, in {room}, were"
            raise errors.NoInterrupt(what, f"the device has {self.count} of them, and {asked} asked for")
        self._vectors = Vectors(self, self._deliver(start, count, what, spare=room - start - count), room)
        return self._vectors

    def extend(self, vectors: Vectors, start: int, count: int) -> list[Vector]:
        """What `Vectors.grow` and `Vectors.add` do."""
        what = f"cannot enable more vectors of {self}"
        if vectors is not self._vectors:
            raise errors.Closed(f"vectors of {self}")
        if count < 1 or start < 0 or start + count > self.count:
            raise errors.NoInterrupt(
                what, f"the device has {self.count} of them, and {count} from {start} on were asked for"
            )
        if any(start <= vector.number < start + count for vector in vectors):
            raise errors.NoInterrupt(what, f"vector {start} is enabled already", "", errno.EBUSY)
        if start + count > vectors.room and not self.resizable:
            raise errors.NoInterrupt(
                what,
                f"the host has allocated {vectors.room} vectors and cannot add to them (NORESIZE), and "
                f"{start + count} are needed",
                f"enable(..., room={start + count}) allocates them all at once",
            )
        return self._deliver(start, count, what)

    def drop(self, vector: Vector) -> None:
        """What `Vector.close` does."""
        try:
            if self._vectors is None or vector not in self._vectors:
                return
            if self.index >= uapi.VFIO_PCI_ERR_IRQ_INDEX:  # without its one eventfd it is off
                self.disable()
                return
            self._vectors.forget(vector)
            if self.index == uapi.VFIO_PCI_MSI_IRQ_INDEX:
                # It stays enabled, for an eventfd that nobody reads: a device cannot mask single messages of MSI, and
                # powernv would let them go astray, as writes to bus address 0.
                return
            what = f"cannot disable vector {vector.number} of {self}"
            self._set(_TRIGGER_BY_EVENTFD, vector.number, 1, _descriptors([-1]), what)
        finally:
            vector.release()

    def _deliver(self, start: int, count: int, what: str, spare: int = 0) -> list[Vector]:
        """Eventfds for `count` vectors, and none for `spare` more behind them; if one fails, none has any."""
        vectors: list[Vector] = []
        try:
            vectors += (Vector(self, number) for number in range(start, start + count))
            self._signal([*(vector.fileno() for vector in vectors), *[-1] * spare], start, what)
        except BaseException:
            for vector in vectors:
                vector.release()
            raise
        return vectors

    def _signal(self, fds: list[int], start: int, what: str, remedy: str = "ask for fewer") -> None:
        """Deliver the interrupts from `start` on to these eventfds; -1 is none."""
        answer = self._set(_TRIGGER_BY_EVENTFD, start, len(fds), _descriptors(fds), what)
        if answer > 0:
            why = f"the host can give {answer} of {start + len(fds)} vectors"
            raise errors.NoInterrupt(what, why, remedy, errno.ENOSPC)

    def suspend(self) -> None:
        """Disable it in the kernel, and keep the eventfds for `rearm`; harmless when the kernel has it disabled."""
        try:
            self._switch_off()
        except errors.NoInterrupt as error:
            if error.errno != errno.EINVAL:  # which says that it is disabled already
                raise

    def rearm(self) -> int:
        """Disable it in the kernel, and enable it again as it was: the same vectors, the same eventfds, whose counts stay.

        For a device that has lost what was set up, as by a reset.  Returns how many eventfds are delivered to: 0 where
        it is not enabled.  Raises `errors.NoInterrupt`; it can be called again then, or `disable`.
        """
        if self._vectors is None:
            return 0
        what = f"cannot enable {self} again"
        fds = {vector.number: vector.fileno() for vector in self._vectors}
        self.suspend()
        self._signal([fds.get(number, -1) for number in range(self._vectors.room)], 0, what, remedy="")
        if self._resample is not None:
            self._set(_UNMASK_BY_EVENTFD, 0, 1, _descriptors([self._resample.fileno()]), what)
        return len(fds)

    def disable(self) -> None:
        """Disable, and close the eventfds; harmless when it is not enabled."""
        if self._vectors is None:
            return
        vectors, self._vectors = self._vectors, None
        resample, self._resample = self._resample, None
        try:
            self._switch_off()
        finally:
            for each in (*vectors, *([resample] if resample else [])):
                each.release()

    def _switch_off(self) -> None:
        flags = uapi.VFIO_IRQ_SET_DATA_NONE | uapi.VFIO_IRQ_SET_ACTION_TRIGGER
        self._set(flags, 0, 0, b"", f"cannot disable {self}")

    def trigger(self, start: int = 0, count: int = 1) -> None:
        """Signal the eventfds of `count` vectors from `start`, as if the device had interrupted: a loopback test."""
        flags = uapi.VFIO_IRQ_SET_DATA_NONE | uapi.VFIO_IRQ_SET_ACTION_TRIGGER
        self._set(flags, start, count, b"", f"cannot trigger {self}")

    def trigger_each(self, values: Iterable[bool], start: int = 0) -> None:
        """`trigger` for those vectors, from `start` on, whose value is true."""
        data = bytes(map(bool, values))
        flags = uapi.VFIO_IRQ_SET_DATA_BOOL | uapi.VFIO_IRQ_SET_ACTION_TRIGGER
        self._set(flags, start, len(data), data, f"cannot trigger {self}")

    def mask(self) -> None:
        """Hold INTx back."""
        self._set(uapi.VFIO_IRQ_SET_DATA_NONE | uapi.VFIO_IRQ_SET_ACTION_MASK, 0, 1, b"", f"cannot mask {self}")

    def unmask(self) -> None:
        """Let INTx through again; where the line is still asserted it fires at once."""
        self._set(uapi.VFIO_IRQ_SET_DATA_NONE | uapi.VFIO_IRQ_SET_ACTION_UNMASK, 0, 1, b"", f"cannot unmask {self}")

    def resample(self) -> Resample:
        """An eventfd that unmasks INTx; it goes with `disable`.  Raises `errors.NoInterrupt`: EBUSY while there is one."""
        what = f"cannot resample {self}"
        if self._resample is not None:
            raise errors.NoInterrupt(what, "there is an eventfd for that already", "close that first", errno.EBUSY)
        found = Resample(self)
        try:
            self._set(_UNMASK_BY_EVENTFD, 0, 1, _descriptors([found.fileno()]), what)
        except BaseException:
            found.release()
            raise
        self._resample = found
        return found

    def stop_resampling(self) -> None:
        """What `Resample.close` does."""
        if self._resample is None:
            return
        resample, self._resample = self._resample, None
        try:
            self._set(_UNMASK_BY_EVENTFD, 0, 1, _descriptors([-1]), f"cannot stop resampling {self}")
        finally:
            resample.release()

    def close(self) -> None:
        """`disable`, for a device that is being closed: the kernel disables what this cannot."""
        with suppress(OSError):  # a device that is gone has no interrupt to disable
            self.disable()

    def _set(self, flags: int, start: int, count: int, data: bytes, what: str) -> int:
        size = uapi.offsetof(uapi.vfio_irq_set, "data") + len(data)
        argument = uapi.vfio_irq_set.sized(size, flags=flags, index=self.index, start=start, count=count)
        buffer = memoryview(uapi.buffer(argument)).cast("B")
        buffer[size - len(data) :] = data
        try:
            return self.device.backend.ioctl(self.device.fd, uapi.VFIO_DEVICE_SET_IRQS, buffer)
        except OSError as error:
            why, remedy = self._explain(error)
            raise errors.NoInterrupt(what, why, remedy, error.errno or errno.EIO) from error

    def _explain(self, error: OSError) -> tuple[str, str]:
        if error.errno == errno.ENOTTY:
            return f"{self.name} has no such action", ""
        if error.errno == errno.EINVAL:
            others = [irq.name for irq in (self.device.irq(n) for n in range(3)) if irq is not self and irq.enabled]
            if others and self.index < 3:
                return f"{others[0]} is enabled", f"disable {others[0]} first"
            if not self.enabled:
                return f"{self.name} is not enabled", "enable it first"
        return "", ""

    def __str__(self) -> str:
        return f"{self.name} of {self.device.address}"

    def __repr__(self) -> str:
        return f"<Irq {self}, {self.count}>"


def _descriptors(fds: Iterable[int]) -> bytes:
    """File descriptors as SET_IRQS takes them; -1 is none."""
    return b"".join(fd.to_bytes(4, sys.byteorder, signed=True) for fd in fds)
