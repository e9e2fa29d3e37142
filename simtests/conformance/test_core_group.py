"""Groups: opening, status, containers, and getting a device."""

import errno
import fcntl
import os
import resource
from contextlib import contextmanager

import pytest

from simtests.conformance.raw import NOWHERE, answer
from vfio import uapi

VIABLE, CONTAINER_SET = uapi.VFIO_GROUP_FLAGS_VIABLE, uapi.VFIO_GROUP_FLAGS_CONTAINER_SET


# --- opening ---


def test_group_that_does_not_exist_raises_enoent(program):
    assert program.open("/dev/vfio/4242") == -errno.ENOENT


def test_group_opens_once(program, member):
    group = program.group(member)
    for _ in range(2):
        assert program.open(member.node) == -errno.EBUSY
    group.close()
    program.group(member)


def test_group_that_another_process_has_raises_ebusy(program, other_program, member):
    other = other_program()
    theirs = other.group(member)
    assert program.open(member.node) == -errno.EBUSY
    theirs.close()
    program.group(member)


def test_group_is_free_when_the_process_that_had_it_exits(program, other_program, member):
    other = other_program()
    other.attached(member)
    assert program.open(member.node) == -errno.EBUSY
    other.backend.exit()
    assert program.group(member).status() == VIABLE


def test_node_of_a_group_is_roots_alone(program, other_program, member):
    status = program.backend.stat(member.node)
    assert (status.mode & 0o7777, status.uid, status.gid) == (0o600, 0, 0)
    alice = other_program(uid=1000)
    assert alice.open(member.node) == -errno.EACCES
    assert alice.open("/dev/vfio/4242") == -errno.ENOENT


def test_user_who_was_given_the_node_opens_it(program, other_program, member):
    alice = other_program(uid=1000)
    program.backend.chown(member.node, 1000, 1000)
    try:
        assert alice.group(member).status() == VIABLE
    finally:
        program.backend.chown(member.node, 0, 0)


@pytest.mark.parametrize(
    ("mode", "uid", "gid", "groups", "opens"),
    [
        (0o660, 0, 2000, (1000, 2000), True),  # a member of its group
        (0o660, 0, 2000, (2000,), True),
        (0o660, 0, 2000, (1000,), False),
        (0o600, 0, 2000, (2000,), False),
        (0o640, 0, 2000, (2000,), False),  # reading is not enough
        (0o666, 0, 0, (1000,), True),
        (0o060, 1000, 2000, (2000,), False),  # the owner has the owner's bits, and no others
        (0o606, 0, 2000, (1000, 2000), False),  # and a member of the group the group's
        (0o600, 1000, 0, (2000,), True),
        (0o600, 0, 1000, (1000,), False),
    ],
)
def test_node_opens_for_whom_owner_group_and_mode_say(program, other_program, member, mode, uid, gid, groups, opens):
    backend = program.backend
    alice = other_program(uid=1000, groups=groups)
    backend.chown(member.node, uid, gid)
    backend.chmod(member.node, mode)
    try:
        fd = alice.open(member.node)
        assert fd >= 0 if opens else fd == -errno.EACCES
        if opens:
            alice.close(fd)
        program.group(member)  # root may, whatever they say
    finally:
        backend.chown(member.node, 0, 0)
        backend.chmod(member.node, 0o600)


def test_owner_of_a_node_gives_it_to_groups_of_theirs_and_sets_its_mode(program, other_program, member):
    backend, alice = program.backend, other_program(uid=1000, groups=(1000, 2000)).backend
    assert answer(alice.chown, member.node, -1, 1000) == answer(alice.chmod, member.node, 0o666) == -errno.EPERM
    backend.chown(member.node, 1000, 0)
    try:
        for gid in (2000, 1000):
            alice.chown(member.node, -1, gid)
            assert backend.stat(member.node).gid == gid
        alice.chmod(member.node, 0o660)
        assert backend.stat(member.node).mode & 0o7777 == 0o660
        for uid, gid in ((-1, 0), (0, -1), (1001, -1)):
            assert answer(alice.chown, member.node, uid, gid) == -errno.EPERM
        alice.chown(member.node, 1000, -1)
        assert (backend.stat(member.node).uid, backend.stat(member.node).gid) == (1000, 1000)
    finally:
        backend.chown(member.node, 0, 0)
        backend.chmod(member.node, 0o600)


def test_containers_are_anybodys(program, other_program):
    assert program.backend.stat("/dev/vfio/vfio").mode & 0o7777 == 0o666
    alice = other_program(uid=1000)
    assert alice.container().ioctl(uapi.VFIO_GET_API_VERSION) == 0


