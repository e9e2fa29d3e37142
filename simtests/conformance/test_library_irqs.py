"""Interrupts through the library: sets of vectors that grow and shrink, resampling, event loops."""

import asyncio
import errno
import inspect
import os
import re
import select
import textwrap

import pytest

import vfio
from simtests.conformance.fixtures import PC, POWER
from simtests.conformance.pci_calls import endpoint_address, on_vfio
from vfio import errors

NEVER = 0.05
"""Seconds after which an interrupt that has not arrived does not."""


@pytest.fixture
def endpoint(backend, target):
    """A PCI Express device with MSI-X."""
    with on_vfio(backend, endpoint_address(target)) as address, vfio.open_device(address, backend) as device:
        yield device


def descriptors():
    """Those of the program: the modelled kernel keeps its own at high numbers."""
    return sorted(int(name) for name in os.listdir("/proc/self/fd") if int(name) < 500)


def taken(vectors):
    """How often each fired; what fired was told to the eventfd before the call that made it returned."""
    return [vector.take() for vector in vectors]


# --- Sets of vectors ---


@pytest.mark.lab_only
def test_vectors_are_enabled_from_a_start_on(endpoint):
    with endpoint.msix.enable(2, start=1) as vectors:
        assert [vector.number for vector in vectors] == [1, 2]
        assert vectors.room == 3
        endpoint.msix.trigger(0, 3)
        assert taken(vectors) == [1, 1]


@pytest.mark.lab_only
def test_vectors_grow_into_the_room_that_was_allocated_for_them(endpoint):
    with endpoint.msix.enable(room=5) as vectors:
        assert [vector.number for vector in vectors.grow()] == [1]
        assert [vector.number for vector in vectors.grow(2)] == [2, 3]
        endpoint.msix.trigger(0, 5)
        assert taken(vectors) == [1, 1, 1, 1]


@pytest.mark.lab_only
def test_single_vectors_come_and_go(endpoint):
    with endpoint.msix.enable(room=4) as vectors:
        third = vectors.add(3)
        assert [vector.number for vector in vectors] == [0, 3]
        vectors[0].close()
        endpoint.msix.trigger(0, 4)
        assert (third.take(), [vector.number for vector in vectors]) == (1, [3])
        first = vectors.add(0)
        endpoint.msix.trigger_each([True, True, True, False])
        assert taken([first, third]) == [1, 0]
        third.close()
        third.close()
        with pytest.raises(errors.Closed):
            third.take()
        assert endpoint.msix.enabled
    assert not endpoint.msix.enabled


@PC
@pytest.mark.lab_only
def test_vectors_grow_beyond_what_was_allocated_where_the_kernel_can_add(endpoint):
    assert endpoint.msix.resizable
    with endpoint.msix.enable(2) as vectors:
        added = vectors.grow(2)
        assert [vector.number for vector in vectors] == [0, 1, 2, 3]
        assert vectors.add(4).number == 4
        endpoint.msix.trigger(0, 5)
        assert taken(vectors) == [1, 1, 1, 1, 1]
        assert len(added) == 2


@POWER
@pytest.mark.lab_only
def test_growth_beyond_what_was_allocated_is_refused_where_the_kernel_cannot_add(endpoint):
    assert not endpoint.msix.resizable  # on POWER
    with endpoint.msix.enable(2) as vectors:
        before = descriptors()
        with pytest.raises(errors.NoInterrupt, match="has allocated 2 vectors and cannot add to them") as caught:
            vectors.grow(2)
        assert caught.value.errno == errno.EINVAL
        assert caught.value.remedy == "enable(..., room=4) allocates them all at once"
        assert descriptors() == before
        endpoint.msix.trigger(0, 2)
        assert taken(vectors) == [1, 1]


