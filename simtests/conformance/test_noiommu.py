"""Groups without an IOMMU: /dev/vfio/noiommu-N, of a kernel that is built with CONFIG_VFIO_NOIOMMU.

The machine has a device behind its IOMMU (`member`) and two functions of one slot that are not (`bare`).
Source: drivers/vfio/container.c and group.c of Linux 6.12.
"""

from __future__ import annotations

import errno
import re
import struct
from collections.abc import Iterator

import pytest

import vfio
import vfio.drivers.edu
from simtests.conformance.irq_calls import EVENTFD, MSI, SET_IRQS, TRIGGER
from simtests.conformance.pci_calls import EduRegisters, RawDevice, eventfds, group_number
from simtests.conformance.raw import Group, Program, answer
from vfio import errors, sysfs, uapi
from vfio.iommu.noiommu import NoIommu, UnsafeWarning

pytestmark = pytest.mark.targets("noiommu")

PARAMETER = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode"
BIND, UNBIND, PROBE = (
    f"/sys/bus/pci/{name}" for name in ("drivers/vfio-pci/bind", "drivers/vfio-pci/unbind", "drivers_probe")
)
NOIOMMU, TYPE1, TYPE1_V2 = uapi.VFIO_NOIOMMU_IOMMU, uapi.VFIO_TYPE1_IOMMU, uapi.VFIO_TYPE1v2_IOMMU
VIABLE, CONTAINER_SET = uapi.VFIO_GROUP_FLAGS_VIABLE, uapi.VFIO_GROUP_FLAGS_CONTAINER_SET
TAINT_USER = 1 << 6
ENOTSUPP = 524
"""The kernel's own; it has no name in user space."""


def addresses(target) -> list[str]:
    """The functions without a group: an edu and a network card."""
    return [device.address for device in target.topology.devices if device.group is None]


def switch(backend, on: bool) -> None:
    """Set the parameter of the module."""
    backend.write_text(PARAMETER, "Y" if on else "N")


def taint(backend) -> int:
    return int(backend.read_text("/proc/sys/kernel/tainted"))


def node(number: int) -> str:
    return f"/dev/vfio/noiommu-{number}"


@pytest.fixture
def bare(backend, target) -> Iterator[list[str]]:
    """The functions without a group, which vfio-pci may have by their overrides, but does not have; nothing is allowed."""
    found = addresses(target)
    for address in found:
        backend.write_text(sysfs.path(address, "driver_override"), "vfio-pci\n")
    yield found
    for address in found:
        if sysfs.driver_of(backend, address):
            backend.write_text(UNBIND, address)
        backend.write_text(sysfs.path(address, "driver_override"), "\n")
    switch(backend, False)


@pytest.fixture
def numbers(backend, bare) -> list[int]:
    """The groups of both functions on vfio-pci, after root has allowed it."""
    switch(backend, True)
    for address in bare:
        backend.write_text(BIND, address)
    return [group_number(backend, address) for address in bare]


@pytest.fixture
def program(bare, program):
    """What it has open is closed before the functions are taken from their driver."""
    return program


def unprotected(program: Program, number: int) -> Group:
    fd = program.open(node(number))
    assert fd >= 0
    return Group(program, fd)


# --- the parameter ---


@pytest.mark.parametrize(
    ("text", "on"), [("y", 1), ("Y", 1), ("1", 1), ("t", 1), ("T\n", 1), ("on", 1), ("oN\n", 1), ("Yes", 1), ("0x", 0)]
)
def test_parameter_is_off_and_takes_what_is_a_boolean(backend, bare, text, on):
    assert backend.read_text(PARAMETER) == "N\n"
    backend.write_text(PARAMETER, text)
    assert backend.read_text(PARAMETER) == ("Y\n" if on else "N\n")
    for other, value in (("n", "N\n"), ("1", "Y\n"), ("off", "N\n"), ("1", "Y\n"), ("of", "N\n")):
        backend.write_text(PARAMETER, other)
        assert backend.read_text(PARAMETER) == value


@pytest.mark.parametrize("text", ["x", "o", "2", "-1", "\n", "o1"])
def test_parameter_refuses_what_is_none(backend, bare, text):
    backend.write_text(PARAMETER, "1")
    assert answer(backend.write_text, PARAMETER, text) == -errno.EINVAL
    assert backend.read_text(PARAMETER) == "Y\n"


