"""A kernel with VFIO, the sPAPR driver and a device of one register, for tests of these alone: no sysfs, no PCI."""

from __future__ import annotations

import ctypes
import errno
import mmap
import threading
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, TypeVar

from vfio import topology, uapi
from vfio.backend import Mapping
from vfio.fake.bus_driver import VfioDeviceOps
from vfio.fake.clock import Clock
from vfio.fake.core import VfioCore
from vfio.fake.eeh_host import EehHost
from vfio.fake.file import File
from vfio.fake.kernel_log import KernelLog
from vfio.fake.pe import make_pe
from vfio.fake.process import Process
from vfio.fake.user import Argument

T = TypeVar("T")

PAGE = 4096


class Buffer:
    """Memory of this process, aligned to `align` bytes."""

    def __init__(self, size: int, align: int = 0x10000) -> None:
        self.mmap = mmap.mmap(-1, size + align)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.mmap))
        self.address = -(-start // align) * align
        self.offset = self.address - start
        self.size = size

    def protect(self, offset: int, size: int, prot: int) -> None:
        """mprotect(2) of a part."""
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(self.address + offset), ctypes.c_size_t(size), prot) == 0

    def __setitem__(self, at: slice, data: bytes) -> None:
        self.mmap[self.offset + at.start : self.offset + at.stop] = data

    def __getitem__(self, at: slice) -> bytes:
        return self.mmap[self.offset + at.start : self.offset + at.stop]


def answer(call: Callable[..., T], *args: Any) -> T | str:
    """What a call returns, or the name of its errno."""
    try:
        return call(*args)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


class Bar(Mapping):
    """One register that remembers."""

    length = 4096

    def __init__(self) -> None:
        self.value = 0

    def load(self, offset: int, width: int) -> int:
        return self.value

    def store(self, offset: int, width: int, value: int) -> None:
        self.value = value

    def close(self) -> None:
        pass


