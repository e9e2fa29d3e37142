"""Guests with devices of two groups in one container, on the fake: a group that leaves empties the windows of the other."""

from __future__ import annotations

import errno
import random
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
from papr_front import BOTH, BUID, HIGH, LOW, MAP, PAGE, RAM, READ, STATE, WINDOW, WRITE, Front

import vfio
from vfio import assign, papr, sysfs
from vfio.drivers.edu import Edu
from vfio.fake.backend import FakeBackend
from vfio.papr import Hcall, Opcode, Rtas


class Pair(Front):
    """A guest with two devices, each of a group of its own: `device` stays, `other` is there to leave."""

    def __init__(self, url: str = "fake:power8") -> None:
        super().__init__(url)
        found = [each.address for each in self.backend.machine.topology.devices if each.model == "edu"]
        self.second = next(address for address in found if address != self.address)
        assign.bind([self.second], backend=self.backend, whole_group=True)
        self.container = self.device.group.container
        assert self.container is not None
        self.join()

    def join(self) -> None:
        number = sysfs.group_of(self.backend, self.second)
        assert number is not None
        self.group = vfio.Group(number, self.backend)
        assert self.container is not None
        self.container.attach(self.group)
        self.other = self.group.device(self.second)
        self.other_place = self.phb.add(self.other)

    def detach(self) -> None:
        self.phb.remove(self.other)
        self.other.close()
        assert self.container is not None
        self.container.detach(self.group)
        self.group.close()

    def close_device_first(self) -> None:
        self.other.close()
        self.group.close()

    def close_group_first(self) -> None:
        self.group.close()
        self.other.close()

    def in_step(self, liobn: int, entries: range) -> bool:
        """Whether the hardware has what the guest is told that it has."""
        start = self.phb.tables[liobn].window.start
        for ioba in (start + n * PAGE for n in entries):
            tce = self.get(ioba, liobn)[1]
            permission = {0: 0, READ: 1, WRITE: 3, BOTH: 3}[tce & BOTH]
            if self.entry(ioba) != ((tce & ~BOTH, permission) if permission else None):
                return False
        return True

    def close(self) -> None:
        self.phb.close()
        self.other.close()
        self.group.close()
        self.device.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()
    assert made.backend.leaks() == []


LEAVING = [Pair.detach, Pair.close_device_first, Pair.close_group_first]


