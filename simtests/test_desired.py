"""Plans: what is refused, at which line, and which devices of a host are meant."""

from __future__ import annotations

import textwrap

import pytest
from fake_host import Function, Host

from vfio import desired, errors
from vfio.desired import Desired, DesiredDevice
from vfio.plan import Access

CARD = ["0000:01:00.0", "0000:01:00.1"]
DISK = "0001:01:00.0"


@pytest.fixture
def host() -> Host:
    return Host(
        Function("0000:00:00.0", "pcieport", bridge=True, below=1),
        Function(CARD[0], "tg3", group=7, id=(0x14E4, 0x1657), device_class=0x020000, slot="C5"),
        Function(CARD[1], "tg3", group=7, id=(0x14E4, 0x1657), device_class=0x020000, slot="C5"),
        Function("0001:00:00.0", "pcieport", group=2, bridge=True, below=1),
        Function(DISK, "nvme", group=2, id=(0x1B36, 0x0010), device_class=0x010802, slot="C6"),
        Function("0002:00:00.0", group=3),
        Function("0003:00:00.0"),
    )


def refused(text: str) -> str:
    with pytest.raises(errors.BadPlan) as caught:
        desired.parse(textwrap.dedent(text), "plan.toml")
    assert caught.value.remedy == "nothing was changed"
    return f"{caught.value.what}: {caught.value.why}"


def does_not_fit(host: Host, text: str) -> str:
    with pytest.raises(errors.BadPlan) as caught:
        desired.resolve(desired.parse(textwrap.dedent(text), "plan.toml"), host)
    return f"{caught.value.what}: {caught.value.why}"


def addresses(host: Host, **selector: object) -> list[str]:
    return list(desired.resolve(Desired((DesiredDevice(**selector),)), host).targets)  # type: ignore[arg-type]


# --- reading ---


def test_every_key_is_read():
    text = """
        [[device]]
        address = "1:1:0.0"
        driver = "vfio-pci"
        whole_group = true
        owner = "root:77"
        mode = 0o660
        persistent = true
        optional = true

        [[device]]
        class = "0108"
        driver = "none"
        persistent = "keep"
    """
    assert desired.parse(textwrap.dedent(text)).devices == (
        DesiredDevice(address="1:1:0.0", whole_group=True, owner="root:77", mode=0o660, persistent=True, optional=True),
        DesiredDevice(device_class="0108", driver="none", persistent=None),
    )


def test_a_device_is_by_default_on_vfio_pci_alone_and_until_the_next_boot():
    assert desired.parse('[[device]]\nslot = "C5"').devices == (DesiredDevice(slot="C5"),)
    each = DesiredDevice(slot="C5")
    assert (each.driver, each.whole_group, each.owner, each.mode, each.persistent, each.optional) == (
        *("vfio-pci", False, None, None, False, False),
    )