# --- status ---


def test_status_is_viable_and_shows_a_container(program, member):
    group = program.group(member)
    assert group.status() == VIABLE
    assert group.set_container(program.container().fd) == 0
    assert group.status() == VIABLE | CONTAINER_SET
    assert group.unset_container() == 0
    assert group.status() == VIABLE


def test_status_writes_8_bytes(program, member):
    data = bytearray((12).to_bytes(4, "little") + b"\xa5" * 8)
    assert program.group(member).ioctl(uapi.VFIO_GROUP_GET_STATUS, data) == 0
    assert data == (12).to_bytes(4, "little") + VIABLE.to_bytes(4, "little") + b"\xa5" * 4


# --- containers ---


def test_set_container_checks_pointer_then_descriptor_then_itself(program, member):
    group, container = program.group(member), program.container()
    assert group.ioctl(uapi.VFIO_GROUP_SET_CONTAINER, NOWHERE) == -errno.EFAULT
    for fd in (-1, 99_999, 0x7FFF_FFFF):
        assert group.set_container(fd) == -errno.EBADF
    assert group.set_container(container.fd) == 0
    assert group.ioctl(uapi.VFIO_GROUP_SET_CONTAINER, NOWHERE) == -errno.EFAULT
    assert group.set_container(99_999) == -errno.EBADF
    assert group.set_container(container.fd) == -errno.EINVAL
    assert group.set_container(program.container().fd) == -errno.EINVAL
    assert group.set_container(group.fd) == -errno.EINVAL


def test_set_container_to_what_is_no_container_raises_ebadfd(program, member):
    group = program.group(member)
    eventfd = os.eventfd(0)
    try:
        for fd in (group.fd, eventfd):
            assert group.set_container(fd) == -errno.EBADFD
    finally:
        os.close(eventfd)
    assert group.status() == VIABLE


def test_set_container_to_a_device_raises_ebadfd(program, native, member, second):
    device = native.group.device(member.address)
    assert program.group(second).set_container(device) == -errno.EBADFD


def test_unset_container_without_one_raises_einval(program, member):
    group = program.group(member)
    for _ in range(2):
        assert group.unset_container() == -errno.EINVAL
    assert group.set_container(program.container().fd) == 0
    assert group.unset_container() == 0
    assert group.unset_container() == -errno.EINVAL


def test_unset_container_with_an_open_device_raises_ebusy(program, native, member):
    device = native.group.device(member.address)
    assert native.group.unset_container() == -errno.EBUSY
    assert native.group.status() == VIABLE | CONTAINER_SET
    program.close(device)
    assert native.group.unset_container() == 0


def test_unset_container_takes_everything_back(program, native):
    memory = program.memory(4 * program.page)
    assert native.pin(memory.address, memory.length) == 0
    assert native.map(memory.address, 0x100000, memory.length) == 0
    assert program.locked > memory.length
    assert native.group.unset_container() == 0
    assert program.locked == 0
    assert native.map(memory.address, 0x100000, memory.length) == -errno.EINVAL


def test_group_joins_a_container_that_has_its_iommu_set(program, native, second):
    group = program.group(second)
    assert group.set_container(native.fd) == 0
    assert group.status() == VIABLE | CONTAINER_SET
    assert group.unset_container() == 0
    assert native.set_iommu(program.native) == -errno.EINVAL
    assert group.set_container(native.fd) == 0


def test_two_groups_join_before_the_iommu_is_set(program, member, second):
    container, groups = program.container(), [program.group(each) for each in (member, second)]
    for group in groups:
        assert group.set_container(container.fd) == 0
    assert container.set_iommu(program.native) == 0
    for group in groups:
        assert group.unset_container() == 0
    assert container.set_iommu(program.native) == -errno.EINVAL


# --- devices ---


def test_known_device_without_container_or_iommu_raises_einval(program, member):
    group, container = program.group(member), program.container()
    assert group.device(member.address) == -errno.EINVAL
    assert group.set_container(container.fd) == 0
    assert group.device(member.address) == -errno.EINVAL
    assert container.set_iommu(99) == -errno.ENODEV
    assert group.device(member.address) == -errno.EINVAL


def test_unknown_device_raises_enodev_even_without_a_container(program, member):
    group = program.group(member)
    assert group.device("0fff:1f:1f.7") == -errno.ENODEV
    assert group.set_container(program.container().fd) == 0
    assert group.device("0fff:1f:1f.7") == -errno.ENODEV


