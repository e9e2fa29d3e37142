"""Assignment on a real kernel: bind, unbind and restore leave sysfs exactly as it was."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vfio
from vfio import apply, assign, changes, desired, errors, export, holders, journal, obstacles, sysfs
from vfio.backends.kernel import KernelBackend
from vfio.desired import Desired, DesiredDevice

if TYPE_CHECKING:
    from hwtests.lab.targets import System

HOST_DRIVER = pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k")
"""Machines with a disk whose driver is the host's; on pseries a host driver spoils VFIO on its PHB until reboot."""

_HOLD = """
import sys, vfio
device = vfio.open_device(sys.argv[1])
if "only-device" in sys.argv:
    device.group.close()
print("open", flush=True)
sys.stdin.read()
device.close()
"""


def snapshot() -> object:
    """All that assignment can change, read without the library."""
    devices = {}
    for device in Path("/sys/bus/pci/devices").iterdir():
        driver = device / "driver"
        devices[device.name] = (
            os.readlink(driver) if driver.is_symlink() else None,
            (device / "driver_override").read_text(),
            sorted(path.name for path in device.glob("vfio-dev/*")),
        )
    nodes = {}
    for node in Path("/dev/vfio").iterdir():
        status = node.stat()
        nodes[node.name] = (status.st_mode, status.st_uid, status.st_gid)
    return devices, nodes


@pytest.fixture(autouse=True)
def as_it_was(backend: vfio.Backend) -> Iterator[object]:
    """What was there before each test, which has to be there after it."""
    before = snapshot()
    yield before
    assert snapshot() == before
    assert not journal.path(backend).exists()


@contextmanager
def held(address: str, *how: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has the device open."""
    command = [sys.executable, "-c", _HOLD, address, *how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        try:
            assert process.stdout.readline() == "open\n"
            yield process
        finally:
            process.stdin.close()


@pytest.fixture
def group_of_several(target: System) -> list[str]:
    """The addresses of a group of several devices."""
    assert target.topology is not None
    return next([device.address for device in some] for some in target.topology.groups().values() if len(some) > 1)


@pytest.fixture
def disk(backend: vfio.Backend, target: System) -> Iterator[str]:
    """The address of a disk on its host's driver; afterwards it is on none again."""
    assert target.topology is not None
    address = next(device.address for device in target.topology.devices if device.model == "nvme")
    subprocess.run(["sh", "-c", "modprobe nvme"], check=True)
    if sysfs.driver_of(backend, address) is None:
        backend.write_text("/sys/bus/pci/drivers_probe", address)
    assert sysfs.driver_of(backend, address) == "nvme"
    yield address
    if sysfs.driver_of(backend, address) == "nvme":
        backend.write_text("/sys/bus/pci/drivers/nvme/unbind", address)


def wait_for(path: str) -> None:
    """The disk of a driver appears some time after its driver has the device."""
    for _ in range(600):
        if Path(path).exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"no {path}")


def test_bind_and_restore_leave_everything_as_it_was(backend, device_address, as_it_was):
    if sysfs.device(backend, device_address).on_vfio:
        pytest.skip(f"{device_address} is on a VFIO driver already")
    assign.bind([device_address], user="4321:77", backend=backend)
    device = sysfs.device(backend, device_address)
    node = Path(sysfs.node(device.group))
    assert (device.driver, device.driver_override) == ("vfio-pci", "vfio-pci")
    assert device.vfio_dev
    assert (node.stat().st_mode & 0o777, node.stat().st_uid, node.stat().st_gid) == (0o600, 4321, 77)
    assign.restore([device_address], backend=backend)
    assert snapshot() == as_it_was


def test_binding_twice_changes_nothing_the_second_time(backend, device_address):
    with assign.bound([device_address], whole_group=False, backend=backend):
        between = snapshot()
        plan = assign.bind([device_address], backend=backend)
        assert (plan.moves, plan.gifts) == ([], [])
        assert snapshot() == between


