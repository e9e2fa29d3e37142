"""The table of a device in a topology, with what belongs to it: BARs, MSI-X, interfaces, disks."""

from __future__ import annotations

import re

from vfio import topology_iommu
from vfio.topology_parts import Bar, Device, Disk, Interface, Msix
from vfio.topology_table import Table

_ADDRESS = re.compile(r"(?P<domain>[0-9a-f]{4,8}):(?P<bus>[0-9a-f]{2}):(?P<slot>[01][0-9a-f])\.(?P<function>[0-7])")
_RESERVED_PAGE = 4096
_SLOT = re.compile(r"(?P<slot>[01]?[0-9a-f])\.(?P<function>[0-7])")
_NUMBER = re.compile(r"(\d{1,3}):(\d{1,7})")
_BRIDGE = 0x06
"""The base class of devices that can have a bus below them."""


def device(table: Table, domain: int, on_bus: bool) -> Device:
    """A device of the PHB of that domain: one on its bus, or the root port above it."""
    address = table.text("address")
    parts = _ADDRESS.fullmatch(address)
    if not parts:
        raise table.error("address", f"{address!r} is not of the form 0000:01:00.0 (lower-case hexadecimal)")
    if parts["domain"] != f"{domain:04x}":
        raise table.error("address", f"{address} is not in the PHB's domain {domain:04x}")
    slot = ""
    if on_bus:
        slot = table.text("slot") if table.has("slot") else f"{int(parts['slot'], 16):x}.{parts['function']}"
        place = _SLOT.fullmatch(slot)
        if not place:
            raise table.error("slot", f"{slot!r} is not of the form 0.1 (slot.function, hexadecimal)")
        if (int(place["slot"], 16), place["function"]) != (int(parts["slot"], 16), parts["function"]):
            raise table.error("slot", f"{slot} contradicts the address {address}")
    device = Device(
        model=table.text("model"),
        address=address,
        slot=slot,
        vendor=table.integer("vendor", maximum=0xFFFF),
        device=table.integer("device", maximum=0xFFFF),
        device_class=table.integer("class", maximum=0xFFFFFF),
        group=table.optional("group", maximum=0x7FFFFFFF) if on_bus else None,
        pe=table.optional("pe", maximum=0xFFFFFFFF),
        reset=tuple(table.texts("reset")) if table.has("reset") else (),
        properties=table.properties("properties"),
        drive=table.integer("drive", minimum=512) if table.has("drive") else 0,
        bars=_bars(table) if table.has("bars") else None,
        msix=_msix(table.table("msix")) if table.has("msix") else None,
        rom=table.power_of_two("rom", minimum=2048) if table.has("rom") else 0,
        subsystem_vendor=table.optional("subsystem_vendor", maximum=0xFFFF),
        subsystem_device=table.optional("subsystem_device", maximum=0xFFFF),
        revision=table.optional("revision", maximum=0xFF),
        secondary_bus=table.optional("secondary_bus", minimum=1, maximum=0xFF),
        window=topology_iommu.window(table.table("window")) if table.has("window") else None,
        reserved=topology_iommu.ranges(table.optional_tables("reserved"), _RESERVED_PAGE),
        driver=table.optional_name("driver"),
        driver_override=table.optional_name("driver_override"),
        overridable=table.boolean("overridable") if table.has("overridable") else True,
        physical_slot=table.optional_name("physical_slot"),
        interfaces=tuple(_interface(each) for each in table.optional_tables("interfaces")),
        disks=tuple(_disk(each) for each in table.optional_tables("disks")),
    )
    if device.secondary_bus is not None and device.device_class >> 16 != _BRIDGE:
        raise table.error("secondary_bus", f"a device of class {device.device_class:#08x} is no bridge")
    if device.bars is not None and device.msix and device.msix.vectors:
        table_end = device.msix.table + 16 * device.msix.vectors
        if not any(bar.index == device.msix.bar and not bar.io and bar.size >= table_end for bar in device.bars):
            raise table.error(
                "msix", f"BAR {device.msix.bar} is no memory of {table_end:#x} bytes, where the table ends"
            )
    table.end()
    return device


def _bars(device: Table) -> tuple[Bar, ...]:
    bars = []
    taken: set[int] = set()
    for table in device.tables("bars", empty=True):
        bar = Bar(
            index=table.integer("bar", maximum=5),
            size=table.power_of_two("size", minimum=4),
            io=table.boolean("io") if table.has("io") else False,
            bits64=table.boolean("bits64") if table.has("bits64") else False,
            prefetchable=table.boolean("prefetchable") if table.has("prefetchable") else False,
        )
        indexes = {bar.index, bar.index + 1} if bar.bits64 else {bar.index}
        if indexes & taken or max(indexes) > 5:
            raise table.error("bar", f"BAR {max(indexes)} is used twice, or there is none (a 64-bit BAR takes two)")
        if bar.io and (bar.bits64 or bar.prefetchable):
            raise table.error("io", "I/O ports are neither 64-bit nor prefetchable")
        taken |= indexes
        table.end()
        bars.append(bar)
    return tuple(bars)


def _msix(table: Table) -> Msix:
    vectors = table.integer("vectors", maximum=2048)
    msix = Msix(vectors)
    if vectors:
        msix = Msix(
            vectors,
            bar=table.integer("bar", maximum=5),
            table=table.integer("table", maximum=0xFFFF_FFF8),
            pba=table.integer("pba", maximum=0xFFFF_FFF8),
        )
    for key, offset in (("table", msix.table), ("pba", msix.pba)):
        if offset % 8:
            raise table.error(key, f"{offset:#x} is not a multiple of 8")
    table.end()
    return msix


def _interface(table: Table) -> Interface:
    interface = Interface(table.name("name"), table.boolean("up") if table.has("up") else True)
    table.end()
    return interface


def _disk(table: Table) -> Disk:
    number = table.text("number")
    parts = _NUMBER.fullmatch(number)
    if not parts:
        raise table.error("number", f"{number!r} is not of the form 259:0 (major:minor)")
    disk = Disk(
        name=table.name("name"),
        number=(int(parts[1]), int(parts[2])),
        mounted=tuple(table.texts("mounted")) if table.has("mounted") else (),
        swap=table.boolean("swap") if table.has("swap") else False,
        btrfs=table.boolean("btrfs") if table.has("btrfs") else False,
        holders=tuple(table.texts("holders")) if table.has("holders") else (),
        multipath=table.boolean("multipath") if table.has("multipath") else False,
    )
    table.end()
    return disk
