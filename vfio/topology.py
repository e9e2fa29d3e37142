"""What a machine consists of: PHBs, devices, groups, PEs, DMA windows. One topology, two machines.

A topology is a TOML file. The lab makes the arguments of QEMU from it, the modelled kernel its answers, and a test holds
its facts against what a real kernel shows on that machine, so the two cannot drift apart. All facts in the files of the
lab's machines were seen on a real kernel; `power7` and `document` say where theirs come from.

    >>> from vfio import topology
    >>> machine = topology.load("power8")
    >>> machine.device("0000:01:00.0").group
    0

The smallest machine, and all that is needed for ``fake:FILE.toml``::

    description = "one device"

    [platform]
    name = "PowerNV"           # or "pSeries"
    cpu = "POWER9"
    mmu = "Radix"
    eeh = true

    [iommu]
    default_window = { start = 0, size = 0x8000_0000, page_size = 4096 }
    second_window_start = 0x0800_0000_0000_0000
    page_sizes = 0x4021_1000   # a mask: 4K 64K 2M 1G
    levels = 5
    windows = 2

    [[phb]]
    domain = 0

    [[phb.device]]
    address = "0000:00:00.0"
    vendor = 0x1234
    device = 0x11e8
    class = 0x00ff00
    group = 0
    pe = 1
    model = "edu"

Sizes and addresses are in bytes. ``topologies/example.toml`` uses every key that the modelled kernel knows, each with its
meaning; ``[machine]``, ``index``, ``slot``, ``root_port``, ``properties`` and ``drive`` are for QEMU, and the last two for
models of devices that know them.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from vfio.topology_table import Origin, Table, TopologyError

__all__ = [
    "Bar",
    "Device",
    "Disk",
    "Driver",
    "Interface",
    "Iommu",
    "Machine",
    "Msix",
    "Pamu",
    "Phb",
    "Platform",
    "Topology",
    "TopologyError",
    "Window",
    "load",
    "names",
    "option_rom",
    "parse",
]

_PACKAGED = Path(__file__).parent / "topologies"
_ADDRESS = re.compile(r"(?P<domain>[0-9a-f]{4,8}):(?P<bus>[0-9a-f]{2}):(?P<slot>[01][0-9a-f])\.(?P<function>[0-7])")
_SLOT = re.compile(r"(?P<slot>[01]?[0-9a-f])\.(?P<function>[0-7])")
_ID = re.compile(r"([0-9a-f]{4}):([0-9a-f]{4})")
_NUMBER = re.compile(r"(\d{1,3}):(\d{1,7})")
_SECTOR, _ROM_DATA = 512, 0x40
"""Unit of the length of an expansion ROM's image, and where its data structure is, bytes."""
_BRIDGE = 0x06
"""The base class of devices that can have a bus below them."""


@dataclass(frozen=True)
class Window:
    """A DMA window: the range of bus addresses that one TCE table translates."""

    start: int  # bus address, bytes
    size: int  # bytes
    page_size: int  # bytes that one TCE covers


@dataclass(frozen=True)
class Pamu:
    """A Freescale PAMU, of which only the model knows."""

    aperture_bits: int  # bits of a bus address: 36
    windows: int  # most windows of a domain, a power of two
    msi_banks: tuple[int, ...]  # physical addresses of the pages to which devices write their MSIs
    cpus: int  # into whose caches a device's writes can be stashed


@dataclass(frozen=True)
class Iommu:
    """What VFIO_IOMMU_SPAPR_TCE_GET_INFO says of every PE of the machine, and where windows appear.

    On a PC there are no windows, but `ranges` of IOVA, and of the rest only `page_sizes` means something.
    """

    default_window: Window
    second_window_start: (
        int  # bus address of the first window created beside the default one; 0 without dynamic windows
    )
    page_sizes: int  # mask: bit n set means IOMMU pages of 1 << n bytes
    levels: int  # most levels that a TCE table can have
    windows: int  # most windows of a PE, the default one included
    dynamic_windows: bool = True  # whether windows can be created and removed (DDW); without, there is no v2 (IODA1)
    ranges: tuple[tuple[int, int], ...] = ()  # Type1: first and last IOVA of what can be mapped, ascending
    pamu: Pamu | None = None  # of a Freescale P4080, which has nothing else of this but `page_sizes`


