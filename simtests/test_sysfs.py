"""Devices, groups, what the host uses them for, and who holds them."""

from __future__ import annotations

import errno

import pytest
from fake_host import Driver, Function, Host

from vfio import errors, holders, obstacles, pciids, sysfs, usage


def test_devices_come_in_the_order_of_their_addresses(host):
    assert [device.address for device in sysfs.devices(host)] == [
        "0000:00:00.0",
        "0000:01:00.0",
        "0000:01:00.1",
        "0001:00:00.0",
        "0001:01:00.0",
        "0002:00:00.0",
    ]


def test_domains_beyond_four_digits_come_last():
    host = Host(Function("10000:00:00.0"), Function("ffff:00:00.0"), Function("0001:00:00.0"))
    assert [device.address for device in sysfs.devices(host)] == ["0001:00:00.0", "ffff:00:00.0", "10000:00:00.0"]


def test_device_tells_all_that_sysfs_says_of_it(host):
    assert sysfs.device(host, "1:1:0.0") == sysfs.PciDevice(
        address="0001:01:00.0",
        vendor=0x1B36,
        device=0x0010,
        subsystem_vendor=0x1AF4,
        subsystem_device=0x1100,
        class_code=0x00FF00,
        revision=0x10,
        driver="nvme",
        overridable=True,
        driver_override=None,
        group=2,
        parent="0001:00:00.0",
        is_bridge=False,
        phb=1,
        pe=0xFD,
        vfio_dev=None,
    )


def test_a_device_without_driver_group_or_parent(host):
    bridge = sysfs.device(host, "0000:00:00.0")
    assert (bridge.group, bridge.parent, bridge.phb, bridge.pe, bridge.is_bridge) == (None, None, None, None, True)
    assert sysfs.device(host, "0002:00:00.0").driver is None
    assert sysfs.device(host, "0002:00:00.0").driver_override == "other"


def test_off_power_there_is_no_pe():
    host = Host(Function("0000:00:01.0", group=1))
    host.hidden |= {"/proc/powerpc", "/sys/kernel/iommu_groups/1/name"}
    assert not sysfs.on_power(host)
    assert sysfs.device(host, "0000:00:01.0").pe is None


def test_a_device_that_is_not_there_names_the_nearest(host):
    with pytest.raises(errors.NoSuchDevice) as raised:
        sysfs.device(host, "0000:01:00.2")
    assert raised.value.errno == errno.ENODEV
    assert "0000:01:00.0" in raised.value.remedy
    assert "0000:01:00.1" in raised.value.remedy


@pytest.mark.parametrize(
    "text", ["../../x", "0000:01:00.0/../x", "0000:01:00.8", "0000:01:20.0", "", "x", "0000:01:00.0\n"]
)
@pytest.mark.parametrize("look", [sysfs.device, sysfs.group_of, sysfs.driver_of, sysfs.override_of, sysfs.eeh])
def test_what_is_not_an_address_reaches_no_path(host, look, text):
    with pytest.raises(errors.InvalidAddress):
        look(host, text)


def test_groups_and_their_devices(host):
    assert sysfs.groups(host) == [2, 3, 7]
    assert [device.address for device in sysfs.group_devices(host, 2)] == ["0001:00:00.0", "0001:01:00.0"]
    assert sysfs.group_devices(host, 99) == []
    assert sysfs.group_of(host, "0001:01:00.0") == 2
    assert sysfs.group_of(host, "0000:00:00.0") is None


def test_blockers_are_devices_on_drivers_that_do_dma(host):
    assert sysfs.blockers(host, 7) == [("0000:01:00.0", "tg3", ""), ("0000:01:00.1", "tg3", "")]
    assert sysfs.blockers(host, 2) == [("0001:01:00.0", "nvme", "")]  # the bridge on pcieport is none
    assert sysfs.blockers(host, 3) == []


