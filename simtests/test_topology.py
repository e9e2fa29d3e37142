"""Topology files: what the packaged ones say, and how a wrong one is refused."""

import re
from pathlib import Path

import pytest

from vfio import topology, topology_device, topology_iommu
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
    assert machine.groups()


LAB = [name for name in topology.names() if topology.load(name).machine]


@pytest.mark.parametrize("name", LAB)
def test_machines_of_the_lab_begin_with_an_edu(name: str) -> None:
    assert topology.load(name).devices[0].model == "edu"


def test_the_machines_of_the_lab_are_packaged() -> None:
    assert LAB == ["noiommu", "power10", "power8", "power9", "pseries", "siblings", "x86"]


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
    with pytest.raises(
        TopologyError,
        match=r"no topology 'power6'; there are document, example, noiommu, p4080, power10, power7, power8",
    ):
        topology.load("power6")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match=r"nowhere\.toml: cannot be read"):
        topology.load(tmp_path / "nowhere.toml")


def test_text_that_is_not_toml_tells_its_line() -> None:
    assert refused("description = \n").startswith("machine.toml: not TOML: ")


def test_unknown_key_tells_file_line_and_key() -> None:
    source = GOOD.replace("levels = 5", "levels = 5\nlevel = 5")
    assert (
        refused(source) == f"machine.toml:{line_of(source, 'level =')}: iommu.level: unknown key; did you mean levels?"
    )


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
        ("levels = 5", "levels = 0", "iommu.levels: 0x0 is not in 0x1..0x5"),
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
        ("windows = 2", "windows = 3", "iommu.windows: 0x3 is not in 0x1..0x2"),
        ("windows = 2", "windows = 2\ndynamic_windows = 1", "iommu.dynamic_windows: 1 is not true or false"),
        ("eeh = true", "eeh = true\npage_size = 8192", "platform.page_size: 8192 is not 4096 or 65536"),
        ("eeh = true", 'eeh = true\nkernel = "6.1"', "platform.kernel: '6.1' is not one of 6.12, 7.2"),
        ("drive = 0x100000", "secondary_bus = 2", "secondary_bus: a device of class 0x010802 is no bridge"),
        ("drive = 0x100000", 'driver = "../x"', "phb[1].device[0].driver: '../x' is not a name"),
        ("drive = 0x100000", 'driver = ""', "phb[1].device[0].driver: '' is not a name"),
        ("drive = 0x100000", 'disks = [{ name = "a", number = "x" }]', "disks[0].number: 'x' is not of the form 259:0"),
        ("drive = 0x100000", "disks = [{}]", "phb[1].device[0].disks[0].number: missing; it must be a string"),
        ("drive = 0x100000", "interfaces = [1]", "phb[1].device[0].interfaces: must be a list of one or more tables"),
        ("drive = 0x100000", 'interfaces = [{ name = "a", ip = 1 }]', "interfaces[0].ip: unknown key"),
        ("drive = 0x100000", "revision = 256", "phb[1].device[0].revision: 0x100 is not in 0x0..0xff"),
        (
            "drive = 0x100000",
            "bars = [{ bar = 6, size = 4096 }]",
            "phb[1].device[0].bars[0].bar: 0x6 is not in 0x0..0x5",
        ),
        ("drive = 0x100000", "bars = [{ bar = 0, size = 4095 }]", "bars[0].size: 0xfff is not a power of two"),
        ("drive = 0x100000", "bars = [{ bar = 5, size = 4096, bits64 = true }]", "bars[0].bar: BAR 6 is used twice"),
        (
            "drive = 0x100000",
            "bars = [{ bar = 0, size = 4096, bits64 = true }, { bar = 1, size = 4096 }]",
            "bars[1].bar: BAR 1 is used twice",
        ),
        ("drive = 0x100000", "bars = [{ bar = 0, size = 16, io = true, bits64 = true }]", "bars[0].io: I/O ports are"),
        ("drive = 0x100000", "rom = 0x900", "phb[1].device[0].rom: 0x900 is not a power of two"),
        (
            "drive = 0x100000",
            "msix = { vectors = 1, bar = 0, table = 4, pba = 0 }",
            "msix.table: 0x4 is not a multiple",
        ),
        (
            "drive = 0x100000",
            "bars = [{ bar = 0, size = 4096 }]\nmsix = { vectors = 257, bar = 0, table = 0, pba = 0 }",
            "phb[1].device[0].msix: BAR 0 is no memory of 0x1010 bytes",
        ),
        ("class = 0x060400", "class = 0x060400\nsecondary_bus = 0", "secondary_bus: 0x0 is not in 0x1..0xff"),
        (
            "drive = 0x100000",
            'driver = "a"\n[[driver]]\nname = "a"\nids = ["14e4"]',
            "driver[0].ids: '14e4' is not of the form 14e4:1657",
        ),
        (
            "drive = 0x100000",
            '[[driver]]\nname = "a"\n[[driver]]\nname = "a"',
            "driver[1].name: driver a is used twice",
        ),
        (
            'label = "x" }',
            'label = "x" }\nwindow = { start = 0, size = 4096, page_size = 4096 }\n'
            "[[phb.device]]\nmodel='edu'\naddress='0000:01:00.2'\nvendor=1\ndevice=1\nclass=0\ngroup=4\npe=0xfd\n"
            "window = { start = 4096, size = 4096, page_size = 4096 }",
            "phb[0].device[1].window: contradicts the window that group 4 has already",
        ),
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