def test_parameter_is_roots_to_write_and_anybodys_to_read(backend, bare, other_program):
    assert backend.stat(PARAMETER).mode & 0o7777 == 0o644
    alice = other_program(uid=1000).backend
    assert alice.read_text(PARAMETER) == "N\n"
    assert answer(alice.write_text, PARAMETER, "Y") == -errno.EACCES


# --- binding ---


def test_device_without_a_group_does_not_bind_while_it_is_off(backend, bare):
    assert answer(backend.write_text, BIND, bare[0]) == -errno.EINVAL
    backend.write_text(PROBE, bare[0])  # which never tells what the driver said
    assert sysfs.driver_of(backend, bare[0]) is None
    assert not backend.exists(sysfs.path(bare[0], "iommu_group"))
    assert backend.listdir("/dev/vfio") == ["vfio"]


def test_binding_makes_a_group_of_its_own_for_each_function(backend, bare, numbers):
    assert len(set(numbers)) == 2
    assert sorted(backend.listdir("/dev/vfio")) == sorted(["vfio", *(f"noiommu-{number}" for number in numbers)])
    for address, number in zip(bare, numbers, strict=True):
        directory = f"/sys/kernel/iommu_groups/{number}"
        assert backend.listdir(f"{directory}/devices") == [address]
        files = {name: backend.read_text(f"{directory}/{name}") for name in ("name", "type", "reserved_regions")}
        assert files == {"name": "vfio-noiommu\n", "type": "unknown\n", "reserved_regions": ""}
        status = backend.stat(node(number))
        assert (status.mode & 0o7777, status.uid, status.gid) == (0o600, 0, 0)


def test_class_vfio_shows_the_node_by_its_name(backend, numbers):
    names = [f"noiommu-{number}" for number in numbers]
    assert sorted(backend.listdir("/sys/class/vfio")) == sorted(names)
    for name in names:
        assert backend.readlink(f"/sys/class/vfio/{name}") == f"../../devices/virtual/vfio/{name}"
        status = backend.stat(f"/dev/vfio/{name}")
        major, minor = status.rdev >> 8 & 0xFFF, status.rdev & 0xFF
        assert backend.read_text(f"/sys/class/vfio/{name}/dev") == f"{major}:{minor}\n"
        uevent = f"MAJOR={major}\nMINOR={minor}\nDEVNAME=vfio/{name}\n"
        assert backend.read_text(f"/sys/class/vfio/{name}/uevent") == uevent


def test_binding_taints_the_kernel_for_good_and_says_so(backend, bare, kernel_messages):
    before = taint(backend)
    switch(backend, True)
    assert taint(backend) == before
    backend.write_text(BIND, bare[0])
    number = group_number(backend, bare[0])
    assert kernel_messages.new() == [
        f"vfio-pci {bare[0]}: Adding to iommu group {number}",
        f"vfio-pci {bare[0]}: Adding kernel taint for vfio-noiommu group on device",
    ]
    assert taint(backend) == before | TAINT_USER
    backend.write_text(UNBIND, bare[0])
    assert kernel_messages.new() == [f"vfio-pci {bare[0]}: Removing from iommu group {number}"]
    assert taint(backend) == before | TAINT_USER


def test_unbinding_takes_node_and_group_away_and_the_number_is_free(backend, bare, numbers):
    backend.write_text(UNBIND, bare[0])
    assert sorted(backend.listdir("/dev/vfio")) == [f"noiommu-{numbers[1]}", "vfio"]
    assert not backend.exists(f"/sys/kernel/iommu_groups/{numbers[0]}")
    assert not backend.exists(sysfs.path(bare[0], "iommu_group"))
    backend.write_text(BIND, bare[0])
    assert group_number(backend, bare[0]) == numbers[0]


def test_device_with_a_group_is_none_of_it(backend, member, bare, kernel_messages):
    before = taint(backend)
    switch(backend, True)
    backend.write_text(UNBIND, member.address)
    backend.write_text(BIND, member.address)
    assert sorted(backend.listdir("/dev/vfio")) == [str(member.group), "vfio"]
    assert backend.read_text(f"/sys/kernel/iommu_groups/{member.group}/type") in ("DMA\n", "DMA-FQ\n")
    assert (kernel_messages.new(), taint(backend)) == ([], before)