@pytest.mark.parametrize("driver", [None, "vfio-pci", "pci-stub", "pcieport"])
def test_drivers_without_dma_do_not_block(driver):
    host = Host(Function("0000:00:01.0", driver, group=1))
    assert sysfs.blockers(host, 1) == []


def test_a_variant_driver_of_vfio_pci_does_not_block():
    host = Host(Function("0000:00:01.0", "mlx5_vfio", group=1), drivers=(Driver("mlx5_vfio", vfio=True),))
    assert sysfs.blockers(host, 1) == []
    assert sysfs.device(host, "0000:00:01.0").vfio_dev == "vfio0"


def test_a_network_interface_that_is_up_is_in_use(host):
    host.network("eth0", "0000:01:00.0", up=False)
    host.network("eth1", "0000:01:00.1", up=True)
    assert usage.of_devices(host) == {"0000:01:00.1": ["network interface eth1 is up"]}
    assert sysfs.blockers(host, 7)[1].note == "network interface eth1 is up"


def test_a_mounted_disk_is_in_use(host):
    host.disk("nvme0n1", "0001:01:00.0", "259:0")
    host.disk("nvme0n1p2", "0001:01:00.0", "259:2", mounted=("/mnt/my disk",))
    assert usage.of_devices(host) == {"0001:01:00.0": ["disk nvme0n1p2 is mounted on /mnt/my disk"]}


def test_a_btrfs_disk_is_found_by_its_source(host):
    host.disk("nvme0n1", "0001:01:00.0", "259:0", mounted=("/home",), btrfs=True)
    assert " 0:31 / /home rw,relatime - btrfs /dev/nvme0n1 rw\n" in host.read_text("/proc/self/mountinfo")
    assert usage.of_devices(host) == {
        "0001:01:00.0": ["disk nvme0n1 is mounted on /home", "disk nvme0n1 is part of a mounted btrfs"]
    }


def test_another_member_of_a_mounted_btrfs_is_in_use(host):
    host.disk("nvme0n1", "0001:01:00.0", "259:0", btrfs=True)
    assert usage.of_devices(host) == {"0001:01:00.0": ["disk nvme0n1 is part of a mounted btrfs"]}


def test_swap_is_in_use(host):
    host.disk("nvme0n1", "0001:01:00.0", "259:0", swap=True)
    assert usage.of_devices(host) == {"0001:01:00.0": ["disk nvme0n1 is swap"]}


def test_a_disk_under_device_mapper_or_md_is_in_use(host):
    host.disk("nvme0n1", "0001:01:00.0", "259:0", holders=("dm-0", "md1"))
    assert usage.of_devices(host) == {
        "0001:01:00.0": ["disk nvme0n1 is in use by dm-0", "disk nvme0n1 is in use by md1"]
    }


def test_a_multipath_namespace_belongs_to_every_controller(host):
    host.disk("nvme0n1", "0001:01:00.0", "259:0", mounted=("/",), multipath=True)
    assert host.readlink("/sys/class/block/nvme0n1").startswith("../../devices/virtual/nvme-subsystem/")
    assert usage.of_devices(host) == {"0001:01:00.0": ["disk nvme0n1 is mounted on /"]}


def test_a_disk_that_nobody_uses_is_not_in_use(host):
    host.disk("nvme0n1", "0001:01:00.0", "259:0")
    assert usage.of_devices(host) == {}


@pytest.mark.parametrize(
    ("address", "judgement"),
    [
        ("0000:00:00.0", (False, "a bridge stays with the host")),
        ("0000:01:00.0", (False, "0000:01:00.1: network interface eth1 is up")),
        ("0000:01:00.1", (False, "network interface eth1 is up")),
        ("0001:01:00.0", (True, "")),
        ("0002:00:00.0", (True, "")),
    ],
)
def test_assignable(host, address, judgement):
    host.network("eth1", "0000:01:00.1", up=True)
    device = sysfs.device(host, address)
    blockers = sysfs.blockers(host, device.group) if device.group is not None else []
    assert sysfs.assignable(device, blockers) == judgement