@pytest.mark.lab_only
@pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k")
def test_a_group_of_several_devices_is_bound_and_restored_as_a_whole(backend, group_of_several, as_it_was):
    plan = assign.bind(group_of_several[:1], whole_group=True, user="alice", backend=backend)
    assert [move.device.address for move in plan.moves] == group_of_several
    assert {sysfs.driver_of(backend, address) for address in group_of_several} == {"vfio-pci"}
    assign.restore(group_of_several[:1], backend=backend)
    assert sysfs.driver_of(backend, group_of_several[0]) is None
    assert sysfs.driver_of(backend, group_of_several[1]) == "vfio-pci"
    assert Path(sysfs.node(plan.moves[0].device.group)).owner() == "alice"
    assign.restore(backend=backend)
    assert snapshot() == as_it_was


@pytest.mark.lab_only
def test_unbind_leaves_the_device_on_no_driver_and_restore_is_harmless_then(backend, device_address, as_it_was):
    assign.bind([device_address], backend=backend)
    assign.unbind([device_address], backend=backend)
    assert snapshot() == as_it_was  # it was on no driver before either
    assert assign.restore(backend=backend).moves == []


class Failing(KernelBackend):
    """The real kernel, but the n-th change fails before it is made."""

    def __init__(self, nth: int) -> None:
        self.nth = nth

    def _change(self, path: str) -> None:
        self.nth -= 1
        if self.nth == -1:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    def write_text(self, path: str, text: str) -> None:
        self._change(path)
        super().write_text(path, text)

    def chown(self, path: str, uid: int, gid: int) -> None:
        self._change(path)
        super().chown(path, uid, gid)

    def chmod(self, path: str, mode: int) -> None:
        self._change(path)
        super().chmod(path, mode)


@pytest.mark.lab_only
@pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k")
def test_a_failure_at_any_change_puts_everything_back(group_of_several, disk):
    changes_needed = 2 * len(group_of_several) + 3 + 2
    before = snapshot()
    for nth in range(changes_needed):
        with pytest.raises(OSError, match="Input/output error"):
            assign.bind([*group_of_several, disk], user="alice", backend=Failing(nth))
        assert snapshot() == before, f"change {nth}"
    backend = Failing(changes_needed)
    assign.bind([*group_of_several, disk], user="alice", backend=backend)
    assert backend.nth == 0
    assign.restore(backend=KernelBackend())
    assert snapshot() == before


@pytest.mark.lab_only
@HOST_DRIVER
def test_a_device_comes_back_to_its_hosts_driver(backend, disk):
    wait_for("/dev/nvme0n1")
    with assign.bound([disk], backend=backend):
        assert not Path("/dev/nvme0n1").exists()
    assert sysfs.driver_of(backend, disk) == "nvme"
    wait_for("/dev/nvme0n1")


@pytest.mark.lab_only
@HOST_DRIVER
def test_a_waiting_override_comes_back(backend, disk):
    backend.write_text(sysfs.path(disk, "driver_override"), "pci-stub\n")
    try:
        before = snapshot()
        with assign.bound([disk], backend=backend):
            assert sysfs.driver_of(backend, disk) == "vfio-pci"
        assert snapshot() == before
    finally:
        backend.write_text(sysfs.path(disk, "driver_override"), "\n")


@pytest.mark.lab_only
@HOST_DRIVER
def test_a_driver_of_the_host_blocks_its_group(backend, disk):
    group = sysfs.group_of(backend, disk)
    assert sysfs.blockers(backend, group) == [(disk, "nvme", "")]
    (error,) = obstacles.of(backend, disk)
    assert isinstance(error, errors.GroupNotViable)


@pytest.mark.lab_only
@HOST_DRIVER
def test_a_disk_in_use_is_refused_until_it_is_free(backend, disk):
    wait_for("/dev/nvme0n1")
    subprocess.run(["mkswap", "/dev/nvme0n1"], check=True)
    subprocess.run(["swapon", "/dev/nvme0n1"], check=True)
    try:
        before = snapshot()
        with pytest.raises(errors.Refused) as raised:
            assign.bind([disk], backend=backend)
        assert raised.value.why == f"{disk}: disk nvme0n1 is swap"
        assert snapshot() == before
    finally:
        subprocess.run(["swapoff", "/dev/nvme0n1"], check=True)
    with assign.bound([disk], backend=backend):
        assert sysfs.driver_of(backend, disk) == "vfio-pci"


