"""A pseries guest behind the PAPR front end: all of its memory mapped by its own calls, and a device that does direct DMA."""

import errno
import random

import pytest

import vfio
from vfio import errors, papr, sysfs
from vfio.drivers.edu import Edu

pytestmark = pytest.mark.power

MIB = 1 << 20
PAGE = 4096
PAGES_TRIED = 64
TURNS = PAGES_TRIED

POWERNV = pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k")
PSERIES = pytest.mark.targets("pseries", "pseries-64k")
HUGE_16M = pytest.mark.targets("powernv8-64k")


@pytest.fixture
def front(device, backend):
    """Makes the PHB of a guest with so much memory, in pages of that size, and shows it the device."""
    made = []

    def make(length, page_size=None):
        ram = vfio.DmaBuffer(length, page_size, backend=backend)
        made.append(ram)
        phb = papr.Phb(device.group.container, papr.GuestMemory(ram))
        made.append(phb)
        return phb, phb.add(device), ram

    yield make
    for each in reversed(made):
        each.close()
    table = 8 * MIB if device.iommu.info.levels > 1 else 2 * MIB  # of the default window, which stays
    assert backend.locked().locked == table


def chosen_pages(ram):
    """Pages of the guest, the last among them, filled with what can be told apart; where TCEs are listed is none of them."""
    source = random.Random(ram.length)
    pages = [*source.sample(range(1, ram.length // PAGE - 1), PAGES_TRIED - 1), ram.length // PAGE - 1]
    for page in pages:
        ram[page * PAGE : (page + 1) * PAGE] = source.randbytes(PAGE)
    return source, pages


def all_arrive(edu, address, ram, source, pages):
    """The device copies one page after another to another, all but its last byte; each copy is compared."""
    for _ in range(TURNS):
        origin, target = source.sample(pages, 2)
        edu.load(address(origin * PAGE), edu.capacity)
        edu.store(address(target * PAGE), edu.capacity)
        seen, wanted = (ram[page * PAGE : page * PAGE + edu.capacity] for page in (target, origin))
        if seen != wanted:
            return False
    return True


def boot(front, edu, length, page_size=None, mapped_in=None):
    """The whole flow of a guest."""
    phb, where, ram = front(length, page_size)
    guest = papr.Guest(phb, list_page=0)
    direct = guest.enable_ddw(where)
    assert direct is not None
    assert direct.page_size == mapped_in
    source, pages = chosen_pages(ram)
    assert all_arrive(edu, direct.address, ram, source, pages)
    guest.disable_ddw(direct)
    assert list(phb.tables) == phb.liobns[:1]


@POWERNV
def test_guest_of_512_mib_is_mapped_whole_in_host_pages_and_its_device_does_direct_dma(front, edu_driver, backend):
    boot(front, edu_driver, 512 * MIB, mapped_in=backend.page_size)


@HUGE_16M
def test_guest_in_huge_pages_is_mapped_in_pages_of_16_mib(front, edu_driver):
    boot(front, edu_driver, 64 * MIB, 16 * MIB, mapped_in=16 * MIB)


@PSERIES
def test_guest_of_a_guest_maps_all_its_memory(front, edu_driver, backend):
    boot(front, edu_driver, 64 * MIB, mapped_in=backend.page_size)


def test_32_bit_device_works_on_the_default_window_beside_the_direct_one(front, edu_driver):
    phb, where, ram = front(4 * MIB)
    guest = papr.Guest(phb, list_page=0)
    direct = guest.enable_ddw(where)
    assert direct is not None
    assert guest.enable_ddw(where, dma_mask=0xFFFFFFFF) is None
    ram[0x8000:0x8005] = b"hello"
    ioba = guest.map(0x8000, 2 * PAGE)
    assert ioba < 1 << 32
    edu_driver.load(ioba, 5)
    edu_driver.store(direct.address(0x20000), 5)
    assert ram[0x20000:0x20005] == b"hello"
    guest.unmap(ioba, 2 * PAGE)
    guest.disable_ddw(direct)


def test_pages_that_the_guest_took_away_are_out_of_reach(front, edu_driver):
    phb, where, ram = front(4 * MIB)
    direct = papr.Guest(phb, list_page=0).enable_ddw(where)
    assert direct is not None
    kept, gone, sink = (direct.address(n * MIB) for n in (1, 2, 3))
    ram[1 * MIB : 1 * MIB + 4], ram[2 * MIB : 2 * MIB + 4] = b"kept", b"gone"
    assert phb.hcall(papr.Opcode.H_STUFF_TCE, direct.liobn, gone, 0, 1) == (papr.Hcall.SUCCESS,)
    assert phb.hcall(papr.Opcode.H_GET_TCE, direct.liobn, gone) == (papr.Hcall.SUCCESS, 0)
    edu_driver.load(kept, 4)
    edu_driver.store(sink, 4)
    assert ram[3 * MIB : 3 * MIB + 4] == b"kept"
    edu_driver.load(gone, 4)
    edu_driver.store(sink, 4)
    assert ram[3 * MIB : 3 * MIB + 4] != b"gone"


@POWERNV
@pytest.mark.parametrize("way", ["detached", "closed"])
def test_group_that_leaves_takes_nothing_from_the_device_that_stays(backend, two_edus, way):
    """Its leaving empties the shared windows; the second time, with the group back and what the guest has changed since."""
    first, second = two_edus
    with vfio.open_device(first, backend) as device, vfio.DmaBuffer(4 * MIB, backend=backend) as ram:
        container, edu = device.group.container, Edu(device)
        with papr.Phb(container, papr.GuestMemory(ram)) as phb:
            where = phb.add(device)
            guest = papr.Guest(phb, list_page=0)
            direct = guest.enable_ddw(where)
            assert direct is not None
            for place in (0x8000, 0x10000):
                ioba = guest.map(place, PAGE)
                with vfio.Group(sysfs.group_of(backend, second), backend) as group:
                    container.attach(group)
                    with group.device(second) as other:
                        phb.add(other)
                        ram[0x2000:0x2005] = b"other"
                        Edu(other).load(direct.address(0x2000), 5)
                        Edu(other).store(ioba, 5)
                        assert ram[place : place + 5] == b"other"
                        phb.remove(other)
                    if way == "detached":
                        container.detach(group)
                source, pages = chosen_pages(ram)
                assert all_arrive(edu, direct.address, ram, source, pages)
                edu.load(direct.address(pages[0] * PAGE), 64)
                edu.store(ioba, 64)
                assert ram[place : place + 64] == ram[pages[0] * PAGE : pages[0] * PAGE + 64]
            guest.disable_ddw(direct)


def test_what_a_guest_may_not_do_changes_nothing(front, backend):
    phb, where, _ = front(4 * MIB)
    before, low = backend.locked(), phb.liobns[0]
    both = papr.TCE_READ | papr.TCE_WRITE
    for liobn, ioba, tce in ((low, 1, both), (low, 1 << 40, both), (low, 0, 4 * MIB | both), (low + 1, 0, both)):
        assert phb.hcall(papr.Opcode.H_PUT_TCE, liobn, ioba, tce) == (papr.Hcall.PARAMETER,)
    buid = phb.buid >> 32, phb.buid & 0xFFFFFFFF
    for shifts, status in (((13, 22), -3), ((12, 11), -3), ((28, 40), -3), ((12, 63), -1)):
        answer = phb.rtas("ibm,create-pe-dma-window", where, *buid, *shifts, results=4)
        assert answer == [status, 0, 0, 0]
    assert backend.locked() == before


def test_memory_that_cannot_be_registered_leaves_nothing_behind(device, backend):
    """The second block is one that is registered already, with another length."""
    ram = vfio.DmaBuffer(1 * MIB, backend=backend)
    with device.iommu.register(ram):
        before = backend.locked()
        other = vfio.DmaBuffer(1 * MIB, backend=backend)
        with pytest.raises(errors.CallFailed):
            papr.Phb(device.group.container, papr.GuestMemory((0, other), (1 * MIB, ram)))
        assert backend.locked() == before
    assert Edu(device).invert(0) == 0xFFFFFFFF


def eeh_call(phb, name, where, *more, results=1):
    return phb.rtas(name, where, phb.buid >> 32, phb.buid & 0xFFFFFFFF, *more, results=results)


@POWERNV
@pytest.mark.lab_only
def test_guest_resets_the_slot_and_its_device_works_again(front, device):
    phb, where, _ = front(4 * MIB)
    status, pe = eeh_call(phb, "ibm,get-config-addr-info2", where, papr.PeInfo.ADDRESS, results=2)
    assert (status, pe) == (0, 1)
    state = "ibm,read-slot-reset-state2"
    assert eeh_call(phb, "ibm,set-eeh-option", where, papr.EehOption.ENABLE) == [0]
    assert eeh_call(phb, state, pe, results=5) == [0, 0, 1, 0, 0]
    assert eeh_call(phb, "ibm,set-slot-reset", pe, papr.SlotReset.HOT) == [0]
    with pytest.raises(OSError) as caught:  # noqa: PT011  its errno is what counts
        device.config.read16(4)
    assert caught.value.errno == errno.ENODEV
    assert eeh_call(phb, "ibm,set-slot-reset", pe, papr.SlotReset.DEACTIVATE) == [0]
    assert eeh_call(phb, "ibm,configure-pe", pe) == [0]
    assert eeh_call(phb, state, pe, results=4) == [0, 0, 1, 0]
    assert eeh_call(phb, "ibm,slot-error-detail", pe, 0, 0, 0, 4096, papr.LogKind.PERMANENT) == [1]
    assert Edu(device).invert(0) == 0xFFFFFFFF


@POWERNV
@pytest.mark.lab_only
@pytest.mark.parametrize("kind", ["intx", "msi"])
def test_interrupts_of_the_monitor_survive_a_guests_reset(front, device, edu_driver, kind):
    phb, where, _ = front(4 * MIB)
    with getattr(device, kind).enable() as vector:
        edu_driver.interrupt()
        assert vector.wait(2) == 1
        edu_driver.acknowledge()
        if kind == "intx":
            device.intx.unmask()
        assert eeh_call(phb, "ibm,set-slot-reset", where, papr.SlotReset.HOT) == [0]
        assert eeh_call(phb, "ibm,set-slot-reset", where, papr.SlotReset.DEACTIVATE) == [0]
        assert eeh_call(phb, "ibm,configure-pe", where) == [0]
        device.enable_bus_master()
        edu_driver.interrupt()
        assert vector.wait(2) == 1
        edu_driver.acknowledge()


@PSERIES
def test_guest_of_a_guest_has_no_eeh(front):
    phb, where, _ = front(4 * MIB)
    assert eeh_call(phb, "ibm,read-slot-reset-state2", where, results=4) == [-3, 0, 0, 0]
    assert eeh_call(phb, "ibm,set-eeh-option", where, papr.EehOption.ENABLE) == [-3]
    assert eeh_call(phb, "ibm,set-slot-reset", where, papr.SlotReset.HOT) == [-3]
    assert eeh_call(phb, "ibm,configure-pe", where) == [-3]
