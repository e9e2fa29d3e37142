"""The files of sysfs one by one: who may read and write them, what numbers they take, and what a write does.

Source: fs/kernfs/file.c, drivers/pci/pci-sysfs.c, drivers/base/bus.c and lib/kstrtox.c of Linux 6.12.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator

import pytest

from simtests.conformance.fixtures import PC, POWER
from simtests.conformance.pci_calls import PROBE, VFIO_PCI, endpoint_address, on_vfio, opened, outcome, spare_address
from vfio import sysfs
from vfio.backend import Backend

pytestmark = pytest.mark.lab_only  # takes devices from the host
BARE_METAL = pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k")
BUS = "/sys/bus/pci"
GROUPS = "/sys/kernel/iommu_groups"


@pytest.fixture
def address(target, backend) -> Iterator[str]:
    """A device on no driver; on no driver again, and without an override, afterwards."""
    address = spare_address(target)
    yield address
    if sysfs.driver_of(backend, address):
        backend.write_text(f"{sysfs.path(address, 'driver')}/unbind", address)
    backend.write_text(sysfs.path(address, "driver_override"), "\n")


@pytest.fixture
def disk(target, backend) -> Iterator[str]:
    """A device alone on its bus, that can be reset by itself."""
    address = endpoint_address(target)
    yield address
    backend.write_text(sysfs.path(address, "reset_method"), "default")


def write(backend: Backend, path: str, text: str) -> str | None:
    """What came of writing to a file: None, or the errno."""
    return outcome(backend.write_text, path, text)


# --- paths ---


def test_reading_and_writing_a_directory_is_eisdir(backend, address):
    for path in (BUS, sysfs.path(address), sysfs.path(address, "iommu_group")):
        assert outcome(backend.read_text, path) == "EISDIR"
        assert write(backend, path, "x") == "EISDIR"


def test_path_through_a_file_is_enotdir(backend, address):
    assert outcome(backend.read_text, sysfs.path(address, "vendor", "x")) == "ENOTDIR"
    assert outcome(backend.listdir, sysfs.path(address, "vendor")) == "ENOTDIR"
    assert not backend.exists(sysfs.path(address, "vendor", "x"))


def test_only_links_can_be_read_as_links(backend, address):
    assert outcome(backend.readlink, sysfs.path(address, "vendor")) == "EINVAL"
    assert outcome(backend.readlink, BUS) == "EINVAL"
    assert outcome(backend.readlink, sysfs.path(address, "driver")) == "ENOENT"


def test_file_that_there_is_not_is_enoent(backend, address):
    path = sysfs.path(address, "no_such_file")
    assert outcome(backend.read_text, path) == write(backend, path, "x") == outcome(backend.stat, path) == "ENOENT"
    assert outcome(backend.listdir, path) == "ENOENT"


@pytest.mark.parametrize(
    ("name", "mode"), [("vendor", 0o444), ("driver_override", 0o644), ("remove", 0o220), ("rescan", 0o200)]
)
def test_files_of_a_device_are_roots_and_have_their_modes(backend, address, name, mode):
    found = backend.stat(sysfs.path(address, name))
    assert stat.S_ISREG(found.mode)
    assert (stat.S_IMODE(found.mode), found.uid, found.gid) == (mode, 0, 0)


def test_even_root_cannot_write_what_nobody_can(backend, address):
    assert write(backend, sysfs.path(address, "vendor"), "0x1234\n") == "EACCES"
    assert outcome(backend.read_text, sysfs.path(address, "remove")) == "EACCES"


def test_owner_and_mode_of_a_file_can_be_changed(backend, address):
    path = sysfs.path(address, "driver_override")
    try:
        backend.chmod(path, 0o666)
        backend.chown(path, 1000, 0)
        found = backend.stat(path)
        assert (stat.S_IMODE(found.mode), found.uid, found.gid) == (0o666, 1000, 0)
    finally:
        backend.chmod(path, 0o644)
        backend.chown(path, 0, 0)


# --- numbers ---


@pytest.mark.parametrize("text", ["1", "0", "+1", "0x1", "010", "2", "1\n"])
def test_numbers_are_decimal_octal_or_hexadecimal(backend, address, text):
    path = sysfs.path(address, "msi_bus")
    before = backend.read_text(path)
    try:
        assert write(backend, path, text) is None
        assert backend.read_text(path) == ("0\n" if text == "0" else "1\n")
    finally:
        backend.write_text(path, before)


@pytest.mark.parametrize("text", ["x", "-1", " 1", "1 ", "08", "1\n\n", "\n"])
def test_what_is_no_number_is_einval(backend, address, text):
    for name in ("msi_bus", "broken_parity_status", "enable", "remove"):
        assert write(backend, sysfs.path(address, name), text) == "EINVAL"
    assert write(backend, f"{BUS}/rescan", text) == "EINVAL"


def test_zero_removes_and_scans_nothing(backend, address):
    for path in (sysfs.path(address, "remove"), sysfs.path(address, "rescan"), f"{BUS}/rescan"):
        assert write(backend, path, "0") is None
    assert backend.exists(sysfs.path(address))


def test_numa_node_is_one_that_there_is(backend, address):
    path = sysfs.path(address, "numa_node")
    before = backend.read_text(path)
    try:
        assert write(backend, path, "-1") is None
        assert backend.read_text(path) == "-1\n"
        assert write(backend, path, "-2") == write(backend, path, "x") == "EINVAL"
    finally:
        backend.write_text(path, before)


# --- enable, reset ---


def test_enable_counts(backend, address):
    path = sysfs.path(address, "enable")
    assert backend.read_text(path) == "0\n"
    assert write(backend, path, "0") == "EIO"
    assert write(backend, path, "1") is None
    assert backend.read_text(path) == "1\n"
    assert write(backend, path, "0") is None
    assert backend.read_text(path) == "0\n"


def test_enable_of_a_bound_device_is_ebusy(backend, address):
    with on_vfio(backend, address):
        assert write(backend, sysfs.path(address, "enable"), "1") == "EBUSY"
        assert write(backend, sysfs.path(address, "enable"), "x") == "EINVAL"


@BARE_METAL
def test_reset_takes_a_one(backend, disk):
    path = sysfs.path(disk, "reset")
    assert write(backend, path, "1") is None
    assert write(backend, path, "0") == write(backend, path, "2") == write(backend, path, "x") == "EINVAL"


@BARE_METAL
def test_reset_of_a_bus_with_a_neighbour_on_it_is_enotty(backend, device_address):
    assert backend.read_text(sysfs.path(device_address, "reset_method")) == "bus\n"
    assert write(backend, sysfs.path(device_address, "reset"), "1") == "ENOTTY"


@BARE_METAL
def test_reset_through_the_file_keeps_configuration_space(backend, disk):
    before = config(backend, disk)
    assert write(backend, sysfs.path(disk, "reset"), "1") is None
    assert config(backend, disk)[:64] == before[:64]


@BARE_METAL
def test_device_that_cannot_be_reset_has_no_file_for_it(backend, address):
    assert not backend.exists(sysfs.path(address, "reset"))
    assert not backend.exists(sysfs.path(address, "reset_method"))


@BARE_METAL
@pytest.mark.parametrize(
    ("text", "methods"),
    [("bus", "bus\n"), ("flr", "flr\n"), ("bus flr", "bus flr\n"), (" flr \n", "flr\n"), ("\n", "")],
)
def test_reset_methods_can_be_chosen(backend, disk, text, methods):
    assert write(backend, sysfs.path(disk, "reset_method"), text) is None
    assert backend.read_text(sysfs.path(disk, "reset_method")) == methods


@BARE_METAL
@pytest.mark.parametrize("text", ["pm", "flr,bus", "none", "flr bogus"])
def test_reset_method_that_the_device_has_not_is_einval(backend, disk, text):
    assert write(backend, sysfs.path(disk, "reset_method"), text) == "EINVAL"
    assert backend.read_text(sysfs.path(disk, "reset_method")) == "flr bus\n"


@BARE_METAL
def test_device_without_a_reset_method_is_enotty(backend, disk):
    backend.write_text(sysfs.path(disk, "reset_method"), "\n")
    assert write(backend, sysfs.path(disk, "reset"), "1") == "ENOTTY"


@PC
def test_pc_resets_a_card_by_its_power_state_and_an_edu_not_at_all(backend, target, disk, device_address):
    assert not backend.exists(sysfs.path(device_address, "reset"))
    assert not backend.exists(sysfs.path(device_address, "reset_method"))
    for function in target.topology.phbs[0].chipset:
        assert not backend.exists(sysfs.path(function.address, "reset"))
    reset, methods = sysfs.path(disk, "reset"), sysfs.path(disk, "reset_method")
    assert backend.read_text(methods) == "pm\n"
    for text in ("bus", "flr", "pm bus", "none"):
        assert write(backend, methods, text) == "EINVAL"
    before = config(backend, disk)
    assert write(backend, reset, "1") is None
    assert config(backend, disk)[:64] == before[:64]
    assert write(backend, reset, "0") == write(backend, reset, "x") == "EINVAL"
    assert write(backend, methods, "\n") is None
    assert backend.read_text(methods) == ""
    assert write(backend, reset, "1") == "ENOTTY"


# --- configuration space and BARs ---


def config(backend: Backend, address: str, length: int = 8192) -> bytes:
    """What a process reads of a device's configuration space."""
    fd = backend.open(sysfs.path(address, "config"), os.O_RDONLY)
    try:
        return backend.pread(fd, length, 0)
    finally:
        backend.close(fd)


