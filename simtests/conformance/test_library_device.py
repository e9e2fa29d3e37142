"""Regions and interrupts of a device."""

import errno
import os
import select

import pytest

import vfio
from vfio import errors


@pytest.mark.needs_edu
def test_regions_are_bar0_and_configuration_space(device):
    bar, config = device.regions()
    assert (bar.name, bar.size, bar.readable, bar.writable) == ("BAR0", 1 << 20, True, True)
    assert bar.mappable == [(0, 1 << 20)]
    assert (config.name, config.size, config.mappable) == ("CONFIG", 256, [])


def test_region_that_the_device_does_not_have_is_an_error(device):
    for index in (-1, device.info.num_regions):
        with pytest.raises(errors.NoSuchRegion) as caught:
            device.region(index)
        assert caught.value.errno == errno.EINVAL


@pytest.mark.needs_edu
def test_bar_that_is_not_implemented_has_size_0_and_refuses_access(device):
    bar = device.region(vfio.BAR1)
    assert bar.size == 0
    with pytest.raises(errors.OutsideRegion):
        bar.read32(0)


@pytest.mark.needs_edu
def test_configuration_space_reads_vendor_and_device(device):
    assert device.config.read16(0) == 0x1234
    assert device.config.read32(0) == 0x11E81234
    assert device.config.read(0, 4) == bytes.fromhex("3412e811")
    assert device.config.read8(2) == 0xE8


@pytest.mark.needs_edu
@pytest.mark.parametrize(("offset", "width"), [(1, 4), (2, 4), (1 << 20, 4), ((1 << 20) - 2, 4), (-4, 4), (0x84, 8)])
def test_register_outside_or_misaligned_is_refused(device, offset, width):
    with pytest.raises(errors.OutsideRegion) as caught:
        getattr(device.region(vfio.BAR0), f"read{width * 8}")(offset)
    assert caught.value.errno == errno.EINVAL


def test_registers_compute(edu_driver):
    assert edu_driver.invert(0x12345678) == 0xEDCBA987
    assert edu_driver.factorial(10) == 3628800


def test_mapped_and_unmapped_access_read_the_same(device, edu_driver):
    bar = edu_driver.bar
    edu_driver.invert(0x0F1E2D3C)
    through_file = int.from_bytes(device.backend.pread(device.fd, 4, bar.file_offset + 4), bar.byteorder)
    assert bar.read32(4) == through_file == 0xF0E1D2C3
    assert bar.read(4, 4) == through_file.to_bytes(4, bar.byteorder)


def test_doorbell_reaches_the_register(edu_driver):
    edu_driver.bar.doorbell32(4, 0xFFFF0000)
    assert edu_driver.bar.read32(4) == 0x0000FFFF


def test_block_write_reaches_each_register(edu_driver):
    edu_driver.bar.write(4, b"\0\0\0\0")
    assert edu_driver.bar.read(4, 4) == b"\xff\xff\xff\xff"


@pytest.mark.parametrize("kind", ["intx", "msi"])
def test_interrupt_of_the_device_arrives(device, edu_driver, kind):
    irq = getattr(device, kind)
    with irq.enable() as vector:
        for _ in range(3):
            edu_driver.interrupt()
            assert vector.wait(2) >= 1
            edu_driver.acknowledge()
            if kind == "intx":
                irq.unmask()
        with pytest.raises(errors.TimedOut) as caught:
            vector.wait(0.05)
        assert caught.value.errno == errno.ETIMEDOUT
    assert not irq.enabled


def test_intx_is_masked_by_the_kernel_until_unmasked(device, edu_driver):
    with device.intx.enable() as vector:
        edu_driver.interrupt()
        assert vector.wait(2) == 1
        assert vector.take() == 0  # the line is still up, and masked
        device.intx.unmask()
        assert vector.wait(2) == 1
        edu_driver.acknowledge()
        device.intx.unmask()
        assert vector.take() == 0


@pytest.mark.not_recorded("the device interrupts some time after the call that makes it do so")
def test_interrupt_says_when_a_transfer_is_done(device, edu_driver, backend):
    with device.iommu.map(vfio.DmaBuffer(1 << 16, backend=backend)) as dma, device.msi.enable() as vector:
        edu_driver.load(dma.iova, 16, interrupt=True)
        vector.wait(2)
        assert edu_driver.interrupt_status == edu_driver.DONE
        edu_driver.acknowledge()


def test_loopback_signals_the_eventfd(device):
    with device.msi.enable() as vectors:
        device.msi.trigger()
        assert select.select([vectors], [], [], 1)[0] == [vectors]
        assert os.eventfd_read(vectors.fileno()) == 1


def test_second_kind_of_interrupt_is_refused_while_one_is_enabled(device):
    with device.msi.enable():
        with pytest.raises(errors.NoInterrupt, match="disable MSI first") as caught:
            device.intx.enable()
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(errors.NoInterrupt) as caught:
            device.msi.enable()
        assert caught.value.errno == errno.EBUSY


@pytest.mark.needs_edu
def test_interrupt_that_the_device_does_not_have_is_refused(device):
    assert device.msix.count == 0
    for irq, count in ((device.msix, 1), (device.msi, 2), (device.msi, 0)):
        with pytest.raises(errors.NoInterrupt, match=r"were asked for") as caught:
            irq.enable(count)
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(errors.NoInterrupt, match="no such action") as caught:
        device.msi.mask()
    assert caught.value.errno == errno.ENOTTY


def test_failed_enable_leaves_no_descriptor_open(device):
    with device.msi.enable():
        before = sorted(os.listdir("/proc/self/fd"))
        with pytest.raises(errors.NoInterrupt):
            device.intx.enable()
        assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k")
def test_function_without_a_reset_of_its_own_refuses_reset(device):
    assert not device.can_reset
    with pytest.raises(errors.CallFailed, match="no function reset") as caught:
        device.reset()
    assert caught.value.errno == errno.EINVAL


@pytest.mark.lab_only
@pytest.mark.targets("powernv8")
def test_device_alone_on_its_bus_resets(backend, two_edus):
    with vfio.open_device(two_edus[1], backend) as device:
        assert device.can_reset
        device.reset()
        assert vfio.drivers.edu.Edu(device).invert(1) == 0xFFFFFFFE


def test_bus_master_is_off_when_a_device_is_opened(device):
    assert device.config.read16(4) & 4 == 0
    device.enable_bus_master()
    assert device.config.read16(4) & 4 == 4
    device.enable_bus_master(False)
    assert device.config.read16(4) & 4 == 0
