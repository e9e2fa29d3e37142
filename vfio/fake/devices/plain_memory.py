"""Memory of a device that is nothing but memory: no access of it has an effect that the device would notice."""

from __future__ import annotations

import fcntl
import os
from mmap import mmap

_ADD_SEALS, _SEALS = 1033, 0x1 | 0x2 | 0x4  # F_ADD_SEALS; no more seals, no shrinking, no growing


class PlainMemory:
    """`size` bytes behind a BAR, as a file that other processes can map (memfd)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._file = os.memfd_create("vfio-bar", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.truncate(self._file, size)
        # Whoever maps it could cut it short otherwise, and the model would find nothing behind its own mapping.
        fcntl.fcntl(self._file, _ADD_SEALS, _SEALS)
        self._bytes = mmap(self._file, size)

    def __del__(self) -> None:
        os.close(self._file)

    def fileno(self) -> int:
        """Of the memfd."""
        return self._file

    def read(self, offset: int, width: int) -> int:
        return int.from_bytes(self._bytes[offset : offset + width], "little")

    def write(self, offset: int, width: int, value: int) -> None:
        self._bytes[offset : offset + width] = value.to_bytes(width, "little")
