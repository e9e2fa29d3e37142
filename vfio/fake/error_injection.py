"""Errors that VFIO_EEH_PE_INJECT_ERR asks for: they wait in the PHB for an access to hit, and freeze its PE.

What the firmware does with the address and the mask is skiboot's (hw/phb3.c): an address of the PE's own is compared
under the mask, any other stands for all that the PE has.  No such hardware was at hand, and QEMU injects nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from vfio.fake.eeh_pe import EehPe
    from vfio.fake.pe import Pe

Kind = Literal["memory", "config", "dma"]

_LOAD_MEMORY, _STORE_MEMORY = (0, 1), (6, 7)
_LOAD_CONFIG, _STORE_CONFIG = (4, 5), (10, 11)
_DMA, _DMA_WRITE = range(12, 20), range(16, 20)
LAST_FUNCTION = 19

_BUS_SHIFT, _DEVFN_SHIFT = 52, 44
"""Where the registers for injection have the bus of a configuration access, and device and function."""


class InjectedError(NamedTuple):
    """An error that waits: it hits accesses of this kind whose address is `address` in the bits of `mask`."""

    kind: Kind
    write: bool
    address: int
    mask: int

    def hits(self, kind: Kind, write: bool, address: int) -> bool:
        return (kind, write) == (self.kind, self.write) and not (address ^ self.address) & self.mask


def firmware_takes(pe: Pe, function: int, high: bool) -> bool:
    """Whether the firmware takes such an error; `high`: of 64-bit addresses.

    PHB4 and later inject into configuration space only; PHB3 into memory space as well, and into a DMA window that
    there is.
    """
    if function in (*_LOAD_CONFIG, *_STORE_CONFIG):
        return True
    if pe.machine.topology.platform.cpu not in ("POWER7", "POWER8"):
        return False
    if function in _DMA:
        return _window(pe, high) is not None
    return function in (*_LOAD_MEMORY, *_STORE_MEMORY)


def inject(pe: Pe, function: int, high: bool, address: int, mask: int) -> None:
    """Let the next access that `function` is about hit an error; one that waits already is forgotten."""
    pe.eeh.injected = None
    if not pe.machine.freezes:
        return
    if function in _DMA:
        window = _window(pe, high)
        assert window is not None
        if not address or address not in window:
            address, mask = window.start, -len(window)
        pe.eeh.injected = InjectedError("dma", function in _DMA_WRITE, address, mask)
    elif function in (*_LOAD_CONFIG, *_STORE_CONFIG):
        bus = pe.devices[0].bus
        if address >> _BUS_SHIFT & 0xFF != bus:
            address, mask = bus << _BUS_SHIFT, 0xFF << _BUS_SHIFT
        pe.eeh.injected = InjectedError("config", function in _STORE_CONFIG, address, mask)
    else:
        bars = [bar for device in pe.devices for bar in device.bars.values() if bar.start and not bar.io]
        if not any(bar.bus_address <= address < bar.bus_address + bar.size for bar in bars):
            address = mask = 0
        pe.eeh.injected = InjectedError("memory", function in _STORE_MEMORY, address, mask)


def hit(pe: EehPe | None, kind: Kind, write: bool, address: int) -> bool:
    """An access is made: if the waiting error hits it, the PE freezes, and the access comes to nothing."""
    if pe is None or pe.injected is None or not pe.injected.hits(kind, write, address):
        return False
    pe.injected = None
    pe.machine.eeh.hardware_error(pe)
    return True


def config_address(bus: int, devfn: int) -> int:
    """A configuration access as the registers for injection have it: without the register that it is to."""
    return bus << _BUS_SHIFT | devfn << _DEVFN_SHIFT


def _window(pe: Pe, high: bool) -> range | None:
    """The bus addresses of the window of that kind, if it is there."""
    group = pe.table_group
    start = group.second_start if high else group.tce32_start
    table = next((table for table in group.tables if table is not None and table.start == start), None)
    return None if table is None else range(table.start, table.start + table.size)
