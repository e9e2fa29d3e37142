"""Time on a modelled machine: still until it is moved, or real."""

from __future__ import annotations

import pytest

from vfio.fake import clock as clocks
from vfio.fake.clock import Clock


@pytest.fixture
def real(monkeypatch):
    """Real time, in a list that a test moves."""
    now = [100.0]
    monkeypatch.setattr(clocks.time, "monotonic", lambda: now[0])
    return now


def test_time_stands_still_until_it_is_moved(real):
    clock, done = Clock(), []
    clock.after(2, lambda: done.append(clock.now()))
    real[0] += 10
    clock.catch_up()
    assert (clock.now(), clock.due(), done) == (0, None, [])
    clock.advance(5)
    assert (clock.now(), done) == (5, [2])


def test_time_that_follows_is_real_and_what_is_due_happens_in_order(real):
    clock, done = Clock(), []
    clock.advance(3)
    clock.follow()
    clock.after(2, lambda: done.append("second"))
    clock.after(1, lambda: done.append("first"))
    assert clock.due() == 1
    real[0] += 4
    clock.catch_up()
    assert (clock.now(), done, clock.due()) == (7, ["first", "second"], None)


def test_what_a_driver_sleeps_is_added_to_time_that_follows(real):
    clock = Clock()
    clock.follow()
    clock.advance(5)
    real[0] += 1
    clock.catch_up()
    assert clock.now() == 6


def test_time_does_not_go_back():
    with pytest.raises(ValueError, match="does not go back"):
        Clock().advance(-1)
