"""Makes the calls of a transcript to the fake, and compares what comes of each.

Compared are the result or the errno, every byte of the argument after the call, the text of files, and how often
eventfds were signalled during the call.  Not compared, because they are of the one boot that was recorded:

- descriptors and addresses, which are symbols in a transcript;
- everything under /proc (processes, limits, memory of that host), which is not even read;
- the major number of VFIO's nodes, which is dynamic, and in what order a directory lists its entries;
- the drivers that happen to be built into that kernel (the names in /sys/bus/pci/drivers), but those that VFIO is about;
- whether that host had hugetlb pages of a size to give (the fake has those of every size that a window can have);
- how often a program had to look before a register was ready: of the same read made again and again, the last counts.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from simtests.conformance.processes import OtherProcess
from vfio import uapi
from vfio.backend import Mapping, Memory, open_backend
from vfio.backends.surroundings import CLOSED, EVENTFD, Surroundings
from vfio.backends.trace import BITMAP_DATA, BITMAP_SIZE
from vfio.fake.backend import FakeBackend

Record = dict[str, Any]

_POWER = 0x2000_0000
"""How the request numbers of POWER differ from those of other machines."""
_DRIVERS = "/sys/bus/pci/drivers"
_WITH_NUMBERS = ("pread", "pwrite", "populate", "chmod")
"""Calls whose offsets, addresses and modes a trace shows as text."""
_LONGEST = 1 << 30
_ROOM = 1 << 24
"""To what areas are aligned, and what is kept free behind them."""
_RIGHTS = {"rw": 3, "r": 1, "-": 0}
_PRIVATE_ANONYMOUS_NORESERVE, _FIXED_NOREPLACE = 0x4022, 0x100000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = _libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Difference(NamedTuple):
    """A call that the fake answers differently."""

    number: int
    record: Record
    what: str
    """In words: what was expected, what came."""

    def __str__(self) -> str:
        return f"call {self.number}: {in_c(self.record)}\n    {self.what}"


class _Range:
    """Addresses of this process that stand for a symbol of memory."""

    def __init__(self, start: int, length: int, owned: bool) -> None:
        self.start, self.length, self.owned = start, length, owned
        self.restricted = owned

    def protect(self, start: int, length: int, rights: int) -> None:
        """Give the pages of a part these rights; what is outside of the range is not ours to change."""
        page = os.sysconf("SC_PAGESIZE")
        first = max(start, self.start) // page * page
        last = -(-min(start + length, self.start + self.length) // page) * page
        if first < last:
            assert _libc.mprotect(first, last - first, rights) == 0

    def close(self) -> None:
        if self.owned:
            _libc.munmap(self.start, self.length)
        elif self.restricted:
            self.protect(self.start, self.length, 3)


class Replay:
    """One case, on a machine of its own."""

    def __init__(self, url: str, start: Record, records: list[Record]) -> None:
        self._records = records
        backend = open_backend(url)
        assert isinstance(backend, FakeBackend)
        self._backends: dict[str | None, FakeBackend] = {None: backend}
        self._machine = backend.machine
        self._files: dict[str, int] = {}
        self._memory: dict[str, Memory] = {}
        self._ranges: dict[str, _Range] = {}
        self._mappings: dict[str, Mapping] = {}
        self._eventfds: dict[str, int] = {}
        self._others: list[int] = []
        self._surroundings = Surroundings()
        backend.process.memlock, backend.process.ipc_lock = start["memlock"], start["ipc_lock"]
        for address, driver in start["drivers"].items():
            self._begin_with(backend, address, driver, start["overrides"][address])

    def differences(self) -> Iterator[Difference]:
        """Make the calls, one after another."""
        try:
            for number, record in enumerate(self._records):
                if _is_of_the_host(record):
                    continue
                self._machine.clock.advance(max(0.0, record["begin"] / 1e9 - self._machine.clock.now()))
                what = self._compare(record, last=not self._is_looked_at_again(number))
                if what:
                    yield Difference(number, record, what)
        finally:
            self.close()

    def close(self) -> None:
        """Give back what the calls left."""
        for mapping in self._mappings.values():
            with suppress(OSError):
                mapping.close()
        for backend in self._backends.values():
            for fd in list(backend.process.files):
                with suppress(OSError):
                    backend.close(fd)
        for each in self._ranges.values():
            each.close()
        for memory in self._memory.values():
            memory.close()
        for fd in (*self._eventfds.values(), *self._others):
            os.close(fd)

    # --- one call ---

    def _compare(self, record: Record, last: bool) -> str:
        """What is different; empty if nothing is."""
        before = self._signals()
        after: bytes | None = None
        try:
            result, after = self._make(record)
            got: Record = {"result": result}
        except OSError as error:
            got = {"errno": errno.errorcode[error.errno or 0]}
            after = getattr(error, "argument_after", None)
        except Exception as error:  # a fake that raises anything else is broken, or says why it will not
            return f"the fake raised {type(error).__name__}: {error}"
        if not last:
            return ""
        found = []
        expected: Record = {key: record[key] for key in ("result", "errno") if key in record}
        if _comparable(record, expected) != _comparable(record, got):
            found.append(f"the kernel gave {_told(expected)}, the fake {_told(got)}")
        buffer = _buffer_of(record)
        if buffer and after is not None and "result" not in (set(expected) ^ set(got)):
            found += self._different_bytes(record, buffer, after)
        now, wanted = self._signals(), record.get("signals", {})
        signals = {each: now.get(each, 0) - before.get(each, 0) for each in wanted}
        if signals != wanted:
            found.append(f"the kernel signalled {wanted}, the fake {signals}")
        return "; ".join(found)

    def _different_bytes(self, record: Record, buffer: Record, after: bytes) -> list[str]:
        wanted, sent = bytes.fromhex(buffer["after"]), bytes.fromhex(buffer["before"])
        ours = bytearray(after)
        for offset, size in self._translated(record, buffer):
            if wanted[offset : offset + size] == sent[offset : offset + size]:
                ours[offset : offset + size] = wanted[offset : offset + size]
        if bytes(ours) == wanted:
            return []
        at = next(i for i, pair in enumerate(zip(wanted, ours, strict=True)) if pair[0] != pair[1])
        return [
            f"bytes after the call differ from offset {at} on: {wanted.hex()} of the kernel, {ours.hex()} of the fake"
        ]

    def _make(self, record: Record) -> tuple[object, bytes | None]:
        """Make the call; its result as a transcript has it, and the buffer of an ioctl afterwards."""
        backend, args = self._backends[record.get("process")], record["args"]
        call: Callable[..., object] = getattr(self, f"_do_{record['call']}", None) or getattr(backend, record["call"])
        if record["call"] == "ioctl":
            return self._ioctl(backend, record)
        if hasattr(self, f"_do_{record['call']}"):
            return call(backend, record, *args), None
        return _plain(call(*[self._argument(each, record) for each in args])), None

    def _ioctl(self, backend: FakeBackend, record: Record) -> tuple[object, bytes | None]:
        target, request, argument = record["args"]
        fd, number = self._file(target["fd"], record), self._request(request["number"])
        if isinstance(argument, dict) and "before" in argument:
            buffer = self._buffer(argument, record)
            try:
                result = backend.ioctl(fd, number, buffer)
            except OSError as error:
                error.argument_after = bytes(buffer)  # type: ignore[attr-defined]
                raise
            return self._new_file(record, result), bytes(buffer)
        address = self._argument(argument, record)
        if isinstance(argument, dict):
            self._arrange(argument, record, 64)
        return self._new_file(record, backend.ioctl(fd, number, address)), None

    def _do_open(self, backend: FakeBackend, record: Record, path: str, flags: int) -> object:
        return self._new_file(record, backend.open(path, flags))

    def _do_dup(self, backend: FakeBackend, record: Record, fd: Record) -> object:
        return self._new_file(record, backend.dup(self._file(fd["fd"], record)))

    def _do_receive(self, backend: FakeBackend, record: Record, fd: Record) -> object:
        assert isinstance(backend, OtherProcess)
        return self._new_file(record, backend.receive(self._file(fd["fd"], record)))

    def _do_mmap(self, backend: FakeBackend, record: Record, fd: Record, length: int, offset: str, prot: int) -> object:
        mapping = backend.mmap(self._file(fd["fd"], record), length, int(offset, 0), prot)
        if "result" in record:
            self._mappings[record["result"]] = mapping
            return record["result"]
        mapping.close()
        return "a mapping"

    def _do_load(self, backend: FakeBackend, record: Record, mapping: str, offset: int, width: int) -> object:
        return self._mappings[mapping].load(offset, width)

    def _do_store(self, backend: FakeBackend, record: Record, mapping: str, *where: int) -> object:
        return self._mappings[mapping].store(*where)

    def _do_munmap(self, backend: FakeBackend, record: Record, mapping: str) -> object:
        return self._mappings[mapping].close()

    def _do_allocate(self, backend: FakeBackend, record: Record, length: int, page_size: int | None) -> object:
        if "result" not in record and page_size not in (None, backend.page_size):
            raise OSError(getattr(errno, record["errno"]), "no such hugetlb pages")
        if page_size in (None, backend.page_size):
            memory = backend.allocate(length + _ROOM)
            skip = (record.get("address", 0) - memory.address) % _ROOM  # as aligned as the kernel's was
        else:
            memory, skip = backend.allocate(length, page_size), 0
        whole = _Range(memory.address, memory.length, owned=False)
        if memory.length > length:  # around it nothing is to be, as far as a program can see
            whole.protect(memory.address, skip, 0)
            whole.protect(memory.address + skip + length, memory.length - skip - length, 0)
        self._memory[record["result"]] = memory
        self._ranges[record["result"]] = _Range(memory.address + skip, length, owned=False)
        return record["result"]

    def _do_free(self, backend: FakeBackend, record: Record, symbol: str) -> object:
        if symbol not in self._memory:
            return None  # given back already, which is harmless
        gone, memory = self._ranges[symbol], self._memory.pop(symbol)
        memory.close()
        # Nothing else is to come where the recorded process had nothing any more.
        kept = _libc.mmap(gone.start, gone.length, 0, _PRIVATE_ANONYMOUS_NORESERVE | _FIXED_NOREPLACE, -1, 0)
        assert kept == gone.start
        self._ranges[symbol] = _Range(kept, gone.length, owned=True)
        return None

    def _do_another_process(self, backend: FakeBackend, record: Record, options: Record) -> object:
        self._backends[record["result"]] = OtherProcess(backend, **options)
        return record["result"]

    def _do_exit(self, backend: FakeBackend, record: Record) -> object:
        backend.exit()
        return None

    def _do_load_driver(self, backend: FakeBackend, record: Record, name: str) -> object:
        self._machine.driver_core.load(name)
        return record["result"]

    def _do_freeze(self, backend: FakeBackend, record: Record, words: str) -> object:
        address, what = words.split()
        self._machine.eeh.of(address).freeze = what  # type: ignore[assignment]
        return None

    def _do_unload_driver(self, backend: FakeBackend, record: Record, name: str) -> object:
        self._machine.driver_core.unload(name)
        return record["result"]

    # --- from symbols to what they stand for ---

    def _argument(self, argument: Any, record: Record) -> Any:
        if isinstance(argument, dict):
            if "fd" in argument:
                return self._file(argument["fd"], record)
            if "place" in argument:
                return self._address(argument)
            if "hex" in argument:
                return bytes.fromhex(argument["hex"])
        if isinstance(argument, str) and record["call"] in _WITH_NUMBERS and argument[:1] != "/":
            return int(argument, 0)
        return argument

    def _file(self, symbol: str, record: Record) -> int:
        """The descriptor of a symbol; what came from outside is made when it is met."""
        if symbol in self._files:
            return self._files[symbol]
        kind = record.get("outside", {}).get(symbol, CLOSED)
        if kind == CLOSED:
            fd = (1 << 20) + len(self._files)  # more than a process can have
        elif kind == EVENTFD:
            fd = self._eventfds[symbol] = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        else:
            fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            self._others.append(fd)
        self._files[symbol] = fd
        return fd

    def _new_file(self, record: Record, result: object) -> object:
        """Take a new descriptor under its symbol."""
        expected = record.get("result")
        if isinstance(expected, dict) and isinstance(result, int):
            self._files[expected["fd"]] = result
            return expected
        return result

    def _address(self, place: Record) -> int:
        return self._range(place["place"]).start + int(place["offset"])

    def _range(self, symbol: str) -> _Range:
        if symbol not in self._ranges:
            length = _ROOM + max(end for name, end in _places(self._records) if name == symbol)
            start = _libc.mmap(None, length + _ROOM, 0, _PRIVATE_ANONYMOUS_NORESERVE, -1, 0)
            assert start not in (None, ctypes.c_void_p(-1).value)
            self._ranges[symbol] = _Range(start, length + _ROOM, owned=True)
            self._ranges[symbol].start += -start % _ROOM  # addresses keep how they are aligned
            self._ranges[symbol].length -= -start % _ROOM
        return self._ranges[symbol]

    def _arrange(self, place: Record, record: Record, length: int) -> None:
        """Make memory at a place what it was when the call was recorded."""
        area, address = self._range(place["place"]), self._address(place)
        if data := bytes.fromhex(record.get("pointed_at", "")):
            area.protect(address, len(data), 3)
            ctypes.memmove(address, data, min(len(data), area.start + area.length - address))
        if area.restricted or "layout" in record:
            area.restricted = True
            for offset, size, rights in record.get("layout") or [[0, min(length, _LONGEST), "rw"]]:
                area.protect(address + offset, size, _RIGHTS[rights])

    def _buffer(self, argument: Record, record: Record) -> bytearray:
        """The buffer of an ioctl with descriptors and addresses of this process."""
        buffer = bytearray.fromhex(argument["before"])
        for offset, symbol in argument.get("fds", {}).items():
            at = int(offset)
            buffer[at : at + 4] = self._file(symbol, record).to_bytes(4, "little")
        for offset, place in argument.get("places", {}).items():
            at = int(offset)
            theirs, ours = int.from_bytes(buffer[at : at + 8], "little"), self._address(place)
            length = _size(buffer, record)
            self._arrange(place, record, length)
            buffer[at : at + 8] = ours.to_bytes(8, "little")
            if theirs + length >= 1 << 64:  # a range that wraps is to wrap here as well, and just as far
                where = _size_field(record)
                assert where is not None
                wrapped = (length + theirs - ours) % (1 << 64)
                buffer[where : where + 8] = wrapped.to_bytes(8, "little")
        return buffer

    def _translated(self, record: Record, buffer: Record) -> list[tuple[int, int]]:
        """Offset and size of what in a buffer is not what was recorded."""
        found = [(int(offset), 4) for offset in buffer.get("fds", {})]
        found += [(int(offset), 8) for offset in buffer.get("places", {})]
        where = _size_field(record)
        return found if where is None or not buffer.get("places") else [*found, (where, 8)]

    # --- the rest ---

    def _begin_with(self, backend: FakeBackend, address: str, driver: str | None, override: str | None) -> None:
        """Bring a device where it was when the case began."""
        directory = f"/sys/bus/pci/devices/{address}"
        if driver is not None:
            self._machine.driver_core.load(driver)
            backend.write_text(f"{directory}/driver_override", f"{driver}\n")
            backend.write_text("/sys/bus/pci/drivers_probe", address)
        backend.write_text(f"{directory}/driver_override", f"{override or ''}\n")

    def _request(self, number: int) -> int:
        """An ioctl number of the recorded machine on this one: as right, or as wrong."""
        theirs = 0 if self._machine.topology.platform.name == "PC" else _POWER
        return number ^ theirs ^ uapi.VFIO_GET_API_VERSION & _POWER

    def _signals(self) -> dict[str, int]:
        return {symbol: self._surroundings.count(fd) for symbol, fd in self._eventfds.items()}

    def _is_looked_at_again(self, number: int) -> bool:
        """Whether the next call is the same read: then a program waits for something."""
        record = self._records[number]
        if record["call"] not in ("pread", "load") or number + 1 == len(self._records):
            return False
        following = self._records[number + 1]
        return all(record.get(key) == following.get(key) for key in ("call", "args", "process"))


def _is_of_the_host(record: Record) -> bool:
    first = record["args"][0] if record["args"] else ""
    return isinstance(first, str) and (first == "/proc" or first.startswith("/proc/"))


def _buffer_of(record: Record) -> Record | None:
    found = record["args"][-1] if record["call"] == "ioctl" else None
    return found if isinstance(found, dict) and "before" in found else None


def _struct(record: Record) -> type[uapi.Struct] | None:
    names = record["args"][1]["request"]
    return uapi.request_info(names[0]).argument if names else None


def _size_field(record: Record) -> int | None:
    buffer = _buffer_of(record)
    if buffer and str(BITMAP_DATA) in buffer.get("places", {}):
        return BITMAP_SIZE
    struct = _struct(record)
    fields = uapi.fields(struct) if struct else ()
    return next((each.offset for each in fields if each.name == "size"), None)


def _size(buffer: bytes | bytearray, record: Record) -> int:
    at = _size_field(record)
    return 1 if at is None else int.from_bytes(buffer[at : at + 8], "little")


def _places(records: Iterable[Record]) -> Iterator[tuple[str, int]]:
    """Each symbol of memory with the end of what is said of it."""
    for record in records:
        buffer = _buffer_of(record)
        named = list(buffer.get("places", {}).values()) if buffer else []
        named += [each for each in record["args"] if isinstance(each, dict) and "place" in each]
        length = _size(bytes.fromhex(buffer["before"]), record) if buffer and named else 64
        if record["call"] == "populate":
            length = record["args"][1]
        for place in named:
            yield place["place"], place["offset"] + min(length, _LONGEST)


def _plain(value: object) -> object:
    """A result as transcripts have it."""
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    return json.loads(json.dumps(value._asdict())) if hasattr(value, "_asdict") else value


def _comparable(record: Record, outcome: Record) -> object:
    """What of an outcome has to be the same."""
    result = outcome.get("result")
    if record["call"] == "listdir" and isinstance(result, list):
        return sorted(result) if record["args"][0] != _DRIVERS else sorted({"vfio-pci"} & set(result))
    if record["call"] == "stat" and isinstance(result, dict):
        minor = os.minor(result["rdev"]) if stat.S_ISCHR(result["mode"]) else None
        return {"mode": result["mode"], "uid": result["uid"], "gid": result["gid"], "minor": minor}
    if record["call"] == "read_text" and isinstance(result, str) and record["args"][0].startswith("/sys/class/vfio/"):
        return result.partition(":")[2]
    return outcome


def _told(outcome: Record) -> str:
    return str(outcome["errno"]) if "errno" in outcome else str(outcome["result"])


def in_c(record: Record) -> str:
    """A recorded call in terms of C."""
    from vfio.backends.call_json import call_of
    from vfio.backends.call_text import in_c

    return in_c(call_of(record))
