"""A backend around another one that tells every call.

As text, one line a call in C terms::

    ioctl(container1, VFIO_IOMMU_MAP_DMA, {argsz=32, flags=READ|WRITE, vaddr=memory1+0x0, iova=0x1000, size=0x1000}) = 0 <21 us>

As JSON lines, one object a call, which holds enough to make the same calls anywhere: descriptors are symbols
(``container1``, ``group0``), and addresses are a symbol of memory and an offset.  See `JsonTrace`.
"""

from __future__ import annotations

import errno
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TextIO, TypeVar

from vfio import uapi
from vfio.backend import Backend, FileStatus, LockedMemory, Mapping, Memory

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

T = TypeVar("T")

_CONTAINER = "/dev/vfio/vfio"
_SPAPR = (uapi.VFIO_SPAPR_TCE_IOMMU, uapi.VFIO_SPAPR_TCE_v2_IOMMU)
_ADDRESSES = ("vaddr",)
"""Fields that hold an address of this process."""


@dataclass(frozen=True)
class Place:
    """An address of this process, as a symbol of memory and an offset in it."""

    symbol: str
    offset: int

    def __str__(self) -> str:
        return f"{self.symbol}+{self.offset:#x}"


@dataclass
class Argument:
    """The buffer of an ioctl: its bytes before and after, and what in them is not the same on another machine."""

    struct: type[uapi.Struct] | None
    before: bytes
    after: bytes = b""
    places: dict[int, Place] = field(default_factory=dict)
    """By offset in the buffer: 8-byte addresses."""
    descriptors: dict[int, str] = field(default_factory=dict)
    """By offset in the buffer: 4-byte file descriptors."""


@dataclass
class Call:
    """One call: its name, its arguments, what came of it."""

    name: str
    arguments: tuple[object, ...]
    result: object = None
    error: OSError | None = None
    nanoseconds: int = 0


@dataclass(frozen=True)
class Descriptor:
    """A file descriptor, by a name that lasts."""

    symbol: str
    kind: str
    iommu: str | None = None

    def __str__(self) -> str:
        return self.symbol


@dataclass(frozen=True)
class RequestNumber:
    """An ioctl number, and the requests it may be."""

    number: int
    names: tuple[str, ...]

    def __str__(self) -> str:
        return "|".join(self.names) or hex(self.number)


class Sink(Protocol):
    """Where calls go."""

    def write(self, call: Call) -> None: ...


