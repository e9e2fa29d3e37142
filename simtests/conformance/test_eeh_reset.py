"""A PE in reset, and what a reset leaves behind."""

import errno

import pytest

from simtests.conformance.engine import Engine
from simtests.conformance.freezing import EEH_HOSTS, FREEZABLE, PeState, look
from simtests.conformance.pci_calls import COMMAND, CONFIG, MASTER, MEMORY, EduRegisters, eventfds, opened, signals
from simtests.conformance.raw import V2, Program, answer
from vfio import uapi

DISABLE, ENABLE, UNFREEZE_IO, UNFREEZE_DMA, GET_STATE, DEACTIVATE, HOT, FUNDAMENTAL, CONFIGURE, INJECT = range(10)
NORMAL, STOPPED, STOPPED_DMA = 0, 2, 4
VENDOR, BAR0, STATUS = 0x00, 0x10, 0x06
BLOCKED = 0x004
IOVA = 0x100000

pytestmark = pytest.mark.targets(*EEH_HOSTS)
both_resets = pytest.mark.parametrize("reset", [HOT, FUNDAMENTAL])


@pytest.fixture(autouse=True)
def out_of_reset(backend, member):
    """A case that fails does not leave the PE in reset for the next."""
    yield
    if look(backend, member.address).flags & BLOCKED:
        program = Program(backend)
        assert program.attached(member, V2).eeh(DEACTIVATE) == 0
        program.close_all()


@pytest.fixture
def frozen(target):
    """Whether a PE in reset is frozen too: QEMU's PHB3 has no freeze bits."""
    return target.name in FREEZABLE


@pytest.fixture
def in_reset(frozen):
    """What sysfs shows of a PE in reset."""
    return PeState(0, 0x801 | BLOCKED) if frozen else PeState(0x78, 0x800 | BLOCKED)


@pytest.fixture(autouse=True)
def watched(request, target, member):
    """The firmware of an emulated PHB4 looks at a PE's freeze bits only once a test has written them."""
    if target.name in FREEZABLE:
        freezer = request.getfixturevalue("freezer")
        freezer(member.address, "none")
        if "second" in request.fixturenames:
            freezer(request.getfixturevalue("second").address, "none")


def config(backend, fd, offset, count=4):
    """What came of a read of configuration space: the value, or a negative errno."""
    data = answer(backend.pread, fd, count, CONFIG << 40 | offset)
    return int.from_bytes(data, "little") if isinstance(data, bytes) else data


def set_config(backend, fd, offset, value, count=2):
    return answer(backend.pwrite, fd, value.to_bytes(count, "little"), CONFIG << 40 | offset)


@both_resets
def test_reset_holds_the_pe_frozen_and_configuration_space_out_of_reach(backend, v2, member, frozen, in_reset, reset):
    fd = v2.group.device(member.address)
    vendor, bar = config(backend, fd, VENDOR), config(backend, fd, BAR0)
    assert v2.eeh(reset) == 0
    assert v2.eeh(GET_STATE) == (STOPPED if frozen else NORMAL)
    assert look(backend, member.address) == in_reset
    assert config(backend, fd, VENDOR) == vendor  # these are the kernel's own copies
    assert config(backend, fd, BAR0) == bar
    for offset in (COMMAND, STATUS, 0x08, 0x40):
        assert config(backend, fd, offset, 2) == -errno.ENODEV
    assert set_config(backend, fd, COMMAND, MEMORY | MASTER) == -errno.ENODEV
    assert v2.eeh(DEACTIVATE) == 0
    assert v2.eeh(GET_STATE) == NORMAL
    assert look(backend, member.address) == PeState(0x78, 0x800)
    assert config(backend, fd, VENDOR) == vendor


def test_thawing_a_pe_in_reset_does_not_bring_configuration_space_back(backend, v2, member, frozen):
    fd = v2.group.device(member.address)
    assert v2.eeh(FUNDAMENTAL) == 0
    assert (v2.eeh(UNFREEZE_IO), v2.eeh(GET_STATE)) == (0, STOPPED_DMA if frozen else NORMAL)
    assert (v2.eeh(UNFREEZE_DMA), v2.eeh(GET_STATE)) == (0, NORMAL)
    assert config(backend, fd, COMMAND, 2) == -errno.ENODEV
    assert v2.eeh(FUNDAMENTAL) == 0
    assert (v2.eeh(ENABLE), v2.eeh(GET_STATE)) == (0, NORMAL)
    assert look(backend, member.address) == PeState(0x78, 0x804)
    assert config(backend, fd, COMMAND, 2) == -errno.ENODEV
    for _ in range(2):
        assert v2.eeh(DEACTIVATE) == 0
        assert config(backend, fd, COMMAND, 2) & (MEMORY | MASTER) == MEMORY
        assert v2.eeh(GET_STATE) == NORMAL


