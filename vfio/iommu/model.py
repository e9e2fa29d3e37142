"""What every IOMMU model offers to the objects around it."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from vfio.backend import Backend
from vfio.dma import Dma, DmaMemory

if TYPE_CHECKING:
    from vfio.container import Container


class Iommu(ABC):
    """The IOMMU of a container; made by `Container.set_iommu` or `Container.choose_iommu`."""

    name: ClassVar[str]
    """What messages call it."""
    extension: ClassVar[int]
    """The number that SET_IOMMU takes."""

    passed_over: tuple[str, ...] = ()
    """Why `Container.choose_iommu` did not take a better model: the error of each, best first."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self.backend: Backend = container.backend
        self.lock: threading.RLock = container.lock

    @classmethod
    def explain_refusal(cls, container: Container, error: OSError) -> tuple[str, str]:
        """Why SET_IOMMU refused this model, and what to do."""
        return "", ""

    def explain_attach(self, error: OSError) -> tuple[str, str]:
        """Why no further group could be attached to the container with this IOMMU, and what to do."""
        return "", ""

    @abstractmethod
    def map(self, memory: DmaMemory, iova: int | None = None, *, read: bool = True, write: bool = True) -> Dma:
        """Let devices reach `memory`, at `iova` or wherever there is room.

        `read` and `write` are the device's rights.  All sizes and addresses are in bytes and multiples of the IOMMU's
        page.  Closing what is returned unmaps.
        """

    def joined(self) -> None:
        """A further group has been attached."""
        return

    @abstractmethod
    def check_detach(self) -> None:
        """Raise where a group cannot leave, because what is mapped could not be mapped again."""

    @abstractmethod
    def remap(self) -> None:
        """Map again all that is mapped: a group has left, and that emptied the tables.

        Raises the first error of the kernel, after trying all of it.
        """

    @abstractmethod
    def gone(self) -> None:
        """The kernel has destroyed the IOMMU with all that was mapped; no call is to be made."""

    @abstractmethod
    def close(self) -> None:
        """Undo all that was done through this object, newest first."""
