"""Calls that hurt a real kernel, and so are made on the fake alone: it raises, or answers what the kernel returned."""

import errno

import pytest

from simtests.conformance.engine import Engine
from simtests.conformance.raw import NOWHERE, SECOND_WINDOW, V1, V2, Member, Program
from vfio.backend import open_backend
from vfio.fake.kernel_error import KernelWouldBeHurt

TCE_PAGE = 4096
MACHINES = ["power8", "power8?page_size=65536", "power9", "pseries", "power8?kernel=7.2", "power9?kernel=7.2"]
every_machine = pytest.mark.parametrize("machine", MACHINES)


def started(machine, **options):
    """A v2 container on a new machine, enabled by some registered memory, and that memory."""
    url = "fake:" + machine
    for option, value in options.items():
        url += f"{'&' if '?' in url else '?'}{option}={value}"
    backend = open_backend(url)
    device = next(device for device in backend.machine.topology.devices if device.model == "edu")
    backend.write_text(f"/sys/bus/pci/devices/{device.address}/driver_override", "vfio-pci")
    backend.write_text("/sys/bus/pci/drivers_probe", device.address)
    program = Program(backend)
    container = program.attached(Member(device.address, device.group), V2)
    memory = program.memory(4 * max(65536, program.page))
    assert container.register(memory.address, memory.length) == 0
    return program, container, memory


def end_of(program):
    return program.backend.machine.topology.iommu.default_window.size


@every_machine
@pytest.mark.parametrize("pages_inside", [1, 3])
def test_map_past_the_end_of_a_window_raises(machine, pages_inside):
    program, container, memory = started(machine)
    iova = end_of(program) - pages_inside * TCE_PAGE
    with pytest.raises(KernelWouldBeHurt, match="end"):
        container.map(memory.address, iova, (pages_inside + 1) * TCE_PAGE)
    assert container.map(memory.address, iova, pages_inside * TCE_PAGE) == 0


@every_machine
def test_map_past_the_end_of_a_window_is_0_on_a_machine_that_is_not_strict(machine):
    program, container, memory = started(machine, strict=0)
    assert container.map(memory.address, end_of(program) - TCE_PAGE, 4 * TCE_PAGE) == 0


def test_of_a_map_past_the_end_the_entries_inside_are_written():
    program, container, memory = started("power8", strict=0)
    address = "0000:01:00.0"
    engine = Engine(container, Member(address, 0))
    memory.view[:4], memory.view[TCE_PAGE : TCE_PAGE + 16] = b"last", b"-" * 16
    end = end_of(program)
    assert container.map(memory.address, end - TCE_PAGE, 4 * TCE_PAGE) == 0
    assert container.map(memory.address + TCE_PAGE, 0x100000, TCE_PAGE) == 0
    engine.load(end - TCE_PAGE, 4)
    engine.store(0x100000, 4)
    assert memory.view[TCE_PAGE : TCE_PAGE + 4] == b"last"


@pytest.mark.parametrize("machine", [name for name in MACHINES if "7.2" not in name])
def test_unmap_past_the_end_of_a_window_raises_on_6_12(machine):
    program, container, _ = started(machine)
    with pytest.raises(KernelWouldBeHurt, match="end"):
        container.unmap(end_of(program) - TCE_PAGE, 2 * TCE_PAGE)


@pytest.mark.parametrize("machine", [name for name in MACHINES if "7.2" not in name])
def test_unmap_past_the_end_of_a_window_is_0_on_a_6_12_that_is_not_strict(machine):
    program, container, _ = started(machine, strict=0)
    assert container.unmap(end_of(program) - TCE_PAGE, 2 * TCE_PAGE) == 0


@pytest.mark.parametrize("machine", [name for name in MACHINES if "7.2" in name])
def test_unmap_past_the_end_of_a_window_is_1_on_7_2_and_clears_nothing(machine):
    program, container, memory = started(machine)
    iova = end_of(program) - TCE_PAGE
    assert container.map(memory.address, iova, TCE_PAGE) == 0
    assert container.unmap(iova, 2 * TCE_PAGE) == 1
    before = program.locked
    assert container.unregister(memory.address, memory.length) == 0
    assert program.locked == before  # the entry is still there, and so the memory is


