"""Containers, groups and devices: how they open, fail and close."""

import errno
import os

import pytest

import vfio
from simtests.conformance.fixtures import PC, POWER
from vfio import errors, holders, sysfs


@POWER
def test_container_answers_api_version_0_and_claims_both_spapr_versions(backend):
    with vfio.Container(backend) as container:
        assert backend.ioctl(container.fd, vfio.uapi.VFIO_GET_API_VERSION) == 0
        assert container.check_extension(vfio.uapi.VFIO_SPAPR_TCE_IOMMU)
        assert container.check_extension(vfio.uapi.VFIO_SPAPR_TCE_v2_IOMMU)
        assert not container.check_extension(vfio.uapi.VFIO_TYPE1_IOMMU)


@PC
def test_container_answers_api_version_0_and_claims_both_type1_versions(backend):
    with vfio.Container(backend) as container:
        assert backend.ioctl(container.fd, vfio.uapi.VFIO_GET_API_VERSION) == 0
        assert container.check_extension(vfio.uapi.VFIO_TYPE1_IOMMU)
        assert container.check_extension(vfio.uapi.VFIO_TYPE1v2_IOMMU)
        assert not container.check_extension(vfio.uapi.VFIO_SPAPR_TCE_v2_IOMMU)


def test_closed_objects_say_so_with_ebadf(backend, bound_address):
    container, group = vfio.Container(backend), vfio.Group(sysfs.group_of(backend, bound_address), backend)
    for closing in (container, group):
        closing.close()
        closing.close()
        with pytest.raises(errors.Closed) as caught:
            closing.fd  # noqa: B018
        assert caught.value.errno == errno.EBADF


def test_set_iommu_without_a_group_raises_einval(backend, target):
    with vfio.Container(backend) as container, pytest.raises(errors.CallFailed) as caught:
        container.set_iommu(vfio.Type1v2 if target.platform == "PC" else vfio.SpaprTceV2)
    assert caught.value.errno == errno.EINVAL


def test_group_opens_once_and_the_error_names_who_has_it(backend, bound_address):
    number = sysfs.group_of(backend, bound_address)
    with vfio.Group(number, backend):
        with pytest.raises(errors.Busy) as caught:
            vfio.Group(number, backend)
        assert caught.value.errno == errno.EBUSY
        assert os.getpid() in [holder.pid for holder in caught.value.holders]
        assert f"pid {os.getpid()}" in str(caught.value)
    vfio.Group(number, backend).close()


def test_group_that_does_not_exist_raises_enoent(backend):
    with pytest.raises(errors.CallFailed) as caught:
        vfio.Group(4242, backend)
    assert caught.value.errno == errno.ENOENT


def test_group_without_a_device_on_vfio_names_the_command_that_binds_it(backend, device_address):
    number = sysfs.group_of(backend, device_address)
    with pytest.raises(errors.NotBound, match=f"vfio bind {device_address}") as caught:
        vfio.Group(number, backend)
    assert caught.value.errno == errno.ENOENT


def test_open_device_that_is_not_bound_says_how_to_bind_it(backend, device_address):
    with pytest.raises(errors.NotBound, match=f"vfio bind {device_address}"):
        vfio.open_device(device_address, backend)


def test_open_device_that_does_not_exist_raises_enodev(backend):
    with pytest.raises(errors.NoSuchDevice) as caught:
        vfio.open_device("0fff:1f:1f.7", backend)
    assert caught.value.errno == errno.ENODEV


def test_open_device_leaves_nothing_open_when_it_fails(backend, bound_address):
    before = sorted(os.listdir("/proc/self/fd"))
    with vfio.Group(sysfs.group_of(backend, bound_address), backend), pytest.raises(errors.Busy):
        vfio.open_device(bound_address, backend)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_device_in_no_container_raises_einval_with_the_mend(backend, bound_address):
    with vfio.Group(sysfs.group_of(backend, bound_address), backend) as group:
        with pytest.raises(errors.CallFailed, match=r"container\.attach") as caught:
            group.device(bound_address)
        assert caught.value.errno == errno.EINVAL
        with vfio.Container(backend) as container:
            container.attach(group)
            with pytest.raises(errors.CallFailed, match="choose_iommu"):
                group.device(bound_address)


def test_group_is_viable_and_shows_its_container(backend, bound_address):
    with vfio.Group(sysfs.group_of(backend, bound_address), backend) as group, vfio.Container(backend) as container:
        assert group.status == vfio.uapi.VFIO_GROUP_FLAGS_VIABLE
        container.attach(group)
        assert group.status == vfio.uapi.VFIO_GROUP_FLAGS_VIABLE | vfio.uapi.VFIO_GROUP_FLAGS_CONTAINER_SET
        with pytest.raises(errors.CallFailed, match="in a container already") as caught:
            container.attach(group)
        assert caught.value.errno == errno.EINVAL


