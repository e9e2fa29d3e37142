"""The lab without its machines: archives, frames, mirrors, arguments, initramfs contents."""

import io
import json
import lzma
import os
import stat
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwtests.lab import cpio, frames, image, machine, mirror, overlay, packages, qemu, targets
from hwtests.lab.errors import LabError
from vfio import topology


def archive(entries: Iterable[cpio.Entry]) -> bytes:
    stream = io.BytesIO()
    cpio.write(stream, entries)
    return stream.getvalue()


# --- cpio

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40).filter(
    lambda name: name != "TRAILER!!!"
)
ENTRIES = st.builds(
    cpio.Entry,
    name=NAMES,
    mode=st.integers(0, 0o177777),
    data=st.binary(max_size=50),
    mtime=st.integers(0, 0xFFFFFFFF),
    rdev=st.tuples(st.integers(0, 255), st.integers(0, 255)),
)


@given(st.lists(ENTRIES, max_size=5))
def test_archive_that_was_written_reads_back(entries: list[cpio.Entry]) -> None:
    data = archive(entries)
    assert len(data) % 4 == 0
    assert list(cpio.read(data)) == entries


def test_archive_has_the_bytes_of_the_format() -> None:
    data = archive([cpio.file("a", b"xyz", 0o600, mtime=1)])
    fields = [1, stat.S_IFREG | 0o600, 0, 0, 1, 1, 3, 0, 0, 0, 0, 2, 0]
    head = b"070701" + b"".join(b"%08X" % field for field in fields)
    assert data.startswith(head + b"a\x00xyz\x00" + b"070701")
    assert data.endswith(b"TRAILER!!!\0\0\0\0")


def test_text_that_is_no_archive_raises_value_error() -> None:
    with pytest.raises(ValueError, match="no newc header at offset 0"):
        list(cpio.read(b"x" * 200))


def test_tree_keeps_links_and_execute_bits_and_leaves_out_names(tmp_path: Path) -> None:
    (tmp_path / "sub" / "__pycache__").mkdir(parents=True)
    (tmp_path / "sub" / "__pycache__" / "x.pyc").write_bytes(b"")
    (tmp_path / "sub" / "script").write_text("#!")
    (tmp_path / "sub" / "script").chmod(0o775)
    (tmp_path / "link").symlink_to("sub/script")
    found = {entry.name: entry for entry in cpio.tree(tmp_path, "top", skip=["__pycache__"])}
    assert list(found) == ["top/link", "top/sub", "top/sub/script"]
    assert found["top/link"].data == b"sub/script"
    assert stat.S_ISLNK(found["top/link"].mode)
    assert found["top/sub/script"].mode == stat.S_IFREG | 0o755


def test_parents_come_outermost_first() -> None:
    assert [entry.name for entry in cpio.parents("a/b/c/file")] == ["a", "a/b", "a/b/c"]


# --- frames

CHANNELS = st.sampled_from([frames.OUTPUT, frames.ERROR, frames.RECORD, frames.EXIT])


@given(st.lists(st.tuples(CHANNELS, st.binary(max_size=400)), max_size=6), st.integers(1, 50))
def test_frames_arrive_as_they_were_sent_in_pieces_of_any_size(sent: list[tuple[str, bytes]], size: int) -> None:
    encoder, decoder = frames.Encoder(), frames.Decoder()
    stream = b"".join(encoder.encode(channel, payload) for channel, payload in sent)
    got = [frame for start in range(0, len(stream), size) for frame in decoder.feed(stream[start : start + size])]
    assert got == sent
    assert (decoder.lost, decoder.console) == (0, [])


def test_console_text_around_a_frame_is_kept_apart() -> None:
    line = frames.Encoder().encode(frames.OUTPUT, b"hello")
    decoder = frames.Decoder()
    assert decoder.feed(b"firmware\r\n[ 1.0] kernel " + line) == [("O", b"hello")]
    assert decoder.console == ["firmware", "[ 1.0] kernel"]


def test_carriage_return_of_a_terminal_does_no_harm() -> None:
    line = frames.Encoder().encode(frames.OUTPUT, b"hello").replace(b"\n", b"\r\n")
    assert frames.Decoder().feed(line) == [("O", b"hello")]