def test_a_plan_may_be_empty():
    assert desired.parse("").devices == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('address = "0001:01:00.0', "plan.toml: not TOML: "),
        ('[[device]]\naddress = "1:1:0.0"\ndrivr = "none"', "plan.toml:3: device[0].drivr: unknown key; did you mean"),
        ('[[devices]]\naddress = "1:1:0.0"', "plan.toml:1: devices: unknown key; did you mean device?"),
        ("[[device]]\nwhole_group = true", "plan.toml:1: device[0].address: an entry selects by exactly one of addr"),
        ('[[device]]\nid = "1234:11e8"\nslot = "C5"', "plan.toml:3: device[0].slot: an entry selects by exactly one"),
        ('[[device]]\naddress = "nonsense"', "plan.toml:2: device[0].address: 'nonsense' is not a PCI address; expect"),
        ("[[device]]\naddress = 1", "plan.toml:2: device[0].address: 1 is not a string"),
        ('[[device]]\nid = "1234"', "plan.toml:2: device[0].id: '1234' is not of the form 14e4:1657 (vendor:device"),
        ('[[device]]\nid = "1234:11eg"', "plan.toml:2: device[0].id: '1234:11eg' is not of the form"),
        ('[[device]]\nclass = "108"', "plan.toml:2: device[0].class: '108' is not 2, 4 or 6 hexadecimal digits"),
        ('[[device]]\nslot = "../C5"', "plan.toml:2: device[0].slot: '../C5' is not a name"),
        ('[[device]]\nslot = "C5"\ndriver = "a/b"', "plan.toml:3: device[0].driver: 'a/b' is not a name"),
        ('[[device]]\nslot = "C5"\ndriver = ""', "plan.toml:3: device[0].driver: '' is not a name"),
        ('[[device]]\nslot = "C5"\nmode = "0660"', "plan.toml:3: device[0].mode: '0660' is not an integer"),
        (
            '[[device]]\nslot = "C5"\nmode = 660',
            "plan.toml:3: device[0].mode: 0o1224 (660) is not in 0o0..0o777; did you mean 0o660?",
        ),
        ('[[device]]\nslot = "C5"\nmode = 0o4660', "plan.toml:3: device[0].mode: 0o4660 (2480) is not in 0o0..0o777"),
        ('[[device]]\nslot = "C5"\npersistent = "no"', "plan.toml:3: device[0].persistent: 'no' is not one of keep"),
        ('[[device]]\nslot = "C5"\npersistent = 1', "plan.toml:3: device[0].persistent: 1 is not true or false"),
        (
            '[[device]]\nslot = "C5"\npersistent = true\ndriver = "a\\"b"',
            "plan.toml:4: device[0].driver: 'a\"b' cannot stand in a rule of udev",
        ),
        (
            '[[device]]\nslot = "C5"\ndriver = "none"\nowner = "root"',
            "plan.toml:4: device[0].owner: there is no /dev/vfio/N to give away with driver = 'none'",
        ),
        (
            '[[device]]\nid = "1B36:0010"\n[[device]]\nid = "1b36:0010"',
            "plan.toml:4: device[1].id: 1b36:0010 is device[0] (line 1) already",
        ),
        (
            '[[device]]\naddress = "1:1:0.0"\n[[device]]\naddress = "0001:01:00.0"',
            "plan.toml:4: device[1].address: 0001:01:00.0 is device[0] (line 1) already",
        ),
    ],
)
def test_a_bad_plan_tells_line_key_and_rule(text, message):
    assert refused(text).startswith(message)


def test_a_plan_made_in_python_is_held_to_the_same_rules():
    with pytest.raises(errors.BadPlan, match=r"<plan>: device\[1\]\.mode: 0o1000 \(512\) is not in 0o0\.\.0o777"):
        Desired((DesiredDevice(slot="C5"), DesiredDevice(slot="C6", mode=0o1000)))


