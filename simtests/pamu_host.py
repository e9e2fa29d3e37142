"""A modelled P4080 with a device on vfio-pci, and the PAMU's requests as the kernel interface has them."""

from __future__ import annotations

import errno
from collections.abc import Callable

import vfio
from vfio import uapi
from vfio.fake.backend import FakeBackend
from vfio.iommu import pamu_abi as abi

ADDRESS, OTHER = "0000:01:00.0", "0001:01:00.0"
MIB = 1 << 20
RW = uapi.VFIO_DMA_MAP_FLAG_READ | uapi.VFIO_DMA_MAP_FLAG_WRITE


def p4080(options: str = "", *addresses: str) -> FakeBackend:
    """The machine, with devices on vfio-pci."""
    backend = vfio.open_backend(f"fake:p4080{options}")
    assert isinstance(backend, FakeBackend)
    for address in addresses or (ADDRESS,):
        backend.write_text(f"/sys/bus/pci/devices/{address}/driver_override", "vfio-pci")
        backend.write_text("/sys/bus/pci/drivers_probe", address)
    return backend


def answer(call: Callable[[], int]) -> int | str:
    """What a call returns, or the name of its errno."""
    try:
        return call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


class Calls:
    """The calls of a process that has a container with a PAMU, made without the library."""

    def __init__(self, backend: FakeBackend, container: vfio.Container) -> None:
        self.backend, self.fd = backend, container.fd

    def _call(self, request: int, argument: bytes | bytearray | memoryview) -> int | str:
        return answer(lambda: self.backend.ioctl(self.fd, request, argument))  # type: ignore[arg-type]

    def set(self, kind: int, body: bytes = b"", flags: int = 0) -> int | str:
        argument = abi.attribute(kind, body)
        argument[4:8] = flags.to_bytes(4, "little")
        return self._call(abi.VFIO_IOMMU_PAMU_SET_ATTR, argument)

    def get(self, kind: int) -> bytes:
        argument = abi.attribute(kind)
        assert self._call(abi.VFIO_IOMMU_PAMU_GET_ATTR, argument) == 0
        return bytes(argument[abi.HEADER.size :])

    def try_get(self, kind: int) -> int | str:
        return self._call(abi.VFIO_IOMMU_PAMU_GET_ATTR, abi.attribute(kind))

    def geometry(self, first: int, last: int) -> int | str:
        return self.set(abi.ATTR_GEOMETRY, abi.GEOMETRY.pack(first, last))

    def windows(self, count: int) -> int | str:
        return self.set(abi.ATTR_WINDOWS, abi.WINDOWS.pack(count))

    def stash(self, cpu: int, cache: int) -> int | str:
        return self.set(abi.ATTR_STASH, abi.STASH.pack(cpu, cache))

    def map(self, iova: int, vaddr: int, size: int, flags: int = RW) -> int | str:
        param = uapi.vfio_iommu_type1_dma_map(flags=flags, vaddr=vaddr, iova=iova, size=size)
        return self._call(uapi.VFIO_IOMMU_MAP_DMA, uapi.buffer(param))

    def unmap(self, iova: int, size: int, flags: int = 0) -> int | str:
        param = uapi.vfio_iommu_type1_dma_unmap(flags=flags, iova=iova, size=size)
        return self._call(uapi.VFIO_IOMMU_UNMAP_DMA, uapi.buffer(param))

    def map_bank(self, index: int, iova: int, flags: int = RW) -> int | str:
        argument = bytearray(abi.MSI_BANK_MAP.pack(abi.MSI_BANK_MAP.size, flags, index, iova))
        return self._call(abi.VFIO_IOMMU_PAMU_MAP_MSI_BANK, argument)

    def unmap_bank(self, iova: int, flags: int = 0) -> int | str:
        argument = bytearray(abi.MSI_BANK_UNMAP.pack(abi.MSI_BANK_UNMAP.size, flags, iova))
        return self._call(abi.VFIO_IOMMU_PAMU_UNMAP_MSI_BANK, argument)

    def short(self, request: int) -> int | str:
        """The request with an argsz that is too small."""
        return self._call(request, bytearray((8).to_bytes(4, "little") + bytes(28)))
