"""The fuzzer, tested with the model on both sides; and what programs of the past got as answers from real kernels."""

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hwtests.fuzz import render, sides
from hwtests.fuzz.arena import Arena
from hwtests.fuzz.compare import Difference, by_signature, compare
from hwtests.fuzz.execute import Run
from hwtests.fuzz.facts import Facts
from hwtests.fuzz.generate import generate
from hwtests.fuzz.program import Buffer, Program, Step
from hwtests.fuzz.shrink import shrink
from hwtests.lab.targets import target
from vfio import uapi
from vfio.fake.backend import FakeBackend

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

TARGETS = ("powernv8", "powernv8-64k", "powernv9", "pseries", "q35")
CORPUS = Path(__file__).parent / "fuzz_corpus.jsonl"
Made = tuple[str, dict[str, object]]  # a step: its kind, and its arguments
OPENED: tuple[Made, ...] = (  # a container with a v2 IOMMU and the first device
    ("open", {"path": "/dev/vfio/vfio"}),
    ("open", {"path": "/dev/vfio/0"}),
    ("ioctl", {"fd": 1, "request": "VFIO_GROUP_SET_CONTAINER", "by": "buffer", "int": ["fd", 0]}),
    ("ioctl", {"fd": 0, "request": "VFIO_SET_IOMMU", "by": "value", "value": 7}),
    ("ioctl", {"fd": 1, "request": "VFIO_GROUP_GET_DEVICE_FD", "by": "buffer", "string": "0000:01:00.0"}),
)


def facts_of(name: str) -> Facts:
    where = target(name)
    return Facts.of(name, where.page_size, where.machine())


@pytest.fixture
def facts() -> Facts:
    return facts_of("powernv8")


def program(*steps: Made, buffers: tuple[Buffer, ...] = (Buffer(0x4000),)) -> Program:
    return Program("by hand", buffers, tuple(Step(number, *step) for number, step in enumerate(steps)))


def ioctl(fd: int, request: str, by: str = "buffer", /, **fields: object) -> Made:
    kind = uapi.argument(request)
    assert kind is not None
    return "ioctl", {"fd": fd, "request": request, "by": by, "struct": {"argsz": uapi.sizeof(kind), **fields}}


def last(facts: Facts, *steps: Made) -> dict[str, object]:
    """The record of the last of these steps, made after those of OPENED."""
    return sides.fake(facts, program(*OPENED, *steps)).records[-1]


# --- programs ---


@pytest.mark.parametrize("name", TARGETS)
def test_a_program_comes_from_its_seed_and_the_facts_alone(name: str) -> None:
    facts = facts_of(name)
    assert generate(facts, "1", 60) == generate(facts, "1", 60)
    assert generate(facts, "1", 60) != generate(facts, "2", 60)


@pytest.mark.parametrize("name", TARGETS)
def test_a_program_survives_being_written_as_json(name: str) -> None:
    facts = facts_of(name)
    assert Facts.from_json(json.loads(json.dumps(facts.to_json()))) == facts
    for number in range(50):
        made = generate(facts, f"json/{number}", 60)
        assert Program.loads(made.dumps()) == made


def test_a_step_takes_results_of_earlier_steps_only(facts: Facts) -> None:
    for number in range(50):
        for step in generate(facts, f"order/{number}", 60).steps:
            assert all(used < step.id for used in step.uses()), step


def test_every_kind_of_call_is_generated(facts: Facts) -> None:
    made = [step for number in range(100) for step in generate(facts, f"all/{number}", 60).steps]
    requests = {step.args["request"] for step in made if "request" in step.args}
    expected = {each.name for each in uapi.REQUESTS.values() if not each.iommu or "spapr" in each.iommu}
    expected -= {name for name in expected if "IOMMUFD" in name or "GFX" in name or "PRECOPY" in name}
    assert requests == expected
    assert {step.op for step in made} >= {
        "open",
        "dup",
        "close",
        "pread",
        "pwrite",
        "mmap",
        "munmap",
        "load",
        "store",
        "dma",
    }


# --- running them ---