# --- who may ---


def test_open_takes_cap_sys_rawio_after_the_mode(backend, numbers, other_program):
    alice = other_program(uid=1000)
    assert alice.open(node(numbers[0])) == -errno.EACCES
    backend.chmod(node(numbers[0]), 0o666)
    assert alice.open(node(numbers[0])) == -errno.EPERM
    assert alice.open(f"/dev/vfio/{numbers[0]}") == -errno.ENOENT


def test_capability_comes_before_the_group_being_open(backend, program, numbers, other_program):
    unprotected(program, numbers[0])
    backend.chmod(node(numbers[0]), 0o666)
    assert program.open(node(numbers[0])) == -errno.EBUSY
    assert other_program(uid=1000).open(node(numbers[0])) == -errno.EPERM


def test_who_was_handed_the_group_takes_the_capability_for_each_step(program, bare, numbers, other_program):
    group, container = unprotected(program, numbers[0]), program.container()
    alice = other_program(uid=1000)
    their_group = Group(alice, alice.take(alice.backend.receive(group.fd)))
    theirs = container.seen_by(alice, alice.backend.receive(container.fd))
    assert their_group.status() == VIABLE
    assert their_group.set_container(99_999) == -errno.EBADF
    assert their_group.set_container(their_group.fd) == -errno.EBADFD
    assert their_group.set_container(theirs.fd) == -errno.EPERM
    assert theirs.extension(NOIOMMU) == 1
    assert group.set_container(container.fd) == 0
    assert their_group.set_container(theirs.fd) == -errno.EINVAL
    assert theirs.set_iommu(TYPE1) == -errno.ENODEV
    assert theirs.set_iommu(NOIOMMU) == -errno.EPERM
    assert their_group.device("0000:00:00.0") == -errno.ENODEV
    assert their_group.device(bare[0]) == -errno.EINVAL
    assert container.set_iommu(NOIOMMU) == 0
    assert their_group.device(bare[0]) == -errno.EPERM
    assert their_group.unset_container() == 0


def test_open_device_is_anybodys_who_was_handed_it(program, bare, numbers, other_program):
    group = unprotected(program, numbers[0])
    container = program.container()
    assert (group.set_container(container.fd), container.set_iommu(NOIOMMU)) == (0, 0)
    assert group.device(bare[0]) >= 0
    alice = other_program(uid=1000)
    their_group = Group(alice, alice.take(alice.backend.receive(group.fd)))
    assert their_group.device(bare[0]) >= 0  # what is open already is asked for nothing


# --- the group and the container ---


def test_status_and_the_one_open_are_those_of_any_group(program, numbers):
    group = unprotected(program, numbers[0])
    assert program.open(node(numbers[0])) == -errno.EBUSY
    assert group.status() == VIABLE
    assert group.set_container(program.container().fd) == 0
    assert group.status() == VIABLE | CONTAINER_SET
    assert group.unset_container() == 0
    assert group.status() == VIABLE


def extensions(container) -> list[int]:
    return [number for number in range(14) if container.extension(number)]


def test_extension_is_there_while_it_is_on(backend, program, bare):
    container = program.container()
    assert container.extension(NOIOMMU) == 0
    switch(backend, True)
    assert container.extension(NOIOMMU) == 1
    assert {TYPE1, TYPE1_V2, NOIOMMU} <= set(extensions(container))


def test_group_decides_which_extensions_its_container_has(backend, program, numbers, member):
    container, group = program.container(), unprotected(program, numbers[0])
    everything = extensions(container)
    assert group.set_container(container.fd) == 0
    assert extensions(container) == [NOIOMMU]
    assert container.set_iommu(NOIOMMU) == 0
    assert extensions(container) == [NOIOMMU]
    switch(backend, False)
    assert extensions(container) == []
    switch(backend, True)
    assert group.unset_container() == 0
    assert extensions(container) == everything
    assert program.group(member).set_container(container.fd) == 0
    assert extensions(container) == [number for number in everything if number != NOIOMMU]