def test_frame_that_the_kernel_wrote_into_is_lost_and_counted() -> None:
    encoder, decoder = frames.Encoder(), frames.Decoder()
    hit, whole = encoder.encode(frames.OUTPUT, b"first"), encoder.encode(frames.OUTPUT, b"second")
    assert decoder.feed(hit[:9] + b"[ 2.0] oops\n" + hit[9:] + whole) == [("O", b"second")]
    assert decoder.lost == 1
    assert any("oops" in line for line in decoder.console)


@given(st.binary(min_size=1, max_size=60), st.data())
def test_changed_byte_never_gives_a_wrong_payload(payload: bytes, data: st.DataObject) -> None:
    line = bytearray(frames.Encoder().encode(frames.OUTPUT, payload))
    place = data.draw(st.integers(0, len(line) - 2))
    line[place] ^= data.draw(st.integers(1, 255))
    assert frames.Decoder().feed(bytes(line)) in ([], [("O", payload)])


def test_output_that_looks_like_a_frame_stays_output() -> None:
    fake = frames.Encoder().encode(frames.EXIT, b"0")
    assert frames.Decoder().feed(frames.Encoder().encode(frames.OUTPUT, fake)) == [("O", fake)]


# --- mirrors


def apt_root(tmp_path: Path, **files: str) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    for name, text in files.items():
        stem, _, suffix = name.rpartition("_")
        (tmp_path / "sources.list.d" / f"{stem}.{suffix}").write_text(text)
    return tmp_path


def test_mirror_of_a_one_line_source() -> None:
    line = "deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian/ bookworm main contrib # comment\n"
    assert list(mirror._one_line(line)) == [
        ("http://mirror.example/debian/", "bookworm", ["main", "contrib"], "arch=amd64 signed-by=/k.gpg")
    ]


def test_sources_and_comments_are_no_mirrors(tmp_path: Path) -> None:
    text = "deb-src http://a.example/debian trixie main\n# deb http://b.example/debian trixie main\n"
    with pytest.raises(LabError, match="set VFIO_LAB_MIRROR"):
        mirror.mirrors(apt_root(tmp_path, x_list=text), {})


def test_mirror_of_a_deb822_source_with_several_suites(tmp_path: Path) -> None:
    text = "# a comment\nTypes: deb deb-src\nURIs: http://a.example/debian\nSuites: bookworm bookworm-updates\n"
    text += "Components: main\n contrib\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    assert mirror.mirrors(apt_root(tmp_path, debian_sources=text), {}) == ["http://a.example/debian"]


@pytest.mark.parametrize(
    "stanza",
    [
        "Types: deb\nEnabled: no\nURIs: http://a.example/debian\nSuites: trixie\nComponents: main\n",
        "Types: deb-src\nURIs: http://a.example/debian\nSuites: trixie\nComponents: main\n",
        "Types: deb\nURIs: http://a.example/debian-security\nSuites: trixie-security\nComponents: main\n",
        "Types: deb\nURIs: http://a.example/docker\nSuites: trixie\nComponents: stable\n",
        "Types: deb\nURIs: http://a.example/ubuntu\nSuites: noble\nComponents: main\n",
    ],
    ids=["disabled", "sources only", "security", "no main", "another distribution"],
)
def test_stanza_that_is_not_the_debian_archive_is_skipped(stanza: str, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="no mirror of the Debian archive"):
        mirror.mirrors(apt_root(tmp_path, x_sources=stanza), {})


def test_third_party_archive_of_the_same_suite_comes_last(tmp_path: Path) -> None:
    apt = apt_root(
        tmp_path,
        a_list="deb http://vendor.example/apt bookworm main\n",
        b_list="deb http://mirror.example/debian bookworm main\n",
    )
    assert mirror.mirrors(apt, {}) == ["http://mirror.example/debian", "http://vendor.example/apt"]


def test_environment_names_the_mirror_whatever_apt_says(tmp_path: Path) -> None:
    apt = apt_root(tmp_path, a_list="deb http://mirror.example/debian bookworm main\n")
    assert mirror.mirrors(apt, {"VFIO_LAB_MIRROR": "http://other.example/debian/"}) == ["http://other.example/debian"]


