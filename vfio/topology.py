"""What a machine consists of: PHBs, devices, groups, PEs, DMA windows. One topology, two machines.

A topology is a TOML file. The lab makes the arguments of QEMU from it, the modelled kernel its answers, and a test holds
its facts against what a real kernel shows on that machine, so the two cannot drift apart. All facts in the packaged
files were seen on a real kernel.

    >>> from vfio import topology
    >>> machine = topology.load("power8")
    >>> machine.device("0000:01:00.0").group
    0
"""

import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_PACKAGED = Path(__file__).parent / "topologies"
_ADDRESS = re.compile(r"(?P<domain>[0-9a-f]{4}):(?P<bus>[0-9a-f]{2}):(?P<slot>[01][0-9a-f])\.(?P<function>[0-7])")
_SLOT = re.compile(r"(?P<slot>[01]?[0-9a-f])\.(?P<function>[0-7])")


class TopologyError(ValueError):
    """A topology file breaks a rule; the message names the file, the line where it can be found, the key and the
    rule."""


@dataclass(frozen=True)
class Window:
    """A DMA window: the range of bus addresses that one TCE table translates."""

    start: int  # bus address, bytes
    size: int  # bytes
    page_size: int  # bytes that one TCE covers


@dataclass(frozen=True)
class Iommu:
    """What VFIO_IOMMU_SPAPR_TCE_GET_INFO says of every PE of the machine, and where windows appear."""

    default_window: Window
    second_window_start: int  # bus address of the first window created beside the default one
    page_sizes: int  # mask: bit n set means IOMMU pages of 1 << n bytes
    levels: int  # most levels that a TCE table can have
    windows: int  # most windows of a PE, the default one included


@dataclass(frozen=True)
class Platform:
    """The host that the kernel sees, in the words of /proc/cpuinfo."""

    name: str  # "PowerNV" (bare metal) or "pSeries" (a PAPR guest)
    cpu: str  # "POWER8", ...
    mmu: str  # "Hash" or "Radix"
    eeh: bool  # whether EEH answers


@dataclass(frozen=True)
class Machine:
    """How QEMU is asked for this machine."""

    type: str  # of -machine, with its options
    memory: int  # bytes
    devices: tuple[str, ...]  # arguments of -device that belong to no PHB


@dataclass(frozen=True)
class Device:
    """A PCI function."""

    model: str  # of QEMU's -device: "edu", "nvme", ...
    address: str  # domain:bus:slot.function, as sysfs names it
    vendor: int  # PCI vendor ID
    device: int  # PCI device ID
    device_class: int  # PCI class code, 24 bits
    slot: str = ""  # slot.function on the bus below the PHB; empty for the root port
    group: int | None = None  # IOMMU group; bridges have none
    pe: int | None = None  # PE number
    reset: tuple[str, ...] = ()  # ways to reset it, in the order of sysfs reset_method; empty: it has none
    properties: tuple[tuple[str, str], ...] = ()  # of QEMU's -device
    drive: int = 0  # bytes of the backing drive, for a device that has one


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