def test_device_opens_several_times(program, native, member):
    fds = [native.group.device(member.address) for _ in range(3)]
    assert min(fds) >= 0
    assert len(set(fds)) == 3
    config = 7 << 40
    program.backend.pwrite(fds[0], b"\x5a", config + 0x3C)
    assert program.backend.pread(fds[2], 1, config + 0x3C) == b"\x5a"  # one device behind all of them


def test_device_descriptor_is_an_anonymous_file_for_reading_and_writing(program, native, member):
    fd = native.group.device(member.address)
    assert program.backend.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[vfio-device]"
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR


@pytest.mark.parametrize("spaces", [1, 5])
def test_spaces_behind_the_name_do_not_matter(native, member, spaces):
    assert native.group.device(member.address + " " * spaces) >= 0


@pytest.mark.parametrize(
    "name", ["", " ", "{0}x", "x{0}", " {0}", "{0}\n", "{0}0", "{1}", "{2}", "0000", "0000:ff:1f.7", "vf_token={0}"]
)
def test_name_that_is_not_the_devices_raises_enodev(native, member, name):
    short, prefix = member.address.partition(":")[2], member.address[:-1]
    assert native.group.device(name.format(member.address, short, prefix)) == -errno.ENODEV


@pytest.mark.parametrize(
    "options",
    [
        "foo",
        "foo=bar",
        "vf_token=",
        "vf_token=1234",
        "vf_token=zzzzzzzz-zzzz-zzzz-zzzz-zzzzzzzzzzzz",
        "vf_token=00112233-4455-6677-8899-aabbccddeeff",
        "vf_token=00112233-4455-6677-8899-aabbccddeeff vf_token=00112233-4455-6677-8899-aabbccddeeff",
    ],
)
def test_options_that_are_unknown_or_not_for_this_device_raise_einval(native, member, options):
    assert native.group.device(f"{member.address} {options}") == -errno.EINVAL


def test_device_of_another_group_raises_enodev(native, second):
    assert native.group.device(second.address) == -errno.ENODEV


@pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k")
def test_device_of_the_group_that_is_not_on_vfio_raises_enodev(native, target, member):
    others = [device.address for device in target.topology.groups()[member.group] if device.address != member.address]
    assert others
    for address in others:
        assert native.group.device(address) == -errno.ENODEV


def test_name_may_be_a_page_long_with_its_end(program, native, member):
    assert native.group.device(member.address.ljust(program.page - 1)) >= 0
    assert native.group.device("x" * (program.page - 1)) == -errno.ENODEV
    assert native.group.device(member.address.ljust(program.page)) == -errno.EINVAL
    assert native.group.device("x" * (2 * program.page)) == -errno.EINVAL


def test_name_that_cannot_be_read_raises_efault(program, native, member, area):
    torn = area(2)
    torn.hole(1)
    name = member.address.encode()
    end = torn.address + program.page
    torn.write(program.page - len(name), name)
    request = uapi.VFIO_GROUP_GET_DEVICE_FD
    for pointer in (0, NOWHERE, end, end - len(name)):
        assert native.group.ioctl(request, pointer) == -errno.EFAULT
    torn.write(program.page - len(name) - 1, name + b"\0")
    assert program.take(native.group.ioctl(request, end - len(name) - 1)) >= 0


@pytest.mark.not_recorded("a transcript does not hold how many descriptors the process may have")
def test_full_descriptor_table_raises_emfile_before_the_container_is_looked_at(program, member):
    group = program.group(member)
    with no_more_descriptors():
        assert group.device(member.address) == -errno.EMFILE
        assert group.device("0fff:1f:1f.7") == -errno.ENODEV
        assert answer(program.backend.open, "/dev/vfio/vfio", os.O_RDWR) == -errno.EMFILE
    assert group.device(member.address) == -errno.EINVAL


def test_bus_master_is_off_when_a_device_is_opened_first(program, native, member):
    command = (7 << 40) + 4
    for _ in range(2):
        first, again = native.group.device(member.address), native.group.device(member.address)
        assert program.backend.pread(first, 1, command)[0] & 4 == 0
        program.backend.pwrite(first, b"\x06", command)
        program.close(again)
        assert native.group.device(member.address) >= 0  # not the first, so it changes nothing
        assert program.backend.pread(first, 1, command)[0] & 4 == 4
        program.close_all()
        native = program.attached(member, program.older)


@contextmanager
def no_more_descriptors():
    """All descriptors below the limit are in use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.dup(0)
    os.close(probe)
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
