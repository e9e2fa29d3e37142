"""sPAPR TCE v2: registration, windows, mapping, and what the library refuses to ask for."""

import errno
import threading
from contextlib import ExitStack, contextmanager

import pytest

import vfio
from vfio import errors, sysfs
from vfio.drivers.edu import Edu

pytestmark = pytest.mark.power

POWERNV = pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k")


@pytest.fixture
def iommu(device):
    return device.iommu


@pytest.fixture
def buffer(backend):
    """1 MiB that is closed even when a test leaves it mapped."""
    return vfio.DmaBuffer(1 << 20, backend=backend)


@contextmanager
def mapped_pair(iommu):
    backend = iommu.container.backend
    """Two buffers, mapped."""
    with (
        iommu.map(vfio.DmaBuffer(1 << 16, backend=backend)) as source,
        iommu.map(vfio.DmaBuffer(1 << 16, backend=backend)) as sink,
    ):
        yield source, sink


def moves_data(driver, source, sink):
    pattern = bytes(range(251)) * 8
    source[: len(pattern)] = pattern
    sink[: len(pattern)] = bytes(len(pattern))
    driver.load(source.iova, len(pattern))
    driver.store(sink.iova, len(pattern))
    return sink[: len(pattern)] == pattern


@pytest.mark.lab_only
def test_v2_is_chosen_and_tells_the_figures_of_the_platform(iommu, target):
    assert iommu.name == "sPAPR TCE v2"
    facts = target.topology.iommu
    assert iommu.info.window_start == facts.default_window.start
    assert iommu.info.window_size == facts.default_window.size
    assert sum(iommu.info.page_sizes) == facts.page_sizes
    assert iommu.info.max_windows == facts.windows
    assert iommu.info.levels == facts.levels


def test_register_charges_the_memory_and_closing_gives_it_back(iommu, buffer, backend):
    with iommu.register(buffer) as registration:
        assert registration.length == 1 << 20
        assert backend.locked().locked == 1 << 20
    assert backend.locked().locked == 0


