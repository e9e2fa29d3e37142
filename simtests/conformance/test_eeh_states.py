"""A frozen PE: its states, and what each operation makes of them."""

import pytest

from simtests.conformance.freezing import FREEZABLE, HALVES, PeState
from simtests.conformance.pci_calls import endpoint_address, on_vfio, opened
from simtests.conformance.raw import V1, V2
from vfio import uapi

DISABLE, ENABLE, UNFREEZE_IO, UNFREEZE_DMA, GET_STATE, DEACTIVATE, HOT, FUNDAMENTAL, CONFIGURE, INJECT = range(10)
NORMAL, STOPPED, STOPPED_DMA, UNAVAILABLE = 0, 2, 4, 5
STATES = {"none": NORMAL, "both": STOPPED, "dma": STOPPED_DMA, "mmio": UNAVAILABLE}
BITS = {"none": 0x78, "both": 0, "dma": 0x28, "mmio": 0x50}
ISOLATED, HAS_BUS = 0x001, 0x800

pytestmark = pytest.mark.targets(*FREEZABLE)


@pytest.mark.parametrize("iommu", [V1, V2])
@pytest.mark.parametrize("what", HALVES)
def test_get_state_tells_what_is_frozen(program, member, freezer, iommu, what):
    container = program.attached(member, iommu)
    freezer(member.address, what)
    assert container.eeh(GET_STATE) == STATES[what]


@pytest.mark.parametrize(
    ("before", "op", "after"),
    [
        *((state, op, state) for state in STATES for op in (DISABLE, CONFIGURE, GET_STATE)),
        *((state, ENABLE, "none") for state in STATES),
        *((state, DEACTIVATE, "none") for state in STATES),
        ("none", UNFREEZE_IO, "none"),
        ("both", UNFREEZE_IO, "dma"),
        ("dma", UNFREEZE_IO, "dma"),
        ("mmio", UNFREEZE_IO, "none"),
        ("none", UNFREEZE_DMA, "none"),
        ("both", UNFREEZE_DMA, "mmio"),
        ("mmio", UNFREEZE_DMA, "mmio"),
        ("dma", UNFREEZE_DMA, "none"),
    ],
)
def test_operations_change_the_state(v2, member, freezer, before, op, after):
    freezer(member.address, before)
    assert v2.eeh(op) == (STATES[before] if op == GET_STATE else 0)
    assert v2.eeh(GET_STATE) == STATES[after]


def test_operations_work_on_an_open_device_too(program, v2, member, freezer):
    assert v2.group.device(member.address) >= 0
    freezer(member.address)
    answers = [v2.eeh(op) for op in (GET_STATE, UNFREEZE_IO, GET_STATE, UNFREEZE_DMA, GET_STATE)]
    assert answers == [STOPPED, 0, STOPPED_DMA, 0, NORMAL]


def test_sysfs_shows_what_works_and_that_the_kernel_knows(v2, member, freezer):
    assert freezer.look(member.address) == PeState(BITS["none"], HAS_BUS)
    for what in ("mmio", "dma"):
        freezer(member.address, what)
        assert freezer.look(member.address) == PeState(BITS[what], HAS_BUS)
    freezer(member.address, "both")
    assert freezer.look(member.address) == PeState(0, HAS_BUS | ISOLATED)


def test_thawing_by_halves_leaves_the_pe_isolated_and_enable_or_the_end_of_a_reset_do_not(v2, member, freezer):
    for op in (ENABLE, DEACTIVATE):
        freezer(member.address)
        assert [v2.eeh(each) for each in (GET_STATE, UNFREEZE_IO, UNFREEZE_DMA, GET_STATE)] == [STOPPED, 0, 0, NORMAL]
        assert freezer.look(member.address) == PeState(BITS["none"], HAS_BUS | ISOLATED)
        assert v2.eeh(ENABLE) == 0  # nothing is frozen: nothing is done
        assert freezer.look(member.address) == PeState(BITS["none"], HAS_BUS | ISOLATED)
        freezer(member.address)
        assert v2.eeh(op) == 0
        assert freezer.look(member.address) == PeState(BITS["none"], HAS_BUS)