@pytest.mark.parametrize("name", TARGETS)
def test_the_model_answers_like_itself_and_never_raises_what_no_kernel_does(name: str) -> None:
    facts = facts_of(name)
    for number in range(25):
        made = generate(facts, f"self/{number}", 60)
        one, other = sides.fake(facts, made), sides.fake(facts, made)
        assert compare(made, one, other)[0] is None
        assert [record for record in one.records if "raised" in record] == []


def test_a_record_has_the_answer_the_changed_bytes_and_the_locked_memory(facts: Facts) -> None:
    info = last(facts, ioctl(0, "VFIO_IOMMU_SPAPR_TCE_GET_INFO"))
    assert info["ret"] == 0
    assert info["out"] == {"4": "01", "15": "80", "17": "100111", "24": "02", "28": "05"}
    register = ioctl(0, "VFIO_IOMMU_SPAPR_REGISTER_MEMORY", vaddr=["buffer", 0, 0], size=0x4000)
    assert last(facts, register) == {"ret": 0, "locked": 16}
    assert last(facts, register, register) == {"errno": "EBUSY", "locked": 16}


def test_an_argument_is_cut_off_by_a_page_that_cannot_be_read(facts: Facts) -> None:
    step = ("ioctl", {**ioctl(0, "VFIO_IOMMU_SPAPR_TCE_GET_INFO", "end")[1], "cut": 15})
    assert last(facts, step)["errno"] == "EFAULT"
    assert last(facts, ("ioctl", {**step[1], "cut": 16, "struct": {"argsz": 16}}))["ret"] == 0


def test_memory_has_holes_and_ends_before_a_page_that_cannot_be_touched(facts: Facts) -> None:
    register = ioctl(0, "VFIO_IOMMU_SPAPR_REGISTER_MEMORY", vaddr=["buffer", 0, 0], size=0x5000)
    assert last(facts, register)["ret"] == 4
    holed = (Buffer(0x4000, 0, ((2, "read"),)),)
    assert sides.fake(facts, program(*OPENED, register, buffers=holed)).records[-1]["ret"] == 2


def huge(facts: Facts, offset: int, pages: int) -> dict[str, object]:
    """The record of a REGISTER of memory that begins `offset` bytes into a buffer of two hugetlb pages."""
    step = ioctl(
        0, "VFIO_IOMMU_SPAPR_REGISTER_MEMORY", vaddr=["buffer", 0, offset], size=pages * (facts.huge_page or 65536)
    )
    buffer = Buffer(2 * facts.huge_page, facts.huge_page)
    return sides.fake(facts, program(*OPENED, step, buffers=(buffer,))).records[-1]


def test_hugetlb_memory_begins_and_ends_at_a_page_that_cannot_be_touched() -> None:
    facts = facts_of("powernv8-64k")
    page, huge_page = facts.page_size, facts.huge_page
    assert huge(facts, 0, 2)["ret"] == 0
    assert huge(facts, 0, 3)["ret"] == 2 * huge_page // page
    assert huge(facts, -page, 1)["errno"] == "EFAULT"
    assert huge(facts, -huge_page, 1)["errno"] == "EFAULT"
    assert huge(facts, 2 * huge_page, 1)["errno"] == "EFAULT"
    assert "skipped" in huge(facts, -huge_page - page, 1)
    assert "skipped" in huge(facts, 3 * huge_page, 1)


@pytest.mark.parametrize("offset", [-(1 << 32), -(1 << 31), -0x1000, 0x4000, 1 << 31, 1 << 32])
def test_what_lies_around_a_buffer_cannot_be_touched(facts: Facts, offset: int) -> None:
    register = ioctl(0, "VFIO_IOMMU_SPAPR_REGISTER_MEMORY", vaddr=["buffer", 0, offset], size=0x1000)
    assert last(facts, register)["errno"] == "EFAULT"


def test_buffers_are_as_far_from_each_other_in_every_run(facts: Facts) -> None:
    buffers = (Buffer(0x4000), Buffer(0x1000), Buffer(0x10000))

    def distances() -> list[int]:
        arena = Arena(sides.modelled(facts, program()), facts.page_size, buffers)
        room = arena.bad("hole")
        found = [room - arena.address(number, 0) for number in range(3)]
        arena.close()
        return found

    before = distances()
    with mmap.mmap(-1, 0x123000), mmap.mmap(-1, 1 << 32):
        assert distances() == before