@pytest.mark.parametrize("leave", LEAVING)
def test_every_tce_is_in_the_kernel_again_when_a_group_has_left(pair: Pair, leave: Callable[[Pair], None]) -> None:
    direct = papr.Guest(pair.phb, list_page=0).enable_ddw(pair.where)
    assert direct is not None
    source = random.Random(3)
    tces = [source.choice([0, READ, WRITE, BOTH, BOTH]) | source.randrange(RAM // PAGE) * PAGE for _ in range(512)]
    assert pair.put_list(0x40000, tces) == Hcall.SUCCESS
    assert pair.put(0, 0x3000 | READ) == Hcall.SUCCESS
    assert pair.put(0x7FFFF000, 0x5000 | BOTH) == Hcall.SUCCESS
    leave(pair)
    assert [pair.get(0x40000 + n * PAGE)[1] for n in range(512)] == tces
    assert pair.in_step(LOW, range(600))
    assert pair.in_step(LOW, range(0x7FFF0, 0x80000))
    assert pair.in_step(HIGH, range(RAM // PAGE))


@pytest.mark.parametrize("leave", LEAVING)
def test_the_device_that_stays_does_dma_through_both_windows_afterwards(
    pair: Pair, leave: Callable[[Pair], None]
) -> None:
    guest = papr.Guest(pair.phb, list_page=0)
    direct = guest.enable_ddw(pair.where)
    assert direct is not None
    ioba = guest.map(0x8000, PAGE)
    leave(pair)
    edu = Edu(pair.device)
    pair.ram[0x8000:0x8005] = b"hello"
    edu.load(ioba, 5)
    edu.store(direct.address(RAM - PAGE), 5)
    assert pair.ram[RAM - PAGE : RAM - PAGE + 5] == b"hello"


def test_what_follows_one_another_is_mapped_again_by_one_call(pair: Pair) -> None:
    direct = papr.Guest(pair.phb, list_page=0).enable_ddw(pair.where)
    assert direct is not None
    pair.put(0x7FFFF000, BOTH)
    before = pair.calls(MAP)
    pair.detach()
    assert pair.calls(MAP) == before + 2


def test_what_the_library_has_mapped_and_what_the_guest_has_are_both_mapped_again(pair: Pair) -> None:
    iommu = pair.device.iommu
    assert isinstance(iommu, vfio.SpaprTceV2)
    pair.put(0x1000, 0x2000 | BOTH)
    with iommu.create_window(1 << 23, PAGE) as window, window.map(vfio.MemoryRange(pair.ram.address, PAGE)) as dma:
        pair.detach()
        assert pair.entry(dma.iova) == (0, 3)
        assert pair.entry(0x1000) == (0x2000, 3)


def test_what_the_kernel_does_not_map_again_is_gone_for_the_guest_and_the_rest_is_there(pair: Pair) -> None:
    papr.Guest(pair.phb, list_page=0).enable_ddw(pair.where)
    tces = [0x10000 | BOTH, 0x20000 | BOTH, 0x21000 | BOTH, 0x30000 | READ]
    pair.put_list(0x1000, tces)
    pair.backend.machine.hooks.fail(MAP, errno.ENOMEM, nth=2)
    with pytest.raises(OSError) as caught:  # noqa: PT011  its errno is what counts
        pair.detach()
    assert caught.value.errno == errno.ENOMEM
    assert [pair.get(n * PAGE)[1] for n in range(1, 5)] == [tces[0], 0, 0, tces[3]]
    assert pair.in_step(LOW, range(8))
    assert pair.in_step(HIGH, range(RAM // PAGE))


def test_memory_in_blocks_is_mapped_again_once(pair: Pair) -> None:
    pair.phb.close()
    blocks = [(at, vfio.DmaBuffer(0x10000, backend=pair.backend)) for at in (0, 0x10000)]
    with papr.Phb(pair.device.group.container, papr.GuestMemory(*blocks)) as phb:
        phb.add(pair.device)
        blocks[0][1][0:64] = struct.pack(">8Q", *(0xC000 + n * PAGE | BOTH for n in range(8)))
        assert phb.hcall(Opcode.H_PUT_TCE_INDIRECT, LOW, 0x4000, 0, 8) == (Hcall.SUCCESS,)
        before = pair.calls(MAP)
        pair.close_device_first()
        assert pair.calls(MAP) == before + 2
        edu = Edu(pair.device)
        blocks[0][1][0xF000:0xF004] = b"four"
        edu.load(0x7000, 4)
        edu.store(0x8000, 4)
        assert blocks[1][1][0:4] == b"four"


def test_calls_of_the_guest_while_groups_come_and_go_are_not_lost(pair: Pair) -> None:
    going, wrong = True, []

    def calls() -> None:
        source = random.Random(4)
        while going:
            ioba, page = source.randrange(64) * PAGE, source.randrange(RAM // PAGE) * PAGE
            code = pair.put(ioba, page | source.choice([0, BOTH])) if source.random() < 0.8 else pair.stuff(ioba, 0, 3)
            if code != Hcall.SUCCESS:
                wrong.append(code)

    processor = threading.Thread(target=calls)
    processor.start()
    for _ in range(20):
        pair.detach()
        pair.join()
    going = False
    processor.join()
    assert wrong == []
    assert pair.in_step(LOW, range(70))


def test_device_that_was_removed_is_none_of_the_guest_and_its_windows_stay(pair: Pair) -> None:
    pair.put(0x1000, 0x2000 | BOTH)
    pair.phb.remove(pair.other)
    assert pair.rtas(STATE, pair.other_place, *BUID, results=4)[0] == Rtas.PARAMETER_ERROR
    assert pair.rtas(STATE, pair.where, *BUID, results=4)[0] == Rtas.SUCCESS
    assert pair.entry(0x1000) == (0x2000, 3)
    with pytest.raises(ValueError, match="no device of this PHB"):
        pair.phb.remove(pair.other)
    assert pair.phb.add(pair.other) == pair.other_place


def test_group_that_was_the_first_can_leave_as_well() -> None:
    """The default window was made for it, and stays with the container."""
    backend = vfio.open_backend("fake:power8")
    assert isinstance(backend, FakeBackend)
    found = [each.address for each in backend.machine.topology.devices if each.model == "edu"][:2]
    assign.bind(found, backend=backend, whole_group=True)
    with vfio.Container(backend) as container, vfio.DmaBuffer(RAM, backend=backend) as ram:
        groups = [vfio.Group(sysfs.device(backend, address).group or 0, backend) for address in found]
        for group in groups:
            container.attach(group)
        container.set_iommu(vfio.SpaprTceV2)
        first, second = (group.device(address) for group, address in zip(groups, found, strict=True))
        with papr.Phb(container, papr.GuestMemory(ram)) as phb:
            phb.add(first)
            guest = papr.Guest(phb, list_page=0)
            direct = guest.enable_ddw(phb.add(second))
            assert direct is not None
            ioba = guest.map(0x8000, PAGE)
            first.close()
            groups[0].close()
            ram[0x8000:0x8005] = b"hello"
            edu = Edu(second)
            edu.load(ioba, 5)
            edu.store(direct.address(0x9000), 5)
            assert ram[0x9000:0x9005] == b"hello"
        second.close()
        groups[1].close()
    assert backend.leaks() == []


def test_with_the_last_group_the_windows_go_and_calls_are_h_parameter(pair: Pair) -> None:
    pair.put(0x1000, 0x2000 | BOTH)
    pair.create(12, 23)
    pair.close_device_first()
    assert pair.container is not None
    vfio.Device.close(pair.device)  # and not the container
    pair.container.detach(pair.device.group)
    assert pair.phb.tables == {}
    assert pair.put(0x1000, 0x2000 | BOTH) == Hcall.PARAMETER
    assert pair.stuff(WINDOW, 0, 1, HIGH) == Hcall.PARAMETER
    assert pair.get(0x1000) == (Hcall.PARAMETER,)
    assert pair.create(12, 23)[0] == Rtas.HARDWARE_ERROR
