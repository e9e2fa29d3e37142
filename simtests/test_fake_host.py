"""The host of the modelled kernel: who may do what to its files, what /proc shows, and devices that are in use."""

from __future__ import annotations

import errno
import os
import stat
import threading

import pytest

import vfio
from vfio import dma, holders, sysfs, topology, usage
from vfio.backend import open_backend
from vfio.fake.backend import FakeBackend
from vfio.fake.kernel_error import KernelWouldBlock

EDU = "0000:01:00.0"
NEIGHBOUR = "0000:01:00.1"
DISK = "0002:01:00.0"


def machine(url: str = "fake:power8") -> FakeBackend:
    backend = open_backend(url)
    assert isinstance(backend, FakeBackend)
    return backend


@pytest.fixture
def root() -> FakeBackend:
    """A process of root's, with the edu on vfio-pci."""
    backend = machine()
    backend.write_text(sysfs.path(EDU, "driver_override"), "vfio-pci\n")
    backend.write_text("/sys/bus/pci/drivers_probe", EDU)
    return backend


@pytest.fixture
def alice(root: FakeBackend) -> FakeBackend:
    """A process of somebody else's on the same machine."""
    return root.another_process(uid=1000)


def refused(number: int, call, *arguments) -> None:
    """The call fails with this errno."""
    with pytest.raises(OSError) as raised:  # noqa: PT011 - the errno is looked at
        call(*arguments)
    assert errno.errorcode[raised.value.errno] == errno.errorcode[number]


# --- users ---


@pytest.mark.parametrize(
    "path",
    [
        sysfs.path(EDU, "driver_override"),
        sysfs.path(EDU, "remove"),
        "/sys/bus/pci/drivers_probe",
        "/sys/bus/pci/drivers/vfio-pci/bind",
        "/sys/kernel/iommu_groups/0/type",
    ],
)
def test_a_user_cannot_write_to_sysfs(alice, path):
    refused(errno.EACCES, alice.write_text, path, "1")


def test_a_user_reads_what_root_reads_but_for_what_is_only_written(alice):
    assert alice.read_text(sysfs.path(EDU, "driver_override")) == "vfio-pci\n"
    refused(errno.EACCES, alice.read_text, "/sys/bus/pci/drivers_probe")


def test_a_file_that_was_given_away_can_be_written_by_its_new_owner(root, alice):
    path = sysfs.path(NEIGHBOUR, "driver_override")
    root.chown(path, 1000, -1)
    alice.write_text(path, "pci-stub\n")
    assert root.read_text(path) == "pci-stub\n"
    assert alice.stat(path)[:3] == (stat.S_IFREG | 0o644, 1000, 0)


def test_what_was_given_away_goes_with_the_device(root):
    path = sysfs.path(NEIGHBOUR, "driver_override")
    root.chown(path, 1000, -1)
    root.write_text(sysfs.path(NEIGHBOUR, "remove"), "1")
    root.write_text("/sys/bus/pci/rescan", "1")
    assert root.stat(path).uid == 0


def test_only_root_gives_files_away_and_only_the_owner_changes_their_mode(root, alice):
    refused(errno.EPERM, alice.chown, "/dev/vfio/0", 1000, 1000)
    refused(errno.EPERM, alice.chmod, "/dev/vfio/0", 0o666)
    root.chown("/dev/vfio/0", 1000, -1)
    alice.chmod("/dev/vfio/0", 0o640)
    assert root.stat("/dev/vfio/0")[:3] == (stat.S_IFCHR | 0o640, 1000, 0)
    refused(errno.EPERM, alice.chown, "/dev/vfio/0", 0, 0)


@pytest.mark.parametrize(
    ("owner", "mode", "opens"),
    [
        ((0, 0), 0o600, False),
        ((1000, 0), 0o600, True),
        ((1000, 0), 0o066, False),
        ((0, 1000), 0o660, True),
        ((0, 0), 0o660, False),
        ((0, 0), 0o666, True),
        ((0, 0), 0o644, False),
    ],
)
def test_a_group_opens_by_owner_and_mode(root, alice, owner, mode, opens):
    root.chown("/dev/vfio/0", *owner)
    root.chmod("/dev/vfio/0", mode)
    if opens:
        alice.close(alice.open("/dev/vfio/0", os.O_RDWR))
    else:
        refused(errno.EACCES, alice.open, "/dev/vfio/0", os.O_RDWR)
    root.close(root.open("/dev/vfio/0", os.O_RDWR))