def test_root_reads_all_of_configuration_space_and_others_64_bytes(backend, target, other_program):
    alice = other_program(uid=1000).backend
    for device in target.topology.devices:
        whole = config(backend, device.address)
        assert len(whole) in (256, 4096)
        assert whole[:2] == device.vendor.to_bytes(2, "little")
        assert config(alice, device.address) == whole[:64]


RESOURCES = {
    "powernv8": {
        "0000:01:00.0": {0: (0x3FF8000000000, 0x100000, 0x40200)},
        "0000:01:00.1": {0: (0x3FF8000100000, 0x1000, 0x40200)},
        "0001:01:00.0": {0: (0x3FF8080000000, 0x100000, 0x40200)},
        "0002:01:00.0": {0: (0x3FF8100000000, 0x4000, 0x140204)},
    },
    "powernv8-64k": {
        "0000:01:00.0": {0: (0x3FF8000000000, 0x100000, 0x40200)},
        "0000:01:00.1": {0: (0x3FF8000100000, 0x1000, 0x200)},
        "0001:01:00.0": {0: (0x3FF8080000000, 0x100000, 0x40200)},
        "0002:01:00.0": {0: (0x3FF8100000000, 0x4000, 0x100204)},
    },
    "powernv9": {
        "0000:01:00.0": {0: (0x600C000000000, 0x100000, 0x40200)},
        "0000:01:00.1": {0: (0x600C000100000, 0x1000, 0x40200)},
        "0001:01:00.0": {0: (0x600C080000000, 0x100000, 0x40200)},
        "0002:01:00.0": {0: (0x600C100000000, 0x4000, 0x140204)},
    },
    "siblings": {
        "0000:01:00.0": {0: (0x3FF8000000000, 0x100000, 0x40200)},
        "0000:01:00.1": {0: (0x3FF8000104000, 0x1000, 0x40200), 6: (0x3FF8000105000, 0x800, 0x6200)},
        "0000:01:00.2": {0: (0x3FF8000100000, 0x4000, 0x140204)},
        "0000:01:00.3": {0: (0x3FF8000106000, 0x100, 0x100204)},
        "0001:01:00.0": {0: (0x3FF8080000000, 0x100000, 0x40200)},
        "0002:01:00.0": {1: (0x3FF8100000000, 0x1000, 0x40200), 4: (0x3D02000000000, 0x4000, 0x14220C)},
    },
    "siblings-64k": {
        "0000:01:00.0": {0: (0x3FF8000000000, 0x100000, 0x40200)},
        "0000:01:00.1": {0: (0x3FF8000100000, 0x1000, 0x200), 6: (0x3FF8000110000, 0x800, 0x6200)},
        "0000:01:00.2": {0: (0x3FF8000120000, 0x4000, 0x100204)},
        "0000:01:00.3": {0: (0x3FF8000130000, 0x100, 0x100204)},
        "0001:01:00.0": {0: (0x3FF8080000000, 0x100000, 0x40200)},
        "0002:01:00.0": {1: (0x3FF8100000000, 0x1000, 0x200), 4: (0x3D02000000000, 0x4000, 0x10220C)},
    },
    "pseries": {
        "0000:00:00.0": {0: (0x200080000000, 0x100000, 0x40200)},
        "0001:00:00.0": {
            0: (0x200100000000, 0x20000, 0x40200),
            1: (0x200100020000, 0x20000, 0x40200),
            2: (0x1000, 0x20, 0x40101),
            3: (0x200100040000, 0x4000, 0x40200),
        },
    },
    "q35": {
        "0000:00:00.0": {},
        "0000:00:1f.0": {},
        "0000:00:1f.2": {4: (0xC060, 0x20, 0x40101), 5: (0xFEB44000, 0x1000, 0x40200)},
        "0000:00:1f.3": {4: (0x700, 0x40, 0x40101)},
        "0000:00:04.0": {0: (0xFE900000, 0x100000, 0x40200)},
        "0000:00:05.0": {0: (0xFEA00000, 0x100000, 0x40200)},
        "0000:00:06.0": {
            0: (0xFEB00000, 0x20000, 0x40200),
            1: (0xFEB20000, 0x20000, 0x40200),
            2: (0xC040, 0x20, 0x40101),
            3: (0xFEB40000, 0x4000, 0x40200),
        },
    },
}
"""The first lines of `resource` of every device that are not zero: where a BAR (6: the ROM) is, its size, its flags."""


