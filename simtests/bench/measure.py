"""The measurements, made on whatever kernel a backend URL names: one line of JSON each, or nothing where it cannot be.

`python -m simtests.bench.measure URL ADDRESS`; the device at ADDRESS is bound for as long as it takes.
"""

import gc
import json
import sys
import time
import tracemalloc
from collections.abc import Callable

import vfio
from vfio import assign, uapi

_PAGE = 4096
_ROUNDS = 7


def main(url: str, address: str) -> None:
    """Measure everything, and print it."""
    backend = vfio.open_backend(url)
    with assign.bound([address], backend=backend):
        _tell("open and close a container", _best(lambda: vfio.Container(backend).close(), 200))
        with vfio.Container(backend) as container:
            _tell("the shortest ioctl", _best(lambda: backend.ioctl(container.fd, uapi.VFIO_GET_API_VERSION), 500))
        with vfio.open_device(address, backend) as device:
            assert isinstance(device.iommu, vfio.SpaprTceV2)
            _registers(device)
            _calls(device, device.iommu)
            for length in (4 << 10, 1 << 30, 1 << 40):
                _one_map(device, device.iommu, length)
            if url.startswith("fake:"):
                _scattered(device, device.iommu)


def _registers(device: vfio.Device) -> None:
    """A register of BAR 0, in both ways."""
    backend, region = device.backend, device.region(0)
    _tell("read a register, pread", _best(lambda: backend.pread(device.fd, 4, region.file_offset), 500))
    _tell("read a register, mapped", _best(lambda: region.read32(0), 500))


def _calls(device: vfio.Device, iommu: vfio.SpaprTceV2) -> None:
    """map+unmap of one page, by the prepared mapper."""
    page = device.backend.page_size
    with vfio.DmaBuffer(page, backend=device.backend) as buffer, iommu.register(buffer):
        with iommu.windows[0].mapper(buffer, slots=1, length=page) as mapper:

            def pair() -> None:
                mapper.map(0, 0)
                mapper.unmap(0)

            _tell("map or unmap one page, a call", _best(pair, 500) / 2)


def _one_map(device: vfio.Device, iommu: vfio.SpaprTceV2, length: int) -> None:
    """One MAP and one UNMAP of `length` bytes in 4 KiB pages; the memory is reserved, not touched."""
    name = f"map+unmap {vfio.errors.size(length)} of 4 KiB pages"
    if device.backend.url == "kernel:" and length > 64 << 20:
        return _tell(name, None)
    levels = None if length < 1 << 32 else 3
    with vfio.DmaBuffer(length, backend=device.backend) as buffer:
        with iommu.create_window(max(2 * length, 1 << 30), _PAGE, levels) as window, iommu.register(buffer):

            def pair() -> None:
                window.map(buffer).close()

            _tell(name, _best(pair, 20))
    return None


def _scattered(device: vfio.Device, iommu: vfio.SpaprTceV2, count: int = 1_000_000) -> None:
    """Memory that the model needs for `count` mappings of one page, none beside another (raw calls: no Python object)."""
    with vfio.DmaBuffer(1 << 20, backend=device.backend) as buffer:
        with iommu.create_window(1 << 34, _PAGE, 3) as window, iommu.register(buffer):
            argument = uapi.vfio_iommu_type1_dma_map(flags=3, size=_PAGE)
            call = device.backend.prepare(iommu.container.fd, uapi.VFIO_IOMMU_MAP_DMA, uapi.buffer(argument))
            gc.collect()
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
            for n in range(count):
                argument.iova = window.start + 2 * n * _PAGE
                argument.vaddr = buffer.address + (n & 0xFE) * _PAGE
                call()
            _tell(
                f"bytes for each of {count:,} scattered mappings", (tracemalloc.get_traced_memory()[0] - before) / count
            )
            tracemalloc.stop()


def _best(call: Callable[[], object], times: int) -> float:
    """Seconds of one call: the fastest of several rounds, which is the one that was disturbed least."""
    found = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        for _ in range(times):
            call()
        found.append((time.perf_counter() - begin) / times)
    return min(found)


def _tell(name: str, value: float | None) -> None:
    print(json.dumps([name, value]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
