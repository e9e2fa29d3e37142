"""Runs a program on a backend, and records what each step did.

A record has, where they apply:

    ret       what the call returned; "fd" and "mapping" stand for new ones
    errno     the name of the errno with which it failed
    out       bytes of the argument that changed, in hexadecimal, by offset
    data      what was read: hexadecimal, or its checksum
    buffers   checksums of all buffers after a transfer, or after a call that may write a bitmap of dirty pages
    skipped   why the guard refused the step, which then did nothing
    raised    the name of an exception that no kernel would raise
    locked    locked memory afterwards, in KiB
"""

from __future__ import annotations

import errno
import os
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from hwtests.fuzz.arena import Arena
from hwtests.fuzz.facts import Facts
from hwtests.fuzz.guard import Guard, Kind
from hwtests.fuzz.guard_iommu import ANYBODY
from hwtests.fuzz.program import Operand, Program, Step
from vfio import uapi
from vfio.backend import Backend, Mapping

Record = dict[str, Any]

CANARY = 0xAA
IMAGE = 64
"""Bytes that the argument of an ioctl has around it, at least: what the kernel should not touch is canaries."""

_NO_FD = 9999  # a number that is never open
_INTERRUPT_TIME = 0.05  # seconds that an interrupt may take
_DMA_TIME = 2.0  # seconds that a transfer may take
_FIRST_REQUEST = uapi.request("VFIO_GET_API_VERSION")
_SOURCE, _DESTINATION, _COUNT, _COMMAND, _ENGINE = 0x80, 0x88, 0x90, 0x98, 0x40000
_CONFIG = 7 << 40


@dataclass
class Run:
    """What became of a program."""

    records: list[Record] = field(default_factory=list)
    ended: str = ""
    """Why there are fewer records than steps."""


class _Skipped(Exception):
    """The step is not made."""


@dataclass
class _Descriptor:
    fd: int
    kind: Kind


@dataclass
class _Mapped:
    mapping: Mapping
    owner: int  # the step of its descriptor
    offset: int  # in the device file
    writable: bool