@pytest.mark.targets(*RESOURCES)
def test_resource_has_what_the_host_gave_to_each_bar(backend, target):
    for device in (*target.topology.phbs[0].chipset, *target.topology.devices):
        lines = backend.read_text(sysfs.path(device.address, "resource")).splitlines()
        assert len(lines) == (17 if device.device_class >> 8 in (0x0604, 0x0609) else 13)
        found = {}
        for index, line in enumerate(lines[:7]):
            start, end, flags = (int(number, 16) for number in line.split())
            if flags:
                found[index] = start, end - start + 1, flags
        assert found == RESOURCES[target.name][device.address]


@BARE_METAL
def test_io_ports_that_the_host_did_not_assign_are_not_there(backend, address):
    """A bare machine has no I/O ports to give: the second BAR of the test device stays without."""
    with on_vfio(backend, address), opened(backend, address) as device:
        region = device.region(1)
        assert (region.size, region.flags) == (0, 0)
        assert (device.read(1, 0, 1), device.write(1, 0, b"\0")) == ("EINVAL", "EINVAL")
        assert device.map(1, backend.page_size) == "EINVAL"
        device.set_config(0x14, 4, 0xFFFFFFFF)
        assert device.config(0x14, 4) == 0
        assert device.irq(0) == (0, 7)  # nor has it an interrupt pin