@dataclass(frozen=True)
class Topology:
    """A machine."""

    name: str
    description: str
    platform: Platform
    iommu: Iommu
    machine: Machine
    phbs: tuple[Phb, ...]

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices of every PHB, without the root ports."""
        return tuple(device for phb in self.phbs for device in phb.devices)

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

    def only(self, indexes: Iterable[int]) -> "Topology":
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
    except (OSError, UnicodeDecodeError) as error:
        raise TopologyError(f"{path}: cannot be read: {error}") from error
    return parse(source, str(path))


def parse(source: str, file: str = "<topology>") -> Topology:
    """A topology from the text of a file; `file` is its name in errors. Raises TopologyError."""
    try:
        data = tomllib.loads(source)
    except tomllib.TOMLDecodeError as error:
        raise TopologyError(f"{file}: not TOML: {error}") from error
    root = _Table(data, (), _Origin(file, source))
    name = Path(file).stem
    topology = Topology(
        name=name,
        description=root.text("description"),
        platform=_platform(root.table("platform")),
        iommu=_iommu(root.table("iommu")),
        machine=_machine(root.table("machine")),
        phbs=tuple(_phb(table) for table in root.tables("phb")),
    )
    root.end()
    _check_whole(topology, root)
    return topology


def _platform(table: "_Table") -> Platform:
    platform = Platform(
        name=table.text("name", one_of=("PowerNV", "pSeries")),
        cpu=table.text("cpu"),
        mmu=table.text("mmu", one_of=("Hash", "Radix")),
        eeh=table.boolean("eeh"),
    )
    table.end()
    return platform


def _iommu(table: "_Table") -> Iommu:
    window = table.table("default_window")
    default = Window(
        start=window.integer("start"),
        size=window.integer("size", minimum=1),
        page_size=window.integer("page_size", minimum=1),
    )
    if default.page_size & (default.page_size - 1) or default.size % default.page_size:
        raise window.error("page_size", "must be a power of two that divides the size")
    window.end()
    page_sizes = table.integer("page_sizes", minimum=1)
    if not page_sizes & default.page_size:
        raise table.error("page_sizes", f"{page_sizes:#x} lacks the default window's page size {default.page_size:#x}")
    start = table.integer("second_window_start")
    if start < default.start + default.size:
        raise table.error("second_window_start", f"{start:#x} lies inside or below the default window")
    iommu = Iommu(default, start, page_sizes, table.integer("levels", minimum=1), table.integer("windows", minimum=1))
    table.end()
    return iommu


def _machine(table: "_Table") -> Machine:
    machine = Machine(
        type=table.text("type"),
        memory=table.integer("memory", minimum=1 << 20),
        devices=tuple(table.texts("devices")),
    )
    table.end()
    return machine


def _phb(table: "_Table") -> Phb:
    domain = table.integer("domain", maximum=0xFFFF)
    root_port = table.table("root_port") if table.has("root_port") else None
    phb = Phb(
        index=table.integer("index"),
        domain=domain,
        root_port=_device(root_port, domain, on_bus=False) if root_port else None,
        devices=tuple(_device(device, domain, on_bus=True) for device in table.tables("device")),
    )
    table.end()
    return phb


def _device(table: "_Table", domain: int, on_bus: bool) -> Device:
    address = table.text("address")
    parts = _ADDRESS.fullmatch(address)
    if not parts:
        raise table.error("address", f"{address!r} is not of the form 0000:01:00.0 (lower-case hexadecimal)")
    if int(parts["domain"], 16) != domain:
        raise table.error("address", f"{address} is not in the PHB's domain {domain:04x}")
    slot = table.text("slot") if on_bus else ""
    if on_bus:
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
        group=table.integer("group") if on_bus else None,
        pe=table.integer("pe") if table.has("pe") else None,
        reset=tuple(table.texts("reset")) if table.has("reset") else (),
        properties=table.properties("properties"),
        drive=table.integer("drive", minimum=512) if table.has("drive") else 0,
    )
    table.end()
    return device


def _check_whole(topology: Topology, root: "_Table") -> None:
    """Rules between PHBs and devices."""
    places: dict[str, str] = {}
    for i, phb in enumerate(topology.phbs):
        for key in (f"index {phb.index}", f"domain {phb.domain}"):
            if key in places:
                raise root.error(("phb", i, key.split()[0]), f"{key} is used twice")
            places[key] = key
        for j, device in enumerate(phb.devices):
            if device.address in places:
                raise root.error(("phb", i, "device", j, "address"), f"{device.address} is used twice")
            places[device.address] = device.address
            owner = f"domain {phb.domain}, PE {device.pe}"
            if places.setdefault(f"group {device.group}", owner) != owner:
                where = places[f"group {device.group}"]
                raise root.error(
                    ("phb", i, "device", j, "group"), f"group {device.group} is one PE, and already that of {where}"
                )


@dataclass(frozen=True)
class _Origin:
    """The text that a topology comes from, to say where in it a key is."""

    file: str
    source: str

    def line(self, path: tuple[str | int, ...]) -> int | None:
        """The line of the key at `path`, of the nearest table above it where it has no line of its own, or None."""
        best, best_length = None, 0
        here: tuple[str | int, ...] = ()
        counts: dict[tuple[str | int, ...], int] = {}
        for number, line in enumerate(self.source.splitlines(), start=1):
            if header := re.match(r"\s*(\[\[?)\s*([\w.]+)\s*\]", line):
                here = ()
                parts = header[2].split(".")
                for depth, part in enumerate(parts, start=1):
                    here += (part,)
                    if header[1] == "[[" and depth == len(parts):
                        counts[here] = counts.get(here, -1) + 1
                    if here in counts:
                        here += (counts[here],)
                candidate = here
            elif key := re.match(r"\s*([\w-]+)\s*=", line):
                candidate = (*here, key[1])
            else:
                continue
            if path[: len(candidate)] == candidate and len(candidate) > best_length:
                best, best_length = number, len(candidate)
        return best


class _Table:
    """A TOML table that is read key by key; what is left over at the end is an unknown key."""

    def __init__(self, data: dict[str, Any], path: tuple[str | int, ...], origin: _Origin) -> None:
        self._left = dict(data)
        self._path = path
        self._origin = origin

    def has(self, key: str) -> bool:
        return key in self._left

    def text(self, key: str, one_of: tuple[str, ...] = ()) -> str:
        value = self._take(key, str, "a string")
        if one_of and value not in one_of:
            raise self.error(key, f"{value!r} is not one of {', '.join(one_of)}")
        return str(value)

    def integer(self, key: str, minimum: int = 0, maximum: int = (1 << 63) - 1) -> int:
        value = self._take(key, int, "an integer")
        if not minimum <= value <= maximum:
            raise self.error(key, f"{value:#x} is not in {minimum:#x}..{maximum:#x}")
        return int(value)

    def boolean(self, key: str) -> bool:
        return bool(self._take(key, bool, "true or false"))

    def texts(self, key: str) -> Iterator[str]:
        for value in self._take(key, list, "a list of strings"):
            if not isinstance(value, str):
                raise self.error(key, f"{value!r} is not a string")
            yield value

    def properties(self, key: str) -> tuple[tuple[str, str], ...]:
        """QEMU properties: strings as they are, integers in hexadecimal, true and false as on and off."""
        if not self.has(key):
            return ()
        spelled = []
        for name, value in self._take(key, dict, "a table").items():
            if isinstance(value, bool):
                spelled.append((name, "on" if value else "off"))
            elif isinstance(value, int):
                spelled.append((name, hex(value)))
            elif isinstance(value, str) and "," not in value:
                spelled.append((name, value))
            else:
                raise self.error(key, f"{name} = {value!r} is not a string without commas, an integer or a boolean")
        return tuple(spelled)

    def table(self, key: str) -> "_Table":
        return _Table(self._take(key, dict, "a table"), (*self._path, key), self._origin)

    def tables(self, key: str) -> list["_Table"]:
        found = self._take(key, list, "a list of tables")
        if not found or not all(isinstance(value, dict) for value in found):
            raise self.error(key, "must be a list of one or more tables")
        return [_Table(value, (*self._path, key, i), self._origin) for i, value in enumerate(found)]

    def end(self) -> None:
        """Everything must have been asked for."""
        for key in self._left:
            raise self.error(key, "unknown key")

    def error(self, key: str | tuple[str | int, ...], rule: str) -> TopologyError:
        path = (*self._path, *((key,) if isinstance(key, str) else key))
        dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
        line = self._origin.line(path)
        where = self._origin.file if line is None else f"{self._origin.file}:{line}"
        return TopologyError(f"{where}: {dotted}: {rule}")

    def _take(self, key: str, kind: type, what: str) -> Any:
        if key not in self._left:
            raise self.error(key, f"missing; it must be {what}")
        value = self._left.pop(key)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(key, f"{value!r} is not {what}")
        return value
