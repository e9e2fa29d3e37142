"""The modelled VFIO core: containers, groups and devices, who holds what, and what goes when.  (Spec: section 2.)"""

from __future__ import annotations

import errno
import os
import threading

import pytest
from spapr_host import PAGE, Host, User, answer

from vfio import uapi
from vfio.fake.core import REQUEST_INTERVAL
from vfio.fake.file import File
from vfio.fake.kernel_error import KernelWouldBlock

EDU, SIBLING, ALONE, NVME = "0000:01:00.0", "0000:01:00.1", "0001:01:00.0", "0002:01:00.0"
VIABLE, IN_CONTAINER = 1, 3
V1, V2 = uapi.VFIO_SPAPR_TCE_IOMMU, uapi.VFIO_SPAPR_TCE_v2_IOMMU


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def user(host: Host) -> User:
    return User(host)


def device_file(user: User, group: File, name: str = EDU) -> File:
    fd = user.device_fd(group, name)
    assert isinstance(fd, int)
    return user.process.files[fd]


# --- containers ---


def test_a_container_tells_its_version_and_extensions(user: User) -> None:
    answers = {n: user.call(user.container, uapi.VFIO_CHECK_EXTENSION, n) for n in (*range(12), 1 << 32 | 2)}
    assert user.call(user.container, uapi.VFIO_GET_API_VERSION, 99) == 0
    assert {n for n, answer in answers.items() if answer == 1} == {V1, V2, uapi.VFIO_EEH}
    assert {answer for n, answer in answers.items() if n not in (V1, V2, uapi.VFIO_EEH)} == {0}


def test_extensions_are_the_same_with_an_iommu_set(user: User) -> None:
    user.attach(0, version=1)
    assert [user.call(user.container, uapi.VFIO_CHECK_EXTENSION, n) for n in (1, 2, 3, 5, 7)] == [0, 1, 0, 1, 1]


def test_a_pseries_guest_has_no_eeh() -> None:
    user = User(Host("pseries"))
    assert [user.call(user.container, uapi.VFIO_CHECK_EXTENSION, n) for n in (2, 5, 7)] == [1, 0, 1]


def test_without_a_driver_loaded_there_are_no_extensions_and_no_types(host: Host, user: User) -> None:
    host.vfio.iommu_drivers.clear()
    user.set_container(user.open_group(0))
    assert user.call(user.container, uapi.VFIO_CHECK_EXTENSION, V2) == 0
    assert user.set_iommu(V2) == "ENODEV"


def test_a_container_without_an_iommu_answers_einval_without_looking(user: User) -> None:
    assert user.set_iommu(V2) == "EINVAL"
    assert user.call(user.container, uapi.VFIO_IOMMU_MAP_DMA, 0x10) == "EINVAL"
    assert user.call(user.container, None, 0x10) == "EINVAL"


@pytest.mark.parametrize("kind", [0, 1, 3, 4, 6, 8, 99, 1 << 32 | 2])
def test_a_type_that_no_driver_claims_is_enodev(user: User, kind: int) -> None:
    user.set_container(user.open_group(0))
    assert user.set_iommu(kind) == "ENODEV"


def test_a_failed_set_iommu_leaves_the_container_unset(user: User) -> None:
    user.set_container(user.open_group(0))
    assert user.set_iommu(uapi.VFIO_EEH) == "EINVAL"
    assert user.set_iommu(V1) == 0
    assert user.set_iommu(V1) == "EINVAL"


def test_v1_refuses_two_groups_that_are_there_already_and_v2_takes_them(host: Host, user: User) -> None:
    for number in (0, 1):
        user.set_container(user.open_group(number))
    assert user.set_iommu(V1) == "EBUSY"
    assert user.set_iommu(V2) == 0


def test_an_unknown_request_is_enotty_once_an_iommu_is_set(user: User) -> None:
    user.attach(0)
    assert user.call(user.container, None) == "ENOTTY"
    assert user.call(user.container, uapi.VFIO_GET_API_VERSION + 60) == "ENOTTY"
    assert user.call(user.container, uapi.VFIO_IOMMU_ENABLE) == "ENOTTY"  # v1 only


def test_containers_and_groups_are_neither_read_nor_mapped(user: User) -> None:
    for file in (user.container, user.open_group(0)):
        assert answer(file.pread, user.process, 4, 0) == "EINVAL"
        assert answer(file.pwrite, user.process, b"1234", 0) == "EINVAL"
        assert answer(file.mmap, user.process, PAGE, 0, 3) == "ENODEV"


