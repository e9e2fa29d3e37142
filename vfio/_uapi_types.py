"""C structs with a typed Python face.

A struct class such as `vfio.uapi.vfio_group_status` describes its struct to people and to type checkers. What calling
it returns is cffi's own pointer to the C struct in native layout, so that reading and writing a field costs what cffi
costs and nothing more; ``isinstance`` still knows it. As with every cffi pointer, the memory lives as long as the
pointer does: a nested struct or an array taken out of it (``info.ddw``) does not keep it alive.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Self, TypeVar, cast, dataclass_transform, overload

from vfio._uapi_cffi import ffi

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = [
    "STRUCTS",
    "Array",
    "Field",
    "Struct",
    "address",
    "array_from_buffer",
    "buffer",
    "fields",
    "from_buffer",
    "offsetof",
    "sizeof",
    "struct_type",
]

T = TypeVar("T")
S = TypeVar("S", bound="Struct")

STRUCTS: dict[str, type[Struct]] = {}
"""Every struct class by the kernel's name for it."""

_KINDS = {"uint8_t": "u8", "uint16_t": "u16", "uint32_t": "u32", "int32_t": "s32", "uint64_t": "u64"}
_ROOM = "__room"  # the array that _uapi_build.py puts behind a struct with an argsz


class Array(Generic[T]):
    """For type checkers: what reading an array field gives (a cffi array, or a cffi pointer without a length)."""

    if TYPE_CHECKING:

        @overload
        def __getitem__(self, index: int) -> T: ...
        @overload
        def __getitem__(self, index: slice) -> Array[T]: ...
        def __getitem__(self, index: int | slice) -> T | Array[T]: ...
        def __setitem__(self, index: int | slice, value: object) -> None: ...
        def __iter__(self) -> Iterator[T]: ...
        def __len__(self) -> int: ...


class ArrayField(Generic[T]):
    """For type checkers: an array or pointer field. It may be set from a sequence when the struct is made."""

    if TYPE_CHECKING:

        def __get__(self, struct: object, owner: type | None = None) -> Array[T]: ...
        def __set__(self, struct: object, value: Iterable[object] | Array[T]) -> None: ...


class StructField(Generic[T]):
    """For type checkers: a nested struct, which may be set from a dict."""

    if TYPE_CHECKING:

        def __get__(self, struct: object, owner: type | None = None) -> T: ...
        def __set__(self, struct: object, value: T | Mapping[str, object]) -> None: ...


class _StructType(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, ffi.CData) and issubclass(STRUCTS.get(_struct_name(value), type), cls)


