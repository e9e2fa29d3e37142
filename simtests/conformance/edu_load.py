"""An edu at work: a thread that moves data into the device and out of it without end, and can be recovered."""

from __future__ import annotations

import random
import threading
from typing import Any

import vfio
from vfio import eeh, errors
from vfio.drivers.edu import Edu

_PATIENCE = 0.05
"""Seconds that a transfer may take; one of a frozen device never ends."""


class EduLoad:
    """Writes patterns to memory and lets the device copy them; a copy that fails is made again after recovery.

    `copies` counts the right ones, `wrong` has the numbers of the others.
    """

    def __init__(self, device: vfio.Device, dma: vfio.Dma, patience: float = _PATIENCE) -> None:
        self.edu = Edu(device)
        self.dma = dma
        self.patience = patience
        self._eeh = eeh.of(device)
        self.copies, self.failed, self.wrong = 0, 0, list[int]()
        self.error: BaseException | None = None
        self.calls: list[str] = []
        self._random = random.Random(1)
        self._may_run, self._idle = threading.Event(), threading.Lock()
        self._ended = False
        self._may_run.set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # --- what `eeh.recover` calls ---

    def on_error(self, log: Any) -> None:
        """Returns when nothing is on its way."""
        self._may_run.clear()
        with self._idle:
            self.calls.append("error")

    def on_reset(self, device: vfio.Device) -> None:
        self.calls.append("reset")
        assert self.edu.invert(0x12345678) == 0xEDCBA987

    def on_resume(self) -> None:
        self.calls.append("resume")
        self._may_run.set()

    # --- for a test ---

    def wait_for(self, more: int) -> None:
        """Until so many copies more were made, and the last of them began after this call."""
        wanted = self.copies + more + 1
        while self.copies < wanted:
            assert self._thread.is_alive(), self.error
            self._thread.join(0.002)

    def close(self) -> None:
        """End; raises what went wrong in the thread."""
        self._ended = True
        self._may_run.set()
        self._thread.join()
        if self.error:
            raise self.error

    def _run(self) -> None:
        try:
            pattern = self._pattern()
            while not self._ended:
                self._may_run.wait()
                with self._idle:
                    if self._may_run.is_set() and self._copy(pattern):
                        pattern = self._pattern()
        except BaseException as error:
            self.error = error

    def _pattern(self) -> bytes:
        return self._random.randbytes(self._random.randint(1, Edu.capacity))

    def _copy(self, pattern: bytes) -> bool:
        """Whether it was done."""
        self.dma[: len(pattern)] = pattern
        self.dma[4096 : 4096 + len(pattern)] = bytes(len(pattern))
        try:
            self.edu.load(self.dma.iova, len(pattern), timeout=self.patience)
            self.edu.store(self.dma.iova + 4096, len(pattern), timeout=self.patience)
        except (errors.TimedOut, errors.DeviceFrozen):
            self.failed += 1
            return False
        if self.dma[4096 : 4096 + len(pattern)] != pattern:
            if self._eeh.state is not eeh.State.NORMAL:  # its DMA went nowhere, and it does not know
                self.failed += 1
                return False
            self.wrong.append(self.copies)
        self.copies += 1
        return True