# --- groups ---


def test_a_group_without_a_vfio_device_has_no_node() -> None:
    host = Host(drivers={NVME: "nvme"})
    assert answer(User(host).open_group, 2) == "ENOENT"


def test_a_group_is_its_owners_alone_until_it_is_given_away(host: Host) -> None:
    alice = User(host, host.new_process(pid=os.getpid() + 1, uid=1000))
    assert answer(alice.open_group, 0) == "EACCES"
    host.vfio.groups[0].uid = 1000
    assert alice.status(alice.open_group(0)) == VIABLE


def test_a_mode_for_everybody_lets_everybody_in(host: Host) -> None:
    alice = User(host, host.new_process(pid=os.getpid() + 1, uid=1000))
    host.vfio.groups[0].mode = 0o666
    assert alice.status(alice.open_group(0)) == VIABLE


def test_an_open_group_is_busy_until_its_last_duplicate_is_closed(user: User) -> None:
    group = user.open_group(0)
    group.get()
    group.put()
    assert answer(user.open_group, 0) == "EBUSY"
    group.put()
    assert user.status(user.open_group(0)) == VIABLE


def test_get_status_looks_at_the_argument_first(user: User) -> None:
    group = user.open_group(0)
    assert user.call(group, uapi.VFIO_GROUP_GET_STATUS, 0x10) == "EFAULT"
    assert user.call(group, uapi.VFIO_GROUP_GET_STATUS, uapi.vfio_group_status(argsz=7)) == "EINVAL"
    assert user.call(group, uapi.VFIO_IOMMU_MAP_DMA) == "ENOTTY"


@pytest.mark.parametrize(("driver", "flags", "answer"), [(None, 1, 0), ("pci-stub", 1, 0), ("nvme", 0, "EPERM")])
def test_a_sibling_is_in_the_way_only_if_its_driver_does_dma(driver: str | None, flags: int, answer: int | str) -> None:
    user = User(Host(drivers={SIBLING: driver}))
    group = user.open_group(0)
    assert user.status(group) == flags
    assert user.set_container(group) == answer


def test_set_container_checks_in_the_kernels_order(host: Host, user: User) -> None:
    group = user.open_group(0)
    assert user.call(group, uapi.VFIO_GROUP_SET_CONTAINER, 0x10) == "EFAULT"
    assert user.call(group, uapi.VFIO_GROUP_SET_CONTAINER, bytearray(b"\xff\xff\xff\xff")) == "EBADF"
    assert user.set_container(group, group) == "EBADFD"
    read, write = os.pipe()
    try:
        assert user.call(group, uapi.VFIO_GROUP_SET_CONTAINER, bytearray(read.to_bytes(4, "little"))) == "EBADFD"
    finally:
        os.close(read)
        os.close(write)
    assert user.set_container(group) == 0
    assert user.status(group) == IN_CONTAINER
    assert user.set_container(group) == "EINVAL"


def test_a_claimed_group_keeps_ordinary_drivers_out(host: Host, user: User) -> None:
    group = user.open_group(0)
    iommu_group = host.iommu_groups[0]
    iommu_group.use_default_domain("nvme")
    user.set_container(group)
    assert answer(iommu_group.use_default_domain, "nvme") == "EBUSY"
    iommu_group.use_default_domain("pci-stub")
    assert not iommu_group.table_group.host_owned
    assert user.unset_container(group) == 0
    iommu_group.use_default_domain("nvme")
    assert iommu_group.table_group.host_owned


def test_unset_container_needs_one_and_no_open_device(user: User) -> None:
    group = user.open_group(0)
    assert user.unset_container(group) == "EINVAL"
    user.set_container(group)
    user.set_iommu(V2)
    device = device_file(user, group)
    assert user.unset_container(group) == "EBUSY"
    device.put()
    assert user.unset_container(group) == 0
    assert user.status(group) == VIABLE


def test_a_group_can_leave_and_come_back_with_another_type(user: User) -> None:
    (group,) = user.attach(0, version=1)
    assert user.unset_container(group) == 0
    assert user.set_iommu(V2) == "EINVAL"
    assert user.set_container(group) == 0
    assert user.set_iommu(V2) == 0


def test_a_second_group_that_the_iommu_refuses_is_not_claimed(host: Host, user: User) -> None:
    user.attach(0, version=1)
    second = user.open_group(1)
    assert user.set_container(second) == "EBUSY"
    assert user.status(second) == VIABLE
    assert host.iommu_groups[1].table_group.host_owned


