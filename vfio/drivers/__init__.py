"""Small complete userspace drivers, one a file, to use and to read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vfio.device import Device
    from vfio.dma import Dma
    from vfio.irq import Irq


class Exerciser(Protocol):
    """What a driver offers to whoever wants to see a device move data and interrupt, and nothing on it changed."""

    def identify(self) -> str:
        """What the device says of itself, read from its registers."""

    def move(self, source: Dma, sink: Dma) -> str:
        """Move data through the window of `source`, which the device may read, and `sink`, which it may write.

        Says what was moved; raises AssertionError where it arrived changed.
        """

    def interrupt(self, irq: Irq) -> None:
        """Let the device interrupt by `irq`, which is not enabled, and see it arrive.  Raises `errors.TimedOut`."""


def find(device: Device) -> Exerciser | None:
    """The driver for `device`; None where this library has none for it."""
    from vfio.drivers import edu, exercise, nvme

    if (device.config.read16(0), device.config.read16(2)) == edu.Edu.ID:
        return exercise.EduExerciser(device)
    if device.config.read32(8) >> 8 == nvme.CLASS:
        return exercise.NvmeExerciser(device)
    return None
