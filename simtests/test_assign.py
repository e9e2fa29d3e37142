"""Bind, unbind and restore: what they change, what they refuse, and that they put everything back."""

from __future__ import annotations

import errno
import os
import threading

import pytest
from fake_host import Driver, Function, Host, power_host

from vfio import assign, errors, journal, owner
from vfio.fake.driver import DeviceId

CARD = ["0000:01:00.0", "0000:01:00.1"]
DISK = "0001:01:00.0"
FREE = "0002:00:00.0"


def drivers(host: Host) -> dict[str, str | None]:
    return {address: device.driver for address, device in host.devices.items()}


# --- bind ---


def test_bind_takes_a_device_from_its_driver(host):
    assign.bind([DISK], backend=host)
    assert host.devices[DISK].driver == "vfio-pci"
    assert host.devices[DISK].driver_override == "vfio-pci"
    assert host.nodes[2].mode == 0o600
    assert host.changes == [
        f"/sys/bus/pci/devices/{DISK}/driver_override",
        "/sys/bus/pci/drivers/nvme/unbind",
        "/sys/bus/pci/drivers_probe",
    ]


def test_bind_of_one_function_leaves_its_neighbour_and_says_that_the_group_is_not_viable(host):
    plan = assign.bind(CARD[:1], backend=host)
    assert host.devices[CARD[1]].driver == "tg3"
    assert plan.notes == [f"group 7 is not viable yet: {CARD[1]} is on tg3; free it:  vfio bind {CARD[1]}"]


def test_bind_of_a_whole_group_leaves_bridges_alone(host):
    plan = assign.bind([DISK], whole_group=True, backend=host)
    assert plan.notes == []
    assert host.devices["0001:00:00.0"].driver == "pcieport"
    assign.bind(CARD[1:], whole_group=True, backend=host)
    assert [host.devices[address].driver for address in CARD] == ["vfio-pci", "vfio-pci"]


def test_bind_twice_changes_nothing_the_second_time(host):
    assign.bind([DISK], user="4321", backend=host)
    changes = list(host.changes)
    plan = assign.bind([DISK, "1:1:0.0"], user="4321", backend=host)
    assert plan.moves == []
    assert plan.gifts == []
    assert host.changes == changes


def test_a_device_on_a_variant_driver_stays_there():
    host = Host(Function("0000:00:01.0", "mlx5_vfio", group=1), drivers=(Driver("mlx5_vfio", vfio=True),))
    assign.bind(["0000:00:01.0"], backend=host)
    assert host.devices["0000:00:01.0"].driver == "mlx5_vfio"


@pytest.mark.parametrize(("user", "expected"), [("4321", (4321, 0)), ("4321:77", (4321, 77)), ("root:root", (0, 0))])
def test_bind_gives_the_node_to_a_user_and_keeps_its_mode(host, user, expected):
    assign.bind([DISK], user=user, backend=host)
    assert (host.nodes[2].uid, host.nodes[2].gid) == expected
    assert host.nodes[2].mode == 0o600


@pytest.mark.parametrize("user", ["no-such-user", "", "-1", "4294967295", "root:no-such-group", "root:", "a b", "0x0"])
def test_a_user_that_is_none_is_refused_before_anything_is_changed(host, user):
    with pytest.raises(errors.NoSuchUser) as raised:
        assign.bind([DISK], user=user, backend=host)
    assert raised.value.errno == errno.EINVAL
    assert host.changes == []


def test_owner_is_a_name_or_a_number():
    assert owner.parse("root") == (0, None)
    assert owner.parse("0:0") == (0, 0)


@pytest.mark.parametrize("text", ["../../x", "0000:01:00.0/../../x", "", "0000:01:00.0;reboot", "/", "0000:01:00.0\n"])
@pytest.mark.parametrize("change", [assign.bind, assign.unbind, assign.restore])
def test_what_is_not_an_address_is_refused(host, change, text):
    with pytest.raises(errors.InvalidAddress):
        change([text], backend=host)
    assert host.changes == []