# --- device descriptors ---


@pytest.mark.parametrize("name", ["", EDU[:-1], EDU + "x", "01:00.0", ALONE])
def test_a_name_that_means_no_device_of_the_group_is_enodev(user: User, name: str) -> None:
    assert user.device_fd(user.open_group(0), name) == "ENODEV"


def test_get_device_fd_wants_an_iommu(user: User) -> None:
    group = user.open_group(0)
    assert user.call(group, uapi.VFIO_GROUP_GET_DEVICE_FD, 0x10) == "EFAULT"
    assert user.device_fd(group, "x" * 4096) == "EINVAL"
    assert user.device_fd(group, "x" * 4095) == "ENODEV"
    assert user.device_fd(group, EDU) == "EINVAL"
    user.set_container(group)
    assert user.device_fd(group, EDU) == "EINVAL"
    user.set_iommu(V2)
    assert isinstance(user.device_fd(group, EDU), int)


def test_only_devices_of_a_vfio_driver_are_given(host: Host) -> None:
    user = User(Host(drivers={SIBLING: "pci-stub"}))
    (group,) = user.attach(0)
    assert user.device_fd(group, SIBLING) == "ENODEV"


def test_a_device_is_enabled_by_its_first_file_and_disabled_by_its_last(host: Host, user: User) -> None:
    (group,) = user.attach(0)
    first, second = device_file(user, group), device_file(user, group)
    assert host.ops[EDU].calls == ["open"]
    first.put()
    assert host.ops[EDU].calls == ["open"]
    second.put()
    assert host.ops[EDU].calls == ["open", "release"]


def test_a_device_that_cannot_be_opened_holds_nothing(host: Host, user: User) -> None:
    (group,) = user.attach(0)
    host.ops[EDU].refuse = errno.EAGAIN
    before = set(user.process.files)
    assert user.device_fd(group, EDU) == "EAGAIN"
    assert set(user.process.files) == before
    assert user.unset_container(group) == 0
    group.put()
    assert host.vfio.groups[0].opened_file is None


# --- closing, in every order ---


def test_the_group_stays_busy_until_its_device_is_closed(host: Host, user: User) -> None:
    (group,) = user.attach(0)
    device = device_file(user, group)
    group.put()
    user.container.put()
    assert answer(user.open_group, 0) == "EBUSY"
    assert not host.iommu_groups[0].table_group.host_owned
    device.put()
    assert host.iommu_groups[0].table_group.host_owned
    assert user.status(user.open_group(0)) == VIABLE
    assert host.vfio.containers == []


def test_a_mapped_bar_is_as_good_as_an_open_device(host: Host, user: User) -> None:
    (group,) = user.attach(0)
    device = device_file(user, group)
    mapping = device.mmap(user.process, 4096, 0, 3)
    device.put()
    mapping.store(0, 4, 7)
    assert mapping.load(0, 4) == 7
    assert user.unset_container(group) == "EBUSY"
    mapping.close()
    mapping.close()
    assert host.ops[EDU].calls == ["open", "release"]
    assert user.unset_container(group) == 0


def test_a_closed_container_lives_on_in_its_group(host: Host, user: User) -> None:
    (group,) = user.attach(0)
    user.container.put()
    assert user.status(group) == IN_CONTAINER
    device_file(user, group).put()
    assert user.set_container(group, host.vfio.open_container(user.process)) == "EINVAL"
    assert len(host.vfio.containers) == 2
    assert user.unset_container(group) == 0
    assert len(host.vfio.containers) == 1


def test_closing_the_group_leaves_the_container_reusable(user: User) -> None:
    (group,) = user.attach(0)
    group.put()
    assert user.set_iommu(V2) == "EINVAL"
    assert user.info()[0] == "EINVAL"
    user.attach(0, version=1)


def test_one_of_two_groups_can_go_and_come_back(user: User) -> None:
    first, second = user.attach(0, 1)
    assert user.unset_container(first) == 0
    assert user.set_iommu(V2) == "EINVAL"
    assert user.info()[0] == 0
    assert user.set_container(first) == 0
    assert user.status(second) == IN_CONTAINER


