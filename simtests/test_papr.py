"""A guest behind the PAPR front end on the fake: its whole flow, its memory, and whatever it passes."""

from __future__ import annotations

import errno
import random
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from papr_front import (
    ADDRESSED,
    BOTH,
    BUID,
    CREATE,
    EDU,
    HIGH,
    LIST,
    LOW,
    MAP,
    PAGE,
    QUERY,
    RAM,
    READ,
    REMOVE,
    RESET,
    STATE,
    WINDOW,
    WRITE,
    Front,
    fresh,
)

import vfio
from vfio import assign, errors, papr
from vfio.drivers.edu import Edu
from vfio.fake.backend import FakeBackend
from vfio.papr import Hcall, Opcode, Rtas


@pytest.fixture
def front() -> Iterator[Front]:
    yield from fresh()


# --- the whole guest ---


def moved(front: Front, edu: Edu, address: Callable[[int], int], places: list[int]) -> bool:
    """Whether the device finds what is at these guest addresses, and puts it elsewhere."""
    for place in places:
        front.ram[0x1000:0x2000] = bytes(PAGE)
        edu.load(address(place), 256)
        edu.store(address(0x1000), 256)
        if front.ram[0x1000:0x1100] != front.ram[place : place + 256]:
            return False
    return True


@pytest.mark.parametrize(
    ("url", "ram", "page"),
    [
        ("fake:power8", RAM, 4096),
        ("fake:power9", RAM, 4096),
        ("fake:pseries", RAM, 4096),
        ("fake:power8?page_size=65536", RAM, 65536),
        ("fake:power8?page_size=65536", 48 << 20, 16 << 20),
    ],
)
def test_guest_maps_all_its_memory_in_the_biggest_pages_and_a_device_does_direct_dma(
    url: str, ram: int, page: int
) -> None:
    front = Front(url, ram, page if page > 65536 else None)
    front.ram[0:ram] = random.Random(1).randbytes(ram)
    direct = papr.Guest(front.phb, list_page=0).enable_ddw(front.where)
    assert direct is not None
    assert (direct.page_size, direct.size) == (page, 1 << (ram - 1).bit_length())
    calls = dict(front.backend.machine.hooks.calls)
    places = [random.Random(2).randrange(2, ram // PAGE) * PAGE for _ in range(20)]
    assert moved(front, Edu(front.device), direct.address, places)
    assert front.calls(MAP) == calls[MAP]
    front.phb.close()
    front.device.close()
    assert front.backend.leaks() == []


def test_32_bit_device_stays_on_the_default_window(front: Front) -> None:
    guest = papr.Guest(front.phb)
    assert guest.enable_ddw(front.where, dma_mask=0xFFFFFFFF) is None
    assert list(front.phb.tables) == [LOW]
    front.ram[0x8000:0x8005] = b"hello"
    ioba = guest.map(0x8000, 2 * PAGE)
    edu = Edu(front.device)
    edu.load(ioba, 5)
    edu.store(ioba + PAGE, 5)
    assert front.ram[0x9000:0x9005] == b"hello"
    guest.unmap(ioba, 2 * PAGE)
    assert front.entry(ioba) is None


def test_device_that_cannot_reach_the_window_stays_on_the_default_one(front: Front) -> None:
    assert papr.Guest(front.phb).enable_ddw(front.where, dma_mask=(1 << 48) - 1) is None
    assert list(front.phb.tables) == [LOW]


def test_guest_goes_on_without_a_window_where_it_cannot_have_one(front: Front) -> None:
    guest = papr.Guest(front.phb)
    front.backend.machine.hooks.fail("VFIO_IOMMU_SPAPR_TCE_CREATE", errno.ENOMEM)
    assert guest.enable_ddw(front.where) is None
    front.backend.machine.hooks.fail(MAP, errno.ENOMEM, nth=2)
    assert guest.enable_ddw(front.where) is None
    assert list(front.phb.tables) == [LOW]
    assert guest.enable_ddw(front.where + 8) is None
    direct = guest.enable_ddw(front.where)
    assert direct is not None
    assert guest.enable_ddw(front.where) is direct
    assert guest.enable_ddw(front.where, dma_mask=(1 << 48) - 1) is None
    assert papr.Guest(front.phb).enable_ddw(front.where) is None  # no window is free
    guest.disable_ddw(direct)
    assert list(front.phb.tables) == [LOW]


def test_guest_is_told_when_the_default_window_refuses(front: Front) -> None:
    guest = papr.Guest(front.phb)
    front.backend.machine.hooks.fail(MAP, errno.ENOMEM)
    with pytest.raises(papr.Refused) as caught:
        guest.map(0x8000, PAGE)
    assert caught.value.status == Hcall.RESOURCE
    with pytest.raises(papr.Refused):
        guest.map(RAM, PAGE)
    with pytest.raises(MemoryError):
        guest.map(0, 1 << 31)


def test_power7_has_the_default_window_and_no_other() -> None:
    front = Front("fake:power7")
    assert front.device.iommu.name == "sPAPR TCE v1"
    assert front.rtas(QUERY, front.where, *BUID, results=5) == [Rtas.PARAMETER_ERROR, 0, 0, 0, 0]
    assert front.rtas(REMOVE, LOW) == [Rtas.PARAMETER_ERROR]
    start = front.phb.tables[LOW].window.start
    assert front.put(start + 0x1000, 0x2000 | BOTH) == Hcall.SUCCESS
    assert front.get(start + 0x1000) == (Hcall.SUCCESS, 0x2000 | BOTH)
    front.phb.close()
    assert front.backend.locked().locked < RAM
    front.device.close()
    assert front.backend.leaks() == []


# --- memory in blocks ---


@pytest.fixture
def holed() -> Iterator[tuple[FakeBackend, papr.Phb]]:
    """A guest with 64 KiB at 0 and at 1 MiB, and 64 KiB more right behind."""
    backend = vfio.open_backend("fake:power8")
    assert isinstance(backend, FakeBackend)
    assign.bind([EDU], backend=backend, whole_group=True)
    with vfio.open_device(EDU, backend) as device:
        blocks = [(at, vfio.DmaBuffer(0x10000, backend=backend)) for at in (0, 0x110000, 0x100000)]
        with papr.Phb(device.group.container, papr.GuestMemory(*blocks)) as phb:
            phb.add(device)
            yield backend, phb


def test_run_across_two_blocks_is_mapped_in_pieces_and_a_hole_is_not(holed: tuple[FakeBackend, papr.Phb]) -> None:
    backend, phb = holed
    before = backend.machine.hooks.calls[MAP]
    blocks = phb.memory.blocks
    tces = [0x10C000 + n * PAGE | BOTH for n in range(8)]
    blocks[0].buffer[0:64] = struct.pack(">8Q", *tces)
    assert phb.hcall(Opcode.H_PUT_TCE_INDIRECT, LOW, 0, 0, 8) == (Hcall.SUCCESS,)
    assert backend.machine.hooks.calls[MAP] == before + 2
    assert phb.hcall(Opcode.H_PUT_TCE, LOW, 0, 0x10000 | BOTH) == (Hcall.PARAMETER,)
    assert phb.memory.end == 0x120000
    assert phb.largest_window == 1 << 21


def test_memory_stays_registered_while_a_guest_may_map_it(front: Front) -> None:
    iommu = front.device.iommu
    assert isinstance(iommu, vfio.SpaprTceV2)
    registration = iommu._book.find(front.ram.address, RAM)
    assert registration is not None
    with pytest.raises(errors.StillMapped):
        iommu.unregister(registration)


@pytest.mark.parametrize("starts", [(0, 0x8000), (0x10, 0x20000), (-0x10000, 0x20000)])
def test_blocks_that_overlap_or_are_misplaced_are_refused(starts: tuple[int, int]) -> None:
    backend = vfio.open_backend("fake:power8")
    with pytest.raises(ValueError, match="block"):
        papr.GuestMemory(*((at, vfio.DmaBuffer(0x10000, backend=backend)) for at in starts))
    with pytest.raises(ValueError, match="at least one"):
        papr.GuestMemory()


def test_default_window_that_is_in_use_is_not_taken() -> None:
    front = Front()
    front.phb.close()
    with front.device.iommu.map(vfio.DmaBuffer(PAGE, backend=front.backend)), pytest.raises(errors.AlreadyMapped):
        papr.Phb(front.device.group.container, papr.GuestMemory(front.ram))
    with papr.Phb(front.device.group.container, papr.GuestMemory(front.ram)):
        pass
    front.ram.close()
    front.device.close()
    assert front.backend.leaks() == []


def test_places_of_devices(front: Front) -> None:
    assert front.where == 1 << 11
    for place in ({"slot": 1}, {"slot": 32}, {"slot": 2, "function": 8}, {"slot": 2, "bus": 256}):
        with pytest.raises(ValueError, match=r"place|already"):
            front.phb.add(front.device, **place)
    assert front.phb.add(front.device, slot=3, function=2, bus=4) == 0x041A00
    assert front.rtas(STATE, 0x040001, *BUID, results=4)[0] == Rtas.SUCCESS


def test_closing_the_device_first_is_harmless() -> None:
    front = Front()
    front.put(0, BOTH)
    front.create(12, 23)
    front.device.close()
    assert front.put(0, BOTH) == Hcall.PARAMETER
    assert front.create(12, 23)[0] == Rtas.HARDWARE_ERROR
    front.phb.close()
    assert front.backend.leaks() == []


# --- whatever a guest passes ---

WORDS = some.one_of(
    some.sampled_from([0, 1, 8, PAGE, LOW, HIGH, WINDOW, LIST, RAM, 1 << 63, (1 << 64) - 1, 12, 23, *BUID, 1 << 11]),
    some.integers(0, (1 << 64) - 1),
)


@settings(max_examples=30, deadline=None)
@given(some.data())
def test_shadow_and_hardware_agree_after_any_calls(data: some.DataObject) -> None:
    front = Front()
    edge = some.one_of(some.integers(0, 40).map(lambda n: n * PAGE), WORDS)
    for _ in range(data.draw(some.integers(1, 15))):
        match data.draw(some.sampled_from(["put", "list", "stuff", "hcall", "rtas"])):
            case "put":
                code = front.put(data.draw(edge), data.draw(edge) | data.draw(some.integers(0, 3)))
                assert code in (Hcall.SUCCESS, Hcall.PARAMETER)
            case "list":
                tces = data.draw(some.lists(some.integers(0, 99).map(lambda n: n // 3 * PAGE | n % 3 or 3), max_size=9))
                assert front.put_list(data.draw(edge), tces) in (Hcall.SUCCESS, Hcall.PARAMETER)
            case "stuff":
                code = front.stuff(data.draw(edge), 0, data.draw(some.integers(0, 50)))
                assert code in (Hcall.SUCCESS, Hcall.PARAMETER)
            case "hcall":
                words = data.draw(some.lists(WORDS, max_size=5))
                assert front.hcall(data.draw(some.one_of(some.sampled_from(list(Opcode)), WORDS)), *words)[0] in list(
                    Hcall
                )
            case "rtas":
                words = data.draw(some.lists(WORDS.map(lambda word: word & 0xFFFFFFFF), max_size=9))
                name = data.draw(some.sampled_from([QUERY, CREATE, REMOVE, RESET, *(each[0] for each in ADDRESSED)]))
                assert front.rtas(name, *words, results=data.draw(some.integers(1, 6)))[0] in list(Rtas)
    for liobn, table in front.phb.tables.items():
        for n in range(60):
            ioba = table.window.start + n * PAGE
            tce = front.get(ioba, liobn)[1]
            seen = front.entry(ioba)
            permission = {0: 0, READ: 1, WRITE: 3, BOTH: 3}[tce & BOTH]
            assert seen == ((tce & ~BOTH, permission) if permission else None)
    front.phb.close()
    front.device.close()
    assert front.backend.leaks() == []