def test_a_bridge_is_refused(host):
    with pytest.raises(errors.IsBridge):
        assign.bind(["0001:00:00.0"], backend=host)


def test_a_device_without_group_is_refused():
    host = Host(Function("0000:00:01.0"))
    with pytest.raises(errors.NoGroup):
        assign.bind(["0000:00:01.0"], backend=host)


def test_a_device_that_is_not_there_is_refused_and_the_others_stay(host):
    with pytest.raises(errors.NoSuchDevice):
        assign.bind([DISK, "0009:00:00.0"], backend=host)
    assert host.changes == []


def test_without_vfio_pci_the_error_names_the_module(host):
    host.machine.driver_core.unload("vfio-pci")
    with pytest.raises(errors.ModuleMissing) as raised:
        assign.bind([DISK], backend=host)
    assert raised.value.remedy == "modprobe vfio-pci"
    assert host.changes == []


def test_an_unprivileged_user_is_told_who_may(host, state_dir):
    host.process.uid = 4321
    before = host.snapshot()
    with pytest.raises(errors.NotPrivileged) as raised:
        assign.bind([DISK], backend=host)
    assert raised.value.errno == errno.EACCES
    assert raised.value.remedy == "run it with sudo"
    assert host.snapshot() == before
    assert not journal.path(host).exists()


# --- refused, because the host has it in use ---


def mounted(host: Host) -> str:
    host.disk("nvme0n1", DISK, "259:0", mounted=("/",))
    return f"{DISK}: disk nvme0n1 is mounted on /"


def swap(host: Host) -> str:
    host.disk("nvme0n1", DISK, "259:0", swap=True)
    return f"{DISK}: disk nvme0n1 is swap"


def under_md(host: Host) -> str:
    host.disk("nvme0n1", DISK, "259:0", holders=("md0",))
    return f"{DISK}: disk nvme0n1 is in use by md0"


def interface_up(host: Host) -> str:
    host.network("eth0", DISK, up=True)
    return f"{DISK}: network interface eth0 is up"


@pytest.mark.parametrize("use", [mounted, swap, under_md, interface_up])
def test_a_device_that_the_host_uses_is_refused_unless_forced(host, use):
    why = use(host)
    with pytest.raises(errors.Refused) as raised:
        assign.bind([DISK], backend=host)
    assert raised.value.errno == errno.EBUSY
    assert raised.value.why == why
    assert host.changes == []
    assign.bind([DISK], force=True, backend=host)
    assert host.devices[DISK].driver == "vfio-pci"


def test_a_whole_group_is_refused_for_one_device_of_it(host):
    host.network("eth1", CARD[1], up=True)
    with pytest.raises(errors.Refused):
        assign.bind(CARD[:1], whole_group=True, backend=host)
    assign.bind(CARD[:1], backend=host)  # alone it is free to go
    assert host.devices[CARD[0]].driver == "vfio-pci"


# --- the kernel refuses ---


def test_a_kernel_before_6_4_on_power_is_named(host):
    host.host.release = "6.1.0-44-powerpc64le"
    before = host.snapshot()
    with pytest.raises(errors.KernelTooOld) as raised:
        assign.bind([DISK], backend=host)
    assert raised.value.errno == errno.EINVAL
    assert "6.1.0-44-powerpc64le" in raised.value.why
    assert host.snapshot() == before


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EAGAIN, errno.EIO])
def test_a_failed_probe_tells_the_errno_that_drivers_probe_hides(host, number):
    for nth in (1, 2):  # that of drivers_probe, and that of bind
        host.machine.hooks.fail("probe vfio-pci", number, nth)
    before = host.snapshot()
    with pytest.raises(errors.CallFailed) as raised:
        assign.bind([DISK], backend=host)
    assert raised.value.errno == number
    assert host.snapshot() == before


def test_restore_of_a_driver_while_the_group_is_in_use_names_the_user(host):
    assign.bind(CARD, backend=host)
    assign.unbind(CARD[:1], backend=host)
    host.hold(77, "qemu", 7, device=CARD[1])
    with pytest.raises(errors.NotRestored) as raised:
        assign.restore(CARD[:1], backend=host)
    ((address, error),) = raised.value.failures
    assert address == CARD[0]
    assert isinstance(error, errors.Busy)
    assert error.holders == ((77, "qemu"),)


