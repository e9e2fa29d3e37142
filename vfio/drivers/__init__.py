"""Small complete userspace drivers, one a file, to use and to read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vfio.device import Device


class Exerciser(Protocol):
    """What a driver offers to whoever wants to see a device move data and interrupt."""

    capacity: int
    """How many bytes the device can hold."""

    def load(self, iova: int, length: int) -> None:
        """Let the device read `length` bytes from `iova` into itself (DMA read)."""

    def store(self, iova: int, length: int) -> None:
        """Let the device write `length` bytes of what it holds to `iova` (DMA write)."""

    def interrupt(self) -> None:
        """Let the device interrupt."""

    def acknowledge(self) -> None:
        """Tell the device that its interrupt was seen."""

    def identify(self) -> str:
        """What the device says of itself, read from its registers."""


def find(device: Device) -> Exerciser | None:
    """The driver for `device`, started; None where this library has none for it."""
    from vfio.drivers.edu import Edu

    identity = (device.config.read16(0), device.config.read16(2))
    return Edu(device) if identity == Edu.ID else None
