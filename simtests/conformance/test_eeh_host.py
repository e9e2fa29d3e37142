"""What the host does about a frozen PE: it recovers what nobody has open, and leaves the rest to its owner."""

import pytest

from simtests.conformance.freezing import FREEZABLE, PeState

ENABLE, UNFREEZE_IO, UNFREEZE_DMA, GET_STATE = 1, 2, 3, 4
NORMAL, STOPPED, UNAVAILABLE = 0, 2, 5
WORKS, FROZEN = PeState(0x78, 0x800), PeState(0, 0x801)
WORKS_BUT_ISOLATED = PeState(0x78, 0x801)

pytestmark = [
    pytest.mark.targets(*FREEZABLE),
    pytest.mark.not_recorded("what the host does takes its own time"),
]


def test_host_recovers_what_nobody_has_open(member, freezer, kernel_messages):
    freezer(member.address)
    freezer.check(member.address)
    freezer.until(lambda: freezer.look(member.address) == WORKS)
    messages = kernel_messages.new()
    number = pe_name(freezer, member.address)
    assert f"EEH: Recovering {number}" in messages
    assert f"EEH: Frozen {number} detected" in messages
    assert "EEH: Recovery successful." in messages


def test_host_recovers_it_though_its_group_is_in_a_container(v2, member, freezer):
    freezer(member.address)
    freezer.check(member.address)
    freezer.until(lambda: freezer.look(member.address) == WORKS)
    assert v2.eeh(GET_STATE) == NORMAL


def test_host_leaves_alone_and_says_nothing_of_what_is_open(v2, member, freezer, kernel_messages):
    assert v2.group.device(member.address) >= 0
    kernel_messages.new()
    freezer(member.address)
    freezer.check(member.address)
    freezer.sleep(0.5)
    assert freezer.look(member.address) == FROZEN
    assert [line for line in kernel_messages.new() if line.startswith("EEH:")] == []
    assert v2.eeh(ENABLE) == 0


def test_looking_at_a_frozen_pe_keeps_the_host_from_recovering_it(backend, member, freezer):
    freezer(member.address)
    assert freezer.look(member.address) == FROZEN  # the kernel believes that somebody takes care of it now
    freezer.check(member.address)
    freezer.sleep(0.5)
    assert freezer.look(member.address) == FROZEN
    backend.write_text(f"/sys/bus/pci/devices/{member.address}/eeh_pe_state", "1")
    assert freezer.look(member.address) == WORKS


def test_owner_who_only_thaws_leaves_a_pe_that_the_host_does_not_recover(program, v2, member, freezer):
    fd = v2.group.device(member.address)
    freezer(member.address)
    assert [v2.eeh(op) for op in (GET_STATE, UNFREEZE_IO, UNFREEZE_DMA, GET_STATE)] == [STOPPED, 0, 0, NORMAL]
    program.close(fd)
    assert freezer.look(member.address) == WORKS_BUT_ISOLATED
    freezer(member.address)
    freezer.check(member.address)
    freezer.sleep(0.5)
    assert freezer.look(member.address) == FROZEN


@pytest.mark.spoils  # the kernel makes the child's PE anew, and that is never again what it was
def test_child_is_unavailable_while_the_host_recovers_its_parent_and_frozen_afterwards(program, second, freezer):
    container = program.attached(second, 7)
    assert container.group.device(second.address) >= 0
    bridge = f"{second.address[:4]}:00:00.0"
    freezer(bridge)
    assert container.eeh(GET_STATE) == NORMAL  # nobody knows yet
    freezer.check(bridge)
    assert container.eeh(GET_STATE) == UNAVAILABLE
    # The reset of the parent thaws it, and the host freezes it again: for a moment it may be seen between the two.
    freezer.until(lambda: container.eeh(GET_STATE) == STOPPED, seconds=60)
    assert container.eeh(ENABLE) == 0
    assert container.eeh(GET_STATE) == NORMAL


def pe_name(freezer, address):
    """How the kernel's messages name the PE of a device."""
    number = freezer.backend.read_text(f"/sys/bus/pci/devices/{address}/eeh_pe_config_addr").strip()
    return f"PHB#{int(address[:4], 16):x}-PE#{int(number, 16):x}"
