"""vfio fake, and the other commands on machines of the modelled kernel."""

from __future__ import annotations

import json
import os

import pytest
from click.testing import CliRunner, Result
from vfio_cli.main import cli

from vfio import topology

ON_POWER = os.path.exists("/proc/powerpc")


def vfio(*words: str) -> Result:
    return CliRunner().invoke(cli, words, prog_name="vfio")


CAPTURED = [name for name in topology.names() if topology.load(name).platform.name in ("PowerNV", "pSeries")]


@pytest.mark.parametrize("name", CAPTURED)
def test_a_captured_host_lists_the_same(tmp_path, name):
    captured = vfio("fake", "capture", "--backend", f"fake:{name}")
    assert (captured.exit_code, captured.stderr) == (0, "")
    file = tmp_path / "host.toml"
    file.write_text(captured.stdout)
    assert vfio("list", "--backend", f"fake:{file}").stdout == vfio("list", "--backend", f"fake:{name}").stdout
    assert topology.load(file).groups().keys() == topology.load(name).groups().keys()


def test_capture_as_json():
    found = json.loads(vfio("fake", "capture", "--backend", "fake:pseries", "--json").stdout)
    assert found["notes"] == []
    assert topology.parse(found["topology"]).platform.name == "pSeries"


@pytest.mark.skipif(ON_POWER, reason="this is POWER, which can be captured")
def test_capture_of_a_host_that_is_not_power_is_an_error_with_a_way_out():
    result = vfio("fake", "capture")
    assert (result.exit_code, result.stdout) == (1, "")
    first, second = result.stderr.splitlines()
    assert first.startswith("vfio: cannot capture this host: it is not POWER")
    assert "fake:power9" in second


def test_capture_has_help_with_an_example():
    result = vfio("fake", "capture", "--help")
    assert result.exit_code == 0
    assert "vfio fake capture > host.toml" in result.stdout


@pytest.mark.parametrize("words", [["fake", "no-such"], ["fake", "capture", "x"], ["fake", "capture", "--no-such"]])
def test_bad_input_is_a_usage_error(words):
    result = vfio(*words)
    assert result.exit_code == 2
    assert result.stdout == ""


@pytest.mark.parametrize("url", ["fake:power6", "fake:power8?page_size=1", "fake:nowhere.toml"])
def test_a_machine_that_there_is_not_is_a_usage_error(url):
    result = vfio("list", "--backend", url)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "fake:MACHINE?OPTIONS, where MACHINE is one of document, example, noiommu, p4080, power10" in result.stderr
    assert "Traceback" not in result.stderr


def test_list_of_a_machine():
    assert vfio("list", "--backend", "fake:document").stdout.splitlines() == [
        "ADDRESS       GROUP  PHB  PE    DRIVER            ID         NAME  ASSIGNABLE",
        "0000:00:1e.0  26     0    0x1a  -                 8086:244e  -     no: a bridge stays with the host",
        "0000:06:0d.0  26     0    0x1a  snd_emu10k1       1102:0002  -     yes, only together with 0000:06:0d.1 "
        "(Emu10k1_gameport)",
        "0000:06:0d.1  26     0    0x1a  Emu10k1_gameport  1102:7002  -     yes, only together with 0000:06:0d.0 "
        "(snd_emu10k1)",
    ]


def test_binding_in_use_is_refused_and_forced():
    result = vfio("bind", "0001:00:00.0", "--backend", "fake:example")
    assert result.exit_code == 1
    assert "disk nvme0n1p1 is mounted on /boot, disk nvme0n1p2 is swap" in result.stderr
    assert vfio("bind", "0001:00:00.0", "--force", "--backend", "fake:example").exit_code == 0


def test_an_unprivileged_user_is_told_who_may():
    result = vfio("bind", "0000:01:00.0", "--backend", "fake:power8?uid=1000")
    assert result.exit_code == 1
    assert "only root may do that" in result.stderr
