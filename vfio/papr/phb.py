"""The PHB that a virtual machine monitor shows to a pseries guest, with a VFIO container behind it."""

from __future__ import annotations

import threading
from contextlib import ExitStack

from vfio import errors
from vfio.closing import Closing
from vfio.container import Container
from vfio.device import Device
from vfio.iommu.spapr import Spapr
from vfio.iommu.spapr_v1 import SpaprTce
from vfio.iommu.spapr_v2 import SpaprTceV2
from vfio.irq import Irq
from vfio.papr import block, hcalls, rtas
from vfio.papr.memory import GuestMemory
from vfio.papr.numbers import BUID, LIOBN, PE_ADDRESS, TOKEN, Opcode
from vfio.papr.table import TceTable

_DEFAULT_PAGE = 4096
_BUSES, _SLOTS, _FUNCTIONS = 256, 32, 8


class Phb(Closing):
    """PHB number `index` of a guest whose RAM is `memory`; `container` has its groups and its sPAPR IOMMU.

    It registers the memory (v2; with v1 it enables the container, and the guest has the default window alone), takes all
    IOVA of the default window, and turns what a guest calls into calls of VFIO: `hcall`, `rtas`.  Whatever a guest passes,
    the answer is a code of PAPR.  `largest_window` in bytes (a power of two; default: enough for the memory) is what a
    guest may ask for: the tables of its windows are charged to this process.

    Raises TypeError for an IOMMU that is no sPAPR TCE, and what registering memory and `DmaWindow.mapper` raise; on
    failure nothing stays registered.
    """

    def __init__(
        self, container: Container, memory: GuestMemory, index: int = 0, largest_window: int | None = None
    ) -> None:
        iommu = container.iommu
        if not isinstance(iommu, Spapr):
            raise TypeError(f"a pseries guest needs a sPAPR TCE IOMMU, and {container!r} has {iommu!r}")
        self.container = container
        self.iommu: Spapr = iommu
        self.memory = memory
        self.buid = BUID + index
        self.largest_window = largest_window or 1 << (memory.end - 1).bit_length()
        self.liobns = [LIOBN | index << 8 | n for n in range(self.ddw.info.max_windows if self.ddw else 1)]
        """The numbers that windows can have; the default window has the first."""
        self.tokens = {name: TOKEN + n for n, name in enumerate(rtas.NAMES)}
        """The tokens of the RTAS calls, for the guest's device tree; a monitor with calls of its own sets others."""
        self.lock = threading.RLock()
        """Held by each call: a guest makes them on all of its processors."""
        self.devices: dict[int, Device] = {}
        """The devices by their configuration address in the guest."""
        self._tables: dict[int, TceTable] = {}
        self._suspended: set[Irq] = set()
        with ExitStack() as undo:
            if isinstance(iommu, SpaprTceV2):
                for block in memory.blocks:
                    undo.enter_context(iommu.register(block.buffer))
            elif isinstance(iommu, SpaprTce) and not iommu.enabled:
                iommu.enable()
                undo.callback(iommu.disable)
            undo.callback(self._close_tables)
            default = next((window for window in iommu.windows if window.default), None)
            if default is not None:
                self._tables[self.liobns[0]] = TceTable(self.liobns[0], default, memory)
            self._undo = undo.pop_all()

    @property
    def ddw(self) -> SpaprTceV2 | None:
        """The IOMMU where it has Dynamic DMA Windows."""
        return self.iommu if isinstance(self.iommu, SpaprTceV2) and self.iommu.info.max_windows else None

    def add(self, device: Device, slot: int | None = None, function: int = 0, bus: int = 0) -> int:
        """Show `device` to the guest there (default: the next free slot); its configuration address, ``00BBDF00``.

        Raises ValueError for a place that there is not or that is taken, and for a device of another container.
        """
        if device.group.container is not self.container:
            raise ValueError(f"{device.address} is not in {self.container!r}")
        if slot is None:
            slot = next(n for n in range(1, _SLOTS + 1) if self._address(bus, n, function) not in self.devices)
        if not (0 <= bus < _BUSES and 0 <= slot < _SLOTS and 0 <= function < _FUNCTIONS):
            raise ValueError(f"the guest has no place {bus:02x}:{slot:02x}.{function}")
        address = self._address(bus, slot, function)
        if address in self.devices:
            raise ValueError(f"{self.devices[address].address} is at {bus:02x}:{slot:02x}.{function} already")
        self.devices[address] = device
        return address

    def remove(self, device: Device) -> None:
        """Take `device` from the guest, wherever it is shown; the guest's windows stay, for its other devices.

        Close the device, and close its group or detach it, for its DMA to end.  A kernel whose container a group leaves
        empties the windows of the others as well: all that the guest has in its tables is mapped again before the group's
        `close`, or `Container.detach`, returns.  Raises ValueError for a device that is not here.
        """
        with self.lock:
            places = [address for address, each in self.devices.items() if each is device]
            if not places:
                raise ValueError(f"{device.address} is no device of this PHB")
            for address in places:
                del self.devices[address]

    def hcall(self, opcode: int, *arguments: int) -> tuple[int, ...]:
        """Make a hypercall: its code (`Hcall`), and what it puts in registers beside that.

        H_RTAS makes an RTAS call that is a block in the guest's memory.
        """
        with self.lock:
            if opcode == Opcode.H_RTAS:
                return (block.call(self, arguments),)
            return hcalls.call(self, opcode, arguments)

    def rtas(self, name: str, *arguments: int, results: int) -> list[int]:
        """Make an RTAS call: its status (`Rtas`, signed) and the other words that it answers, `results` in all."""
        with self.lock:
            return rtas.call(self, name, arguments, results)

    def close(self) -> None:
        """Take the guest's windows and its memory from the devices; the default window stays with the container."""
        with self.lock:
            self._undo.close()
            self.devices.clear()

    # --- for the calls ---

    @property
    def tables(self) -> dict[int, TceTable]:
        """The windows that there are, by LIOBN."""
        return {liobn: table for liobn, table in self._tables.items() if not table.closed}

    @property
    def page_sizes(self) -> list[int]:
        """Page sizes, in bytes, that the platform has and all of the guest's memory can be mapped in."""
        sizes = self.ddw.info.page_sizes if self.ddw else ()
        return [size for size in sizes if size <= self.memory.page_size]

    def is_pe(self, address: int) -> bool:
        """Whether that is the configuration address of a device, or the address of the PE of one."""
        return address in self.devices or address in map(self.pe_address, self.devices)

    @staticmethod
    def pe_address(address: int) -> int:
        """Of the PE of the device at a configuration address: devices of a bus share one."""
        return address & 0xFF0000 | PE_ADDRESS

    def create_window(self, page_size: int, size: int) -> TceTable:
        """Create a window.  Raises OSError: `errors.NoFreeWindow`, and what `SpaprTceV2.create_window` does."""
        assert self.ddw is not None
        free = [liobn for liobn in self.liobns if liobn not in self.tables]
        if not free:
            windows = [str(table.window) for table in self.tables.values()]
            raise errors.NoFreeWindow(windows, len(self.liobns))
        window = self.ddw.create_window(size, page_size)
        try:
            self._tables[free[0]] = table = TceTable(free[0], window, self.memory)
        except BaseException:
            window.close()
            raise
        return table

    def remove_window(self, liobn: int) -> None:
        """Remove a window, the default one too.  Where the kernel refuses, OSError: it is empty, and there as before."""
        table = self._tables[liobn]
        table.close()
        try:
            table.window.close()
        except OSError:
            self._tables[liobn] = TceTable(liobn, table.window, self.memory)
            raise
        del self._tables[liobn]

    def reset_windows(self) -> None:
        """Only the default window, empty; it is made again where it was removed."""
        assert self.ddw is not None
        info = self.ddw.info
        for liobn, table in self.tables.items():
            window = table.window
            if (window.start, window.size, window.page_size) == (info.window_start, info.window_size, _DEFAULT_PAGE):
                table.clear()
            else:
                self.remove_window(liobn)
        if not self.tables and info.window_size:
            self.create_window(_DEFAULT_PAGE, info.window_size)

    def suspend_interrupts(self) -> None:
        """Disable in the kernel what a reset clears.  The end of a reset lets INTx through while VFIO takes it for masked,
        and the host switches a line off for good that is up and that nobody answers for.

        Raises `errors.NoInterrupt`; `rearm_interrupts` enables them again.
        """
        for device in dict.fromkeys(self.devices.values()):
            for irq in () if device.closed else device.irqs():
                if irq.enabled and irq.cleared_by_reset:
                    irq.suspend()
                    self._suspended.add(irq)

    def rearm_interrupts(self) -> None:
        """Enable them again, with the eventfds that the monitor has for them.  Raises `errors.NoInterrupt`."""
        while self._suspended:
            irq = next(iter(self._suspended))
            if not irq.device.closed:
                irq.rearm()
            self._suspended.discard(irq)

    @staticmethod
    def _address(bus: int, slot: int, function: int) -> int:
        return bus << 16 | slot << 11 | function << 8

    def _close_tables(self) -> None:
        with ExitStack() as newest_first:
            for table in self.tables.values():
                if not table.window.default:
                    newest_first.callback(table.window.close)
                newest_first.callback(table.close)