# --- new_id, where there is no driver_override ---


def test_without_driver_override_the_id_is_lent_to_vfio_pci():
    host = Host(Function("0000:00:01.0", "edu", group=1, overridable=False))
    before = host.snapshot()
    assign.bind(["0000:00:01.0"], backend=host)
    assert host.devices["0000:00:01.0"].driver == "vfio-pci"
    assert host.drivers["vfio-pci"].dynamic_ids == []
    assign.restore(backend=host)
    assert host.snapshot() == before


def test_an_id_that_would_bring_another_device_along_is_refused():
    other = Function("0000:00:02.0", group=2, overridable=False)
    host = Host(Function("0000:00:01.0", group=1, overridable=False), other)
    with pytest.raises(errors.Refused) as raised:
        assign.bind(["0000:00:01.0"], backend=host)
    assert raised.value.remedy == "bind that one too: vfio bind 0000:00:01.0 0000:00:02.0"
    assert host.changes == []
    assign.bind(["0000:00:01.0", "0000:00:02.0"], backend=host)
    assert host.devices[other.address].driver == "vfio-pci"


def test_an_id_that_vfio_pci_has_already_stays():
    host = Host(Function("0000:00:01.0", group=1, overridable=False))
    host.drivers["vfio-pci"].dynamic_ids.append(DeviceId(0x1234, 0x11E8, 0x1AF4, 0x1100))
    before = host.snapshot()
    assign.bind(["0000:00:01.0"], backend=host)
    assert host.devices["0000:00:01.0"].driver == "vfio-pci"
    assign.restore(backend=host)
    assert host.snapshot() == before


def test_an_id_left_by_a_crash_is_taken_back_by_restore():
    host = Host(Function("0000:00:01.0", group=1, overridable=False))
    before = host.snapshot()

    with journal.locked(host) as book:  # as bind leaves it when it is killed between new_id and remove_id
        book.devices["0000:00:01.0"] = journal.DeviceState("0000:00:01.0", 1, None, None, "1234 11e8 1af4 1100")
        book.save()
    host.write_text("/sys/bus/pci/drivers/vfio-pci/new_id", "1234 11e8 1af4 1100\n")
    assert host.devices["0000:00:01.0"].driver == "vfio-pci"
    assign.restore(backend=host)
    assert host.snapshot() == before


# --- unbind ---


def test_unbind_frees_the_device_and_restore_brings_back_its_first_driver(host):
    before = host.snapshot()
    assign.bind([DISK], backend=host)
    assign.unbind([DISK], backend=host)
    assert (host.devices[DISK].driver, host.devices[DISK].driver_override) == (None, None)
    assert host.nodes == {}
    assign.restore([DISK], backend=host)
    assert host.snapshot() == before


def test_unbind_of_a_free_device_changes_nothing_but_our_override(host):
    assign.unbind([FREE], backend=host)
    assert host.changes == []  # its override is not ours
    host.devices[FREE].driver_override = "vfio-pci"
    assign.unbind([FREE], backend=host)
    assert host.devices[FREE].driver_override is None


def test_unbind_of_a_device_on_another_driver_is_refused(host):
    with pytest.raises(errors.Refused) as raised:
        assign.unbind([DISK], backend=host)
    assert raised.value.errno == errno.EINVAL
    assert host.changes == []


def test_unbind_of_a_device_that_somebody_holds_is_refused_and_names_the_process(host):
    assign.bind([DISK], backend=host)
    release = host.hold(77, "qemu -M pseries", 2, device=DISK)  # an unbind would now block
    with pytest.raises(errors.Busy) as raised:
        assign.unbind([DISK], backend=host)
    assert raised.value.errno == errno.EBUSY
    assert raised.value.holders == ((77, "qemu -M pseries"),)
    assert host.devices[DISK].driver == "vfio-pci"
    release()
    assign.unbind([DISK], backend=host)
    assert host.devices[DISK].driver is None