@pytest.mark.parametrize("kind", [number for number in range(14) if number != NOIOMMU])
def test_no_other_iommu_can_be_set(program, numbers, kind):
    container, group = program.container(), unprotected(program, numbers[0])
    assert container.set_iommu(NOIOMMU) == -errno.EINVAL
    assert group.set_container(container.fd) == 0
    assert container.set_iommu(kind) == -errno.ENODEV
    assert container.set_iommu(NOIOMMU) == 0
    assert container.set_iommu(NOIOMMU) == container.set_iommu(kind) == -errno.EINVAL


def test_protected_group_cannot_do_without_its_iommu(backend, program, member, bare):
    switch(backend, True)
    container = program.container()
    assert program.group(member).set_container(container.fd) == 0
    assert container.set_iommu(NOIOMMU) == -errno.ENODEV
    assert container.set_iommu(TYPE1_V2) == 0


def test_nothing_can_be_asked_of_the_iommu_that_is_not_there(program, numbers):
    container, group = program.container(), unprotected(program, numbers[0])
    assert group.set_container(container.fd) == 0
    assert container.map(0x1000, 0, 4096) == -errno.EINVAL
    assert container.set_iommu(NOIOMMU) == 0
    for n in (*range(3, 30), 99, 255 - uapi.VFIO_BASE):
        assert container.ioctl(uapi.VFIO_GET_API_VERSION + n, bytearray(64)) == -errno.ENOTTY
        assert container.ioctl(uapi.VFIO_GET_API_VERSION + n, 0x1000) == -errno.ENOTTY
    assert container.ioctl(uapi.VFIO_GET_API_VERSION) == 0
    assert (container.map(0x1000, 0, 4096), container.unmap(0, 4096)) == (-errno.ENOTTY, -errno.ENOTTY)


@pytest.mark.parametrize("iommu", [False, True])
def test_groups_of_both_kinds_do_not_mix(program, numbers, member, iommu):
    container, bare_group, protected = program.container(), unprotected(program, numbers[0]), program.group(member)
    for first, second, kind in ((bare_group, protected, NOIOMMU), (protected, bare_group, TYPE1_V2)):
        assert first.set_container(container.fd) == 0
        if iommu:
            assert container.set_iommu(kind) == 0
        assert second.set_container(container.fd) == -errno.EPERM
        assert second.status() == VIABLE
        assert first.unset_container() == 0


def test_several_groups_without_an_iommu_share_a_container(program, bare, numbers):
    container = program.container()
    first, second = (unprotected(program, number) for number in numbers)
    assert first.set_container(container.fd) == 0
    assert container.set_iommu(NOIOMMU) == 0
    assert second.set_container(container.fd) == 0
    assert second.device(bare[0]) == -errno.ENODEV
    assert min(first.device(bare[0]), second.device(bare[1])) >= 0


def test_what_is_open_outlives_the_permission(backend, program, bare, numbers):
    container, group = program.container(), unprotected(program, numbers[0])
    assert (group.set_container(container.fd), container.set_iommu(NOIOMMU)) == (0, 0)
    switch(backend, False)
    assert group.device(bare[0]) >= 0
    other = unprotected(program, numbers[1])
    assert other.set_container(container.fd) == 0
    assert other.device(bare[1]) >= 0
    program.close_all()
    other, container = unprotected(program, numbers[1]), program.container()
    assert other.set_container(container.fd) == 0
    assert container.set_iommu(NOIOMMU) == -errno.ENODEV
    backend.write_text(UNBIND, bare[1])
    assert answer(backend.write_text, BIND, bare[1]) == -errno.EINVAL


def test_unbinding_revokes_a_group_that_is_open(backend, program, bare, numbers):
    container, group = program.container(), unprotected(program, numbers[0])
    assert (group.set_container(container.fd), container.set_iommu(NOIOMMU)) == (0, 0)
    backend.write_text(UNBIND, bare[0])
    assert group.status() == -errno.ENODEV
    assert group.set_container(container.fd) == -errno.ENODEV
    assert group.unset_container() == -errno.EINVAL
    assert group.device(bare[0]) == -errno.ENODEV
    assert container.map(0x1000, 0, 4096) == -errno.EINVAL
    backend.write_text(BIND, bare[0])
    assert unprotected(program, group_number(backend, bare[0])).status() == VIABLE


# --- the device ---


