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
    "q35": "fake:x86?freeze=0",
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
    "pci_feature::test_one_eventfd_writes_registers_of_two_devices",
    "pci_feature::test_signalled_ioeventfd_writes_the_register_little_endian",  # writes to an eventfd
    # a descriptor, in the data of a feature, that is open in one process and not in another
    "pci_feature::test_low_power_with_wakeup_needs_room_for_an_eventfd",
    # what a program does to an eventfd
    "library_irqs::test_resampling_unmasks_by_an_eventfd",
    "library_irqs::test_intx_is_armed_again_with_what_unmasks_it",
    "pci_intx::test_closed_eventfd_makes_room_for_another_one",
    "pci_intx::test_counter_from_before_unmasks_intx_and_stays",
    "pci_intx::test_counter_of_an_eventfd_for_unmasking_is_taken_by_the_kernel",
    "pci_intx::test_signal_from_before_unmasks_at_once",
    # what other cases have left in registers that no reset clears, and the host's own
    "library_pci::test_sysfs_of_who_is_not_root_ends_behind_the_header",
    "library_pci::test_sysfs_shows_every_device_of_the_host_without_a_fault",
    "pci_reset_state::test_way_through_d3hot_keeps_configuration_space",
    "sysfs_files::test_pc_resets_a_card_by_its_power_state_and_an_edu_not_at_all",
    "sysfs_files::test_reset_through_the_file_keeps_configuration_space",
    "sysfs_files::test_root_reads_all_of_configuration_space_and_others_64_bytes",
    # modules, signals, other processes: no calls of the seam
    "core_container::test_iommu_module_stays_while_a_container_uses_it",
    "core_container::test_without_the_iommu_module_nothing_is_an_extension_and_no_type_can_be_set",
    "core_unbind::test_unbind_waits_for_a_mapping_too",
    "pci_regions::test_mapping_made_without_memory_decode_is_sigbus_until_it_is_on",
    "pci_regions::test_touching_a_mapping_in_d3hot_is_sigbus",
    "pci_regions::test_touching_a_mapping_in_low_power_is_sigbus",
    "pci_regions::test_touching_a_mapping_without_memory_decode_is_sigbus",
    "spapr_v2_windows::test_device_that_a_driver_of_the_guest_has_used_gets_no_window_until_it_boots_again",
    # pages that lie in the program's own memory
    "arguments::test_larger_argsz_is_accepted_by_every_request_and_nothing_behind_its_struct_is_touched",
    # huge pages that come from elsewhere than the seam
    "spapr_v2_mapping::test_huge_page_before_ordinary_ones_lets_the_region_claim_its_size_and_the_pages_are_refused",
}
"""The cases that no transcript can hold; on the fake they run as all others do."""

NEVER_RECORDED = {"processes", "library_eeh", "papr", "pci_config_bytes", "nvme", "nvme_freeze"}
"""Files whose cases are about several processes, take too many calls, or compare with records of their own."""


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
    left_out = {name for name in header["left_out"] if name.partition("::")[0] not in NEVER_RECORDED}
    assert left_out <= LEFT_OUT
