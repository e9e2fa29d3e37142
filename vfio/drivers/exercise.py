"""The drivers of this library put to a test: data is moved and interrupts are taken, and nothing stays changed."""

from __future__ import annotations

import os
from typing import cast

from vfio import errors
from vfio.device import Device
from vfio.dma import Dma
from vfio.drivers.edu import Edu
from vfio.drivers.nvme import Interrupt, Nvme
from vfio.iommu.window import DmaWindow
from vfio.irq import Irq

_PATIENCE = 1.0
"""Seconds that an interrupt may take."""


class EduExerciser:
    """QEMU's edu: memory into the device, and out of it again."""

    def __init__(self, device: Device) -> None:
        self._edu = Edu(device)

    def identify(self) -> str:
        return self._edu.identify()

    def move(self, source: Dma, sink: Dma) -> str:
        count = min(self._edu.capacity, source.length)
        pattern = os.urandom(count)
        source[:count] = pattern
        self._edu.load(source.iova, count)
        self._edu.store(sink.iova, count)
        assert sink[:count] == pattern, f"{count} bytes came back changed"
        return f"{count} bytes there and back"

    def interrupt(self, irq: Irq) -> None:
        with irq.enable(1) as vector:
            self._edu.interrupt()
            vector.wait(_PATIENCE)
            self._edu.acknowledge()
            if irq is irq.device.intx:
                irq.unmask()


class NvmeExerciser:
    """An NVMe disk, which is only read: commands out of memory, and blocks into it."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def identify(self) -> str:
        with Nvme(self._device) as disk:
            spaces = ", ".join(errors.size(space.size) for space in disk.namespaces)
            return f"{disk.controller.model} {disk.controller.serial}, namespaces: {spaces or 'none'}"

    def move(self, source: Dma, sink: Dma) -> str:
        # Queues go through the window too, unless that takes a large page for them alone.
        window = sink.window if isinstance(sink.window, DmaWindow) else None
        small = window is not None and window.page_size <= self._device.backend.page_size
        with Nvme(self._device, window=window if small else None) as disk:
            space = disk.namespace()
            blocks = min(sink.length, disk.largest_transfer, space.size) // space.block_size
            wanted = disk.read(0, blocks)
            length = len(wanted)
            sink[:length] = bytes(byte ^ 0xFF for byte in wanted)  # whatever is on the disk, it has to arrive
            disk.wait(disk.start_read(0, blocks, sink))
            assert sink[:length] == wanted, f"{blocks} blocks read twice differ"
            return f"{blocks} blocks of {errors.size(space.block_size)} read"

    def interrupt(self, irq: Irq) -> None:
        kind = cast(Interrupt, irq.name)
        with Nvme(self._device, interrupt=kind) as disk:
            disk.read(0, 1)
            if not disk.interrupts and disk.vectors:  # the data may be seen before the interrupt that tells of it
                disk.vectors[-1].wait(_PATIENCE)
