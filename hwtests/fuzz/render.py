"""Programs and differences as people read them: steps in terms of C, with the names of <linux/vfio.h>."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hwtests.fuzz.compare import Difference
from hwtests.fuzz.execute import Record
from hwtests.fuzz.program import Operand, Program, Step
from vfio import uapi

_REGIONS = 40  # bits of an offset in a device file that are one in a region


def program(shown: Program) -> Iterator[str]:
    """A line for each buffer and step."""
    for number, buffer in enumerate(shown.buffers):
        kind = f", hugetlb pages of {buffer.page_size:#x}" if buffer.page_size else ""
        holes = "".join(
            f", page {page} {'read-only' if what == 'read' else 'PROT_NONE'}" for page, what in buffer.holes
        )
        yield f"char buffer{number}[{buffer.size:#x}];  // page-aligned{kind}{holes}"
    if shown.memlock is not None:
        yield f"setrlimit(RLIMIT_MEMLOCK, {shown.memlock:#x});  // and without CAP_IPC_LOCK"
    for each in shown.steps:
        yield step(each)


def difference(found: Difference) -> Iterator[str]:
    """The program, and the two answers to its last step."""
    yield f"seed {found.program.seed}"
    *lines, last = program(found.program.with_steps(found.program.steps[: found.at + 1]))
    yield from (f"    {line}" for line in lines)
    yield f"  > {last}"
    yield f"      real kernel: {record(found.real)}"
    yield f"      model:       {record(found.fake)}"


def record(shown: Record) -> str:
    """What a step did."""
    if "ended" in shown:
        return f"the run ended: {shown['ended']}"
    if "skipped" in shown:
        return f"not made: {shown['skipped']}"
    if "raised" in shown:
        return f"{shown['raised']}: {shown.get('message', '')}"
    parts = [f"-1 {shown['errno']}" if "errno" in shown else str(shown.get("ret"))]
    parts += [f"bytes from {at}: {data}" for at, data in shown.get("out", {}).items()]
    parts += [f"{name} {shown[name]}" for name in ("data", "buffers") if name in shown]
    return ", ".join([*parts, f"VmLck {shown.get('locked', 0)} kB"])


def step(shown: Step) -> str:
    """One step."""
    args = shown.args
    target = f"fd{args['fd']}" if "fd" in args else f"map{args['mapping'][1]}" if "mapping" in args else ""
    match shown.op:
        case "open":
            return f'fd{shown.id} = open("{args["path"]}", O_RDWR);'
        case "dup" | "eventfd":
            return f"fd{shown.id} = {shown.op}({target});"
        case "close" | "munmap" | "eventfd_read" | "eventfd_write":
            return f"{shown.op}({target});"
        case "pread":
            return f"pread({target}, buffer, {args['length']}, {_place(args['offset'])});"
        case "pwrite":
            return f"pwrite({target}, {{0x{args['data']}}}, {len(args['data']) // 2}, {_place(args['offset'])});"
        case "mmap":
            return (
                f"map{shown.id} = mmap({target}, {args['length']:#x}, {_place(args['offset'])}, prot {args['prot']});"
            )
        case "load":
            return f"{target}[{args['offset']:#x}] read by {args['width']} bytes;"
        case "store":
            return f"{target}[{args['offset']:#x}] = {args['value']:#x} by {args['width']} bytes;"
        case "dma":
            ends = (f"edu[{args['place']}]", f"iova {_operand(args['iova'])}")
            source, destination = ends if args["to"] == "memory" else ends[::-1]
            interrupt = ", then interrupt" if args.get("interrupt") else ""
            return f"{target}: DMA of {args['length']} bytes from {source} to {destination}{interrupt};"
        case "ioctl":
            return f"{f'fd{shown.id} = ' if args.get('request') == _GET_DEVICE_FD else ''}{_ioctl(target, args)};"
    return f"{shown.op} {args}"


_GET_DEVICE_FD = "VFIO_GROUP_GET_DEVICE_FD"


def _ioctl(target: str, args: dict[str, Any]) -> str:
    request = args.get("request", f"({args.get('number')})")
    how = args.get("by")
    if how == "bad":
        return f"ioctl({target}, {request}, (void *)<{args['at']}>)"
    if how == "value":
        return f"ioctl({target}, {request}, {_value(request, args.get('value', 0))})"
    if "string" in args:
        text = (
            args["string"]
            if len(args["string"]) < 80
            else f"{args['string'][:8]}... ({len(args['string'])} characters)"
        )
        shown = f'"{text}"'
    elif "int" in args:
        shown = f"&(int){{{_operand(args['int'])}}}"
    else:
        fields = [f".{name} = {_field(request, name, value)}" for name, value in args["struct"].items()]
        if tail := args.get("tail"):
            fields.append(f"then {tail}" if isinstance(tail, str) else f"then {', '.join(map(_operand, tail))}")
        if wide := args.get("wide"):
            fields.append(f"then, 64 bits each, {', '.join(map(_operand, wide))}")
        shown = f"&{{{', '.join(fields)}}}"
    where = {"end": " /* before an unreadable page */", "readonly": " /* read-only */"}.get(str(how), "")
    if "cut" in args:
        where = f" /* {args['cut']} bytes before an unreadable page */"
    return f"ioctl({target}, {request}, {shown}{where})"


def _value(request: str, value: int) -> str:
    if request in ("VFIO_SET_IOMMU", "VFIO_CHECK_EXTENSION"):
        return uapi.extension_name(value)
    return hex(value)


def _field(request: str, name: str, value: Operand) -> str:
    struct = uapi.argument(request)
    if isinstance(value, int) and struct is not None:
        if name == "flags" and 0 < value < 1 << 32:
            return "|".join(uapi.flag_names(struct, value, short=True))
        if known := uapi.value_name(struct, name, value):
            return known
    return _operand(value)


def _operand(value: Operand) -> str:
    match value:
        case int():
            return str(value) if abs(value) < 4096 else hex(value)
        case ["buffer", number, offset]:
            return f"buffer{number} + {offset:#x}" if offset >= 0 else f"buffer{number} - {-offset:#x}"
        case ["fd", step]:
            return f"fd{step}"
        case ["bad", name]:
            return f"<{name}>"
        case ["result", step, field, plus]:
            return f"result{step}.{field} + {plus:#x}"
    return str(value)


def _place(offset: int) -> str:
    region, at = offset >> _REGIONS, offset & (1 << _REGIONS) - 1
    return f"{uapi.region_name(region).removeprefix('VFIO_PCI_').removesuffix('_REGION_INDEX')} + {at:#x}"