def test_a_file_that_cannot_be_read_is_a_bad_plan(tmp_path):
    with pytest.raises(errors.BadPlan, match="cannot be read: No such file"):
        desired.load(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    with pytest.raises(errors.BadPlan, match="cannot be read"):
        desired.load(tmp_path / "bytes.toml")


# --- on a host ---


@pytest.mark.parametrize(
    ("selector", "found"),
    [
        ({"address": "1:1:0.0"}, [DISK]),
        ({"id": "14E4:1657"}, CARD),
        ({"slot": "C5"}, CARD),
        ({"device_class": "02"}, CARD),
        ({"device_class": "0108"}, [DISK]),
        ({"device_class": "010802"}, [DISK]),
        ({"address": CARD[1], "whole_group": True}, [CARD[1], CARD[0]]),
        ({"address": DISK, "whole_group": True}, [DISK]),
    ],
)
def test_devices_are_found_by_address_id_slot_or_class_without_bridges(host, selector, found):
    assert addresses(host, **selector) == found


def test_a_slot_that_the_kernel_knows_only_the_bus_of_is_empty(host):
    """As on a PAPR guest, which has 256 slots on its one bus."""
    read_text, listdir = host.read_text, host.listdir
    host.listdir = lambda path: [f"C{n}" for n in range(20)] if path.endswith("/slots") else listdir(path)
    host.read_text = lambda path: "0000:01\n" if "/slots/" in path and "C5/" not in path else read_text(path)
    assert addresses(host, slot="C5") == CARD
    assert "there is nothing in that slot" in does_not_fit(host, '[[device]]\nslot = "C4"')
    assert "it has C0, C1, C10, C11, C12, C13, C14, C15 and 12 more" in does_not_fit(host, '[[device]]\nslot = "D1"')


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            'address = "0001:01:00.1"',
            "plan.toml:2: device[0].address: 0001:01:00.1: no device of this host is there; the",
        ),
        ('id = "abcd:0001"', "plan.toml:2: device[0].id: abcd:0001: no device of this host has it (optional = true"),
        ('class = "03"', "plan.toml:2: device[0].class: 03: no device of this host has it"),
        ('slot = "C7"', "plan.toml:2: device[0].slot: C7: this host has no such slot; it has C5, C6"),
        ('class = "0604"', "plan.toml:2: device[0].class: 0604: only bridges have it, and they stay with the host"),
        ('address = "0000:00:00.0"', "plan.toml:2: device[0].address: 0000:00:00.0 is a bridge, and bridges stay"),
        ('address = "0003:00:00.0"', "plan.toml:2: device[0].address: 0003:00:00.0 is in no IOMMU group, so that"),
        ('slot = "C6"\nowner = "nobody-here"', "plan.toml:3: device[0].owner: this host has no user 'nobody-here'"),
    ],
)
def test_an_entry_that_does_not_fit_the_host_tells_its_line(host, entry, message):
    assert does_not_fit(host, f"[[device]]\n{entry}").startswith(message)


def test_a_slot_without_a_device_is_told_from_no_slot(host):
    host.unplug(DISK)
    assert does_not_fit(host, '[[device]]\nslot = "C6"').startswith(
        "plan.toml:2: device[0].slot: C6: there is nothing in that slot"
    )


def test_an_optional_device_may_be_missing(host):
    found = desired.resolve(Desired((DesiredDevice(id="abcd:0001", optional=True),)), host)
    assert (found.targets, found.notes) == ({}, ["there is no device with id abcd:0001, which is optional"])


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (
            'id = "14e4:1657"',
            'slot = "C5"\ndriver = "none"',
            "device[1].driver: 0000:01:00.0 is to be on none: device[0] (line 1) says otherwise",
        ),
        (
            'address = "0:1:0.0"\nwhole_group = true',
            'address = "0:1:0.1"\ndriver = "host"',
            "device[1].driver: 0000:01:00.1 is to be on host: device[0] (line 1) says otherwise",
        ),
        (
            'slot = "C5"\npersistent = true',
            'id = "14e4:1657"',
            "device[1].persistent: 0000:01:00.0 is not to survive a reboot: device[0] (line 1) says otherwise",
        ),
        (
            'address = "0:1:0.0"\nowner = "root"',
            'address = "0:1:0.1"\nowner = "4321"',
            "device[1].owner: /dev/vfio/7 can have only one owner: device[0] (line 1) says otherwise",
        ),
        (
            'address = "0:1:0.0"\nmode = 0o600',
            'address = "0:1:0.1"\nmode = 0o660',
            "device[1].mode: /dev/vfio/7 can have only one mode: device[0] (line 1) says otherwise",
        ),
    ],
)
def test_entries_that_contradict_each_other_are_refused(host, one, other, message):
    assert message in does_not_fit(host, f"[[device]]\n{one}\n[[device]]\n{other}\n")


def test_entries_may_agree_and_complete_each_other(host):
    entries = (
        DesiredDevice(slot="C5", owner="4321"),
        DesiredDevice(address=CARD[1], mode=0o660, persistent=None),
        DesiredDevice(id="14e4:1657", owner="4321:77"),
    )
    found = desired.resolve(Desired(entries), host)
    assert list(found.targets) == CARD
    assert found.access == {7: Access(4321, 77, 0o660)}
    assert found.persistent == dict.fromkeys(CARD, False)
