"""How configuration space is held against what was recorded: every byte counts."""

from simtests.conformance import config_bytes


def test_runs_are_the_bytes_that_are_not_as_usual():
    assert config_bytes.runs(b"\0\1\2\0\0\3", lambda at: 0) == {"001": "0102", "005": "03"}
    assert config_bytes.runs(b"\xff\xff", lambda at: 0xFF) == {}


def test_difference_of_one_byte_is_told():
    wanted = {"size": 256, "before": {"000": "1234"}, "left": {"ff in accesses of 1 from 0": {"010": "f0"}}}
    assert config_bytes.differences(wanted, wanted) == []
    found = {"size": 256, "before": {"000": "1235"}, "left": {"ff in accesses of 1 from 0": {}}}
    assert config_bytes.differences(found, wanted) == [
        "before: at 0x1 0x35, recorded 0x34",
        "ff in accesses of 1 from 0: at 0x10 as usual, recorded 0xf0",
    ]


def test_every_recorded_device_was_written_in_every_way():
    ways = len(config_bytes.PATTERNS) * len(config_bytes.PASSES)
    for target, models in {
        "powernv8": {"edu", "pci-testdev", "nvme"},
        "pseries": {"edu", "e1000e"},
        "q35": {"edu", "e1000e"},
    }.items():
        for model in models:
            found = config_bytes.recorded(target, model)
            assert len(found["left"]) == ways
            assert all(found["left"].values())  # at least the IDs cannot be changed