@pytest.mark.lab_only
def test_vector_that_is_enabled_or_that_there_is_not_cannot_be_added(endpoint):
    count = endpoint.msix.count
    with endpoint.msix.enable(room=count) as vectors:
        with pytest.raises(errors.NoInterrupt, match="vector 0 is enabled already") as caught:
            vectors.add(0)
        assert caught.value.errno == errno.EBUSY
        for call in (lambda: vectors.add(count), lambda: vectors.add(-1), lambda: vectors.grow(0)):
            with pytest.raises(errors.NoInterrupt, match=f"the device has {count} of them"):
                call()
    with pytest.raises(errors.Closed):
        vectors.grow()


@pytest.mark.lab_only
@pytest.mark.parametrize(
    "arguments", [{"count": 0}, {"start": -1}, {"room": 0}, {"count": 3, "room": 2}, {"start": 4096}]
)
def test_sets_of_vectors_that_cannot_be_are_refused(endpoint, arguments):
    before = descriptors()
    with pytest.raises(errors.NoInterrupt, match="were asked for") as caught:
        endpoint.msix.enable(**arguments)
    assert caught.value.errno == errno.EINVAL
    assert descriptors() == before


@pytest.mark.lab_only
def test_all_vectors_of_a_device_can_be_had_and_given_back(endpoint):
    before = descriptors()
    for _ in range(2):
        with endpoint.msix.enable(endpoint.msix.count) as vectors:
            endpoint.msix.trigger(0, endpoint.msix.count)
            assert taken(vectors) == [1] * endpoint.msix.count
    assert descriptors() == before


def test_messages_of_a_closed_msi_vector_go_nowhere(device, edu_driver, backend):
    """MSI cannot mask single messages, and powernv would let this one go astray to bus address 0."""
    with device.iommu.map(vfio.DmaBuffer(1 << 16, backend=backend), iova=0) as dma, device.msi.enable() as vectors:
        dma[0:8] = b"\xff" * 8
        vectors[0].close()
        edu_driver.interrupt()
        edu_driver.acknowledge()
        assert dma[0:8] == b"\xff" * 8
        vector = vectors.add(0)
        assert vector.take() == 0
        edu_driver.interrupt()
        assert vector.wait(2) == 1
        edu_driver.acknowledge()


# --- Loopback ---


def test_trigger_counts_until_it_is_taken(device):
    with device.msi.enable() as vector:
        for _ in range(3):
            device.msi.trigger()
        device.msi.trigger_each([False])
        assert vector.wait(1) == 3
        assert vector.take() == 0


def test_trigger_of_an_interrupt_that_is_not_enabled_says_so(device):
    for call in (device.msi.trigger, lambda: device.msi.trigger_each([True])):
        with pytest.raises(errors.NoInterrupt, match="MSI is not enabled") as caught:
            call()
        assert caught.value.errno == errno.EINVAL


@pytest.mark.lab_only
@pytest.mark.parametrize("kind", ["err", "req"])
def test_request_and_error_interrupts_are_enabled_beside_the_others(endpoint, kind):
    irq = getattr(endpoint, kind)
    with endpoint.msix.enable():
        with irq.enable() as vector:
            irq.trigger()
            assert vector.wait(1) == 1
            vector[0].close()  # its only one
            assert not irq.enabled
        with irq.enable() as vector:
            irq.trigger_each([True])
            assert vector.wait(1) == 1
    with pytest.raises(errors.NoInterrupt):
        irq.trigger()


# --- INTx ---


def test_masked_intx_waits(device, edu_driver):
    with device.intx.enable() as vector:
        device.intx.mask()
        edu_driver.interrupt()
        with pytest.raises(errors.TimedOut):
            vector.wait(NEVER)
        device.intx.unmask()
        assert vector.wait(2) == 1
        edu_driver.acknowledge()


def test_resampling_unmasks_by_an_eventfd(device, edu_driver):
    with device.intx.enable() as vector, device.intx.resample() as resample:
        edu_driver.interrupt()
        assert vector.wait(2) == 1
        resample.fire()
        assert vector.wait(2) == 1  # the line is still up
        edu_driver.acknowledge()
        resample.fire()
        with pytest.raises(errors.TimedOut):
            vector.wait(NEVER)
        edu_driver.interrupt()
        assert vector.wait(2) == 1
        edu_driver.acknowledge()