@dataclass_transform(kw_only_default=True, eq_default=False)
class Struct(metaclass=_StructType):
    """Base of the struct classes; each has the name and the fields of the kernel's struct."""

    _pointer: ClassVar[Any]  # cffi's type of a pointer to the struct
    _size: ClassVar[int]
    _has_argsz: ClassVar[bool]
    _nested: ClassVar[frozenset[str]]  # the fields that are structs
    _tail: ClassVar[tuple[str, int, int] | None]  # the array at the end: name, offset, bytes for each element

    def __init_subclass__(cls) -> None:
        ctype = ffi.typeof(f"struct {cls.__name__}")
        fields = ctype.fields
        name, last = fields[-1]
        cls._pointer = ffi.typeof(f"struct {cls.__name__} *")
        cls._size = ffi.sizeof(ctype)
        cls._has_argsz = fields[0][0] == "argsz"
        cls._nested = frozenset(name for name, field in fields if field.type.kind == "struct")
        cls._tail = (name, last.offset, ffi.sizeof(last.type.item)) if last.type.kind == "array" else None
        STRUCTS[cls.__name__] = cls

    def __new__(cls, **fields: Any) -> Self:
        """Return an owning cffi pointer to a new struct: the fields given, argsz filled in, zero elsewhere.

        A nested struct may be given as a dict. Raises TypeError for a field that the struct does not have, and
        OverflowError for a value that does not fit its field.
        """
        if cls._nested:
            fields = {name: _plain(value) if name in cls._nested else value for name, value in fields.items()}
        try:
            struct = cast(Any, ffi.new(cls._pointer, fields))
        except KeyError:
            raise TypeError(_unknown_field(cls, fields)) from None
        if cls._has_argsz and "argsz" not in fields:
            struct.argsz = ffi.sizeof(struct[0])
        return cast(Self, struct)

    @classmethod
    def sized(cls, nbytes: int, /, **fields: Any) -> Self:
        """Return a new struct with room for `nbytes` bytes in total, and argsz (where it has one) set to that.

        The room is for the array at the end of the struct and for capability chains; it is rounded up to whole
        elements of that array. Raises ValueError when `nbytes` is less than the struct, or when the struct can have
        nothing behind it.
        """
        if nbytes < cls._size:
            raise ValueError(f"struct {cls.__name__} has {cls._size} bytes: {nbytes} are too few")
        if cls._tail is None:
            if nbytes > cls._size:
                raise ValueError(f"struct {cls.__name__} has {cls._size} bytes and nothing behind them, not {nbytes}")
            return cls(**fields)
        tail, offset, item = cls._tail
        room = -(-(nbytes - offset) // item)
        content = fields.pop(tail, ())
        if len(content) > room:
            raise ValueError(f"{nbytes} bytes of struct {cls.__name__} have room for {room} {tail}, not {len(content)}")
        if cls._has_argsz:
            fields.setdefault("argsz", nbytes)
        struct = cls(**fields, **{tail: room})
        try:
            getattr(struct, tail)[0 : len(content)] = content
        except KeyError:
            raise TypeError(_unknown_field(cls, {tail: content})) from None
        return struct


def _plain(value: Any) -> Any:
    """A struct that was made on its own, in the form in which cffi nests it."""
    return value[0] if isinstance(value, ffi.CData) and ffi.typeof(value).kind == "pointer" else value


def _struct_name(struct: Any) -> str:
    """The name of the struct that a cffi object is or points to; empty for anything else."""
    ctype = ffi.typeof(struct)
    if ctype.kind == "pointer":
        ctype = ctype.item
    return str(ctype.cname).removeprefix("struct ") if ctype.kind == "struct" else ""


def _unknown_field(cls: type[Struct], fields: Mapping[str, Any]) -> str:
    """Say which of `fields` the struct, or a struct nested in it, does not have."""
    known = dict(ffi.typeof(f"struct {cls.__name__}").fields)
    for name, value in fields.items():
        if name not in known:
            names = [name for name in known if name != _ROOM]
            hint = spelt_like(name, names) or "it has " + ", ".join(names)
            return f"struct {cls.__name__} has no field {name}: {hint}"
        if name in cls._nested and isinstance(value, Mapping):
            inner = STRUCTS[known[name].type.cname.removeprefix("struct ")]
            if not value.keys() <= dict(ffi.typeof(f"struct {inner.__name__}").fields).keys():
                return _unknown_field(inner, value)
    return f"an element of the array of struct {cls.__name__} has no such field"


def spelt_like(name: str, names: Iterable[str]) -> str:
    """A question for who got a name wrong; empty when none of `names` is like it."""
    import difflib  # takes longer to import than all of this, and only a mistake needs it

    close = difflib.get_close_matches(name, names, n=3)
    return f"did you mean {' or '.join(close)}?" if close else ""


def struct_type(struct: Struct) -> type[Struct]:
    """The class that a struct was made with; for what was made elsewhere, the class of that name."""
    return STRUCTS[_struct_name(struct)]


def sizeof(what: type[Struct] | Struct) -> int:
    """Bytes of a struct: by its class without anything behind it, of one that was made with its room."""
    return what._size if isinstance(what, type) else len(buffer(what))


def offsetof(cls: type[Struct], field: str) -> int:
    """Bytes before a field; nested ones have a dotted name (``ddw.levels``). TypeError for an unknown field."""
    try:
        return ffi.offsetof(f"struct {cls.__name__}", *field.split("."))
    except KeyError:
        raise TypeError(_unknown_field(cls, {field.partition(".")[0]: {field.rpartition(".")[2]: 0}})) from None


def buffer(struct: Struct) -> memoryview:
    """The bytes of a struct, writable and including the room behind it, as ioctl wants them; keeps it alive."""
    return memoryview(ffi.buffer(_pointer_to(struct)))


def address(struct: Struct) -> int:
    """Where the struct is in this process."""
    return int(ffi.cast("uintptr_t", _pointer_to(struct)))


def _pointer_to(struct: Struct) -> Any:
    value = cast(Any, struct)
    return value if ffi.typeof(value).kind == "pointer" else ffi.addressof(value)


def from_buffer(cls: type[S], buf: ReadableBuffer, offset: int = 0) -> S:
    """See the bytes of `buf` from `offset` on as a struct, which keeps `buf` alive; nothing is copied.

    An array at the end of the struct has no known length here: read its elements with `array_from_buffer`. Fields of
    a struct over read-only bytes are not to be written. Raises ValueError when the struct reaches past the buffer.
    """
    view = memoryview(buf).cast("B")
    if not 0 <= offset <= view.nbytes - cls._size:
        raise ValueError(
            f"struct {cls.__name__} has {cls._size} bytes: none at offset {offset} of a buffer of {view.nbytes} bytes"
        )
    # cffi does not survive that the garbage collector clears a memoryview which it looks through, so there is none where
    # it can be helped: a piece of bytes, which cannot change, may as well be a copy.
    if isinstance(buf, bytes):
        return cast(S, ffi.from_buffer(cls._pointer, buf[offset:]))
    if isinstance(buf, bytearray) and offset == 0:
        return cast(S, ffi.from_buffer(cls._pointer, buf))
    return cast(S, ffi.from_buffer(cls._pointer, view[offset:]))


def array_from_buffer(cls: type[S], buf: ReadableBuffer, offset: int, count: int) -> list[S]:
    """See the bytes of `buf` from `offset` on as `count` structs, as `from_buffer` does."""
    end = offset + count * cls._size
    if not 0 <= offset <= end <= memoryview(buf).nbytes:
        raise ValueError(
            f"{count} times struct {cls.__name__} take {cls._size} bytes each: not at offset {offset} of a buffer of "
            f"{memoryview(buf).nbytes} bytes"
        )
    return [from_buffer(cls, buf, at) for at in range(offset, end, cls._size)]


class Field(NamedTuple):
    """Where a field is in its struct."""

    name: str
    """Dotted for the fields of a nested struct: ``ddw.levels``."""
    offset: int
    """From the start of the outermost struct, bytes."""
    size: int
    """Bytes; 0 for an array at the end of a struct."""
    kind: str
    """``u8`` to ``u64``, ``s32``, ``pointer``, or for an array ``u8[]``, ``s32[]``, ``vfio_iova_range[]``…"""


@functools.cache
def fields(cls: type[Struct]) -> tuple[Field, ...]:
    """The fields of a struct in order. Nested structs are taken apart; all members of a union are there."""
    return tuple(_walk(ffi.typeof(f"struct {cls.__name__}"), "", 0))


def _walk(ctype: Any, prefix: str, start: int) -> Iterator[Field]:
    for name, field in ctype.fields:
        offset, of = start + field.offset, field.type
        if of.kind == "struct":
            yield from _walk(of, f"{prefix}{name}.", offset)
        elif of.kind == "array":
            if name != _ROOM:
                item = of.item.cname.removeprefix("struct ")
                yield Field(prefix + name, offset, 0, _KINDS.get(item, item) + "[]")
        else:
            kind = "pointer" if of.kind == "pointer" else _KINDS[of.cname]
            yield Field(prefix + name, offset, ffi.sizeof(of), kind)