def test_detach_with_an_open_device_raises_ebusy(device, backend):
    container = device.group.container
    with pytest.raises(errors.Busy) as caught:
        container.detach(device.group)
    assert caught.value.errno == errno.EBUSY
    assert device.iommu.map(vfio.DmaBuffer(4096, backend=backend)).mapped


ORDERS = ["cgd", "cdg", "gcd", "gdc", "dcg", "dgc"]


@pytest.mark.needs_edu
@pytest.mark.parametrize("order", ORDERS)
def test_order_of_closing_never_matters(backend, bound_address, order):
    group, container = vfio.Group(sysfs.group_of(backend, bound_address), backend), vfio.Container(backend)
    container.attach(group)
    iommu = container.choose_iommu()
    device = group.device(bound_address)
    buffer = vfio.DmaBuffer(1 << 16, backend=backend)
    dma = iommu.map(buffer)
    device.region(vfio.BAR0).read32(0)
    for letter in order:
        {"c": container, "g": group, "d": device}[letter].close()
    assert not dma.mapped
    buffer.close()
    assert backend.locked().locked == 0
    with vfio.open_device(bound_address, backend) as again:
        assert again.group.viable


@pytest.mark.needs_edu
def test_mapping_still_works_while_only_the_group_is_closed(backend, bound_address):
    with vfio.Container(backend) as container:
        group = vfio.Group(sysfs.group_of(backend, bound_address), backend)
        container.attach(group)
        iommu = container.choose_iommu()
        with group.device(bound_address) as device:
            group.close()
            with vfio.DmaBuffer(1 << 16, backend=backend) as buffer, iommu.map(buffer) as dma:
                assert dma.mapped
            assert device.config.read16(0) == 0x1234
        with pytest.raises(errors.CallFailed):
            container.choose_iommu()


def test_holders_are_found_by_another_process(backend, bound_address, another_process):
    node = f"/dev/vfio/{sysfs.group_of(backend, bound_address)}"
    other = another_process()
    with vfio.Group(sysfs.group_of(backend, bound_address), backend):
        assert os.getpid() in [holder.pid for holder in holders.of(other, node)]
        with pytest.raises(errors.Busy) as caught:
            vfio.Group(sysfs.group_of(backend, bound_address), other)
        assert caught.value.errno == errno.EBUSY
    assert holders.of(other, node) == []
    with vfio.Group(sysfs.group_of(backend, bound_address), other) as group:
        assert group.viable


def test_user_without_the_node_is_refused_with_eacces(backend, bound_address, another_process):
    alice = another_process(uid=1000)
    with pytest.raises(errors.AccessDenied, match="root:root with mode 0600") as caught:
        vfio.open_device(bound_address, alice)
    assert caught.value.errno == errno.EACCES


def test_user_who_was_given_the_node_opens_the_device(backend, bound_address, another_process):
    node = f"/dev/vfio/{sysfs.group_of(backend, bound_address)}"
    backend.chown(node, 1000, 1000)
    try:
        with vfio.open_device(bound_address, another_process(uid=1000)) as device:
            assert f"0x{device.config.read16(0):04x}\n" == backend.read_text(sysfs.path(bound_address, "vendor"))
    finally:
        backend.chown(node, 0, 0)


@pytest.mark.parametrize(
    "model",
    [
        *(pytest.param(model, marks=POWER) for model in (vfio.SpaprTce, vfio.SpaprTceV2)),
        *(pytest.param(model, marks=PC) for model in (vfio.Type1, vfio.Type1v2)),
    ],
)
def test_locked_memory_limit_is_reported_with_figures_and_remedies(bound_address, another_process, model):
    other = another_process(memlock=1 << 20, ipc_lock=False)
    with vfio.open_device(bound_address, other, model) as device:
        iommu, memory = device.iommu, other.allocate(2 << 20)
        pinned = vfio.MemoryRange(memory.address, memory.length)
        if model is vfio.SpaprTce:
            attempts = [iommu.enable]
        elif model is vfio.SpaprTceV2:
            attempts = [lambda: iommu.register(pinned), lambda: iommu.create_window(1 << 30, 4096)]
        else:
            attempts = [lambda: iommu.map(pinned)]
        for attempt in attempts:
            with pytest.raises(errors.LockedMemoryLimit, match="ulimit -l") as caught:
                attempt()
            assert caught.value.errno == errno.ENOMEM
            assert "LimitMEMLOCK=" in str(caught.value)
        assert other.locked().locked == 0