def test_resampling_needs_intx_and_is_there_once(device):
    before = descriptors()
    with pytest.raises(errors.NoInterrupt, match="INTx is not enabled") as caught:
        device.intx.resample()
    assert caught.value.errno == errno.EINVAL
    with device.intx.enable():
        resample = device.intx.resample()
        with pytest.raises(errors.NoInterrupt, match="already") as caught:
            device.intx.resample()
        assert caught.value.errno == errno.EBUSY
        resample.close()
        resample.close()
        other = device.intx.resample()
    with pytest.raises(errors.Closed):  # it went with INTx
        other.fire()
    with pytest.raises(errors.NoInterrupt) as caught:
        device.msi.resample()
    assert caught.value.errno == errno.ENOTTY
    assert descriptors() == before


@pytest.mark.lab_only
def test_vectors_are_armed_again_with_the_eventfds_and_counts_that_they_have(endpoint):
    with endpoint.msix.enable(3, room=5) as vectors:
        kept = [vector.fileno() for vector in vectors]
        endpoint.msix.trigger(0, 3)
        vectors[1].close()
        assert endpoint.msix.rearm() == 2
        endpoint.msix.trigger(0, 5)
        assert taken(vectors) == [2, 2]
        assert [vector.fileno() for vector in vectors] == [kept[0], kept[2]]
        assert vectors.add(4).number == 4  # the room is there as before
        endpoint.msix.suspend()
        endpoint.msix.suspend()
        with pytest.raises(errors.NoInterrupt) as caught:
            endpoint.msix.trigger()
        assert caught.value.errno == errno.EINVAL
        assert endpoint.msix.rearm() == 3
        endpoint.msix.trigger(4)
        assert taken(vectors) == [0, 0, 1]
    assert endpoint.msix.rearm() == 0
    assert not endpoint.msix.enabled


def test_intx_is_armed_again_with_what_unmasks_it(device, edu_driver):
    with device.intx.enable() as vector, device.intx.resample() as resample:
        assert device.intx.rearm() == 1
        edu_driver.interrupt()
        assert vector.wait(2) == 1
        edu_driver.acknowledge()
        resample.fire()
        edu_driver.interrupt()
        assert vector.wait(2) == 1
        edu_driver.acknowledge()


def test_intx_without_its_vector_stays_enabled_and_silent(device, edu_driver):
    with device.intx.enable() as vectors:
        vectors[0].close()
        edu_driver.interrupt()
        edu_driver.acknowledge()
        assert device.intx.enabled
        device.intx.trigger()
        vector = vectors.add(0)
        device.intx.trigger()
        assert vector.wait(1) == 1


# --- Waiting ---


@pytest.mark.lab_only
def test_many_vectors_are_waited_for_at_once(endpoint):
    with endpoint.msix.enable(3) as vectors:
        endpoint.msix.trigger(1, 1)
        assert select.select(vectors, [], [], 1)[0] == [vectors[1]]
        with pytest.raises(errors.NoInterrupt, match="say which"):
            vectors.wait()


def test_example_of_an_event_loop_counts_every_interrupt(device):
    """The one in the documentation of `vfio.irq`."""
    written = re.search(r"( +async def .*?)\n\n", inspect.getdoc(vfio.irq), re.DOTALL)
    names = {"asyncio": asyncio}
    exec(textwrap.dedent(written[1]), names)

    async def main():
        seen, stream = 0, names["interrupts"](vector)
        for count in (1, 2, 3):
            for _ in range(count):
                device.msi.trigger()
            seen += await asyncio.wait_for(anext(stream), 5)
        await stream.aclose()
        return seen

    with device.msi.enable() as vector:
        assert asyncio.run(main()) == 6
        device.msi.trigger()
        assert vector.wait(1) == 1