class TextTrace:
    """One line a call."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, call: Call) -> None:
        changed = ""
        shown = []
        for argument in call.arguments:
            if isinstance(argument, Argument):
                shown.append(_struct(argument, argument.before))
                if argument.after and argument.after != argument.before:
                    changed = f" -> {_struct(argument, argument.after, only_changed=True)}"
            else:
                shown.append(_shown(argument))
        if call.error is not None:
            number = call.error.errno or 0
            result = f"-1 {errno.errorcode.get(number, number)} ({call.error.strerror})"
        else:
            result = _shown(call.result)
        text = f"{call.name}({', '.join(shown)}) = {result}{changed} <{call.nanoseconds / 1000:.0f} us>"
        print(text, file=self._file, flush=True)


class JsonTrace:
    """One JSON object a line: ``call``, ``args``, then ``result`` or ``errno``, and ``ns``.

    In ``args`` a descriptor is ``{"fd": SYMBOL}``, an address ``{"place": SYMBOL, "offset": N}``, bytes ``{"hex": …}``; a
    request is ``{"request": [NAMES], "number": N}``; the buffer of an ioctl is ``{"before": HEX, "after": HEX}`` with
    ``places`` and ``fds`` by offset, to be put in before it is replayed.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, call: Call) -> None:
        record: dict[str, object] = {"call": call.name, "args": [_plain(argument) for argument in call.arguments]}
        if call.error is not None:
            record["errno"] = errno.errorcode.get(call.error.errno or 0, call.error.errno)
        else:
            record["result"] = _plain(call.result)
        record["ns"] = call.nanoseconds
        print(json.dumps(record), file=self._file, flush=True)


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
    """Makes the calls of `inner`, and writes each to `sink`."""

    def __init__(self, inner: Backend, sink: Sink) -> None:
        self.inner = inner
        self.url = f"trace:{inner.url}"
        self.page_size = inner.page_size
        self._sink = sink
        self._lock = threading.Lock()
        self._descriptors: dict[int, Descriptor] = {}
        self._memory: list[tuple[str, Memory]] = []
        self._counts: dict[str, int] = {}

    def unwrapped(self) -> Backend:
        return self.inner.unwrapped()

    def tell(self, name: str, arguments: tuple[object, ...], make: Callable[[], T]) -> T:
        """Make a call, and write it with its outcome."""
        call = Call(name, arguments)
        begin = time.perf_counter_ns()
        try:
            result = make()
        except OSError as error:
            call.error = error
            raise
        else:
            call.result = self._name_result(name, arguments, result)
            return result
        finally:
            call.nanoseconds = time.perf_counter_ns() - begin
            with self._lock:
                self._sink.write(call)

    # --- files and devices ---

    def open(self, path: str, flags: int) -> int:
        return self.tell("open", (path, flags), lambda: self.inner.open(path, flags))

    def close(self, fd: int) -> None:
        named = self._named(fd)
        self._descriptors.pop(fd, None)
        self.tell("close", (named,), lambda: self.inner.close(fd))

    def dup(self, fd: int) -> int:
        return self.tell("dup", (self._named(fd),), lambda: self.inner.dup(fd))

    def ioctl(self, fd: int, request: int, arg: int | WriteableBuffer = 0) -> int:
        named = self._named(fd)
        number = RequestNumber(request, uapi.request_names(request, file=named.kind or None, iommu=named.iommu))
        if isinstance(arg, int):
            place = self._place(arg)
            return self.tell("ioctl", (named, number, place or arg), lambda: self.inner.ioctl(fd, request, arg))
        view = memoryview(arg).cast("B")
        argument = self._argument(number, bytes(view))

        def make() -> int:
            try:
                return self.inner.ioctl(fd, request, arg)
            finally:
                argument.after = bytes(view)

        return self.tell("ioctl", (named, number, argument), make)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        return self.tell("pread", (self._named(fd), length, hex(offset)), lambda: self.inner.pread(fd, length, offset))

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        return self.tell("pwrite", (self._named(fd), data, hex(offset)), lambda: self.inner.pwrite(fd, data, offset))

    def mmap(self, fd: int, length: int, offset: int, prot: int) -> Mapping:
        arguments = (self._named(fd), length, hex(offset), prot)
        inner = self.tell("mmap", arguments, lambda: self.inner.mmap(fd, length, offset, prot))
        return TracedMapping(self, inner, f"mapping{self._counts['mapping']}")

    def allocate(self, length: int, page_size: int | None = None) -> Memory:
        memory = self.tell("allocate", (length, page_size), lambda: self.inner.allocate(length, page_size))
        self._memory.append((f"memory{self._counts['memory']}", memory))
        return memory

    def populate(self, address: int, length: int) -> None:
        place = self._place(address) or hex(address)
        self.tell("populate", (place, length), lambda: self.inner.populate(address, length))

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
        self._counts[kind] = self._counts.get(kind, 0) + 1
        return f"{kind}{self._counts[kind]}"

    def _named(self, fd: int) -> Descriptor:
        found = self._descriptors.get(fd)
        if found is None:
            found = self._descriptors[fd] = Descriptor(self._count("fd"), "")
        return found

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
        if name == "dup" and isinstance(result, int) and isinstance(arguments[0], Descriptor):
            origin = arguments[0]
            self._descriptors[result] = Descriptor(
                self._count("dup_of_" + origin.symbol + "_"), origin.kind, origin.iommu
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
        if "VFIO_GROUP_GET_DEVICE_FD" in number.names and isinstance(argument, Argument):
            self._descriptors[result] = Descriptor(self._count("device"), "device")
            return self._descriptors[result]
        if "VFIO_SET_IOMMU" in number.names and isinstance(argument, int):
            model = "spapr" if argument in _SPAPR else "type1"
            for fd, known in self._descriptors.items():
                if known.symbol == named.symbol:
                    self._descriptors[fd] = Descriptor(known.symbol, known.kind, model)
        return result

    def _place(self, address: int) -> Place | None:
        for symbol, memory in self._memory:
            if memory.address <= address < memory.address + memory.length:
                return Place(symbol, address - memory.address)
        return None

    def _argument(self, number: RequestNumber, data: bytes) -> Argument:
        info = uapi.request_info(number.names[0]) if number.names else None
        argument = Argument(info.argument if info else None, data)
        if info and info.name == "VFIO_GROUP_SET_CONTAINER":
            argument.descriptors[0] = str(self._named(_int(data, 0, 4)))
        if argument.struct is None or len(data) < uapi.sizeof(argument.struct):
            return argument
        for each in uapi.fields(argument.struct):
            if each.name in _ADDRESSES and (place := self._place(_int(data, each.offset, each.size))):
                argument.places[each.offset] = place
            elif each.name == "fd":
                self._descriptor_at(argument, each.offset)
        if argument.struct is uapi.vfio_irq_set and _int(data, 4, 4) & uapi.VFIO_IRQ_SET_DATA_EVENTFD:
            self._descriptors_from(argument, uapi.offsetof(uapi.vfio_irq_set, "data"))
        elif argument.struct is uapi.vfio_pci_hot_reset:
            self._descriptors_from(argument, uapi.offsetof(uapi.vfio_pci_hot_reset, "group_fds"))
        return argument

    def _descriptors_from(self, argument: Argument, start: int) -> None:
        for offset in range(start, len(argument.before) - 3, 4):
            self._descriptor_at(argument, offset)

    def _descriptor_at(self, argument: Argument, offset: int) -> None:
        fd = _int(argument.before, offset, 4)
        if fd < 1 << 31:  # -1 stands for none
            argument.descriptors[offset] = str(self._named(fd))


def _int(data: bytes, offset: int, size: int) -> int:
    return int.from_bytes(data[offset : offset + size], sys.byteorder)


def _shown(value: object) -> str:
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, bytes):
        return value.hex(" ") if len(value) <= 32 else f"{value[:32].hex(' ')}… ({len(value)} bytes)"
    return str(value)


