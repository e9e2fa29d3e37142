"""vfio demo: the story on modelled machines, as text and as data; what stops it, and that nothing is left then."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from vfio_cli import demo
from vfio_cli.main import cli

from vfio import assign, errors, sysfs
from vfio import backend as backends
from vfio.fake.backend import FakeBackend

EDU = "0000:01:00.0"
NEIGHBOUR = "0000:01:00.1"
GROUP = [EDU, NEIGHBOUR]
NVME = "0002:01:00.0"
MACHINES = {"power8": EDU, "power9": EDU, "power10": EDU, "pseries": "0000:00:00.0", "power8?page_size=65536": EDU}


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, words, prog_name="vfio")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    """The machine that the command gets when it opens fake:power8."""
    made = backends.open_backend("fake:power8")
    assert isinstance(made, FakeBackend)
    monkeypatch.setattr(backends, "open_backend", lambda url=None: made)
    return made


@pytest.fixture
def as_it_was(machine: FakeBackend, state_dir: Path) -> Callable[[], bool]:
    """Whether the machine is as it was before the test, with nothing open or charged, and no journal anywhere."""
    before = sysfs.devices(machine)

    def compare() -> bool:
        assert machine.leaks() == []
        assert machine.locked().locked == 0
        assert not state_dir.exists()
        return sysfs.devices(machine) == before

    return compare


def lines_of(result: Result) -> list[str]:
    return [line.strip() for line in result.stdout.splitlines()]


# --- The story ---


def test_without_a_backend_it_runs_on_power8_and_says_so():
    result = run("demo")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("vfio demo on fake:power8 (the default of the demo), a machine modelled in ")


def test_the_backend_is_that_of_the_option_or_of_the_environment(monkeypatch):
    assert run("--backend", "fake:pseries", "demo").stdout.startswith("vfio demo on fake:pseries, a machine modelled")
    assert run("demo", "--backend", "fake:power9").stdout.startswith("vfio demo on fake:power9, a machine modelled")
    monkeypatch.setenv(backends.ENVIRONMENT, "fake:power10")
    assert run("demo").stdout.startswith("vfio demo on fake:power10, a machine modelled")


def test_it_is_plain_text_that_fits_a_page(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    result = run("demo")
    assert "\x1b" not in result.stdout
    lines = result.stdout.splitlines()
    assert len(lines) < 65
    assert max(map(len, lines)) <= 100
    assert [line for line in lines if line[0].isdigit()] == [
        "1. What is there",
        f"2. Why {EDU} cannot be opened yet",
        "3. Bind its group: 2 devices that the IOMMU cannot tell apart",
        "4. Open it: container, group, device, and a driver for it",
        "5. DMA windows: the default one, and one far above 4 GiB",
        "6. DMA through the default window, there and back",
        "7. DMA through the 64-bit window, with the same memory",
        "8. An interrupt",
        "9. Back to how it was",
    ]


@pytest.mark.parametrize("name", MACHINES)
def test_each_machine_with_dynamic_windows_moves_data_through_both_and_is_left_as_it_was(name):
    result = run("demo", "--backend", f"fake:{name}")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = lines_of(result)
    assert f"$ vfio bind {MACHINES[name]} --group" in lines
    assert lines.count("b'below 4 GiB'") == 1
    assert lines.count("b'above 4 GiB'") == 1
    assert lines[-4:] == [
        ">>> sysfs.group_devices(backend, 0) == before, backend.locked() == locked",
        "(True, True)",
        ">>> backend.leaks()",
        "[]",
    ]


def test_a_machine_without_dynamic_windows_has_the_story_of_its_one_window():
    result = run("demo", "--backend", "fake:power7")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = lines_of(result)
    assert "5. The DMA window" in lines
    assert any("POWER7 (PowerNV, IODA1) has no Dynamic DMA Windows" in line for line in lines)
    assert "b'below 4 GiB'" in lines
    assert "b'above 4 GiB'" not in lines
    assert lines[-1] == "[]"


def test_a_pc_has_the_story_of_its_ranges():
    result = run("demo", "--backend", "fake:x86")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = lines_of(result)
    assert "[('0x0', '0xfedfffff'), ('0xfef00000', '0x7fffffffff')]" in lines
    assert "<Dma IOVA 0x7fffff0000..0x8000000000>" in lines
    assert lines.count("b'below 4 GiB'") == lines.count("b'above 4 GiB'") == 1
    assert lines[-1] == "[]"


def test_a_pamu_has_the_story_of_its_aperture():
    result = run("demo", "--backend", "fake:p4080")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = lines_of(result)
    assert "(<Group 0>, 'Freescale PAMU (only modelled: no kernel ever merged it)'," in "".join(lines)
    assert "b'by windows'" in lines
    assert lines[-1] == "[]"


def test_any_edu_of_the_machine_can_be_named():
    result = run("demo", "0001:01:00.0")
    assert result.exit_code == 0
    assert "$ vfio restore 0001:01:00.0" in lines_of(result)


def test_the_commands_print_what_they_print_when_they_are_typed():
    lines = run("demo").stdout.splitlines()
    begin = lines.index("   $ vfio list") + 1
    typed = run("list", "--backend", "fake:power8").stdout.splitlines()
    assert lines[begin : begin + len(typed)] == [f"   {line}" for line in typed]


def test_the_lines_of_python_are_a_program():
    told = [line.strip() for line in run("demo").stdout.splitlines() if line.startswith("   >>> ")]
    backend = backends.open_backend("fake:power8")
    names: dict[str, object] = {"backend": backend}
    with assign.bound([EDU], backend=backend):
        for line in told:
            if "== before" not in line:  # that is after the restore
                exec(line.removeprefix(">>> "), names)
        assert backend.leaks() == []


def test_it_leaves_nothing_on_the_disk_and_needs_no_place_for_a_journal(state_dir, tmp_path, monkeypatch):
    state_dir.write_text("in the way of a directory")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run("demo").exit_code == 0
    assert list(tmp_path.iterdir()) == [state_dir]
    assert os.environ["VFIO_STATE_DIR"] == str(state_dir)


def test_it_can_be_traced():
    result = run("demo", "--trace")
    assert result.exit_code == 0
    assert "VFIO_IOMMU_MAP_DMA" in result.stderr
    assert result.stdout.splitlines()[-1].strip() == "(True, True)"


# --- As data ---


def test_json_has_the_steps_with_what_commands_give_as_json():
    result = run("demo", "--json", "--backend", "fake:power8")
    assert (result.exit_code, result.stderr) == (0, "")
    told = json.loads(result.stdout)
    assert (told["backend"], told["address"], told["passed"]) == ("fake:power8", EDU, True)
    assert len(told["steps"]) == 9
    done = [each for step in told["steps"] for each in step["done"]]
    (bound,) = [each["result"] for each in done if each.get("command") == f"vfio bind {EDU} --group"]
    assert [device["address"] for device in bound["devices"]] == GROUP
    (high,) = [each["result"] for each in done if each.get("python") == "high[4096:4107]"]
    assert high == repr(b"above 4 GiB")


def test_json_of_a_story_that_failed_ends_where_it_did(machine, as_it_was):
    machine.machine.hooks.fail("VFIO_IOMMU_MAP_DMA", errno.ENOMEM)
    result = run("demo", "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["passed"] is False
    assert told["steps"][-1]["done"] == [{"python": "low = device.iommu.map(buffer); low", "result": None}]
    assert json.loads(result.stderr)["error"]["errno"] == "ENOMEM"
    assert as_it_was()


# --- What fails is undone ---


@pytest.mark.parametrize(
    ("kind", "nth", "step"),
    [
        ("write_text", 2, 3),
        ("write_text", 4, 3),
        ("VFIO_GROUP_SET_CONTAINER", 1, 4),
        ("VFIO_GROUP_GET_DEVICE_FD", 1, 4),
        ("VFIO_IOMMU_SPAPR_TCE_CREATE", 1, 5),
        ("VFIO_IOMMU_SPAPR_REGISTER_MEMORY", 1, 5),
        ("VFIO_IOMMU_MAP_DMA", 1, 6),
        ("VFIO_IOMMU_MAP_DMA", 2, 7),
        ("VFIO_DEVICE_SET_IRQS", 1, 8),
        ("VFIO_IOMMU_SPAPR_TCE_REMOVE", 1, 9),
        ("write_text", 6, 9),
    ],
)
def test_a_call_that_fails_stops_the_story_and_all_is_undone(machine, as_it_was, kind, nth, step):
    machine.machine.hooks.fail(kind, errno.EIO, nth)
    result = run("demo")
    assert result.exit_code == 1
    assert result.exception is None or isinstance(result.exception, SystemExit)
    first, second, *_ = result.stderr.splitlines()
    assert first == f"vfio: stopped at step {step}, and undone: {EDU}, {NEIGHBOUR} as before"
    assert second.startswith("vfio: ")
    assert f"{step}. " in result.stdout
    assert f"{step + 1}. " not in result.stdout
    assert as_it_was()


def test_data_that_comes_back_changed_fails_with_both_values(machine, as_it_was, monkeypatch):
    monkeypatch.setattr(demo.Edu, "store", lambda self, iova, length: None)
    result = run("demo")
    assert result.exit_code == 1
    zeros = bytes(11)
    assert f"vfio: the demo failed at step 6: low[4096:4107] gives {zeros!r}, not b'below 4 GiB' [EIO]" in result.stderr
    assert as_it_was()


def test_an_edu_with_28_bits_of_address_fails_at_the_64_bit_window_and_says_why():
    result = run("demo", "--backend", "fake:example?freeze=0")
    assert result.exit_code == 1
    assert "vfio: the demo failed at step 7: high[4096:4107] gives b'below 4 GiB', not b'above 4 GiB'" in result.stderr
    assert result.stderr.splitlines()[-1].strip().startswith("an edu has 28 bits of address")


def test_dma_that_freezes_the_pe_says_so():
    result = run("demo", "--backend", "fake:example")
    assert result.exit_code == 1
    assert "stopped at step 7, and undone" in result.stderr
    assert "0002:00:00.0 does not answer: its registers read all ones: its PE is frozen" in result.stderr


def test_an_interrupt_at_the_keyboard_is_undone(machine, as_it_was, monkeypatch):
    def interrupted(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.Edu, "interrupt", interrupted)
    result = run("demo")
    assert result.exit_code == 1
    assert as_it_was()


def test_what_cannot_be_undone_is_told_with_the_way_out(machine, monkeypatch):
    def refused(wanted: list[str], backend: backends.Backend) -> None:
        raise errors.NotRestored([(EDU, errors.Busy("group 0 is in use", []))])

    machine.machine.hooks.fail("VFIO_IOMMU_MAP_DMA", errno.ENOMEM)
    monkeypatch.setattr(assign, "restore", refused)
    result = run("demo")
    assert result.exit_code == 1
    assert "and not everything could be put back: 0000:01:00.0: group 0 is in use" in result.stderr
    assert "vfio restore --all tries again" in result.stderr


# --- What is refused before anything is changed ---


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["zz"], 2, "'zz' is not a PCI address"),
        ([EDU, NEIGHBOUR], 2, "unexpected extra argument"),
        (["0009:01:00.0"], 1, "no device 0009:01:00.0: it is not in sysfs"),
        ([NVME], 1, f"cannot show the way with {NVME}: it is 1b36:0010, and no edu (1234:11e8)"),
        (["0000:00:00.0"], 1, "cannot show the way with 0000:00:00.0: it is 1014:03dc, and no edu (1234:11e8)"),
    ],
)
def test_a_device_that_it_cannot_be_shown_with_is_refused(machine, as_it_was, words, status, message):
    result = run("demo", *words)
    assert (result.exit_code, result.stdout) == (status, "")
    assert message in result.stderr
    assert as_it_was()


def test_a_machine_without_an_edu_is_refused():
    result = run("demo", "--backend", "fake:document")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "fake:document has no edu device" in result.stderr


def test_a_group_that_is_assigned_already_is_refused_and_stays_so(machine):
    with assign.bound([NEIGHBOUR], whole_group=False, backend=machine):
        result = run("demo", EDU)
        assert (result.exit_code, result.stdout) == (1, "")
        assert f"{NEIGHBOUR} is assigned already" in result.stderr
        assert sysfs.driver_of(machine, NEIGHBOUR) == "vfio-pci"


def test_who_may_not_bind_is_told_so_at_that_step():
    result = run("demo", "--backend", "fake:power8?uid=1000")
    assert result.exit_code == 1
    assert "only root may do that" in result.stderr
    assert "4. " not in result.stdout


# --- On a kernel ---


@pytest.fixture
def kernel(machine: FakeBackend) -> FakeBackend:
    """The modelled machine under the name of the real kernel."""
    machine.url = "kernel:"
    return machine


def test_a_kernel_has_to_be_told_which_device(kernel, as_it_was):
    result = run("demo", "--backend", "kernel:")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "on 'kernel:' say which device: the ADDRESS of an edu" in result.stderr
    assert as_it_was()


def test_on_a_kernel_the_journal_is_the_users(kernel, state_dir):
    before = sysfs.devices(kernel)
    result = run("demo", EDU, "--backend", "kernel:")
    assert (result.exit_code, result.stderr) == (0, "")
    assert [path.name for path in state_dir.iterdir()] == ["kernel.lock"]
    assert sysfs.devices(kernel) == before
    assert kernel.leaks() == []


def test_on_a_kernel_a_device_that_the_journal_knows_is_refused(kernel):
    assign.bind([NEIGHBOUR], backend=kernel)
    kernel.write_text("/sys/bus/pci/drivers/vfio-pci/unbind", NEIGHBOUR)  # its override stays, for the journal to mend
    before = sysfs.devices(kernel)
    result = run("demo", EDU, "--backend", "kernel:")
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"{NEIGHBOUR} is assigned already" in result.stderr
    assert sysfs.devices(kernel) == before
