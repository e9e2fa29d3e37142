"""What the guard asks of the rules of an IOMMU."""

from __future__ import annotations

from abc import ABC, abstractmethod

from hwtests.fuzz.arena import Arena
from hwtests.fuzz.facts import Facts

ANYBODY = "what lies there is anybody's"


class IommuRules(ABC):
    """Of one run of a program."""

    def __init__(self, facts: Facts, arena: Arena) -> None:
        self.facts = facts
        self.arena = arena

    @abstractmethod
    def refuse(self, n: int, payload: bytes) -> str:
        """Why the ioctl VFIO_BASE + `n` of a container is not to be made; empty if it may."""

    @abstractmethod
    def dma(self, iova: int, length: int) -> str:
        """Why a device is not to reach these addresses; empty if it may."""

    @abstractmethod
    def observe(self, n: int | None, payload: bytes, value: int, after: bytes) -> None:
        """Take note of an ioctl of a container that succeeded."""

    @abstractmethod
    def closed(self) -> None:
        """A descriptor was closed, or a group left a container."""


def u32(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "little")


def u64(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 8], "little")
