"""A disk whose PE freezes under load, and is brought back: no write is lost."""

import os
import random

import pytest

import vfio
from simtests.conformance import eeh_clock
from simtests.conformance.freezing import FREEZABLE
from simtests.conformance.pci_calls import on_vfio
from vfio import eeh
from vfio.drivers.nvme import Nvme

pytestmark = [
    pytest.mark.targets(*FREEZABLE),
    pytest.mark.lab_only,
    pytest.mark.not_recorded("the device completes commands some time after the call that issues them"),
]
BLOCK, BLOCKS, DEPTH = 512, 32768, 16


class Disk(Nvme):
    """From `freeze` on it drops doorbells, as hardware does whose PE is frozen and as QEMU's does not, until the reset."""

    frozen = False

    def freeze(self, freezer):
        ring = self.bar.doorbell32
        freezer(self.device.address)
        self.frozen = True
        self.bar.doorbell32 = lambda offset, value: None if self.frozen else ring(offset, value)

    def on_reset(self, device=None):
        if self.frozen:
            self.frozen = False
            del self.bar.doorbell32
        super().on_reset(device)


@pytest.fixture
def address(backend, target):
    """The disk, on vfio-pci."""
    address = next(device.address for device in target.topology.devices if device.model == "nvme")
    with on_vfio(backend, address):
        yield address


@pytest.mark.parametrize(
    ("reset", "window", "freezes"),
    [("fundamental", "default", 50), ("fundamental", "64-bit", 10), ("hot", "default", 2), ("hot", "64-bit", 2)],
    ids=lambda value: str(value),
)
def test_freezes_under_load_lose_no_write(backend, address, freezer, reset, window, freezes):
    written: dict[int, bytes] = {}
    with vfio.open_device(address, backend) as device:
        windows = [device.iommu.create_window(1 << 28)] if window == "64-bit" else device.iommu.windows
        with (
            Disk(device, window=windows[0], depth=DEPTH) as disk,
            vfio.DmaBuffer(DEPTH * BLOCK, backend=backend) as buffer,
            disk.map(buffer) as dma,
        ):
            for turn in range(freezes):
                data = os.urandom(DEPTH * BLOCK)
                dma[: len(data)] = data
                places = random.sample(range(BLOCKS), DEPTH)
                last = random.randrange(DEPTH)
                commands = []
                for n, lba in enumerate(places):
                    if n == last:
                        disk.freeze(freezer)
                    commands.append(disk.start_write(lba, 1, dma, n * BLOCK))
                assert set(commands[last:]) <= set(disk.lost)
                log = eeh.recover(
                    device, disk, reset=reset, limit=1000, freezes=eeh.Freezes(), clock=eeh_clock.of(backend)
                )
                assert (log.outcome, log.count, log.reset) == ("recovered", 1, reset), log
                assert disk.lost == ()
                disk.wait(*commands)
                written |= {lba: data[n * BLOCK : (n + 1) * BLOCK] for n, lba in enumerate(places)}
                for lba in places + random.sample(list(written), min(len(written), 50)):
                    assert disk.read(lba, 1) == written[lba], (turn, lba)
            for lba, block in written.items():
                assert disk.read(lba, 1) == block
