"""Where a host puts the BARs of its functions, and how it numbers their interrupts: as real hosts of the lab did."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vfio.fake import devices

if TYPE_CHECKING:
    from vfio import topology
    from vfio.fake.machine import Machine
    from vfio.fake.pci import Bar

_FIRST_INTERRUPT = {"POWER8": 30, "POWER9": 38, "POWER10": 38}
_IO_START, _PC_IO_START = 0x1000, 0xC000
_PC_MEMORY_END = 0xFEC0_0000
"""Where the interrupt controllers begin: a PC's BARs end below it."""
_PC_LINES = (10, 10, 11, 11)
"""The interrupts behind the lines of a PC's slots, which share them in turn."""


class _Window(NamedTuple):
    """A range of CPU addresses that a PHB forwards; the next PHB's begins `stride` bytes behind."""

    start: int
    stride: int
    bus_start: int | None
    """Where it begins on the bus; None where addresses are the same there."""


_WINDOWS = {
    "POWER8": (_Window(0x3FF8000000000, 0x80000000, 0x80000000), _Window(0x3D00000000000, 1 << 36, None)),
    "POWER9": (_Window(0x600C000000000, 0x80000000, 0x80000000), _Window(0x6000000000000, 1 << 38, None)),
    "PC": (_Window(0, 0, None), _Window(0x800000000, 1 << 36, None)),
    "pSeries": (_Window(0x200080000000, 0x80000000, 0x80000000), _Window(0x210000000000, 1 << 40, None)),
}
"""Of each platform: the one below 4 GiB on the bus, and the one for 64-bit BARs, on powernv for prefetchable ones."""
_LIKE = {"POWER7": "POWER8", "POWER10": "POWER9"}


def place_bars(machine: Machine, phb: topology.Phb) -> dict[str, dict[int, tuple[int, int, bool]]]:
    """Where the host puts the BARs below a PHB: by address and index, the CPU address, the address on the bus, and
    whether it is aligned to more than its size.

    What is aligned most comes first; a PC's memory is filled from its end; powernv gives every BAR pages of its own
    (pnv_pci_default_alignment), and has no I/O ports to give.
    """
    platform = machine.topology.platform
    powernv = platform.name == "PowerNV"
    windows = _WINDOWS.get(_LIKE.get(platform.cpu, platform.cpu) if powernv else platform.name, _WINDOWS["POWER9"])
    least = machine.page_size if powernv else 1
    places: dict[str, dict[int, tuple[int, int, bool]]] = {device.address: {} for device in phb.functions}
    models = {device.address: devices.make_model(device) for device in phb.functions}
    bars = [(address, bar) for address, model in models.items() for bar in model.bars]
    pc = platform.name == "PC"
    used = [_pc_memory([bar for _, bar in bars]) if pc else 0, 0]
    io = _PC_IO_START if pc else _IO_START
    for address, bar in sorted(bars, key=lambda pair: -max(pair[1].size, least)):
        if not bar.io:
            align = max(bar.size, least)
            which = int(bar.bits64 and (bar.prefetch or not powernv))
            window = windows[which]
            at = -(-used[which] // align) * align
            used[which] = at + bar.size
            start = window.start + phb.index * window.stride + at
            bus_address = start if window.bus_start is None else window.bus_start + at
            places[address][bar.index] = start, bus_address, align > bar.size
        elif not powernv:
            io = -(-io // bar.size) * bar.size
            start = models[address].bars_at.get(bar.index, io)
            places[address][bar.index] = start, start, False
            io += bar.size
    return places


def _pc_memory(bars: list[Bar]) -> int:
    """Where the memory of a PC's BARs begins."""
    sizes = [bar.size for bar in bars if not bar.io and not bar.bits64]
    align = max(sizes, default=1)
    return (_PC_MEMORY_END - sum(sizes)) // align * align


def interrupt_number(machine: Machine, address: str) -> int:
    """A number of the host's for the line: one a slot, counted from what real hosts of the kind begin with; a PC's is
    that of its firmware."""
    if machine.topology.platform.name == "PC":
        return _PC_LINES[int(address[8:10], 16) % len(_PC_LINES)]
    slots = []
    for phb in machine.topology.phbs:
        for device in phb.devices:
            slot = device.address.rpartition(".")[0]
            if slot not in slots:
                slots.append(slot)
    platform = machine.topology.platform
    first = _FIRST_INTERRUPT.get(platform.cpu, 16) if platform.name == "PowerNV" else 18
    slot = address.rpartition(".")[0]
    return first + (slots.index(slot) if slot in slots else len(slots))
