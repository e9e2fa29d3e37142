"""What the generator believes of the machine while it writes a program, and how it writes an ioctl."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hwtests.fuzz.facts import Endpoint, Facts
from hwtests.fuzz.program import Buffer, Operand, Step
from vfio import uapi

H = TypeVar("H", bound="Holder")

_POINTERS = ("null", "low", "hole", "kernel", "end-1", "end-4", "end-8")


@dataclass(eq=False)
class Holder:
    """Something that descriptors are open on."""

    steps: list[int]
    """The steps that returned these descriptors."""


@dataclass(eq=False)
class Window:
    """A DMA window, where the generator expects it."""

    start: int
    size: int
    shift: int
    step: int = -1
    """The CREATE; -1 for the default window."""


@dataclass(eq=False)
class Registration:
    """Registered memory: a buffer and a range in it."""

    buffer: int
    offset: int
    size: int


@dataclass(eq=False)
class Dma:
    """What is mapped in a Type1 container."""

    iova: int
    size: int
    vaddr: Operand


@dataclass(eq=False)
class Container(Holder):
    groups: list[Group] = field(default_factory=list)
    version: int = 0
    enabled: bool = False
    default_pending: bool = True
    windows: list[Window] = field(default_factory=list)
    registrations: list[Registration] = field(default_factory=list)
    mapped: list[tuple[int, int]] = field(default_factory=list)
    """IOVAs that were mapped at some time, and sizes."""
    live: list[Dma] = field(default_factory=list)

    def reset(self) -> None:
        """The last group is gone, and the IOMMU with it."""
        self.version, self.enabled, self.default_pending = 0, False, True
        self.windows.clear()
        self.registrations.clear()
        self.live.clear()


@dataclass(eq=False)
class Group(Holder):
    number: int
    container: Container | None = None


@dataclass(eq=False)
class Device(Holder):
    endpoint: Endpoint
    group: Group
    mappings: list[tuple[int, int, int]] = field(default_factory=list)
    """BARs mapped: the step, the offset in the device file, the length."""


class Picture:
    """The program so far, and what it should have led to."""

    def __init__(self, facts: Facts, rng: random.Random, buffers: tuple[Buffer, ...], spoiled: float) -> None:
        self.facts = facts
        self.rng = rng
        self.buffers = buffers
        self.steps: list[Step] = []
        self.containers: list[Container] = []
        self.groups: list[Group] = []
        self.devices: list[Device] = []
        self.eventfds: list[int] = []
        self.intact = True
        """Whether the last ioctl was left as it was meant."""
        self._spoiled = spoiled
        fast = [each.group for each in facts.endpoints if each.opens_fast]
        self.favourite = fast[0] if rng.random() < 0.65 else rng.choice(fast)
        """The group that most of the program is about."""

    # --- steps ---

    def add(self, op: str, **args: Any) -> int:
        """Add a step; its number."""
        number = len(self.steps)
        self.steps.append(Step(number, op, args))
        return number

    def ioctl(
        self,
        fd: int,
        request: str,
        struct: dict[str, Operand] | None = None,
        *,
        tail: list[Operand] | str | None = None,
        wide: list[Operand] | None = None,
        value: int | None = None,
        string: str | None = None,
        int_argument: Operand | None = None,
    ) -> int:
        """Add an ioctl, sometimes spoiled: another descriptor, a bad pointer, a wrong size, flag or field.

        Behind the struct come numbers of 32 bits or bytes (`tail`), or numbers of 64 bits (`wide`).
        """
        rng = self.rng
        spoiled = rng.random() < self._spoiled
        self.intact = not spoiled
        args: dict[str, Any] = {"fd": fd, "request": request}
        if spoiled and rng.random() < 0.15:
            args["fd"] = self.any_fd()
        if value is not None or (struct is None and string is None and int_argument is None):
            return self.add("ioctl", **args, by="value", value=value or 0)
        if spoiled and rng.random() < 0.3:
            return self.add("ioctl", **args, by="bad", at=rng.choice(_POINTERS))
        args["by"] = rng.choice(("buffer", "buffer", "address", "end"))
        if string is not None:
            args["string"] = string
        elif int_argument is not None:
            args["int"] = int_argument
        else:
            if wide:
                args["wide"] = list(wide)
            self._struct(args, request, dict(struct or {}), tail, spoiled)
        return self.add("ioctl", **args)

    def _struct(
        self,
        args: dict[str, Any],
        request: str,
        struct: dict[str, Operand],
        tail: list[Operand] | str | None,
        spoil: bool,
    ) -> None:
        rng = self.rng
        kind = uapi.argument(request)
        assert kind is not None
        length = uapi.sizeof(kind)
        if tail:
            args["tail"] = tail
            length += len(tail) // 2 if isinstance(tail, str) else 4 * len(tail)
        length += 8 * len(args.get("wide", ()))
        struct.setdefault("argsz", length)
        if spoil:
            self._spoil(args, struct, [each.name for each in uapi.fields(kind) if each.size], length)
        elif rng.random() < 0.1:
            args["by"] = rng.choice(("readonly", "end"))
        elif rng.random() < 0.1:
            struct["argsz"] = length + rng.choice((1, 4, 8, 24))
        argsz = struct["argsz"]
        if args["by"] == "buffer" and (not isinstance(argsz, int) or argsz > 64):
            args["by"] = "address"  # the seam refuses a buffer shorter than its argsz
        args["struct"] = struct

    def _spoil(self, args: dict[str, Any], struct: dict[str, Operand], names: list[str], length: int) -> None:
        rng = self.rng
        match rng.randrange(4):
            case 0:
                struct["argsz"] = rng.choice(
                    (0, 1, 4, 8, 11, 12, 15, 16, 17, 20, 23, length - 1, length + 1, 4096, 0xFFFFFFFF)
                )
            case 1 if "flags" in names:
                flags = struct.get("flags", 0)
                assert isinstance(flags, int)
                struct["flags"] = rng.choice((flags ^ 1 << rng.randrange(32), 0, 0xFFFFFFFF, flags | 4))
            case 2:
                args["by"] = "end"
                args["cut"] = rng.choice((1, 4, 8, 12, 15, 16, 20, 24, 28, 31, 32, 36, 39, length - 1))
            case _:
                wide = args.get("wide", [])
                name = rng.choice([*names, *range(len(wide))])
                if isinstance(name, int):
                    wide[name] = self.nearly(wide[name])
                else:
                    struct[name] = self.nearly(struct.get(name, 0))

    def nearly(self, operand: Operand) -> Operand:
        """A value like `operand`, or nothing like it."""
        rng = self.rng
        page = self.facts.page_size
        delta = rng.choice((1, -1, 8, 0x800, 4096, -4096, page, -page, 1 << 16, 1 << 31, 1 << 32))
        if isinstance(operand, list):
            if operand[0] in ("buffer", "result") and rng.random() < 0.8:
                return [*operand[:-1], operand[-1] + delta]
            return rng.choice((["bad", "hole"], ["bad", "kernel"], 0, (1 << 64) - page))
        return rng.choice(
            (operand + delta, operand ^ 1 << rng.randrange(64), 0, (1 << 64) - 1, 1 << 63, operand * 2)
        ) & ((1 << 64) - 1)

    # --- what there is ---

    def any_fd(self) -> int:
        """A descriptor that some step returned, perhaps one closed since."""
        steps = [step.id for step in self.steps if step.op in ("open", "dup", "eventfd")]
        steps += [device.steps[0] for device in self.devices if device.steps]
        return self.rng.choice(steps) if steps else 0

    def any_holder(self) -> Holder | None:
        """A container, group or device with something open."""
        holders: list[Holder] = [*self.containers, *self.groups, *self.devices]
        holders = [each for each in holders if each.steps]
        return self.rng.choice(holders) if holders else None

    def step_of(self, holder: Holder) -> int:
        """The step that returned a descriptor of it."""
        return self.rng.choice(holder.steps) if holder.steps else self.any_fd()

    def container(self) -> Container | None:
        """A container, rather one with an IOMMU."""
        return self._best([each for each in self.containers if each.steps], lambda each: bool(each.version))

    def group(self) -> Group | None:
        """A group that is open."""
        return self._best([each for each in self.groups if each.steps], lambda each: each.number == self.favourite)

    def device(self) -> Device | None:
        """A device that is open."""
        return self._best([each for each in self.devices if each.steps], lambda each: True)

    def _best(self, found: list[H], better: Callable[[H], bool]) -> H | None:
        preferred = [each for each in found if better(each)]
        return self.rng.choice(preferred if preferred and self.rng.random() < 0.75 else found) if found else None

    def registrable(self, memory: Registration) -> bool:
        """Whether REGISTER should succeed: all of it is there, and no registration overlaps it, but for an equal one of
        another container."""
        buffer, page = self.buffers[memory.buffer], self.facts.page_size
        end = memory.offset + memory.size
        if not 0 <= memory.offset < end <= buffer.size:
            return False
        if any(memory.offset <= number * page < end for number, _ in buffer.holes):
            return False
        others = [
            each for container in self.containers for each in container.registrations if each.buffer == memory.buffer
        ]
        return not any(each.offset < end and memory.offset < each.offset + each.size for each in others)

    # --- what happens ---

    def open_device(self, step: int, endpoint: Endpoint, group: Group) -> None:
        """GET_DEVICE_FD succeeded."""
        self.devices.append(Device([step], endpoint, group))

    def forget(self, holder: Holder) -> None:
        """One of its descriptors was closed."""
        if holder.steps:
            return
        if isinstance(holder, Device):
            if not holder.mappings:
                self.devices.remove(holder)
        elif isinstance(holder, Group):
            self.groups.remove(holder)
            self.detach(holder)

    def detach(self, group: Group) -> None:
        """The group left its container."""
        container, group.container = group.container, None
        if container is not None:
            container.groups.remove(group)
            if not container.groups:
                container.reset()