class Ops(VfioDeviceOps):
    """Writes down what the core asks for."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.refuse: int = 0
        """Errno that opening fails with."""
        self.asked: Callable[[], object] = list
        """Called when the device is wanted back."""

    def open(self, data: Any, process: Process) -> None:
        if self.refuse:
            raise OSError(self.refuse, "refused")
        self.calls.append("open")

    def release(self, data: Any) -> None:
        self.calls.append("release")

    def mmap(self, data: Any, process: Process, length: int, offset: int, prot: int) -> Mapping:
        return Bar()

    def request(self, data: Any, count: int) -> None:
        self.calls.append(f"request {count}")
        self.asked()


class Pci:
    """As much of a PCI function as the core and a PE look at."""

    def __init__(self, host: Host, address: str, driver: str | None) -> None:
        self.machine, self.address, self.driver = host, address, driver
        self.group: Any = None
        self.eeh: Any = None
        self.parent, self.is_bridge, self.vendor, self.device = None, False, 0, 0
        self.bus = int(address.split(":")[1], 16)
        self.bars: dict[int, Any] = {}
        self.events: list[str] = []

    def check_line(self) -> None:
        pass

    def eeh_reset(self) -> None:
        self.events.append("reset")

    def eeh_restore(self) -> None:
        self.events.append("restore")


class Host:
    """A machine: the groups of a topology, all on vfio-pci unless `drivers` says otherwise."""

    def __init__(
        self,
        name: str = "power8",
        *,
        page_size: int = PAGE,
        kernel: tuple[int, int] = (6, 12),
        strict: bool = True,
        drivers: dict[str, str | None] | None = None,
    ) -> None:
        self.topology = topology.load(name)
        self.page_size, self.kernel, self.strict = page_size, kernel, strict
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.clock = Clock()
        self.log, self.freezes = KernelLog(self.clock), True
        self.eeh = EehHost(self)  # type: ignore[arg-type]
        self.processes: list[Process] = []
        self.iommu_groups: dict[int, Any] = {}
        self.pes: list[Any] = []
        known = {name: SimpleNamespace(host_dma=name not in ("vfio-pci", "pci-stub")) for name in self._names(drivers)}
        self.driver_core = SimpleNamespace(caller=None, drivers=known, on_host_driver=self._on_host_driver)
        self.vfio = VfioCore(self)  # type: ignore[arg-type]
        self.devices: dict[str, Pci] = {}
        self.ops: dict[str, Ops] = {}
        for phb in self.topology.phbs:
            for device in phb.devices:
                if device.group is None:
                    continue
                pe = next((pe for pe in self.pes if pe.group.number == device.group), None)
                pe = pe or make_pe(self, phb, device.pe, device.group)  # type: ignore[arg-type]
                pci = Pci(self, device.address, (drivers or {}).get(device.address, "vfio-pci"))
                pci.group = pe.group
                self.eeh.join(pci, pe.eeh)  # type: ignore[arg-type]
                pe.group.devices.append(pci)  # type: ignore[arg-type]
                self.devices[device.address] = pci
        for pci in self.devices.values():
            if pci.driver == "vfio-pci":
                self.bind(pci.address)
        self.process = self.new_process()

    def bind(self, address: str) -> None:
        self.ops[address] = Ops()
        self.vfio.register_device(self.devices[address], self.ops[address], address)  # type: ignore[arg-type]

    def new_process(self, **rights: Any) -> Process:
        return Process(self, **rights)  # type: ignore[arg-type]

    def process_gone(self, process: Process) -> None:
        self.vfio.process_gone(process)

    def pe(self, group: int) -> Any:
        return next(pe for pe in self.pes if pe.group.number == group)

    @staticmethod
    def _names(drivers: dict[str, str | None] | None) -> set[str]:
        return {"vfio-pci", "pci-stub", "nvme", *(name for name in (drivers or {}).values() if name)}

    def _on_host_driver(self, address: str) -> bool:
        driver = self.devices[address].driver
        return driver is not None and bool(self.driver_core.drivers[driver].host_dma)


class User:
    """A process's calls, by name; what fails answers with the name of its errno."""

    def __init__(self, host: Host, process: Process | None = None) -> None:
        self.host = host
        self.process = process or host.process
        self.container = host.vfio.open_container(self.process)

    def call(self, file: File, request: int | None, arg: Any = 0) -> int | str:
        n = None if request is None else request - uapi.VFIO_GET_API_VERSION
        if isinstance(arg, uapi.Struct):
            arg = uapi.buffer(arg)
        return answer(file.ioctl, self.process, n, Argument(self.process, arg))

    def open_group(self, number: int) -> File:
        return self.host.vfio.open_group(self.process, number)

    def set_container(self, group: File, container: File | None = None) -> int | str:
        target = container or self.container
        target.get()
        fd = self.process.install(target)
        result = self.call(group, uapi.VFIO_GROUP_SET_CONTAINER, bytearray(fd.to_bytes(4, "little")))
        self.process.close(fd)
        return result

    def unset_container(self, group: File) -> int | str:
        return self.call(group, uapi.VFIO_GROUP_UNSET_CONTAINER)

    def status(self, group: File) -> int | str:
        status = uapi.vfio_group_status()
        result = self.call(group, uapi.VFIO_GROUP_GET_STATUS, status)
        return result if isinstance(result, str) else status.flags

    def set_iommu(self, kind: int) -> int | str:
        return self.call(self.container, uapi.VFIO_SET_IOMMU, kind)

    def device_fd(self, group: File, name: str) -> int | str:
        return self.call(group, uapi.VFIO_GROUP_GET_DEVICE_FD, bytearray(name.encode() + b"\0"))

    def attach(self, *groups: int, version: int = 2) -> list[File]:
        """Groups in the container, and the IOMMU set."""
        files = [self.open_group(number) for number in groups]
        for file in files:
            assert self.set_container(file) == 0
        kind = uapi.VFIO_SPAPR_TCE_v2_IOMMU if version == 2 else uapi.VFIO_SPAPR_TCE_IOMMU
        assert self.set_iommu(kind) == 0
        return files

    def register(self, address: int, size: int, flags: int = 0) -> int | str:
        arg = uapi.vfio_iommu_spapr_register_memory(flags=flags, vaddr=address, size=size)
        return self.call(self.container, uapi.VFIO_IOMMU_SPAPR_REGISTER_MEMORY, arg)

    def unregister(self, address: int, size: int, flags: int = 0) -> int | str:
        arg = uapi.vfio_iommu_spapr_register_memory(flags=flags, vaddr=address, size=size)
        return self.call(self.container, uapi.VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY, arg)

    def map(self, address: int, iova: int, size: int, flags: int = 3) -> int | str:
        arg = uapi.vfio_iommu_type1_dma_map(flags=flags, vaddr=address, iova=iova, size=size)
        return self.call(self.container, uapi.VFIO_IOMMU_MAP_DMA, arg)

    def unmap(self, iova: int, size: int, flags: int = 0) -> int | str:
        arg = uapi.vfio_iommu_type1_dma_unmap(flags=flags, iova=iova, size=size)
        return self.call(self.container, uapi.VFIO_IOMMU_UNMAP_DMA, arg)

    def create(self, page_shift: int, size: int, levels: int = 1) -> tuple[int | str, int]:
        """The answer, and the window's start."""
        arg = uapi.vfio_iommu_spapr_tce_create(page_shift=page_shift, window_size=size, levels=levels)
        return self.call(self.container, uapi.VFIO_IOMMU_SPAPR_TCE_CREATE, arg), arg.start_addr

    def remove(self, start: int, flags: int = 0) -> int | str:
        arg = uapi.vfio_iommu_spapr_tce_remove(flags=flags, start_addr=start)
        return self.call(self.container, uapi.VFIO_IOMMU_SPAPR_TCE_REMOVE, arg)

    def info(self, argsz: int = 32) -> tuple[int | str, Any]:
        info = uapi.vfio_iommu_spapr_tce_info(argsz=argsz)
        return self.call(self.container, uapi.VFIO_IOMMU_SPAPR_TCE_GET_INFO, info), info

    def eeh(self, op: int, **fields: Any) -> int | str:
        return self.call(self.container, uapi.VFIO_EEH_PE_OP, uapi.vfio_eeh_pe_op(op=op, **fields))

    @property
    def locked(self) -> int:
        """kB of locked memory."""
        return self.process.locked_pages * self.host.page_size >> 10

    def close_all(self, *files: File) -> None:
        for file in files:
            with suppress(OSError):
                file.put()
