"""The replay of transcripts finds what is different: here the transcript is changed, not the fake."""

from __future__ import annotations

import copy

import pytest

from simtests.replay import Replay
from simtests.test_transcripts import PRESETS, cases

TARGET, CASE = "powernv8", "pci_intx::test_intx_of_the_device_arrives_once_until_it_is_unmasked"


@pytest.fixture
def transcript():
    first, *records = copy.deepcopy(cases(TARGET)[CASE])
    return first["start"], records


def differences(transcript):
    start, records = transcript
    return [str(each) for each in Replay(PRESETS[TARGET], start, records).differences()]


def find(transcript, call, request=None):
    """The first record of a call."""
    for record in transcript[1]:
        if record["call"] == call and (request is None or request in record["args"][1]["request"]):
            return record
    raise AssertionError(call)


def test_transcript_as_it_is_has_no_difference(transcript):
    assert differences(transcript) == []


def test_another_result_is_a_difference(transcript):
    find(transcript, "ioctl", "VFIO_DEVICE_SET_IRQS")["result"] = 1
    (found,) = differences(transcript)
    assert "VFIO_DEVICE_SET_IRQS, {argsz=24, flags=DATA_EVENTFD|ACTION_TRIGGER" in found
    assert "the kernel gave 1, the fake 0" in found


def test_an_errno_instead_of_a_result_is_a_difference(transcript):
    record = find(transcript, "ioctl", "VFIO_DEVICE_SET_IRQS")
    del record["result"]
    record["errno"] = "EBUSY"
    (found,) = differences(transcript)
    assert "the kernel gave EBUSY, the fake 0" in found


def test_another_byte_of_an_argument_is_a_difference(transcript):
    argument = find(transcript, "ioctl", "VFIO_DEVICE_SET_IRQS")["args"][2]
    argument["after"] = argument["after"][:-2] + "55"
    (found,) = differences(transcript)
    assert "bytes after the call differ from offset" in found


def test_another_byte_that_was_read_is_a_difference(transcript):
    find(transcript, "pread")["result"] = {"hex": "deadbeef"}
    (found,) = differences(transcript)
    assert "the kernel gave {'hex': 'deadbeef'}, the fake {'hex': '010000ed'}" in found


def test_a_signal_that_does_not_come_is_a_difference(transcript):
    record = next(each for each in transcript[1] if any(each.get("signals", {}).values()))
    record["signals"] = dict.fromkeys(record["signals"], 2)
    (found,) = differences(transcript)
    assert "the kernel signalled {'fd1': 2}, the fake {'fd1': 1}" in found


def test_another_target_of_a_link_is_a_difference(transcript):
    find(transcript, "readlink")["result"] = "../elsewhere"
    (found,) = differences(transcript)
    assert found.startswith('call 1: readlink("/sys/bus/pci/devices/0000:01:00.0/iommu_group") = "../elsewhere"')


def test_device_that_was_elsewhere_at_the_beginning_is_a_difference(transcript):
    start, records = transcript
    start["drivers"]["0000:01:00.0"] = start["overrides"]["0000:01:00.0"] = None
    assert differences((start, records))


def test_reads_that_wait_for_something_count_by_the_last_one(transcript):
    start, records = transcript
    at = records.index(find(transcript, "pread"))
    waiting = copy.deepcopy(records[at])
    waiting["result"] = {"hex": "00000000"}
    assert differences((start, [*records[:at], waiting, *records[at:]])) == []
