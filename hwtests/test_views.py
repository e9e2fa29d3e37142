"""Device memory as memory of the process, which only a real kernel gives: in the fake every access is a call."""

import ctypes
import errno
import sys

import pytest

import vfio
from simtests.conformance.raw import V1


def test_view_reads_what_the_registers_read(edu_driver):
    bar = edu_driver.bar
    edu_driver.invert(0x0F1E2D3C)
    assert bar.view(4)[1].to_bytes(4, sys.byteorder) == bar.read(4, 4)


@pytest.mark.needs_edu
def test_view_is_released_with_its_region(device):
    view = device.region(vfio.BAR0).view(4)
    device.region(vfio.BAR0).close()
    with pytest.raises(ValueError, match="released"):
        view[0]


@pytest.fixture
def bar_address(program, member):
    """Maps the start of BAR 0 of the device in that container; its address."""

    def of(container):
        mapping = program.mmap(container.group.device(member.address), program.page, 0)
        return ctypes.addressof(ctypes.c_char.from_buffer(mapping.view(1)))

    return of


@pytest.mark.needs_edu
def test_bar_cannot_be_mapped_for_dma(program, member, bar_address):
    container = program.attached(member, V1)
    assert container.enable() == 0
    assert container.map(bar_address(container), 0x100000, program.page) == -errno.EFAULT


@pytest.mark.needs_edu
def test_bar_cannot_be_registered(program, v2, bar_address):
    assert v2.register(bar_address(v2), program.page) == -errno.EFAULT
    assert program.locked == 0
