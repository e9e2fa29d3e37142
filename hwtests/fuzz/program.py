"""Programs: steps with symbolic operands, written as JSON.

An operand is an int, or a list that says where its value comes from:

    ["buffer", k, offset]           the address `offset` bytes into buffer k
    ["fd", step]                    the descriptor that a step returned; never an open one after it was closed
    ["result", step, field, plus]   a field of the struct that a step's call wrote, plus a number
    ["bad", name]                   an address at which something is wrong: see `arena.Arena.bad`
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

Operand = int | list[Any]


@dataclass(frozen=True)
class Buffer:
    """Memory of the program, between pages that cannot be touched."""

    size: int
    """Bytes, whole pages."""
    page_size: int = 0
    """Of a hugetlb page; 0 for ordinary memory."""
    holes: tuple[tuple[int, str], ...] = ()
    """Page numbers, and what is wrong with the page: "none" (no access) or "read" (read-only)."""


@dataclass(frozen=True)
class Step:
    """One call, or one act on memory or an eventfd."""

    id: int
    op: str
    args: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "op": self.op, **self.args}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Step:
        return cls(data["id"], data["op"], {k: v for k, v in data.items() if k not in ("id", "op")})

    def uses(self) -> set[int]:
        """The steps whose results this one takes."""
        return set(_references(self.args))


@dataclass(frozen=True)
class Program:
    """Steps that run one after another in a fresh process."""

    seed: str
    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]
    memlock: int | None = None
    """RLIMIT_MEMLOCK in bytes, of a process without CAP_IPC_LOCK; None for a process with it."""

    def with_steps(self, steps: Iterable[Step]) -> Program:
        return replace(self, steps=tuple(steps))

    def dumps(self) -> str:
        """One line of JSON."""
        data = {
            "seed": self.seed,
            "memlock": self.memlock,
            "buffers": [[each.size, each.page_size, [list(hole) for hole in each.holes]] for each in self.buffers],
            "steps": [step.to_json() for step in self.steps],
        }
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def loads(cls, text: str) -> Program:
        data = json.loads(text)
        return cls(
            data["seed"],
            tuple(
                Buffer(size, page, tuple((number, what) for number, what in holes))
                for size, page, holes in data["buffers"]
            ),
            tuple(map(Step.from_json, data["steps"])),
            data["memlock"],
        )


def _references(value: object) -> Iterator[int]:
    if isinstance(value, dict):
        for each in value.values():
            yield from _references(each)
    elif isinstance(value, list):
        if len(value) >= 2 and value[0] in ("fd", "result", "mapping"):
            yield int(value[1])
        else:
            for each in value:
                yield from _references(each)
