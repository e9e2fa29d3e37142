"""vfio list, show, why: what they print, for people and for programs."""

from __future__ import annotations

import json

import pytest
from fake_host import Host, never

DISK = "0001:01:00.0"


def test_list_is_plain_columns_in_a_pipe(vfio):
    result = vfio("list")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "ADDRESS       GROUP  PHB  PE    DRIVER    ID         NAME  ASSIGNABLE",
        "0000:00:00.0  -      -    -     pcieport  1234:11e8  -     no: a bridge stays with the host",
        "0000:01:00.0  7      0    0xfd  tg3       14e4:1657  -     yes, only together with 0000:01:00.1 (tg3)",
        "0000:01:00.1  7      0    0xfd  tg3       14e4:1657  -     yes, only together with 0000:01:00.0 (tg3)",
        "0001:00:00.0  2      1    0xfd  pcieport  1234:11e8  -     no: a bridge stays with the host",
        "0001:01:00.0  2      1    0xfd  nvme      1b36:0010  -     yes",
        "0002:00:00.0  3      2    0xfd  -         1234:11e8  -     yes",
    ]
    assert result.stderr == ""


def test_list_is_never_cut_in_a_pipe(vfio, host, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    host.network("a-network-interface-with-quite-a-long-name", "0000:01:00.0", up=True)
    assert "no: network interface a-network-interface-with-quite-a-long-name is up\n" in vfio("list").stdout


def test_list_draws_a_table_on_a_terminal(vfio, monkeypatch):
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    lines = vfio("list").stdout.splitlines()
    assert any(line.strip() and set(line.strip()) == {"─"} for line in lines)
    assert any("0001:01:00.0" in line and "nvme" in line for line in lines)


def test_list_of_a_group_and_of_a_driver(vfio, vfio_json):
    assert [each["address"] for each in vfio_json("list", "--group", "7")] == ["0000:01:00.0", "0000:01:00.1"]
    assert [each["address"] for each in vfio_json("list", "--driver", "nvme")] == [DISK]
    assert [each["address"] for each in vfio_json("list", "--driver", "none")] == ["0002:00:00.0"]
    assert vfio_json("list", "--driver", "absent") == []
    assert vfio("list", "--driver", "absent").stdout.split() == vfio("list").stdout.splitlines()[0].split()


def test_list_of_a_group_that_is_not_there_fails(vfio):
    result = vfio("list", "--group", "99")
    assert result.exit_code == 1
    assert (
        result.stderr == "vfio: cannot list group 99: there is no such group [ENOENT]\n  vfio list shows the groups\n"
    )


def test_list_as_json(vfio_json):
    assert vfio_json("list", "--driver", "nvme") == [
        {
            "address": DISK,
            "group": 2,
            "phb": 1,
            "pe": 0xFD,
            "driver": "nvme",
            "driver_override": None,
            "on_vfio": False,
            "vfio_dev": None,
            "vendor": "1b36",
            "device": "0010",
            "subsystem_vendor": "1af4",
            "subsystem_device": "1100",
            "class": "00ff00",
            "revision": "10",
            "vendor_name": None,
            "device_name": None,
            "class_name": None,
            "parent": "0001:00:00.0",
            "is_bridge": False,
            "assignable": True,
            "why": None,
        }
    ]


def test_list_has_no_pe_off_power(vfio, host):
    host.hidden |= {f"/sys/kernel/iommu_groups/{number}/name" for number in (2, 3, 7)}
    assert vfio("list").stdout.splitlines()[0].split() == ["ADDRESS", "GROUP", "DRIVER", "ID", "NAME", "ASSIGNABLE"]


def test_looking_opens_and_changes_nothing(vfio, host):
    host.move(DISK, "vfio-pci")
    never(host, "open", "close", "dup", "ioctl", "prepare", "pread", "pwrite", "mmap", "allocate", "populate")
    for words in (["list"], ["show", DISK], ["why", DISK]):
        assert vfio(*words).exit_code == 0
    assert host.changes == []


def test_show_tells_what_sysfs_says(vfio, host):
    host.network("eth0", DISK, up=True)
    result = vfio("show", DISK)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "address          0001:01:00.0",
        "id               1b36:0010",
        "subsystem        1af4:1100",
        "class            00ff00",
        "revision         10",
        "driver           nvme",
        "driver override  none",
        "bridge above     0001:00:00.0",
        "in use for       network interface eth0 is up",
        "PHB              1",
        "PE               0xfd",
        "group            2",
        "group's devices  0001:00:00.0 (bridge), 0001:01:00.0 (nvme)",
    ]


