"""Type1 in the fake: what the conformance cases cannot reach on the lab's machine."""

import errno
from dataclasses import replace

import pytest

import vfio
from simtests.conformance.raw import Member, Program
from simtests.conformance.type1_calls import ALL, MAP_VADDR, NESTING, PAGE, TYPE1_V2, VADDR, available, unmap
from vfio import errors, topology
from vfio.drivers.edu import Edu
from vfio.fake.backend import FakeBackend
from vfio.fake.machine import Machine
from vfio.fake.process import Process
from vfio.fake.type1 import Type1
from vfio.iommu.dirty import DirtyPages

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


@pytest.fixture
def iommu(backend):
    with vfio.open_device(ADDRESS, backend) as device:
        yield device.iommu


@pytest.fixture
def buffers(backend):
    made = [vfio.DmaBuffer(4 * PAGE, backend=backend) for _ in range(2)]
    yield made
    for buffer in made:
        buffer.close()


# --- Mappings that are gone ---


@pytest.mark.parametrize("call", ["suspend_addresses", "unmap_dirty", "new_address"])
def test_mapping_that_is_closed_never_stands_for_the_next_one_at_its_iova(iommu, buffers, call):
    first, second = buffers
    closed = iommu.map(first, PAGE)
    closed.close()
    for following in range(2):  # with nothing there, and with another mapping
        if following:
            live = iommu.map(second, PAGE)
        with iommu.tracking(), pytest.raises(errors.Closed, match="mapping"):
            getattr(iommu, call)(*((closed, first) if call == "new_address" else (closed,)))
    assert iommu.mapped == [live]
    assert second.dma is live
    live.close()


def test_new_address_of_a_mapping_that_is_not_suspended_says_so(iommu, buffers):
    with iommu.map(buffers[0]) as dma:
        with pytest.raises(errors.CallFailed, match=r"the mapping is not suspended[^@]*suspend_addresses") as caught:
            iommu.new_address(dma, buffers[0])
        assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(("iova", "length"), [(0, 0), (-PAGE, PAGE), (0, 1 << 64 | PAGE), ((1 << 64) - PAGE, 2 * PAGE)])
@pytest.mark.parametrize("call", ["unmap_range", "dirty_pages"])
def test_what_is_no_range_raises_einval_before_any_call(iommu, call, iova, length):
    with pytest.raises(errors.CallFailed, match="at least one page, and is below") as caught:
        getattr(iommu, call)(iova, length)
    assert caught.value.errno == errno.EINVAL


# --- What devices reach ---


@pytest.mark.parametrize(("url", "read"), [("fake:x86", bytes(4)), ("fake:x86?freeze=0", b"data")])
def test_device_reads_what_it_may_only_write_where_qemu_is_imitated_alone(url, read):
    backend = booted(url)
    with vfio.DmaBuffer(2 * PAGE, backend=backend) as buffer, vfio.open_device(ADDRESS, backend) as device:
        edu = Edu(device)
        written = device.iommu.map(buffer, read=False)
        buffer[:4] = b"data"
        edu.load(written.iova, 4)
        edu.store(written.iova + PAGE, 4)
        assert buffer[PAGE : PAGE + 4] == read
    assert backend.leaks() == []


# --- Where there is room ---


def narrow(backend, *ranges):
    """From now on, this is what can be mapped."""
    machine = backend.machine
    machine.topology = replace(machine.topology, iommu=replace(machine.topology.iommu, ranges=ranges))


def test_allocation_follows_the_ranges_as_groups_come_and_go(backend, iommu, buffers):
    backend.write_text("/sys/bus/pci/devices/0000:00:05.0/driver_override", "vfio-pci\n")
    backend.write_text("/sys/bus/pci/drivers/vfio-pci/bind", "0000:00:05.0")
    wide = backend.machine.topology.iommu.ranges
    low = iommu.map(buffers[0], 0x10000)
    with vfio.Group(2, backend) as group:
        narrow(backend, (0x10000, 0x1FFFF))
        iommu.container.attach(group)
        with iommu.map(buffers[1]) as dma:
            assert dma.iova == 0x14000
        with pytest.raises(errors.CallFailed, match=r"in none of the ranges 0x10000\.\.0x1ffff"):
            iommu.map(buffers[1], PAGE)
        narrow(backend, *wide)
        iommu.container.detach(group)
    with iommu.map(buffers[1]) as dma:
        assert dma.iova == PAGE
    low.close()


def test_large_pages_are_mapped_at_multiples_of_themselves(iommu, backend):
    with vfio.DmaBuffer(4 << 20, 2 << 20, backend) as large, iommu.map(large) as dma:
        assert dma.iova == 2 << 20


