"""The files that make an assignment survive a reboot: what they say, what a boot makes of it, and other people's lines."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import udev_rules
from fake_host import Driver, Function, Host
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio import apply, errors, journal, persist
from vfio.backend import open_backend
from vfio.desired import Desired, DesiredDevice
from vfio.persist import Persistent, Rule

CARD = ["0000:01:00.0", "0000:01:00.1"]
DISK = "0001:01:00.0"
FREE = "0002:00:00.0"

BEGIN = "# Begin: written by vfio apply. Change the plan and apply it; vfio apply --forget removes all of this."
END = "# End: written by vfio apply."


@pytest.fixture
def host() -> Host:
    return Host(
        Function(CARD[0], "tg3", group=7, id=(0x14E4, 0x1657)),
        Function(CARD[1], "tg3", group=7, id=(0x14E4, 0x1657)),
        Function(DISK, "nvme", group=2, id=(0x1B36, 0x0010), device_class=0x010802),
        Function(FREE, group=3),
        drivers=(Driver("pci-stub"),),
    )


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    return tmp_path / "etc"


def make(host: Host, etc: Path, *devices: DesiredDevice) -> apply.Comparison:
    return apply.apply(Desired(devices), host, persist_dir=etc)


def rules(etc: Path) -> str:
    return (etc / persist.RULES).read_text()


def options(etc: Path) -> str:
    return (etc / persist.OPTIONS).read_text()


def drivers(host: Host) -> dict[str, str | None]:
    return {address: device.driver for address, device in host.devices.items()}


def test_the_rules_of_a_device(host, etc):
    make(host, etc, DesiredDevice(address=DISK, owner="4321:77", mode=0o660, persistent=True))
    device = f'ACTION=="add", SUBSYSTEM=="pci", KERNEL=="{DISK}"'
    assert rules(etc).splitlines() == [
        BEGIN,
        f'{device}, ATTR{{driver_override}}="vfio-pci"',
        f'{device}, TEST=="driver", TEST!="vfio-dev", ATTR{{driver/unbind}}="%k"',
        f'{device}, TEST!="driver", ATTR{{[subsystem/pci]drivers_probe}}="%k"',
        f'{device}, TEST!="driver", RUN{{builtin}}+="kmod load vfio-pci"',
        f'SUBSYSTEM=="vfio", KERNEL=="[0-9]*", TEST=="/sys/kernel/iommu_groups/%k/devices/{DISK}", '
        'OWNER="4321", GROUP="77", MODE="0660"',
        END,
    ]
    assert stat.S_IMODE((etc / persist.RULES).stat().st_mode) == 0o644
    assert not (etc / persist.OPTIONS).exists()


def test_an_id_is_an_option_of_vfio_pci_that_is_loaded_before_the_driver_of_the_host(host, etc):
    make(host, etc, DesiredDevice(id="1b36:0010", persistent=True), DesiredDevice(id="14e4:1657", persistent=True))
    assert options(etc).splitlines() == [
        BEGIN,
        "# 14e4:1657, instead of: tg3",
        "# 1b36:0010, instead of: nvme",
        "options vfio-pci ids=14e4:1657,1b36:0010",
        "softdep nvme pre: vfio-pci",
        "softdep tg3 pre: vfio-pci",
        END,
    ]


@pytest.mark.parametrize(
    "modules", [(), ("vfio-pci",), ("nvme", "tg3"), ("nvme", "tg3", "vfio-pci"), ("vfio-pci", "nvme", "tg3")]
)
def test_a_boot_makes_it_so_again_whatever_was_loaded_before(host, etc, modules):
    make(
        host,
        etc,
        DesiredDevice(address=CARD[0], whole_group=True, owner="4321", mode=0o660, persistent=True),
        DesiredDevice(address=DISK, driver="none", persistent=True),
        DesiredDevice(address=FREE, driver="pci-stub", persistent=True),
    )
    before = drivers(host)
    udev_rules.boot(host, rules(etc), modules=modules)
    assert drivers(host) == before == {CARD[0]: "vfio-pci", CARD[1]: "vfio-pci", DISK: None, FREE: "pci-stub"}
    node = host.nodes[7]
    assert (node.uid, node.gid, node.mode) == (4321, 0, 0o660)


def test_without_the_rules_a_boot_undoes_it(host, etc):
    before = drivers(host)
    make(host, etc, DesiredDevice(address=DISK), DesiredDevice(id="14e4:1657", driver="none"))
    udev_rules.boot(host, "")
    assert drivers(host) == before


def test_the_options_alone_make_vfio_pci_take_an_id_where_udev_has_no_rules_yet(host, etc):
    """As in an initramfs, which has the files of modprobe.d."""
    make(host, etc, DesiredDevice(id="1b36:0010", persistent=True))
    udev_rules.boot(host, "", options(etc))
    assert drivers(host)[DISK] == "vfio-pci"
    assert drivers(host)[CARD[0]] == "tg3"


def test_after_a_boot_there_is_nothing_to_apply(host, etc):
    devices = (
        DesiredDevice(id="1b36:0010", persistent=True),
        DesiredDevice(id="14e4:1657", mode=0o666, persistent=True),
    )
    make(host, etc, *devices)
    host.host.boot_id = "another boot"
    udev_rules.boot(host, rules(etc), options(etc))
    assert journal.load(host).devices == {}
    found = apply.compare(Desired(devices), host, persist_dir=etc)
    assert not found.changed


def test_a_device_that_is_not_persistent_any_more_loses_its_lines_and_no_other(host, etc):
    make(host, etc, DesiredDevice(id="14e4:1657", persistent=True), DesiredDevice(address=DISK, persistent=True))
    done = make(host, etc, DesiredDevice(address=DISK))
    assert [record.kind for record in done.records()] == ["file"]
    assert set(persist.load(etc).rules) == set(CARD)
    make(host, etc, DesiredDevice(address=CARD[0]))
    assert persist.load(etc).ids == {}  # it would take that device as well
    assert set(persist.load(etc).rules) == {CARD[1]}
    make(host, etc, DesiredDevice(address=CARD[1]))
    assert not (etc / persist.RULES).exists()
    assert not (etc / persist.OPTIONS).exists()


def test_a_device_that_goes_back_to_the_host_loses_its_lines(host, etc):
    make(host, etc, DesiredDevice(address=DISK, persistent=True))
    make(host, etc, DesiredDevice(address=DISK, driver="host", persistent=True))
    assert not (etc / persist.RULES).exists()


def test_devices_that_a_plan_does_not_name_and_those_to_keep_stay_persistent(host, etc):
    make(host, etc, DesiredDevice(address=DISK, persistent=True))
    assert not make(host, etc, DesiredDevice(address=DISK, persistent=None)).changed
    make(host, etc, DesiredDevice(address=FREE, persistent=True))
    assert set(persist.load(etc).rules) == {DISK, FREE}


def test_forget_removes_all_of_it_and_leaves_the_devices(host, etc):
    make(host, etc, DesiredDevice(id="1b36:0010", persistent=True), DesiredDevice(address=FREE, persistent=True))
    before = host.snapshot()
    checked = apply.forget(host, check=True, persist_dir=etc)
    assert (checked.changed, checked.done, rules(etc) != "") == (True, False, True)
    done = apply.forget(host, persist_dir=etc)
    assert (done.changed, done.done) == (True, True)
    assert [path for path in etc.rglob("*") if path.is_file()] == []
    assert host.snapshot() == before
    assert not apply.forget(host, persist_dir=etc).changed


# --- lines of others ---


def test_lines_of_others_stay_where_they_are(host, etc):
    path = etc / persist.RULES
    path.parent.mkdir(parents=True)
    path.write_text('KERNEL=="first"\n')
    make(host, etc, DesiredDevice(address=DISK, persistent=True))
    path.write_text(path.read_text() + '\nKERNEL=="last"\n')
    make(host, etc, DesiredDevice(address=FREE, persistent=True))
    lines = path.read_text().splitlines()
    assert (lines[0], lines[1], lines[-3:]) == ('KERNEL=="first"', BEGIN, [END, "", 'KERNEL=="last"'])
    assert set(persist.load(etc).rules) == {DISK, FREE}
    apply.forget(host, persist_dir=etc)
    assert path.read_text() == 'KERNEL=="first"\n\nKERNEL=="last"\n'


@pytest.mark.parametrize("name", [persist.RULES, persist.OPTIONS])
def test_a_line_of_somebody_else_between_the_marks_is_refused(host, etc, name):
    make(host, etc, DesiredDevice(id="1b36:0010", persistent=True))
    path = etc / name
    text = path.read_text().replace(END, f"mine\n{END}")
    path.write_text(text)
    with pytest.raises(errors.Refused, match=rf"{path}:\d+: mine: it stands between the marks"):
        make(host, etc, DesiredDevice(address=FREE, persistent=True))
    assert path.read_text() == text
    assert drivers(host)[FREE] is None


@pytest.mark.parametrize("text", [f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n"])
def test_marks_that_do_not_fit_are_refused(host, etc, text):
    path = etc / persist.RULES
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(errors.Refused, match="not one beginning and one end"):
        apply.forget(host, persist_dir=etc)
    assert path.read_text() == text


def test_ids_that_somebody_else_gives_to_vfio_pci_are_not_overruled(host, etc):
    theirs = etc / "modprobe.d" / "theirs.conf"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("# mine\noptions vfio_pci disable_vga=1 ids=10de:1234\n")
    with pytest.raises(errors.Refused, match=rf"{theirs}:2 gives it others"):
        make(host, etc, DesiredDevice(id="1b36:0010", persistent=True))
    assert drivers(host)[DISK] == "nvme"
    make(host, etc, DesiredDevice(address=DISK, persistent=True))


def test_a_file_that_cannot_be_read_is_refused(host, etc):
    path = etc / persist.RULES
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\xff")
    with pytest.raises(errors.CallFailed, match="cannot read"):
        make(host, etc, DesiredDevice(address=DISK))


# --- where they are ---


def test_the_files_of_the_kernel_of_this_host_are_in_etc(monkeypatch, tmp_path):
    assert persist.directory(open_backend("kernel:")) == Path("/etc")
    assert persist.directory(open_backend("trace:kernel:")) == Path("/etc")
    assert persist.directory(open_backend("fake:power8")) is None
    monkeypatch.setenv(persist.DIRECTORY, str(tmp_path))
    assert persist.directory(open_backend("fake:power8")) == tmp_path
    assert persist.directory(open_backend("kernel:"), "/elsewhere") == Path("/elsewhere")


# --- what is written is what is read ---

_names = st.from_regex(r"[a-z][a-z0-9_.-]{0,8}", fullmatch=True)
_addresses = st.builds("{:04x}:{:02x}:{:02x}.{}".format, *map(st.integers, [0] * 4, [0xFFFF, 0xFF, 0x1F, 7]))


@st.composite
def _rule(draw: st.DrawFn) -> Rule:
    driver = draw(st.one_of(st.sampled_from(["vfio-pci", "none"]), _names))
    module = {"vfio-pci": "vfio-pci", "none": None}.get(driver, draw(_names))
    user = draw(st.none() | _names)
    group = None if user is None else draw(st.none() | _names)
    return Rule(draw(_addresses), driver, module, user, group, draw(st.none() | st.integers(0, 0o777)))


_ids = st.builds("{:04x}:{:04x}".format, st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))
_persistent = st.builds(
    lambda rules, ids: Persistent({rule.address: rule for rule in rules}, ids),
    st.lists(_rule(), max_size=4),
    st.dictionaries(
        _ids, st.lists(_names, unique=True, max_size=3).map(lambda names: tuple(sorted(names))), max_size=3
    ),
)


@settings(max_examples=100, deadline=None)
@given(_persistent, _persistent)
def test_what_is_written_is_what_is_read(tmp_path_factory, first, second):
    etc = tmp_path_factory.mktemp("etc")
    for wanted in (first, second, second, Persistent()):
        for each in persist.changes(etc, wanted):
            each.make()
        assert persist.load(etc) == wanted
        assert persist.changes(etc, wanted) == []
    assert [path for path in etc.rglob("*") if path.is_file()] == []


@pytest.mark.skipif(shutil.which("udevadm") is None, reason="needs udevadm; parsed by udev_rules either way")
def test_udev_understands_the_rules(host, etc):
    make(host, etc, DesiredDevice(id="1b36:0010", owner="root:root", mode=0o660, persistent=True))
    if "verify" not in subprocess.run(["udevadm", "--help"], capture_output=True, text=True).stdout:
        pytest.skip("this udevadm is older than its verify")
    done = subprocess.run(["udevadm", "verify", etc / persist.RULES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
