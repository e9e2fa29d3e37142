"""The log of a freeze, for a person and as JSON."""

from __future__ import annotations

import errno
import json

import pytest
from eeh_setting import DISK, EDU, Recorder, Setting, setting

from vfio import eeh, errors, pci

__all__ = ["setting"]  # a fixture, found here by name


def test_the_log_survives_json(setting: Setting, tmp_path: object) -> None:
    setting.freeze()
    log = setting.recover(Recorder([]), noticed="a test froze it")
    path = f"{tmp_path}/freeze.json"
    log.save(path)
    loaded = eeh.Log.load(path)
    assert loaded == log
    assert str(loaded) == str(log)
    assert json.loads(json.dumps(log.as_dict()))["devices"][0]["reasons"] == []


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"version": 2}', '{"version": 1, "devices": [], "steps": []}', '{"version": 1, "devices": 3}'],
)
def test_a_file_that_is_no_log_is_an_error(tmp_path: object, content: str) -> None:
    path = f"{tmp_path}/freeze.json"
    with open(path, "w") as file:
        file.write(content)
    with pytest.raises(errors.CallFailed, match="cannot read the log") as caught:
        eeh.Log.load(path)
    assert caught.value.errno == errno.EINVAL


def test_the_log_tells_a_person_what_froze_and_what_was_done(setting: Setting) -> None:
    setting.freeze()
    text = str(setting.recover(noticed="a register read all ones"))
    assert text.splitlines()[0] == f"PHB#1-PE#fd ({EDU}) froze, and was recovered"
    for line in (
        "  freezes   1 in the last hour, 5 are allowed",
        "  noticed   a register read all ones",
        "  state     STOPPED -> NORMAL by a hot reset",
        "  in sysfs  eeh_mode 0x200, eeh_pe_config_addr 0xfd, eeh_pe_state 0x00000000 0x00000801",
        f"why, as {EDU} 1234:11e8 tells",
        f"  {EDU} command 0x0102 -> 0x0106",
        f"configuration space of {EDU} at the freeze",
        "  000: 34 12 e8 11 06 01 10 00 10 00 ff 00 00 00 00 00",
    ):
        assert line in text.splitlines()


def express(status: int = 0, device_status: int = 0, uncorrectable: int = 0, correctable: int = 0) -> str:
    """Configuration space of a PCI Express function with AER, in hex."""
    image = pci.Image(bytes(4096))
    for offset, width, value in (
        (0x00, 4, 0x0010_1B36),
        (0x06, 2, 0x10 | status),
        (0x34, 1, 0x40),
        (0x40, 2, 0x0010),
        (0x42, 2, 0x0002),
        (0x4A, 2, device_status),
        (0x100, 4, 0x0002_0001),
        (0x104, 4, uncorrectable),
        (0x10C, 4, 0x0004_2030),
        (0x110, 4, correctable),
        (0x118, 4, 18),
        (0x11C, 4, 0x4000_0001),
    ):
        image.write(offset, value.to_bytes(width, "little"))
    return bytes(image.data).hex()


@pytest.mark.parametrize(
    ("registers", "reasons"),
    [
        ({}, []),
        ({"status": 0x2000}, ["status 0x2010: an access of its own was answered by nobody"]),
        (
            {"status": 0xC100},
            ["status 0xc110: parity error while it was master, signalled a system error, parity error"],
        ),
        ({"device_status": 0x5}, ["PCI Express device status 0x0005: correctable error, fatal error"]),
        (
            {"uncorrectable": 0x0005_0000},
            [
                "AER uncorrectable status 0x00050000, fatal: unexpected completion, malformed packet (the first)",
                "  the packet that failed: 40000001 00000000 00000000 00000000",
            ],
        ),
        (
            {"uncorrectable": 0x4000},
            [
                "AER uncorrectable status 0x00004000, not fatal: completion timeout",
                "  the packet that failed: 40000001 00000000 00000000 00000000",
            ],
        ),
        ({"correctable": 0x1000}, ["AER correctable status 0x00001000: replay timeout"]),
    ],
)
def test_error_registers_are_said_in_words(registers: dict[str, int], reasons: list[str]) -> None:
    assert eeh.DeviceLog(DISK, express(**registers)).reasons == reasons


def test_configuration_space_that_could_not_be_read_is_said() -> None:
    assert eeh.DeviceLog(DISK, unreadable="No such device").reasons == [
        "configuration space could not be read: No such device"
    ]
