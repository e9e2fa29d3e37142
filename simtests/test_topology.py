"""Topology files: what the packaged ones say, and how a wrong one is refused."""

from pathlib import Path

import pytest

from vfio import topology
from vfio.topology import TopologyError, Window

GOOD = """\
description = "a small machine"

[platform]
name = "PowerNV"
cpu = "POWER8"
mmu = "Hash"
eeh = true

[iommu]
default_window = { start = 0, size = 0x80000000, page_size = 4096 }
second_window_start = 0x0800_0000_0000_0000
page_sizes = 0x11000
levels = 5
windows = 2

[machine]
type = "powernv8"
memory = 0x40000000
devices = []

[[phb]]
index = 0
domain = 0

[phb.root_port]
model = "pnv-phb-root-port"
address = "0000:00:00.0"
vendor = 0x1014
device = 0x03dc
class = 0x060400

[[phb.device]]
model = "edu"
slot = "0.0"
address = "0000:01:00.0"
vendor = 0x1234
device = 0x11e8
class = 0x00ff00
group = 4
pe = 0xfd
properties = { multifunction = true, dma_mask = 0xff, label = "x" }

[[phb.device]]
model = "pci-testdev"
slot = "0.1"
address = "0000:01:00.1"
vendor = 0x1b36
device = 0x0005
class = 0x00ff00
group = 4
pe = 0xfd

[[phb]]
index = 1
domain = 1

[[phb.device]]
model = "nvme"
slot = "0.0"
address = "0001:01:00.0"
vendor = 0x1b36
device = 0x0010
class = 0x010802
group = 7
pe = 0xfd
drive = 0x100000
"""


def refused(source: str) -> str:
    """The message that refuses `source`."""
    with pytest.raises(TopologyError) as caught:
        topology.parse(source, "machine.toml")
    return str(caught.value)


def line_of(source: str, text: str, occurrence: int = 1) -> int:
    """Number of the line that starts with `text` for the n-th time."""
    lines = [n for n, line in enumerate(source.splitlines(), start=1) if line.startswith(text)]
    return lines[occurrence - 1]


def test_file_becomes_a_machine() -> None:
    machine = topology.parse(GOOD, "some/small.toml")
    assert (machine.name, machine.description) == ("small", "a small machine")
    assert machine.iommu.default_window == Window(0, 1 << 31, 4096)
    assert machine.iommu.page_sizes == 0x11000
    assert [phb.domain for phb in machine.phbs] == [0, 1]
    edu = machine.device("0000:01:00.0")
    assert (edu.vendor, edu.device, edu.group, edu.pe) == (0x1234, 0x11E8, 4, 0xFD)
    assert edu.properties == (("multifunction", "on"), ("dma_mask", "0xff"), ("label", "x"))
    assert machine.device("0001:01:00.0").drive == 1 << 20


def test_root_port_is_found_but_is_no_device() -> None:
    machine = topology.parse(GOOD)
    assert machine.device("0000:00:00.0").model == "pnv-phb-root-port"
    assert [device.address for device in machine.devices] == ["0000:01:00.0", "0000:01:00.1", "0001:01:00.0"]


def test_address_that_is_not_there_raises_key_error() -> None:
    with pytest.raises(KeyError, match=r"0009:01:00\.0"):
        topology.parse(GOOD).device("0009:01:00.0")


def test_groups_hold_their_devices() -> None:
    groups = topology.parse(GOOD).groups()
    assert {number: [device.slot for device in some] for number, some in groups.items()} == {
        4: ["0.0", "0.1"],
        7: ["0.0"],
    }


def test_part_of_a_machine_numbers_its_groups_from_0() -> None:
    part = topology.parse(GOOD).only([1])
    assert [(device.address, device.group, device.pe) for device in part.devices] == [("0001:01:00.0", 0, 0xFD)]


def test_part_with_a_phb_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="has no PHB 3; it has 0, 1"):
        topology.parse(GOOD).only([0, 3])


@pytest.mark.parametrize("name", topology.names())
def test_packaged_topologies_load(name: str) -> None:
    machine = topology.load(name)
    assert machine.name == name
    assert machine.devices[0].model == "edu"


def test_the_three_machines_of_the_lab_are_packaged() -> None:
    assert {"power8", "power9", "pseries"} <= set(topology.names())


@pytest.mark.parametrize("name", ["power8", "power9", "power10"])
def test_bare_machines_have_a_fast_edu_a_lone_edu_and_an_nvme(name: str) -> None:
    machine = topology.load(name)
    by_group = {number: [device.model for device in some] for number, some in machine.groups().items()}
    assert by_group == {0: ["edu", "pci-testdev"], 1: ["edu"], 2: ["nvme"]}