@pytest.fixture
def edu(backend, bare, numbers) -> Iterator[RawDevice]:
    device = RawDevice(backend, bare[0], NOIOMMU)
    yield device
    device.close()


def test_opening_the_device_is_told_in_the_log(backend, program, bare, numbers, kernel_messages):
    container, group = program.container(), unprotected(program, numbers[0])
    assert (group.set_container(container.fd), container.set_iommu(NOIOMMU)) == (0, 0)
    kernel_messages.new()
    for _ in range(2):
        assert group.device(bare[0]) >= 0
        [said] = [text for text in kernel_messages.new() if "opened" in text]
        assert re.fullmatch(rf"vfio-pci {bare[0]}: vfio-noiommu device opened by user \(\S+:\d+\)", said)


def test_registers_are_those_of_any_device(edu):
    info = uapi.vfio_device_info()
    assert edu.ioctl(uapi.VFIO_DEVICE_GET_INFO, info) == 0
    assert (info.num_regions, info.num_irqs) == (9, 5)
    registers = EduRegisters(edu)
    registers[registers.LIVENESS] = 0x1234_5678
    assert registers[registers.LIVENESS] == 0xEDCB_A987


def test_message_of_a_device_that_the_iommu_does_not_know_has_no_way_to_the_processor(edu):
    """All messages of this machine are remapped by its IOMMU."""
    with eventfds() as (fd,), pytest.raises(OSError, match="524") as caught:
        edu.backend.ioctl(edu.fd, SET_IRQS, bytearray(struct.pack("=5Ii", 24, EVENTFD | TRIGGER, MSI, 0, 1, fd)))
    assert caught.value.errno == ENOTSUPP


def hot_reset_info(device: RawDevice, room: int) -> tuple[int | str, list[tuple[int, int]]]:
    """What came of GET_PCI_HOT_RESET_INFO: the group, and the device and function number, of each device."""
    raw = bytearray((12 + 8 * room).to_bytes(4, "little") + bytes(8 + 8 * room))
    result = device.ioctl(uapi.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, raw)
    count = int.from_bytes(raw[8:12], "little")
    entries = [raw[12 + 8 * n : 20 + 8 * n] for n in range(min(count, room))]
    return result, [(int.from_bytes(entry[:4], "little"), entry[7]) for entry in entries]


def test_hot_reset_takes_a_group_for_every_function_of_the_slot(backend, program, bare, numbers, edu):
    assert hot_reset_info(edu, 2) == (0, [(numbers[0], 0), (numbers[1], 1)])
    other = unprotected(program, numbers[1])
    reset = uapi.VFIO_DEVICE_PCI_HOT_RESET

    def argument(*fds: int) -> bytearray:
        head = (12 + 4 * len(fds), 0, len(fds))
        return bytearray(b"".join(value.to_bytes(4, "little") for value in (*head, *fds)))

    assert edu.ioctl(reset, argument(edu.group)) == "EINVAL"
    assert edu.ioctl(reset, argument(edu.group, other.fd)) == 0  # in no container, even


def test_hot_reset_of_a_slot_with_a_function_in_no_group_is_not_permitted(backend, bare):
    switch(backend, True)
    backend.write_text(BIND, bare[0])
    device = RawDevice(backend, bare[0], NOIOMMU)
    try:
        assert hot_reset_info(device, 2)[0] == "EPERM"
    finally:
        device.close()


# --- the library ---


def test_library_warns_of_what_the_device_can_reach(backend, bare, numbers):
    with pytest.warns(UnsafeWarning, match="can read and write all memory of the host"):
        device = vfio.open_device(bare[0], backend)
    with device:
        assert type(device.iommu) is NoIommu
        assert device.group.unprotected
        assert vfio.drivers.edu.Edu(device).invert(0) == 0xFFFF_FFFF


@pytest.mark.filterwarnings("ignore::vfio.iommu.noiommu.UnsafeWarning")
def test_library_maps_nothing(backend, bare, numbers):
    with vfio.open_device(bare[0], backend) as device, vfio.DmaBuffer(4096, backend=backend) as buffer:
        with pytest.raises(errors.CallFailed, match="physical addresses") as caught:
            device.iommu.map(buffer)
        assert caught.value.errno == errno.ENOTTY
