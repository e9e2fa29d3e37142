"""Viability: which drivers of its devices keep a group from its user, and how a user keeps drivers out.

Source: drivers/iommu/iommu.c (iommu_group_claim_dma_owner, iommu_device_use_default_domain) and drivers/vfio/group.c of
Linux 6.12.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest

from simtests.conformance.fixtures import PC
from simtests.conformance.pci_calls import PROBE, VFIO_PCI, on_vfio, outcome
from simtests.conformance.raw import Member, answer
from vfio import sysfs, uapi
from vfio.backend import Backend

pytestmark = pytest.mark.lab_only  # takes devices from the host
BARE_METAL = pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k", "siblings", "siblings-64k")
"""Machines whose first group has an edu, and behind it a function that no driver wants."""
SIBLINGS = pytest.mark.targets("siblings", "siblings-64k")
"""Machines whose first group also has a disk, and a bridge."""
VIABLE, CONTAINER_SET = uapi.VFIO_GROUP_FLAGS_VIABLE, uapi.VFIO_GROUP_FLAGS_CONTAINER_SET
NVME = "/sys/bus/pci/drivers/nvme"


@pytest.fixture
def neighbour(program, backend, member) -> Iterator[str]:
    """Another function of the group, on no driver; on none again, and without an override, afterwards."""
    address = member.address[:-1] + "1"
    assert sysfs.driver_of(backend, address) is None
    yield address
    program.close_all()
    if sysfs.driver_of(backend, address):
        backend.write_text(f"{sysfs.path(address, 'driver')}/unbind", address)
    backend.write_text(sysfs.path(address, "driver_override"), "\n")


@pytest.fixture
def disk(target, member) -> str:
    """A disk in the group."""
    return next(each.address for each in target.topology.groups()[member.group] if each.model == "nvme")


@pytest.fixture
def bridge(target, member) -> str:
    """A bridge in the group."""
    return next(each.address for each in target.topology.groups()[member.group] if each.device_class >> 16 == 0x06)


def give(backend: Backend, address: str, driver: str) -> None:
    backend.write_text(sysfs.path(address, "driver_override"), f"{driver}\n")
    backend.write_text(PROBE, address)
    assert sysfs.driver_of(backend, address) == driver


# --- drivers that do no harm ---


@BARE_METAL
def test_sibling_without_a_driver_does_no_harm(program, member, neighbour):
    group = program.group(member)
    assert group.status() == VIABLE
    assert group.set_container(program.container().fd) == 0
    assert group.device(neighbour) == -errno.ENODEV


@BARE_METAL
def test_sibling_on_a_driver_that_leaves_dma_alone_does_no_harm(
    program, member, neighbour, load_driver: Callable[[str], None]
):
    load_driver("pci-stub")
    give(program.backend, neighbour, "pci-stub")
    group = program.group(member)
    assert group.status() == VIABLE
    assert group.device(neighbour) == -errno.ENODEV
    assert group.set_container(program.container().fd) == 0
    assert group.status() == VIABLE | CONTAINER_SET
    assert group.device(neighbour) == -errno.ENODEV


@BARE_METAL
def test_function_joins_vfio_while_its_group_is_in_use_which_gives_a_descriptor_of_each(program, member, neighbour):
    container = program.attached(member)
    give(program.backend, neighbour, "vfio-pci")
    first, second = container.group.device(member.address), container.group.device(neighbour)
    identity = 7 << 40
    for fd, address in ((first, member.address), (second, neighbour)):
        vendor = int(program.backend.read_text(sysfs.path(address, "vendor")), 16)
        assert program.backend.pread(fd, 2, identity) == vendor.to_bytes(2, "little")
    program.close(first)
    assert container.group.unset_container() == -errno.EBUSY
    program.close(second)
    assert container.group.unset_container() == 0
    assert container.group.status() == VIABLE


@BARE_METAL
def test_group_goes_on_without_a_function_that_leaves_vfio(program, member, neighbour):
    give(program.backend, neighbour, "vfio-pci")
    container = program.attached(member)
    program.backend.write_text(f"{VFIO_PCI}/unbind", neighbour)
    assert program.backend.exists(member.node)
    assert container.group.status() == VIABLE | CONTAINER_SET
    assert container.group.device(neighbour) == -errno.ENODEV
    assert container.group.device(member.address) >= 0


# --- a driver that does DMA for the host ---


@SIBLINGS
def test_sibling_on_a_driver_of_the_host_makes_the_group_not_viable(
    program, member, disk, load_driver: Callable[[str], None]
):
    load_driver("nvme")
    assert sysfs.driver_of(program.backend, disk) == "nvme"
    group, container = program.group(member), program.container()
    assert group.status() == 0
    for _ in range(2):
        assert group.set_container(container.fd) == -errno.EPERM
        assert container.set_iommu(program.native) == -errno.EINVAL
    assert group.set_container(group.fd) == -errno.EBADFD  # what it is comes first
    assert group.unset_container() == -errno.EINVAL
    assert group.device(member.address) == -errno.EINVAL
    assert group.device(disk) == -errno.ENODEV
    program.backend.write_text(f"{NVME}/unbind", disk)
    assert group.status() == VIABLE
    assert group.set_container(container.fd) == 0
    assert container.set_iommu(program.native) == 0


@SIBLINGS
def test_open_group_keeps_no_driver_out_and_one_in_a_container_does(
    program, member, disk, load_driver: Callable[[str], None]
):
    load_driver("nvme")
    backend = program.backend
    group, container = program.group(member), program.container()
    backend.write_text(f"{NVME}/unbind", disk)
    assert outcome(backend.write_text, f"{NVME}/bind", disk) is None
    assert group.status() == 0
    backend.write_text(f"{NVME}/unbind", disk)
    assert group.set_container(container.fd) == 0  # no IOMMU is set
    assert outcome(backend.write_text, f"{NVME}/bind", disk) == "EBUSY"
    assert outcome(backend.write_text, PROBE, disk) == "EINVAL"
    assert group.unset_container() == 0
    assert outcome(backend.write_text, f"{NVME}/bind", disk) is None


@SIBLINGS
def test_group_whose_container_failed_is_given_back_to_the_host(
    program, member, second, disk, load_driver: Callable[[str], None]
):
    """SET_CONTAINER to a container that takes no second group claims the DMA, and gives it back."""
    load_driver("nvme")
    backend = program.backend
    backend.write_text(f"{NVME}/unbind", disk)
    v1 = program.attached(second, uapi.VFIO_SPAPR_TCE_IOMMU)
    group = program.group(member)
    assert group.set_container(v1.fd) == -errno.EBUSY
    assert group.status() == VIABLE
    assert outcome(backend.write_text, f"{NVME}/bind", disk) is None


@SIBLINGS
def test_device_that_a_driver_has_from_the_boot_on_can_be_had_for_vfio_and_given_back(program, target):
    found = next(each for each in target.topology.devices if each.driver)
    backend, address, number = program.backend, found.address, found.group
    assert not backend.exists(sysfs.node(number))
    backend.write_text(sysfs.path(address, "driver_override"), "vfio-pci\n")
    backend.write_text(f"{sysfs.path(address, 'driver')}/unbind", address)
    try:
        backend.write_text(PROBE, address)
        container = program.attached(Member(address, number))
        assert container.group.device(address) >= 0
    finally:
        program.close_all()
        backend.write_text(f"{sysfs.path(address, 'driver')}/unbind", address)
        backend.write_text(sysfs.path(address, "driver_override"), "\n")
        backend.write_text(PROBE, address)
    assert sysfs.driver_of(backend, address) == found.driver


# --- a bridge ---


@SIBLINGS
def test_bridge_in_the_group_does_no_harm_and_is_not_given_away(program, member, bridge):
    backend = program.backend
    assert sysfs.group_of(backend, bridge) == member.group
    container = program.attached(member)
    assert container.group.status() == VIABLE | CONTAINER_SET
    assert container.group.device(bridge) == -errno.ENODEV


@SIBLINGS
def test_bridge_is_not_for_vfio_pci(backend, bridge):
    backend.write_text(sysfs.path(bridge, "driver_override"), "vfio-pci\n")
    try:
        waits = backend.read_text(sysfs.path(bridge, "waiting_for_supplier")) == "1\n"
        assert outcome(backend.write_text, f"{VFIO_PCI}/bind", bridge) == ("EAGAIN" if waits else "EINVAL")
        assert answer(backend.write_text, PROBE, bridge) == (-errno.EINVAL if waits else None)
        assert sysfs.driver_of(backend, bridge) is None
    finally:
        backend.write_text(sysfs.path(bridge, "driver_override"), "\n")


@SIBLINGS
def test_siblings_can_be_open_in_one_container_and_by_one_process_only(program, other_program, member, disk):
    with on_vfio(program.backend, disk):
        container = program.attached(member)
        assert container.group.device(disk) >= 0
        assert other_program().open(member.node) == -errno.EBUSY
        program.close_all()


# --- the group of a PC's chipset ---

ISA_BRIDGE, AHCI, SMBUS = (f"0000:00:1f.{function}" for function in (0, 2, 3))


@pytest.fixture
def controller(program, backend) -> Iterator[Member]:
    """The SATA controller of the chipset, on vfio-pci; its group has the ISA bridge and the SMBus as well."""
    with on_vfio(backend, AHCI):
        yield Member(AHCI, sysfs.group_of(backend, AHCI))
        program.close_all()


@PC
def test_function_of_the_chipset_is_a_device_like_any_other(program, controller):
    backend, container = program.backend, program.attached(controller)
    assert container.group.status() == VIABLE | CONTAINER_SET
    for address in (ISA_BRIDGE, SMBUS):
        assert container.group.device(address) == -errno.ENODEV
    device = container.group.device(AHCI)
    sizes, counts = [], []
    for index in range(9):
        region = uapi.vfio_region_info(index=index)
        sizes.append(
            (answer(backend.ioctl, device, uapi.VFIO_DEVICE_GET_REGION_INFO, uapi.buffer(region)), region.size)
        )
    assert sizes == [(0, 0)] * 4 + [(0, 0x20), (0, 0x1000), (0, 0), (0, 256), (-errno.EINVAL, 0)]
    for index in range(5):
        irq = uapi.vfio_irq_info(index=index)
        counts.append((answer(backend.ioctl, device, uapi.VFIO_DEVICE_GET_IRQ_INFO, uapi.buffer(irq)), irq.count))
    assert counts == [(0, 1), (0, 1), (0, 0), (-errno.EINVAL, 0), (0, 1)]
    assert backend.pread(device, 12, 7 << 40).hex() == "868022290301100002010601"
    assert backend.pread(device, 1, (7 << 40) + 0x34) == b"\x80"
    assert [backend.pread(device, 2, (7 << 40) + at).hex() for at in (0x80, 0xA8)] == ["05a8", "1200"]


@PC
def test_sibling_in_the_chipset_does_no_harm_on_pci_stub_and_joins_on_vfio(
    program, controller, load_driver: Callable[[str], None]
):
    load_driver("pci-stub")
    backend = program.backend
    give(backend, SMBUS, "pci-stub")
    try:
        container = program.attached(controller)
        assert container.group.status() == VIABLE | CONTAINER_SET
        assert container.group.device(SMBUS) == -errno.ENODEV
        backend.write_text("/sys/bus/pci/drivers/pci-stub/unbind", SMBUS)
        give(backend, SMBUS, "vfio-pci")
        assert container.group.device(SMBUS) >= 0
        program.close_all()
    finally:
        backend.write_text(f"{sysfs.path(SMBUS, 'driver')}/unbind", SMBUS)
        backend.write_text(sysfs.path(SMBUS, "driver_override"), "\n")


@PC
def test_isa_bridge_and_host_bridge_can_be_had(program, backend):
    for address, kind in ((ISA_BRIDGE, "000106"), ("0000:00:00.0", "000006")):
        with on_vfio(backend, address):
            container = program.attached(Member(address, sysfs.group_of(backend, address)))
            device = container.group.device(address)
            assert backend.pread(device, 3, (7 << 40) + 9).hex() == kind
            assert backend.pread(device, 2, (7 << 40) + 0x3C) == bytes(2)  # no interrupt
            program.close_all()


@PC
@pytest.mark.spoils  # the driver has set its device up
def test_network_driver_of_the_host_keeps_its_group_and_gives_it_back(
    program, target, load_driver: Callable[[str], None]
):
    backend = program.backend
    card = next(each for each in target.topology.devices if each.model == "e1000e")
    driver, type_path = sysfs.path(card.address, "driver"), sysfs.path(card.address, "iommu_group", "type")
    with on_vfio(backend, card.address):
        container = program.attached(Member(card.address, card.group))
        load_driver("e1000e")
        assert outcome(backend.write_text, "/sys/bus/pci/drivers/e1000e/bind", card.address) == "ENODEV"  # the override
        program.close_all()
    backend.write_text(PROBE, card.address)
    assert sysfs.driver_of(backend, card.address) == "e1000e"
    assert not backend.exists(f"/dev/vfio/{card.group}")
    assert outcome(backend.write_text, f"{VFIO_PCI}/bind", card.address) == "ENODEV"
    for text, error in (("auto", "EPERM"), ("DMA", "EPERM"), ("identity", "EPERM"), ("x", "EINVAL")):
        assert outcome(backend.write_text, type_path, text) == error
    backend.write_text(sysfs.path(card.address, "driver_override"), "vfio-pci")
    assert outcome(backend.write_text, f"{VFIO_PCI}/bind", card.address) == "EBUSY"
    backend.write_text(f"{driver}/unbind", card.address)
    backend.write_text(PROBE, card.address)
    container = program.attached(Member(card.address, card.group))
    assert container.group.device(card.address) >= 0
    program.close_all()
    backend.write_text(f"{driver}/unbind", card.address)
    backend.write_text(sysfs.path(card.address, "driver_override"), "\n")