def test_load_takes_the_path_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(GOOD)
    assert topology.load(file).name == "mine"


def test_unknown_name_lists_the_packaged_ones() -> None:
    with pytest.raises(TopologyError, match=r"no topology 'power7'; there are power10, power8, power9, pseries"):
        topology.load("power7")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match=r"nowhere\.toml: cannot be read"):
        topology.load(tmp_path / "nowhere.toml")


def test_text_that_is_not_toml_tells_its_line() -> None:
    assert refused("description = \n").startswith("machine.toml: not TOML: ")


def test_unknown_key_tells_file_line_and_key() -> None:
    source = GOOD.replace("levels = 5", "levels = 5\nlevel = 5")
    assert refused(source) == f"machine.toml:{line_of(source, 'level =')}: iommu.level: unknown key"


def test_unknown_key_of_the_second_phb_tells_the_right_line() -> None:
    source = GOOD.replace("index = 1", "index = 1\ncolour = 1")
    assert refused(source) == f"machine.toml:{line_of(source, 'colour')}: phb[1].colour: unknown key"


def test_missing_key_tells_where_its_table_begins() -> None:
    source = GOOD.replace("cpu = ", "#cpu = ")
    assert (
        refused(source) == f"machine.toml:{line_of(source, '[platform]')}: platform.cpu: missing; it must be a string"
    )


def test_missing_key_of_the_second_device_tells_where_the_device_begins() -> None:
    source = GOOD.replace('model = "pci-testdev"\n', "")
    line = line_of(source, "[[phb.device]]", 2)
    assert refused(source) == f"machine.toml:{line}: phb[0].device[1].model: missing; it must be a string"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("levels = 5", 'levels = "5"', "iommu.levels: '5' is not an integer"),
        ("levels = 5", "levels = true", "iommu.levels: True is not an integer"),
        ("levels = 5", "levels = 0", "iommu.levels: 0x0 is not in 0x1..0x7fffffffffffffff"),
        ("eeh = true", "eeh = 1", "platform.eeh: 1 is not true or false"),
        ('name = "PowerNV"', 'name = "powernv"', "platform.name: 'powernv' is not one of PowerNV, pSeries"),
        (
            "page_sizes = 0x11000",
            "page_sizes = 0x10000",
            "iommu.page_sizes: 0x10000 lacks the default window's page size",
        ),
        ("page_size = 4096", "page_size = 4097", "iommu.default_window.page_size: must be a power of two"),
        (
            "0x0800_0000_0000_0000",
            "0x1000",
            "iommu.second_window_start: 0x1000 lies inside or below the default window",
        ),
        ("devices = []", "devices = [1]", "machine.devices: 1 is not a string"),
        ('"0000:01:00.1"', '"1:0.1"', "phb[0].device[1].address: '1:0.1' is not of the form 0000:01:00.0"),
        ('"0000:01:00.1"', '"0001:01:00.1"', "phb[0].device[1].address: 0001:01:00.1 is not in the PHB's domain 0000"),
        ('"0000:01:00.1"', '"0000:01:00.2"', "phb[0].device[1].slot: 0.1 contradicts the address 0000:01:00.2"),
        ('slot = "0.1"', 'slot = "9"', "phb[0].device[1].slot: '9' is not of the form 0.1"),
        ("index = 1", "index = 0", "phb[1].index: index 0 is used twice"),
        ("group = 7", "group = 4", "phb[1].device[0].group: group 4 is one PE, and already that of domain 0, PE 253"),
        ('label = "x"', 'label = "a,b"', "phb[0].device[0].properties: label = 'a,b' is not a string without commas"),
        ("class = 0x010802", "class = 0x1000000", "phb[1].device[0].class: 0x1000000 is not in 0x0..0xffffff"),
    ],
)
def test_broken_rule_is_named_with_its_value(old: str, new: str, message: str) -> None:
    source = GOOD.replace(old, new)
    assert source != GOOD
    assert message in refused(source)


def test_address_used_twice_is_refused() -> None:
    source = GOOD.replace('slot = "0.1"\naddress = "0000:01:00.1"', 'slot = "0.0"\naddress = "0000:01:00.0"')
    assert "phb[0].device[1].address: 0000:01:00.0 is used twice" in refused(source)


def test_machine_without_phbs_is_refused() -> None:
    source = GOOD[: GOOD.index("[[phb]]")] + "[[phb]]\nindex = 0\ndomain = 0\ndevice = []\n"
    assert "phb[0].device: must be a list of one or more tables" in refused(source)