def test_a_process_that_ends_lets_go_of_everything(host: Host) -> None:
    process = host.new_process()
    user = User(host, process)
    process.install(user.container)
    (group,) = user.attach(0)
    process.install(group)
    device_file(user, group).mmap(process, 4096, 0, 3)
    process.exit()
    assert host.vfio.held() == []
    assert host.vfio.containers == []
    assert host.vfio.mappings == {}
    assert host.ops[EDU].calls == ["open", "release"]


# --- devices that leave ---


def test_the_last_device_takes_the_group_with_it(host: Host, user: User) -> None:
    (group,) = user.attach(1)
    host.vfio.unregister_device(host.devices[ALONE])  # type: ignore[arg-type]
    assert 1 not in host.vfio.groups
    assert host.iommu_groups[1].table_group.host_owned
    assert user.status(group) == "ENODEV"
    assert user.set_container(group) == "ENODEV"
    assert user.unset_container(group) == "EINVAL"
    assert user.device_fd(group, ALONE) == "ENODEV"
    assert user.set_iommu(V2) == "EINVAL"  # the container has no group left
    host.bind(ALONE)
    assert user.status(group) == "ENODEV"
    assert user.status(user.open_group(1)) == VIABLE
    group.put()


def test_a_group_with_another_device_stays(host: Host, user: User) -> None:
    (group,) = user.attach(0)
    host.vfio.unregister_device(host.devices[SIBLING])  # type: ignore[arg-type]
    assert user.status(group) == IN_CONTAINER
    assert user.device_fd(group, SIBLING) == "ENODEV"


def test_minors_and_device_numbers_are_the_lowest_that_are_free(host: Host, user: User) -> None:
    assert {number: group.minor for number, group in host.vfio.groups.items()} == {0: 0, 1: 1, 2: 2}
    old = user.open_group(1)
    pci = host.devices[ALONE]
    index = host.vfio.devices[pci].index  # type: ignore[index]
    host.vfio.unregister_device(pci)  # type: ignore[arg-type]
    host.bind(ALONE)
    assert host.vfio.groups[1].minor == 3  # the open file still has the old one
    assert host.vfio.devices[pci].index == index  # type: ignore[index]
    host.vfio.unregister_device(pci)  # type: ignore[arg-type]
    old.put()
    host.bind(ALONE)
    assert host.vfio.groups[1].minor == 1


def test_a_process_cannot_wait_for_itself_to_close_a_device(host: Host, user: User) -> None:
    (group,) = user.attach(0)
    device = device_file(user, group)
    with pytest.raises(KernelWouldBlock, match=EDU):
        host.vfio.unregister_device(host.devices[EDU], user.process)  # type: ignore[arg-type]
    assert isinstance(user.device_fd(group, EDU), int)  # nothing has changed
    assert host.ops[EDU].calls == ["open"]
    device.put()


def test_an_unbind_waits_for_another_process_and_asks_it(host: Host, user: User) -> None:
    (group,) = user.attach(1)
    fd = user.device_fd(group, ALONE)
    assert isinstance(fd, int)
    operator = host.new_process(pid=os.getpid() + 1)
    asked = threading.Event()
    ops = host.ops[ALONE]
    ops.asked = asked.set

    def unbind() -> None:
        with host.lock:
            host.vfio.unregister_device(host.devices[ALONE], operator)  # type: ignore[arg-type]

    thread = threading.Thread(target=unbind)
    thread.start()
    assert asked.wait(10)
    with host.lock:
        assert user.device_fd(group, ALONE) == "ENODEV"
        assert ops.calls == ["open", "request 0"]
        asked.clear()
        host.clock.advance(REQUEST_INTERVAL)
    assert asked.wait(10)
    with host.lock:
        user.process.close(fd)
        host.changed.notify_all()
    thread.join(10)
    assert not thread.is_alive()
    assert ops.calls == ["open", "request 0", "request 1", "release"]
    assert 1 not in host.vfio.groups


# --- looking in ---


def test_a_fresh_kernel_holds_nothing(host: Host) -> None:
    assert host.vfio.held() == []


def test_what_is_held_is_named(host: Host, user: User) -> None:
    (group,) = user.attach(0)
    device_file(user, group)
    held = host.vfio.held()
    assert held[0] == f"container 0 (opened by process {user.process.pid}): group 0 is attached"
    assert held[-1] == f"device {EDU}: open 1 times, by process {user.process.pid}"
    described = host.vfio.describe()
    assert described["containers"][0]["groups"] == [0]
    assert described["devices"][0] == {"address": EDU, "group": 0, "opened": 1, "holders": [user.process.pid]}