def test_show_names_what_pci_ids_knows(vfio, vfio_json, monkeypatch):
    from vfio import pciids

    text = "1b36  Red Hat, Inc.\n\t0010  QEMU NVM Express Controller\nC 00  Unclassified device\n"
    monkeypatch.setattr(pciids, "load", lambda: pciids.PciIds(text))
    assert "name             Red Hat, Inc., QEMU NVM Express Controller" in vfio("show", DISK).stdout.splitlines()
    assert "class            00ff00 Unclassified device" in vfio("show", DISK).stdout.splitlines()
    assert vfio_json("show", DISK)["device_name"] == "QEMU NVM Express Controller"
    assert "Red Hat, Inc. QEMU NVM Express Controller  yes" in vfio("list").stdout


def test_show_of_a_bound_device_tells_who_may_open_it(vfio, vfio_json, host):
    vfio("bind", DISK, "--user", "4321")
    assert "group's node     /dev/vfio/2, 4321:root 0600" in vfio("show", DISK).stdout
    found = vfio_json("show", DISK)
    assert found["node"] == {"path": "/dev/vfio/2", "uid": 4321, "gid": 0, "mode": "0600"}
    assert found["group_devices"] == [
        {"address": "0001:00:00.0", "driver": "pcieport"},
        {"address": DISK, "driver": "vfio-pci"},
    ]


def test_why_names_the_blocking_device_and_the_way_out(vfio, host):
    host.network("enP1p3s0f1", "0000:01:00.1", up=True)
    host.move("0000:01:00.0", "vfio-pci")
    result = vfio("why", "0000:01:00.0")
    assert result.exit_code == 0
    first, second = result.stdout.splitlines()[:2]
    assert first == "group 7 is not viable: 0000:01:00.1 is on tg3 (network interface enP1p3s0f1 is up)"
    assert second.startswith("  free it:  vfio bind 0000:01:00.1 --force")


def test_why_as_json(vfio_json):
    found = vfio_json("why", "0002:00:00.0")
    assert found["ready"] is False
    assert [each["class"] for each in found["obstacles"]] == ["NotBound"]
    assert found["obstacles"][0]["remedy"] == "vfio bind 0002:00:00.0 --group"


def test_why_of_a_device_that_is_ready(vfio, vfio_json, host):
    vfio("bind", DISK)
    assert vfio("why", DISK).stdout == f"{DISK} is ready to be opened by root (uid 0)\n"
    assert vfio_json("why", DISK) == {"address": DISK, "ready": True, "obstacles": []}


@pytest.mark.parametrize("command", ["show", "why"])
def test_a_device_that_is_not_there(vfio, command):
    result = vfio(command, "0000:01:00.7")
    assert result.exit_code == 1
    assert result.stderr.startswith("vfio: no device 0000:01:00.7: it is not in sysfs [ENODEV]\n  the nearest are ")


def test_show_open_warns_before_it_opens(vfio):
    result = vfio("show", DISK, "--open")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[:2] == [
        f"vfio: opening {DISK} resets it",
        f"vfio: {DISK} cannot be opened: it is on nvme [ENODEV]",
    ]


def test_json_is_one_document(vfio):
    for words in (["list"], ["show", DISK], ["why", DISK]):
        json.loads(vfio("--json", *words).stdout)


def test_an_empty_host(monkeypatch):
    from click.testing import CliRunner
    from vfio_cli.main import cli

    monkeypatch.setattr("vfio.backend.open_backend", lambda url=None: Host())
    result = CliRunner().invoke(cli, ["list"])
    assert result.exit_code == 0
    assert result.stdout.split() == ["ADDRESS", "GROUP", "DRIVER", "ID", "NAME", "ASSIGNABLE"]