def test_everybody_opens_the_container(alice):
    alice.close(alice.open("/dev/vfio/vfio", os.O_RDWR))


def test_the_files_of_another_users_process_are_its_own(root, alice):
    refused(errno.EACCES, alice.listdir, f"/proc/{root.process.pid}/fd")
    refused(errno.EACCES, alice.read_text, f"/proc/{root.process.pid}/smaps")
    assert not alice.exists(f"/proc/{root.process.pid}/fd/0")
    assert alice.read_text(f"/proc/{root.process.pid}/comm")
    assert root.listdir(f"/proc/{alice.process.pid}/fd") == []


# --- paths ---


@pytest.mark.parametrize("path", ["", "sys", "/nowhere", "/sys/bus/pci/devices/x", "/sys/\0", "/dev/vfio/1"])
def test_paths_that_lead_nowhere(root, path):
    assert not root.exists(path)
    refused(errno.ENOENT, root.read_text, path)


@pytest.mark.parametrize("number", ["00", "+0", "0 ", "\u0660", "1_0", "-0"])
def test_a_number_is_spelled_in_one_way(root, number):
    assert not root.exists(f"/dev/vfio/{number}")
    assert not root.exists(f"/sys/kernel/iommu_groups/{number}")


def test_dots_and_slashes(root):
    assert root.read_text(f"/sys//bus/./pci/devices/{EDU}/../{EDU}/vendor") == "0x1234\n"
    assert root.exists("/../sys/bus/pci/")
    refused(errno.ENOTDIR, root.read_text, sysfs.path(EDU, "vendor") + "/")


def test_opening_what_is_no_device(root):
    refused(errno.EISDIR, root.open, "/dev/vfio", os.O_RDWR)
    refused(errno.ENOTDIR, root.open, "/dev/vfio/0/x", os.O_RDWR)
    refused(errno.EACCES, root.open, sysfs.path(EDU, "vendor"), os.O_RDWR)
    fd = root.open(sysfs.path(EDU, "config"), os.O_RDONLY)
    assert root.pread(fd, 4, 0) == b"\x34\x12\xe8\x11"
    assert root.pread(fd, 2, 2) == b"\xe8\x11"
    root.close(fd)


# --- /proc ---


def test_processes_show_their_files(root):
    container = root.open("/dev/vfio/vfio", os.O_RDWR)
    group = root.open("/dev/vfio/0", os.O_RDWR)
    links = {fd: root.readlink(f"/proc/self/fd/{fd}") for fd in root.listdir("/proc/self/fd")}
    assert links == {str(container): "/dev/vfio/vfio", str(group): "/dev/vfio/0"}
    root.close(group)
    root.close(container)


def test_locked_memory_shows_in_the_status(root):
    root.process.locked_pages = 3
    assert "VmLck:\t      12 kB\n" in root.read_text("/proc/self/status")
    root.process.locked_pages = 0


@pytest.mark.parametrize(("uid", "ipc_lock"), [(0, True), (0, False), (1000, False), (1000, True)])
def test_capabilities_show_in_the_status(root, uid, ipc_lock):
    other = root.another_process(uid=uid, ipc_lock=ipc_lock)
    (line,) = (line for line in other.read_text("/proc/self/status").splitlines() if line.startswith("CapEff"))
    assert bool(int(line.split()[1], 16) & 1 << 14) is ipc_lock


def test_page_sizes_of_memory_show_in_smaps():
    backend = machine("fake:power8?page_size=65536")
    with backend.allocate(16 << 20, 16 << 20) as large, backend.allocate(65536) as small:
        assert dma.backing_page_size(backend, dma.MemoryRange(large.address + 4096, 4096)) == 16 << 20
        assert dma.backing_page_size(backend, dma.MemoryRange(small.address, 65536)) == 65536


