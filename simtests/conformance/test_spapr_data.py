"""What a device reaches through the tables: an edu's DMA engine reads and writes memory."""

import errno

import pytest

from simtests.conformance.engine import Engine
from simtests.conformance.raw import READ, SECOND_WINDOW, WRITE

IOVA, SCRATCH = 0x100000, 0x900000
pytestmark = [pytest.mark.power, pytest.mark.needs_edu]


@pytest.fixture
def memory(program):
    return program.memory(4 * program.page)


@pytest.fixture
def engine(program, v2, member, memory):
    """The engine; the last page of `memory` is mapped at SCRATCH."""
    assert v2.register(memory.address, memory.length) == 0
    assert v2.map(memory.address + 3 * program.page, SCRATCH, program.page) == 0
    return Engine(v2, member)


def put(engine, program, memory, text):
    """Give the device 16 bytes."""
    at = 3 * program.page
    memory.view[at : at + 16] = text
    engine.load(SCRATCH)


def got(engine, program, memory):
    """The 16 bytes that the device has."""
    at = 3 * program.page
    memory.view[at : at + 16] = bytes(16)
    engine.store(SCRATCH)
    return bytes(memory.view[at : at + 16])


@pytest.mark.parametrize("flags", [READ, WRITE, READ | WRITE])
def test_device_has_the_permissions_of_the_mapping_and_on_bare_metal_write_includes_read(
    program, v2, target, engine, memory, flags
):
    readable = bool(flags & READ) or target.platform == "PowerNV"
    writable = bool(flags & WRITE)
    memory.view[:16] = b"0123456789abcdef"
    assert v2.map(memory.address, IOVA, program.page, flags) == 0
    put(engine, program, memory, b"-" * 16)
    engine.load(IOVA)
    assert (got(engine, program, memory) == b"0123456789abcdef") is readable
    put(engine, program, memory, b"from the device!")
    engine.store(IOVA)
    assert (memory.view[:16] == b"from the device!") is writable


def test_unmapped_memory_is_out_of_reach(program, v2, engine, memory):
    memory.view[:16] = b"0123456789abcdef"
    assert v2.map(memory.address, IOVA, program.page) == 0
    assert v2.unmap(IOVA, program.page) == 0
    put(engine, program, memory, b"from the device!")
    engine.store(IOVA)
    assert memory.view[:16] == b"0123456789abcdef"


def test_second_map_at_the_same_iova_replaces_the_first(program, v2, engine, memory):
    memory.view[:16], memory.view[program.page : program.page + 16] = b"a" * 16, b"b" * 16
    for page, expected in ((0, b"a" * 16), (1, b"b" * 16), (0, b"a" * 16)):
        assert v2.map(memory.address + page * program.page, IOVA, program.page) == 0
        engine.load(IOVA)
        assert got(engine, program, memory) == expected


def test_failed_map_takes_away_what_it_reached_and_leaves_the_rest(program, v2, engine, memory):
    page = program.page
    memory.view[:16], memory.view[page : page + 16] = b"a" * 16, b"b" * 16
    assert v2.map(memory.address, IOVA, 2 * page) == 0
    assert v2.map(memory.address + 3 * page, IOVA, 2 * page) == -errno.EINVAL  # only its first page is registered
    put(engine, program, memory, b"-" * 16)
    engine.load(IOVA + page)
    assert got(engine, program, memory) == b"b" * 16
    engine.store(IOVA)
    assert memory.view[:16] == b"a" * 16


def test_data_moves_through_both_windows_at_once(program, v2, engine, memory):
    start = v2.create(12, 1 << 30)
    assert start == SECOND_WINDOW
    assert v2.map(memory.address, start + IOVA, program.page) == 0
    assert v2.map(memory.address + program.page, IOVA, program.page) == 0
    memory.view[100:116] = b"across two pages"
    engine.load(start + IOVA + 100)
    engine.store(IOVA + 7)
    assert memory.view[program.page + 7 : program.page + 23] == b"across two pages"


def test_transfer_crosses_pages_that_are_not_neighbours(program, v2, engine, memory):
    page = program.page
    assert v2.map(memory.address + 2 * page, IOVA, page) == 0
    assert v2.map(memory.address, IOVA + page, page) == 0
    put(engine, program, memory, b"0123456789abcdef")
    engine.store(IOVA + page - 8)
    assert memory.view[3 * page - 8 : 3 * page] == b"01234567"
    assert memory.view[:8] == b"89abcdef"


def test_removed_window_is_out_of_reach(program, v2, engine, memory):
    start = v2.create(12, 1 << 30)
    assert v2.map(memory.address, start, program.page) == 0
    put(engine, program, memory, b"from the device!")
    assert v2.remove(start) == 0
    engine.store(start)
    assert memory.view[:16] == bytes(16)


@pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k")
def test_data_moves_through_every_level_of_a_table(program, v2, engine, memory):
    size, page = 1 << 33, program.page
    start = v2.create(12, size, 2)
    put(engine, program, memory, b"0123456789abcdef")
    for number, iova in enumerate((start, start + size // 2, start + size - page)):
        assert v2.map(memory.address + number * page, iova, page) == 0
        engine.store(iova + 16)
        assert memory.view[number * page + 16 : number * page + 32] == b"0123456789abcdef"
        assert v2.unmap(iova, page) == 0


def test_device_without_bus_master_reaches_nothing(program, v2, engine, memory):
    assert v2.map(memory.address, IOVA, program.page) == 0
    put(engine, program, memory, b"from the device!")
    engine.master(False)
    engine.store(IOVA)
    assert memory.view[:16] == bytes(16)
    engine.master(True)
    engine.store(IOVA)
    assert memory.view[:16] == b"from the device!"
