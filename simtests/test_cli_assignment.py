"""vfio bind, unbind, restore: output, exit status, dry runs, refusals."""

from __future__ import annotations

import errno
import json

import pytest

DISK = "0001:01:00.0"
FREE = "0002:00:00.0"


def test_bind_and_restore(vfio, host):
    before = host.snapshot()
    result = vfio("bind", DISK, "--group", "--user", "4321")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        f"{DISK}: nvme -> vfio-pci",
        "/dev/vfio/2: belongs to 4321:root, mode 0600",
    ]
    result = vfio("restore", "--all")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [f"{DISK}: vfio-pci -> nvme"]
    assert host.snapshot() == before


def test_addresses_may_be_short(vfio, host):
    assert vfio("bind", "1:1:0.0").exit_code == 0
    assert host.devices[DISK].driver == "vfio-pci"


def test_bind_says_when_the_group_is_not_viable_yet(vfio):
    result = vfio("bind", "0000:01:00.0")
    assert result.exit_code == 0
    assert result.stderr == (
        "vfio: group 7 is not viable yet: 0000:01:00.1 is on tg3; free it:  vfio bind 0000:01:00.1\n"
    )


def test_bind_again_has_nothing_to_change(vfio):
    vfio("bind", DISK)
    assert vfio("bind", DISK).stdout == "nothing to change\n"
    assert vfio("bind", DISK, "--dry-run").stdout == "# nothing to change\n"


def test_a_dry_run_is_a_shell_script(vfio, host):
    result = vfio("bind", DISK, "--user", "4321", "--dry-run")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"echo vfio-pci > /sys/bus/pci/devices/{DISK}/driver_override",
        f"echo {DISK} > /sys/bus/pci/drivers/nvme/unbind",
        f"echo {DISK} > /sys/bus/pci/drivers_probe",
        "chown 4321:root /dev/vfio/2",
    ]
    assert host.changes == []


def test_unbind_and_its_dry_run(vfio, host):
    vfio("bind", DISK)
    assert vfio("unbind", DISK, "--dry-run").stdout.splitlines() == [
        f"echo {DISK} > /sys/bus/pci/drivers/vfio-pci/unbind",
        f"echo > /sys/bus/pci/devices/{DISK}/driver_override",
    ]
    assert vfio("unbind", DISK).stdout == f"{DISK}: vfio-pci -> no driver\n"
    assert vfio("restore", DISK, "--dry-run").stdout.splitlines() == [
        f"echo nvme > /sys/bus/pci/devices/{DISK}/driver_override",
        f"echo {DISK} > /sys/bus/pci/drivers_probe",
        f"echo > /sys/bus/pci/devices/{DISK}/driver_override",
    ]


def test_bind_as_json(vfio_json):
    assert vfio_json("bind", DISK, "--user", "4321:77") == {
        "dry_run": False,
        "devices": [{"address": DISK, "group": 2, "from": "nvme", "to": "vfio-pci"}],
        "nodes": [{"path": "/dev/vfio/2", "uid": 4321, "gid": 77, "mode": "0600"}],
        "commands": [
            f"echo vfio-pci > /sys/bus/pci/devices/{DISK}/driver_override",
            f"echo {DISK} > /sys/bus/pci/drivers/nvme/unbind",
            f"echo {DISK} > /sys/bus/pci/drivers_probe",
            "chown 4321:77 /dev/vfio/2",
        ],
        "notes": [],
    }


def test_a_disk_in_use_is_refused_with_the_reason_and_the_way_out(vfio, host):
    host.disk("nvme0n1", DISK, "259:0", mounted=("/",))
    result = vfio("bind", DISK)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        f"vfio: cannot bind {DISK}: the host has it in use: {DISK}: disk nvme0n1 is mounted on / [EBUSY]",
        "  put it out of use first (umount, swapoff, ip link set ... down), or insist: vfio bind --force",
    ]
    assert vfio("bind", DISK, "--dry-run").exit_code == 1
    assert host.changes == []
    assert vfio("bind", DISK, "--force").exit_code == 0


def test_an_unprivileged_user_is_told_to_use_sudo(vfio, host):
    host.process.uid = 4321
    result = vfio("bind", DISK)
    assert result.exit_code == 1
    first, second = result.stderr.splitlines()
    assert first.startswith(f"vfio: echo vfio-pci > /sys/bus/pci/devices/{DISK}/driver_override: only root may do that")
    assert first.endswith("[EACCES]")
    assert second == "  run it with sudo"


def test_unbind_of_a_held_device_names_the_process(vfio, host):
    vfio("bind", DISK)
    host.hold(77, "qemu -M pseries", 2)
    result = vfio("unbind", DISK, "--wait", "0.1")
    assert result.exit_code == 1
    assert result.stderr.startswith("vfio: group 2 is in use: held by pid 77 (qemu -M pseries) [EBUSY]\n")
    assert host.devices[DISK].driver == "vfio-pci"


def test_an_error_as_json(vfio, host):
    vfio("bind", DISK)
    host.hold(77, "qemu", 2)
    result = vfio("unbind", DISK, "--json")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert json.loads(result.stderr) == {
        "error": {
            "class": "Busy",
            "errno": "EBUSY",
            "what": "group 2 is in use",
            "why": "held by pid 77 (qemu)",
            "remedy": "end that process, or wait for it: --wait SECONDS",
        }
    }


def test_an_oserror_that_is_not_ours_is_a_message_too(vfio, host):
    def broken(path: str) -> list[str]:
        raise OSError(errno.EIO, "Input/output error", path)

    host.listdir = broken  # type: ignore[method-assign]
    result = vfio("list")
    assert result.exit_code == 1
    assert result.stderr == "vfio: /sys/bus/pci/devices: Input/output error [EIO]\n"
    assert json.loads(vfio("list", "--json").stderr)["error"]["errno"] == "EIO"


def test_restore_reports_every_device_that_could_not_be_restored(vfio, host):
    vfio("bind", DISK, FREE)
    host.hold(77, "qemu", 2)
    result = vfio("restore", "--all")
    assert result.exit_code == 1
    assert f"{DISK}: group 2 is in use: held by pid 77 (qemu)" in result.stderr
    assert result.stderr.rstrip().endswith("the journal keeps what is left: vfio restore --all tries again")
    assert host.devices[FREE].driver is None


def test_restore_with_nothing_to_restore(vfio):
    assert vfio("restore", "--all").exit_code == 0
    assert vfio("restore", DISK).exit_code == 0


@pytest.mark.parametrize("words", [["restore"], ["restore", "--all", DISK]])
def test_restore_takes_addresses_or_all(vfio, words):
    result = vfio(*words)
    assert result.exit_code == 2
    assert "name the devices to restore, or say --all" in result.stderr


def test_a_note_of_an_unplugged_device(vfio, host):
    vfio("bind", DISK)
    host.unplug(DISK)
    result = vfio("restore", "--all")
    assert result.exit_code == 0
    assert result.stderr == f"vfio: {DISK} is not there any more: there is nothing to restore\n"
