"""Resets through the library: what they reach, what they keep, and whom they refuse."""

import errno

import pytest

import vfio
import vfio.drivers.edu
from simtests.conformance.pci_calls import endpoint_address, on_vfio
from vfio import errors

pytestmark = pytest.mark.lab_only
BARE_METAL = pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k")
"""Machines whose devices are behind root ports, so that a bus can be reset."""


@pytest.fixture
def endpoint(backend, target):
    """A PCI Express device with a function reset; on bare metal it is alone on its bus."""
    with on_vfio(backend, endpoint_address(target)) as address, vfio.open_device(address, backend) as device:
        yield device


@BARE_METAL
def test_hot_reset_info_tells_every_device_of_the_slot_and_its_group(device):
    assert device.hot_reset_info() == [
        errors.Affected(device.address, device.group.number),
        errors.Affected(device.address[:-1] + "1", device.group.number),
    ]


@BARE_METAL
def test_hot_reset_info_of_a_device_alone_on_its_bus_tells_that_device(endpoint):
    assert endpoint.hot_reset_info() == [errors.Affected(endpoint.address, endpoint.group.number)]


@BARE_METAL
def test_hot_reset_keeps_configuration_space_and_interrupts(endpoint):
    endpoint.pci.command.bus_master = True
    before = endpoint.pci.raw()
    with endpoint.msix.enable() as vector:
        endpoint.hot_reset()
        endpoint.msix.trigger()
        assert vector.wait(2) == 1
    assert endpoint.pci.raw() == before


@BARE_METAL
def test_hot_reset_names_the_neighbour_that_is_not_on_vfio(device):
    with pytest.raises(errors.HotResetRefused, match="on no driver") as caught:
        device.hot_reset()
    neighbour = device.address[:-1] + "1"
    assert caught.value.errno == errno.EINVAL
    assert caught.value.not_on_vfio == (errors.Blocker(neighbour, ""),)
    assert caught.value.missing == ()
    assert caught.value.remedy == f"vfio bind {neighbour}"


@BARE_METAL
def test_hot_reset_names_the_group_that_has_to_be_held(backend, endpoint, two_edus):
    with vfio.open_device(two_edus[0], backend) as other:
        with pytest.raises(errors.HotResetRefused, match=f"group {endpoint.group.number} is not among") as caught:
            endpoint.hot_reset([other.group])
    assert caught.value.errno == errno.EINVAL
    assert caught.value.missing == (errors.Affected(endpoint.address, endpoint.group.number),)
    assert f"Group({endpoint.group.number})" in caught.value.remedy
    endpoint.hot_reset([endpoint.group])


@BARE_METAL
def test_hot_reset_reaches_a_device_that_cannot_be_reset_alone(backend, device):
    assert not device.can_reset
    with on_vfio(backend, device.address[:-1] + "1"):
        device.hot_reset()


@BARE_METAL
def test_hot_reset_with_more_groups_than_devices_says_so(endpoint):
    with pytest.raises(errors.CallFailed, match="more groups") as caught:
        endpoint.hot_reset([endpoint.group] * 2)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.targets("pseries", "pseries-64k", "q35")
def test_device_on_a_root_bus_cannot_be_hot_reset(endpoint):
    for call in (endpoint.hot_reset_info, endpoint.hot_reset):
        with pytest.raises(errors.CallFailed, match="on a root bus") as caught:
            call()
        assert caught.value.errno == errno.ENODEV
        assert "device.reset()" in caught.value.remedy


def test_reset_keeps_configuration_space_and_interrupts(endpoint):
    endpoint.pci.command.bus_master = True
    before = endpoint.pci.raw()
    with endpoint.msix.enable() as vector:
        endpoint.reset()
        endpoint.msix.trigger()
        assert vector.wait(2) == 1
    assert endpoint.pci.raw() == before


def test_reset_keeps_mapped_bars_and_dma_mappings(backend, endpoint):
    bar = endpoint.region(vfio.BAR0)
    with endpoint.iommu.map(vfio.DmaBuffer(1 << 16, backend=backend)):
        before = bar.read32(0)
        endpoint.reset()
        assert bar.read32(0) == before


@pytest.mark.targets("powernv8")
@pytest.mark.parametrize("way", ["reset", "hot_reset"])
def test_dma_goes_on_after_a_reset_of_the_bus(backend, two_edus, way):
    with vfio.open_device(two_edus[1], backend) as device:
        edu = vfio.drivers.edu.Edu(device)
        with device.iommu.map(vfio.DmaBuffer(1 << 16, backend=backend)) as dma:
            dma[0:5] = b"hello"
            getattr(device, way)()
            edu.load(dma.iova, 5)
            edu.store(dma.iova + 4096, 5)
            assert dma[4096:4101] == b"hello"