def test_an_argument_finds_nothing_of_the_one_before_it(facts: Facts) -> None:
    arena = Arena(sides.modelled(facts, program()), facts.page_size, (Buffer(0x4000),))
    for how in ("address", "end", "readonly"):
        arena.place(b"\1" * 100, how)
        at = arena.place(b"\2" * 10, how)
        assert arena.placed(at, 10) == b"\2" * 10
        around = arena.placed(at + 10, 90) if how != "end" else arena.placed(at - 90, 90)
        assert around == b"\xaa" * 90
    at = arena.bad("end-8")
    assert arena.placed(at - 1, 9) == b"\xaa" + b"\xff" * 8
    assert arena.bad("hole") == at + 8
    arena.close()


def test_a_transfer_moves_what_was_in_one_buffer_to_another(facts: Facts) -> None:
    def moved(flags: int) -> list[int]:
        steps: list[Made] = [("pwrite", {"fd": 4, "data": "0600", "offset": 7 << 40 | 4})]
        for buffer in (0, 1):
            where: dict[str, object] = {"vaddr": ["buffer", buffer, 0], "size": 0x1000}
            steps.append(ioctl(0, "VFIO_IOMMU_SPAPR_REGISTER_MEMORY", **where))
            steps.append(ioctl(0, "VFIO_IOMMU_MAP_DMA", **where, iova=0x1000 * (buffer + 1), flags=flags))
        for iova, to in ((0x1000, "device"), (0x2000, "memory")):
            steps.append(("dma", {"fd": 4, "to": to, "iova": iova, "place": 0, "length": 64}))
        records = sides.fake(facts, program(*OPENED, *steps, buffers=(Buffer(0x1000), Buffer(0x1000)))).records
        assert records[-1]["ret"] == 0
        assert records[-2]["buffers"][0] == records[-1]["buffers"][0]
        return [each["buffers"][1] for each in records[-2:]]

    before, after = moved(3)
    assert before != after
    before, after = moved(1)  # the device may not write
    assert before == after


# --- what is never done ---

WINDOW = 0x80000000
MAP, UNMAP, CREATE = "VFIO_IOMMU_MAP_DMA", "VFIO_IOMMU_UNMAP_DMA", "VFIO_IOMMU_SPAPR_TCE_CREATE"


@pytest.mark.parametrize(
    "step",
    [
        ioctl(0, MAP, vaddr=["buffer", 0, 0], iova=WINDOW - 0x1000, size=0x2000, flags=3),
        ioctl(0, UNMAP, iova=WINDOW - 0x1000, size=0x2000),
        ioctl(0, UNMAP, "address", iova=0x1000, size=1 << 63),
        ioctl(0, UNMAP, iova=0, size=0),
        ioctl(0, MAP, vaddr=["buffer", 0, 0], iova=0, size=0x1000, flags=3),
        ioctl(0, MAP, vaddr=["buffer", 0, 0], iova=0, size=0, flags=3),
        ioctl(0, CREATE, page_shift=12, window_size=1 << 33, levels=1),
        ioctl(0, CREATE, page_shift=12, window_size=1 << 40, levels=3),
        ioctl(0, "VFIO_IOMMU_SPAPR_REGISTER_MEMORY", vaddr=["buffer", 0, 0], size=1 << 40),
        ioctl(0, "VFIO_EEH_PE_OP", op=6),
        ("ioctl", {"fd": 1, "request": "VFIO_GROUP_GET_DEVICE_FD", "by": "buffer", "string": "0001:01:00.0"}),
        ("pwrite", {"fd": 4, "data": "00000001", "offset": 0x98}),
        ("pread", {"fd": 4, "length": 8, "offset": 4}),
        ("dma", {"fd": 4, "to": "memory", "iova": 0x1000, "place": 0, "length": 4096}),
        ("dma", {"fd": 4, "to": "memory", "iova": WINDOW - 64, "place": 0, "length": 128}),
    ],
)
def test_what_would_hurt_is_not_done(facts: Facts, step: Made) -> None:
    assert "skipped" in last(facts, step)


