"""Interrupts of a device, delivered to eventfds."""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Iterator, Sequence
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


class Vector(Closing):
    """One enabled interrupt: an eventfd that counts."""

    def __init__(self, irq: Irq, number: int) -> None:
        self.irq = irq
        self.number = number
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
            fd, self._fd = self._fd, None
            os.close(fd)


class Vectors(Closing, Sequence[Vector]):
    """The vectors that `Irq.enable` made; closing them disables the interrupt.

    With one vector it can be waited for like that vector.
    """

    def __init__(self, irq: Irq, vectors: list[Vector]) -> None:
        self.irq = irq
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


class Irq:
    """One interrupt index of a device: INTx, MSI, MSI-X, ERR or REQ, with `count` interrupts in it.

    Of INTx, MSI and MSI-X only one can be enabled at a time.
    """

    def __init__(self, device: Device, index: int) -> None:
        self.device = device
        self.index = index
        self._vectors: Vectors | None = None
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

    def enable(self, count: int = 1) -> Vectors:
        """Deliver the first `count` interrupts to eventfds of their own.

        Raises `errors.NoInterrupt`: EINVAL for a count that the device does not have or while another kind is enabled,
        EBUSY while it is enabled, ENOSPC where the host has fewer vectors to give.
        """
        what = f"cannot enable {self}"
        if self._vectors is not None:
            raise errors.NoInterrupt(what, "it is enabled already", "close its vectors first", errno.EBUSY)
        if not 1 <= count <= self.count:
            raise errors.NoInterrupt(what, f"the device has {self.count} of them, and {count} were asked for")
        vectors: list[Vector] = []
        try:
            vectors += (Vector(self, number) for number in range(count))
            data = b"".join(vector.fileno().to_bytes(4, sys.byteorder) for vector in vectors)
            answer = self._set(uapi.VFIO_IRQ_SET_DATA_EVENTFD | uapi.VFIO_IRQ_SET_ACTION_TRIGGER, 0, count, data, what)
            if answer > 0:
                raise errors.NoInterrupt(
                    what, f"the host can give {answer} of {count} vectors", "ask for fewer", errno.ENOSPC
                )
        except BaseException:
            for vector in vectors:
                vector.close()
            raise
        self._vectors = Vectors(self, vectors)
        return self._vectors

    def disable(self) -> None:
        """Disable, and close the eventfds; harmless when it is not enabled."""
        if self._vectors is None:
            return
        vectors, self._vectors = self._vectors, None
        try:
            self._set(
                uapi.VFIO_IRQ_SET_DATA_NONE | uapi.VFIO_IRQ_SET_ACTION_TRIGGER, 0, 0, b"", f"cannot disable {self}"
            )
        finally:
            for vector in vectors:
                vector.close()

    def trigger(self, start: int = 0, count: int = 1) -> None:
        """Signal the eventfds of `count` vectors from `start`, as if the device had interrupted: a loopback test."""
        flags = uapi.VFIO_IRQ_SET_DATA_NONE | uapi.VFIO_IRQ_SET_ACTION_TRIGGER
        self._set(flags, start, count, b"", f"cannot trigger {self}")

    def mask(self) -> None:
        """Hold INTx back."""
        self._set(uapi.VFIO_IRQ_SET_DATA_NONE | uapi.VFIO_IRQ_SET_ACTION_MASK, 0, 1, b"", f"cannot mask {self}")

    def unmask(self) -> None:
        """Let INTx through again; where the line is still asserted it fires at once."""
        self._set(uapi.VFIO_IRQ_SET_DATA_NONE | uapi.VFIO_IRQ_SET_ACTION_UNMASK, 0, 1, b"", f"cannot unmask {self}")

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
