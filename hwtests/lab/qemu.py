"""The arguments of QEMU, made from a topology."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from hwtests.lab.architecture import POWER, X86, Architecture
from hwtests.lab.errors import LabError
from vfio import topology
from vfio.topology import Device, Phb, Topology

# No kernel message on the console, where it would hit a frame; a panic ends the machine; no tests of the kernel's
# cryptography, which take half a second under emulation.
_APPEND = "quiet loglevel=1 panic=-1 cryptomgr.notests=1"


def find(architecture: Architecture = POWER) -> str:
    """The path of QEMU. Raises LabError, naming the Debian package."""
    program, package = architecture.emulator, architecture.package
    path = shutil.which(program)
    if path is None:
        raise LabError(f"{program} is not in PATH; install Debian's package {package}: apt install {package}")
    return path


def arguments(
    machine: Topology,
    vmlinux: Path,
    initrd: Path,
    drives: dict[str, Path],
    append: str = "",
    memory: int = 0,
    serial: str = "stdio",
    roms: Mapping[str, Path] | None = None,
) -> list[str]:
    """Everything after the program's name. `drives` has a file for every device of `drives_of`, `roms` one for every
    device of `roms_of`; `memory` (bytes) replaces the topology's."""
    qemu = machine.machine
    if qemu is None:
        raise LabError(f"the topology {machine.name} has no [machine] table, so QEMU cannot be asked for it")
    architecture = X86 if machine.platform.name == "PC" else POWER
    words = ["-M", qemu.type, "-m", f"{(memory or qemu.memory) >> 20}M", "-smp", "1"]
    words += ["-nodefaults", "-nographic", "-monitor", "none", "-net", "none", "-no-reboot", "-serial", serial]
    if architecture is X86:
        words += ["-cpu", "max"]
    for device in qemu.devices:
        words += ["-device", device]
    for phb in machine.phbs:
        words += _phb(phb, "pcie.0" if architecture is X86 else "pci.0", drives, roms or {})
    append = f"console={architecture.console} {_APPEND} {append}".strip()
    words += ["-kernel", str(vmlinux), "-initrd", str(initrd), "-append", append]
    return words


def drives_of(machine: Topology) -> dict[str, int]:
    """The addresses of the devices that need a backing file, and its size in bytes."""
    return {device.address: device.drive for device in machine.devices if device.drive}


def roms_of(machine: Topology) -> dict[str, bytes]:
    """The addresses of the devices that have an expansion ROM, and what is in it."""
    return {device.address: topology.option_rom(device.rom) for device in machine.devices if device.rom}


def _phb(phb: Phb, first_bus: str, drives: dict[str, Path], roms: Mapping[str, Path]) -> Iterator[str]:
    if phb.root_port:
        yield from ("-device", _host_bridge(phb, phb.root_port))
        properties = "".join(f",{name}={value}" for name, value in phb.root_port.properties)
        yield from ("-device", f"{phb.root_port.model},bus=phb{phb.index},id=port{phb.index}{properties}")
        bus = f"port{phb.index}"
    elif phb.index == 0:  # pseries and PCs have this one anyway
        bus = first_bus
    else:
        yield from ("-device", f"spapr-pci-host-bridge,index={phb.index},id=phb{phb.index}")
        bus = f"phb{phb.index}.0"
    for device in phb.devices:
        yield from _device(device, bus, drives, roms)


def _host_bridge(phb: Phb, root_port: Device) -> str:
    """A PHB that has a root port: powernv's own, or a PC's second root bus, which the IOMMU has if devices have groups."""
    if root_port.model.startswith("pnv-"):
        return f"pnv-phb,chip-id=0,index={phb.index},id=phb{phb.index}"
    bypass = "off" if any(device.group is not None for device in phb.devices) else "on"
    return f"pxb-pcie,bus=pcie.0,bus_nr={root_port.bus},bypass_iommu={bypass},id=phb{phb.index}"


def _device(device: Device, bus: str, drives: dict[str, Path], roms: Mapping[str, Path]) -> Iterator[str]:
    words = [device.model, f"bus={bus}", f"addr={device.slot}"]
    if device.drive:
        name = "drive" + "".join(c for c in device.address if c.isalnum())
        yield from ("-drive", f"if=none,id={name},format=raw,file={_escaped(str(drives[device.address]))}")
        words.append(f"drive={name}")
    if device.rom:
        words.append(f"romfile={_escaped(str(roms[device.address]))}")
    words += [f"{key}={value}" for key, value in device.properties]
    yield from ("-device", ",".join(words))


def _escaped(path: str) -> str:
    return path.replace(",", ",,")