def test_a_device_whose_neighbour_has_a_driver_is_assignable_together_with_it(host):
    device = sysfs.device(host, "0000:01:00.0")
    assert sysfs.assignable(device, sysfs.blockers(host, 7)) == (True, "only together with 0000:01:00.1 (tg3)")


def test_a_device_without_group_is_not_assignable():
    host = Host(Function("0000:00:01.0"))
    assert sysfs.assignable(sysfs.device(host, "0000:00:01.0"), []) == (False, "in no IOMMU group")


def test_eeh_files_are_those_that_there_are():
    files = {"eeh_mode": "0x200", "eeh_pe_config_addr": "0xfd", "eeh_pe_state": "0x00000078 0x00000800"}
    assert sysfs.eeh(Host(Function("0000:00:01.0", group=1), eeh=True), "0000:00:01.0") == files
    assert sysfs.eeh(Host(Function("0000:00:01.0", group=1)), "0000:00:01.0") == {}


# --- who has it open ---


@pytest.fixture
def bound(host):
    """The host, with the disk and the free device on vfio-pci."""
    host.move("0001:01:00.0", "vfio-pci")
    host.move("0002:00:00.0", "vfio-pci")
    return host


def test_holders_are_named_with_their_command(bound):
    bound.hold(20, "qemu-system-ppc64 -M pseries", 2)
    bound.hold(7, "sh", 3)
    assert holders.of(bound, "/dev/vfio/2") == [(20, "qemu-system-ppc64 -M pseries")]


def test_a_node_that_has_been_removed_still_has_its_holder(bound):
    bound.hold(20, "qemu", 2)
    bound.move("0001:01:00.0", None)
    assert not bound.exists("/dev/vfio/2")
    assert holders.of(bound, "/dev/vfio/2") == [(20, "qemu")]


def test_a_group_is_held_by_a_process_that_only_has_its_device(bound):
    bound.hold(20, "driver", 2, device="0001:01:00.0", only_device=True)
    bound.hold(21, "other", 3, device="0002:00:00.0")
    assert holders.of(bound, "/dev/vfio/2") == [(20, "driver")]
    assert holders.having_open(bound, "/dev/vfio/2") == []


def test_a_long_command_is_cut(bound):
    bound.hold(20, "x" * 100, 2)
    assert holders.of(bound, "/dev/vfio/2") == [(20, "x" * 57 + "...")]


def test_processes_that_may_not_be_read_are_skipped(bound):
    bound.hold(20, "qemu", 2)
    bound.hold(30, "qemu of the user's", 3)
    process = next(each for each in bound.machine.processes if each.pid == 30)
    process.uid = bound.process.uid = 4321
    assert holders.of(bound, "/dev/vfio/2") == []
    assert holders.of(bound, "/dev/vfio/3") == [(30, "qemu of the user's")]


# --- what stands in the way ---


def test_obstacles_name_the_blocking_devices(host):
    host.network("eth1", "0000:01:00.1", up=True)
    (error,) = obstacles.of(host, "0000:01:00.0")
    assert isinstance(error, errors.GroupNotViable)
    assert error.errno == errno.EPERM
    assert error.why == "0000:01:00.0 is on tg3; 0000:01:00.1 is on tg3 (network interface eth1 is up)"
    assert error.remedy.startswith("free it:  vfio bind 0000:01:00.0 0000:01:00.1 --force")


def test_obstacles_of_a_device_without_driver(host):
    (error,) = obstacles.of(host, "0002:00:00.0")
    assert isinstance(error, errors.NotBound)


def test_obstacles_of_a_bridge(host):
    (error,) = obstacles.of(host, "0001:00:00.0")
    assert isinstance(error, errors.IsBridge)


