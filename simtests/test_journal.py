"""The journal: written first, locked, one a backend, void after a reboot, and never believed when it is corrupt."""

from __future__ import annotations

import fcntl
import io
import json
import os
import threading

import pytest
from fake_host import Host, power_host

from vfio import assign, errors, journal
from vfio.backends.trace import TextTrace, TraceBackend

CARD = ["0000:01:00.0", "0000:01:00.1"]
DISK = "0001:01:00.0"
FREE = "0002:00:00.0"


def test_the_journal_is_written_before_anything_is_changed(host):
    seen = []

    def look(n: int) -> int:
        seen.append(json.loads(journal.path(host).read_text()))
        return 0

    host.fault = look
    assign.bind([DISK], user="4321", backend=host)
    assert len(seen) == 4
    assert seen[0] == {
        "version": 1,
        "boot_id": "5f0b",
        "devices": [{"address": DISK, "group": 2, "driver": "nvme", "override": None, "new_id": None}],
        "nodes": [{"group": 2, "uid": 0, "gid": 0, "mode": 0o600, "unprotected": False}],
    }


def test_a_journal_that_cannot_be_written_keeps_everything_unchanged(host, state_dir):
    state_dir.write_text("a file where the directory should be")
    with pytest.raises(errors.NoJournal) as raised:
        assign.bind([DISK], backend=host)
    assert str(state_dir) in raised.value.what
    assert host.changes == []


def test_a_journal_from_before_a_reboot_is_ignored_and_replaced(host):
    assign.bind([DISK], backend=host)
    rebooted = power_host()
    rebooted.host.boot_id = "0815"
    rebooted.move(DISK, None)
    found = journal.load(rebooted)
    assert (found.devices, found.stale) == ({}, 1)
    plan = assign.bind([FREE], backend=rebooted)
    assert len(plan.notes) == 1
    assert "earlier boot" in plan.notes[0]
    assert rebooted.devices[DISK].driver is None
    assert list(journal.load(rebooted).devices) == [FREE]


def test_restore_after_a_reboot_tells_and_changes_nothing(host):
    assign.bind([DISK], backend=host)
    rebooted = power_host()
    rebooted.host.boot_id = "0815"
    plan = assign.restore(backend=rebooted)
    assert "earlier boot" in plan.notes[0]
    assert rebooted.changes == []
    assert assign.restore(backend=rebooted).notes == []  # told once


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "[]",
        "{}",
        "null",
        '{"version": 2, "boot_id": "5f0b", "devices": [], "nodes": []}',
        '{"version": 1, "boot_id": "5f0b", "devices": [{}], "nodes": []}',
        '{"version": 1, "boot_id": "5f0b", "devices": 7, "nodes": []}',
        *(
            json.dumps({"version": 1, "boot_id": "5f0b", "devices": [state], "nodes": []})
            for state in (
                {"address": "../../x", "group": 1, "driver": None, "override": None},
                {"address": DISK, "group": "1", "driver": None, "override": None},
                {"address": DISK, "group": -1, "driver": None, "override": None},
                {"address": DISK, "group": 1, "driver": "../../x", "override": None},
                {"address": DISK, "group": 1, "driver": "..", "override": None},
                {"address": DISK, "group": 1, "driver": None, "override": "a\nb"},
                {"address": DISK, "group": 1, "driver": None, "override": None, "new_id": "x"},
                {"address": DISK, "group": 1, "driver": None, "override": None, "more": 1},
            )
        ),
        '{"version": 1, "boot_id": "5f0b", "devices": [], "nodes": [{"group": 1, "uid": -1}]}',
        '{"version": 1, "boot_id": "5f0b", "devices": [], "nodes": [{"group": 1, "mode": 65535}]}',
        "[" * 100000,
    ],
)
@pytest.mark.parametrize("change", [assign.bind, assign.restore])
def test_a_corrupt_journal_is_named_and_nothing_is_changed(host, change, text):
    path = journal.path(host)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(errors.JournalCorrupt) as raised:
        change([DISK], backend=host)
    assert str(path) in str(raised.value)
    assert f"rm {path}" in raised.value.remedy
    assert host.changes == []
    assert path.read_text() == text


def test_a_journal_of_binary_data_is_corrupt(host):
    path = journal.path(host)
    path.parent.mkdir()
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(errors.JournalCorrupt):
        assign.restore(backend=host)


def test_a_second_process_waits_for_the_lock_then_gives_up_and_names_the_first(host, monkeypatch):
    monkeypatch.setattr(journal, "_LOCK_SECONDS", 0.1)
    with journal.locked(host), pytest.raises(errors.Busy) as raised:
        assign.bind([DISK], backend=host)
    assert raised.value.holders == ((os.getpid(), "vfio"),)
    assert host.changes == []
    assign.bind([DISK], backend=host)  # the lock went with its holder


def test_a_second_process_goes_on_when_the_first_is_done(host):
    lock = journal.path(host).with_suffix(".lock")
    lock.parent.mkdir()
    with lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=assign.bind, args=([DISK],), kwargs={"backend": host})
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert host.changes == []
    thread.join()
    assert host.devices[DISK].driver == "vfio-pci"


def test_concurrent_binds_of_different_devices_are_both_in_the_journal(host):
    threads = [
        threading.Thread(target=assign.bind, args=([address],), kwargs={"backend": host})
        for address in (*CARD, DISK, FREE)
    ]
    before = host.snapshot()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(journal.load(host).devices) == {*CARD, DISK, FREE}
    assign.restore(backend=host)
    assert host.snapshot() == before


def test_every_backend_has_a_journal_of_its_own(state_dir):
    host = Host()
    assert journal.path(host) == state_dir / "sim.json"
    host.url = "unix:/run/a b"
    assert journal.path(host) == state_dir / "unix%3A%2Frun%2Fa%20b.json"


@pytest.mark.parametrize(
    ("uid", "environment", "expected"),
    [
        (0, {"XDG_RUNTIME_DIR": "/run/user/0"}, "/run/vfio"),
        (4321, {"XDG_RUNTIME_DIR": "/run/user/4321"}, "/run/user/4321/vfio"),
        (4321, {"HOME": "/home/alice"}, "/home/alice/.local/state/vfio"),
        (4321, {"HOME": "/home/alice", "VFIO_STATE_DIR": "/elsewhere"}, "/elsewhere"),
    ],
)
def test_where_the_journals_are(monkeypatch, uid, environment, expected):
    for name in ("XDG_RUNTIME_DIR", "HOME", "VFIO_STATE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.geteuid", lambda: uid)
    assert str(journal.directory()) == expected


def test_the_trace_of_a_backend_shares_its_journal(host, state_dir):
    told = io.StringIO()
    assign.bind([DISK], backend=TraceBackend(host, TextTrace(told)))
    assert "drivers_probe" in told.getvalue()
    assert list(journal.load(host).devices) == [DISK]