# --- packages

APT_GET = """\
#!/bin/sh
root=${APT_CONFIG%/*}
echo "$*" >> "$root/calls"
case "$*" in
*" linux-image-6.12.9-x") : > linux-image-6.12.9-x_6.12.9-1_ppc64el.deb ;;
*" linux-image-"*) echo "E: Failed to fetch http://m.example/linux-image-6.12.10-x_6.12.10-1_ppc64el.deb  404" >&2; exit 1 ;;
*" install "*)
    grep -qF 'Pin: version *1+2.0~b-1' "$root/preferences" && { : > "$root/cache/archives/old.deb"; exit; }
    echo "E: Failed to fetch http://m.example/pool/libx_1%2b2.0%7eb-1_ppc64el.deb  404  Not Found" >&2; exit 1 ;;
esac
"""
APT_CACHE = """\
#!/bin/sh
case $1 in
depends) echo "  Depends: linux-image-6.12.10-x" ;;
pkgnames) printf '%s\\n' linux-image-6.12.9-x linux-image-6.12.10-x linux-image-6.9.1-x busybox ;;
esac
"""


@pytest.fixture
def lagging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> packages.Archive:
    """An archive whose mirror lists packages that it does not hold."""
    for name, text in (("apt-get", APT_GET), ("apt-cache", APT_CACHE), ("apt-config", "#!/bin/sh\n")):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("VFIO_LAB_MIRROR", "http://m.example/debian")
    return packages.Archive(tmp_path / "apt", lambda _: None, "ppc64el")


def test_version_that_the_mirror_lists_but_does_not_hold_is_ruled_out(
    lagging: packages.Archive, tmp_path: Path
) -> None:
    assert [deb.name for deb in lagging.closure(["libx"])] == ["old.deb"]
    sources = (tmp_path / "apt" / "sources.list").read_text().splitlines()
    assert [line.split()[-2] for line in sources] == ["trixie", "stable"]
    assert (tmp_path / "apt" / "calls").read_text().splitlines().count("update") == 1


def test_kernel_that_the_mirror_does_not_hold_gives_way_to_the_next_older(lagging: packages.Archive) -> None:
    assert lagging.fetch_newest("linux-image-x", r"linux-image-[0-9].*-x").name.startswith("linux-image-6.12.9-x_")


def test_kernel_of_which_no_version_is_listed_raises(lagging: packages.Archive) -> None:
    with pytest.raises(LabError, match=r"trixie/ppc64el has no package linux-image-\[0-9\]\.\*-y"):
        lagging.fetch_newest("linux-image-y", r"linux-image-[0-9].*-y")


# --- targets and QEMU


def test_targets_are_every_power_machine_with_both_page_sizes_and_two_pcs() -> None:
    power = ("powernv8", "powernv9", "powernv10", "pseries", "siblings")
    assert list(targets.TARGETS) == [
        *(f"{name}{suffix}" for name in power for suffix in ("", "-64k")),
        "q35",
        "noiommu",
    ]
    assert (targets.target("powernv8").page_size, targets.target("powernv8-64k").page_size) == (4096, 65536)


def test_unknown_target_lists_all() -> None:
    with pytest.raises(LabError, match=r"no target 'power8'; there are powernv8, powernv8-64k, .*pseries-64k"):
        targets.target("power8")


def test_huge_pages_of_16m_are_only_reserved_on_the_64k_kernel() -> None:
    assert "hugepagesz=16M" in targets.target("powernv8-64k").append
    assert targets.target("powernv8").append == ""


def arguments(name: str, **more: object) -> list[str]:
    options = {"drives": {"0002:01:00.0": Path("/tmp/a,b")}, **more}
    return qemu.arguments(topology.load(name), Path("/k/vmlinux"), Path("/k/initrd"), **options)  # type: ignore[arg-type]


def devices_of(words: list[str]) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words) if word == "-device"]


