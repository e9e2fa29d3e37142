"""Containers, groups and devices on a real kernel: how they open, fail and close."""

import errno
import os
import subprocess
import sys

import pytest

import vfio
from hwtests.devices import bound
from vfio import errors, holders, sysfs


def test_container_answers_api_version_0_and_claims_both_spapr_versions(backend):
    with vfio.Container(backend) as container:
        assert backend.ioctl(container.fd, vfio.uapi.VFIO_GET_API_VERSION) == 0
        assert container.check_extension(vfio.uapi.VFIO_SPAPR_TCE_IOMMU)
        assert container.check_extension(vfio.uapi.VFIO_SPAPR_TCE_v2_IOMMU)
        assert not container.check_extension(vfio.uapi.VFIO_TYPE1_IOMMU)


def test_closed_objects_say_so_with_ebadf(backend, bound_address):
    container, group = vfio.Container(backend), vfio.Group(sysfs.group_of(backend, bound_address), backend)
    for closing in (container, group):
        closing.close()
        closing.close()
        with pytest.raises(errors.Closed) as caught:
            closing.fd  # noqa: B018
        assert caught.value.errno == errno.EBADF


def test_set_iommu_without_a_group_raises_einval(backend):
    with vfio.Container(backend) as container, pytest.raises(errors.CallFailed) as caught:
        container.set_iommu(vfio.SpaprTceV2)
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


def test_detach_with_an_open_device_raises_ebusy(device):
    container = device.group.container
    with pytest.raises(errors.Busy) as caught:
        container.detach(device.group)
    assert caught.value.errno == errno.EBUSY
    assert device.iommu.map(vfio.DmaBuffer(4096)).mapped


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


def test_user_without_the_node_is_told_who_owns_it_and_what_changes_that(backend, bound_address, as_alice):
    answer = as_alice(
        f"import vfio\ntry: vfio.open_device({bound_address!r})\nexcept OSError as e: print(type(e).__name__, e.errno); print(e)"
    )
    assert answer.startswith(f"AccessDenied {errno.EACCES}\n")
    assert "root:root with mode 0600" in answer
    assert "chown alice /dev/vfio/" in answer


def test_user_who_was_given_the_node_opens_the_device(backend, device_address, as_alice):
    with bound(backend, device_address, user="alice"):
        answer = as_alice(
            f"import vfio\nwith vfio.open_device({device_address!r}) as d: print(hex(d.config.read16(0)))"
        )
    assert answer == "0x1234\n"


def test_locked_memory_limit_is_reported_with_figures_and_remedies(backend, device_address, as_alice):
    code = f"""
import resource, vfio
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
with vfio.open_device({device_address!r}) as device:
    iommu = device.iommu
    for attempt in (lambda: iommu.register(vfio.DmaBuffer(2 << 20)), lambda: iommu.create_window(1 << 30, 4096)):
        try: attempt()
        except OSError as e: print(type(e).__name__, e.errno, "ulimit -l" in str(e), "LimitMEMLOCK=" in str(e))
    print(device.backend.locked().locked)
"""
    with bound(backend, device_address, user="alice"):
        answer = as_alice(code).splitlines()
    assert answer == [f"LockedMemoryLimit {errno.ENOMEM} True True"] * 2 + ["0"]


def test_container_of_another_process_refuses_with_eperm(device):
    container = device.group.container
    with device.iommu.map(vfio.DmaBuffer(1 << 16)):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                container.iommu.map(vfio.DmaBuffer(1 << 16))
            except OSError as error:
                os.write(writer, str(error.errno).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        os.close(writer)
        assert os.read(reader, 10) == str(errno.EPERM).encode()
        os.close(reader)


def test_holders_are_found_by_another_process(backend, bound_address):
    number = sysfs.group_of(backend, bound_address)
    with vfio.Group(number, backend):
        code = f"import vfio; print(vfio.holders.of(vfio.open_backend(), '/dev/vfio/{number}')[0].pid)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert int(done.stdout) == os.getpid()
    assert holders.of(backend, f"/dev/vfio/{number}") == []
