"""The machine is what its topology says: the facts that the modelled kernel answers with, against a real kernel."""

import fcntl
import mmap
import os
import pwd
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vfio.topology import Iommu, Window

if TYPE_CHECKING:
    from hwtests.lab.targets import System
    from vfio.topology import Topology

_DEVICES = Path("/sys/bus/pci/devices")
_GROUPS = Path("/sys/kernel/iommu_groups")

# These tests hold the lab to its word without the library that it is for: raw calls, with powerpc's numbers.
_VFIO = 0x20003B64
_SET_IOMMU, _SET_CONTAINER, _TCE_GET_INFO, _TCE_CREATE = _VFIO + 2, _VFIO + 4, _VFIO + 12, _VFIO + 19
_SPAPR_TCE_V2 = 7


@pytest.fixture
def topology(target: "System") -> "Topology":
    assert target.topology is not None
    return target.topology


def test_page_size_is_the_targets(target: "System") -> None:
    assert os.sysconf("SC_PAGESIZE") == target.page_size


def test_vfio_modules_are_loaded() -> None:
    assert Path("/dev/vfio/vfio").exists()
    assert {"vfio_pci", "vfio_iommu_spapr_tce"} <= {path.name for path in Path("/sys/module").iterdir()}


@pytest.mark.lab_only
def test_cpu_and_platform_are_the_topologys(topology: "Topology") -> None:
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    shown = {key.strip(): value.strip() for key, _, value in lines}
    assert shown["cpu"].split()[0].rstrip(",") == topology.platform.cpu
    assert shown["platform"] == topology.platform.name
    assert shown["MMU"] == topology.platform.mmu


@pytest.mark.lab_only
def test_pci_functions_are_the_topologys(topology: "Topology") -> None:
    functions = {device.address: device for phb in topology.phbs for device in phb.functions}
    assert sorted(path.name for path in _DEVICES.iterdir()) == sorted(functions)
    for address, device in functions.items():
        files = ("vendor", "device", "class", "subsystem_vendor", "subsystem_device", "revision")
        shown = [int((_DEVICES / address / name).read_text(), 16) for name in files]
        identity = [device.vendor, device.device, device.device_class]
        assert shown == [*identity, device.subsystem_vendor, device.subsystem_device, device.revision], address


@pytest.mark.lab_only
def test_groups_are_the_topologys(topology: "Topology") -> None:
    shown = {int(path.name): sorted(os.listdir(path / "devices")) for path in _GROUPS.iterdir()}
    assert shown == {number: sorted(device.address for device in some) for number, some in topology.groups().items()}


@pytest.mark.lab_only
def test_pe_numbers_are_the_topologys(topology: "Topology") -> None:
    for phb in topology.phbs:
        for device in phb.functions:
            file = _DEVICES / device.address / "eeh_pe_config_addr"
            assert (int(file.read_text(), 16) if file.exists() else None) == device.pe, device.address


@pytest.mark.lab_only
def test_group_names_tell_domain_and_pe(topology: "Topology") -> None:
    for number, devices in topology.groups().items():
        domain = int(devices[0].address[:4], 16)
        assert (_GROUPS / str(number) / "name").read_text() == f"domain{domain}-pe{devices[0].pe or 0:x}\n"


@pytest.mark.lab_only
def test_reset_methods_are_the_topologys(topology: "Topology") -> None:
    for device in topology.devices:
        file = _DEVICES / device.address / "reset_method"
        assert tuple(file.read_text().split() if file.exists() else ()) == device.reset, device.address


@pytest.mark.lab_only
def test_alice_is_an_ordinary_user() -> None:
    assert pwd.getpwnam("alice").pw_uid == 1000
    assert os.getuid() == 0


@pytest.mark.lab_only
def test_windows_are_the_topologys(topology: "Topology", target: "System") -> None:
    for devices in topology.groups().values():
        with _bound(devices[0].address) as group:
            assert _spapr_iommu(group, target.page_size) == topology.iommu, devices[0].address


@pytest.mark.lab_only
@pytest.mark.targets("powernv8-64k", "pseries", "pseries-64k")
def test_huge_pages_can_be_touched(target: "System") -> None:
    map_hugetlb = 0x40000
    size = 16 << 20 if target.platform == "PowerNV" else 2 << 20
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | map_hugetlb) as memory:
        memory[size - 4 :] = struct.pack("<I", 0x12345678)
        assert memory[size - 4 :] == struct.pack("<I", 0x12345678)
        assert memory[:4] == bytes(4)


@contextmanager
def _bound(address: str) -> Iterator[Path]:
    """The group's file in /dev/vfio, with the device on vfio-pci."""
    device = _DEVICES / address
    before = (device / "driver").resolve()
    if before.exists():
        (before / "unbind").write_text(address)
    (device / "driver_override").write_text("vfio-pci\n")
    Path("/sys/bus/pci/drivers_probe").write_text(address)
    try:
        yield Path("/dev/vfio") / (device / "iommu_group").resolve().name
    finally:
        (device / "driver" / "unbind").write_text(address)
        (device / "driver_override").write_text("\n")
        if before.exists():
            (before / "bind").write_text(address)


def _spapr_iommu(group: Path, page_size: int) -> Iommu:
    """What the kernel says of the group's windows, and where it puts a second one."""
    with open("/dev/vfio/vfio", "r+b", buffering=0) as container, group.open("r+b", buffering=0) as file:
        fcntl.ioctl(file, _SET_CONTAINER, struct.pack("i", container.fileno()))
        fcntl.ioctl(container, _SET_IOMMU, _SPAPR_TCE_V2)
        info = bytearray(struct.pack("IIIIQII", 32, 0, 0, 0, 0, 0, 0))
        fcntl.ioctl(container, _TCE_GET_INFO, info)
        _, _, start, size, page_sizes, windows, levels = struct.unpack("IIIIQII", info)
        create = bytearray(struct.pack("IIIIQIIQ", 40, 0, page_size.bit_length() - 1, 0, 1 << 30, 1, 0, 0))
        fcntl.ioctl(container, _TCE_CREATE, create)
        second = struct.unpack("IIIIQIIQ", create)[7]
    return Iommu(Window(start, size, 4096), second, page_sizes, levels, windows)