# --- what only the modelled kernel needs ---

SMALL = """\
description = "two bridges in a row"

[platform]
name = "PowerNV"
cpu = "POWER7"
mmu = "Hash"
eeh = true

[iommu]
dynamic_windows = false
default_window = { start = 0, size = 0x40000000, page_size = 4096 }
page_sizes = 0x1000
levels = 1
windows = 1

[[phb]]
domain = 0

[[phb.device]]
model = "bridge"
address = "0000:00:00.0"
vendor = 1
device = 1
class = 0x060400
secondary_bus = 1

[[phb.device]]
model = "bridge"
address = "0000:01:00.0"
vendor = 1
device = 1
class = 0x060400
secondary_bus = 2

[[phb.device]]
model = "endpoint"
address = "0000:02:1f.3"
vendor = 1
device = 2
class = 0
group = 5
"""


def test_what_is_for_qemu_may_be_left_out() -> None:
    machine = topology.parse(SMALL)
    assert machine.machine is None
    assert machine.phbs[0].index == 0
    assert machine.device("0000:02:1f.3").slot == "1f.3"
    assert machine.memory == 16 << 30
    assert (machine.platform.page_size, machine.platform.kernel, machine.platform.release) == (4096, "6.12", None)


def test_parents_are_found_by_bus_numbers() -> None:
    phb = topology.parse(SMALL).phbs[0]
    upper, lower, device = phb.devices
    assert (phb.parent(device), phb.parent(lower), phb.parent(upper)) == (lower, upper, None)


def test_bus_below_a_root_port_is_that_of_its_devices() -> None:
    assert topology.parse(GOOD).device("0000:00:00.0").secondary_bus == 1


def test_bus_below_two_bridges_is_refused() -> None:
    assert "phb[0].device[1].secondary_bus: bus 0000:01 is used twice" in refused(
        SMALL.replace("secondary_bus = 2", "secondary_bus = 1")
    )


def test_bridge_that_is_below_itself_is_refused() -> None:
    source = SMALL.replace('"0000:01:00.0"', '"0000:03:00.0"')
    assert "phb[0].device[1].secondary_bus: bus 2 is not below 3" in refused(source)


def test_second_window_without_dynamic_windows_is_refused() -> None:
    source = SMALL.replace("levels = 1", "levels = 1\nsecond_window_start = 0x80000000")
    assert "iommu.second_window_start: unknown key" in refused(source)


def test_power7_has_two_pes_with_a_fixed_window_each_and_says_where_that_is_from() -> None:
    machine = topology.load("power7")
    assert machine.iommu.dynamic_windows is False
    assert [machine.default_window(group) for group in machine.groups()] == [
        Window(0, 1 << 30, 4096),
        Window(1 << 30, 1 << 30, 4096),
    ]
    assert "from the documents alone" in machine.description


def test_bars_are_those_that_are_said_or_those_of_the_model() -> None:
    source = GOOD.replace("drive = 0x100000", "bars = [{ bar = 2, size = 0x100, io = true }]")
    assert topology.parse(source).device("0001:01:00.0").bars == (topology.Bar(2, 0x100, io=True),)
    assert topology.parse(GOOD).device("0001:01:00.0").bars is None
    assert topology.parse(GOOD.replace("drive = 0x100000", "bars = []")).device("0001:01:00.0").bars == ()


@pytest.mark.parametrize("size", [0x800, 0x1000, 0x10000])
def test_image_of_an_expansion_rom_is_one_to_firmware(size: int) -> None:
    image = topology.option_rom(size)
    assert len(image) == size - 512
    assert image[:2] == b"\x55\xaa"
    data = int.from_bytes(image[0x18:0x1A], "little")
    assert image[data : data + 4] == b"PCIR"
    assert int.from_bytes(image[data + 16 : data + 18], "little") * 512 == len(image)
    assert image[data + 21] & 0x80  # the last image


def test_document_has_its_group_26() -> None:
    machine = topology.load("document")
    assert [device.address for device in machine.groups()[26]] == ["0000:00:1e.0", "0000:06:0d.0", "0000:06:0d.1"]
    device = machine.device("0000:06:0d.0")
    assert (device.vendor, device.device, device.revision) == (0x1102, 0x0002, 0x08)
    assert machine.phbs[0].parent(device) == machine.device("0000:00:1e.0")


def test_example_uses_every_key() -> None:
    """It is the format's description, so what it lacks nobody finds."""
    source = Path(topology.__file__).parent.joinpath("topologies", "example.toml").read_text()
    keys = set(re.findall(r"([a-z_0-9]+) =", source))
    readers = "".join(Path(each.__file__).read_text() for each in (topology, topology_device, topology_iommu))
    read = set(re.findall(r'table\.[a-z_]+\("([a-z_0-9]+)"', readers))
    for_qemu = {"type", "devices", "index", "slot", "root_port", "properties", "drive"}
    pc = {"ranges", "chipset", "reserved", "remaps_interrupts"}  # x86.toml describes these, and p4080.toml those:
    not_power = pc | {"aperture_bits", "msi_banks", "cpus"}
    assert keys - {"description"} == read - for_qemu - not_power
