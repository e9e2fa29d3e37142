"""What the tests of assignment and of the command share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from fake_host import Host, power_host

from vfio import backend as backends
from vfio import journal


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for journals that is this test's own."""
    directory = tmp_path / "state"
    monkeypatch.setenv(journal.DIRECTORY, str(directory))
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    return directory


@pytest.fixture
def host() -> Host:
    return power_host()


@pytest.fixture
def vfio(host: Host, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
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