def test_explicit_iova_costs_one_call(iommu, backend, buffers):
    before = backend.machine.hooks.calls["VFIO_IOMMU_GET_INFO"]
    iommu.map(buffers[0], PAGE).close()
    assert backend.machine.hooks.calls["VFIO_IOMMU_GET_INFO"] == before


# --- Groups that cannot come in, or bring less with them ---

OTHER, OTHER_GROUP = "0000:00:05.0", 2


def described(line, more):
    """A PC whose description has one more line behind `line`; both edus are on vfio-pci."""
    source = (topology._PACKAGED / "x86.toml").read_text()
    assert source.count(f"\n{line}\n") == 1
    machine = Machine(topology.parse(source.replace(f"\n{line}\n", f"\n{line}\n{more}\n")))
    backend = FakeBackend(machine, Process(machine))
    for address in (ADDRESS, OTHER):
        backend.write_text(f"/sys/bus/pci/devices/{address}/driver_override", "vfio-pci\n")
        backend.write_text("/sys/bus/pci/drivers/vfio-pci/bind", address)
    return backend


def with_firmware():
    return described(f'address = "{OTHER}"', "reserved = [{ start = 0x10000, end = 0x1ffff }]")


def test_group_takes_what_its_firmware_uses_from_the_container_and_gives_it_back():
    backend = with_firmware()
    first = "0x0000000000010000 0x000000000001ffff direct"
    regions = backend.read_text(f"/sys/kernel/iommu_groups/{OTHER_GROUP}/reserved_regions")
    assert regions.splitlines()[0] == first
    whole = ((0, 0xFEDFFFFF), (0xFEF00000, 0x7FFFFFFFFF))
    with vfio.open_device(ADDRESS, backend) as device, vfio.Group(OTHER_GROUP, backend) as group:
        assert device.iommu.info.ranges == whole
        device.iommu.container.attach(group)
        assert device.iommu.info.ranges == ((0, 0xFFFF), (0x20000, 0xFEDFFFFF), whole[1])
        with vfio.DmaBuffer(1 << 16, backend=backend) as buffer, device.iommu.map(buffer) as dma:
            assert dma.iova == 0x20000
        device.iommu.container.detach(group)
        assert device.iommu.info.ranges == whole
    assert backend.leaks() == []


def test_group_does_not_come_in_where_its_firmware_would_reach_what_is_mapped():
    backend = with_firmware()
    with vfio.DmaBuffer(PAGE, backend=backend) as buffer, vfio.open_device(ADDRESS, backend) as device:
        with device.iommu.map(buffer, 0x1F000), vfio.Group(OTHER_GROUP, backend) as group:
            with pytest.raises(errors.CallFailed, match="reserved for the group's devices") as caught:
                device.iommu.container.attach(group)
            assert caught.value.errno == errno.EINVAL
    assert backend.leaks() == []


def test_without_remapping_of_interrupts_there_is_no_iommu_to_be_had():
    backend = described("[iommu]", "remaps_interrupts = false")
    with pytest.raises(errors.VfioError, match="sending each other's interrupts") as caught:
        vfio.open_device(ADDRESS, backend)
    assert caught.value.errno == errno.EPERM
    assert backend.leaks() == []


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (errno.EBUSY, "memory of a mapping is about to move"),
        (errno.EINVAL, "reserved for the group's devices"),
        (errno.EPERM, "sending each other's interrupts"),
    ],
)
def test_group_that_the_iommu_refuses_is_told_why(backend, iommu, number, why):
    backend.write_text("/sys/bus/pci/devices/0000:00:05.0/driver_override", "vfio-pci\n")
    backend.write_text("/sys/bus/pci/drivers/vfio-pci/bind", "0000:00:05.0")
    backend.machine.hooks.fail("VFIO_GROUP_SET_CONTAINER", number)
    with vfio.Group(2, backend) as group, pytest.raises(errors.CallFailed, match=why) as caught:
        iommu.container.attach(group)
    assert caught.value.errno == number


# --- Dirty pages ---


def test_bits_beyond_the_range_are_no_pages():
    found = DirtyPages(0x10000, 10 * PAGE, PAGE, b"\xff" * 8)
    assert found.count == len(list(found.pages)) == 10
    found = DirtyPages(0x10000, 20 * PAGE, PAGE, bytes([1, 0, 0x88]) + bytes(5))
    assert list(found.pages) == [0x10000, 0x10000 + 19 * PAGE]
    assert found.count == 2


# --- Limits ---


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
