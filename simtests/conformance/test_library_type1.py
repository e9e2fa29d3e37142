"""Type1 through the library."""

import errno
import inspect
import os

import pytest

import vfio
from vfio import errors, sysfs

pytestmark = pytest.mark.targets("q35")

MIB = 1 << 20
C_LINES = 34
"""Of the program in C, without those that are empty or comments."""


@pytest.fixture
def iommu(device):
    assert device.iommu.name == "Type1v2"
    return device.iommu


@pytest.fixture
def buffer(backend):
    made = vfio.DmaBuffer(MIB, backend=backend)
    yield made
    made.close()


def example(number, address, backend):
    """The C program of the kernel document's "VFIO Usage Example", call by call."""
    container = vfio.Container(backend)  # checks the API version
    if not container.check_extension(vfio.Type1.extension):
        raise SystemExit("no Type1")
    group = vfio.Group(number, backend)
    if not group.viable:
        raise SystemExit("not all of the group's devices are on VFIO")
    container.attach(group)
    iommu = container.set_iommu(vfio.Type1)
    print(iommu.info)
    buffer = vfio.DmaBuffer(1 << 20, backend=backend)  # 1 MiB
    iommu.map(buffer, 0)  # at IOVA 0, for reading and writing
    device = group.device(address)
    print(device.info)
    for region in device.regions():
        print(region.index, region.size, region.flags)
    for irq in device.irqs():
        print(irq.index, irq.count)
    if device.can_reset:
        device.reset()
    return container, group, device, buffer


def test_example_of_the_kernel_document_takes_fewer_lines_than_in_c(backend, bound_address, capsys):
    program = [line for line in inspect.getsource(example).splitlines() if line.strip()]
    assert len(program) <= C_LINES
    container, group, device, buffer = example(sysfs.group_of(backend, bound_address), bound_address, backend)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("Type1Info(page_sizes=(4096, 2097152, 1073741824)")
    assert len(said) == 2 + len(device.regions()) + len(device.irqs())
    assert buffer.iova == 0
    assert container.iommu.mapped[0].length == MIB
    for each in (device, group, container, buffer):
        each.close()


def test_info_has_page_sizes_ranges_and_what_is_left(iommu, target):
    info = iommu.info
    assert sum(info.page_sizes) == target.topology.iommu.page_sizes
    assert info.ranges == target.topology.iommu.ranges
    assert (info.available, info.dirty_page_sizes, info.largest_bitmap) == (65535, (4096,), 1 << 28)


@pytest.mark.needs_edu
def test_device_reads_and_writes_what_is_mapped(iommu, buffer, edu_driver):
    buffer[:64] = os.urandom(64)
    with iommu.map(buffer) as dma:
        assert dma.iova == 0x1000
        edu_driver.load(dma.iova, 64)
        edu_driver.store(dma.iova + MIB - 64, 64)
    assert buffer[-64:] == buffer[:64]


@pytest.mark.needs_edu
def test_new_address_of_a_mapping_leads_to_the_same_pages(iommu, backend, buffer, edu_driver):
    with iommu.map(buffer) as dma:
        assert iommu.suspend_addresses(dma) == MIB
        with pytest.raises(errors.CallFailed, match="suspended already") as caught:
            iommu.suspend_addresses()
        assert caught.value.errno == errno.EINVAL
        iommu.new_address(dma, buffer)
        with pytest.raises(errors.CallFailed):
            iommu.new_address(dma, buffer)
        buffer[:4] = b"same"
        edu_driver.load(dma.iova, 4)
        edu_driver.store(dma.iova + 4096, 4)
        assert buffer[4096:4100] == b"same"


def test_allocation_keeps_out_of_the_reserved_addresses(iommu, backend, buffer):
    """One mapping of all but a page of the first range leaves no room there for a MiB."""
    (_, hole), (after, _) = iommu.info.ranges
    with iommu.map(buffer, hole + 1 - MIB), iommu.map(vfio.MemoryRange(buffer.address, MIB), after):
        iommu._free.reserve(0, hole + 1 - MIB)
        with iommu.map(vfio.MemoryRange(buffer.address, MIB)) as dma:
            assert dma.iova == after + MIB


