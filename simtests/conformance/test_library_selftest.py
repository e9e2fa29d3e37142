"""The self-test, on a device with a driver."""

import pytest

from vfio import selftest


@pytest.mark.needs_edu
def test_every_step_passes_or_says_why_it_was_left_out(backend, bound_address, target):
    steps = list(selftest.steps(bound_address, backend))
    assert [step for step in steps if step.status == "failed"] == []
    names = [step.name for step in steps if step.status == "ok"]
    if target.platform == "PC":
        assert names == ["open", "device", "registers", "DMA", "INTx", "MSI", "nothing left"]
    else:
        assert names[:4] == ["open", "device", "registers", "default window"]
        assert {"window, 4 KiB pages", "INTx", "MSI", "nothing left"} <= set(names)
    for step in steps:
        if step.status == "skipped":
            assert "pages" in step.detail or "level" in step.detail


def test_nothing_stays_locked_when_it_is_left_half_way(backend, bound_address):
    steps = selftest.steps(bound_address, backend)
    for step in steps:
        if step.name in ("default window", "DMA"):
            break
    steps.close()
    assert backend.locked().locked == 0