@pytest.mark.lab_only
def test_the_user_of_a_node_can_open_it_and_nobody_else(
    backend: vfio.Backend, device_address: str, as_alice: Callable[[str], str]
) -> None:
    code = f"import vfio; print(vfio.Group({sysfs.group_of(backend, device_address)}).viable)"
    refused = f"""
import vfio
try:
    {code.replace("import vfio; ", "")}
except vfio.errors.AccessDenied as error:
    print(error.errno)
"""
    assign.bind([device_address], backend=backend)
    assert as_alice(refused) == f"{errno.EACCES}\n"
    assign.bind([device_address], user="alice", backend=backend)
    assert as_alice(code) == "True\n"
    assign.restore(backend=backend)


@pytest.mark.lab_only
@pytest.mark.parametrize("how", ["group and device", "only-device"])
def test_unbind_of_a_held_device_is_refused_and_names_the_process(backend, device_address, how):
    assign.bind([device_address], backend=backend)
    between = snapshot()
    node = sysfs.node(sysfs.group_of(backend, device_address))
    with held(device_address, how) as process:
        for change in (assign.unbind, assign.restore):
            with pytest.raises(OSError, match=f"pid {process.pid} ") as raised:
                change([device_address], backend=backend)
            assert raised.value.errno == errno.EBUSY
        assert [holder.pid for holder in holders.of(backend, node)] == [process.pid]
        assert snapshot() == between
    assign.unbind([device_address], backend=backend)
    assign.restore(backend=backend)


@pytest.mark.lab_only
def test_unbind_waits_for_the_process(backend, device_address):
    assign.bind([device_address], backend=backend)
    with held(device_address) as process:
        assert process.stdin
        timer = threading.Timer(0.5, process.stdin.close)
        timer.start()
        assign.unbind([device_address], wait=60, backend=backend)
        timer.join()
    assert sysfs.driver_of(backend, device_address) is None


@pytest.mark.lab_only
def test_an_open_group_without_open_device_does_not_block_an_unbind(backend, device_address):
    """This is what lets unbind keep others out: it holds the group open itself."""
    assign.bind([device_address], backend=backend)
    group = sysfs.group_of(backend, device_address)
    with vfio.Group(group, backend):
        backend.write_text("/sys/bus/pci/drivers/vfio-pci/unbind", device_address)
        assert sysfs.driver_of(backend, device_address) is None
        assert not Path(sysfs.node(group)).exists()
    assign.restore(backend=backend)


@pytest.mark.lab_only
@pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k")
def test_an_id_lent_to_vfio_pci_binds_the_device_and_is_withdrawn(backend, group_of_several):
    """What is done where a kernel has no driver_override; the neighbour's id is that of no other device here."""
    device = sysfs.device(backend, group_of_several[1])
    for _ in range(2):  # the second time would be EEXIST, had the id stayed
        changes.NewId(device.address, changes.new_id(device)).make(backend)
        assert sysfs.driver_of(backend, device.address) == "vfio-pci"
        backend.write_text("/sys/bus/pci/drivers/vfio-pci/unbind", device.address)
    with pytest.raises(OSError, match="No such device"):
        backend.write_text("/sys/bus/pci/drivers/vfio-pci/remove_id", changes.new_id(device))


@pytest.mark.lab_only
@pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k")
def test_a_bridge_is_refused(backend, target):
    bridge = target.topology.phbs[0].root_port.address
    assert sysfs.device(backend, bridge).is_bridge
    with pytest.raises((errors.IsBridge, errors.NoGroup)):
        assign.bind([bridge], backend=backend)


@pytest.mark.lab_only
def test_devices_are_those_of_the_topology(backend, target):
    for phb in target.topology.phbs:
        for expected in phb.functions:
            device = sysfs.device(backend, expected.address)
            assert (device.vendor, device.device) == (expected.vendor, expected.device)
            assert device.class_code == expected.device_class
            assert device.group == expected.group
            assert device.is_bridge == (expected is phb.root_port)
            if expected.group is not None:
                assert device.phb == phb.domain
                assert device.pe == (expected.pe or 0)


def test_this_is_power(backend):
    assert sysfs.on_power(backend)
    assert sysfs.kernel_release(backend) == os.uname().release


# --- assignment by a plan ---


