"""Freezing a PE in a case, and what a host can be asked about it.

`Freezer` is what the fixture `freezer` gives: the same on the fake, whose model freezes a PE, and in the lab, where
software writes what the PHB would (`hwtests.phb`).  In neither does a PE that is frozen like this stop working: QEMU's
does not.  Which machines can do it is `FREEZABLE`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from simtests.conformance.raw import answer
from vfio import sysfs
from vfio.backend import Backend

EEH_HOSTS = ("powernv8", "powernv8-64k", "powernv9", "powernv9-64k", "powernv10", "powernv10-64k")
"""Targets, for the mark `targets`, with EEH."""
FREEZABLE = ("powernv9", "powernv9-64k", "powernv10", "powernv10-64k")
"""Those whose PEs can be frozen: the freeze bits of their PHB can be written."""

HALVES = ("mmio", "dma", "both")
_DEBUG = "/sys/kernel/debug/powerpc"


class PeState(NamedTuple):
    """The two numbers of sysfs's `eeh_pe_state`."""

    bits: int
    """0x28: MMIO works, 0x50: DMA works."""
    flags: int
    """The kernel's own."""


def look(backend: Backend, address: str) -> PeState:
    """The state as sysfs shows it.  That counts as looking: the kernel takes a frozen PE for isolated then."""
    words = backend.read_text(sysfs.path(address, "eeh_pe_state")).split()
    return PeState(*(int(word, 16) for word in words))


class Freezer(ABC):
    """Freezes PEs of a machine."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    @abstractmethod
    def __call__(self, address: str, what: str = "both") -> None:
        """Freeze the PE of the device at `address`, or a half of it: "mmio", "dma"; "none" thaws it."""

    @abstractmethod
    def sleep(self, seconds: float) -> None:
        """Let time pass on the machine."""

    def look(self, address: str) -> PeState:
        """As the function `look`."""
        return look(self.backend, address)

    def check(self, address: str) -> None:
        """Let the host look whether the PE is frozen, as if it had read all ones from the device."""
        self.backend.write_text(f"{_DEBUG}/eeh_dev_check", address)

    def force_recovery(self, address: str) -> None:
        """Let the host recover the PE, frozen or not, whoever has it open."""
        number = int(self.backend.read_text(sysfs.path(address, "eeh_pe_config_addr")), 16)
        self.backend.write_text(f"{_DEBUG}/eeh_force_recover", f"{int(address[:4], 16):x}:{number:x}")

    def set_max_freezes(self, count: int) -> None:
        """How many freezes within an hour the host recovers from."""
        self.backend.write_text(f"{_DEBUG}/eeh_max_freezes", f"{count}\n")

    def until(self, done: Callable[[], bool], seconds: float = 30.0) -> None:
        """Wait for what the host is about to do."""
        for _ in range(int(seconds * 10)):
            if done():
                return
            self.sleep(0.1)
        raise AssertionError(f"it did not happen within {seconds} s")


class KernelMessages:
    """The kernel's log from now on."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._fd = backend.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        self.new()

    def new(self) -> list[str]:
        """The messages since the last call, without level, number and time."""
        found = []
        while isinstance(record := answer(self._backend.pread, self._fd, 8192, 0), bytes):
            found.append(record.decode().partition(";")[2].splitlines()[0])
        return found

    def close(self) -> None:
        self._backend.close(self._fd)