@every_machine
def test_map_past_the_end_of_the_second_window_raises(machine):
    _, container, memory = started(machine)
    size = 1 << 30
    assert container.create(12, size) == SECOND_WINDOW
    with pytest.raises(KernelWouldBeHurt):
        container.map(memory.address, SECOND_WINDOW + size - TCE_PAGE, 2 * TCE_PAGE)


@every_machine
def test_map_outside_every_window_does_not_hurt_however_long_it_is(machine):
    program, container, memory = started(machine)
    assert container.map(memory.address, end_of(program), 1 << 40) == -errno.ENXIO


# --- nothing done at IOVA 0: the table invalidation of a POWER8's PHB3 loops ---

ON_POWER8 = [name for name in MACHINES if name.startswith("power8")]
ELSEWHERE = [name for name in MACHINES if not name.startswith("power8")]
NOTHING_AT_0 = {
    "map of size 0": (lambda container, memory: container.map(memory.address, 0, 0), 0),
    "unmap of size 0": (lambda container, memory: container.unmap(0, 0), 0),
    "map that fails": (lambda container, memory: container.map(NOWHERE * 16, 0, 65536), -errno.EINVAL),
}
nothing_at_0 = pytest.mark.parametrize(("call", "answer"), NOTHING_AT_0.values(), ids=NOTHING_AT_0)


@pytest.mark.parametrize("machine", ON_POWER8)
@nothing_at_0
def test_nothing_done_at_iova_0_raises_on_power8(machine, call, answer):
    _, container, memory = started(machine)
    with pytest.raises(KernelWouldBeHurt):
        call(container, memory)
    assert container.map(memory.address, 0, 65536) == 0
    assert container.unmap(0, 65536) == 0


@pytest.mark.parametrize("machine", ON_POWER8)
@nothing_at_0
def test_nothing_done_at_iova_0_has_its_answer_on_a_power8_that_is_not_strict(machine, call, answer):
    _, container, memory = started(machine, strict=0)
    assert call(container, memory) == answer


@pytest.mark.parametrize("machine", ELSEWHERE)
@nothing_at_0
def test_nothing_done_at_iova_0_is_harmless_elsewhere(machine, call, answer):
    _, container, memory = started(machine)
    assert call(container, memory) == answer


def test_v1_raises_the_same():
    backend = open_backend("fake:power8")
    backend.write_text("/sys/bus/pci/devices/0000:01:00.0/driver_override", "vfio-pci")
    backend.write_text("/sys/bus/pci/drivers_probe", "0000:01:00.0")
    program = Program(backend)
    container = program.attached(Member("0000:01:00.0", 0), V1)
    memory = program.memory(2 * TCE_PAGE)
    assert container.enable() == 0
    with pytest.raises(KernelWouldBeHurt):
        container.map(memory.address, end_of(program) - TCE_PAGE, 2 * TCE_PAGE)
    with pytest.raises(KernelWouldBeHurt):
        container.map(NOWHERE, 0, TCE_PAGE)
    with pytest.raises(KernelWouldBeHurt):
        container.unmap(0, 0)


def test_machine_is_not_changed_by_a_call_that_raised():
    program, container, memory = started("power8")
    assert container.unmap(0x100000, TCE_PAGE) == 0
    before = program.locked
    for _ in range(3):
        with pytest.raises(KernelWouldBeHurt):
            container.map(memory.address, end_of(program) - TCE_PAGE, 2 * TCE_PAGE)
        with pytest.raises(KernelWouldBeHurt):
            container.unmap(0, 0)
    assert program.locked == before
    assert container.unregister(memory.address, memory.length) == 0
    assert program.locked == before - memory.length
    program.close_all()
    assert program.backend.leaks() == []