def test_reset_may_be_repeated_before_it_ends(backend, v2, member, in_reset):
    for _ in range(2):
        assert v2.eeh(FUNDAMENTAL) == 0
        assert look(backend, member.address) == in_reset
    assert v2.eeh(DEACTIVATE) == 0
    assert v2.eeh(GET_STATE) == NORMAL


@pytest.mark.needs_edu
def test_mappings_survive_a_reset_and_bus_master_does_not(backend, program, v2, member):
    memory = program.memory(program.page)
    assert v2.register(memory.address, memory.length) == 0
    assert v2.map(memory.address, IOVA, memory.length) == 0
    engine = Engine(v2, member)
    memory.view[:16] = b"0123456789abcdef"
    engine.load(IOVA)
    assert (v2.eeh(HOT), v2.eeh(DEACTIVATE)) == (0, 0)
    assert config(backend, engine.fd, COMMAND, 2) & (MEMORY | MASTER) == MEMORY
    engine.store(IOVA + 32)
    assert memory.view[32:48] == bytes(16)
    engine.master(True)
    engine.store(IOVA + 32)
    assert memory.view[32:48] == b"0123456789abcdef"


@pytest.mark.needs_edu
def test_windows_survive_a_reset(program, v2, member):
    memory = program.memory(program.page)
    start = v2.create(12, 1 << 30)
    assert v2.register(memory.address, memory.length) == 0
    assert v2.map(memory.address, start, memory.length) == 0
    engine = Engine(v2, member)
    memory.view[:16] = b"0123456789abcdef"
    assert (v2.eeh(FUNDAMENTAL), v2.eeh(DEACTIVATE)) == (0, 0)
    engine.master(True)
    engine.load(start)
    engine.store(start + 64)
    assert memory.view[64:80] == b"0123456789abcdef"
    assert v2.eeh(GET_STATE) == NORMAL


@pytest.mark.needs_edu
def test_messages_are_dead_after_a_reset_until_they_are_set_again(backend, member):
    action = uapi.VFIO_IRQ_SET_ACTION_TRIGGER
    with opened(backend, member.address) as device, eventfds() as (fd,):
        registers = EduRegisters(device)
        enable = fd.to_bytes(4, "little")
        device.set_config(COMMAND, 2, MEMORY | MASTER)
        assert device.set_irqs(1, uapi.VFIO_IRQ_SET_DATA_EVENTFD | action, count=1, data=enable) == 0
        registers.raise_line()
        assert signals(fd) == 1
        registers.lower_line()
        for op in (HOT, DEACTIVATE):
            struct = uapi.vfio_eeh_pe_op(op=op)
            assert backend.ioctl(device.container, uapi.VFIO_EEH_PE_OP, uapi.buffer(struct)) == 0
        device.set_config(COMMAND, 2, MEMORY | MASTER)
        registers.raise_line()
        assert signals(fd, wait=0.2) == 0
        registers.lower_line()
        assert device.set_irqs(1, uapi.VFIO_IRQ_SET_DATA_NONE | action) == 0
        assert device.set_irqs(1, uapi.VFIO_IRQ_SET_DATA_EVENTFD | action, count=1, data=enable) == 0
        registers.raise_line()
        assert signals(fd) == 1
        registers.lower_line()


@pytest.mark.spoils  # the device answers with zeros after it was opened in vain
def test_closing_in_reset_leaves_configuration_space_blocked_and_the_device_cannot_be_opened(
    backend, program, v2, member
):
    fd = v2.group.device(member.address)
    assert v2.eeh(FUNDAMENTAL) == 0
    program.close(fd)
    assert look(backend, member.address) == PeState(0x78, 0x804)  # the last close thawed it
    assert v2.group.device(member.address) == -errno.ENODEV
    assert v2.eeh(DEACTIVATE) == 0
    assert v2.group.device(member.address) >= 0


@pytest.mark.spoils  # as above
def test_reset_without_an_open_device_keeps_it_from_being_opened(v2, member):
    assert v2.eeh(FUNDAMENTAL) == 0
    assert v2.group.device(member.address) == -errno.ENODEV
    assert v2.eeh(DEACTIVATE) == 0
    assert v2.group.device(member.address) >= 0


def test_reset_reaches_every_group_of_the_container(backend, program, v2, member, second, in_reset):
    group = program.group(second)
    assert group.set_container(v2.fd) == 0
    assert v2.eeh(FUNDAMENTAL) == 0
    assert [look(backend, each.address) for each in (member, second)] == [in_reset, in_reset]
    assert v2.eeh(DEACTIVATE) == 0
    assert [look(backend, each.address).bits for each in (member, second)] == [0x78, 0x78]
