"""What the tests of assignment and of the command share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from sysfs_host import Driver, Function, SysfsHost

from vfio import backend as backends
from vfio import journal


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for journals that is this test's own."""
    directory = tmp_path / "state"
    monkeypatch.setenv(journal.DIRECTORY, str(directory))
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    return directory


def power_host() -> SysfsHost:
    """A POWER host: a card of two functions with a network driver, a disk, a device without a driver, and bridges."""
    return SysfsHost(
        Function("0000:00:00.0", "pcieport", bridge=True),
        Function("0000:01:00.0", "tg3", group=7, id=(0x14E4, 0x1657), parent="0000:00:00.0"),
        Function("0000:01:00.1", "tg3", group=7, id=(0x14E4, 0x1657), parent="0000:00:00.0"),
        Function("0001:00:00.0", "pcieport", group=2, bridge=True),
        Function("0001:01:00.0", "nvme", group=2, id=(0x1B36, 0x0010), parent="0001:00:00.0"),
        Function("0002:00:00.0", group=3, override="other"),
        drivers=(
            Driver("pcieport", harmless=True),
            Driver("tg3", {(0x14E4, 0x1657)}),
            Driver("nvme", {(0x1B36, 0x0010)}),
        ),
    )


@pytest.fixture
def host() -> SysfsHost:
    return power_host()


@pytest.fixture
def vfio(host: SysfsHost, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command, run on `host`."""
    from vfio_cli.main import cli

    monkeypatch.setattr("vfio.backend.open_backend", lambda url=None: host)
    return lambda *words: CliRunner().invoke(cli, words, prog_name="vfio")


@pytest.fixture
def vfio_json(vfio: Callable[..., Result]) -> Callable[..., object]:
    """What the command prints with --json."""

    def run(*words: str) -> object:
        result = vfio(*words, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return run
