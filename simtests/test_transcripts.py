"""The fake against transcripts of real kernels: every call of every conformance case, answer by answer.

The files are recorded by ``python -m hwtests.transcripts record TARGET…``; `simtests.replay` says what is compared.
"""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from simtests.replay import Replay

DIRECTORY = Path(__file__).parent / "transcripts"
PRESETS = {
    "powernv8": "fake:power8?freeze=0",
    "powernv8-64k": "fake:power8?page_size=65536&freeze=0",
    "powernv9": "fake:power9?freeze=0",
    "pseries": "fake:pseries?freeze=0",
}
"""Each target of the lab, and the fake of the same machine, whose PEs do not freeze by themselves: it is QEMU's."""
LEFT_OUT = {
    "eeh_host::test_host_recovers_what_nobody_has_open",  # the host recovers PEs at a time of its own
    "eeh_host::test_host_recovers_it_though_its_group_is_in_a_container",
    "eeh_host::test_host_leaves_alone_and_says_nothing_of_what_is_open",
    "eeh_host::test_looking_at_a_frozen_pe_keeps_the_host_from_recovering_it",
    "eeh_host::test_owner_who_only_thaws_leaves_a_pe_that_the_host_does_not_recover",
    "eeh_host::test_child_is_unavailable_while_the_host_recovers_its_parent_and_frozen_afterwards",
    "core_group::test_full_descriptor_table_raises_emfile_before_the_container_is_looked_at",  # a limit of the process
    "core_unbind::test_unbind_waits_for_the_device_and_asks_for_it",  # calls at the same time
    "library_device::test_interrupt_says_when_a_transfer_is_done",  # an interrupt some time after the call
    "library_spapr_v2::test_two_threads_map_in_one_container",  # calls at the same time
    "pci_config::test_every_byte_of_an_express_device_keeps_what_it_should",  # 20,000 calls, and tables of its own
    "pci_feature::test_signalled_ioeventfd_writes_the_register_little_endian",  # writes to an eventfd
    # a descriptor, in the data of a feature, that is open in one process and not in another
    "pci_feature::test_low_power_with_wakeup_needs_room_for_an_eventfd",
    # huge pages that come from elsewhere than the seam
    "spapr_v2_mapping::test_huge_page_before_ordinary_ones_lets_the_region_claim_its_size_and_the_pages_are_refused",
}
"""The cases that no transcript can hold; on the fake they run as all others do."""


@cache
def cases(target: str) -> dict[str, list[dict[str, Any]]]:
    """The records of each case; those of the file's first line under an empty name."""
    found: dict[str, list[dict[str, Any]]] = {"": []}
    name = ""
    with gzip.open(DIRECTORY / f"{target}.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            name = record.get("case", name)
            found.setdefault(name, []).append(record)
    return found


def every_case() -> list[tuple[str, str]]:
    return [(target, name) for target in PRESETS for name in cases(target) if name and name not in LEFT_OUT]


@pytest.mark.parametrize(("target", "case"), every_case())
def test_fake_answers_as_the_kernel_did(target, case):
    first, *records = cases(target)[case]
    differences = list(Replay(PRESETS[target], first["start"], records).differences())
    assert not differences, "\n".join([f"{target}: {case}", *map(str, differences)])


@pytest.mark.parametrize("target", PRESETS)
def test_transcript_leaves_out_only_what_cannot_be_recorded(target):
    (header,) = cases(target)[""]
    assert header["target"] == target
    # What `processes` is about is what no transcript can hold.
    assert {name for name in header["left_out"] if not name.startswith("processes::")} <= LEFT_OUT