def test_unbind_waits_for_the_process(host):
    assign.bind([DISK], backend=host)
    release = host.hold(77, "qemu", 2)
    timer = threading.Timer(0.3, release)
    timer.start()
    assign.unbind([DISK], wait=60, backend=host)
    timer.join()
    assert host.devices[DISK].driver is None


def test_nobody_can_open_the_group_while_it_is_unbound(host):
    assign.bind([DISK], backend=host)

    answers = []

    def somebody_opens(n: int) -> int:
        try:
            host.open("/dev/vfio/2", os.O_RDWR)
        except OSError as error:
            answers.append(error.errno)
        return 0

    host.fault = somebody_opens
    assign.unbind([DISK], backend=host)
    assert answers == [errno.EBUSY, errno.ENOENT]  # at the unbind, and at the override after it


def test_restore_after_an_unbind_of_what_we_did_not_bind_brings_back_the_owner():
    host = Host(Function("0000:00:01.0", "vfio-pci", group=1, override="vfio-pci"))
    host.nodes[1].uid, host.nodes[1].mode = 4321, 0o660
    before = host.snapshot()
    assign.unbind(["0000:00:01.0"], backend=host)
    assert host.nodes == {}
    assign.restore(backend=host)
    assert host.snapshot() == before


# --- restore ---


def test_restore_all_is_exact(host):
    before = host.snapshot()
    assign.bind([*CARD, DISK, FREE], user="4321:77", backend=host)
    assert host.snapshot() != before
    assign.restore(backend=host)
    assert host.snapshot() == before
    assert not journal.path(host).exists()


def test_restore_of_one_device_leaves_the_others_and_their_node(host):
    assign.bind(CARD, user="4321", backend=host)
    assign.restore(CARD[:1], backend=host)
    assert (host.devices[CARD[0]].driver, host.devices[CARD[1]].driver) == ("tg3", "vfio-pci")
    assert host.nodes[7].uid == 4321
    assign.restore(CARD[1:], backend=host)
    assert host.nodes == {}
    assert not journal.path(host).exists()


def test_restore_gives_a_node_back_that_was_there_before():
    host = Host(Function("0000:00:01.0", "vfio-pci", group=1, override="vfio-pci"), Function("0000:00:01.1", group=1))
    host.nodes[1].gid, host.nodes[1].mode = 107, 0o660
    before = host.snapshot()
    assign.bind(["0000:00:01.0"], whole_group=True, user="4321", backend=host)
    assert (host.nodes[1].uid, host.nodes[1].gid, host.nodes[1].mode) == (4321, 107, 0o660)
    assign.restore(backend=host)
    assert host.snapshot() == before


def test_restore_of_the_node_alone():
    host = Host(Function("0000:00:01.0", "vfio-pci", group=1))
    before = host.snapshot()
    assign.bind(["0000:00:01.0"], user="4321", backend=host)
    assign.restore(["0000:00:01.0"], backend=host)
    assert host.snapshot() == before
    assert not journal.path(host).exists()


def test_restore_puts_back_an_override_that_was_waiting(host):
    """An override written while a device is bound has no effect until the next probe; it is kept all the same."""
    host.devices[DISK].driver_override = "other"
    before = host.snapshot()
    assign.bind([DISK], backend=host)
    assign.restore(backend=host)
    assert host.snapshot() == before


def test_restore_twice_is_harmless(host):
    assign.bind([DISK], backend=host)
    assign.restore([DISK], backend=host)
    changes = list(host.changes)
    assert assign.restore([DISK], backend=host).moves == []
    assert assign.restore(backend=host).moves == []
    assert host.changes == changes


def test_restore_of_an_address_that_never_was_is_an_error(host):
    with pytest.raises(errors.NoSuchDevice):
        assign.restore(["0009:00:00.0"], backend=host)