@dataclass(frozen=True)
class Platform:
    """The host that the kernel sees, in the words of /proc/cpuinfo."""

    name: str  # "PowerNV" (bare metal), "pSeries" (a PAPR guest), "PC" (x86-64) or "P4080DS"
    cpu: str  # "POWER8", ...
    mmu: str  # "Hash" or "Radix"; empty elsewhere
    eeh: bool  # whether EEH answers
    page_size: int = 4096  # host page in bytes, unless the target or the URL says otherwise
    kernel: str = "6.12"  # whose answers the modelled kernel gives, unless the URL says otherwise
    release: str | None = None  # what uname -r says, where it is known
    memory: int = 16 << 30  # bytes of RAM, unless [machine] says


@dataclass(frozen=True)
class Machine:
    """How QEMU is asked for this machine."""

    type: str  # of -machine, with its options
    memory: int  # bytes
    devices: tuple[str, ...]  # arguments of -device that belong to no PHB


@dataclass(frozen=True)
class Driver:
    """A PCI driver of the host's, loaded when the machine has booted."""

    name: str
    ids: tuple[tuple[int, int], ...] = ()  # vendor and device; it also takes every device that names it
    vfio: bool = False  # a variant driver of vfio-pci: its devices are open to VFIO


@dataclass(frozen=True)
class Interface:
    """A network interface."""

    name: str
    up: bool = True


@dataclass(frozen=True)
class Disk:
    """A block device, a partition too, and what the host uses it for."""

    name: str
    number: tuple[int, int]  # major, minor
    mounted: tuple[str, ...] = ()  # where
    swap: bool = False
    btrfs: bool = False  # a member of a btrfs that is mounted under another member's name
    holders: tuple[str, ...] = ()  # what is built on it: dm-0, md0
    multipath: bool = False  # an NVMe namespace that hangs under its subsystem rather than under one controller


@dataclass(frozen=True)
class Bar:
    """A BAR of a function."""

    index: int  # 0 to 5; a 64-bit one takes the next as well
    size: int  # bytes, a power of two
    io: bool = False  # I/O ports, not memory
    bits64: bool = False  # can be anywhere in 64 bits
    prefetchable: bool = False


@dataclass(frozen=True)
class Msix:
    """The MSI-X table of a function."""

    vectors: int  # 0: it has no MSI-X
    bar: int = 0  # index of the BAR with the table and the pending bits
    table: int = 0  # where the table is in it, bytes
    pba: int = 0  # where the pending bits are, bytes


@dataclass(frozen=True)
class Device:
    """A PCI function."""

    model: str  # of QEMU's -device: "edu", "nvme", ...; what the modelled kernel does not know is a plain endpoint
    address: str  # domain:bus:slot.function, as sysfs names it
    vendor: int  # PCI vendor ID
    device: int  # PCI device ID
    device_class: int  # PCI class code, 24 bits
    slot: str = ""  # slot.function on the bus below the PHB; empty for the root port
    group: int | None = None  # IOMMU group; on POWER bridges have none
    pe: int | None = None  # PE number
    reset: tuple[str, ...] = ()  # ways to reset it, in the order of sysfs reset_method; empty: it has none
    properties: tuple[tuple[str, str], ...] = ()  # of QEMU's -device
    drive: int = 0  # bytes of the backing drive, for a device that has one
    bars: tuple[Bar, ...] | None = None  # None: those of the model
    msix: Msix | None = None  # None: that of the model, as far as its BAR is there
    rom: int = 0  # bytes of the expansion ROM, a power of two; `option_rom` is in it; 0: the function has none
    subsystem_vendor: int | None = None
    subsystem_device: int | None = None
    revision: int | None = None  # of these three, None is what the model has
    secondary_bus: int | None = None  # a bridge: number of the bus below it
    window: Window | None = None  # the default window of its PE, where that is not the machine's
    driver: str | None = None  # of the host's, that has it after boot
    driver_override: str | None = None  # that was written before
    overridable: bool = True  # whether there is a driver_override file (kernels before 3.16 have none)
    physical_slot: str | None = None  # name of the slot of the host's that it is in
    interfaces: tuple[Interface, ...] = ()
    disks: tuple[Disk, ...] = ()

    @property
    def bus(self) -> int:
        """Number of the bus that it sits on."""
        return int(self.address.split(":")[1], 16)


