"""The bus-driver interface: the example of its docstring, run as it stands there."""

from __future__ import annotations

import errno
import inspect
import textwrap
from collections.abc import Iterator

import pytest

import vfio
from vfio.fake import bus_driver
from vfio.fake.backend import FakeBackend
from vfio.fake.kernel_error import KernelWouldBlock

ADDRESS = "0000:01:00.0"


def blocks() -> list[str]:
    """The pieces of code in the docstring: what follows a line that ends in ``::``."""
    found: list[list[str]] = []
    inside = False
    for line in inspect.getdoc(bus_driver).splitlines():  # type: ignore[union-attr]
        if line and not line.startswith(" "):
            inside = line.endswith("::")
            if inside:
                found.append([])
        elif inside:
            found[-1].append(line)
    return [textwrap.dedent("\n".join(lines)).strip() for lines in found]


@pytest.fixture
def names() -> dict[str, object]:
    backend = vfio.open_backend("fake:power8")
    assert isinstance(backend, FakeBackend)
    names: dict[str, object] = {"vfio": vfio, "backend": backend}
    exec(blocks()[0], names)
    return names


@pytest.fixture
def device(names: dict[str, object]) -> Iterator[vfio.Device]:
    """The example's device, opened."""
    backend = names["backend"]
    assert isinstance(backend, FakeBackend)
    pci = backend.machine.device(ADDRESS)
    backend.machine.vfio.register_device(pci, names["Mailbox"](), bytearray(4096))  # type: ignore[operator]
    with vfio.Container(backend) as container, vfio.Group(0, backend) as group:
        container.attach(group)
        container.choose_iommu()
        with group.device(ADDRESS) as device:
            yield device
    assert backend.leaks() == []


def test_the_device_takes_30_lines() -> None:
    definition = blocks()[0].partition("class ")[1:]
    assert len([line for line in "".join(definition).splitlines() if line]) <= 30


def test_the_example_is_registered_opened_and_written(names: dict[str, object]) -> None:
    exec(blocks()[1], names)
    backend = names["backend"]
    assert isinstance(backend, FakeBackend)
    registered = backend.machine.vfio.devices[backend.machine.device(ADDRESS)]
    assert registered.data[16:20] == (0x600DCAFE).to_bytes(4, "little")
    assert backend.leaks() == []


def test_a_region_of_it_reads_what_was_written(device: vfio.Device) -> None:
    region = device.region(0)
    region.write32(16, 0x12345678)
    assert (region.size, region.read32(16), region.read32(20)) == (4096, 0x12345678, 0)


def test_reset_clears_it(device: vfio.Device) -> None:
    device.region(0).write32(0, 1)
    assert device.can_reset
    device.reset()
    assert device.region(0).read32(0) == 0


def test_what_it_does_not_have_is_refused_with_its_errno(device: vfio.Device) -> None:
    with pytest.raises(vfio.VfioError) as caught:
        device.region(1)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(vfio.VfioError):
        device.irq(0)
    with pytest.raises(OSError, match="Invalid argument") as refused:
        device.backend.mmap(device.fd, 4096, 0, 3)
    assert refused.value.errno == errno.EINVAL


def test_it_is_not_taken_back_from_the_process_that_has_it_open(device: vfio.Device) -> None:
    backend = device.backend
    assert isinstance(backend, FakeBackend)
    with pytest.raises(KernelWouldBlock, match=r"0000:01:00\.0"):
        backend.machine.vfio.unregister_device(backend.machine.device(ADDRESS), backend.process)


def test_a_device_is_registered_once(device: vfio.Device) -> None:
    backend = device.backend
    assert isinstance(backend, FakeBackend)
    with pytest.raises(OSError, match="Invalid argument") as caught:
        backend.machine.vfio.register_device(backend.machine.device(ADDRESS), bus_driver.VfioDeviceOps(), None)
    assert caught.value.errno == errno.EINVAL
