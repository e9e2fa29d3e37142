"""A device of a modelled machine that is about to freeze: what the tests of EEH share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import vfio
from simtests.conformance.eeh_clock import MachineClock
from vfio import assign, eeh, uapi
from vfio.drivers.edu import Edu
from vfio.fake.backend import FakeBackend

EDU, BRIDGE, DISK = "0001:01:00.0", "0001:00:00.0", "0002:01:00.0"
PRESETS = ["power7", "power8", "power8?page_size=65536", "power8?kernel=7.2", "power9", "power10"]


class Setting:
    """A device of a modelled machine, open, with memory mapped and MSI on."""

    def __init__(self, backend: FakeBackend, address: str = EDU) -> None:
        self.backend, self.machine = backend, backend.machine
        self.clock = MachineClock(self.machine.clock)
        self.device = vfio.open_device(address, backend)
        self.container = self.device.group.container
        assert self.container is not None
        self.eeh = self.container.eeh
        self.edu = Edu(self.device)
        self.buffer = vfio.DmaBuffer(1 << 16, backend=backend)
        self.dma = self.device.iommu.map(self.buffer)

    def freeze(self, what: str = "both") -> None:
        self.machine.eeh.freeze(self.device.address, what)  # type: ignore[arg-type]

    def recover(self, driver: object = None, **options: object) -> eeh.Log:
        return eeh.recover(self.device, driver, clock=self.clock, **options)  # type: ignore[arg-type]

    def moves(self, data: bytes = b"some data to be moved") -> bool:
        """Whether data gets into the device and out of it."""
        self.dma[: len(data)] = data
        self.edu.load(self.dma.iova, len(data))
        self.edu.store(self.dma.iova + 4096, len(data))
        return self.dma[4096 : 4096 + len(data)] == data

    def interrupts(self, vector: vfio.Vectors) -> bool:
        vector.take()
        self.edu.interrupt()
        self.edu.acknowledge()
        return vector.take() == 1


def opened(url: str, address: str = EDU) -> Iterator[Setting]:
    backend = vfio.open_backend(url)
    assert isinstance(backend, FakeBackend)
    with assign.bound([address], backend=backend):
        setting = Setting(backend, address)
        yield setting
        setting.device.close()
        setting.buffer.close()
    assert backend.leaks() == []


@pytest.fixture(params=PRESETS)
def anywhere(request: pytest.FixtureRequest) -> Iterator[Setting]:
    """On every machine that has EEH."""
    yield from opened(f"fake:{request.param}", "0000:03:00.0" if request.param == "power7" else EDU)


@pytest.fixture
def setting() -> Iterator[Setting]:
    yield from opened("fake:power9")


class Recorder:
    """A driver that writes down what is called."""

    def __init__(self, told: list[str], name: str = "") -> None:
        self.told, self.name = told, name

    def on_error(self, log: eeh.Log) -> None:
        self.told.append(f"{self.name}error in {log.before}")

    def on_reset(self, device: vfio.Device) -> None:
        self.told.append(f"{self.name}reset of {device.address}, bus master {device.pci.command.bus_master}")

    def on_resume(self) -> None:
        self.told.append(f"{self.name}resume")


def fails(setting: Setting, op: int, number: int, times: int = 1) -> list[int]:
    """Let the next operations of a kind fail; how often they were made."""
    backend, real, seen = setting.backend, setting.backend.ioctl, list[int]()

    def ioctl(fd: int, request: int, arg: object = 0) -> int:
        if request == uapi.VFIO_EEH_PE_OP and int.from_bytes(memoryview(arg).cast("B")[8:12], "little") == op:  # type: ignore[arg-type]
            seen.append(op)
            if len(seen) <= times:
                raise OSError(number, "planned")
        return real(fd, request, arg)  # type: ignore[arg-type]

    backend.ioctl = ioctl  # type: ignore[method-assign]
    return seen
