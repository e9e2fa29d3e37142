"""Guests that pass anything, on every platform and with a kernel that refuses now and then: each call has a code of PAPR,
and what the guest is told of its tables is what the hardware has."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from papr_front import BOTH, BUID, LIST, LOW, MAP, PAGE, RAM, READ, WINDOW, WRITE, Front

from vfio.papr import Hcall, Opcode, Rtas
from vfio.papr.rtas import NAMES

PLATFORMS = ["fake:power8", "fake:power8?page_size=65536", "fake:power9", "fake:pseries", "fake:power7"]
KERNEL = [MAP, "VFIO_IOMMU_SPAPR_TCE_CREATE", "VFIO_IOMMU_SPAPR_TCE_REMOVE", "VFIO_EEH_PE_OP"]

EDGES = [
    0,
    1,
    8,
    PAGE,
    0x10000,
    LIST,
    RAM - PAGE,
    RAM,
    LOW,
    LOW + 1,
    LOW + 2,
    0x3FFFF000,
    0x40000000,
    0x7FFFF000,
    0x80000000,
]
EDGES += [
    WINDOW,
    WINDOW + PAGE,
    WINDOW + RAM,
    1 << 32,
    1 << 63,
    (1 << 64) - PAGE,
    (1 << 64) - 1,
    512,
    513,
    12,
    16,
    22,
    23,
]
WORDS = some.one_of(
    some.sampled_from(EDGES), some.integers(0, 40).map(lambda n: n * PAGE), some.integers(0, (1 << 64) - 1)
)
TCES = some.one_of(
    some.integers(0, RAM // PAGE + 2).flatmap(lambda n: some.integers(0, 3).map(lambda p: n * PAGE | p)), WORDS
)


def in_step(front: Front) -> bool:
    for liobn, table in front.phb.tables.items():
        page, entries = table.window.page_size, table.entries
        for n in {*range(min(48, entries)), *range(max(0, entries - 4), entries)}:
            ioba = table.window.start + n * page
            code, tce = front.get(ioba, liobn)
            assert code == Hcall.SUCCESS
            permission = {0: 0, READ: 1, WRITE: 3, BOTH: 3}[tce & BOTH]
            if front.entry(ioba) != ((tce & ~BOTH, permission) if permission else None):
                return False
    return True


@pytest.mark.parametrize("url", PLATFORMS)
@settings(max_examples=25, deadline=None)
@given(some.data())
def test_any_calls_have_a_code_and_leave_the_tables_in_step(url: str, data: some.DataObject) -> None:
    front = Front(url)
    for _ in range(data.draw(some.integers(1, 12))):
        if data.draw(some.integers(0, 4)) == 0:
            front.backend.machine.hooks.fail(data.draw(some.sampled_from(KERNEL)), errno.EIO)
        liobns = some.one_of(some.sampled_from(front.phb.liobns), WORDS)
        match data.draw(some.sampled_from(["put", "list", "stuff", "window", "hcall", "rtas"])):
            case "put":
                code = front.hcall(Opcode.H_PUT_TCE, data.draw(liobns), data.draw(WORDS), data.draw(TCES))
            case "list":
                tces = data.draw(some.lists(TCES, max_size=6))
                front.ram[LIST : LIST + 8 * len(tces)] = struct.pack(f">{len(tces)}Q", *tces)
                count = data.draw(some.sampled_from([len(tces), len(tces), 513, 1 << 40]))
                code = front.hcall(Opcode.H_PUT_TCE_INDIRECT, data.draw(liobns), data.draw(WORDS), LIST, count)
            case "stuff":
                count = data.draw(some.sampled_from([0, 1, 7, 600, 0x80000, 0x80001, 1 << 63]))
                code = front.hcall(Opcode.H_STUFF_TCE, data.draw(liobns), data.draw(WORDS), data.draw(TCES), count)
            case "hcall":
                opcode = data.draw(some.one_of(some.sampled_from(list(Opcode)), WORDS))
                code = front.hcall(opcode, *data.draw(some.lists(WORDS, max_size=5)))
            case "window":
                shifts = data.draw(some.sampled_from([(12, 23), (16, 23), (24, 24), (12, 12), (12, 24), (63, 63)]))
                code = tuple(front.create(*shifts)[:1])
            case _:
                words = [word & 0xFFFFFFFF for word in data.draw(some.lists(WORDS, max_size=8))]
                if data.draw(some.booleans()):
                    words = [front.where, *BUID, *words]
                results = data.draw(some.sampled_from([1, 2, 4, 5, 6, 9, 0xFFFFFFFF]))
                code = tuple(front.rtas(data.draw(some.sampled_from(NAMES)), *words, results=results)[:1])
        assert code[0] in (set(Hcall) | set(Rtas))
        assert in_step(front)
    front.backend.machine.hooks.clear()
    front.phb.close()
    front.device.close()
    assert front.backend.leaks() == []