def test_bare_machine_gets_its_bmc_phbs_root_ports_and_devices() -> None:
    words = arguments("power8")
    assert words[:6] == ["-M", "powernv8", "-m", "2048M", "-smp", "1"]
    assert devices_of(words) == [
        "ipmi-bmc-sim,id=bmc0",
        "isa-ipmi-bt,bmc=bmc0,irq=10",
        "pnv-phb,chip-id=0,index=0,id=phb0",
        "pnv-phb-root-port,bus=phb0,id=port0",
        "edu,bus=port0,addr=0.0,multifunction=on,dma_mask=0xffffffffffffffff",
        "pci-testdev,bus=port0,addr=0.1",
        "pnv-phb,chip-id=0,index=1,id=phb1",
        "pnv-phb-root-port,bus=phb1,id=port1",
        "edu,bus=port1,addr=0.0,dma_mask=0xffffffffffffffff",
        "pnv-phb,chip-id=0,index=2,id=phb2",
        "pnv-phb-root-port,bus=phb2,id=port2",
        "nvme,bus=port2,addr=0.0,drive=drive000201000,serial=lab",
    ]


def test_commas_of_a_drives_path_are_doubled() -> None:
    assert "if=none,id=drive000201000,format=raw,file=/tmp/a,,b" in arguments("power8")


def test_device_with_an_expansion_rom_gets_the_file_with_it() -> None:
    machine = topology.load("siblings")
    assert qemu.roms_of(machine) == {"0000:01:00.1": topology.option_rom(0x800)}
    roms = {address: Path("/tmp/rom,1") for address in qemu.roms_of(machine)}
    words = arguments("siblings", drives={"0000:01:00.2": Path("/tmp/d")}, roms=roms)
    assert "pci-testdev,bus=port0,addr=0.1,romfile=/tmp/rom,,1" in devices_of(words)


def test_pseries_devices_sit_on_the_phbs_own_bus() -> None:
    assert devices_of(arguments("pseries")) == [
        "edu,bus=pci.0,addr=0.0,dma_mask=0xffffffffffffffff",
        "spapr-pci-host-bridge,index=1,id=phb1",
        "e1000e,bus=phb1.0,addr=0.0,romfile=",
    ]


def test_pc_has_its_iommu_before_the_devices_on_its_own_bus() -> None:
    words = arguments("x86")
    assert words[: words.index("-device")][-2:] == ["-cpu", "max"]
    assert devices_of(words) == [
        "intel-iommu,intremap=on,caching-mode=on",
        "edu,bus=pcie.0,addr=4.0,dma_mask=0xffffffffffffffff",
        "edu,bus=pcie.0,addr=5.0,dma_mask=0xffffffffffffffff",
        "e1000e,bus=pcie.0,addr=6.0,romfile=",
    ]
    assert words[-1].startswith("console=ttyS0 ")
    assert targets.target("q35").append == "intel_iommu=on"


def test_memory_and_kernel_arguments_can_be_added_to() -> None:
    words = arguments("power9", memory=4 << 30, append="hugepages=4")
    assert words[words.index("-m") + 1] == "4096M"
    assert words[-1].split()[0] == "console=hvc0"
    assert words[-1].endswith(" hugepages=4")


def test_part_of_a_machine_has_only_those_phbs() -> None:
    part = targets.target("powernv9").machine([1])
    words = qemu.arguments(part, Path("v"), Path("i"), {})
    assert [word for word in devices_of(words) if word.startswith("pnv-phb,")] == ["pnv-phb,chip-id=0,index=1,id=phb1"]
    assert qemu.drives_of(part) == {}


def test_only_devices_with_a_drive_need_one() -> None:
    assert qemu.drives_of(topology.load("power8")) == {"0002:01:00.0": 16 << 20}


def test_missing_qemu_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(LabError, match="apt install qemu-system-ppc"):
        qemu.find()
    with pytest.raises(LabError, match=r"qemu-system-x86_64 is not in PATH.*apt install qemu-system-x86"):
        qemu.find(targets.target("q35").architecture)


# --- a machine that is a small program, in place of QEMU


