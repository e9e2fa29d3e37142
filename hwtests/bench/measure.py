"""What runs beside the device: `python -m hwtests.bench.measure ADDRESS LIBRARY`, the device being on vfio-pci."""

import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable

import vfio

_TURNS = 15


def main(address: str, library: str) -> None:
    """Print all figures."""
    with vfio.open_device(address) as device:
        _maps(device, ctypes.CDLL(library))
        _reads(device)


def _maps(device: vfio.Device, library: ctypes.CDLL, rounds: int = 400) -> None:
    iommu = device.iommu
    assert isinstance(iommu, vfio.SpaprTceV2)
    window, page = iommu.windows[0], iommu.backend.page_size
    library.map_loop.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_long]
    with vfio.DmaBuffer(page) as buffer, iommu.register(buffer), window.mapper(buffer, slots=1, length=page) as mapper:
        fd, iova = device.group.container.fd if device.group.container else -1, mapper.iovas[0]

        def c_loop() -> None:
            number = library.map_loop(fd, buffer.address, iova, page, rounds)
            if number:
                raise OSError(number, os.strerror(number))

        def prepared() -> None:
            for _ in range(rounds):
                mapper.map(0, 0)
                mapper.unmap(0)

        def window_map() -> None:
            for _ in range(rounds):
                window.map(buffer).close()

        _compare(
            f"map+unmap of one host page ({page >> 10} KiB), a pair",
            rounds,
            {"C loop": c_loop, "prepared mapper": prepared, "DmaWindow.map": window_map},
        )


def _reads(device: vfio.Device, rounds: int = 4000) -> None:
    region = device.region(vfio.BAR0)
    raw = device.backend.mmap(device.fd, region.size, region.file_offset, 1)
    bare, view, read32 = raw.view(4), region.view(4), region.read32
    assert bare is not None

    def bare_memoryview() -> None:
        for _ in range(rounds):
            bare[1]

    def cast_view() -> None:
        for _ in range(rounds):
            view[1]

    def region_read() -> None:
        for _ in range(rounds):
            read32(4)

    loops = {"bare memoryview": bare_memoryview, "Region.view(4)": cast_view, "Region.read32": region_read}
    _compare("32-bit register read", rounds, loops)
    raw.close()


def _compare(title: str, rounds: int, loops: dict[str, Callable[[], None]]) -> None:
    """Run the loops in turn, and print the median time of one round of each beside the first."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(_TURNS):
        for name, loop in loops.items():
            begin = time.perf_counter()
            loop()
            times[name].append((time.perf_counter() - begin) / rounds)
    first = next(iter(times))
    print(f"{title} (median of {_TURNS} turns of {rounds})")
    for name, each in times.items():
        ratio = statistics.median(a / b for a, b in zip(each, times[first], strict=True))
        print(f"  {name:18} {statistics.median(each) * 1e6:9.2f} us   x {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
