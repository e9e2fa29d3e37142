"""vfio window plan."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result
from vfio_cli.main import cli

import vfio
from vfio import assign
from vfio.fake.backend import FakeBackend

EDU = "0000:01:00.0"
GIB = 1 << 30
Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr("vfio.backend.open_backend", _nobody)
    return lambda *words: CliRunner().invoke(cli, ["window", "plan", *words], prog_name="vfio")


def _nobody(url: str | None = None) -> None:
    raise AssertionError("a plan for platforms opens no backend")


def on_machine(url: str, *words: str, bind: bool = True) -> tuple[FakeBackend, Result]:
    backend = vfio.open_backend(url)
    assert isinstance(backend, FakeBackend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vfio.backend.open_backend", lambda url=None: backend)
        address = next(device.address for device in backend.machine.topology.devices if device.model == "edu")
        if bind:
            assign.bind([address], backend=backend, whole_group=True)
        return backend, CliRunner().invoke(cli, ["window", "plan", address, *words], prog_name="vfio")


def on_this_host(url: str, *words: str) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VFIO_BACKEND", url)
        return CliRunner().invoke(cli, ["window", "plan", *words], prog_name="vfio")


def by_page_and_levels(result: Result, machine: int = 0) -> dict[tuple[int, int], dict[str, object]]:
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["machines"][machine]["windows"]
    return {(each["page_size"], each["levels"]): each for each in found}


def test_plan_tells_tables_and_charges_of_every_page_size_and_level(run: Run) -> None:
    found = by_page_and_levels(run("--size", "64G", "--platform", "power8", "--json"))
    assert sorted(found) == [(page, n) for page in (4096, 65536, 16 << 20, 256 << 20) for n in (1, 2, 3, 4, 5)]
    assert found[4096, 2]["charged_bytes"] == 262208 << 10  # as measured on a POWER8 kernel
    assert found[4096, 2]["table_bytes"] == 131104 << 10
    assert found[4096, 2]["allowed"] is True
    assert found[4096, 1]["allowed"] is False
    assert "16 MiB in one piece" in str(found[4096, 1]["why_not"])
    assert found[4096, 5]["allowed"] is False
    assert found[65536, 1]["charged_bytes"] == 16 << 20


def test_host_page_changes_the_charge(run: Run) -> None:
    words = ("--size", "64G", "--platform", "power8", "--host-page", "64K", "--json")
    assert by_page_and_levels(run(*words))[4096, 2]["charged_bytes"] == 262272 << 10


def test_papr_guest_has_one_level_and_one_copy(run: Run) -> None:
    found = by_page_and_levels(run("--size", "1G", "--platform", "pseries", "--json"))
    assert {levels for _, levels in found} == {1}
    assert found[4096, 1]["charged_bytes"] == found[4096, 1]["table_bytes"] == 2 << 20


def test_a_machine_that_is_no_power_host_plans_for_all_platforms() -> None:
    result = on_this_host("fake:x86", "--size", "64G")
    assert (result.exit_code, result.stderr) == (0, "")
    for name in ("power8", "power9", "power10", "pseries", "power7"):
        assert f"{name}, " in result.stdout
    assert "a window of 64 GiB" in result.stdout
    assert "no Dynamic DMA Windows" in result.stdout.split("power7, ")[1]


def test_window_smaller_than_a_page_is_not_allowed(run: Run) -> None:
    found = by_page_and_levels(run("--size", "1M", "--platform", "power8", "--json"))
    assert found[16 << 20, 1]["allowed"] is False
    assert found[16 << 20, 1]["why_not"] == "1 MiB are less than one page of 16 MiB"


@pytest.mark.parametrize(("text", "value"), [("64G", 64 * GIB), ("64GiB", 64 * GIB), ("0x1000000000", 64 * GIB)])
def test_sizes(run: Run, text: str, value: int) -> None:
    assert json.loads(run("--size", text, "--platform", "power8", "--json").stdout)["size"] == value


@pytest.mark.parametrize(
    "text", ["", "x", "-4K", "0", "3G", "4095", "2K", "16E", "1.5G", "64Q", "0x", "1" * 30, "\u0664G", "64 G"]
)
def test_bad_size_is_a_usage_error(run: Run, text: str) -> None:
    for more in ((), ("--json",)):
        result = run(f"--size={text}", *more)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--size", "64G", "--platform", "x86"),
        ("--size", "64G", "--host-page", "8K"),
        ("--size", "64G", EDU, "--platform", "power8"),
        ("--size", "64G", EDU, "--host-page", "4K"),
        ("--size", "64G", "nothing"),
    ],
)
def test_bad_words_are_usage_errors(run: Run, words: tuple[str, ...]) -> None:
    result = run(*words)
    assert (result.exit_code, result.stdout) == (2, "")


def test_with_an_address_the_machine_is_asked_and_nothing_is_reset_or_left() -> None:
    backend, result = on_machine("fake:power9?page_size=65536", "--size", "64G", "--json")
    found = by_page_and_levels(result)
    assert {page for page, _ in found} == {4096, 65536, 2 << 20, GIB}
    assert found[4096, 2]["charged_bytes"] == 262272 << 10
    assert found[4096, 2]["allowed"] is True
    assert backend.machine.hooks.calls["VFIO_GROUP_GET_DEVICE_FD"] == 0
    assert backend.machine.hooks.calls["VFIO_IOMMU_SPAPR_TCE_CREATE"] == 0
    assert backend.leaks() == []


def test_plan_of_a_machine_is_what_creating_the_window_is_charged() -> None:
    backend, result = on_machine("fake:power8", "--size", "1G", "--json")
    found = by_page_and_levels(result)
    with vfio.open_device(EDU, backend) as device:
        assert isinstance(device.iommu, vfio.SpaprTceV2)
        device.iommu.windows[0].close()
        for page, levels in ((4096, 1), (4096, 3), (65536, 1), (16 << 20, 2)):
            assert found[page, levels]["allowed"] is True
            with device.iommu.create_window(GIB, page, levels):
                assert backend.locked().locked == found[page, levels]["charged_bytes"]


def test_limit_of_locked_memory_is_counted() -> None:
    _, result = on_machine("fake:power8?ipc_lock=0&memlock=8388608", "--size", "16G", "--json")
    found = by_page_and_levels(result)
    assert found[65536, 1]["allowed"] is True
    assert found[4096, 2]["why_not"] == "RLIMIT_MEMLOCK is 8 MiB, of which 0 bytes are in use"


def test_firmware_of_a_papr_guest_is_counted() -> None:
    _, result = on_machine("fake:pseries", "--size", "1T")
    assert "no: the firmware refuses more than this partition's memory" in result.stdout


def test_without_an_address_this_host_is_judged_by_what_its_platform_is_known_for() -> None:
    for preset, pages in (("power8", [4096, 65536, 16 << 20, 256 << 20]), ("power9", [4096, 65536, 2 << 20, GIB])):
        result = on_this_host(f"fake:{preset}", "--size", "64G", "--json")
        assert [machine["machine"] for machine in json.loads(result.stdout)["machines"]] == [
            f"this machine, {preset.upper()} (PowerNV)"
        ]
        assert sorted(by_page_and_levels(result)) == [(page, n) for page in pages for n in (1, 2, 3, 4, 5)]


def test_without_an_address_the_host_page_the_limit_and_the_firmware_of_this_host_count() -> None:
    limited = on_this_host("fake:power8?page_size=65536&ipc_lock=0&memlock=8388608", "--size", "64G", "--json")
    found = by_page_and_levels(limited)
    assert found[4096, 2]["charged_bytes"] == 262272 << 10
    assert found[4096, 2]["why_not"] == "RLIMIT_MEMLOCK is 8 MiB, of which 0 bytes are in use"
    assert found[16 << 20, 1]["allowed"] is True
    guest = by_page_and_levels(on_this_host("fake:pseries", "--size", "64G", "--json"))
    assert guest[65536, 1]["why_not"] == "the firmware refuses more than this partition's memory"
    assert (
        "this machine, POWER7 (PowerNV, IODA1), 4 KiB host pages" in on_this_host("fake:power7", "--size", "1G").stdout
    )


def test_power7_says_that_its_window_is_fixed() -> None:
    _, result = on_machine("fake:power7", "--size", "1G")
    assert result.exit_code == 0
    why = "POWER7 (PowerNV, IODA1) has no Dynamic DMA Windows: its one window is fixed (sPAPR TCE v1)"
    assert why in result.stdout


def test_pc_has_no_windows() -> None:
    _, result = on_machine("fake:x86", "--size", "1G")
    assert (result.exit_code, result.stdout.splitlines()[1]) == (0, "  Type1v2 has no DMA windows of sPAPR")


def test_device_that_cannot_be_opened_is_an_error() -> None:
    _, result = on_machine("fake:power8", "--size", "1G", bind=False)
    assert result.exit_code == 1
    assert result.stderr.startswith("vfio: ")
