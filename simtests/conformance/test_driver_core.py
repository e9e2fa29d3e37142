"""The driver core and sysfs as VFIO's users meet them: groups, drivers, overrides, ids, device nodes.

Source: drivers/base/bus.c, drivers/pci/pci-driver.c, drivers/iommu/iommu.c and drivers/vfio/group.c of Linux 6.12, and
its Documentation/ABI/testing/sysfs-bus-pci.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

import pytest

from simtests.conformance.fixtures import PC, POWER
from simtests.conformance.pci_calls import (
    PROBE,
    VFIO_PCI,
    endpoint_address,
    group_number,
    on_vfio,
    opened,
    outcome,
    spare_address,
)
from vfio import sysfs, uapi
from vfio.backend import Backend

pytestmark = pytest.mark.lab_only  # takes devices from the host
BARE_METAL = pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k")

GROUPS = "/sys/kernel/iommu_groups"
NO_SUCH_DEVICE = "0009:09:09.1"
DRIVERS = "/sys/bus/pci/drivers"


@pytest.fixture
def address(target, backend) -> Iterator[str]:
    """A device on no driver, which no other has the numbers of; on no driver again afterwards."""
    address = spare_address(target)
    assert (sysfs.driver_of(backend, address), sysfs.override_of(backend, address)) == (None, None)
    yield address
    if sysfs.driver_of(backend, address):
        backend.write_text(f"{sysfs.path(address, 'driver')}/unbind", address)
    backend.write_text(override_of(address), "\n")


@pytest.fixture
def ids(target, backend, address) -> Iterator[str]:
    """The numbers of `address`, as new_id takes them; vfio-pci does not know them before, nor afterwards."""
    device = target.topology.device(address)
    ids = f"{device.vendor:04x} {device.device:04x}"
    assert write(backend, f"{VFIO_PCI}/remove_id", ids) == "ENODEV"
    yield ids
    write(backend, f"{VFIO_PCI}/remove_id", ids)


def write(backend: Backend, path: str, text: str) -> str | None:
    """What came of writing to a file: None, or the errno."""
    return outcome(backend.write_text, path, text)


def override_of(address: str) -> str:
    return sysfs.path(address, "driver_override")


def override(backend: Backend, address: str, driver: str) -> None:
    backend.write_text(override_of(address), f"{driver}\n")


# --- Groups ---


def test_group_of_a_device_is_a_relative_link(backend, target):
    for device in target.topology.devices:
        link = backend.readlink(sysfs.path(device.address, "iommu_group"))
        directory = os.path.normpath(os.path.join(sysfs.DEVICES, backend.readlink(sysfs.path(device.address))))
        assert link == os.path.relpath(f"{GROUPS}/{device.group}", directory)


@BARE_METAL
def test_root_port_has_no_group(backend, target):
    for phb in target.topology.phbs:
        assert outcome(backend.readlink, sysfs.path(phb.root_port.address, "iommu_group")) == "ENOENT"


def test_members_of_a_group_are_links_to_devices(backend, target):
    for number, members in target.topology.groups().items():
        names = sorted(backend.listdir(f"{GROUPS}/{number}/devices"))
        assert names == sorted(member.address for member in members)
        for name in names:
            link = backend.readlink(f"{GROUPS}/{number}/devices/{name}")
            device = backend.readlink(sysfs.path(name))
            assert link == "../../../../devices/" + device.partition("devices/")[2]


def test_groups_are_those_of_the_devices_and_no_more(backend, target):
    functions = [each for phb in target.topology.phbs for each in phb.functions]
    groups = {each.group for each in functions if each.group is not None}
    assert sorted(map(int, backend.listdir(GROUPS))) == sorted(groups)


@POWER
def test_group_has_the_name_of_its_partitionable_endpoint(backend, target):
    for number, members in target.topology.groups().items():
        phb = int(members[0].address[:4], 16)
        assert backend.read_text(f"{GROUPS}/{number}/name") == f"domain{phb}-pe{members[0].pe or 0:x}\n"


@POWER
def test_group_has_no_type_and_no_reserved_regions_on_power(backend, target):
    for number in target.topology.groups():
        assert backend.read_text(f"{GROUPS}/{number}/type") == "unknown\n"
        assert backend.read_text(f"{GROUPS}/{number}/reserved_regions") == ""


@PC
def test_group_of_a_pc_has_no_name_a_type_and_the_addresses_of_messages(backend, target):
    messages = "0x00000000fee00000 0x00000000feefffff msi\n"
    for function in target.topology.phbs[0].functions:
        assert outcome(backend.read_text, f"{GROUPS}/{function.group}/name") == "ENOENT"
        assert backend.read_text(f"{GROUPS}/{function.group}/type") == "DMA\n"
        isa = function.group == target.topology.device("0000:00:1f.0").group
        old = "0x0000000000000000 0x0000000000ffffff direct-relaxable\n" if isa else ""
        assert backend.read_text(f"{GROUPS}/{function.group}/reserved_regions") == old + messages


@PC
def test_functions_of_a_pc_are_those_of_its_chipset_and_its_devices(backend, target):
    functions = target.topology.phbs[0].functions
    assert sorted(backend.listdir("/sys/bus/pci/devices")) == sorted(each.address for each in functions)
    for each in functions:
        found = sysfs.device(backend, each.address)
        assert (found.vendor, found.device, found.class_code) == (each.vendor, each.device, each.device_class)
        assert backend.read_text(sysfs.path(each.address, "revision")) == f"0x{each.revision:02x}\n"
        assert group_number(backend, each.address) == each.group


# --- driver_override ---


def test_override_reads_null_when_it_is_unset(backend, address):
    assert backend.read_text(override_of(address)) == "(null)\n"


@pytest.mark.parametrize("text", ["vfio-pci\n", "vfio-pci"])
def test_override_is_read_back_without_the_newline_that_was_written(backend, address, text):
    backend.write_text(override_of(address), text)
    assert backend.read_text(override_of(address)) == "vfio-pci\n"


def test_override_is_cut_at_the_first_newline(backend, address):
    backend.write_text(override_of(address), "one\ntwo\n")
    assert backend.read_text(override_of(address)) == "one\n"


def test_newline_clears_the_override_and_nothing_does_not(backend, address):
    override(backend, address, "some-driver")
    backend.write_text(override_of(address), "")
    assert backend.read_text(override_of(address)) == "some-driver\n"
    backend.write_text(override_of(address), "\n")
    assert backend.read_text(override_of(address)) == "(null)\n"


def test_override_may_be_any_name_that_fits_a_page(backend, address):
    name = "x" * (backend.page_size - 2)
    backend.write_text(override_of(address), name)
    assert backend.read_text(override_of(address)) == f"{name}\n"
    assert write(backend, override_of(address), "y" * (backend.page_size - 1)) == "EINVAL"
    assert backend.read_text(override_of(address)) == f"{name}\n"


def test_override_of_a_bound_device_counts_from_the_next_probe_on(backend, address):
    override(backend, address, "vfio-pci")
    backend.write_text(PROBE, address)
    override(backend, address, "no-such-driver")
    assert sysfs.driver_of(backend, address) == "vfio-pci"
    backend.write_text(f"{VFIO_PCI}/unbind", address)
    backend.write_text(PROBE, address)
    assert sysfs.driver_of(backend, address) is None


# --- drivers_probe ---


def test_probe_of_a_device_that_nothing_matches_succeeds_and_binds_nothing(backend, address):
    backend.write_text(PROBE, address)
    assert sysfs.driver_of(backend, address) is None


@pytest.mark.parametrize("text", ["{}", "{}\n"])
def test_probe_binds_the_driver_of_the_override(backend, address, text):
    override(backend, address, "vfio-pci")
    backend.write_text(PROBE, text.format(address))
    assert sysfs.driver_of(backend, address) == "vfio-pci"
    backend.write_text(PROBE, address)  # bound already: no error


@pytest.mark.parametrize("name", [NO_SUCH_DEVICE, "junk", "\n", "00:00.0"])
def test_probe_of_a_device_that_there_is_not_is_enodev(backend, name):
    assert write(backend, PROBE, name) == "ENODEV"


@BARE_METAL
def test_probe_of_a_bridge_by_vfio_pci_binds_nothing(backend, target):
    bridge = target.topology.phbs[0].root_port.address
    before = sysfs.driver_of(backend, bridge)
    override(backend, bridge, "vfio-pci")
    try:
        if before is None:
            assert write(backend, f"{VFIO_PCI}/bind", bridge) in ("EINVAL", "EAGAIN")
        else:
            assert write(backend, f"{VFIO_PCI}/bind", bridge) == "EBUSY"
        assert sysfs.driver_of(backend, bridge) == before
    finally:
        backend.write_text(override_of(bridge), "\n")


# --- bind and unbind ---


def test_bind_needs_a_match(backend, address):
    assert write(backend, f"{VFIO_PCI}/bind", address) == "ENODEV"
    override(backend, address, "pci-stub")
    assert write(backend, f"{VFIO_PCI}/bind", address) == "ENODEV"
    override(backend, address, "vfio-pci")
    assert write(backend, f"{VFIO_PCI}/bind", address) is None
    assert sysfs.driver_of(backend, address) == "vfio-pci"


def test_bind_of_a_bound_device_is_ebusy(backend, address):
    override(backend, address, "vfio-pci")
    backend.write_text(f"{VFIO_PCI}/bind", address)
    assert write(backend, f"{VFIO_PCI}/bind", address) == "EBUSY"
    override(backend, address, "other")
    assert write(backend, f"{VFIO_PCI}/bind", address) == "ENODEV"


@pytest.mark.parametrize("verb", ["bind", "unbind"])
@pytest.mark.parametrize("name", [NO_SUCH_DEVICE, "junk", "\n"])
def test_bind_and_unbind_of_a_device_that_there_is_not_are_enodev(backend, verb, name):
    assert write(backend, f"{VFIO_PCI}/{verb}", name) == "ENODEV"


def test_unbind_of_a_device_that_the_driver_has_not_is_enodev(backend, address):
    assert write(backend, f"{VFIO_PCI}/unbind", address) == "ENODEV"


@pytest.mark.parametrize("text", ["{}", "{}\n"])
def test_unbind_leaves_the_device_on_no_driver(backend, address, text):
    override(backend, address, "vfio-pci")
    backend.write_text(f"{VFIO_PCI}/bind", text.format(address))
    assert backend.readlink(sysfs.path(address, "driver")).endswith("/bus/pci/drivers/vfio-pci")
    assert backend.exists(f"{VFIO_PCI}/{address}")
    backend.write_text(f"{VFIO_PCI}/unbind", text.format(address))
    assert outcome(backend.readlink, sysfs.path(address, "driver")) == "ENOENT"
    assert not backend.exists(f"{VFIO_PCI}/{address}")


def test_unbind_through_the_device_is_the_same(backend, address):
    override(backend, address, "vfio-pci")
    backend.write_text(PROBE, address)
    backend.write_text(f"{sysfs.path(address, 'driver')}/unbind", address)
    assert sysfs.driver_of(backend, address) is None


def test_write_of_nothing_does_nothing(backend, address):
    override(backend, address, "vfio-pci")
    for path in (PROBE, f"{VFIO_PCI}/bind", f"{VFIO_PCI}/unbind", f"{VFIO_PCI}/new_id", f"{VFIO_PCI}/remove_id"):
        assert write(backend, path, "") is None
    assert sysfs.driver_of(backend, address) is None


def test_files_that_are_only_written_cannot_be_read(backend):
    for path in (PROBE, f"{VFIO_PCI}/bind", f"{VFIO_PCI}/unbind"):
        assert stat.S_IMODE(backend.stat(path).mode) == 0o200
        assert outcome(backend.read_text, path) == "EACCES"


def test_driver_that_there_is_not_has_no_files(backend, address):
    assert write(backend, f"{DRIVERS}/no-such-driver/bind", address) == "ENOENT"
    assert outcome(backend.listdir, f"{DRIVERS}/no-such-driver") == "ENOENT"
    assert outcome(backend.read_text, sysfs.path(NO_SUCH_DEVICE, "vendor")) == "ENOENT"


# --- new_id and remove_id ---


def test_new_id_binds_the_device_at_once_and_remove_id_leaves_it(backend, address, ids):
    assert write(backend, f"{VFIO_PCI}/new_id", ids) is None
    assert sysfs.driver_of(backend, address) == "vfio-pci"
    assert write(backend, f"{VFIO_PCI}/remove_id", ids) is None
    assert sysfs.driver_of(backend, address) == "vfio-pci"
    backend.write_text(f"{VFIO_PCI}/unbind", address)
    backend.write_text(PROBE, address)
    assert sysfs.driver_of(backend, address) is None


def test_new_id_binds_every_free_device_that_matches(backend, target):
    """vfio-pci takes all edus at once, but for the one that another override keeps."""
    edus = [device for device in target.topology.devices if device.model == "edu"]
    ids = f"{edus[0].vendor:04x} {edus[0].device:04x}"
    override(backend, edus[0].address, "no-such-driver")
    try:
        assert write(backend, f"{VFIO_PCI}/new_id", ids) is None
        found = {device.address: sysfs.driver_of(backend, device.address) for device in edus}
        assert found == {device.address: "vfio-pci" if device is not edus[0] else None for device in edus}
    finally:
        override(backend, edus[0].address, "")
        write(backend, f"{VFIO_PCI}/remove_id", ids)
        for device in edus[1:]:
            write(backend, f"{VFIO_PCI}/unbind", device.address)


def test_id_that_is_known_already_is_eexist(backend, address, ids):
    assert write(backend, f"{VFIO_PCI}/new_id", ids) is None
    assert write(backend, f"{VFIO_PCI}/new_id", ids) == "EEXIST"
    backend.write_text(f"{VFIO_PCI}/unbind", address)
    assert write(backend, f"{VFIO_PCI}/bind", address) is None  # the id still stands


def test_id_is_removed_once(backend, address, ids):
    assert write(backend, f"{VFIO_PCI}/remove_id", ids) == "ENODEV"
    assert write(backend, f"{VFIO_PCI}/new_id", f"0x{ids.replace(' ', ' 0x')}\n") is None
    assert write(backend, f"{VFIO_PCI}/remove_id", ids) is None
    assert write(backend, f"{VFIO_PCI}/remove_id", ids) == "ENODEV"


@pytest.mark.parametrize("file", ["new_id", "remove_id"])
@pytest.mark.parametrize("text", ["\n", "1b36", "junk", "zz 0005", "1b36 zz"])
def test_id_needs_two_numbers(backend, file, text):
    assert write(backend, f"{VFIO_PCI}/{file}", text) == "EINVAL"


def test_id_with_a_subsystem_that_the_device_has_not_does_not_match(backend, address, ids):
    assert write(backend, f"{VFIO_PCI}/new_id", f"{ids} dead beef") is None
    try:
        assert sysfs.driver_of(backend, address) is None
    finally:
        assert write(backend, f"{VFIO_PCI}/remove_id", f"{ids} dead beef") is None


def test_id_with_the_subsystem_of_the_device_matches(backend, address, ids):
    device = sysfs.device(backend, address)
    whole = f"{ids} {device.subsystem_vendor:04x} {device.subsystem_device:04x}"
    assert write(backend, f"{VFIO_PCI}/new_id", whole) is None
    assert sysfs.driver_of(backend, address) == "vfio-pci"
    assert write(backend, f"{VFIO_PCI}/remove_id", whole) is None


def test_id_does_not_take_a_device_whose_override_names_another_driver(backend, address, ids):
    override(backend, address, "no-such-driver")
    assert write(backend, f"{VFIO_PCI}/new_id", ids) is None
    assert sysfs.driver_of(backend, address) is None


# --- Nodes ---


def test_group_gets_a_node_with_its_first_device_on_vfio_and_loses_it_with_the_last(backend, address):
    number = group_number(backend, address)
    assert not backend.exists(sysfs.node(number))
    with on_vfio(backend, address):
        found = backend.stat(sysfs.node(number))
        assert stat.S_ISCHR(found.mode)
        assert (stat.S_IMODE(found.mode), found.uid, found.gid) == (0o600, 0, 0)
        assert backend.exists(f"/sys/class/vfio/{number}")
        text = backend.read_text(f"/sys/class/vfio/{number}/dev")
        assert text == f"{os.major(found.rdev)}:{os.minor(found.rdev)}\n"
    assert not backend.exists(sysfs.node(number))
    assert not backend.exists(f"/sys/class/vfio/{number}")


def test_nodes_get_the_lowest_free_minor(backend, target, address):
    free = [device for device in target.topology.devices if device.driver is None]
    others = [device.address for device in free if device.group != group_number(backend, address)]
    with on_vfio(backend, address):
        assert minor(backend, address) == 0
        with on_vfio(backend, others[-1]):
            assert minor(backend, others[-1]) == 1
    with on_vfio(backend, others[-1]):
        assert minor(backend, others[-1]) == 0


def test_device_on_vfio_has_an_object_of_its_own(backend, address):
    assert outcome(backend.listdir, sysfs.path(address, "vfio-dev")) == "ENOENT"
    with on_vfio(backend, address):
        (name,) = backend.listdir(sysfs.path(address, "vfio-dev"))
        assert name == "vfio0"
        assert backend.exists(f"/sys/class/vfio-dev/{name}")
    assert outcome(backend.listdir, sysfs.path(address, "vfio-dev")) == "ENOENT"
    assert not backend.exists(f"/sys/class/vfio-dev/{name}")


def test_container_node_is_for_everybody(backend):
    found = backend.stat("/dev/vfio/vfio")
    assert stat.S_ISCHR(found.mode)
    assert stat.S_IMODE(found.mode) == 0o666
    assert (os.major(found.rdev), os.minor(found.rdev), found.uid, found.gid) == (10, 196, 0, 0)


def test_owner_and_mode_of_a_node_last_until_the_group_is_released(backend, address):
    node = sysfs.node(group_number(backend, address))
    with on_vfio(backend, address):
        backend.chown(node, 1234, 77)
        backend.chmod(node, 0o660)
        found = backend.stat(node)
        assert (stat.S_IMODE(found.mode), found.uid, found.gid) == (0o660, 1234, 77)
        backend.close(backend.open(node, os.O_RDWR))
    with on_vfio(backend, address):
        found = backend.stat(node)
        assert (stat.S_IMODE(found.mode), found.uid, found.gid) == (0o600, 0, 0)


def test_node_that_there_is_not_cannot_be_changed(backend, address):
    node = sysfs.node(group_number(backend, address))
    assert outcome(backend.stat, node) == "ENOENT"
    assert outcome(backend.chown, node, 0, 0) == "ENOENT"
    assert outcome(backend.chmod, node, 0o600) == "ENOENT"
    assert outcome(backend.open, node, os.O_RDWR) == "ENOENT"


# --- While a group is in use ---


@pytest.fixture
def neighbour(backend, device_address) -> Iterator[str]:
    """The edu, on vfio-pci; on bare metal it is of the group of `address`."""
    with on_vfio(backend, device_address):
        yield device_address


@BARE_METAL
def test_harmless_driver_takes_a_member_of_a_group_in_use(backend, neighbour, address, load_driver):
    """pci-stub does no DMA: it may have a device of a group that a container owns."""
    load_driver("pci-stub")
    with opened(backend, neighbour) as device:
        override(backend, address, "pci-stub")
        backend.write_text(PROBE, address)
        assert sysfs.driver_of(backend, address) == "pci-stub"
        name = bytearray(address.encode() + b"\0")
        assert outcome(backend.ioctl, device.group, uapi.VFIO_GROUP_GET_DEVICE_FD, name) == "ENODEV"


@BARE_METAL
def test_group_with_a_member_on_a_harmless_driver_can_be_used(backend, neighbour, address, load_driver):
    load_driver("pci-stub")
    override(backend, address, "pci-stub")
    backend.write_text(PROBE, address)
    with opened(backend, neighbour) as device:
        status = uapi.vfio_group_status()
        assert backend.ioctl(device.group, uapi.VFIO_GROUP_GET_STATUS, uapi.buffer(status)) == 0
        assert status.flags == uapi.VFIO_GROUP_FLAGS_VIABLE | uapi.VFIO_GROUP_FLAGS_CONTAINER_SET


@BARE_METAL
def test_driver_of_the_host_cannot_take_a_member_of_a_group_in_use(backend, neighbour, address, load_driver):
    load_driver("nvme")
    override(backend, address, "nvme")
    with opened(backend, neighbour):
        assert write(backend, f"{DRIVERS}/nvme/bind", address) == "EBUSY"
        assert write(backend, PROBE, address) == "EINVAL"
        assert sysfs.driver_of(backend, address) is None


@BARE_METAL
def test_driver_of_the_host_takes_its_device_and_gives_it_to_vfio(backend, target, load_driver):
    disk = endpoint_address(target)
    load_driver("nvme")
    assert sysfs.driver_of(backend, disk) == "nvme"
    override(backend, disk, "vfio-pci")
    assert sysfs.driver_of(backend, disk) == "nvme"
    assert write(backend, f"{VFIO_PCI}/bind", disk) == "EBUSY"
    assert write(backend, f"{VFIO_PCI}/unbind", disk) == "ENODEV"
    assert write(backend, f"{DRIVERS}/nvme/unbind", disk) is None
    backend.write_text(PROBE, disk)
    assert sysfs.driver_of(backend, disk) == "vfio-pci"
    override(backend, disk, "")
    backend.write_text(f"{VFIO_PCI}/unbind", disk)
    backend.write_text(PROBE, disk)
    assert sysfs.driver_of(backend, disk) == "nvme"


@BARE_METAL
def test_removed_device_is_gone_and_a_rescan_brings_it_back(backend, address):
    number = group_number(backend, address)
    with on_vfio(backend, address):
        backend.write_text(sysfs.path(address, "remove"), "1\n")
        try:
            assert not backend.exists(sysfs.path(address))
            assert outcome(backend.readlink, f"{GROUPS}/{number}/devices/{address}") == "ENOENT"
            assert not backend.exists(sysfs.node(number))
            assert write(backend, PROBE, address) == "ENODEV"
        finally:
            backend.write_text("/sys/bus/pci/rescan", "1\n")
        assert backend.read_text(override_of(address)) == "(null)\n"
        assert sysfs.driver_of(backend, address) is None
        assert group_number(backend, address) == number


def kept(backend: Backend, address: str) -> bool:
    """Whether the test device, which cannot be reset by itself, knows after a close which test was selected before it."""
    with opened(backend, address) as device:
        assert device.read(0, 0, 16) == bytes(16)
        assert device.write(0, 0, b"\0") == 1  # select the first test
        selected = device.read(0, 0, 16)
        assert selected != bytes(16)
    with opened(backend, address) as device:
        found = device.read(0, 0, 16)
        assert device.write(0, 0, b"\xff") == 1  # select none
        return found == selected


@BARE_METAL
def test_last_close_resets_the_bus_if_vfio_has_all_of_it(backend, address, neighbour):
    with on_vfio(backend, address):
        assert not kept(backend, address)


@BARE_METAL
def test_last_close_cannot_reset_a_bus_with_a_device_that_is_not_on_vfio(backend, address):
    with on_vfio(backend, address):
        assert kept(backend, address)


def test_type_of_a_group_in_use_cannot_be_changed(backend, neighbour, target):
    path = f"{GROUPS}/{group_number(backend, neighbour)}/type"
    with opened(backend, neighbour):
        assert write(backend, path, "DMA\n") == "EPERM"
        assert backend.read_text(path) == ("DMA\n" if target.platform == "PC" else "unknown\n")


# --- What sysfs tells of a device ---


@BARE_METAL
def test_bare_metal_shows_the_partitionable_endpoint_to_eeh(backend, target):
    for device in target.topology.devices:
        assert backend.read_text(sysfs.path(device.address, "eeh_pe_config_addr")) == f"0x{device.pe:x}\n"
        assert backend.exists(sysfs.path(device.address, "eeh_pe_state"))


def test_identity_files_are_hexadecimal_numbers(backend, target):
    for device in target.topology.devices:
        assert backend.read_text(sysfs.path(device.address, "vendor")) == f"0x{device.vendor:04x}\n"
        assert backend.read_text(sysfs.path(device.address, "device")) == f"0x{device.device:04x}\n"
        assert backend.read_text(sysfs.path(device.address, "class")) == f"0x{device.device_class:06x}\n"


def minor(backend: Backend, address: str) -> int:
    """Minor number of the node of a device's group."""
    return os.minor(backend.stat(sysfs.node(group_number(backend, address))).rdev)
