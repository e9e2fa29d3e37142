"""TOML tables that are read key by key, with errors that name the file, the line, the key and the rule."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


class TopologyError(ValueError):
    """A topology file breaks a rule; the message names the file, the line where it can be found, the key and the
    rule."""


@dataclass(frozen=True)
class Origin:
    """The text that tables come from, to say where in it a key is."""

    file: str
    source: str
    raises: Callable[[str, str], ValueError] = lambda where, rule: TopologyError(f"{where}: {rule}")
    """Makes the error from where it is (file, line and key) and the rule that is broken."""

    def error(self, path: tuple[str | int, ...], rule: str) -> ValueError:
        """The error that the key at `path` breaks a rule."""
        dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
        line = self.line(path)
        where = self.file if line is None else f"{self.file}:{line}"
        return self.raises(f"{where}: {dotted}", rule)

    def line(self, path: tuple[str | int, ...]) -> int | None:
        """The line of the key at `path`, of the nearest table above it where it has no line of its own, or None."""
        best, best_length = None, 0
        here: tuple[str | int, ...] = ()
        counts: dict[tuple[str | int, ...], int] = {}
        for number, line in enumerate(self.source.splitlines(), start=1):
            if header := re.match(r"\s*(\[\[?)\s*([\w.]+)\s*\]", line):
                here = ()
                parts = header[2].split(".")
                for depth, part in enumerate(parts, start=1):
                    here += (part,)
                    if header[1] == "[[" and depth == len(parts):
                        counts[here] = counts.get(here, -1) + 1
                    if here in counts:
                        here += (counts[here],)
                candidate = here
                if best is None and path == here[:-1] and header[1] == "[[":  # the list itself
                    return number
            elif key := re.match(r"\s*([\w-]+)\s*=", line):
                candidate = (*here, key[1])
            else:
                continue
            if path[: len(candidate)] == candidate and len(candidate) > best_length:
                best, best_length = number, len(candidate)
        return best


class Table:
    """A TOML table that is read key by key; what is left over at the end is an unknown key."""

    def __init__(self, data: dict[str, Any], path: tuple[str | int, ...], origin: Origin) -> None:
        self._left = dict(data)
        self._known: list[str] = []
        self._path = path
        self._origin = origin

    def has(self, key: str) -> bool:
        self._known.append(key)
        return key in self._left

    def text(self, key: str, one_of: tuple[str, ...] = ()) -> str:
        value = self._take(key, str, "a string")
        if one_of and value not in one_of:
            raise self.error(key, f"{value!r} is not one of {', '.join(one_of)}")
        return str(value)

    def is_text(self, key: str) -> bool:
        """Whether the key is there and a string, for one that may be something else."""
        return self.has(key) and isinstance(self._left[key], str)

    def integer(self, key: str, minimum: int = 0, maximum: int = (1 << 63) - 1) -> int:
        value = self._take(key, int, "an integer")
        if not minimum <= value <= maximum:
            raise self.error(key, f"{value:#x} is not in {minimum:#x}..{maximum:#x}")
        return int(value)

    def power_of_two(self, key: str, minimum: int) -> int:
        size = self.integer(key, minimum)
        if size.bit_count() != 1:
            raise self.error(key, f"{size:#x} is not a power of two")
        return size

    def boolean(self, key: str) -> bool:
        return bool(self._take(key, bool, "true or false"))

    def texts(self, key: str) -> Iterator[str]:
        for value in self._take(key, list, "a list of strings"):
            if not isinstance(value, str):
                raise self.error(key, f"{value!r} is not a string")
            yield value

    def integers(self, key: str) -> Iterator[int]:
        for value in self._take(key, list, "a list of integers"):
            if type(value) is not int or value < 0:
                raise self.error(key, f"{value!r} is not an integer of 0 or more")
            yield value

    def optional(self, key: str, minimum: int = 0, maximum: int = (1 << 63) - 1) -> int | None:
        """An integer, or None where the key is absent."""
        return self.integer(key, minimum, maximum) if self.has(key) else None

    def name(self, key: str) -> str:
        """A string that can be part of a path."""
        text = self.text(key)
        if not text or "/" in text or not text.isprintable() or text in (".", ".."):
            raise self.error(key, f"{text!r} is not a name")
        return text

    def optional_name(self, key: str) -> str | None:
        """A name, or None where the key is absent."""
        return self.name(key) if self.has(key) else None

    def properties(self, key: str) -> tuple[tuple[str, str], ...]:
        """QEMU properties: strings as they are, integers in hexadecimal, true and false as on and off."""
        if not self.has(key):
            return ()
        spelled = []
        for name, value in self._take(key, dict, "a table").items():
            if isinstance(value, bool):
                spelled.append((name, "on" if value else "off"))
            elif isinstance(value, int):
                spelled.append((name, hex(value)))
            elif isinstance(value, str) and "," not in value:
                spelled.append((name, value))
            else:
                raise self.error(key, f"{name} = {value!r} is not a string without commas, an integer or a boolean")
        return tuple(spelled)

    def table(self, key: str) -> Table:
        return Table(self._take(key, dict, "a table"), (*self._path, key), self._origin)

    def optional_tables(self, key: str) -> list[Table]:
        """Like `tables`, but none where the key is absent."""
        return self.tables(key) if self.has(key) else []

    def tables(self, key: str, empty: bool = False) -> list[Table]:
        """The tables of a list, which may have none if `empty` says so."""
        found = self._take(key, list, "a list of tables")
        if not (found or empty) or not all(isinstance(value, dict) for value in found):
            raise self.error(key, "must be a list of one or more tables")
        return [Table(value, (*self._path, key, i), self._origin) for i, value in enumerate(found)]

    def end(self) -> None:
        """Everything must have been asked for."""
        for key in self._left:
            import difflib  # only where somebody mistyped

            near = difflib.get_close_matches(key, self._known, n=1)
            raise self.error(key, f"unknown key; did you mean {near[0]}?" if near else "unknown key")

    def error(self, key: str | tuple[str | int, ...], rule: str) -> ValueError:
        return self._origin.error((*self._path, *((key,) if isinstance(key, str) else key)), rule)

    def _take(self, key: str, kind: type, what: str) -> Any:
        self._known.append(key)
        if key not in self._left:
            raise self.error(key, f"missing; it must be {what}")
        value = self._left.pop(key)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(key, f"{value!r} is not {what}")
        return value
