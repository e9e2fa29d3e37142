"""RTAS calls as a guest makes them: a block in its memory, and H_RTAS."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from papr_front import BUID, CREATE, HIGH, LOW, PAGE, QUERY, RAM, REMOVE, WINDOW, Front, fresh

from vfio.papr import Hcall, Opcode, Rtas
from vfio.papr.rtas import NAMES

BLOCK = 0x4000


@pytest.fixture
def front() -> Iterator[Front]:
    yield from fresh()


def made(front: Front, token: int, arguments: list[int], results: int, at: int = BLOCK) -> tuple[int, list[int]]:
    """The code of the hypercall, and the results in the block."""
    head = struct.pack(f">{3 + len(arguments)}I", token, len(arguments), results, *arguments)
    front.ram[at : at + len(head)] = head
    room = at + len(head)
    front.ram[room : room + 4 * results] = b"\xee" * (4 * results)
    (code,) = front.hcall(Opcode.H_RTAS, at)
    return code, list(struct.unpack(f">{results}i", front.ram[room : room + 4 * results]))


def test_every_call_has_a_token_of_its_own(front: Front) -> None:
    assert list(front.phb.tokens) == list(NAMES)
    assert len(set(front.phb.tokens.values())) == len(NAMES) == 10


def test_calls_are_made_and_answered_in_the_block(front: Front) -> None:
    tokens = front.phb.tokens
    code, answer = made(front, tokens[QUERY], [front.where, *BUID], 5)
    assert (code, answer) == (Hcall.SUCCESS, [Rtas.SUCCESS, 1, RAM // PAGE, 1, 0])
    code, answer = made(front, tokens[CREATE], [front.where, *BUID, 12, 23], 4)
    assert (code, [word & 0xFFFFFFFF for word in answer]) == (Hcall.SUCCESS, [0, HIGH, WINDOW >> 32, 0])
    assert made(front, tokens[REMOVE], [HIGH], 1) == (Hcall.SUCCESS, [Rtas.SUCCESS])


def test_what_is_wrong_with_a_call_is_in_the_block(front: Front) -> None:
    token = front.phb.tokens[QUERY]
    assert made(front, token, [front.where, *BUID], 4) == (Hcall.SUCCESS, [Rtas.PARAMETER_ERROR, 0, 0, 0])
    assert made(front, token, [front.where], 5) == (Hcall.SUCCESS, [Rtas.PARAMETER_ERROR, 0, 0, 0, 0])
    assert made(front, token, [front.where, *BUID], 0) == (Hcall.SUCCESS, [])


def test_monitor_sets_tokens_of_its_own(front: Front) -> None:
    front.phb.tokens = {REMOVE: 7}
    assert made(front, 7, [LOW + 5], 1) == (Hcall.SUCCESS, [Rtas.PARAMETER_ERROR])
    assert made(front, 7, [LOW], 1) == (Hcall.SUCCESS, [Rtas.SUCCESS])


@pytest.mark.parametrize("token", [0, 0x1FFF, 0x2000 + 10, 0xFFFFFFFF])
def test_token_that_is_no_calls_is_h_parameter_and_a_parameter_error(front: Front, token: int) -> None:
    untouched = -0x11111112  # the bytes that were there
    assert made(front, token, [1, 2], 3) == (Hcall.PARAMETER, [Rtas.PARAMETER_ERROR, untouched, untouched])
    assert made(front, token, [], 0) == (Hcall.PARAMETER, [])


@pytest.mark.parametrize("at", [RAM, RAM - 8, RAM - 12 - 4, 1 << 32, (1 << 64) - 1, 1 << 64, -1])
def test_block_that_is_not_all_memory_is_h_parameter_and_nothing_is_done(front: Front, at: int) -> None:
    """Also where the results alone have no room."""
    block = struct.pack(">4I", front.phb.tokens[REMOVE], 1, 1, LOW)
    if 0 <= at < RAM:
        front.ram[at:RAM] = block[: RAM - at]
    assert front.hcall(Opcode.H_RTAS, at) == (Hcall.PARAMETER,)
    assert list(front.phb.tables) == [LOW]


@pytest.mark.parametrize(("count", "results"), [(17, 0), (0, 17), (9, 8), (0xFFFFFFFF, 1), (1, 0xFFFFFFFF)])
def test_block_with_more_words_than_it_has_is_h_parameter(front: Front, count: int, results: int) -> None:
    front.ram[BLOCK : BLOCK + 12] = struct.pack(">3I", front.phb.tokens[QUERY], count, results)
    assert front.hcall(Opcode.H_RTAS, BLOCK) == (Hcall.PARAMETER,)


def test_block_anywhere_in_memory_will_do(front: Front) -> None:
    token = front.phb.tokens[QUERY]
    for at in (0, 0x4FF1, RAM - 12 - 12 - 20):
        assert made(front, token, [front.where, *BUID], 5, at)[1][:2] == [Rtas.SUCCESS, 1]


@pytest.mark.parametrize("arguments", [(), (BLOCK, 0), (BLOCK, 0, 0, 0)])
def test_wrong_number_of_registers_is_h_parameter(front: Front, arguments: tuple[int, ...]) -> None:
    assert front.hcall(Opcode.H_RTAS, *arguments) == (Hcall.PARAMETER,)


def test_calls_of_a_guest_whose_memory_is_gone_are_h_hardware() -> None:
    front = Front()
    front.phb.close()
    front.ram.close()
    assert front.hcall(Opcode.H_RTAS, BLOCK) == (Hcall.HARDWARE,)
    assert front.hcall(Opcode.H_PUT_TCE, LOW, 0, 3) == (Hcall.PARAMETER,)
    front.device.close()
    assert front.backend.leaks() == []