def test_root_thaws_an_isolated_pe_through_sysfs_and_no_other(backend, v2, member, freezer):
    file = f"/sys/bus/pci/devices/{member.address}/eeh_pe_state"
    freezer(member.address, "dma")
    backend.write_text(file, "1")
    assert v2.eeh(GET_STATE) == STOPPED_DMA
    freezer(member.address, "both")
    backend.write_text(file, "1")  # nobody has looked at the PE yet: the kernel does not know
    assert v2.eeh(GET_STATE) == STOPPED
    backend.write_text(file, "1")
    assert freezer.look(member.address) == PeState(BITS["none"], HAS_BUS)


def test_opening_and_the_last_close_thaw(program, v2, member, freezer):
    for what in HALVES:
        freezer(member.address, what)
        first = v2.group.device(member.address)
        assert v2.eeh(GET_STATE) == NORMAL
        freezer(member.address, what)
        second = v2.group.device(member.address)
        assert v2.eeh(GET_STATE) == STATES[what]  # it was open
        program.close(first)
        assert v2.eeh(GET_STATE) == STATES[what]
        program.close(second)
        assert v2.eeh(GET_STATE) == NORMAL


def test_detaching_the_group_leaves_the_pe_frozen(program, member, freezer):
    container = program.attached(member, V2)
    freezer(member.address)
    assert container.eeh(GET_STATE) == STOPPED
    assert container.group.unset_container() == 0
    assert container.group.set_container(container.fd) == 0
    assert container.set_iommu(V2) == 0
    assert container.eeh(GET_STATE) == STOPPED


def test_calls_of_the_container_work_while_the_pe_is_frozen(program, v2, member, freezer):
    memory = program.memory(program.page)
    freezer(member.address)
    assert v2.register(memory.address, memory.length) == 0
    assert v2.map(memory.address, 0x10000, memory.length) == 0
    start = v2.create(12, 1 << 30)
    assert start > 0
    assert v2.map(memory.address, start, memory.length) == 0
    assert v2.unmap(start, memory.length) == 0
    assert v2.remove(start) == 0
    assert v2.unmap(0x10000, memory.length) == 0
    assert v2.unregister(memory.address, memory.length) == 0
    assert v2.eeh(GET_STATE) == STOPPED


def test_of_several_groups_the_newest_answers_first_and_all_are_thawed(program, v2, member, second, freezer):
    group = program.group(second)
    assert group.set_container(v2.fd) == 0
    freezer(member.address, "dma")
    assert v2.eeh(GET_STATE) == STOPPED_DMA  # the newest had nothing to say
    freezer(second.address, "both")
    assert v2.eeh(GET_STATE) == STOPPED
    assert v2.eeh(UNFREEZE_IO) == 0
    assert [freezer.look(each.address).bits for each in (member, second)] == [BITS["dma"], BITS["dma"]]
    assert v2.eeh(UNFREEZE_DMA) == 0
    assert v2.eeh(GET_STATE) == NORMAL
    assert group.unset_container() == 0
    group.close()
    freezer(second.address, "both")
    assert v2.eeh(GET_STATE) == NORMAL  # its group is elsewhere


def test_function_reset_works_and_leaves_the_pe_frozen(backend, target, freezer):
    address = endpoint_address(target)
    with on_vfio(backend, address), opened(backend, address) as device:
        freezer(address)
        assert freezer.look(address) == PeState(BITS["both"], HAS_BUS | ISOLATED)
        assert device.ioctl(uapi.VFIO_DEVICE_RESET) == 0
        assert device.config(0, 2) == target.topology.device(address).vendor
        assert freezer.look(address) == PeState(BITS["both"], HAS_BUS | ISOLATED)
