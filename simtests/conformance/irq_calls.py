"""VFIO_DEVICE_SET_IRQS by raw calls: its numbers, and the two things that most cases do."""

from __future__ import annotations

from simtests.conformance.pci_calls import RawDevice, int32
from vfio import uapi

SET_IRQS = uapi.VFIO_DEVICE_SET_IRQS
INTX, MSI, MSIX, ERR, REQ = range(5)
NONE, BOOL, EVENTFD = 1, 2, 4
MASK, UNMASK, TRIGGER = 8, 16, 32
NEVER = 0.05
"""Seconds after which an interrupt that has not arrived does not."""


def set_fds(device: RawDevice, index: int, *fds: int, start: int = 0, action: int = TRIGGER) -> int | str:
    """What came of setting eventfds."""
    return device.set_irqs(index, EVENTFD | action, start, len(fds), bytes(int32(*fds)))


def disable(device: RawDevice, index: int) -> int | str:
    """What came of disabling an index."""
    return device.set_irqs(index, NONE | TRIGGER)
