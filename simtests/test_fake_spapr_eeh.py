"""The modelled EEH: states of a PE, what changes them, error injection.  (Spec: section 5.)"""

from __future__ import annotations

import pytest
from spapr_host import Host, User

from vfio import uapi

DISABLE, ENABLE, UNFREEZE_IO, UNFREEZE_DMA, GET_STATE = range(5)
DEACTIVATE, HOT, FUNDAMENTAL, CONFIGURE, INJECT = range(5, 10)

STATES = {"none": 0, "both": 2, "dma": 4, "mmio": 5}


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def user(request: pytest.FixtureRequest) -> User:
    user = User(Host("power9"))
    user.attach(1, version=request.param)
    return user


@pytest.mark.parametrize(("freeze", "state"), STATES.items())
def test_get_state_tells_what_is_frozen(user: User, freeze: str, state: int) -> None:
    user.host.pe(1).freeze = freeze
    assert user.eeh(GET_STATE) == state


@pytest.mark.parametrize(
    ("before", "op", "after"),
    [
        *((state, op, state) for state in STATES for op in (DISABLE, CONFIGURE)),
        *((state, ENABLE, "none") for state in STATES),
        *((state, DEACTIVATE, "none") for state in STATES),
        *((state, op, "both") for state in STATES for op in (HOT, FUNDAMENTAL)),
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
def test_operations_change_the_state(user: User, before: str, op: int, after: str) -> None:
    pe = user.host.pe(1)
    pe.freeze = before
    assert user.eeh(op) == 0
    assert pe.freeze == after


def test_config_space_is_blocked_until_the_reset_is_deactivated(user: User) -> None:
    pe = user.host.pe(1)
    device = pe.devices[0]
    assert user.eeh(HOT) == 0
    assert pe.blocked
    assert device.events == ["reset"]
    assert (user.eeh(UNFREEZE_IO), user.eeh(UNFREEZE_DMA), user.eeh(GET_STATE)) == (0, 0, 0)
    assert user.eeh(ENABLE) == 0
    assert pe.blocked
    assert user.eeh(DEACTIVATE) == 0
    assert not pe.blocked
    assert device.events == ["reset", "restore"]


def test_a_pe_below_a_frozen_one_is_unavailable(user: User) -> None:
    pe = user.host.pe(1)
    pe.eeh.parent = user.host.pe(0).eeh
    pe.eeh.parent.freeze = "both"
    assert user.eeh(GET_STATE) == 0  # nobody has seen that yet
    pe.eeh.parent.isolated = True
    assert user.eeh(GET_STATE) == 5


def test_bad_operations_are_refused_in_the_kernels_order(user: User) -> None:
    assert user.call(user.container, uapi.VFIO_EEH_PE_OP, 0x10) == "EFAULT"
    for bad in ({"argsz": 11}, {"flags": 1}):
        assert user.eeh(GET_STATE, **bad) == "EINVAL"
    assert user.eeh(10) == "EINVAL"
    assert user.eeh(0xFFFFFFFF) == "EINVAL"
    assert user.eeh(INJECT, argsz=39) == "EINVAL"
    assert user.eeh(INJECT, err={"type": 2, "func": 20}) == "EINVAL"
    assert user.eeh(INJECT, err={"type": 2, "func": 19}) == "ERANGE"
    assert user.eeh(INJECT, err={"type": 0xFFFFFFFF, "func": 0}) == "ERANGE"
    assert user.eeh(GET_STATE, argsz=12) == 0


def test_power9_injects_into_config_space_only(user: User) -> None:
    answers = [user.eeh(INJECT, err={"type": 0, "func": function}) for function in range(20)]
    assert {function for function, answer in enumerate(answers) if answer == 0} == {4, 5, 10, 11}
    assert set(answers) == {0, "EIO"}
    assert user.eeh(GET_STATE) == 0


def test_power8_injects_into_dma_windows_that_there_are() -> None:
    user = User(Host("power8"))
    user.attach(1)

    def allowed(kind: int) -> set[int]:
        answers = [user.eeh(INJECT, err={"type": kind, "func": function}) for function in range(20)]
        assert set(answers) == {0, "EIO"}
        return {function for function, answer in enumerate(answers) if answer == 0}

    always, dma = {0, 1, 4, 5, 6, 7, 10, 11}, set(range(12, 20))
    assert (allowed(0), allowed(1)) == (always, always)
    assert user.create(16, 1 << 30)[0] == 0
    assert (allowed(0), allowed(1)) == (always | dma, always | dma)
    user.remove(0)
    assert (allowed(0), allowed(1)) == (always, always | dma)


def test_a_pseries_guest_has_no_pe_to_ask() -> None:
    user = User(Host("pseries"))
    user.attach(0)
    assert user.call(user.container, uapi.VFIO_EEH_PE_OP, 0x10) == "ENODEV"


def test_without_an_iommu_it_is_einval() -> None:
    user = User(Host())
    assert user.eeh(GET_STATE) == "EINVAL"
    user.set_container(user.open_group(0))
    assert user.eeh(GET_STATE) == "EINVAL"


def test_of_several_groups_the_newest_that_has_something_to_say_answers() -> None:
    user = User(Host("power9"))
    user.attach(0)
    user.set_container(user.open_group(1))
    user.host.pe(0).freeze = "dma"
    assert user.eeh(GET_STATE) == 4
    user.host.pe(1).freeze = "both"
    assert user.eeh(GET_STATE) == 2
    assert user.eeh(ENABLE) == 0
    assert [user.host.pe(number).freeze for number in (0, 1)] == ["none", "none"]