@pytest.mark.parametrize("place", ["in the hole", "across its start", "above the top"])
def test_iova_outside_the_ranges_names_them(iommu, buffer, place):
    (_, hole), (_, top) = iommu.info.ranges
    iova = {"in the hole": hole + 1, "across its start": hole + 1 - 4096, "above the top": top + 1}[place]
    with pytest.raises(errors.CallFailed, match=r"in none of the ranges 0x0\.\.0xfedfffff, 0xfef00000\.\.") as caught:
        iommu.map(buffer, iova)
    assert caught.value.errno == errno.EINVAL
    assert iommu.mapped == []
    assert buffer.dma is None


def test_overlap_raises_eexist(iommu, buffer):
    with iommu.map(buffer, MIB):
        for iova in (MIB, 2 * MIB - 4096, 4096):
            with pytest.raises(errors.AlreadyMapped) as caught:
                iommu.map(vfio.MemoryRange(buffer.address, MIB), iova)
            assert caught.value.errno == errno.EEXIST


def test_range_that_cuts_a_mapping_is_not_unmapped(iommu, buffer):
    with iommu.map(buffer, MIB) as dma:
        with pytest.raises(errors.CallFailed, match="cuts a mapping") as caught:
            iommu.unmap_range(MIB, 4096)
        assert caught.value.errno == errno.EINVAL
        assert dma.mapped
        assert iommu.unmap_range(0, 4 * MIB) == MIB
        assert not dma.mapped
        assert iommu.unmap_range(0, 4 * MIB) == 0


def test_version_1_unmaps_a_mapping_by_its_first_byte(backend, bound_address, buffer):
    with vfio.open_device(bound_address, backend, vfio.Type1) as device:
        dma = device.iommu.map(buffer, MIB)
        assert device.iommu.unmap_range(MIB + 4096, MIB) == 0
        assert dma.mapped
        assert device.iommu.unmap_range(0, MIB + 4096) == MIB
        assert not dma.mapped
        with pytest.raises(errors.CallFailed, match="version 1 does not track") as caught:
            device.iommu.start_tracking()
        assert caught.value.errno == errno.EACCES


def test_unmap_all_forgets_every_mapping_and_frees_its_iova(iommu, buffer):
    first, second = (iommu.map(vfio.MemoryRange(buffer.address, MIB)) for _ in range(2))
    assert iommu.unmap_all() == 2 * MIB
    assert not first.mapped
    assert not second.mapped
    with iommu.map(buffer) as dma:
        assert dma.iova == 0x1000


def test_closing_twice_is_harmless_and_gives_locked_memory_back(iommu, backend, buffer):
    before = backend.locked().locked
    dma = iommu.map(buffer)
    assert backend.locked().locked == before + MIB
    dma.close()
    dma.close()
    assert backend.locked().locked == before


def test_memory_that_is_gone_raises_efault_and_takes_no_iova(iommu, backend):
    with vfio.DmaBuffer(MIB, backend=backend) as gone:
        address = gone.address
    with pytest.raises(errors.CallFailed, match="not there") as caught:
        iommu.map(vfio.MemoryRange(address, MIB), 0)
    assert caught.value.errno == errno.EFAULT
    with vfio.DmaBuffer(MIB, backend=backend) as buffer, iommu.map(buffer, 0):
        pass


def test_dirty_pages_are_those_that_are_mapped(iommu, buffer):
    with iommu.map(buffer, MIB) as dma:
        with pytest.raises(errors.CallFailed, match="nothing is tracked") as caught:
            iommu.dirty_pages(0, 4 * MIB)
        assert caught.value.errno == errno.EINVAL
        with iommu.tracking():
            dirty = iommu.dirty_pages(0, 4 * MIB)
            assert (dirty.count, min(dirty.pages), max(dirty.pages)) == (256, MIB, 2 * MIB - 4096)
            assert MIB + 5 in dirty
            assert MIB - 1 not in dirty
            with pytest.raises(errors.CallFailed, match="cuts a mapping"):
                iommu.dirty_pages(MIB, 4096)
            assert iommu.unmap_dirty(dma).count == 256
        assert not dma.mapped


def test_two_groups_share_the_mappings_and_one_can_leave(backend, two_edus, buffer):
    first, second = two_edus
    with vfio.open_device(first, backend) as device:
        with vfio.Group(sysfs.group_of(backend, second), backend) as group:
            container = device.group.container
            container.attach(group)
            with device.iommu.map(buffer) as dma:
                container.detach(group)
                assert dma.mapped