def test_a_map_at_iova_0_is_done_once_its_memory_is_registered_for_certain(facts: Facts) -> None:
    where: dict[str, object] = {"vaddr": ["buffer", 0, 0], "size": 0x4000}
    steps = ioctl(0, "VFIO_IOMMU_SPAPR_REGISTER_MEMORY", **where), ioctl(0, MAP, **where, iova=0, flags=3)
    assert last(facts, *steps)["ret"] == 0
    unregister = ioctl(0, "VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY", **where)
    assert "skipped" in last(facts, steps[0], unregister, steps[1])


def test_only_one_window_is_created_on_pseries_where_more_would_blacklist_the_device() -> None:
    facts = facts_of("pseries")
    create = ioctl(0, CREATE, page_shift=16, window_size=1 << 28, levels=1)
    records = sides.fake(facts, program(*OPENED[:4], create, create)).records
    assert records[-2]["ret"] == 0
    assert "skipped" in records[-1]


# --- comparing, and making programs short ---


class Lying(FakeBackend):
    """A model with a mistake: a REGISTER of memory with a hole succeeds, where a real kernel says how many pages it has."""

    def ioctl(self, fd: int, request: int, arg: int | WriteableBuffer = 0) -> int:
        result = super().ioctl(fd, request, arg)
        return 0 if request == uapi.VFIO_IOMMU_SPAPR_REGISTER_MEMORY else result


def lying(facts: Facts, made: Program) -> Run:
    backend = sides.modelled(facts, made)
    backend.__class__ = Lying
    return sides.run_here(facts, made, backend)


@pytest.fixture(scope="module")
def found() -> Difference:
    """The first difference between the model and one with a mistake."""
    facts = facts_of("powernv8")
    for number in range(200):
        made = generate(facts, f"lie/{number}", 30)
        difference, _ = compare(made, sides.fake(facts, made), lying(facts, made))
        if difference is not None:
            return difference
    raise AssertionError("no program found the mistake")


def test_a_mistake_of_the_model_is_found(found: Difference) -> None:
    assert found.step.args["request"] == "VFIO_IOMMU_SPAPR_REGISTER_MEMORY"
    assert found.real["ret"] > 0
    assert found.fake["ret"] == 0


def test_the_program_of_a_difference_is_made_short_and_still_shows_it(found: Difference, facts: Facts) -> None:
    def run_real(programs: Sequence[Program]) -> list[Run]:
        return [sides.fake(facts, each) for each in programs]

    (short,) = shrink([found], run_real, lambda program: lying(facts, program))
    assert short.signature == found.signature
    assert len(short.program.steps) == 5  # open both, join them, set the IOMMU, register
    text = "\n".join(render.difference(short))
    assert "> ioctl(fd0, VFIO_IOMMU_SPAPR_REGISTER_MEMORY, &{.vaddr = buffer" in text
    assert f"real kernel: {found.real['ret']}, VmLck 0 kB" in text
    assert "model:       0, VmLck 0 kB" in text


def test_a_run_that_ends_early_is_a_difference(facts: Facts) -> None:
    made = program(*OPENED)
    whole = sides.fake(facts, made)
    difference, compared = compare(made, Run(whole.records[:2], "the machine stopped"), whole)
    assert compared == 2
    assert difference is not None
    assert (difference.at, difference.real) == (2, {"ended": "the machine stopped"})


def test_differences_of_a_kind_are_counted_together_the_shortest_first(found: Difference) -> None:
    shorter = replace(found, program=found.program.with_steps(found.program.steps[1 : found.at + 1]), at=found.at - 1)
    assert by_signature([found, shorter]) == {found.signature: [shorter, found]}


# --- the past ---


def corpus() -> list[dict[str, object]]:
    return [json.loads(line) for line in CORPUS.read_text().splitlines()]


@pytest.mark.parametrize("entry", corpus(), ids=lambda entry: f"{entry['target']}-{entry['program']['seed']}")
def test_programs_of_the_past_get_the_answers_that_a_real_kernel_gave(entry: dict[str, object]) -> None:
    facts = facts_of(str(entry["target"]))
    made = Program.loads(json.dumps(entry["program"]))
    real = Run(entry["records"])  # type: ignore[arg-type]
    difference, _ = compare(made, real, sides.fake(facts, made))
    assert difference is None, "\n" + "\n".join(render.difference(difference))
