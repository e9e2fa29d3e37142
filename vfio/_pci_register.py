"""How a register of configuration space is said: a class whose attributes are its fields.

    class Command(Register, width=2):
        memory = Bit(1)
        bus_master = Bit(2)

    class Header(Structure):
        vendor = Number(0x00, 2)
        command = Part(0x04, Command)

    header.command.bus_master = True  # one read and one write of the whole register

Offsets and widths are in bytes; everything is little-endian, as PCI has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, Self, TypeVar, overload

from vfio import errors


class Source(Protocol):
    """Bytes of configuration space, from a device (`vfio.Region`) or from a copy (`Image`)."""

    @property
    def size(self) -> int: ...
    def read(self, offset: int, length: int, /) -> bytes: ...
    def write(self, offset: int, data: bytes, /) -> None: ...


class Image:
    """A copy of configuration space.  What is written to it stays in it."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        """Raises `errors.OutsideRegion` for bytes that the copy does not have."""
        self._check(offset, length)
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        """As `read`."""
        self._check(offset, len(data))
        self.data[offset : offset + len(data)] = data

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or offset + length > self.size:
            raise errors.OutsideRegion("this copy of configuration space is too short", offset, length, self.size)


class Bits:
    """A field: `count` bits from bit `low` of a register.  `names` says what its values mean."""

    def __init__(self, low: int, count: int, names: Mapping[int, str] | None = None) -> None:
        self.low, self.ones = low, (1 << count) - 1
        self.names = names

    def __set_name__(self, owner: type[Register], name: str) -> None:
        self.name = name

    @overload
    def __get__(self, register: None, owner: type[Register]) -> Self: ...
    @overload
    def __get__(self, register: Register, owner: type[Register]) -> int: ...
    def __get__(self, register: Register | None, owner: type[Register]) -> int | Self:
        return self if register is None else self.of(register.value)

    def __set__(self, register: Register, value: int) -> None:
        if not 0 <= value <= self.ones:
            raise ValueError(f"{self.name} of {register.name}: {value} is not 0 to {self.ones}")
        register.change(self, value)

    def of(self, value: int) -> int:
        """The field in a value of its register."""
        return value >> self.low & self.ones

    def words(self, value: int) -> str:
        """The field for a person; empty where it says nothing."""
        found, name = self.of(value), self.name.replace("_", " ")
        if self.names is not None:
            return f"{name} {self.names.get(found, found)}"
        return f"{name} {found}" if found else ""


class Bit(Bits):
    """One bit."""

    def __init__(self, low: int) -> None:
        super().__init__(low, 1)

    @overload
    def __get__(self, register: None, owner: type[Register]) -> Self: ...
    @overload
    def __get__(self, register: Register, owner: type[Register]) -> bool: ...
    def __get__(self, register: Register | None, owner: type[Register]) -> bool | Self:
        return self if register is None else bool(self.of(register.value))

    def words(self, value: int) -> str:
        return self.name.replace("_", " ") if self.of(value) else ""


class Register:
    """A register of `width` bytes, read and written by one access.

    `clears` are the bits that writing a one clears: they are not set but cleared, by `clear`; assigning another field
    leaves them as they are.  Assigning a field of a read-only register is an AttributeError.
    """

    width: ClassVar[int]
    clears: ClassVar[int]
    read_only: ClassVar[bool]
    fields: ClassVar[tuple[Bits, ...]]

    def __init_subclass__(cls, width: int | None = None, clears: int = 0, read_only: bool = False) -> None:
        if width is not None:
            cls.width = width
        cls.clears, cls.read_only = clears, read_only
        named = {name: each for base in reversed(cls.__mro__) for name, each in vars(base).items()}
        cls.fields = tuple(sorted((each for each in named.values() if isinstance(each, Bits)), key=lambda b: b.low))

    def __init__(self, source: Source, offset: int, name: str) -> None:
        self._source = source
        self.offset = offset
        """From the beginning of configuration space."""
        self.name = name

    @property
    def value(self) -> int:
        """The whole register."""
        return int.from_bytes(self._source.read(self.offset, self.width), "little")

    @value.setter
    def value(self, value: int) -> None:
        self._source.write(self.offset, value.to_bytes(self.width, "little"))

    def change(self, field: Bits, value: int) -> None:
        """Set one field, and leave the others as they are."""
        mask = field.ones << field.low
        if self.read_only:
            raise AttributeError(f"{self.name} is read-only")
        if mask & self.clears:
            raise AttributeError(f"{field.name} of {self.name} is cleared by writing a one: {self.name}.clear()")
        self.value = self.value & ~self.clears & ~mask | value << field.low

    def clear(self) -> int:
        """Clear the events that the register tells, and return them."""
        found = self.value
        if not self.clears:
            raise AttributeError(f"{self.name} has nothing that can be cleared")
        self.value = found
        return found & self.clears

    def __str__(self) -> str:
        value = self.value
        return ", ".join(words for field in self.fields if (words := field.words(value)))

    def __repr__(self) -> str:
        return f"<{self.name} {self.value:#0{2 * self.width + 2}x}: {self}>"

    def as_dict(self) -> dict[str, int | bool]:
        """The whole value, and each field by its name."""
        value = self.value
        each = {f.name: bool(f.of(value)) if isinstance(f, Bit) else f.of(value) for f in self.fields}
        return {"value": value, **each}


class Line(NamedTuple):
    """One register for a person."""

    offset: int
    name: str
    value: str
    words: str


class Structure:
    """Registers that belong together: a header, or a capability.  `offset` is where it begins."""

    items: ClassVar[dict[str, Number | Part[Any]]]

    def __init_subclass__(cls) -> None:
        named = {name: each for base in reversed(cls.__mro__) for name, each in vars(base).items()}
        found = {name: each for name, each in named.items() if isinstance(each, Number | Part)}
        cls.items = dict(sorted(found.items(), key=lambda item: item[1].offset))

    def __init__(self, source: Source, offset: int) -> None:
        self.source = source
        self.offset = offset

    def has(self, name: str) -> bool:
        """Whether this one has the register: some have it only in a later version, or in some kinds of devices."""
        return True

    def present(self) -> Iterator[tuple[str, Number | Part[Any]]]:
        """The registers that there are, as far as the source goes."""
        for name, item in self.items.items():
            if self.offset + item.offset + item.width <= self.source.size and self.has(name):
                yield name, item

    def lines(self) -> Iterator[Line]:
        """Each register for a person."""
        for name, item in self.present():
            at = self.offset + item.offset
            value = int.from_bytes(self.source.read(at, item.width), "little")
            words = str(getattr(self, name)) if isinstance(item, Part) else ""
            yield Line(at, name.replace("_", " "), f"{value:#0{2 * item.width + 2}x}", words)

    def as_dict(self) -> dict[str, Any]:
        """Each register by its name: a number, or a dict of its fields."""
        found: dict[str, Any] = {}
        for name, item in self.present():
            value = getattr(self, name)
            found[name] = value.as_dict() if isinstance(item, Part) else value
        return found


class Number:
    """A register that is just a number."""

    def __init__(self, offset: int, width: int, writable: bool = False) -> None:
        self.offset, self.width, self.writable = offset, width, writable

    def __set_name__(self, owner: type[Structure], name: str) -> None:
        self.name = name

    @overload
    def __get__(self, structure: None, owner: type[Structure]) -> Self: ...
    @overload
    def __get__(self, structure: Structure, owner: type[Structure]) -> int: ...
    def __get__(self, structure: Structure | None, owner: type[Structure]) -> int | Self:
        if structure is None:
            return self
        return int.from_bytes(structure.source.read(structure.offset + self.offset, self.width), "little")

    def __set__(self, structure: Structure, value: int) -> None:
        if not self.writable:
            raise AttributeError(f"{self.name} is read-only")
        structure.source.write(structure.offset + self.offset, value.to_bytes(self.width, "little"))


R = TypeVar("R", bound=Register)


class Part(Generic[R]):
    """A register that has fields."""

    def __init__(self, offset: int, kind: type[R]) -> None:
        self.offset, self.kind = offset, kind
        self.width = kind.width

    def __set_name__(self, owner: type[Structure], name: str) -> None:
        self.name = name

    @overload
    def __get__(self, structure: None, owner: type[Structure]) -> Self: ...
    @overload
    def __get__(self, structure: Structure, owner: type[Structure]) -> R: ...
    def __get__(self, structure: Structure | None, owner: type[Structure]) -> R | Self:
        if structure is None:
            return self
        return self.kind(structure.source, structure.offset + self.offset, self.name)

    def __set__(self, structure: Structure, value: int) -> None:
        raise AttributeError(f"set a field of {self.name}, or {self.name}.value")
