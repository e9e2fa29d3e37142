"""vfio nvme: what it prints, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from vfio_cli.main import cli
from vfio_cli.nvme import hexdump

import vfio as library
from vfio.fake.backend import FakeBackend

DISK, EDU, BLOCK = "0002:01:00.0", "0000:01:00.0", 512


@pytest.fixture
def backend() -> FakeBackend:
    made = library.open_backend("fake:power8")
    assert isinstance(made, FakeBackend)
    return made


@pytest.fixture
def nvme(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs ``vfio nvme DISK ...``, with the device bound for the duration."""
    monkeypatch.setattr("vfio.backend.open_backend", lambda url=None: backend)

    def run(*words: str, address: str = DISK, bind: bool = True, stdin: bytes | None = None) -> Result:
        words = ("nvme", address, *words, *(["--bind"] if bind else []))
        result = CliRunner().invoke(cli, words, prog_name="vfio", input=stdin)
        assert backend.leaks() == []
        return result

    return run


def disk_of(backend: FakeBackend) -> Any:
    return backend.machine.device(DISK).model.disks[1]  # type: ignore[attr-defined]


def test_identify_tells_controller_and_namespaces(nvme):
    result = nvme("identify")
    assert result.exit_code == 0
    assert result.stdout == (
        "model             QEMU NVMe Ctrl\n"
        "serial number     lab\n"
        "firmware          7.2.22\n"
        "NVM Express       1.4.0\n"
        "PCI vendor        1b36, subsystem 1af4\n"
        "write cache       volatile\n"
        "largest transfer  512 KiB\n"
        "completions by    MSI-X\n"
        "DMA through       default window 0x0..0x80000000 (2 GiB in pages of 4 KiB)\n"
        "\n"
        "NAMESPACE  SIZE    BLOCKS  BLOCK SIZE  METADATA\n"
        "1          16 MiB  32768   512 bytes   -\n"
    )


def test_identify_as_json_through_the_64_bit_window(nvme):
    found = json.loads(nvme("identify", "--json", "--window", "64", "--interrupt", "intx").stdout)
    assert found["controller"]["model"] == "QEMU NVMe Ctrl"
    assert found["controller"]["version"] == "1.4.0"
    assert [(space["number"], space["size"]) for space in found["namespaces"]] == [(1, 1 << 24)]
    assert found["driver"]["interrupt"] == "INTx"
    assert found["driver"]["window"].startswith("window 0x800000000000000..0x800000010000000")


def test_read_gives_bytes_to_a_pipe_json_and_files(nvme, backend, tmp_path: Path):
    data = os.urandom(3 * BLOCK)
    disk_of(backend).write(7 * BLOCK, data)
    assert nvme("read", "7", "3").stdout_bytes == data
    assert nvme("read", "0x8").stdout_bytes == data[BLOCK : 2 * BLOCK]
    found = json.loads(nvme("read", "7", "2", "--json").stdout)
    assert found == {"namespace": 1, "lba": 7, "blocks": 2, "block_size": BLOCK, "bytes": data[: 2 * BLOCK].hex()}
    result = nvme("read", "7", "3", "--output", str(tmp_path / "out"))
    assert (result.exit_code, result.stdout) == (0, "")
    assert "1536 bytes from LBA 7 of namespace 1 are in" in result.stderr
    assert (tmp_path / "out").read_bytes() == data


def test_read_is_hexadecimal_on_a_terminal(nvme, monkeypatch):
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    assert nvme("read", "1").stdout.splitlines() == [
        "0000000200  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|",
        "*",
        "00000003f0  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|",
    ]


def test_hexdump_shows_text_and_stars_what_repeats():
    data = b"0123456789abcdef" + bytes(48) + b"end"
    assert list(hexdump(data, 0)) == [
        "0000000000  30 31 32 33 34 35 36 37  38 39 61 62 63 64 65 66  |0123456789abcdef|",
        "0000000010  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|",
        "*",
        "0000000040  65 6e 64                                          |end|",
    ]
    assert list(hexdump(b"", 0)) == []


@pytest.mark.parametrize("words", [["write", "7", "FILE"], ["bench", "--write"]])
def test_nothing_is_written_without_the_flag_that_says_so(nvme, backend, tmp_path: Path, words):
    (tmp_path / "image").write_bytes(b"\x11" * BLOCK)
    disk_of(backend).write(0, b"\x22" * (1 << 24))
    result = nvme(*[str(tmp_path / "image") if word == "FILE" else word for word in words])
    assert result.exit_code == 2
    assert "writing destroys what is on the disk" in result.stderr
    assert "--destroy-data" in result.stderr
    assert disk_of(backend).read(0, 1 << 24) == b"\x22" * (1 << 24)


@pytest.mark.parametrize("window", ["default", "64"])
def test_write_is_read_back_and_compared(nvme, backend, tmp_path: Path, window):
    data = os.urandom(1000 * BLOCK)
    (tmp_path / "image").write_bytes(data)
    result = nvme("write", "7", str(tmp_path / "image"), "--destroy-data", "--window", window)
    assert (result.exit_code, result.stdout) == (
        0,
        "1000 blocks from LBA 7 of namespace 1 written, read back and the same\n",
    )
    assert disk_of(backend).read(7 * BLOCK, len(data)) == data
    found = json.loads(nvme("write", "0", "-", "--destroy-data", "--json", stdin=b"\x33" * BLOCK).stdout)
    assert found == {"namespace": 1, "lba": 0, "blocks": 1, "block_size": BLOCK, "verified": True}
    assert disk_of(backend).read(0, BLOCK) == b"\x33" * BLOCK