def test_what_the_kernel_tells_of_itself_is_the_machines():
    backend = machine("fake:power9?page_size=65536&kernel=7.2")
    assert backend.read_text("/proc/sys/kernel/osrelease").startswith("7.2.")
    assert backend.read_text("/proc/sys/kernel/osrelease").endswith("-64k\n")
    cpu = dict(line.split(":") for line in backend.read_text("/proc/cpuinfo").replace("\t", "").splitlines() if line)
    assert (cpu["cpu"], cpu["platform"], cpu["MMU"]) == (" POWER9, altivec supported", " PowerNV", " Radix")
    memory = topology.load("power9").memory // 1024
    assert backend.read_text("/proc/meminfo").splitlines()[0].split() == ["MemTotal:", str(memory), "kB"]


def test_every_boot_has_an_id_of_its_own():
    ids = {machine().read_text("/proc/sys/kernel/random/boot_id") for _ in range(3)}
    assert len(ids) == 3


# --- what the host uses devices for ---


def test_disks_and_interfaces_are_there_while_the_hosts_driver_has_the_device():
    backend = machine("fake:example")
    assert set(usage.of_devices(backend)) == {"0000:01:00.0", "0001:00:00.0"}
    number = os.makedev(259, 1)
    assert backend.stat("/dev/nvme0n1p1") == (stat.S_IFBLK | 0o660, 0, 6, number)
    backend.write_text("/sys/bus/pci/drivers/nvme/unbind", "0001:00:00.0")
    assert not backend.exists("/dev/nvme0n1p1")
    assert backend.listdir("/sys/class/block") == []
    assert set(usage.of_devices(backend)) == {"0000:01:00.0"}
    backend.write_text("/sys/bus/pci/drivers/nvme/bind", "0001:00:00.0")
    assert set(usage.of_devices(backend)) == {"0000:01:00.0", "0001:00:00.0"}


def test_a_test_gives_the_host_uses_of_its_own(root):
    root.machine.driver_core.load("nvme")
    host = root.machine.driver_core.host
    host.disk(DISK, "nvme0n1", "259:0", swap=True)
    host.network(DISK, "eth0", up=False)
    assert usage.of_devices(root) == {DISK: ["disk nvme0n1 is swap"]}
    host.network(DISK, "eth0")
    assert usage.of_devices(root)[DISK] == ["network interface eth0 is up", "disk nvme0n1 is swap"]


# --- drivers ---


def test_a_loaded_driver_takes_its_devices_and_an_unloaded_one_leaves_them(root):
    core = root.machine.driver_core
    core.load("nvme")
    assert sysfs.driver_of(root, DISK) == "nvme"
    assert root.exists("/sys/module/nvme")
    core.load("nvme")  # harmless
    core.unload("nvme")
    assert sysfs.driver_of(root, DISK) is None
    assert not root.exists("/sys/bus/pci/drivers/nvme")


def test_without_autoprobe_a_loaded_driver_takes_nothing(root):
    root.write_text("/sys/bus/pci/drivers_autoprobe", "0")
    root.machine.driver_core.load("nvme")
    assert sysfs.driver_of(root, DISK) is None


def test_a_driver_of_ones_own_takes_the_ids_that_it_is_given(root):
    root.machine.driver_core.load("mine", ids=[(0x1B36, 0x0005)])
    assert sysfs.driver_of(root, NEIGHBOUR) == "mine"
    assert [blocker.address for blocker in sysfs.blockers(root, 0)] == [NEIGHBOUR]


def test_a_variant_of_vfio_pci_opens_devices_to_vfio():
    backend = machine()
    backend.machine.driver_core.load("edu_vfio_pci", ids=[(0x1234, 0x11E8)], vfio=True)
    assert sysfs.device(backend, EDU).driver == "edu_vfio_pci"
    with vfio.open_device(EDU, backend=backend) as device:
        assert device.info.num_regions == 9


def test_without_any_vfio_driver_there_is_no_container():
    backend = machine()
    backend.machine.driver_core.unload("vfio-pci")
    assert not backend.exists("/dev/vfio/vfio")
    assert not backend.exists("/sys/module/vfio")


