"""A host becomes what a plan says, all or nothing, and once is enough."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from fake_host import Driver, Function, Host
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio import apply, assign, errors, export, journal
from vfio import desired as desiring
from vfio.apply import Record
from vfio.desired import Desired, DesiredDevice

CARD = ["0000:01:00.0", "0000:01:00.1"]
DISK = "0001:01:00.0"
FREE = "0002:00:00.0"


@pytest.fixture
def host() -> Host:
    return arranged()


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    return tmp_path / "etc"


def arranged() -> Host:
    return Host(
        Function("0000:00:00.0", "pcieport", bridge=True, below=1),
        Function(CARD[0], "tg3", group=7, id=(0x14E4, 0x1657)),
        Function(CARD[1], "tg3", group=7, id=(0x14E4, 0x1657)),
        Function(DISK, "nvme", group=2, id=(0x1B36, 0x0010), device_class=0x010802),
        Function(FREE, group=3, override="other"),
        drivers=(Driver("pci-stub"), Driver("special_vfio_pci", vfio=True)),
    )


def plan(*devices: DesiredDevice) -> Desired:
    return Desired(devices)


def content(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def drivers(host: Host, *addresses: str) -> list[str | None]:
    return [host.devices[address].driver for address in addresses]


# --- comparing ---


def test_compare_tells_what_differs_and_changes_nothing(host):
    before = host.snapshot()
    found = apply.compare(plan(DesiredDevice(address=DISK, owner="4321:77", mode=0o660)), host)
    assert (found.changed, found.done) == (True, False)
    assert found.records() == [
        Record(
            "device",
            DISK,
            {"driver": "nvme", "driver_override": "none"},
            {"driver": "vfio-pci", "driver_override": "vfio-pci"},
        ),
        Record("node", "/dev/vfio/2", {"owner": "root:root", "mode": "0600"}, {"owner": "4321:77", "mode": "0660"}),
    ]
    assert found.diff() == [
        f"--- {DISK}",
        f"+++ {DISK}",
        "@@ -1,2 +1,2 @@",
        "-driver: nvme",
        "-driver_override: none",
        "+driver: vfio-pci",
        "+driver_override: vfio-pci",
        "--- /dev/vfio/2",
        "+++ /dev/vfio/2",
        "@@ -1,2 +1,2 @@",
        "-owner: root:root",
        "-mode: 0600",
        "+owner: 4321:77",
        "+mode: 0660",
    ]
    assert found.shell() == [
        f"echo vfio-pci > /sys/bus/pci/devices/{DISK}/driver_override",
        f"echo {DISK} > /sys/bus/pci/drivers/nvme/unbind",
        f"echo {DISK} > /sys/bus/pci/drivers_probe",
        "chown 4321:77 /dev/vfio/2",
        "chmod 0660 /dev/vfio/2",
    ]
    assert (host.changes, host.snapshot()) == ([], before)
    assert not journal.path(host).exists()


def test_apply_with_check_only_compares(host):
    found = apply.apply(plan(DesiredDevice(address=DISK)), host, check=True)
    assert (found.changed, found.done, host.changes) == (True, False, [])


def test_an_empty_plan_changes_nothing(host):
    done = apply.apply(plan(), host)
    assert done.as_dict() == {"changed": False, "done": False, "diff": [], "commands": [], "notes": []}


# --- applying ---


def test_apply_twice_changes_nothing_the_second_time(host, etc):
    wanted = plan(
        DesiredDevice(slot=None, address=CARD[0], whole_group=True, owner="4321", mode=0o640, persistent=True),
        DesiredDevice(id="1b36:0010", persistent=True),
        DesiredDevice(address=FREE, driver="pci-stub"),
    )
    first = apply.apply(wanted, host, persist_dir=etc)
    assert (first.changed, first.done) == (True, True)
    between, files, made = host.snapshot(), content(etc), len(host.changes)
    assert drivers(host, *CARD, DISK, FREE) == ["vfio-pci"] * 3 + ["pci-stub"]
    second = apply.apply(wanted, host, persist_dir=etc)
    assert (second.changed, second.done) == (False, False)
    assert (host.snapshot(), content(etc), len(host.changes)) == (between, files, made)


def test_what_was_applied_can_be_restored(host):
    before = host.snapshot()
    apply.apply(plan(DesiredDevice(id="14e4:1657", mode=0o666), DesiredDevice(address=FREE, driver="pci-stub")), host)
    assign.restore(backend=host)
    assert host.snapshot() == before
    assert not journal.path(host).exists()


def test_owner_and_mode_of_a_device_that_is_on_vfio_already(host):
    assign.bind([DISK], user="55:66", backend=host)
    apply.apply(plan(DesiredDevice(address=DISK, mode=0o660)), host)
    node = host.nodes[2]
    assert (node.uid, node.gid, node.mode) == (55, 66, 0o660)
    assign.restore(backend=host)
    assert drivers(host, DISK) == ["nvme"]


def test_none_takes_a_device_from_any_driver(host):
    assign.bind([CARD[0]], backend=host)
    done = apply.apply(plan(DesiredDevice(id="14e4:1657", driver="none")), host)
    assert drivers(host, *CARD) == [None, None]
    assert [record.after["driver"] for record in done.records()] == ["none", "none"]
    assert not apply.apply(plan(DesiredDevice(id="14e4:1657", driver="none")), host).changed
    assign.restore(backend=host)
    assert drivers(host, *CARD) == ["tg3", "tg3"]


def test_another_driver_by_name(host):
    apply.apply(plan(DesiredDevice(address=DISK, driver="pci-stub")), host)
    assert (host.devices[DISK].driver, host.devices[DISK].driver_override) == ("pci-stub", "pci-stub")


def test_host_is_the_driver_that_the_journal_knows(host):
    before = host.snapshot()
    apply.apply(plan(DesiredDevice(address=DISK), DesiredDevice(address=FREE)), host)
    host_again = plan(DesiredDevice(address=DISK, driver="host"), DesiredDevice(address=FREE, driver="host"))
    done = apply.apply(host_again, host)
    assert {record.name: record.after["driver"] for record in done.records()} == {DISK: "nvme", FREE: "none"}
    assert host.snapshot() == before
    assert not journal.path(host).exists()
    assert not apply.apply(host_again, host).changed


def test_host_is_whichever_driver_the_kernel_finds_where_the_journal_knows_none(host):
    host.move(DISK, "vfio-pci", override="vfio-pci")
    wanted = plan(DesiredDevice(address=DISK, driver="host"))
    done = apply.apply(wanted, host)
    assert done.records()[0].after == {"driver": "host", "driver_override": "none"}
    assert done.shell()[-1] == f"echo {DISK} > /sys/bus/pci/drivers_probe"
    assert (host.devices[DISK].driver, host.devices[DISK].driver_override) == ("nvme", None)
    assert not apply.apply(wanted, host).changed
    assert not journal.path(host).exists()


def test_a_variant_of_vfio_pci_counts_as_vfio_pci(host):
    host.move(DISK, "special_vfio_pci", override="special_vfio_pci")
    assert not apply.compare(plan(DesiredDevice(address=DISK)), host).changed


def test_from_vfio_pci_to_a_variant_the_new_node_gets_its_owner(host):
    assign.bind([DISK], user="4321", backend=host)
    wanted = plan(DesiredDevice(address=DISK, driver="special_vfio_pci", owner="4321"))
    apply.apply(wanted, host)
    assert (host.devices[DISK].driver, host.nodes[2].uid) == ("special_vfio_pci", 4321)
    assert not apply.apply(wanted, host).changed


def test_from_vfio_pci_to_a_variant_one_after_another_the_node_stays_and_changes_its_mode(host):
    apply.apply(plan(DesiredDevice(id="14e4:1657", mode=0o660)), host)
    node = host.nodes[7]
    wanted = plan(DesiredDevice(id="14e4:1657", driver="special_vfio_pci", mode=0o600))
    apply.apply(wanted, host)
    assert host.nodes[7] is node
    assert node.mode == 0o600
    assert not apply.apply(wanted, host).changed


def test_in_a_group_that_gains_and_loses_a_device_the_node_stays(host):
    assign.bind([CARD[0]], user="4321", backend=host)
    node = host.nodes[7]
    apply.apply(
        plan(DesiredDevice(address=CARD[0], driver="none"), DesiredDevice(address=CARD[1], owner="root", mode=0o600)),
        host,
    )
    assert drivers(host, *CARD) == [None, "vfio-pci"]
    assert host.nodes[7] is node
    assert node.uid == 0


def test_a_group_that_is_not_viable_yet_is_a_note(host):
    done = apply.apply(plan(DesiredDevice(address=CARD[0])), host)
    assert done.notes == [f"group 7 is not viable yet: {CARD[1]} is on tg3; free it:  vfio bind {CARD[1]}"]


def test_a_device_without_driver_override_goes_to_vfio_pci_by_its_id():
    host = Host(Function(DISK, "nvme", group=2, id=(0x1B36, 0x0010), overridable=False))
    before = host.snapshot()
    apply.apply(plan(DesiredDevice(address=DISK)), host)
    assert drivers(host, DISK) == ["vfio-pci"]
    apply.apply(plan(DesiredDevice(address=DISK, driver="host")), host)
    assert host.snapshot() == before


# --- what is refused ---


def test_a_driver_that_is_not_loaded_is_refused_before_anything_changes(host):
    with pytest.raises(errors.ModuleMissing, match="modprobe mlx5_core"):
        apply.apply(plan(DesiredDevice(address=FREE), DesiredDevice(address=DISK, driver="mlx5_core")), host)
    assert host.changes == []


def test_a_device_in_use_is_refused_unless_forced(host):
    host.disk("nvme0n1", DISK, "259:0", mounted=("/",))
    for driver in ("vfio-pci", "none", "pci-stub"):
        with pytest.raises(errors.Refused, match="vfio apply --force"):
            apply.compare(plan(DesiredDevice(address=DISK, driver=driver)), host)
    assert host.changes == []
    assert apply.apply(plan(DesiredDevice(address=DISK, driver="none")), host, force=True).done


def test_a_device_that_a_process_has_open_stays_and_nothing_else_changes(host):
    assign.bind([DISK], backend=host)
    host.changes.clear()
    end = host.hold(77, "qemu", 2)
    wanted = plan(DesiredDevice(address=CARD[0]), DesiredDevice(address=DISK, driver="host"))
    with pytest.raises(errors.Busy, match="pid 77 "):
        apply.apply(wanted, host, wait=0.1)
    assert host.changes == []
    end()
    assert apply.apply(wanted, host).done


def test_persistence_on_a_host_that_is_not_this_one_needs_a_directory(host):
    with pytest.raises(errors.Refused) as raised:
        apply.compare(plan(DesiredDevice(address=DISK, persistent=True)), host)
    assert "sim: is not the kernel of this host, so that /etc is not its own" in raised.value.why
    assert "--config-dir DIR" in raised.value.remedy
    with pytest.raises(errors.Refused):
        apply.forget(host)


# --- failures ---


def much() -> Desired:
    """Moves of every kind, in a host that `arranged_much` made."""
    return plan(
        DesiredDevice(address=CARD[0], owner="4321:77", mode=0o660),
        DesiredDevice(address=CARD[1], driver="none"),
        DesiredDevice(address=DISK, driver="host", persistent=False),
        DesiredDevice(address=FREE, owner="88", persistent=True),
    )


def arranged_much(etc: Path) -> Host:
    host = arranged()
    apply.apply(plan(DesiredDevice(address=DISK, persistent=True)), host, persist_dir=etc)
    host.move(CARD[1], "vfio-pci", override="vfio-pci")
    node = host.nodes[7]
    node.uid, node.gid, node.mode = 55, 66, 0o640
    host.changes.clear()
    return host


CHANGES_OF_MUCH = 14
"""Overrides, unbinds and probes of four devices, and two owners and one mode of nodes."""


def test_a_plan_makes_as_many_changes_as_the_failures_below_assume(etc):
    host = arranged_much(etc)
    apply.apply(much(), host, persist_dir=etc)
    assert len(host.changes) == CHANGES_OF_MUCH


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
@pytest.mark.parametrize("nth", range(CHANGES_OF_MUCH))
def test_a_failure_at_any_change_puts_everything_back_and_says_what(etc, nth, number):
    host = arranged_much(etc)
    before, files, book = host.snapshot(), content(etc), journal.path(host).read_text()
    host.fault = lambda n: number if n == nth else 0
    with pytest.raises(errors.RolledBack) as raised:
        apply.apply(much(), host, persist_dir=etc)
    assert raised.value.errno == number
    assert f"put back as before: {', '.join(raised.value.names)}" in raised.value.remedy
    assert str(etc / "udev/rules.d/60-vfio-assign.rules") in raised.value.names
    assert (host.snapshot(), content(etc)) == (before, files)
    assert journal.path(host).read_text() == book
    host.fault = lambda n: 0
    assert apply.apply(much(), host, persist_dir=etc).done
    assert not apply.apply(much(), host, persist_dir=etc).changed


@pytest.mark.parametrize("nth", range(1, CHANGES_OF_MUCH))
def test_when_putting_back_fails_too_the_journal_knows_what_is_left(etc, nth):
    host = arranged_much(etc)
    host.fault = lambda n: errno.EIO if n >= nth else 0
    with pytest.raises(errors.NotPutBack) as raised:
        apply.apply(much(), host, persist_dir=etc)
    assert raised.value.failures
    host.fault = lambda n: 0
    assign.restore(backend=host)
    assert drivers(host, CARD[0], DISK, FREE) == ["tg3", "nvme", None]
    assert not journal.path(host).exists()


def test_a_call_that_the_kernel_refuses_rolls_back(host):
    before = host.snapshot()
    host.machine.hooks.fail("probe vfio-pci", errno.ENOMEM, nth=3)
    host.machine.hooks.fail("probe vfio-pci", errno.ENOMEM, nth=4)
    with pytest.raises(errors.RolledBack) as raised:
        apply.apply(plan(DesiredDevice(id="14e4:1657"), DesiredDevice(address=DISK)), host)
    assert raised.value.errno == errno.ENOMEM
    assert raised.value.names == (*CARD, DISK)
    assert host.snapshot() == before


def test_files_that_cannot_be_written_change_nothing(host, tmp_path, monkeypatch):
    etc = tmp_path / "etc"
    apply.apply(plan(DesiredDevice(address=FREE, persistent=True)), host, persist_dir=etc)
    before, files, made = host.snapshot(), content(etc), len(host.changes)

    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(errno.EACCES, "Permission denied", str(target))

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setenv(journal.DIRECTORY, str(tmp_path / "other"))  # empty, so that it needs no file to be replaced
    with pytest.raises(errors.RolledBack, match="only root may do that") as raised:
        apply.apply(plan(DesiredDevice(address=FREE, mode=0o600, persistent=True)), host, persist_dir=etc)
    assert raised.value.remedy == "run it with sudo\n  nothing had been changed"
    monkeypatch.undo()
    assert (host.snapshot(), len(host.changes)) == (before, made)
    assert content(etc) == files


def test_a_directory_that_is_a_file_is_refused(host, tmp_path):
    (tmp_path / "etc").write_text("a file, not a directory")
    with pytest.raises(errors.CallFailed, match="Not a directory"):
        apply.apply(plan(DesiredDevice(address=DISK, persistent=True)), host, persist_dir=tmp_path / "etc")
    assert host.changes == []


def test_a_change_raced_by_another_program_is_seen_under_the_lock(host, monkeypatch):
    """Between the comparison that decides and the lock, somebody else binds the device."""
    locked = journal.locked

    def raced(backend: Host) -> object:
        host.move(DISK, "vfio-pci", override="vfio-pci")
        return locked(backend)

    monkeypatch.setattr(journal, "locked", raced)
    done = apply.apply(plan(DesiredDevice(address=DISK), DesiredDevice(address=FREE)), host)
    assert [record.name for record in done.records()] == [FREE]
    assert drivers(host, DISK, FREE) == ["vfio-pci", "vfio-pci"]


# --- the plan of a host as it is ---


def arrangements() -> dict[str, Desired]:
    return {
        "nothing": plan(),
        "owner and mode": plan(DesiredDevice(id="14e4:1657", owner="4321:77", mode=0o660)),
        "other drivers": plan(
            DesiredDevice(address=DISK, driver="special_vfio_pci"), DesiredDevice(id="14e4:1657", driver="pci-stub")
        ),
        "no driver": plan(DesiredDevice(address=DISK, driver="none", persistent=True)),
        "persistent with an owner": plan(DesiredDevice(id="14e4:1657", owner="4321", persistent=True)),
        "persistent with a mode": plan(DesiredDevice(address=DISK, mode=0o666, persistent=True)),
        "persistent as it is": plan(DesiredDevice(address=DISK, persistent=True)),
    }


@pytest.mark.parametrize("name", arrangements())
@pytest.mark.parametrize("everything", [False, True])
def test_an_exported_plan_changes_nothing_and_brings_a_restored_host_back(host, etc, name, everything):
    apply.apply(arrangements()[name], host, persist_dir=etc)
    arranged, files = host.snapshot(), content(etc)
    text = export.toml(export.export(host, everything=everything, persist_dir=etc), host)
    exported = desiring.parse(text)
    assert not apply.compare(exported, host, persist_dir=etc).changed
    assign.restore(backend=host)
    apply.forget(host, persist_dir=etc)
    apply.apply(exported, host, persist_dir=etc)
    assert host.snapshot() == arranged
    if not any(each.id for each in arrangements()[name].devices):
        assert content(etc) == files


@pytest.mark.parametrize("everything", [False, True])
def test_export_where_the_next_boot_makes_it_something_else(host, etc, everything):
    apply.apply(plan(DesiredDevice(id="14e4:1657", persistent=True)), host, persist_dir=etc)
    assign.restore(backend=host)
    host.unplug(DISK)
    exported = export.export(host, everything=everything, persist_dir=etc)
    assert [(each.driver, each.persistent) for each in exported.devices[:2]] == [("tg3", None)] * 2
    assert not apply.compare(desiring.parse(export.toml(exported, host)), host, persist_dir=etc).changed


def test_a_persistent_device_that_is_unplugged_is_optional_in_the_exported_plan(host, etc):
    apply.apply(plan(DesiredDevice(address=DISK, persistent=True)), host, persist_dir=etc)
    host.unplug(DISK)
    exported = export.export(host, persist_dir=etc)
    assert exported.devices == (DesiredDevice(address=DISK, persistent=True, optional=True),)
    assert not apply.compare(exported, host, persist_dir=etc).changed


def test_in_a_group_the_rule_of_a_device_says_only_what_its_own_entry_says(host, etc):
    wanted = plan(DesiredDevice(address=CARD[0], owner="4321"), DesiredDevice(address=CARD[1], persistent=True))
    apply.apply(wanted, host, persist_dir=etc)
    assert "OWNER" not in (etc / "udev/rules.d/60-vfio-assign.rules").read_text()
    exported = export.export(host, persist_dir=etc)
    assert [each.owner for each in exported.devices] == ["4321:root", None]
    assert not apply.compare(exported, host, persist_dir=etc).changed


def test_an_exported_plan_is_readable(host, etc):
    apply.apply(plan(DesiredDevice(address=DISK, mode=0o66, owner="4321", persistent=True)), host, persist_dir=etc)
    assert export.toml(export.export(host, persist_dir=etc)).splitlines() == [
        "# The assignments of this host, as a plan.  To have them again: vfio apply THIS-FILE",
        "",
        "[[device]]",
        f'address = "{DISK}"',
        'driver = "vfio-pci"',
        'owner = "4321"',
        "mode = 0o066",
        "persistent = true",
    ]


# --- any plan at all ---


@st.composite
def _entry(draw: st.DrawFn, address: str) -> DesiredDevice:
    driver = draw(st.sampled_from(["vfio-pci", "vfio-pci", "special_vfio_pci", "pci-stub", "none", "host"]))
    on_vfio = "vfio" in driver
    return DesiredDevice(
        address=address,
        driver=driver,
        whole_group=draw(st.booleans()),
        owner=draw(st.sampled_from([None, "4321", "0:0", "88:77"])) if on_vfio else None,
        mode=draw(st.sampled_from([None, 0o600, 0o660])) if on_vfio else None,
        persistent=draw(st.sampled_from([False, True, None])),
    )


_plans = st.lists(st.sampled_from([*CARD, DISK, FREE]), unique=True).flatmap(
    lambda addresses: st.tuples(*map(_entry, addresses))
)


def fits(host: Host, etc: Path, wanted: Desired) -> bool:
    try:
        apply.compare(wanted, host, persist_dir=etc)
    except errors.BadPlan:
        return False  # two entries for a group want different things
    return True


@settings(max_examples=60, deadline=None)
@given(plans=st.lists(_plans, min_size=1, max_size=3), fault=st.integers(0, 20))
def test_any_plan_is_applied_once_rolled_back_whole_exported_and_restored(tmp_path_factory, plans, fault):
    host, etc = arranged(), tmp_path_factory.mktemp("etc")
    journal.path(host).unlink(missing_ok=True)
    initial = host.snapshot()
    for devices in plans:
        wanted = Desired(devices)
        if not fits(host, etc, wanted):
            continue
        before, files, start = host.snapshot(), content(etc), len(host.changes)
        host.fault = lambda n, nth=start + fault: errno.EIO if n == nth else 0
        try:
            apply.apply(wanted, host, persist_dir=etc)
        except errors.RolledBack:
            assert (host.snapshot(), content(etc)) == (before, files)
        host.fault = lambda n: 0
        apply.apply(wanted, host, persist_dir=etc)
        assert not apply.apply(wanted, host, persist_dir=etc).changed
        exported = desiring.parse(export.toml(export.export(host, everything=True, persist_dir=etc)))
        assert not apply.compare(exported, host, persist_dir=etc).changed
    assign.restore(backend=host)
    assert host.snapshot() == initial
    assert not journal.path(host).exists()
