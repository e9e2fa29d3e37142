"""Calls as text: one line each, in the terms of C and of ``<linux/vfio.h>``."""

from __future__ import annotations

import errno
import json
from typing import TextIO

from vfio import uapi
from vfio.backends.call import Argument, Call, number_at


class TextTrace:
    """One line a call."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, call: Call) -> None:
        print(f"{in_c(call)} <{call.nanoseconds / 1000:.0f} us>", file=self._file, flush=True)


def in_c(call: Call) -> str:
    """The call, what it returned, and what it changed in its buffer."""
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
    return f"{call.name}({', '.join(shown)}) = {result}{changed}"


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
    value = number_at(data, each.offset, each.size)
    if each.name == "flags":
        return "|".join(uapi.flag_names(argument.struct, value, short=True)) or "0"
    if name := uapi.value_name(argument.struct, each.name, value):
        return name
    return hex(value) if each.size == 8 else str(value)
