"""What the kernel pins: cases that the modelled kernel cannot have.

It gives mapped BARs no address, and it has only the memory that a process has now: of pages that were unmapped while a
device could reach them it says so (`vfio.fake.pe.MemoryGone`).
"""

import ctypes
import errno

import pytest

from simtests.conformance.engine import Engine
from simtests.conformance.raw import V1, V2

IOVA = 0x100000


@pytest.fixture
def bar(program, member):
    """Makes a mapped BAR in a container of that version: the container, and the BAR's address."""
    views = []

    def make(iommu):
        container = program.attached(member, iommu)
        mapping = program.mmap(container.group.device(member.address), program.page, 0)
        views.append(mapping.view(4))
        return container, ctypes.addressof(ctypes.c_char.from_buffer(views[-1]))

    yield make
    views.clear()


def test_registering_a_mapped_bar_raises_efault(program, bar):
    container, address = bar(V2)
    assert container.register(address, program.page) == -errno.EFAULT
    assert program.locked == 0


def test_mapping_a_mapped_bar_with_v1_raises_efault(program, bar):
    container, address = bar(V1)
    assert container.enable() == 0
    assert container.map(address, IOVA, program.page) == -errno.EFAULT


@pytest.mark.needs_edu
def test_device_sees_the_pages_that_were_there_when_they_were_registered(program, v2, member, area):
    page, pinned, seen = program.page, area(1), program.memory(program.page)
    pinned.write(0, b"the first memory")
    assert v2.register(pinned.address, page) == 0
    assert v2.register(seen.address, page) == 0
    pinned.fill(0)  # other memory, at the same address
    pinned.write(0, b"the other memory")
    assert v2.map(pinned.address, IOVA, page) == 0
    assert v2.map(seen.address, 2 * IOVA, page) == 0
    engine = Engine(v2, member)
    engine.load(IOVA)
    engine.store(2 * IOVA)
    assert seen.view[:16] == b"the first memory"
    engine.store(IOVA + 16)
    assert pinned.read(16, 16) == bytes(16)  # what the device writes does not arrive
    assert v2.unmap(IOVA, page) == 0
    assert v2.unregister(pinned.address, page) == 0
    assert v2.register(pinned.address, page) == 0
    assert v2.map(pinned.address, IOVA, page) == 0
    engine.load(IOVA)
    engine.store(2 * IOVA)
    assert seen.view[:16] == b"the other memory"