# --- drivers ---


@BARE_METAL
def test_driver_whose_probe_fails_is_passed_over_by_probe_and_told_by_bind(backend, address):
    """virtio-pci wants a device of its own vendor."""
    backend.write_text(sysfs.path(address, "driver_override"), "virtio-pci")
    assert write(backend, PROBE, address) is None
    assert sysfs.driver_of(backend, address) is None
    assert write(backend, f"{BUS}/drivers/virtio-pci/bind", address) == "ENODEV"


@BARE_METAL
def test_driver_that_may_not_probe_yet_is_eagain_for_bind_and_einval_for_probe(backend, target):
    """The root ports of the emulated machines wait for a supplier that never comes."""
    bridge = target.topology.phbs[0].root_port.address
    backend.write_text(sysfs.path(bridge, "driver_override"), "vfio-pci")
    try:
        assert backend.read_text(sysfs.path(bridge, "waiting_for_supplier")) == "1\n"
        assert write(backend, f"{VFIO_PCI}/bind", bridge) == "EAGAIN"
        assert write(backend, PROBE, bridge) == "EINVAL"
    finally:
        backend.write_text(sysfs.path(bridge, "driver_override"), "\n")


@pytest.mark.parametrize("text", ["{}\0x", "{}\n\0"])
def test_name_of_a_device_ends_at_a_nul(backend, address, text):
    assert write(backend, PROBE, text.format(address)) is None