def test_memory_is_registered_once(iommu, buffer):
    with iommu.register(buffer):
        with pytest.raises(errors.CallFailed) as caught:
            iommu.register(buffer)
        assert caught.value.errno == errno.EBUSY
        with pytest.raises(errors.CallFailed, match="overlaps") as caught:
            iommu.register(vfio.MemoryRange(buffer.address, buffer.length // 2))
        assert caught.value.errno == errno.EINVAL


def test_register_of_a_misaligned_range_is_refused(iommu, buffer):
    with pytest.raises(errors.Misaligned) as caught:
        iommu.register(vfio.MemoryRange(buffer.address + 512, 4096))
    assert caught.value.errno == errno.EINVAL


def test_register_of_memory_that_is_not_there_raises_efault(iommu, backend, area):
    around = area(6)
    around.hole(1, 4)  # too small for anything else of the process to come there
    with pytest.raises(errors.CallFailed) as caught:
        iommu.register(vfio.MemoryRange(around.address + backend.page_size, 4 * backend.page_size))
    assert caught.value.errno == errno.EFAULT
    assert backend.locked().locked == 0


def test_mapped_memory_is_not_unregistered(iommu, buffer):
    registration = iommu.register(buffer)
    with iommu.map(buffer):
        assert registration.mapped == 1
        with pytest.raises(errors.StillMapped) as caught:
            registration.close()
        assert caught.value.errno == errno.EBUSY
        with pytest.raises(errors.StillMapped):
            buffer.close()
    registration.close()
    buffer.close()


def test_window_map_of_memory_that_is_not_registered_raises_einval(iommu, buffer):
    with pytest.raises(errors.NotRegistered, match=r"iommu\.register") as caught:
        iommu.windows[0].map(buffer)
    assert caught.value.errno == errno.EINVAL


def test_map_registers_what_is_not_and_unmap_undoes_both(iommu, buffer, backend):
    table = 8192 * 1024 if iommu.info.levels > 1 else 2048 * 1024
    with iommu.map(buffer) as dma:
        assert dma.iova == buffer.iova > 0
        assert backend.locked().locked == (1 << 20) + table
    assert backend.locked().locked == table


def test_map_outside_every_window_raises_enxio_and_lists_them(iommu, buffer):
    with pytest.raises(errors.OutsideWindow, match="default window 0x0") as caught:
        iommu.map(buffer, 1 << 50)
    assert caught.value.errno == errno.ENXIO


def test_map_past_the_end_of_a_window_is_refused_before_the_call(iommu, buffer):
    window = iommu.windows[0]
    with iommu.register(buffer), pytest.raises(errors.OutsideWindow) as caught:
        window.map(buffer, window.end - buffer.length // 2)
    assert caught.value.errno == errno.ENXIO
    assert window.mapped == []


def test_misaligned_iova_is_refused_where_the_kernel_would_answer_1(iommu, buffer):
    with pytest.raises(errors.Misaligned) as caught:
        iommu.map(buffer, 0x100800)
    assert caught.value.errno == errno.EINVAL


def test_kernel_answers_1_for_a_misaligned_iova(iommu, buffer, backend):
    with iommu.register(buffer):
        argument = vfio.uapi.vfio_iommu_type1_dma_map(flags=3, vaddr=buffer.address, iova=0x100800, size=4096)
        fd = iommu.container.fd
        assert backend.ioctl(fd, vfio.uapi.VFIO_IOMMU_MAP_DMA, vfio.uapi.buffer(argument)) == 1


def test_overlapping_map_is_refused_where_the_kernel_would_replace(iommu, buffer):
    with iommu.register(buffer), iommu.windows[0].map(buffer, 0x100000) as first:
        with pytest.raises(errors.AlreadyMapped) as caught:
            iommu.windows[0].map(buffer, 0x180000)
        assert caught.value.errno == errno.EEXIST
        assert iommu.windows[0].mapped == [first]


def test_map_at_iova_0_works_when_asked_for_by_name(iommu, buffer, edu_driver, backend):
    with iommu.map(buffer, 0), iommu.map(vfio.DmaBuffer(1 << 16, backend=backend)) as sink:
        assert buffer.iova == 0
        assert moves_data(edu_driver, buffer, sink)


def test_data_moves_through_the_default_window(iommu, buffer, edu_driver, backend):
    with iommu.map(buffer), iommu.map(vfio.DmaBuffer(1 << 16, backend=backend)) as sink:
        assert moves_data(edu_driver, buffer, sink)


def test_data_moves_through_a_second_window_with_each_page_size_the_memory_has(iommu, edu_driver, backend, target):
    for page in [page for page in iommu.info.page_sizes if page <= backend.page_size]:
        with iommu.create_window(1 << 30, page) as window:
            assert window.start == target.topology.iommu.second_window_start
            source, sink = (vfio.DmaBuffer(1 << 20, backend=backend) for _ in range(2))
            with iommu.map(source, window.start + 0x100000), iommu.map(sink, window.start + 0x200000):
                assert moves_data(edu_driver, source, sink)
    assert len(iommu.windows) == 1


@pytest.mark.targets("powernv8-64k")
def test_data_moves_through_a_window_of_16_mib_pages(iommu, edu_driver, backend):
    page = 16 << 20
    with vfio.DmaBuffer(page, page_size=page, backend=backend) as source, iommu.create_window(1 << 30, page) as window:
        with (
            iommu.map(source, window.start + page),
            iommu.map(vfio.DmaBuffer(1 << 16, backend=backend), 1 << 20) as sink,
        ):
            assert moves_data(edu_driver, source, sink)


def test_window_with_pages_larger_than_the_memorys_is_refused(iommu, buffer, backend):
    page = next(page for page in iommu.info.page_sizes if page > backend.page_size)
    with iommu.create_window(16 * page, page) as window, iommu.register(buffer):
        expected = (
            errors.PageTooLarge if buffer.length % page == 0 and buffer.address % page == 0 else errors.Misaligned
        )
        with pytest.raises(expected) as caught:
            window.map(buffer)
        assert caught.value.errno == errno.EINVAL


@POWERNV
def test_data_moves_through_a_table_of_two_levels(iommu, edu_driver, backend):
    with iommu.create_window(1 << 36, backend.page_size, levels=2) as window:
        assert window.levels == 2
        source, sink = (vfio.DmaBuffer(1 << 16, backend=backend) for _ in range(2))
        with iommu.map(source, window.start + (1 << 35)), iommu.map(sink, window.end - (1 << 16)):
            assert moves_data(edu_driver, source, sink)


@POWERNV
@pytest.mark.parametrize(
    ("size", "page", "levels"), [(1 << 31, 4096, 1), (1 << 30, 65536, 1), (1 << 34, 4096, 2), (1 << 36, 4096, 3)]
)
def test_charge_of_a_window_is_the_one_computed(iommu, backend, size, page, levels):
    before = backend.locked().locked
    default = iommu.default_window
    default.close()
    with iommu.create_window(size, page, levels) as window:
        assert backend.locked().locked - before == iommu._charge(window)
    assert backend.locked().locked == before


def test_third_window_raises_enospc(iommu):
    with iommu.create_window(1 << 30, 4096), pytest.raises(errors.NoFreeWindow) as caught:
        iommu.create_window(1 << 30, 4096)
    assert caught.value.errno == errno.ENOSPC


@POWERNV
def test_window_after_the_default_one_was_removed_begins_at_0(iommu, buffer, edu_driver, backend):
    iommu.default_window.close()
    assert iommu.default_window is None
    with iommu.create_window(1 << 30, backend.page_size) as window:
        assert window.start == 0
        with iommu.map(buffer), iommu.map(vfio.DmaBuffer(1 << 16, backend=backend)) as sink:
            assert moves_data(edu_driver, buffer, sink)


def test_geometry_that_the_kernel_would_charge_and_then_refuse_is_not_tried(iommu, backend):
    before = backend.locked().locked
    refused = [
        {"levels": 5, "page_size": 4096},
        {"size": 1 << 63, "page_size": 4096},
        {"size": 3 << 20},
        {"page_size": 8192},
        {"levels": 0},
    ]
    for request in refused:
        with pytest.raises(errors.BadWindow) as caught:
            iommu.create_window(**{"size": 1 << 30, **request})
        assert caught.value.errno == errno.EINVAL
    assert backend.locked().locked == before
    assert len(iommu.windows) == 1


def test_mapper_maps_pieces_into_slots(iommu, buffer, edu_driver, backend):
    with iommu.register(buffer), iommu.map(vfio.DmaBuffer(1 << 16, backend=backend)) as sink:
        with iommu.windows[0].mapper(buffer, slots=4, length=1 << 16) as mapper:
            assert len(mapper.iovas) == 4
            assert len(mapper.addresses) == 16
            for piece in (0, 5, 15):
                buffer[piece << 16 : (piece << 16) + 4] = b"abc" + bytes([piece])
                mapper.map(2, piece)
                edu_driver.load(mapper.iovas[2], 4)
                edu_driver.store(sink.iova, 4)
                assert sink[:4] == b"abc" + bytes([piece])
            mapper.unmap(2)
            for slot, piece in ((4, 0), (0, 16)):
                with pytest.raises(IndexError):
                    mapper.map(slot, piece)
        with pytest.raises(IndexError):
            mapper.map(0, 0)


def test_unmapped_memory_is_out_of_reach(iommu, buffer, edu_driver, backend):
    with iommu.map(vfio.DmaBuffer(1 << 16, backend=backend)) as sink:
        buffer[0:4] = b"seen"
        sink[0:4] = b"none"
        with iommu.map(buffer) as dma:
            iova = dma.iova
        edu_driver.load(iova, 4)
        edu_driver.store(sink.iova, 4)
        assert sink[0:4] != b"seen"


@POWERNV
def test_container_takes_two_groups_and_both_see_its_windows(backend, two_edus):
    first, second = two_edus
    with vfio.open_device(first, backend) as device, vfio.Group(sysfs.group_of(backend, second), backend) as group:
        device.group.container.attach(group)
        with group.device(second) as other, mapped_pair(device.iommu) as (source, sink):
            assert moves_data(Edu(other), source, sink)


@POWERNV
def test_detaching_one_group_leaves_the_others_mappings_working(backend, two_edus):
    first, second = two_edus
    with vfio.open_device(first, backend) as device, vfio.Group(sysfs.group_of(backend, second), backend) as group:
        device.group.container.attach(group)
        with mapped_pair(device.iommu) as (source, sink):
            device.group.container.detach(group)
            assert moves_data(Edu(device), source, sink)


@POWERNV
def test_closing_one_group_leaves_the_others_mappings_working(backend, two_edus):
    first, second = two_edus
    with vfio.open_device(first, backend) as device, vfio.Group(sysfs.group_of(backend, second), backend) as group:
        device.group.container.attach(group)
        with mapped_pair(device.iommu) as (source, sink):
            group.close()
            assert moves_data(Edu(device), source, sink)


@POWERNV
def test_group_does_not_leave_while_a_mapper_is_in_use(backend, two_edus):
    first, second = two_edus
    with vfio.open_device(first, backend) as device, vfio.Group(sysfs.group_of(backend, second), backend) as group:
        container, buffer = device.group.container, vfio.DmaBuffer(1 << 16, backend=backend)
        container.attach(group)
        with device.iommu.register(buffer), device.iommu.windows[0].mapper(buffer, slots=1):
            with pytest.raises(errors.StillMapped) as caught:
                container.detach(group)
            assert caught.value.errno == errno.EBUSY
        container.detach(group)


@POWERNV
def test_registration_through_one_container_serves_another(backend, two_edus, buffer):
    one, two = (vfio.Container(backend) for _ in range(2))
    with ExitStack() as stack:  # of what is open; devices, which take seconds, need not be
        for container, address in zip((one, two), two_edus, strict=True):
            stack.enter_context(container)
            container.attach(stack.enter_context(vfio.Group(sysfs.group_of(backend, address), backend)))
            container.set_iommu(vfio.SpaprTceV2)
        with two.iommu.register(vfio.DmaBuffer(1 << 16, backend=backend)):  # which enables the second container
            registration = one.iommu.register(buffer)
            with two.iommu.windows[0].map(buffer), pytest.raises(errors.StillMapped):
                registration.close()
            registration.close()


def test_everything_is_given_back_when_the_device_closes(backend, bound_address):
    device = vfio.open_device(bound_address, backend)
    device.iommu.create_window(1 << 30, 4096)
    kept = [vfio.DmaBuffer(1 << 20, backend=backend) for _ in range(3)]
    dmas = [device.iommu.map(buffer) for buffer in kept]
    assert backend.locked().locked > 3 << 20
    device.close()
    assert backend.locked().locked == 0
    assert not any(dma.mapped for dma in dmas)
    for buffer in kept:
        buffer.close()


def test_memory_is_unregistered_while_other_memory_is_about_to_be_mapped(iommu, buffer, backend, monkeypatch):
    """As another thread does it; the mapping that is about to be made still notes the region of the one before."""
    registered, claim = iommu.register(buffer), iommu.claim
    iommu.map(buffer).close()

    def unregister_first(*arguments):
        registered.close()
        return claim(*arguments)

    with vfio.DmaBuffer(1 << 16, backend=backend) as other, iommu.register(other):
        monkeypatch.setattr(iommu, "claim", unregister_first)
        iommu.windows[0].map(other).close()
    with pytest.raises(errors.NotRegistered):
        iommu.windows[0].map(buffer)


def test_two_threads_map_in_one_container(iommu, backend):
    failures = []

    def work():
        try:
            with vfio.DmaBuffer(1 << 17, backend=backend) as mine, iommu.register(mine):
                for _ in range(50):
                    first = iommu.windows[0].map(mine)
                    second = iommu.windows[0].map(vfio.MemoryRange(mine.address, 1 << 16))
                    assert first.iova + first.length <= second.iova or second.iova + second.length <= first.iova
                    first.close()
                    second.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert iommu.windows[0].mapped == []
    assert iommu.windows[0].largest_free == iommu.windows[0].size


def test_slot_kept_for_reuse_gives_way_to_an_explicit_iova(iommu, buffer):
    with iommu.register(buffer):
        window = iommu.windows[0]
        with window.map(buffer) as dma:
            iova = dma.iova
        with window.map(buffer, iova + 0x10000) as dma:
            assert dma.iova == iova + 0x10000


def test_failed_map_leaves_nothing_mapped_and_its_iova_free(iommu, buffer, backend):
    with iommu.register(buffer):
        window = iommu.windows[0]
        with pytest.raises(errors.NotRegistered):
            window.map(vfio.DmaBuffer(1 << 20, backend=backend), 0x100000)
        assert window.mapped == []
        window.map(buffer, 0x100000).close()
