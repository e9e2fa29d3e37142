"""Type1 in the fake: what the conformance cases cannot reach on the lab's machine."""

import errno

import pytest

import vfio
from simtests.conformance.raw import Member, Program
from simtests.conformance.type1_calls import ALL, MAP_VADDR, NESTING, PAGE, TYPE1_V2, VADDR, available, unmap
from vfio import errors
from vfio.fake.type1 import Type1

ADDRESS, GROUP = "0000:00:04.0", 1


def booted(url="fake:x86"):
    backend = vfio.open_backend(url)
    backend.write_text(f"/sys/bus/pci/devices/{ADDRESS}/driver_override", "vfio-pci\n")
    backend.write_text("/sys/bus/pci/drivers/vfio-pci/bind", ADDRESS)
    return backend


@pytest.fixture
def backend():
    backend = booted()
    yield backend
    assert backend.leaks() == []


@pytest.fixture
def program(backend):
    program = Program(backend)
    yield program
    program.close_all()


def test_map_past_dma_entry_limit_raises_enospc(monkeypatch, program):
    monkeypatch.setattr(Type1, "entry_limit", 2)
    container, memory = program.attached(Member(ADDRESS, GROUP), TYPE1_V2), program.memory(PAGE)
    for n in range(2):
        assert container.map(memory.address, n * PAGE, PAGE) == 0
    assert available(container) == 0
    assert container.map(memory.address, 2 * PAGE, PAGE) == -errno.ENOSPC
    assert container.map(memory.address, PAGE, PAGE) == -errno.EEXIST
    assert unmap(container, 0, PAGE) == (0, PAGE)
    assert container.map(memory.address, 2 * PAGE, PAGE) == 0


def test_limit_of_mappings_is_told_with_the_parameter_that_raises_it(monkeypatch, backend):
    monkeypatch.setattr(Type1, "entry_limit", 0)
    with vfio.open_device(ADDRESS, backend) as device, vfio.DmaBuffer(PAGE, backend=backend) as buffer:
        with pytest.raises(errors.CallFailed, match="dma_entry_limit") as caught:
            device.iommu.map(buffer)
        assert caught.value.errno == errno.ENOSPC
        assert device.iommu.mapped == []


def test_locked_memory_limit_names_the_numbers():
    backend = booted()
    user = backend.another_process(uid=0, memlock=PAGE, ipc_lock=False)
    with vfio.open_device(ADDRESS, user) as device, vfio.DmaBuffer(4 * PAGE, backend=user) as buffer:
        with pytest.raises(errors.LockedMemoryLimit, match="it locks 16 KiB"):
            device.iommu.map(buffer)
    assert backend.leaks() == []


def test_who_gives_a_mapping_its_new_address_is_charged_for_it(backend, program):
    container, memory = program.attached(Member(ADDRESS, GROUP), TYPE1_V2), program.memory(2 * PAGE)
    assert container.map(memory.address, 0, 2 * PAGE) == 0
    assert unmap(container, 0, 0, ALL | VADDR) == (0, 2 * PAGE)
    poor, heir = (Program(backend.another_process(memlock=n * PAGE, ipc_lock=False)) for n in (1, 2))
    for other, expected in ((poor, -errno.ENOMEM), (heir, 0)):
        fd = other.take(other.backend.process.install(_shared(backend, container.fd)))
        there = type(container)(other, fd)
        assert there.map(memory.address, 0, 2 * PAGE, MAP_VADDR) == expected
    assert (program.locked, poor.locked, heir.locked) == (0, 0, 2 * PAGE)
    poor.close_all()
    heir.close_all()


def _shared(backend, fd):
    """The open file behind a descriptor, with a reference for another process."""
    file = backend.process.file(fd)
    file.get()
    return file


def test_linux_7_2_has_no_nesting():
    backend = booted("fake:x86?kernel=7.2")
    program = Program(backend)
    container, group = program.container(), program.group(Member(ADDRESS, GROUP))
    assert container.extension(NESTING) == 0
    assert group.set_container(container.fd) == 0
    assert container.set_iommu(NESTING) == -errno.ENODEV
    program.close_all()


def test_dma_outside_every_mapping_is_noted_and_freezes_nothing(backend):
    with vfio.open_device(ADDRESS, backend) as device:
        edu = vfio.drivers.edu.Edu(device)
        edu.load(0x5000, 16)
        pe = backend.machine.device(ADDRESS).pe
        assert [(fault.address, fault.length, fault.write) for fault in pe.dma_faults] == [(0x5000, 16, False)]
        assert pe.freeze == "none"


def test_groups_of_a_pc_have_no_name_and_tell_the_reserved_addresses(backend):
    directory = f"/sys/kernel/iommu_groups/{GROUP}"
    assert not backend.exists(f"{directory}/name")
    assert backend.read_text(f"{directory}/type") == "DMA\n"
    assert backend.read_text(f"{directory}/reserved_regions") == "0x00000000fee00000 0x00000000feefffff msi\n"


def test_description_and_what_is_held_name_the_mappings(program, backend):
    container, memory = program.attached(Member(ADDRESS, GROUP), TYPE1_V2), program.memory(PAGE)
    assert container.map(memory.address, 0x1000, PAGE, 1) == 0
    shown = backend.machine.vfio.describe()["containers"][0]
    assert (shown["iommu"], shown["available"], shown["tracking"]) == ("Type1v2", 65534, False)
    assert shown["mappings"] == [
        {"iova": 0x1000, "size": PAGE, "vaddr": memory.address, "access": "r", "invalid": False}
    ]
    assert any("IOVA 0x1000, 4096 bytes mapped" in line for line in backend.leaks())
