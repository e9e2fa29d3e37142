"""A backend around another one that tells every call.

As text, one line a call in C terms::

    ioctl(container1, VFIO_IOMMU_MAP_DMA, {argsz=32, flags=READ|WRITE, vaddr=memory1+0x0, iova=0x1000, size=0x1000}) = 0 <21 us>

As JSON lines, one object a call, which holds enough to make the same calls anywhere: descriptors are symbols
(``container1``, ``group0_1``), addresses are a symbol of memory and an offset, and what else a call depends on is told
with it.  See `JsonTrace`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from vfio import uapi
from vfio.backend import Backend, FileStatus, LockedMemory, Mapping, Memory
from vfio.backends.call import Argument, Call, Descriptor, Place, RequestNumber, Sink, number_at
from vfio.backends.call_json import JsonTrace
from vfio.backends.call_text import TextTrace
from vfio.backends.surroundings import EVENTFD, Run, Surroundings

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["JsonTrace", "TextTrace", "TraceBackend"]

T = TypeVar("T")

_CONTAINER = "/dev/vfio/vfio"
_SPAPR = (uapi.VFIO_SPAPR_TCE_IOMMU, uapi.VFIO_SPAPR_TCE_v2_IOMMU)
_ADDRESSES = ("vaddr",)
"""Fields that hold an address of this process."""
BITMAP_SIZE, BITMAP_DATA = 32, 40
"""Where a struct that asks Type1 for dirty pages has the size and the address of their bitmap."""
_WITH_BITMAP = {
    uapi.vfio_iommu_type1_dma_unmap: uapi.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP,
    uapi.vfio_iommu_type1_dirty_bitmap: uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP,
}
"""Those structs, and the flag by which they ask."""
_POINTED_AT = 64
"""Bytes that are kept of what an address points to: no struct of an ioctl is longer."""


class TracedMemory(Memory):
    """Memory whose end is told."""

    def __init__(self, trace: TraceBackend, inner: Memory, symbol: str) -> None:
        self.address, self.length, self.page_size = inner.address, inner.length, inner.page_size
        self._trace, self._inner, self.symbol = trace, inner, symbol

    @property
    def view(self) -> memoryview:
        return self._inner.view

    def close(self) -> None:
        self._trace.freed(self)
        self._trace.tell("free", (self.symbol,), self._inner.close)


class TracedMapping(Mapping):
    """Device memory of which each access is told; it has no views, so that none goes unseen."""

    def __init__(self, trace: TraceBackend, inner: Mapping, symbol: str) -> None:
        self.length = inner.length
        self._trace, self._inner, self._symbol = trace, inner, symbol

    def load(self, offset: int, width: int) -> int:
        return self._trace.tell("load", (self._symbol, offset, width), lambda: self._inner.load(offset, width))

    def store(self, offset: int, width: int, value: int) -> None:
        self._trace.tell("store", (self._symbol, offset, width, value), lambda: self._inner.store(offset, width, value))

    def close(self) -> None:
        self._trace.tell("munmap", (self._symbol,), self._inner.close)


class TraceBackend(Backend):
    """Makes the calls of `inner`, and writes each to `sink`.

    With `surroundings`, those of the process that makes the calls, each call is told with what it depends on, so that
    it can be made again elsewhere.  `origin` is the trace of the process that started the one that makes these calls:
    symbols are unique among both.
    """

    def __init__(
        self,
        inner: Backend,
        sink: Sink,
        surroundings: Surroundings | None = None,
        origin: TraceBackend | None = None,
    ) -> None:
        self.inner = inner
        self.url = f"trace:{inner.url}"
        self.page_size = inner.page_size
        self.sink = sink
        self._surroundings = surroundings
        self._shared: _Shared = origin._shared if origin else _Shared()
        self.process = self._count("process") if origin else None
        self._descriptors: dict[int, Descriptor] = {}
        # A child has its parent's memory where the parent has it.
        self._memory: list[TracedMemory] = origin._memory.copy() if origin else []

    def unwrapped(self) -> Backend:
        return self.inner.unwrapped()

    def tell(
        self,
        name: str,
        arguments: tuple[object, ...],
        make: Callable[[], T],
        layout: tuple[Run, ...] = (),
        pointed_at: bytes = b"",
    ) -> T:
        """Make a call, and write it with its outcome."""
        call = Call(name, arguments, process=self.process, layout=layout, pointed_at=pointed_at)
        self._look_outside(call)
        before = self._counters()
        shared = self._shared
        with shared.lock:
            call.overlaps = shared.under_way > 0
            shared.under_way += 1
            shared.made += 1
            made = shared.made
        begin = time.perf_counter_ns()
        call.begin = begin - shared.begin
        try:
            result = make()
        except OSError as error:
            call.error = error
            raise
        else:
            call.result = self._name_result(name, arguments, result)
            if isinstance(result, Memory):
                call.address = result.address
            return result
        finally:
            call.nanoseconds = time.perf_counter_ns() - begin
            after = self._counters()
            call.signals = {each: after[each] - old for each, old in before.items() if each in after}
            with shared.lock:
                shared.under_way -= 1
                call.overlaps |= shared.under_way > 0 or shared.made > made
                self.sink.write(call)

    # --- files and devices ---

    def open(self, path: str, flags: int) -> int:
        return self.tell("open", (path, flags), lambda: self.inner.open(path, flags))

    def close(self, fd: int) -> None:
        named = self.named(fd)
        self._descriptors.pop(fd, None)
        self.tell("close", (named,), lambda: self.inner.close(fd))

    def dup(self, fd: int) -> int:
        return self.tell("dup", (self.named(fd),), lambda: self.inner.dup(fd))

    def ioctl(self, fd: int, request: int, arg: int | WriteableBuffer = 0) -> int:
        named = self.named(fd)
        number = RequestNumber(request, uapi.request_names(request, file=named.kind or None, iommu=named.iommu))
        if isinstance(arg, int):
            place = self._place(arg, _POINTED_AT)
            layout, data = self._layout(arg, _POINTED_AT, place), b""
            if place and self._surroundings:
                data = self._surroundings.read(arg, _POINTED_AT)
            return self.tell(
                "ioctl", (named, number, place or arg), lambda: self.inner.ioctl(fd, request, arg), layout, data
            )
        view = memoryview(arg).cast("B")
        argument = self._argument(number, bytes(view))

        def make() -> int:
            try:
                return self.inner.ioctl(fd, request, arg)
            finally:
                argument.after = bytes(view)

        return self.tell("ioctl", (named, number, argument), make, self._layout_of(argument))

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        return self.tell("pread", (self.named(fd), length, hex(offset)), lambda: self.inner.pread(fd, length, offset))

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        return self.tell("pwrite", (self.named(fd), data, hex(offset)), lambda: self.inner.pwrite(fd, data, offset))

    def mmap(self, fd: int, length: int, offset: int, prot: int) -> Mapping:
        arguments = (self.named(fd), length, hex(offset), prot)
        inner = self.tell("mmap", arguments, lambda: self.inner.mmap(fd, length, offset, prot))
        return TracedMapping(self, inner, self._last("mapping"))

    def allocate(self, length: int, page_size: int | None = None) -> Memory:
        inner = self.tell("allocate", (length, page_size), lambda: self.inner.allocate(length, page_size))
        memory = TracedMemory(self, inner, self._last("memory"))
        self._memory.insert(0, memory)  # before older memory, which may have been given back and was there
        return memory

    def freed(self, memory: TracedMemory) -> None:
        """Memory is given back: its symbol goes on standing for its addresses, unless there is newer memory there."""
        if memory in self._memory:
            self._memory.remove(memory)
            self._memory.append(memory)

    def populate(self, address: int, length: int) -> None:
        place = self._place(address, length)
        layout = self._layout(address, length, place)
        self.tell("populate", (place or hex(address), length), lambda: self.inner.populate(address, length), layout)

    # --- sysfs and procfs ---

    def read_text(self, path: str) -> str:
        return self.tell("read_text", (path,), lambda: self.inner.read_text(path))

    def write_text(self, path: str, text: str) -> None:
        self.tell("write_text", (path, text), lambda: self.inner.write_text(path, text))

    def readlink(self, path: str) -> str:
        return self.tell("readlink", (path,), lambda: self.inner.readlink(path))

    def listdir(self, path: str) -> list[str]:
        return self.tell("listdir", (path,), lambda: self.inner.listdir(path))

    def exists(self, path: str) -> bool:
        return self.tell("exists", (path,), lambda: self.inner.exists(path))

    def stat(self, path: str) -> FileStatus:
        return self.tell("stat", (path,), lambda: self.inner.stat(path))

    def chown(self, path: str, uid: int, gid: int) -> None:
        self.tell("chown", (path, uid, gid), lambda: self.inner.chown(path, uid, gid))

    def chmod(self, path: str, mode: int) -> None:
        self.tell("chmod", (path, oct(mode)), lambda: self.inner.chmod(path, mode))

    def locked(self) -> LockedMemory:
        return self.tell("locked", (), self.inner.locked)

    # --- names that last ---

    def _count(self, kind: str) -> str:
        counts = self._shared.counts
        counts[kind] = counts.get(kind, 0) + 1
        return f"{kind}{counts[kind]}"

    def _last(self, kind: str) -> str:
        """The newest symbol of that kind."""
        return f"{kind}{self._shared.counts[kind]}"

    def named(self, fd: int) -> Descriptor:
        """The lasting name of a descriptor."""
        found = self._descriptors.get(fd)
        if found is None or found.outside is not None:
            identity = self._surroundings.identity(fd) if self._surroundings else None
            if found is None or found.outside != identity:
                found = self._descriptors[fd] = Descriptor(self._count("fd"), "", outside=identity)
        return found

    def _look_outside(self, call: Call) -> None:
        """Note what the descriptors of a call are that came from outside."""
        for argument in call.arguments:
            named: list[Descriptor] = []
            if isinstance(argument, Descriptor):
                named = [argument]
            elif isinstance(argument, Argument):
                symbols = set(argument.descriptors.values())
                named = [each for each in self._descriptors.values() if each.symbol in symbols]
            call.outside |= {each.symbol: each.outside.kind for each in named if each.outside}

    def _counters(self) -> dict[str, int]:
        """The counters of the eventfds that are known, by symbol."""
        if self._surroundings is None:
            return {}
        return {
            each.symbol: self._surroundings.count(fd)
            for fd, each in list(self._descriptors.items())
            if each.outside and each.outside.kind == EVENTFD and self._surroundings.identity(fd) == each.outside
        }

    def _name_result(self, name: str, arguments: tuple[object, ...], result: object) -> object:
        """What to call the result; new descriptors, mappings and memory get their symbols here."""
        if name == "open" and isinstance(result, int):
            path = str(arguments[0])
            if path == _CONTAINER:
                self._descriptors[result] = Descriptor(self._count("container"), "container")
            elif path.startswith("/dev/vfio/"):
                self._descriptors[result] = Descriptor(self._count(f"group{path.rpartition('/')[2]}_"), "group")
            else:
                self._descriptors[result] = Descriptor(self._count("fd"), "")
            return self._descriptors[result]
        if name in ("dup", "receive") and isinstance(result, int) and isinstance(arguments[0], Descriptor):
            origin = arguments[0]
            self._descriptors[result] = Descriptor(
                self._count(f"{name}_of_{origin.symbol}_"), origin.kind, origin.iommu
            )
            return self._descriptors[result]
        if name == "mmap":
            return self._count("mapping")
        if name == "allocate":
            return self._count("memory")
        if name == "ioctl" and isinstance(result, int):
            return self._name_ioctl(arguments, result)
        return result

    def _name_ioctl(self, arguments: tuple[object, ...], result: int) -> object:
        named, number, argument = arguments
        assert isinstance(named, Descriptor)
        assert isinstance(number, RequestNumber)
        if "VFIO_GROUP_GET_DEVICE_FD" in number.names:
            self._descriptors[result] = Descriptor(self._count("device"), "device")
            return self._descriptors[result]
        if "VFIO_SET_IOMMU" in number.names and isinstance(argument, int):
            model = "spapr" if argument in _SPAPR else "type1"
            for fd, known in self._descriptors.items():
                if known.symbol == named.symbol:
                    self._descriptors[fd] = Descriptor(known.symbol, known.kind, model)
        return result

    def _place(self, address: int, length: int = 1) -> Place | None:
        for memory in self._memory:
            if memory.address <= address < memory.address + memory.length:
                return Place(memory.symbol, address - memory.address)
        if self._surroundings is None:
            return None
        counts = self._shared.counts
        found = self._surroundings.area(address, length, f"area{counts.get('area', 0) + 1}")
        if found and found[0] == f"area{counts.get('area', 0) + 1}":
            self._count("area")
        return Place(*found) if found else None

    def _layout(self, address: int, length: int, place: Place | None) -> tuple[Run, ...]:
        return tuple(self._surroundings.layout(address, length)) if place and self._surroundings else ()

    def _layout_of(self, argument: Argument) -> tuple[Run, ...]:
        """What the range is that a struct names by its vaddr and size, or as its bitmap."""
        if argument.struct is None or not argument.places:
            return ()
        sizes = [each.offset for each in uapi.fields(argument.struct) if each.name == "size"]
        ((at, place),) = argument.places.items()
        if at == BITMAP_DATA:
            sizes = [BITMAP_SIZE]
        length = number_at(argument.before, sizes[0], 8) if sizes else 0
        return self._layout(number_at(argument.before, at, 8), length, place)

    def _argument(self, number: RequestNumber, data: bytes) -> Argument:
        info = uapi.request_info(number.names[0]) if number.names else None
        argument = Argument(info.argument if info else None, data)
        if info and info.name == "VFIO_GROUP_SET_CONTAINER":
            argument.descriptors[0] = str(self.named(number_at(data, 0, 4)))
        if argument.struct is None or len(data) < uapi.sizeof(argument.struct):
            return argument
        fields = {each.name: each for each in uapi.fields(argument.struct)}
        for each in fields.values():
            if each.name in _ADDRESSES:
                length = number_at(data, fields["size"].offset, 8) if "size" in fields else 1
                if place := self._place(number_at(data, each.offset, each.size), length):
                    argument.places[each.offset] = place
            elif each.name == "fd":
                self._descriptor_at(argument, each.offset)
        asks = _WITH_BITMAP.get(argument.struct, 0) & number_at(data, 4, 4)
        if asks and len(data) >= BITMAP_DATA + 8:
            place = self._place(number_at(data, BITMAP_DATA, 8), number_at(data, BITMAP_SIZE, 8))
            if place:
                argument.places[BITMAP_DATA] = place
        if argument.struct is uapi.vfio_irq_set and number_at(data, 4, 4) & uapi.VFIO_IRQ_SET_DATA_EVENTFD:
            self._descriptors_from(argument, uapi.offsetof(uapi.vfio_irq_set, "data"))
        elif argument.struct is uapi.vfio_pci_hot_reset:
            self._descriptors_from(argument, uapi.offsetof(uapi.vfio_pci_hot_reset, "group_fds"))
        return argument

    def _descriptors_from(self, argument: Argument, start: int) -> None:
        for offset in range(start, len(argument.before) - 3, 4):
            self._descriptor_at(argument, offset)

    def _descriptor_at(self, argument: Argument, offset: int) -> None:
        fd = number_at(argument.before, offset, 4)
        if fd < 1 << 31:  # -1 stands for none
            argument.descriptors[offset] = str(self.named(fd))


@dataclass
class _Shared:
    """What the backends of several processes have in common."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: dict[str, int] = field(default_factory=dict)
    under_way: int = 0
    made: int = 0
    begin: int = field(default_factory=time.perf_counter_ns)
