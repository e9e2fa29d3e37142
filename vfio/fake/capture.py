"""A topology of a real host, from what its sysfs and /proc show.

BARs are those of the host.  MSI-X tables are where the host has them only if root captures it: to anybody else sysfs shows
no more than the first 64 bytes of configuration space (pci_read_config), and capabilities come behind them; then the
model's own are left where they fit.  DMA windows show nowhere without opening a group, so they are those of the platform;
what is behind a BAR, and what is in an expansion ROM, is the model's.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from vfio import errors, sysfs, topology, usage
from vfio.backend import Backend, missing
from vfio.fake import registers as reg

_PLATFORMS = ("PowerNV", "pSeries")
_MODELS = {(0x1234, 0x11E8): "edu", (0x1B36, 0x0005): "pci-testdev", (0x8086, 0x10D3): "e1000e"}
_NVME = 0x010802
_IO, _MEMORY, _PREFETCHABLE, _BITS64, _UNSET = 0x100, 0x200, 0x2000, 0x100000, 0x20000000
"""Flags of a line of `resource` (include/linux/ioport.h)."""
_BARS, _BRIDGE_BARS, _ROM = 6, 2, 6
"""How many lines of `resource` are BARs, of a function and of a bridge; and the line of the expansion ROM."""


class Captured(NamedTuple):
    """A host as a topology."""

    toml: str
    notes: list[str]
    """What whoever captured it should know, as sentences."""


def capture(backend: Backend) -> Captured:
    """The host that `backend` runs on, as the text of a topology: ``vfio list`` prints the same on both.

    Raises `errors.CallFailed` on a host that is not POWER: the model's kernel has no other IOMMU.
    """
    if not sysfs.on_power(backend):
        raise errors.CallFailed(
            errno.ENODEV,
            "cannot capture this host",
            "it is not POWER (there is no /proc/powerpc), and the modelled kernel has POWER's IOMMU only",
            "capture a POWER host, or take a machine that comes along, such as fake:power9",
        )
    cpu = _cpuinfo(backend)
    devices = sysfs.devices(backend)
    notes = []
    if not devices:
        raise errors.CallFailed(errno.ENODEV, "cannot capture this host", "it has no PCI devices")
    if not any(device.group is not None for device in devices):
        notes.append("no device of this host is in an IOMMU group: none can be assigned, here or on the model")
    if not all(_config(backend, device.address)[reg.HEADER_END :] for device in devices if not device.is_bridge):
        notes.append(
            "only root reads the capabilities of devices: MSI-X tables are the model's own; capture as root for the host's"
        )
    like = _like(cpu)
    lines = [
        f"description = {_text(f'captured on {cpu.model}')}",
        "",
        "[platform]",
        f"name = {_text(cpu.platform)}",
        f"cpu = {_text(cpu.cpu)}",
        f"mmu = {_text(cpu.mmu)}",
        f"eeh = {_flag(any(sysfs.eeh(backend, device.address) for device in devices))}",
        f"page_size = {backend.page_size}",
        f"memory = {_memory(backend)}",
        *_kernel(sysfs.kernel_release(backend)),
        "",
        *_iommu(like),
        *_drivers(devices),
    ]
    interfaces, disks = usage.interfaces(backend), usage.disks(backend)
    for domain in dict.fromkeys(_domain(device.address) for device in devices):
        lines += ["", "[[phb]]", f"domain = {int(domain, 16):#x}"]
        for device in devices:
            if _domain(device.address) == domain:
                lines += ["", "[[phb.device]]", *_device(backend, device)]
                lines += _uses(device.address, interfaces, disks)
    return Captured("\n".join(lines) + "\n", notes)


class _Cpu(NamedTuple):
    platform: str
    cpu: str
    mmu: str
    model: str


def _cpuinfo(backend: Backend) -> _Cpu:
    found: dict[str, str] = {}
    for line in backend.read_text("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    platform = found.get("platform", "")
    if platform not in _PLATFORMS:
        raise errors.CallFailed(
            errno.ENODEV,
            "cannot capture this host",
            f"its platform is {platform or 'unknown'}; the modelled kernel has {' and '.join(_PLATFORMS)}",
        )
    cpu = found.get("cpu", "").split(" ")[0].rstrip(",")
    return _Cpu(platform, cpu, found.get("MMU", "Hash"), found.get("model", platform))


def _like(cpu: _Cpu) -> topology.Topology:
    """The packaged machine that has this platform's windows."""
    if cpu.platform == "pSeries":
        return topology.load("pseries")
    numbers = re.findall(r"\d+", cpu.cpu)
    generation = min(max(int(numbers[0]) if numbers else 9, 7), 10)
    return topology.load(f"power{generation}")


