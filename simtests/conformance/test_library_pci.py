"""Configuration space, decoded: of an open device, and of any device through sysfs."""

import errno

import pytest

import vfio
from simtests.conformance.pci_calls import endpoint_address, on_vfio, outcome
from vfio import errors, pci, sysfs

BARE_METAL = pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k")


@pytest.fixture
def endpoint(backend, target):
    """A PCI Express device with MSI-X."""
    with on_vfio(backend, endpoint_address(target)) as address, vfio.open_device(address, backend) as device:
        yield device


@pytest.mark.needs_edu
def test_edu_has_a_header_and_one_capability(device):
    config = device.pci
    assert (config.vendor, config.device, config.class_code) == (0x1234, 0x11E8, 0x00FF00)
    assert config.interrupt_pin.pin == 1
    assert [(each.name, each.offset) for each in config.capabilities] == [("MSI", 0x40)]
    msi = config[pci.Msi]
    assert (msi.vectors, msi.control.bits64, msi.control.enable) == (1, True, False)
    with pytest.raises(errors.NoCapability, match="there are MSI") as caught:
        config[pci.Msix]
    assert caught.value.errno == errno.ENOENT


def test_field_that_is_set_is_set_in_the_device(device):
    assert not device.pci.command.bus_master
    device.pci.command.bus_master = True
    assert device.config.read16(4) & 4
    before = device.pci.command.value
    device.pci.command.intx_disable = True
    assert device.config.read16(4) == before | 0x400
    device.pci.command.value = before
    device.pci.interrupt_line = 0x2A
    assert device.pci.interrupt_line == 0x2A


def test_snapshot_stays_as_it_was(device):
    before = device.pci.snapshot()
    device.pci.command.bus_master = True
    assert not before.command.bus_master
    assert device.pci.snapshot().command.bus_master


@pytest.mark.lab_only
def test_express_device_decodes_without_a_fault(endpoint, target):
    config = endpoint.pci
    assert config.faults == []
    assert config.size == pci.EXPRESS_SIZE
    msix = config[pci.Msix]
    assert msix.vectors == endpoint.msix.count
    assert endpoint.region(msix.table_location.bar).size >= msix.table_location.offset + 16 * msix.vectors
    assert config[pci.Express].flags.type == (9 if target.platform == "PC" else 0)  # 9: on the root bus itself
    assert config[pci.PowerManagement].control.state == 0
    assert config[pci.PowerManagement].capabilities.pme_d3hot is False  # PME is the host's business
    assert config.as_dict() == config.snapshot().as_dict()
    assert str(config) == str(config.snapshot())


@pytest.mark.lab_only
@pytest.mark.targets("pseries", "pseries-64k", "q35")
def test_network_card_reports_errors(endpoint):
    errors_of_it = endpoint.pci[pci.AdvancedErrors]
    assert errors_of_it.uncorrectable_status.value == 0
    errors_of_it.correctable_mask.replay_timeout = True
    assert errors_of_it.correctable_mask.replay_timeout
    assert errors_of_it.uncorrectable_severity.malformed_packet
    assert endpoint.pci[pci.SerialNumber].serial >> 40 == 0x525400


@pytest.mark.lab_only
@pytest.mark.targets("pseries", "pseries-64k", "q35")
def test_power_state_is_set_and_taken_back_by_name(endpoint):
    control = endpoint.pci[pci.PowerManagement].control
    control.state = 3
    assert control.state == 3
    assert outcome(endpoint.backend.pread, endpoint.fd, 4, endpoint.region(vfio.BAR0).file_offset) == "EIO"
    control.state = 0
    assert control.state == 0


# --- Through sysfs ---


def test_sysfs_shows_every_device_of_the_host_without_a_fault(backend):
    for device in sysfs.devices(backend):
        config = pci.of(backend, device.address)
        assert (config.vendor, config.device) == (device.vendor, device.device)
        assert isinstance(config.header, pci.BridgeHeader) == device.is_bridge
        assert config.size in (pci.STANDARD_SIZE, pci.EXPRESS_SIZE)
        assert config.faults == []


def test_sysfs_of_who_is_not_root_ends_behind_the_header(another_process, bound_address):
    other = another_process(uid=65534)
    config = pci.of(other, bound_address)
    assert config.size == pci.HEADER_SIZE
    assert config.cut
    assert (config.capabilities, config.faults) == ([], [])


def test_sysfs_of_a_device_that_is_not_there_says_so(backend):
    with pytest.raises(errors.NoSuchDevice) as caught:
        pci.of(backend, "abcd:00:00.0")
    assert caught.value.errno == errno.ENODEV


@pytest.mark.lab_only
@BARE_METAL
def test_root_port_shows_slot_root_and_errors(backend, target):
    port = next(phb.root_port for phb in target.topology.phbs if phb.root_port)
    config = pci.of(backend, port.address)
    assert isinstance(config.header, pci.BridgeHeader)
    assert (config.header.primary_bus, config.header.secondary_bus) == (0, 1)
    express = config[pci.Express]
    assert (express.flags.type, express.flags.slot, express.slot_status.present) == (4, True, True)
    assert express.device_control.report_fatal
    assert config[pci.AdvancedErrors].uncorrectable_severity.malformed_packet


def test_host_and_user_see_the_same_identity(backend, device):
    host, user = pci.of(backend, device.address), device.pci
    assert host.raw()[:4] == user.raw()[:4]
    assert host.size == user.size
    assert user.class_code == host.class_code