def test_obstacles_of_a_host_without_vfio(host):
    host.machine.driver_core.unload("vfio-pci")
    kinds = [type(error) for error in obstacles.of(host, "0002:00:00.0")]
    assert kinds == [errors.NoVfio, errors.ModuleMissing, errors.NotBound]


def test_obstacles_on_an_old_kernel_on_power(host):
    host.host.release = "6.1.0-44-powerpc64le"
    assert errors.KernelTooOld in [type(error) for error in obstacles.of(host, "0002:00:00.0")]


def test_obstacles_of_a_bound_device_that_somebody_has_open():
    host = Host(Function("0000:00:01.0", "vfio-pci", group=1))
    host.hold(77, "qemu", 1)
    (error,) = obstacles.of(host, "0000:00:01.0")
    assert isinstance(error, errors.Busy)
    assert error.holders == ((77, "qemu"),)


def test_no_obstacle():
    host = Host(Function("0000:00:01.0", "vfio-pci", group=1))
    assert obstacles.of(host, "0000:00:01.0") == []


@pytest.mark.parametrize(("mode", "denied"), [(0o600, True), (0o660, True), (0o666, False), (0o644, True)])
def test_obstacles_for_a_user_are_owner_and_mode(mode, denied):
    host = Host(Function("0000:00:01.0", "vfio-pci", group=1))
    host.nodes[1].mode = mode
    user = host.another_process(uid=4321)
    assert [type(error) for error in obstacles.of(user, "0000:00:01.0")] == [errors.AccessDenied] * denied


@pytest.mark.parametrize(("groups", "denied"), [((4321,), True), ((4321, 36), False), ((36,), False)])
def test_obstacles_for_a_member_of_the_nodes_group(groups, denied):
    host = Host(Function("0000:00:01.0", "vfio-pci", group=1))
    host.nodes[1].gid, host.nodes[1].mode = 36, 0o660
    user = host.another_process(uid=4321, groups=groups)
    assert [type(error) for error in obstacles.of(user, "0000:00:01.0")] == [errors.AccessDenied] * denied


# --- pci.ids ---

PCI_IDS = """\
# comment
14e4  Broadcom Inc.
\t1657  NetXtreme BCM5719
\t\t1014 0420  FC EN0S
# in the middle
\t1658  Another
1b36  Red Hat, Inc.
\t0010  QEMU NVM Express Controller
C 01  Mass storage controller
\t08  Non-Volatile memory controller
C 02  Network controller
"""


def test_pci_ids_names_vendors_devices_and_classes(tmp_path):
    file = tmp_path / "pci.ids"
    file.write_text(PCI_IDS)
    names = pciids.load((tmp_path / "absent", file))
    assert names.vendor(0x14E4) == "Broadcom Inc."
    assert names.device(0x14E4, 0x1657) == "NetXtreme BCM5719"
    assert names.device(0x14E4, 0x1658) == "Another"
    assert names.device(0x14E4, 0x0010) is None  # another vendor's
    assert names.device(0x1B36, 0x0010) == "QEMU NVM Express Controller"
    assert names.device_class(0x010802) == "Non-Volatile memory controller"
    assert names.device_class(0x020800) == "Network controller"
    assert names.vendor(0xFFFF) is None
    assert names.device_class(0xFF0000) is None


def test_without_pci_ids_nothing_has_a_name(tmp_path):
    names = pciids.load((tmp_path / "absent",))
    assert (names.vendor(0x14E4), names.device(0x14E4, 0x1657), names.device_class(0x020000)) == (None, None, None)


def test_slots_tell_where_they_are():
    host = Host(Function("0001:01:00.0", slot="C5"), Function("0001:01:00.1", slot="C5"), Function("0002:00:00.0"))
    assert sysfs.slots(host) == {"C5": "0001:01:00"}
    host.unplug("0001:01:00.0")
    assert sysfs.slots(host) == {"C5": "0001:01:00"}
