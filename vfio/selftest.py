"""Does the whole way work: open a device, map memory, move data through every DMA window, take interrupts?

Each step is told as it ends.  Data moves where this library has a driver for the device; else memory is mapped, and
interrupts are looped back by the kernel.  What a step did is undone before the next one begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Literal, NamedTuple

from vfio import drivers, errors
from vfio.backend import Backend
from vfio.device import Device
from vfio.dma import DmaBuffer
from vfio.drivers import Exerciser
from vfio.iommu.noiommu import NoIommu
from vfio.iommu.pamu import Pamu
from vfio.iommu.spapr import Spapr
from vfio.iommu.spapr_v2 import SpaprTceV2
from vfio.iommu.type1 import Type1
from vfio.iommu.window import DmaWindow
from vfio.irq import Irq
from vfio.session import open_device

_WINDOW_PAGES = 16
"""Least size of a test window, in pages of its own or of the host, whichever are larger."""
_SMALLEST_WINDOW = 1 << 20
"""Bytes that a driver's queues and data fit into."""


class Step(NamedTuple):
    """One thing that was tried."""

    name: str
    status: Literal["ok", "skipped", "failed"]
    detail: str
    seconds: float


class _Skip(Exception):
    """This host cannot be asked that; says why."""


def steps(address: str, backend: Backend) -> Iterator[Step]:
    """Test the device `address`, which has to be on a VFIO driver; the steps, as they end.

    Steps that fail end with what went wrong; the first, opening the device, raises what `open_device` raises.
    """
    locked = backend.locked().locked
    begin = time.monotonic()
    with open_device(address, backend) as device:
        model = device.iommu.name
        found = f"group {device.group.number}, {model}"
        if device.iommu.passed_over:
            why = device.iommu.passed_over[0].splitlines()[0]  # without what would mend it: it is mended
            found += f", as nothing better works: {why}"
        yield Step("open", "ok", found, time.monotonic() - begin)
        yield from _Selftest(device).run()
    yield _step("nothing left", lambda: _nothing_left(backend, locked))


def _step(name: str, test: Callable[[], str]) -> Step:
    begin = time.monotonic()
    try:
        detail = test()
    except _Skip as why:
        return Step(name, "skipped", str(why), time.monotonic() - begin)
    except (OSError, ValueError, AssertionError) as error:
        return Step(name, "failed", str(error), time.monotonic() - begin)
    return Step(name, "ok", detail, time.monotonic() - begin)


def _nothing_left(backend: Backend, before: int) -> str:
    after = backend.locked().locked
    _check(after == before, f"{errors.size(after - before)} of locked memory are still charged")
    return f"{errors.size(after)} locked, as before"


def _check(right: bool, otherwise: str) -> None:
    if not right:
        raise AssertionError(otherwise)