def _kernel(release: str) -> list[str]:
    newer = re.match(r"(\d+)\.", release)
    kernel = "7.2" if newer and int(newer[1]) >= 7 else "6.12"
    return [f'kernel = "{kernel}"', f"release = {_text(release)}"]


def _memory(backend: Backend) -> int:
    for line in backend.read_text("/proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return 16 << 30


def _iommu(like: topology.Topology) -> list[str]:
    iommu, window = like.iommu, like.iommu.default_window
    return [
        f"# Windows show nowhere in sysfs: these are those of {like.name}.",
        "[iommu]",
        *([] if iommu.dynamic_windows else ["dynamic_windows = false"]),
        f"default_window = {{ start = {window.start:#x}, size = {window.size:#x}, page_size = {window.page_size} }}",
        *([f"second_window_start = {iommu.second_window_start:#x}"] if iommu.dynamic_windows else []),
        f"page_sizes = {iommu.page_sizes:#x}",
        f"levels = {iommu.levels}",
        f"windows = {iommu.windows}",
    ]


def _drivers(devices: Iterable[sysfs.PciDevice]) -> list[str]:
    """Variants of vfio-pci, which do not tell by their name what they are."""
    names = sorted({each.driver for each in devices if each.driver and each.on_vfio and each.driver != "vfio-pci"})
    return [line for name in names for line in ("", "[[driver]]", f"name = {_text(name)}", "vfio = true")]


def _device(backend: Backend, device: sysfs.PciDevice) -> list[str]:
    lines = [
        f"model = {_text(_model(device))}",
        f"address = {_text(device.address)}",
        f"vendor = {device.vendor:#06x}",
        f"device = {device.device:#06x}",
        f"class = {device.class_code:#08x}",
        f"subsystem_vendor = {device.subsystem_vendor:#06x}",
        f"subsystem_device = {device.subsystem_device:#06x}",
        f"revision = {device.revision:#04x}",
    ]
    if device.group is not None:
        lines.append(f"group = {device.group}")
    pe = device.pe if device.group is not None else _eeh_pe(backend, device)
    if pe or (pe is not None and sysfs.eeh(backend, device.address)):
        lines.append(f"pe = {pe:#x}")
    if methods := _read(backend, sysfs.path(device.address, "reset_method")).split():
        lines.append(f"reset = [{', '.join(map(_text, methods))}]")
    below = _read(backend, sysfs.path(device.address, "secondary_bus_number")).strip()
    if device.is_bridge and int(below or "0") > int(device.address.split(":")[1], 16):
        lines.append(f"secondary_bus = {int(below):#x}")
    bars, rom = _bars(backend, device)
    lines.append(f"bars = [{', '.join(map(_bar, bars))}]")
    if rom:
        lines.append(f"rom = {rom:#x}")
    if not device.is_bridge:
        lines += _msix(_config(backend, device.address), bars)
    if device.driver is not None:
        lines.append(f"driver = {_text(device.driver)}")
    if device.driver_override is not None:
        lines.append(f"driver_override = {_text(device.driver_override)}")
    if not device.overridable:
        lines.append("overridable = false")
    for name, where in sysfs.slots(backend).items():
        if where is not None and device.address.startswith(f"{where}."):
            lines.append(f"physical_slot = {_text(name)}")
    return lines


def _bars(backend: Backend, device: sysfs.PciDevice) -> tuple[list[topology.Bar], int]:
    """The BARs that the host has assigned, and the size of the expansion ROM: who asks VFIO is told of no others."""
    bars, rom = [], 0
    for index, line in enumerate(_read(backend, sysfs.path(device.address, "resource")).splitlines()):
        start, end, flags = (int(number, 16) for number in line.split())
        size = end - start + 1
        if not start or flags & _UNSET or not flags & (_IO | _MEMORY) or size.bit_count() != 1:
            continue
        if index < (_BRIDGE_BARS if device.is_bridge else _BARS):
            bars.append(
                topology.Bar(index, size, bool(flags & _IO), bool(flags & _BITS64), bool(flags & _PREFETCHABLE))
            )
        elif index == _ROM and not device.is_bridge:
            rom = size
    return bars, rom


def _bar(bar: topology.Bar) -> str:
    kinds = [f"{name} = true" for name in ("io", "bits64", "prefetchable") if getattr(bar, name)]
    return f"{{ {', '.join([f'bar = {bar.index}', f'size = {bar.size:#x}', *kinds])} }}"


def _msix(config: bytes, bars: Iterable[topology.Bar]) -> list[str]:
    """The MSI-X table, where configuration space tells all of it; one in a BAR that the host has not assigned is none."""
    if len(config) < reg.STANDARD_SIZE:
        return []
    registers = reg.ConfigRegisters()
    registers.value[:] = config[: reg.STANDARD_SIZE]
    at = registers.find(reg.CAP_MSIX)
    table, pending = (registers.get(at + where, 4) if at else 0 for where in (reg.MSIX_TABLE, reg.MSIX_PBA))
    vectors = (registers.get(at + reg.MSIX_FLAGS, 2) & reg.MSIX_SIZE) + 1
    start, end = table & ~7, (table & ~7) + 16 * vectors
    if not at or not any(bar.index == table & 7 and not bar.io and bar.size >= end for bar in bars):
        return ["msix = { vectors = 0 }"]
    pba = pending & ~7 if pending & 7 == table & 7 else end
    return [f"msix = {{ vectors = {vectors}, bar = {table & 7}, table = {start:#x}, pba = {pba:#x} }}"]


def _config(backend: Backend, address: str) -> bytes:
    """Configuration space, as far as this process may read it."""
    try:
        fd = backend.open(sysfs.path(address, "config"), os.O_RDONLY)
    except OSError as error:
        if missing(error) or isinstance(error, PermissionError):
            return b""
        raise
    try:
        return backend.pread(fd, reg.STANDARD_SIZE, 0)
    finally:
        backend.close(fd)


def _model(device: sysfs.PciDevice) -> str:
    if device.is_bridge:
        return "bridge"
    if device.class_code == _NVME:
        return "nvme"
    return _MODELS.get((device.vendor, device.device), "endpoint")


def _eeh_pe(backend: Backend, device: sysfs.PciDevice) -> int | None:
    """The PE of a bridge, which is in no group."""
    text = sysfs.eeh(backend, device.address).get("eeh_pe_config_addr")
    return None if text is None else int(text, 16)


def _uses(address: str, interfaces: Iterable[usage.Interface], disks: Iterable[usage.Disk]) -> list[str]:
    """What the host has on the device.  A disk with several controllers is the first one's."""
    lines = []
    nets = [f"{{ name = {_text(each.name)}, up = {_flag(each.up)} }}" for each in interfaces if each.address == address]
    if nets:
        lines.append(f"interfaces = [{', '.join(nets)}]")
    entries = [_disk(disk) for disk in disks if disk.addresses[0] == address and ":" in disk.number]
    if entries:
        lines += ["disks = [", *(f"    {entry}," for entry in entries), "]"]
    return lines


def _disk(disk: usage.Disk) -> str:
    fields = [f"name = {_text(disk.name)}", f"number = {_text(disk.number)}"]
    if disk.mounted:
        fields.append(f"mounted = [{', '.join(map(_text, disk.mounted))}]")
    if disk.holders:
        fields.append(f"holders = [{', '.join(map(_text, disk.holders))}]")
    fields += [f"{name} = true" for name in ("swap", "btrfs", "multipath") if getattr(disk, name)]
    return f"{{ {', '.join(fields)} }}"


def _read(backend: Backend, path: str) -> str:
    """What is in a file; nothing where there is none."""
    try:
        return backend.read_text(path)
    except OSError as error:
        if missing(error) or isinstance(error, PermissionError):
            return ""
        raise


def _domain(address: str) -> str:
    return address.partition(":")[0]


def _text(value: str) -> str:
    """A TOML string: what JSON writes is one, but for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _flag(value: bool) -> str:
    return "true" if value else "false"