@pytest.mark.parametrize("text", ["{} ", " {}", "{}\n\n"])
def test_name_of_a_device_is_nothing_but_the_name(backend, address, text):
    assert write(backend, PROBE, text.format(address)) == "ENODEV"


@pytest.mark.parametrize(
    "text",
    [
        "12345678901 5",  # only the low 32 bits count
        "1b36 7 1af4 1100 ff00 ffffff 0",
        "1b36 7 1af4 1100 ff00 ffffff 0 more",
        "0x1b36 0x7",
    ],
)
def test_ids_that_are_taken(backend, text):
    assert write(backend, f"{VFIO_PCI}/new_id", text) is None
    assert write(backend, f"{VFIO_PCI}/remove_id", text) is None


def test_driver_data_that_no_id_of_the_driver_has_is_einval(backend):
    assert write(backend, f"{VFIO_PCI}/new_id", "1b36 7 1af4 1100 ff00 ffffff 1") == "EINVAL"


def test_id_is_removed_by_what_is_said_of_it(backend):
    new, remove = f"{VFIO_PCI}/new_id", f"{VFIO_PCI}/remove_id"
    assert write(backend, new, "1b36 7 1af4 1100") is None
    assert write(backend, remove, "1b36 7 1af4 1101") == "ENODEV"
    assert write(backend, remove, "1b36 7 1af4") is None
    assert write(backend, remove, "1b36 7") == "ENODEV"


def test_id_with_driver_data_may_be_there_twice(backend):
    new, remove = f"{VFIO_PCI}/new_id", f"{VFIO_PCI}/remove_id"
    assert write(backend, new, "1b36 7") is None
    assert write(backend, new, "1b36 7 1af4 1100") == "EEXIST"
    assert write(backend, new, "1b36 7 1af4 1100 0 0 0") is None
    assert write(backend, remove, "1b36 7") is None
    assert write(backend, remove, "1b36 7") is None
    assert write(backend, remove, "1b36 7") == "ENODEV"


@BARE_METAL
def test_id_that_a_driver_was_built_with_is_eexist_and_cannot_be_removed(backend, target, load_driver):
    load_driver("nvme")
    device = target.topology.device(endpoint_address(target))
    ids = f"{device.vendor:04x} {device.device:04x}"
    nvme = f"{BUS}/drivers/nvme"
    assert write(backend, f"{nvme}/new_id", ids) == "EEXIST"
    assert write(backend, f"{nvme}/remove_id", ids) == "ENODEV"


@pytest.mark.parametrize(("text", "shown"), [("0", "0\n"), ("x", "1\n"), ("1\n", "1\n")])
def test_autoprobe_is_off_for_a_zero_only(backend, text, shown):
    path = f"{BUS}/drivers_autoprobe"
    try:
        backend.write_text(path, text)
        assert backend.read_text(path) == shown
    finally:
        backend.write_text(path, "1")


@BARE_METAL
def test_device_that_appears_gets_its_driver_even_without_autoprobe(backend, target, load_driver):
    """The PCI core attaches it by itself: autoprobe is about drivers that are loaded."""
    load_driver("nvme")
    disk = endpoint_address(target)
    backend.write_text(f"{BUS}/drivers_autoprobe", "0")
    try:
        backend.write_text(sysfs.path(disk, "remove"), "1")
        backend.write_text(f"{BUS}/rescan", "1")
        assert sysfs.driver_of(backend, disk) == "nvme"
    finally:
        backend.write_text(f"{BUS}/drivers_autoprobe", "1")