class _Selftest:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.backend = device.backend
        self.driver: Exerciser | None = None
        self._kept = ExitStack()
        """What later steps need."""

    def run(self) -> Iterator[Step]:
        with self._kept:
            yield from self._steps()

    def _steps(self) -> Iterator[Step]:
        yield _step("device", self._identity)
        yield _step("registers", self._registers)
        iommu = self.device.iommu
        if isinstance(iommu, NoIommu):
            yield Step("DMA", "skipped", "there is no IOMMU, and nothing can be mapped", 0.0)
        if isinstance(iommu, Pamu):
            yield _step("DMA", lambda: self._pamu(iommu))
        if isinstance(iommu, Spapr):
            for window in iommu.windows:
                yield _step("default window", lambda window=window: self._window(window))  # type: ignore[misc]
        if isinstance(iommu, Type1):
            yield _step("DMA", lambda: self._type1(iommu))
        if isinstance(iommu, SpaprTceV2):
            for page_size in iommu.info.page_sizes:
                name = f"window, {errors.size(page_size)} pages"
                yield _step(name, lambda page=page_size: self._second(iommu, page, 1))  # type: ignore[misc]
            yield _step("window, 2-level table", lambda: self._second(iommu, self.backend.page_size, 2))
        for irq in self.device.irqs():
            if irq.index in (self.device.intx.index, self.device.msi.index, self.device.msix.index):
                yield _step(irq.name, lambda irq=irq: self._interrupt(irq))  # type: ignore[misc]

    def _identity(self) -> str:
        config = self.device.config
        vendor, product = config.read16(0), config.read16(2)
        _check(vendor != 0xFFFF, "configuration space reads all ones: the device is gone, or its PE is frozen")
        regions, irqs = self.device.regions(), self.device.irqs()
        return f"{vendor:04x}:{product:04x}, {len(regions)} regions, interrupts {', '.join(irq.name for irq in irqs)}"

    def _registers(self) -> str:
        self.driver = drivers.find(self.device)
        if self.driver is None:
            raise _Skip("no driver for this device: memory is mapped and interrupts are looped back, no data moves")
        return self.driver.identify()

    def _window(self, window: DmaWindow) -> str:
        length = max(window.page_size, self.backend.page_size)
        hugetlb = length if length > self.backend.page_size else None
        with ExitStack() as undo:
            try:
                source = undo.enter_context(DmaBuffer(length, hugetlb, self.backend))
                sink = undo.enter_context(DmaBuffer(length, hugetlb, self.backend))
            except errors.CallFailed as error:
                raise _Skip(f"{error.what}: {error.why}") from None
            readable = undo.enter_context(window.iommu.map(source, self._free_iova(window, 1, length)))
            writable = undo.enter_context(window.iommu.map(sink, self._free_iova(window, 2, length), read=False))
            done = self.driver.move(readable, writable) if self.driver else "mapped and unmapped"
            return f"{done} in {errors.span(window.start, window.size)}"

    def _type1(self, iommu: Type1) -> str:
        """In the lowest and in the highest page that can be mapped, but for page 0."""
        page = iommu.page_size
        first, last = iommu.info.ranges[0][0] + page, iommu.info.ranges[-1][1] + 1 - page
        with ExitStack() as undo:
            source, sink = (undo.enter_context(DmaBuffer(page, backend=self.backend)) for _ in range(2))
            readable = undo.enter_context(iommu.map(source, first))
            writable = undo.enter_context(iommu.map(sink, last, read=False))
            done = self.driver.move(readable, writable) if self.driver else "mapped and unmapped"
            return f"{done}, from IOVA {first:#x} to {last:#x}"

    def _pamu(self, iommu: Pamu) -> str:
        """In windows of an aperture that is as small as it can be with room for the MSI banks.

        They stay mapped, for the interrupts that are tried next: without any memory mapped, DMA is off.
        """
        page = self.backend.page_size
        iommu.configure(16 * page, 16)
        source, sink = (self._kept.enter_context(DmaBuffer(page, backend=self.backend)) for _ in range(2))
        readable = self._kept.enter_context(iommu.map(source))
        writable = self._kept.enter_context(iommu.map(sink, read=False))
        for index in range(iommu.msi_banks):
            self._kept.enter_context(iommu.map_msi_bank(index))
        done = self.driver.move(readable, writable) if self.driver else "mapped"
        return f"{done} in windows of {errors.size(page)}, and {iommu.msi_banks} MSI banks mapped"

    def _free_iova(self, window: DmaWindow, n: int, length: int) -> int:
        return window.start + n * length

    def _second(self, iommu: SpaprTceV2, page_size: int, levels: int) -> str:
        if levels > iommu.info.levels:
            raise _Skip(f"tables have {iommu.info.levels} level here")
        # Two levels need so many entries that one host page does not hold them.
        size = (
            max(_SMALLEST_WINDOW, _WINDOW_PAGES * max(page_size, self.backend.page_size))
            if levels == 1
            else self.backend.page_size * page_size
        )
        with iommu.create_window(size, page_size, levels) as window:
            return self._window(window)

    def _interrupt(self, irq: Irq) -> str:
        if self.driver is not None:
            self.driver.interrupt(irq)
            return "raised by the device"
        with irq.enable(1) as vector:
            irq.trigger()
            vector.wait(1)
            return "looped back by the kernel"
