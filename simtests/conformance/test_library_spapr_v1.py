"""sPAPR TCE v1."""

import errno

import pytest

import vfio
from vfio import errors, sysfs

pytestmark = pytest.mark.power

POWERNV = pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k")


@pytest.fixture
def iommu(backend, bound_address):
    with vfio.open_device(bound_address, backend, vfio.SpaprTce) as device:
        yield device.iommu


@pytest.mark.needs_edu
def test_the_flow_of_the_kernel_document(backend, bound_address):
    """The C example of the kernel's VFIO document for sPAPR: enable, 1 MiB at IOVA 0, device, regions, interrupts, reset."""
    with vfio.Container(backend) as container, vfio.Group(sysfs.group_of(backend, bound_address), backend) as group:
        assert group.viable
        container.attach(group)
        iommu = container.set_iommu(vfio.SpaprTce)
        assert iommu.info.window_start == 0
        iommu.enable()
        assert backend.locked().locked == iommu.info.window_size
        buffer = vfio.DmaBuffer(1 << 20, backend=backend)
        with iommu.map(buffer, 0):
            device = group.device(bound_address)
            assert device.info.num_regions >= 9
            assert [region.name for region in device.regions()] == ["BAR0", "CONFIG"]
            assert {irq.name for irq in device.irqs()} >= {"INTx", "MSI"}
            driver = vfio.drivers.edu.Edu(device)
            buffer[0:8] = b"document"
            driver.load(0, 8)
            driver.store(0x1000, 8)
            assert buffer[0x1000:0x1008] == b"document"
        iommu.disable()
        assert backend.locked().locked < iommu.info.window_size
        device.close()
    buffer.close()
    assert backend.locked().locked == 0


def test_v1_has_one_window_without_ddw(iommu):
    assert iommu.info.page_sizes == ()
    assert iommu.info.max_windows == 0
    assert len(iommu.windows) == 1
    with pytest.raises(errors.CallFailed) as caught:
        iommu.windows[0].close()
    assert caught.value.errno == errno.ENOTTY


def test_window_map_before_enable_raises_eperm(iommu, backend):
    with pytest.raises(errors.NotEnabled) as caught:
        iommu.windows[0].map(vfio.DmaBuffer(1 << 16, backend=backend))
    assert caught.value.errno == errno.EPERM


def test_enable_twice_raises_ebusy(iommu):
    iommu.enable()
    with pytest.raises(errors.CallFailed) as caught:
        iommu.enable()
    assert caught.value.errno == errno.EBUSY
    iommu.disable()
    iommu.disable()
    assert not iommu.enabled


def test_disable_unmaps_first(iommu, backend):
    dma = iommu.map(vfio.DmaBuffer(1 << 16, backend=backend))
    assert iommu.enabled
    iommu.disable()
    assert not dma.mapped


def test_memory_that_cannot_be_pinned_raises_efault_before_the_call(iommu, backend):
    with vfio.DmaBuffer(1 << 16, backend=backend) as gone:
        address = gone.address
    iommu.enable()
    with pytest.raises(errors.CallFailed) as caught:
        iommu.map(vfio.MemoryRange(address, 1 << 16), 0)
    assert caught.value.errno == errno.EFAULT
    assert iommu.windows[0].mapped == []


@POWERNV
def test_second_group_is_refused_with_ebusy(backend, two_edus):
    first, second = two_edus
    with vfio.open_device(first, backend, vfio.SpaprTce) as device:
        with vfio.Group(sysfs.group_of(backend, second), backend) as group:
            with pytest.raises(errors.CallFailed, match="one group a container") as caught:
                device.group.container.attach(group)
            assert caught.value.errno == errno.EBUSY


@POWERNV
def test_v1_is_refused_for_two_groups_and_v2_then_accepted(backend, two_edus):
    with vfio.Container(backend) as container:
        groups = [vfio.Group(sysfs.group_of(backend, address), backend) for address in two_edus]
        for group in groups:
            container.attach(group)
        with pytest.raises(errors.CallFailed, match="one group a container") as caught:
            container.set_iommu(vfio.SpaprTce)
        assert caught.value.errno == errno.EBUSY
        assert container.choose_iommu().name == "sPAPR TCE v2"
        for group in groups:
            group.close()