def _struct(argument: Argument, data: bytes, only_changed: bool = False) -> str:
    """The bytes of a struct, field by field under the kernel's names."""
    if argument.struct is None:
        if argument.descriptors:
            return f"&{argument.descriptors[0]}"
        text = data.rstrip(b"\0")
        return json.dumps(text.decode()) if text.isascii() and text else data.hex(" ")
    shown = []
    for each in uapi.fields(argument.struct):
        end = each.offset + each.size
        if (
            each.size == 0
            or end > len(data)
            or (only_changed and data[each.offset : end] == argument.before[each.offset : end])
        ):
            continue
        shown.append(f"{each.name}={_field(argument, each, data)}")
    if argument.descriptors and not only_changed:
        shown.append(f"fds=[{', '.join(argument.descriptors.values())}]")
    return "{" + ", ".join(shown) + "}"


def _field(argument: Argument, each: uapi.Field, data: bytes) -> str:
    assert argument.struct is not None
    if each.offset in argument.places:
        return str(argument.places[each.offset])
    value = _int(data, each.offset, each.size)
    if each.name == "flags":
        return "|".join(uapi.flag_names(argument.struct, value, short=True)) or "0"
    if name := uapi.value_name(argument.struct, each.name, value):
        return name
    return hex(value) if each.size == 8 else str(value)


def _plain(value: object) -> Any:
    """`value` as JSON has it."""
    if isinstance(value, Descriptor):
        return {"fd": value.symbol}
    if isinstance(value, Place):
        return {"place": value.symbol, "offset": value.offset}
    if isinstance(value, RequestNumber):
        return {"request": list(value.names), "number": value.number}
    if isinstance(value, Argument):
        record: dict[str, object] = {"before": value.before.hex(), "after": value.after.hex()}
        if value.places:
            record["places"] = {str(at): _plain(place) for at, place in value.places.items()}
        if value.descriptors:
            record["fds"] = {str(at): symbol for at, symbol in value.descriptors.items()}
        return record
    if isinstance(value, bytes | bytearray | memoryview):
        return {"hex": bytes(value).hex()}
    if isinstance(value, FileStatus | LockedMemory):
        return value._asdict()
    return value