def test_a_device_that_was_unplugged_is_a_note_and_the_others_are_restored(host):
    assign.bind([*CARD, DISK], backend=host)
    host.unplug(DISK)
    plan = assign.restore(backend=host)
    assert plan.notes == [f"{DISK} is not there any more: there is nothing to restore"]
    assert [host.devices[address].driver for address in CARD] == ["tg3", "tg3"]
    assert not journal.path(host).exists()


def test_one_device_that_cannot_be_restored_does_not_keep_the_others_from_it(host):
    before = drivers(host)
    assign.bind([*CARD, DISK], user="4321", backend=host)
    release = host.hold(77, "qemu", 2)
    with pytest.raises(errors.NotRestored) as raised:
        assign.restore(backend=host)
    assert [address for address, _ in raised.value.failures] == [DISK]
    assert drivers(host) == before | {DISK: "vfio-pci"}
    assert host.nodes[2].uid == 4321  # it stays with its user as long as the device stays
    assert list(journal.load(host).devices) == [DISK]
    release()
    assign.restore(backend=host)
    assert drivers(host) == before


def test_restore_names_the_module_of_a_driver_that_is_gone(host):
    assign.bind([DISK], backend=host)
    host.machine.driver_core.unload("nvme")
    with pytest.raises(errors.NotRestored, match="modprobe nvme"):
        assign.restore(backend=host)
    host.machine.driver_core.load("nvme")
    assign.restore(backend=host)
    assert (host.devices[DISK].driver, host.devices[DISK].driver_override) == ("nvme", None)


def test_bound_restores_what_it_bound_and_leaves_what_was_bound(host):
    assign.bind(CARD[:1], user="4321", backend=host)
    between = host.snapshot()
    with assign.bound(CARD, backend=host):
        assert host.devices[CARD[1]].driver == "vfio-pci"
    assert host.snapshot() == between
    assert list(journal.load(host).devices) == CARD[:1]


def test_bound_restores_after_an_exception(host):
    before = host.snapshot()
    with pytest.raises(ZeroDivisionError), assign.bound([DISK], backend=host):
        raise ZeroDivisionError
    assert host.snapshot() == before


# --- dry runs ---


def test_a_dry_run_of_bind_prints_what_bind_does_and_changes_nothing(host, state_dir):
    before = host.snapshot()
    plan = assign.bind([DISK, FREE], user="4321:77", dry_run=True, backend=host)
    assert plan.shell() == [
        f"echo vfio-pci > /sys/bus/pci/devices/{DISK}/driver_override",
        f"echo {DISK} > /sys/bus/pci/drivers/nvme/unbind",
        f"echo {DISK} > /sys/bus/pci/drivers_probe",
        f"echo vfio-pci > /sys/bus/pci/devices/{FREE}/driver_override",
        f"echo {FREE} > /sys/bus/pci/drivers_probe",
        "chown 4321:77 /dev/vfio/2",
        "chown 4321:77 /dev/vfio/3",
    ]
    assert host.changes == []
    assert host.snapshot() == before
    assert not state_dir.exists()


def test_a_dry_run_needs_no_privilege(host, state_dir):
    host.process.uid = 4321
    assert len(assign.bind([DISK], user="4321", dry_run=True, backend=host).shell()) == 4
    assert not state_dir.exists()


def run(host: Host, commands: list[str]) -> None:
    """What a shell does with the commands of a dry run."""
    for command in commands:
        words = command.split()
        if words[0] == "echo":
            host.write_text(words[-1], " ".join(words[1:-2]) + "\n")
        else:
            assert words[0] == "chown"
            uid, _, gid = words[1].partition(":")
            host.chown(words[2], int(uid), 0 if gid == "root" else int(gid))


def test_the_commands_of_dry_runs_do_what_the_calls_do(host):
    other = power_host()
    before = host.snapshot()
    run(other, assign.bind([*CARD, DISK, FREE], user="4321", dry_run=True, backend=other).shell())
    assign.bind([*CARD, DISK, FREE], user="4321", backend=host)
    assert other.snapshot() == host.snapshot()
    run(other, assign.restore(dry_run=True, backend=other).shell())  # they share the journal
    assert other.snapshot() == before