def test_a_plan_is_applied_once_exported_and_restored(backend, device_address, as_it_was, tmp_path):
    if sysfs.device(backend, device_address).on_vfio:
        pytest.skip(f"{device_address} is on a VFIO driver already")
    wanted = Desired((DesiredDevice(address=device_address, owner="4321:77", mode=0o660, persistent=True),))
    assert apply.compare(wanted, backend, persist_dir=tmp_path).changed
    assert snapshot() == as_it_was
    assert apply.apply(wanted, backend, persist_dir=tmp_path).done
    between = snapshot()
    node = Path(sysfs.node(sysfs.group_of(backend, device_address))).stat()
    assert (node.st_mode & 0o777, node.st_uid, node.st_gid) == (0o660, 4321, 77)
    assert not apply.apply(wanted, backend, persist_dir=tmp_path).changed
    exported = desired.parse(export.toml(export.export(backend, persist_dir=tmp_path), backend))
    assert not apply.apply(exported, backend, persist_dir=tmp_path).changed
    assert snapshot() == between
    assert apply.forget(backend, persist_dir=tmp_path).done
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    apply.apply(Desired((DesiredDevice(address=device_address, driver="host"),)), backend, persist_dir=tmp_path)
    assert snapshot() == as_it_was


def many(group: list[str], disk: str) -> Desired:
    """From none to vfio-pci with an owner and a mode, and from the host's driver to none."""
    return Desired(
        (
            DesiredDevice(address=group[0], whole_group=True, owner="alice:77", mode=0o640),
            DesiredDevice(address=disk, driver="none"),
        )
    )


@pytest.mark.lab_only
@HOST_DRIVER
def test_a_plan_that_fails_at_any_change_is_rolled_back_whole(group_of_several, disk):
    changes_needed = 2 * len(group_of_several) + 1 + 2
    wanted, before = many(group_of_several, disk), snapshot()
    for nth in range(changes_needed):
        with pytest.raises(errors.RolledBack, match="Input/output error"):
            apply.apply(wanted, Failing(nth))
        assert snapshot() == before, f"change {nth}"
    backend = Failing(changes_needed)
    assert apply.apply(wanted, backend).done
    assert backend.nth == 0
    assert not apply.apply(wanted, KernelBackend()).changed
    assign.restore(backend=KernelBackend())
    assert snapshot() == before


@pytest.mark.lab_only
@HOST_DRIVER
def test_a_device_goes_to_other_drivers_by_name(backend, disk, as_it_was):
    subprocess.run(["sh", "-c", "modprobe pci-stub"], check=True)
    for driver in ("pci-stub", "vfio-pci", "nvme", "none"):
        wanted = Desired((DesiredDevice(id=sysfs.device(backend, disk).id, driver=driver),))
        assert apply.apply(wanted, backend).done
        assert sysfs.driver_of(backend, disk) == (None if driver == "none" else driver)
        assert not apply.apply(wanted, backend).changed
    assign.restore(backend=backend)
    assert sysfs.driver_of(backend, disk) == "nvme"


@pytest.mark.lab_only
@HOST_DRIVER
def test_the_driver_of_the_host_is_the_one_that_the_kernel_finds_where_no_journal_knows(backend, disk):
    """As after a boot that took the device to vfio-pci."""
    assign.bind([disk], backend=backend)
    journal.path(backend).unlink()
    wanted = Desired((DesiredDevice(address=disk, driver="host"),))
    assert apply.apply(wanted, backend).done
    assert (sysfs.driver_of(backend, disk), sysfs.override_of(backend, disk)) == ("nvme", None)
    assert not apply.apply(wanted, backend).changed


@pytest.mark.lab_only
@HOST_DRIVER
def test_a_device_that_is_open_stays_where_a_plan_takes_it_away(backend, device_address, disk):
    assign.bind([device_address], backend=backend)
    between = snapshot()
    wanted = Desired((DesiredDevice(address=disk), DesiredDevice(address=device_address, driver="host")))
    with held(device_address) as process:
        with pytest.raises(errors.Busy, match=f"pid {process.pid} "):
            apply.apply(wanted, backend)
        assert snapshot() == between
    assert apply.apply(wanted, backend, wait=60).done
    assign.restore(backend=backend)