@pytest.mark.parametrize(("text", "errno"), [("add", None), ("change\n", None), ("addx", "EINVAL"), ("x", "EINVAL")])
def test_uevent_takes_the_name_of_an_action(backend, address, text, errno):
    assert write(backend, sysfs.path(address, "uevent"), text) == errno


# --- groups ---


@POWER
@pytest.mark.parametrize(
    ("text", "errno"), [("auto", None), ("auto\n", None), ("DMA", "EINVAL"), ("identity", "EINVAL"), ("x", "EINVAL")]
)
def test_type_of_a_free_group_stays(backend, target, text, errno):
    path = f"{GROUPS}/{target.topology.device(spare_address(target)).group}/type"
    assert write(backend, path, text) == errno
    assert backend.read_text(path) == "unknown\n"


@PC
@pytest.mark.parametrize("on_vfio_pci", [False, True])
def test_type_of_a_free_group_of_a_pc_is_changed(backend, address, on_vfio_pci):
    path = sysfs.path(address, "iommu_group", "type")
    if on_vfio_pci:
        backend.write_text(sysfs.path(address, "driver_override"), "vfio-pci")
        backend.write_text(PROBE, address)
    try:
        for text, shown in (("DMA", "DMA"), ("identity\n", "identity"), ("DMA-FQ", "DMA-FQ"), ("auto", "DMA")):
            assert write(backend, path, text) is None
            assert backend.read_text(path) == f"{shown}\n"
        assert write(backend, path, "identity") is None
        for text in ("x", "dma", "identity\n\n"):
            assert write(backend, path, text) == "EINVAL"
            assert backend.read_text(path) == "identity\n"
    finally:
        backend.write_text(path, "auto")


@BARE_METAL
@pytest.mark.parametrize(
    ("text", "errno"),
    [("auto", "EPERM"), ("DMA", "EPERM"), ("DMA-FQ", "EPERM"), ("identity", "EPERM"), ("x", "EINVAL")],
)
def test_type_of_a_group_on_a_driver_of_the_host_cannot_be_changed(backend, target, load_driver, text, errno):
    load_driver("nvme")
    assert write(backend, f"{GROUPS}/{target.topology.device(endpoint_address(target)).group}/type", text) == errno


# --- devices that come and go ---


@BARE_METAL
def test_group_goes_with_its_last_device_and_comes_back(backend, target):
    device = target.topology.device(endpoint_address(target))
    bridge = device.address[:5] + "00:00.0"
    backend.write_text(sysfs.path(device.address, "remove"), "1")
    assert not backend.exists(f"{GROUPS}/{device.group}")
    backend.write_text(sysfs.path(bridge, "rescan"), "1")
    assert sysfs.group_of(backend, device.address) == device.group
    assert [each.address for each in sysfs.group_devices(backend, device.group)] == [device.address]


@BARE_METAL
def test_bridge_takes_along_what_is_below_it(backend, target):
    phb = target.topology.phbs[0]
    before = sorted(backend.listdir(f"{BUS}/devices"))
    backend.write_text(sysfs.path(phb.root_port.address, "remove"), "1")
    gone = {device.address for device in phb.functions}
    assert sorted(backend.listdir(f"{BUS}/devices")) == sorted(set(before) - gone)
    assert not backend.exists(f"{GROUPS}/{phb.devices[0].group}")
    backend.write_text(f"{BUS}/rescan", "1")
    assert sorted(backend.listdir(f"{BUS}/devices")) == before
    for device in phb.devices:
        assert sysfs.group_of(backend, device.address) == device.group


def test_power_state_of_a_device_that_was_released_is_unknown(backend, address, target):
    """But on a PC."""
    with on_vfio(backend, address):
        if target.platform == "PC":
            time.sleep(0.3)  # the device has power management, and the kernel its own time for it
        assert backend.read_text(sysfs.path(address, "power_state")) != "unknown\n"
    shown = "D0\n" if target.platform == "PC" else "unknown\n"
    assert backend.read_text(sysfs.path(address, "power_state")) == shown