class Executor:
    """One run of a program, in a process that is its own."""

    def __init__(self, backend: Backend, facts: Facts, program: Program) -> None:
        self._backend = backend
        self._program = program
        self._arena = Arena(backend, facts.page_size, program.buffers)
        self._guard = Guard(facts, self._arena)
        self._bitmaps = (14, 17) if facts.type1 else ()  # calls that write to where a field of their struct says
        self._edu_order = facts.edu_order
        self._descriptors: dict[int, _Descriptor] = {}
        self._mappings: dict[int, _Mapped] = {}
        self._outputs: dict[int, dict[str, int]] = {}  # of a step: the fields of its struct afterwards
        self.touched_device = False
        """Whether registers of a device may have changed."""
        self.transferred = False
        """Whether its memory may have."""

    def run(self) -> Iterator[Record]:
        """A record for each step, in order."""
        for step in self._program.steps:
            record = self._make(step)
            record["locked"] = self._backend.locked().locked >> 10
            yield record

    def close(self) -> None:
        """Undo everything; the end of the process does the same."""
        for mapped in self._mappings.values():
            mapped.mapping.close()
        for descriptor in self._descriptors.values():
            self._close(descriptor)
        self._descriptors.clear()
        self._mappings.clear()
        self._arena.close()

    def _make(self, step: Step) -> Record:
        act: Callable[[Step], Record] = getattr(self, f"_do_{step.op}")
        try:
            return act(step)
        except _Skipped as why:
            return {"skipped": str(why)}
        except OSError as error:
            return {"errno": errno.errorcode.get(error.errno or 0, str(error.errno))}
        except Exception as error:  # a kernel never does that: it is a finding
            return {"raised": type(error).__name__, "message": str(error)}

    # --- descriptors ---

    def _do_open(self, step: Step) -> Record:
        path = step.args["path"]
        fd = self._backend.open(path, os.O_RDWR)
        return self._opened(step, fd, Kind("container" if path == "/dev/vfio/vfio" else "group"))

    def _do_dup(self, step: Step) -> Record:
        origin = self._descriptors.get(step.args["fd"])
        fd = self._backend.dup(origin.fd if origin else _NO_FD)
        return self._opened(step, fd, origin.kind if origin else Kind("none"))

    def _do_close(self, step: Step) -> Record:
        descriptor = self._descriptors.pop(step.args["fd"], None)
        self._guard.closed()
        self._close(descriptor or _Descriptor(_NO_FD, Kind("none")))
        return {"ret": 0}

    def _do_eventfd(self, step: Step) -> Record:
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return self._opened(step, fd, Kind("eventfd"))

    def _do_eventfd_read(self, step: Step) -> Record:
        time.sleep(_INTERRUPT_TIME)
        return {"ret": os.eventfd_read(self._eventfd(step))}

    def _do_eventfd_write(self, step: Step) -> Record:
        os.eventfd_write(self._eventfd(step), 1)
        return {"ret": 0}

    def _opened(self, step: Step, fd: int, kind: Kind) -> Record:
        self._descriptors[step.id] = _Descriptor(fd, kind)
        return {"ret": "fd"}

    def _close(self, descriptor: _Descriptor) -> None:
        if descriptor.kind.name == "eventfd":  # which is the real kernel's on either side
            os.close(descriptor.fd)
        else:
            self._backend.close(descriptor.fd)

    def _eventfd(self, step: Step) -> int:
        descriptor = self._descriptors.get(step.args["fd"])
        if descriptor is None or descriptor.kind.name != "eventfd":
            raise _Skipped("no eventfd")
        return descriptor.fd

    def _find(self, step: Step) -> _Descriptor:
        found = self._descriptors.get(step.args["fd"], _Descriptor(_NO_FD, Kind("none")))
        if found.kind.name == "eventfd":
            raise _Skipped("an eventfd is not the model's")
        return found

    # --- ioctl ---

    def _do_ioctl(self, step: Step) -> Record:
        descriptor = self._find(step)
        request = self._request(step)
        n = request - _FIRST_REQUEST if 0 <= request - _FIRST_REQUEST < 64 else None
        how = step.args.get("by", "value")
        if how == "value" or how == "bad":
            value = step.args.get("value", 0) if how == "value" else self._arena.bad(step.args["at"])
            return self._ioctl(step, descriptor, n, request, b"", value, None)
        return self._ioctl(step, descriptor, n, request, self._image(step), 0, how)

    def _ioctl(
        self,
        step: Step,
        descriptor: _Descriptor,
        n: int | None,
        request: int,
        image: bytes,
        value: int,
        how: str | None,
    ) -> Record:
        if why := self._guard.refuse(descriptor.kind, n, image, value):
            raise _Skipped(why)
        self.touched_device |= descriptor.kind.name == "device" and n in (11, 16)
        after = image
        try:
            if how is None:
                result = self._backend.ioctl(descriptor.fd, request, value)
            elif how == "buffer":
                buffer = bytearray(image)
                try:
                    result = self._backend.ioctl(descriptor.fd, request, buffer)
                finally:
                    after = bytes(buffer)
            else:
                address = self._arena.place(image, how)
                try:
                    result = self._backend.ioctl(descriptor.fd, request, address)
                finally:
                    after = self._arena.placed(address, len(image))
        except OSError as error:
            record: Record = {"errno": errno.errorcode.get(error.errno or 0, str(error.errno))}
            if error.errno == errno.EFAULT and n == 19 and len(image) >= 40:  # the window may be there all the same
                self._guard.observe(descriptor.kind, n, image, value, 0, image)
        else:
            record = {"ret": result}
            if descriptor.kind.name == "group" and n == 6:
                name = image.split(b"\0", 1)[0].decode("latin-1").split(" ")[0]
                record = self._opened(step, result, Kind("device", name))
            self._guard.observe(descriptor.kind, n, image, value, 0 if record["ret"] == "fd" else result, after)
        if changed := _changes(image, after):
            record["out"] = changed
        if descriptor.kind.name == "container" and n in self._bitmaps:
            record["buffers"] = self._arena.checksums()
        self._keep(step, after)
        return record

    def _request(self, step: Step) -> int:
        """Its number on this machine. Numbers that are no request of it: "VFIO+n" for one past the last, "other" for the
        encoding of other machines, "sized" for one with a size in it."""
        if "request" in step.args:
            return uapi.request(step.args["request"])
        number = str(step.args["number"])
        if number == "other":
            return _FIRST_REQUEST ^ 1 << 29
        return _FIRST_REQUEST + (32 << 16 if number == "sized" else int(number.removeprefix("VFIO+")))

    def _image(self, step: Step) -> bytes:
        """The argument and the canaries behind it; or what of it lies before a page that cannot be touched."""
        payload = self._payload(step)
        if step.args["by"] == "end":
            return payload[: step.args.get("cut", len(payload))]
        return payload.ljust(IMAGE, bytes([CANARY]))

    def _payload(self, step: Step) -> bytes:
        """The bytes of the argument: a string, an int, or a struct with what follows it."""
        args = step.args
        if "string" in args:
            return bytes(args["string"].encode("latin-1")) + b"\0"
        if "int" in args:
            return (self._value(args["int"]) & 0xFFFFFFFF).to_bytes(4, "little")
        struct = uapi.argument(args["request"])
        assert struct is not None
        data = bytearray(uapi.sizeof(struct))
        for each in uapi.fields(struct):
            if each.size and each.name in args["struct"]:
                value = self._value(args["struct"][each.name]) & ((1 << 8 * each.size) - 1)
                data[each.offset : each.offset + each.size] = value.to_bytes(each.size, "little")
        tail = args.get("tail", [])
        if isinstance(tail, str):
            data += bytes.fromhex(tail)
        else:
            data += b"".join((self._value(each) & 0xFFFFFFFF).to_bytes(4, "little") for each in tail)
        wide = args.get("wide", [])
        data += b"".join((self._value(each) & 0xFFFFFFFF_FFFFFFFF).to_bytes(8, "little") for each in wide)
        return bytes(data)

    def _value(self, operand: Operand) -> int:
        if isinstance(operand, int):
            return operand
        match operand:
            case ["buffer", number, offset]:
                if not self._arena.certain(number, offset):
                    raise _Skipped(ANYBODY)
                return self._arena.address(number, offset)
            case ["bad", name]:
                return self._arena.bad(name)
            case ["fd", step]:
                found = self._descriptors.get(step)
                return found.fd if found else _NO_FD
            case ["result", step, field, plus]:
                return (self._outputs.get(step, {}).get(field, 0) + int(plus)) & ((1 << 64) - 1)
        raise ValueError(f"no operand: {operand}")

    def _keep(self, step: Step, after: bytes) -> None:
        struct = uapi.argument(step.args["request"]) if "request" in step.args else None
        if struct is None or len(after) < uapi.sizeof(struct):
            return
        self._outputs[step.id] = {
            each.name: int.from_bytes(after[each.offset : each.offset + each.size], "little")
            for each in uapi.fields(struct)
        }

    # --- device files ---

    def _do_pread(self, step: Step) -> Record:
        descriptor, offset, length = self._find(step), step.args["offset"], step.args["length"]
        self._guarded_registers(descriptor, offset, length)
        return {"ret": "data", "data": _digest(self._backend.pread(descriptor.fd, length, offset))}

    def _do_pwrite(self, step: Step) -> Record:
        descriptor, offset = self._find(step), step.args["offset"]
        data = bytes.fromhex(step.args["data"])
        self._guarded_registers(descriptor, offset, len(data))
        self.touched_device = True
        return {"ret": self._backend.pwrite(descriptor.fd, data, offset)}

    def _guarded_registers(self, descriptor: _Descriptor, offset: int, length: int) -> None:
        if why := self._guard.register(descriptor.kind, offset, length):
            raise _Skipped(why)

    def _do_mmap(self, step: Step) -> Record:
        descriptor = self._find(step)
        args = step.args
        mapping = self._backend.mmap(descriptor.fd, args["length"], args["offset"], args["prot"])
        self._mappings[step.id] = _Mapped(mapping, args["fd"], args["offset"], bool(args["prot"] & 2))
        return {"ret": "mapping"}

    def _do_munmap(self, step: Step) -> Record:
        mapping = self._mapped(step).mapping
        del self._mappings[step.args["mapping"][1]]
        self._guard.closed()
        mapping.close()
        return {"ret": 0}

    def _do_load(self, step: Step) -> Record:
        mapping = self._touchable(step)
        return {"ret": mapping.load(step.args["offset"], step.args["width"])}

    def _do_store(self, step: Step) -> Record:
        mapping = self._touchable(step)
        self.touched_device = True
        mapping.store(step.args["offset"], step.args["width"], step.args["value"])
        return {"ret": 0}

    def _mapped(self, step: Step) -> _Mapped:
        try:
            return self._mappings[step.args["mapping"][1]]
        except KeyError:
            raise _Skipped("no mapping") from None

    def _touchable(self, step: Step) -> Mapping:
        """The mapping of a step, if touching it there is no SIGBUS and starts nothing."""
        mapped = self._mapped(step)
        descriptor = self._descriptors.get(mapped.owner)
        offset, width = step.args["offset"], step.args["width"]
        if descriptor is None or offset + width > mapped.mapping.length:
            raise _Skipped("no register there")
        if step.op == "store" and not mapped.writable:
            raise _Skipped("a read-only mapping: a SIGSEGV")
        if why := self._guard.register(descriptor.kind, mapped.offset + offset, width, mapped=True):
            raise _Skipped(why)
        if not self._backend.pread(descriptor.fd, 2, _CONFIG + 4)[0] & 2:
            raise _Skipped("memory decoding is off: a SIGBUS")
        return mapped.mapping

    # --- DMA of edu ---

    def _do_dma(self, step: Step) -> Record:
        descriptor, args = self._find(step), step.args
        iova, length, place = self._value(args["iova"]), args["length"], args["place"]
        if why := self._guard.dma(descriptor.kind, iova, place, length):
            raise _Skipped(why)
        self.touched_device = self.transferred = True
        source, destination, command = iova, _ENGINE + place, 1
        if args["to"] == "memory":
            source, destination, command = destination, source, 3
        if args.get("interrupt"):
            command |= 4
        for register, value in ((_SOURCE, source), (_DESTINATION, destination), (_COUNT, length), (_COMMAND, command)):
            self._backend.pwrite(descriptor.fd, value.to_bytes(8, self._edu_order), register)
        end = time.monotonic() + _DMA_TIME
        while int.from_bytes(self._backend.pread(descriptor.fd, 4, _COMMAND), self._edu_order) & 1:
            if time.monotonic() > end:
                return {"ret": "busy", "buffers": self._arena.checksums()}
            time.sleep(0.001)
        return {"ret": 0, "buffers": self._arena.checksums()}


def _changes(before: bytes, after: bytes) -> dict[str, str]:
    """The bytes that differ, in runs."""
    changed: dict[str, str] = {}
    start = None
    for at in range(len(before) + 1):
        differs = at < len(before) and before[at] != after[at]
        if differs and start is None:
            start = at
        elif not differs and start is not None:
            changed[str(start)] = after[start:at].hex()
            start = None
    return changed


def _digest(data: bytes) -> str:
    return data.hex() if len(data) <= 64 else f"{len(data)} bytes, crc32 {zlib.crc32(data):08x}"
