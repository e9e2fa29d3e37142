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
models of devices that know them.  ``[[phb.chipset]]`` is like ``[[phb.device]]``, for what QEMU has without being asked.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path

from vfio import topology_device, topology_iommu
from vfio.topology_parts import (
    Bar,
    Device,
    Disk,
    Driver,
    Interface,
    Iommu,
    Machine,
    Msix,
    Pamu,
    Phb,
    Platform,
    Topology,
    Window,
    option_rom,
)
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
_ID = re.compile(r"([0-9a-f]{4}):([0-9a-f]{4})")
_IOMMUS = {"PC": topology_iommu.type1, "P4080DS": topology_iommu.pamu}
"""What reads the IOMMU of a platform; the others have a sPAPR one."""


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
        iommu=_IOMMUS.get(platform.name, topology_iommu.iommu)(root.table("iommu")),
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
        noiommu=table.boolean("noiommu") if table.has("noiommu") else False,
    )
    if platform.page_size not in (4096, 65536):
        raise table.error("page_size", f"{platform.page_size} is not 4096 or 65536")
    table.end()
    return platform


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
    devices = tuple(topology_device.device(device, domain, on_bus=True) for device in table.tables("device"))
    phb = Phb(
        index=index,
        domain=domain,
        root_port=_root_port(topology_device.device(root_port, domain, on_bus=False), devices) if root_port else None,
        devices=devices,
        chipset=tuple(topology_device.device(each, domain, on_bus=True) for each in table.optional_tables("chipset")),
    )
    table.end()
    return phb


def _root_port(port: Device, devices: tuple[Device, ...]) -> Device:
    """The bus below a root port is that of the first device, unless it is said."""
    return port if port.secondary_bus is not None else replace(port, secondary_bus=devices[0].bus)


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
        if topology.platform.name != "PC":  # whose host bridges are root buses of one domain
            once(f"domain {phb.domain}", "phb", i, "domain")
        if phb.root_port:
            once(phb.root_port.address, "phb", i, "root_port", "address")
            once(f"bus {phb.domain:04x}:{phb.root_port.secondary_bus:02x}", "phb", i, "root_port", "secondary_bus")
        for j, device in enumerate(phb.chipset):
            once(device.address, "phb", i, "chipset", j, "address")
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
