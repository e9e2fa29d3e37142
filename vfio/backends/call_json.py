"""Calls as JSON, which holds enough to make the same calls anywhere."""

from __future__ import annotations

import errno
import json
import os
from typing import Any, TextIO

from vfio import uapi
from vfio.backend import FileStatus, LockedMemory
from vfio.backends.call import Argument, Call, Descriptor, Place, RequestNumber


class JsonTrace:
    """One JSON object a line: ``call``, ``args``, then ``result`` or ``errno``, ``begin`` and ``ns``.

    In ``args`` a descriptor is ``{"fd": SYMBOL}``, an address ``{"place": SYMBOL, "offset": N}``, bytes ``{"hex": …}``; a
    request is ``{"request": [NAMES], "number": N}``; the buffer of an ioctl is ``{"before": HEX, "after": HEX}`` with
    ``places`` and ``fds`` by offset, to be put in before it is replayed.

    Only where there is something to tell: ``process`` (another one made the call), ``overlaps``, ``outside``, ``layout``
    (``[OFFSET, LENGTH, RIGHTS]`` of each part of the range that begins at the address given), ``pointed_at``, ``signals``,
    ``address`` (of new memory);    see `Call`.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, call: Call) -> None:
        print(json.dumps(json_record(call)), file=self._file, flush=True)


def json_record(call: Call) -> dict[str, object]:
    """A call as `JsonTrace` tells it."""
    record: dict[str, object] = {"call": call.name, "args": [_plain(argument) for argument in call.arguments]}
    if call.error is not None:
        record["errno"] = errno.errorcode.get(call.error.errno or 0, call.error.errno)
    else:
        record["result"] = _plain(call.result)
    if call.layout:
        record["layout"] = [list(run) for run in call.layout]
    if call.pointed_at:
        record["pointed_at"] = call.pointed_at.hex()
    for name in ("process", "overlaps", "outside", "signals", "address"):
        if value := getattr(call, name):
            record[name] = value
    record["begin"] = call.begin
    record["ns"] = call.nanoseconds
    return record


def call_of(record: dict[str, Any]) -> Call:
    """The call that `json_record` told, as far as it is shown as text."""
    arguments = [_unplain(argument, record) for argument in record["args"]]
    call = Call(record["call"], tuple(arguments), result=_unplain(record.get("result"), record))
    if "errno" in record:
        number = getattr(errno, str(record["errno"]), 0)
        call.error = OSError(number, os.strerror(number))
    return call


def _unplain(value: Any, record: dict[str, Any]) -> object:
    if not isinstance(value, dict):
        return value
    if "fd" in value:
        return Descriptor(value["fd"], "")
    if "place" in value:
        return Place(value["place"], value["offset"])
    if "request" in value:
        return RequestNumber(value["number"], tuple(value["request"]))
    if "hex" in value:
        return bytes.fromhex(value["hex"])
    if "before" not in value:
        return value
    names = record["args"][1]["request"]
    return Argument(
        uapi.request_info(names[0]).argument if names else None,
        bytes.fromhex(value["before"]),
        bytes.fromhex(value["after"]),
        {int(at): Place(place["place"], place["offset"]) for at, place in value.get("places", {}).items()},
        {int(at): symbol for at, symbol in value.get("fds", {}).items()},
    )


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
