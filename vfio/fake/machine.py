"""The modelled computer: all that its kernel knows is reachable from here, and from nowhere else."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from vfio import uapi
from vfio.fake.clock import Clock
from vfio.fake.core import VfioCore
from vfio.fake.driver_core import DriverCore
from vfio.fake.eeh_host import EehHost
from vfio.fake.eventfd import VirqFds
from vfio.fake.hooks import Hooks
from vfio.fake.kernel_log import KernelLog
from vfio.fake.pamu import PamuHardware
from vfio.fake.process import Process

if TYPE_CHECKING:
    from vfio.fake.iommu_group import IommuGroup
    from vfio.fake.pci import PciDevice
    from vfio.fake.pe import Pe
    from vfio.topology import Topology

KERNELS = {"6.12": (6, 12), "7.2": (7, 2)}


class Machine:
    """A host with a VFIO kernel, built from a topology.

    `page_size` is the host page in bytes, `kernel` the version whose answers it gives, `strict` whether it raises
    `KernelWouldBeHurt` rather than answer a call that would corrupt or hang a real kernel.  `freezes` is whether the
    hardware freezes a PE on an error, and keeps a frozen one from the rest of the machine; QEMU's does neither.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        page_size: int = 4096,
        kernel: tuple[int, int] = (6, 12),
        strict: bool = True,
        freezes: bool = True,
    ) -> None:
        self.topology = topology
        self.page_size = page_size
        self.kernel = kernel
        self.strict = strict
        self.freezes = freezes and topology.platform.eeh
        self.imitates_qemu = not freezes
        """Whether devices and bridges are QEMU's, in what hardware does otherwise."""
        self.lock = threading.RLock()
        """Held during every call: the modelled kernel does one thing at a time."""
        self.changed = threading.Condition(self.lock)
        """Notified when a file was released: what a blocked call waits for."""
        self.virqfds = VirqFds(self.lock)
        """The eventfds at which a process asks for something: to unmask an interrupt, to write a register."""
        self.clock = Clock()
        self.log = KernelLog(self.clock)
        """What /dev/kmsg tells."""
        self.tainted = 0
        """What /proc/sys/kernel/tainted shows."""
        self.hooks = Hooks()
        self.processes: list[Process] = []
        self.iommu_groups: dict[int, IommuGroup] = {}
        self.pes: list[Pe] = []
        self.eeh = EehHost(self)
        """EEH: freeze a PE, thaw it, let it fail."""
        pamu = topology.iommu.pamu
        self.pamu = PamuHardware(pamu) if pamu else None
        """The IOMMU of a P4080."""
        self.vfio = VfioCore(self)
        self.driver_core = DriverCore(self)
        self.driver_core.boot()

    def device(self, address: str) -> PciDevice:
        """The PCI function at `address`; KeyError where there is none."""
        return self.driver_core.devices[address]

    def process_gone(self, process: Process) -> None:
        """The address space of `process` is no more, and with it what was registered there."""
        self.vfio.process_gone(process)

    def leaks(self) -> list[str]:
        """What is still held, in words; empty on a clean machine."""
        found = []
        for process in self.processes:
            if process.locked_pages:
                found.append(f"process {process.pid}: {process.locked_pages * self.page_size} bytes of locked memory")
            found += [f"process {process.pid}: file {fd} ({file.link})" for fd, file in process.files.items()]
        return found + self.vfio.held()


def request_offset(request: int) -> int | None:
    """How far a request number is from VFIO_BASE on the machine that this runs on; None for no VFIO request."""
    offset = request - uapi.VFIO_GET_API_VERSION
    return offset if 0 <= offset < 256 - uapi.VFIO_BASE else None