def test_a_probe_can_be_made_to_fail(root):
    root.write_text(sysfs.path(NEIGHBOUR, "driver_override"), "vfio-pci")
    root.machine.hooks.fail("probe vfio-pci", errno.EIO)
    refused(errno.EIO, root.write_text, "/sys/bus/pci/drivers/vfio-pci/bind", NEIGHBOUR)
    assert sysfs.driver_of(root, NEIGHBOUR) is None
    root.write_text("/sys/bus/pci/drivers/vfio-pci/bind", NEIGHBOUR)


def test_a_kernel_before_6_4_cannot_probe_on_power():
    backend = machine()
    backend.machine.driver_core.host.release = "6.1.0-44-powerpc64le"
    backend.write_text(sysfs.path(EDU, "driver_override"), "vfio-pci")
    refused(errno.EINVAL, backend.write_text, "/sys/bus/pci/drivers/vfio-pci/bind", EDU)


# --- devices in use ---


def test_unbinding_what_the_caller_has_open_raises_and_changes_nothing(root):
    with vfio.open_device(EDU, backend=root):
        for path, text in (("/sys/bus/pci/drivers/vfio-pci/unbind", EDU), (sysfs.path(EDU, "remove"), "1")):
            with pytest.raises(KernelWouldBlock, match="it is the caller that has it open"):
                root.write_text(path, text)
            assert sysfs.device(root, EDU).vfio_dev == "vfio0"
    root.write_text("/sys/bus/pci/drivers/vfio-pci/unbind", EDU)
    assert sysfs.driver_of(root, EDU) is None
    assert root.leaks() == []


def test_unbinding_what_another_process_has_open_waits_for_it(root):
    other = root.another_process()
    device = vfio.open_device(EDU, backend=other)
    thread = threading.Thread(target=root.write_text, args=("/sys/bus/pci/drivers/vfio-pci/unbind", EDU))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    assert sysfs.driver_of(other, EDU) is None  # the link goes at once, the driver later
    refused(errno.EBUSY, other.write_text, "/sys/bus/pci/drivers/vfio-pci/bind", EDU)
    device.close()
    thread.join(10)
    assert not thread.is_alive()
    assert not root.exists("/dev/vfio/0")
    assert root.machine.device(EDU).driver is None


def test_holders_of_a_group_are_found_as_on_a_real_host(root):
    other = root.another_process()
    root.machine.driver_core.host.commands[other.process.pid] = "qemu-system-ppc64 -M pseries"
    with vfio.open_device(EDU, backend=other) as device:
        expected = [(other.process.pid, "qemu-system-ppc64 -M pseries")]
        assert holders.of(root, "/dev/vfio/0") == expected
        device.group.close()
        assert holders.of(root, "/dev/vfio/0") == expected
    assert holders.of(root, "/dev/vfio/0") == []


# --- the kernel document's example ---


def test_the_steps_of_the_kernels_document_work():
    """Documentation/driver-api/vfio.rst, "VFIO Usage Example": by unbind and new_id, as it is told there."""
    backend = machine("fake:document")
    address = "0000:06:0d.0"
    assert backend.readlink(sysfs.path(address, "iommu_group")).endswith("/kernel/iommu_groups/26")
    members = sorted(backend.listdir(sysfs.path(address, "iommu_group", "devices")))
    assert members == ["0000:00:1e.0", "0000:06:0d.0", "0000:06:0d.1"]
    assert sysfs.driver_of(backend, "0000:00:1e.0") is None
    for device, ids in ((address, "1102 0002"), ("0000:06:0d.1", "1102 7002")):
        backend.write_text(sysfs.path(device, "driver", "unbind"), device)
        backend.write_text("/sys/bus/pci/drivers/vfio-pci/new_id", ids)
        assert sysfs.driver_of(backend, device) == "vfio-pci"
    backend.chown("/dev/vfio/26", 1000, 1000)
    user = backend.another_process(uid=1000)
    with vfio.open_device(address, backend=user) as opened:
        assert opened.info.num_regions == 9