def test_disk_that_reads_otherwise_than_it_was_written_fails(nvme, backend, monkeypatch):
    disk = disk_of(backend)
    write = disk.write
    monkeypatch.setattr(disk, "write", lambda offset, data: write(offset, data[:BLOCK] + b"\xff" + data[BLOCK + 1 :]))
    result = nvme("write", "7", "-", "--destroy-data", stdin=bytes(3 * BLOCK))
    assert result.exit_code == 1
    assert "LBA 8 does not hold what was written" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["read", "x"], "'x' is no number"),
        (["read", "-5"], "No such option"),
        (["read", "32768"], "1 blocks from LBA 32768: namespace 1 has 32768 blocks"),
        (["read", "0", "0"], "0 blocks from LBA 0"),
        (["read", "0", "--namespace", "2"], "no namespace 2; there are: 1"),
        (["write", "0", "/no/such/file", "--destroy-data"], "/no/such/file"),
        (["bench", "--block-size", "100"], "blocks of 100 bytes: multiples of 512 up to 524288"),
        (["bench", "--block-size", "0x100000"], "blocks of 1048576 bytes"),
        (["bench", "--seconds", "0"], "--seconds"),
        (["bench", "--depth", "0"], "--depth"),
        (["bench", "--destroy-data"], "without --write"),
        (["identify", "--window", "32"], "--window"),
        (["identify", "--interrupt", "NMI"], "--interrupt"),
    ],
)
def test_bad_input_is_a_usage_error(nvme, words, message):
    result = nvme(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert json.loads(nvme(*words, "--json").stderr)["error"]["class"] == "Usage"


@pytest.mark.parametrize("data", [bytes(100), b""])
def test_data_that_is_no_whole_blocks_is_a_usage_error(nvme, data):
    result = nvme("write", "0", "-", "--destroy-data", stdin=data)
    assert result.exit_code == 2
    assert "no whole blocks" in result.stderr or "nothing to write" in result.stderr


def test_device_that_is_not_bound_is_told_how(nvme):
    result = nvme("identify", bind=False)
    assert result.exit_code == 1
    assert result.stderr == (
        f"vfio: {DISK} cannot be opened: it is on no driver [ENODEV]\n  vfio bind {DISK} --group\n"
    )


def test_device_that_is_no_disk_says_what_it_is(nvme):
    result = nvme("identify", address=EDU)
    assert result.exit_code == 1
    assert f"{EDU} is no NVMe controller: its class is 00ff00" in result.stderr


def test_platform_with_one_window_has_no_64_bit_one(nvme, backend):
    backend.machine.hooks.fail("VFIO_SET_IOMMU", errno.EPERM)  # v2; then v1 is tried
    result = nvme("identify", "--window", "64")
    assert result.exit_code == 1
    assert "sPAPR TCE v1 has the one window of POWER8 (PowerNV)" in result.stderr
    backend.machine.hooks.fail("VFIO_SET_IOMMU", errno.EPERM)
    assert nvme("read", "0").stdout_bytes == bytes(BLOCK)


@pytest.mark.parametrize("pattern", ["random", "sequential"])
@pytest.mark.parametrize("writes", [False, True])
def test_bench_tells_how_fast_it_was(nvme, backend, pattern, writes):
    disk_of(backend).write(0, b"\x22" * (1 << 24))
    flags = ["--write", "--destroy-data"] if writes else []
    words = ["bench", "--seconds", "0.1", "--depth", "4", "--block-size", "8192", "--pattern", pattern, *flags]
    found = json.loads(nvme(*words, "--json").stdout)
    assert (found["operation"], found["pattern"]) == ("write" if writes else "read", pattern)
    assert (found["block_size"], found["depth"], found["interrupt"]) == (8192, 4, "MSI-X")
    assert found["commands"] >= 1
    assert found["iops"] == pytest.approx(found["commands"] / found["seconds"])
    assert found["bytes_per_second"] == pytest.approx(found["iops"] * 8192)
    times = list(found["latency_seconds"].values())
    assert list(found["latency_seconds"]) == ["min", "p50", "p90", "p99", "p99.9", "max"]
    assert times == sorted(times)
    assert (disk_of(backend).read(0, 1 << 24) == b"\x22" * (1 << 24)) is not writes
    shown = nvme(*words).stdout
    assert f"{pattern} {'writes' if writes else 'reads'} of 8 KiB, 4 at a time" in shown
    for name in ("IOPS", "MB/s", "latency"):
        assert name in shown


def test_bench_of_one_moment_does_one_command(nvme):
    found = json.loads(nvme("bench", "--seconds", "1e-9", "--json").stdout)
    assert found["commands"] == 1


@pytest.mark.parametrize("command", ["identify", "read", "write", "bench"])
def test_each_has_help_with_an_example(nvme, command):
    result = nvme(command, "--help", bind=False)
    assert result.exit_code == 0
    assert f"vfio nvme 0002:01:00.0 {command}" in result.stdout
    for option in ("--window", "--interrupt", "--bind", "--json", "--backend URL", "--trace [FILE]"):
        assert option in result.stdout