@dataclass(frozen=True)
class Phb:
    """A PCI host bridge."""

    index: int  # of QEMU's PHB
    domain: int  # PCI domain that the kernel gives it
    devices: tuple[Device, ...]
    root_port: Device | None = None  # absent on pseries, whose devices sit on the PHB's own bus

    @property
    def functions(self) -> tuple[Device, ...]:
        """The root port, if there is one, and the devices, as the kernel meets them."""
        return (self.root_port, *self.devices) if self.root_port else self.devices

    def parent(self, device: Device) -> Device | None:
        """The bridge above a device; None on a root bus."""
        return next((each for each in self.functions if each.secondary_bus == device.bus), None)


@dataclass(frozen=True)
class Topology:
    """A machine."""

    name: str
    description: str
    platform: Platform
    iommu: Iommu
    machine: Machine | None  # None: not a machine of the lab
    phbs: tuple[Phb, ...]
    drivers: tuple[Driver, ...] = ()

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices of every PHB, without the root ports."""
        return tuple(device for phb in self.phbs for device in phb.devices)

    @property
    def memory(self) -> int:
        """Bytes of RAM."""
        return self.machine.memory if self.machine else self.platform.memory

    def device(self, address: str) -> Device:
        """The device, or the root port, at `address`. Raises KeyError."""
        for phb in self.phbs:
            for device in phb.functions:
                if device.address == address:
                    return device
        raise KeyError(f"{self.name} has no device {address}")

    def groups(self) -> dict[int, tuple[Device, ...]]:
        """The devices of every IOMMU group."""
        found: dict[int, tuple[Device, ...]] = {}
        for device in self.devices:
            if device.group is not None:
                found[device.group] = (*found.get(device.group, ()), device)
        return found

    def default_window(self, group: int) -> Window:
        """The window that the PE of this group has at boot."""
        own = (device.window for device in self.groups().get(group, ()) if device.window)
        return next(own, self.iommu.default_window)

    def only(self, indexes: Iterable[int]) -> Topology:
        """The same machine with only these PHBs, which starts faster. The kernel numbers groups as it finds them, so
        groups are numbered anew; domains and PEs stay. Raises ValueError for a PHB that is not there."""
        wanted = set(indexes)
        if missing := wanted - {phb.index for phb in self.phbs}:
            have = ", ".join(str(phb.index) for phb in self.phbs)
            raise ValueError(f"{self.name} has no PHB {min(missing)}; it has {have}")
        phbs = [phb for phb in self.phbs if phb.index in wanted]
        groups = sorted({device.group for phb in phbs for device in phb.devices if device.group is not None})
        renumbered = {old: new for new, old in enumerate(groups)}

        def moved(device: Device) -> Device:
            return device if device.group is None else replace(device, group=renumbered[device.group])

        return replace(self, phbs=tuple(replace(phb, devices=tuple(map(moved, phb.devices))) for phb in phbs))


def option_rom(size: int) -> bytes:
    """What is in an expansion ROM of `size` bytes: an image that ends 512 bytes before it does (PCI Firmware
    Specification, 5.1)."""
    length = size - _SECTOR
    data = b"PCIR" + bytes(6) + b"\x18\0" + bytes(4) + (length // _SECTOR).to_bytes(2, "little") + bytes(3) + b"\x80"
    header = b"\x55\xaa" + bytes(22) + _ROM_DATA.to_bytes(2, "little")
    start = header.ljust(_ROM_DATA, b"\0") + data.ljust(_SECTOR - _ROM_DATA, b"\0")
    return start + (bytes(range(256)) * (length // 256))[: length - len(start)]


def names() -> list[str]:
    """The packaged topologies."""
    return sorted(path.stem for path in _PACKAGED.glob("*.toml"))


def load(name_or_path: str | Path) -> Topology:
    """Read a packaged topology by its name, or any topology file by its path (with a slash, or ending in .toml).

    Raises TopologyError for a file that is missing, is not TOML, or breaks a rule: an unknown key, a missing one, a
    wrong type, an address that contradicts its PHB or slot, a PE or group used twice.
    """
    text = str(name_or_path)
    path = Path(text)
    if "/" not in text and path.suffix != ".toml":
        path = _PACKAGED / f"{text}.toml"
        if not path.exists():
            raise TopologyError(f"no topology {text!r}; there are {', '.join(names())}, or give the path of a file")
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise TopologyError(f"{path}: cannot be read: {error}") from error
    return parse(source, str(path))


def parse(source: str, file: str = "<topology>") -> Topology:
    """A topology from the text of a file; `file` is its name in errors. Raises TopologyError."""
    try:
        data = tomllib.loads(source)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise TopologyError(f"{file}: not TOML: {error}") from error
    root = Table(data, (), Origin(file, source))
    description, platform = root.text("description"), _platform(root.table("platform"))
    topology = Topology(
        name=Path(file).stem,
        description=description,
        platform=platform,
        iommu={"PC": _type1, "P4080DS": _pamu}.get(platform.name, _iommu)(root.table("iommu")),
        machine=_machine(root.table("machine")) if root.has("machine") else None,
        phbs=tuple(_phb(table, place) for place, table in enumerate(root.tables("phb"))),
        drivers=tuple(_driver(table) for table in root.optional_tables("driver")),
    )
    root.end()
    _check_whole(topology, root)
    return topology


def _platform(table: Table) -> Platform:
    name = table.text("name", one_of=("PowerNV", "pSeries", "PC", "P4080DS"))
    power = name in ("PowerNV", "pSeries")
    platform = Platform(
        name=name,
        cpu=table.text("cpu"),
        mmu=table.text("mmu", one_of=("Hash", "Radix")) if power else "",
        eeh=table.boolean("eeh") if power else False,
        page_size=table.integer("page_size", 4096, 65536) if table.has("page_size") else 4096,
        kernel=table.text("kernel", one_of=("6.12", "7.2")) if table.has("kernel") else "6.12",
        release=table.optional_name("release"),
        memory=table.integer("memory", minimum=1 << 20) if table.has("memory") else 16 << 30,
    )
    if platform.page_size not in (4096, 65536):
        raise table.error("page_size", f"{platform.page_size} is not 4096 or 65536")
    table.end()
    return platform


def _iommu(table: Table) -> Iommu:
    dynamic = table.boolean("dynamic_windows") if table.has("dynamic_windows") else True
    default = _window(table.table("default_window"))
    page_sizes = table.integer("page_sizes", minimum=1)
    if not page_sizes & default.page_size:
        raise table.error("page_sizes", f"{page_sizes:#x} lacks the default window's page size {default.page_size:#x}")
    start = 0
    if dynamic:
        start = table.integer("second_window_start")
        if start < default.start + default.size:
            raise table.error("second_window_start", f"{start:#x} lies inside or below the default window")
    iommu = Iommu(
        default_window=default,
        second_window_start=start,
        page_sizes=page_sizes,
        levels=table.integer("levels", 1, 5),
        windows=table.integer("windows", 1, 2),
        dynamic_windows=dynamic,
    )
    table.end()
    return iommu


def _type1(table: Table) -> Iommu:
    """The IOMMU of a PC: no windows, ranges of IOVA."""
    page_sizes = table.integer("page_sizes", minimum=1)
    page = page_sizes & -page_sizes
    ranges: list[tuple[int, int]] = []
    for each in table.tables("ranges"):
        start, end = each.integer("start"), each.integer("end")
        if start % page or (end + 1) % page or not (ranges[-1][1] if ranges else -1) < start < end:
            raise each.error("start", f"{start:#x}..{end:#x}: ranges are whole pages of {page} bytes, and ascend")
        each.end()
        ranges.append((start, end))
    table.end()
    return Iommu(Window(0, 0, page), 0, page_sizes, levels=0, windows=0, dynamic_windows=False, ranges=tuple(ranges))


def _pamu(table: Table) -> Iommu:
    """The IOMMU of a P4080: a domain has one aperture, cut into windows of one size."""
    page_sizes = table.integer("page_sizes", minimum=1)
    pamu = Pamu(
        aperture_bits=table.integer("aperture_bits", 32, 64),
        windows=_power_of_two(table, "windows", minimum=1),
        msi_banks=tuple(table.integers("msi_banks")),
        cpus=table.integer("cpus", minimum=1),
    )
    table.end()
    return Iommu(Window(0, 0, 4096), 0, page_sizes, levels=0, windows=0, dynamic_windows=False, pamu=pamu)


def _window(table: Table) -> Window:
    window = Window(
        start=table.integer("start"),
        size=table.integer("size", minimum=1),
        page_size=table.integer("page_size", minimum=1),
    )
    if window.page_size & (window.page_size - 1) or window.size % window.page_size:
        raise table.error("page_size", "must be a power of two that divides the size")
    table.end()
    return window


def _machine(table: Table) -> Machine:
    machine = Machine(
        type=table.text("type"),
        memory=table.integer("memory", minimum=1 << 20),
        devices=tuple(table.texts("devices")),
    )
    table.end()
    return machine


def _driver(table: Table) -> Driver:
    ids = []
    for text in table.texts("ids") if table.has("ids") else ():
        parts = _ID.fullmatch(text)
        if not parts:
            raise table.error("ids", f"{text!r} is not of the form 14e4:1657 (vendor:device, lower-case hexadecimal)")
        ids.append((int(parts[1], 16), int(parts[2], 16)))
    driver = Driver(table.name("name"), tuple(ids), table.boolean("vfio") if table.has("vfio") else False)
    table.end()
    return driver


def _phb(table: Table, place: int) -> Phb:
    domain = table.integer("domain", maximum=0xFFFFFFFF)
    root_port = table.table("root_port") if table.has("root_port") else None
    index = table.integer("index") if table.has("index") else place
    devices = tuple(_device(device, domain, on_bus=True) for device in table.tables("device"))
    phb = Phb(
        index=index,
        domain=domain,
        root_port=_root_port(_device(root_port, domain, on_bus=False), devices) if root_port else None,
        devices=devices,
    )
    table.end()
    return phb


def _root_port(port: Device, devices: tuple[Device, ...]) -> Device:
    """The bus below a root port is that of the first device, unless it is said."""
    return port if port.secondary_bus is not None else replace(port, secondary_bus=devices[0].bus)


def _device(table: Table, domain: int, on_bus: bool) -> Device:
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
        rom=_power_of_two(table, "rom", minimum=2048) if table.has("rom") else 0,
        subsystem_vendor=table.optional("subsystem_vendor", maximum=0xFFFF),
        subsystem_device=table.optional("subsystem_device", maximum=0xFFFF),
        revision=table.optional("revision", maximum=0xFF),
        secondary_bus=table.optional("secondary_bus", minimum=1, maximum=0xFF),
        window=_window(table.table("window")) if table.has("window") else None,
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
            size=_power_of_two(table, "size", minimum=4),
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


def _power_of_two(table: Table, key: str, minimum: int) -> int:
    size = table.integer(key, minimum)
    if size.bit_count() != 1:
        raise table.error(key, f"{size:#x} is not a power of two")
    return size


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


def _check_whole(topology: Topology, root: Table) -> None:
    """Rules between PHBs and devices."""
    taken: set[str] = set()
    pes: dict[int, str] = {}

    def once(what: str, *path: str | int) -> None:
        if what in taken:
            raise root.error(path, f"{what} is used twice")
        taken.add(what)

    for i, phb in enumerate(topology.phbs):
        once(f"index {phb.index}", "phb", i, "index")
        once(f"domain {phb.domain}", "phb", i, "domain")
        if phb.root_port:
            once(phb.root_port.address, "phb", i, "root_port", "address")
            once(f"bus {phb.domain:04x}:{phb.root_port.secondary_bus:02x}", "phb", i, "root_port", "secondary_bus")
        for j, device in enumerate(phb.devices):
            here = ("phb", i, "device", j)
            once(device.address, *here, "address")
            if device.secondary_bus is not None:
                once(f"bus {phb.domain:04x}:{device.secondary_bus:02x}", *here, "secondary_bus")
                if device.secondary_bus <= device.bus:
                    raise root.error((*here, "secondary_bus"), f"bus {device.secondary_bus} is not below {device.bus}")
            if device.group is not None:
                owner = f"domain {phb.domain}, PE {device.pe}"
                if pes.setdefault(device.group, owner) != owner:
                    where = pes[device.group]
                    raise root.error((*here, "group"), f"group {device.group} is one PE, and already that of {where}")
                if device.window and topology.default_window(device.group) != device.window:
                    raise root.error((*here, "window"), f"contradicts the window that group {device.group} has already")
    for k, driver in enumerate(topology.drivers):
        once(f"driver {driver.name}", "driver", k, "name")
