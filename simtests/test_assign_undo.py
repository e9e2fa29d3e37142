"""Failures, interrupts and crashes half way through a change: everything is put back, and restore is exact."""

from __future__ import annotations

import errno

import pytest
from fake_host import Host, power_host
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio import assign, errors, journal
from vfio.plan import Plan

CARD = ["0000:01:00.0", "0000:01:00.1"]
DISK = "0001:01:00.0"
FREE = "0002:00:00.0"


def arranged() -> Host:
    """A host whose group 7 has a node that belongs to somebody, and a waiting override."""
    host = power_host()
    host.move(CARD[1], "vfio-pci", override="vfio-pci")
    node = host.nodes[7]
    node.uid, node.gid, node.mode = 55, 66, 0o640
    host.devices[DISK].driver_override = "other"
    return host


def bind_much(host: Host) -> Plan:
    return assign.bind([CARD[0], DISK, FREE], whole_group=True, user="4321:77", backend=host)


def count_changes() -> int:
    host = arranged()
    bind_much(host)
    assign.restore(backend=host)
    host.changes.clear()
    bind_much(host)
    count = len(host.changes)
    assign.restore(backend=host)
    return count


CHANGES_OF_BIND = 11
"""Overrides, unbinds and probes of three devices (one without a driver), and the owners of three nodes."""


def test_bind_makes_as_many_changes_as_the_failures_below_assume():
    assert count_changes() == CHANGES_OF_BIND


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ENODEV])
@pytest.mark.parametrize("nth", range(CHANGES_OF_BIND))
def test_a_failure_at_any_change_of_bind_puts_everything_back(nth, number):
    host = arranged()
    before = host.snapshot()
    host.fault = lambda n: number if n == nth else 0
    with pytest.raises(OSError) as raised:  # noqa: PT011 - any error of the kernel's is passed on
        bind_much(host)
    assert raised.value.errno == number
    assert host.snapshot() == before
    assert not journal.path(host).exists()


@pytest.mark.parametrize("nth", range(1, CHANGES_OF_BIND))
def test_when_putting_back_fails_too_the_journal_knows_what_is_left(nth):
    host = arranged()
    before = host.snapshot()
    host.fault = lambda n: errno.EIO if n >= nth else 0
    with pytest.raises(errors.NotPutBack) as raised:
        bind_much(host)
    assert raised.value.errno == errno.EIO
    assert raised.value.failures
    host.fault = lambda n: 0
    assign.restore(backend=host)
    assert host.snapshot() == before
    assert not journal.path(host).exists()


@pytest.mark.parametrize("nth", range(CHANGES_OF_BIND))
def test_an_interrupt_at_any_change_of_bind_puts_everything_back(nth):
    host = arranged()
    before = host.snapshot()

    def interrupt(n: int) -> int:
        if n == nth:
            raise KeyboardInterrupt
        return 0

    host.fault = interrupt
    with pytest.raises(KeyboardInterrupt):
        bind_much(host)
    assert host.snapshot() == before


@pytest.mark.parametrize("nth", range(CHANGES_OF_BIND))
def test_after_a_crash_at_any_change_of_bind_restore_is_exact(nth, monkeypatch):
    class Killed(BaseException):
        """Nothing runs after it."""

    def kill(n: int) -> int:
        if n == nth:
            raise Killed
        return 0

    host = arranged()
    before = host.snapshot()
    host.fault = kill
    with monkeypatch.context() as killed:
        killed.setattr(assign, "_put_back", lambda *arguments, **named: [])
        killed.setattr(assign, "_forget", lambda *arguments: None)
        with pytest.raises(Killed):
            bind_much(host)
    host.fault = lambda n: 0
    assign.restore(backend=host)
    assert host.snapshot() == before
    assert not journal.path(host).exists()


operation = st.tuples(
    st.sampled_from(["bind", "unbind", "restore"]),
    st.lists(st.sampled_from([*CARD, DISK, FREE]), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from([None, "4321", "4321:77", "99"]),
    st.one_of(st.none(), st.integers(0, 12)),
)


@settings(max_examples=150, deadline=None)
@given(operations=st.lists(operation, max_size=8))
def test_whatever_was_done_restore_all_leaves_the_host_as_it_was(tmp_path_factory, operations):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(journal.DIRECTORY, str(tmp_path_factory.mktemp("state")))
        host = arranged()
        before = host.snapshot()
        for verb, addresses, whole, user, nth in operations:
            start = len(host.changes)
            at_start = host.snapshot()
            host.fault = lambda n, at=start, nth=nth: errno.EIO if nth is not None and n == at + nth else 0
            try:
                if verb == "bind":
                    assign.bind(addresses, whole_group=whole, user=user, backend=host)
                elif verb == "unbind":
                    assign.unbind(addresses, backend=host)
                else:
                    assign.restore(addresses, backend=host)
            except OSError:
                if verb != "restore":
                    assert host.snapshot() == at_start
        host.fault = lambda n: 0
        assign.restore(backend=host)
        assert host.snapshot() == before
        assert not journal.path(host).exists()