@pytest.fixture
def fake_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in PATH for a `qemu-system-ppc64`; the image is there already."""
    for name in ("vmlinux", "modules.cpio", "userland.cpio"):
        (tmp_path / name).write_bytes(b"")
    kernel = image.Kernel(tmp_path / "vmlinux", tmp_path / "modules.cpio", tmp_path / "userland.cpio", "6.12")
    monkeypatch.setattr(image, "kernel", lambda flavour, report: kernel)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path / "qemu-system-ppc64"


def script(path: Path, *sent: bytes, then: str = "") -> None:
    (path.parent / "console").write_bytes(b"".join(sent))
    path.write_text(f"#!/bin/sh\ncat {path.parent}/console\n{then}\n")
    path.chmod(0o755)


def run(timeout: float = 20.0, boot_timeout: float = 20.0) -> tuple[machine.Outcome, list[tuple[str, bytes]]]:
    got: list[tuple[str, bytes]] = []
    outcome = machine.run(
        targets.target("pseries"),
        ["true"],
        lambda channel, payload: got.append((channel, payload)),
        lambda step: None,
        timeout=timeout,
        boot_timeout=boot_timeout,
    )
    return outcome, got


def test_run_gives_output_errors_and_exit_status_apart(fake_qemu: Path) -> None:
    send = frames.Encoder().encode
    script(
        fake_qemu, b"OPAL\n", send("B", b""), send("O", b"out"), send("E", b"err"), send("K", b"log"), send("X", b"7")
    )
    outcome, got = run()
    assert got == [("O", b"out"), ("E", b"err")]
    assert (outcome.status, outcome.kernel_log, outcome.timed_out, outcome.lost) == (7, "log", False, 0)
    assert outcome.console == ["OPAL"]


def test_machine_that_stops_while_booting_tells_its_last_words(fake_qemu: Path) -> None:
    script(fake_qemu, b"OPAL\nno kernel\n", then="echo bad device >&2; exit 1")
    with pytest.raises(machine.MachineDied, match=r"(?s)stopped by itself.*bad device.*no kernel"):
        run()


def test_machine_that_never_comes_up_is_ended(fake_qemu: Path) -> None:
    script(fake_qemu, b"OPAL\n", then="exec sleep 1000")
    with pytest.raises(machine.MachineDied, match=r"(?s)did not come up in 0\.3 s.*OPAL"):
        run(boot_timeout=0.3)


def test_command_whose_time_is_up_is_stopped_and_tells_what_it_did(fake_qemu: Path) -> None:
    send = frames.Encoder().encode
    script(fake_qemu, send("B", b""), then=f"head -c 1 > {fake_qemu}.asked; cat {fake_qemu}.answer; exec sleep 1000")
    Path(f"{fake_qemu}.answer").write_bytes(send("S", b"sleeping") + send("X", b"124"))
    outcome, _ = run(timeout=0.3)
    assert (outcome.status, outcome.timed_out, outcome.stuck) == (124, True, "sleeping")
    assert Path(f"{fake_qemu}.asked").read_bytes() == b"q"


def test_guest_that_does_not_answer_is_ended(fake_qemu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_ANSWER_TIMEOUT", 0.3)
    script(fake_qemu, frames.Encoder().encode("B", b""), then="exec sleep 1000")
    with pytest.raises(machine.MachineDied, match="no longer answers"):
        run(timeout=0.3)


# --- pytest --lab, with such a program


PAGE_SIZE = "hwtests/test_machine.py::test_page_size_is_the_targets[pseries]"
MODULES = "hwtests/test_machine.py::test_vfio_modules_are_loaded[pseries]"


@pytest.fixture
def fake_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As `fake_qemu`, for another process: through its environment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("COLUMNS", "200")  # or pytest cuts its summary short
    kernel = image._image("powerpc64le")
    kernel.mkdir(parents=True)
    for path in (image._userland(), kernel / "vmlinux", kernel / "modules.cpio"):
        path.write_bytes(b"")
    (kernel / "release").write_text("6.12\n")
    return tmp_path / "qemu-system-ppc64"


def reports(nodeid: str, failing: str = "") -> list[dict[str, object]]:
    """What the guest sends for a test; `failing` is its error."""
    made: list[dict[str, object]] = [{"event": "start", "nodeid": nodeid}]
    location = ("hwtests/test_machine.py", 1, "x")
    for when in ("setup", "call", "teardown"):
        error = failing if when == "call" else ""
        report = pytest.TestReport(nodeid, location, {}, "failed" if error else "passed", error or None, when)
        made.append({"event": "report", "data": {**report._to_json(), "$report_type": "TestReport"}})
    return [*made, {"event": "finish", "nodeid": nodeid}]


def boot(encoder: frames.Encoder, records: list[dict[str, object]], exit_status: int | None) -> bytes:
    """The console of a machine that sends `records`, and an exit status unless it dies first."""
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    end = b"" if exit_status is None else encoder.encode(frames.EXIT, str(exit_status).encode())
    return encoder.encode(frames.READY, b"") + encoder.encode(frames.RECORD, lines) + b"last words\n" + end


def run_pytest(qemu_path: Path, boots: list[bytes], *options: str) -> subprocess.CompletedProcess[str]:
    """`pytest --lab pseries` of two tests, where the n-th boot of the machine says the n-th of `boots`."""
    for number, console in enumerate(boots, start=1):
        Path(f"{qemu_path}.{number}").write_bytes(console)
    count = f"echo >> {qemu_path}.count; n=$(wc -l < {qemu_path}.count)"
    qemu_path.write_text(f"#!/bin/sh\n{count}\ncat {qemu_path}.$n\n")
    qemu_path.chmod(0o755)
    words = [sys.executable, "-m", "pytest", "hwtests/test_machine.py", "--lab", "pseries", "-p", "no:cacheprovider"]
    words += ["-k", "page_size_is or modules_are", "-rA", *options]
    return subprocess.run(words, cwd=overlay.CHECKOUT, capture_output=True, text=True, check=False, timeout=60)


def test_pytest_reports_what_the_guest_did(fake_cache: Path) -> None:
    console = boot(frames.Encoder(), reports(PAGE_SIZE) + reports(MODULES, "no such module"), 1)
    result = run_pytest(fake_cache, [console])
    assert f"PASSED {PAGE_SIZE}" in result.stdout
    assert f"FAILED {MODULES} - no such module" in result.stdout
    assert "1 failed, 1 passed" in result.stdout
    assert result.returncode == 1


def test_pytest_boots_again_after_a_test_that_kills_the_machine(fake_cache: Path) -> None:
    killed = boot(frames.Encoder(), reports(PAGE_SIZE)[:2], None)
    result = run_pytest(fake_cache, [killed, boot(frames.Encoder(), reports(MODULES), 0)])
    assert f"FAILED {PAGE_SIZE} - the machine stopped by itself" in result.stdout
    assert "last words" in result.stdout
    assert f"PASSED {MODULES}" in result.stdout


def test_pytest_stops_at_the_first_failure_when_told_so(fake_cache: Path) -> None:
    console = boot(frames.Encoder(), reports(PAGE_SIZE, "wrong") + reports(MODULES), 1)
    result = run_pytest(fake_cache, [console], "-x")
    assert "1 failed" in result.stdout
    assert "1 passed" not in result.stdout


def test_pytest_fails_every_test_that_a_dead_guest_never_ran(fake_cache: Path) -> None:
    result = run_pytest(fake_cache, [boot(frames.Encoder(), [], 4)])
    assert f"ERROR {PAGE_SIZE} - not run on pseries" in result.stdout
    assert f"ERROR {MODULES} - not run on pseries" in result.stdout
    assert result.returncode == 1


def test_hwtests_without_a_machine_say_how_to_run_them() -> None:
    words = [sys.executable, "-m", "pytest", "hwtests", "-p", "no:cacheprovider"]
    result = subprocess.run(words, cwd=overlay.CHECKOUT, capture_output=True, text=True, check=False, timeout=60)
    assert "pytest hwtests --lab powernv8" in result.stdout
    assert result.returncode == pytest.ExitCode.NO_TESTS_COLLECTED


# --- what the initramfs holds


def test_overlay_installs_the_checkout_and_the_plan() -> None:
    found = {entry.name: entry for entry in overlay.for_command(["echo", "a b"], lab_files={"items": "x\n"})}
    assert stat.S_IMODE(found["init"].mode) == 0o755
    plan = json.loads(found["lab/plan.json"].data)
    assert plan["command"] == ["echo", "a b"]
    assert len(bytes.fromhex(plan["seed"])) == 64
    assert found["lab/items"].data == b"x\n"
    assert found["checkout/vfio_cli"].data == b"cli"
    assert "checkout/vfio/topology.py" in found
    assert "checkout/hwtests/lab/guest.py" in found
    assert (
        b"vfio = vfio_cli.main:main"
        in found["usr/lib/python3/dist-packages/vfio-0.1.0.dist-info/entry_points.txt"].data
    )
    assert b"from vfio_cli.main import main" in found["usr/bin/vfio"].data
    assert "usr/lib/python3/dist-packages/ioctl_opt/__init__.py" in found
    assert not any("__pycache__" in name for name in found)


def test_every_file_of_the_overlay_comes_after_its_directory() -> None:
    base = {"etc", "usr", "usr/bin", "usr/lib", "usr/lib/python3", "usr/lib/python3/dist-packages"}
    seen = set(base)
    for entry in overlay.for_command(["true"], {Path(__file__): "/data/deep/file"}):
        parent = entry.name.rpartition("/")[0]
        assert not parent or parent in seen, entry.name
        if stat.S_ISDIR(entry.mode):
            seen.add(entry.name)


def test_extra_file_keeps_its_permissions(tmp_path: Path) -> None:
    program = tmp_path / "bench"
    program.write_bytes(b"\x7fELF")
    program.chmod(0o750)
    found = {entry.name: entry for entry in overlay.for_command(["true"], {program: "/opt/bench"})}
    assert (found["opt/bench"].data, stat.S_IMODE(found["opt/bench"].mode)) == (b"\x7fELF", 0o750)


def test_extra_file_with_a_relative_guest_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="must be absolute"):
        list(overlay.for_command(["true"], {tmp_path / "x": "opt/x"}))


def kernel_tree(base: Path, **modules: bytes) -> Path:
    (base / "kernel").mkdir(parents=True)
    (base / "modules.builtin").write_text("kernel/lib/builtin-one.ko\n")
    (base / "modules.builtin.modinfo").write_bytes(b"")
    (base / "modules.order").write_text("")
    for name, depends in modules.items():
        data = b"ELF\0license=GPL\0depends=" + depends + b"\0name=x\0"
        (base / "kernel" / f"{name.replace('_', '-')}.ko.xz").write_bytes(lzma.compress(data))
    return base


def test_modules_bring_what_they_need_and_are_unpacked(tmp_path: Path) -> None:
    base = kernel_tree(
        tmp_path / "6.12", vfio_pci=b"vfio-pci-core,builtin_one", vfio_pci_core=b"vfio", vfio=b"", other=b""
    )
    found = {entry.name: entry.data for entry in image.module_entries(base, "m", ["vfio_pci"])}
    kos = sorted(name for name in found if name.endswith(".ko"))
    assert kos == ["m/kernel/vfio-pci-core.ko", "m/kernel/vfio-pci.ko", "m/kernel/vfio.ko"]
    assert found["m/kernel/vfio.ko"].startswith(b"ELF\0")


def test_module_that_the_kernel_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="has no module vfio_pci"):
        list(image.module_entries(kernel_tree(tmp_path / "6.12", vfio=b""), "m", ["vfio-pci"]))


def test_cache_follows_xdg_cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert image.cache_directory() == tmp_path / "vfio-lab"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification says to ignore
    assert image.cache_directory() == Path.home() / ".cache" / "vfio-lab"


def test_failed_build_leaves_the_old_image(tmp_path: Path) -> None:
    target = tmp_path / "image"
    target.write_text("old")

    def broken(new: Path) -> None:
        new.write_text("half")
        raise LabError("mirror")

    with pytest.raises(LabError):
        image._replace(target, broken)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["image"]


def test_rebuilt_directory_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "image"
    target.mkdir()
    (target / "old").touch()

    def build(new: Path) -> None:
        new.mkdir()
        (new / "fresh").touch()

    image._replace(target, build)
    assert [path.name for path in target.iterdir()] == ["fresh"]
    assert [path.name for path in tmp_path.iterdir()] == ["image"]
