"""The trace backend, around one that answers from a script."""

import errno
import io
import json
import os
import struct

import pytest

from vfio import uapi
from vfio.backend import Backend, Memory
from vfio.backends.kernel import KernelBackend
from vfio.backends.trace import JsonTrace, TextTrace, TraceBackend


class Scripted(KernelBackend):
    """The kernel for memory, and answers by request for everything else."""

    url = "scripted:"

    def __init__(self, answers):
        self.answers = answers

    def open(self, path, flags):
        return 100 if path == "/dev/vfio/vfio" else 101

    def close(self, fd):
        pass

    def ioctl(self, fd, request, arg=0):
        answer = self.answers[request]
        if isinstance(answer, OSError):
            raise answer
        return answer(arg) if callable(answer) else answer

    def pread(self, fd, length, offset):
        return bytes(range(length))


def create(argument):
    window = uapi.from_buffer(uapi.vfio_iommu_spapr_tce_create, argument)
    window.start_addr = 1 << 59
    return 0


ANSWERS = {
    uapi.VFIO_SET_IOMMU: 0,
    uapi.VFIO_GROUP_GET_DEVICE_FD: 102,
    uapi.VFIO_GROUP_SET_CONTAINER: 0,
    uapi.VFIO_IOMMU_MAP_DMA: OSError(errno.ENXIO, os.strerror(errno.ENXIO)),
    uapi.VFIO_IOMMU_SPAPR_TCE_CREATE: create,
    uapi.VFIO_DEVICE_SET_IRQS: 0,
    uapi.VFIO_IOMMU_DIRTY_PAGES: 0,
    uapi.VFIO_IOMMU_UNMAP_DMA: 0,
}


def run(sink: type, script) -> list[str]:
    text = io.StringIO()
    script(TraceBackend(Scripted(ANSWERS), sink(text)))
    return text.getvalue().splitlines()


def drive(backend: Backend) -> Memory:
    container = backend.open("/dev/vfio/vfio", os.O_RDWR)
    group = backend.open("/dev/vfio/26", os.O_RDWR)
    backend.ioctl(group, uapi.VFIO_GROUP_SET_CONTAINER, bytearray(container.to_bytes(4, "little")))
    backend.ioctl(container, uapi.VFIO_SET_IOMMU, uapi.VFIO_SPAPR_TCE_v2_IOMMU)
    device = backend.ioctl(group, uapi.VFIO_GROUP_GET_DEVICE_FD, bytearray(b"0000:06:0d.0\0"))
    memory = backend.allocate(backend.page_size)
    window = uapi.vfio_iommu_spapr_tce_create(page_shift=16, window_size=1 << 30, levels=1)
    backend.ioctl(container, uapi.VFIO_IOMMU_SPAPR_TCE_CREATE, uapi.buffer(window))
    map_arg = uapi.vfio_iommu_type1_dma_map(flags=3, vaddr=memory.address + 16, iova=1 << 31, size=4096)
    with pytest.raises(OSError, match="No such device or address"):
        backend.ioctl(container, uapi.VFIO_IOMMU_MAP_DMA, uapi.buffer(map_arg))
    irqs = uapi.vfio_irq_set.sized(28, flags=0x24, index=1, count=2, data=bytes([7, 0, 0, 0]) + b"\xff" * 4)
    backend.ioctl(device, uapi.VFIO_DEVICE_SET_IRQS, uapi.buffer(irqs))
    backend.pread(device, 4, 7 << 40)
    backend.close(device)
    return memory


def test_text_has_a_line_a_call_in_c_terms():
    lines = [line.rpartition(" <")[0] for line in run(TextTrace, drive)]
    assert lines == [
        'open("/dev/vfio/vfio", 2) = container1',
        'open("/dev/vfio/26", 2) = group26_1',
        "ioctl(group26_1, VFIO_GROUP_SET_CONTAINER, &container1) = 0",
        "ioctl(container1, VFIO_SET_IOMMU, 7) = 0",
        'ioctl(group26_1, VFIO_GROUP_GET_DEVICE_FD, "0000:06:0d.0") = device1',
        f'allocate({os.sysconf("SC_PAGESIZE")}, None) = "memory1"',
        "ioctl(container1, VFIO_IOMMU_SPAPR_TCE_CREATE, {argsz=40, flags=0, page_shift=16, __resv1=0, window_size=0x40000000, "
        "levels=1, __resv2=0, start_addr=0x0}) = 0 -> {start_addr=0x800000000000000}",
        "ioctl(container1, VFIO_IOMMU_MAP_DMA, {argsz=32, flags=READ|WRITE, vaddr=memory1+0x10, iova=0x80000000, size=0x1000}) "
        "= -1 ENXIO (No such device or address)",
        "ioctl(device1, VFIO_DEVICE_SET_IRQS, {argsz=28, flags=DATA_EVENTFD|ACTION_TRIGGER, index=VFIO_PCI_MSI_IRQ_INDEX, "
        "start=0, count=2, fds=[fd1]}) = 0",
        'pread(device1, 4, "0x70000000000") = 00 01 02 03',
        "close(device1) = None",
    ]


def test_json_holds_symbols_in_place_of_addresses_and_descriptors():
    records = [json.loads(line) for line in run(JsonTrace, drive)]
    by_request = {name: r for r in records if r["call"] == "ioctl" for name in r["args"][1]["request"]}
    mapped = by_request["VFIO_IOMMU_MAP_DMA"]
    assert mapped["args"][0] == {"fd": "container1"}
    assert mapped["args"][2]["places"] == {"8": {"place": "memory1", "offset": 16}}
    assert mapped["errno"] == "ENXIO"
    assert by_request["VFIO_DEVICE_SET_IRQS"]["args"][2]["fds"] == {"20": "fd1"}
    assert by_request["VFIO_GROUP_GET_DEVICE_FD"]["result"] == {"fd": "device1"}
    created = by_request["VFIO_IOMMU_SPAPR_TCE_CREATE"]["args"][2]
    assert created["before"] != created["after"]
    assert bytes.fromhex(created["after"])[32:] == (1 << 59).to_bytes(8, "little")


def test_bitmap_of_dirty_pages_is_a_place_where_it_is_asked_for():
    def ask(backend):
        container, memory = backend.open("/dev/vfio/vfio", os.O_RDWR), backend.allocate(backend.page_size)
        for request, flag in (
            (uapi.VFIO_IOMMU_DIRTY_PAGES, uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP),
            (uapi.VFIO_IOMMU_UNMAP_DMA, uapi.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP),
        ):
            for flags in (flag, 0):
                words = (48, flags, 0x100000, 0x3000, 4096, 8, memory.address + 64)
                backend.ioctl(container, request, bytearray(struct.pack("=2I5Q", *words)))

    records = [json.loads(line) for line in run(JsonTrace, ask) if '"ioctl"' in line]
    place = {"40": {"place": "memory1", "offset": 64}}
    assert [record["args"][2].get("places") for record in records] == [place, None, place, None]


def test_an_answer_passes_through_untouched():
    backend = TraceBackend(Scripted(ANSWERS), TextTrace(io.StringIO()))
    assert backend.open("/dev/vfio/vfio", os.O_RDWR) == 100
    assert backend.unwrapped().url == "scripted:"
    assert backend.page_size == os.sysconf("SC_PAGESIZE")
