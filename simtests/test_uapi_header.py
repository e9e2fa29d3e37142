"""vfio.uapi against ``<linux/vfio.h>`` itself: what the header says, and what C compilers make of it.

The names come out of the header's text and the values out of compilers, one for this machine and one for ppc64le, so
that whatever the header has and we lack is reported by its name. The header is that of the directory named by
VFIO_LINUX_HEADERS, else of the lab's own suite, else the host's. Nothing is run but compilers.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from pycparser import CParser, c_ast

from vfio import uapi

pytestmark = pytest.mark.headers

NEEDED = (6, 12)
TYPES = "__u8 __u16 __u32 __s32 __u64 __aligned_u64"
COMPILERS = {"native": (("gcc", "cc"), "gcc"), "ppc64le": (("powerpc64le-linux-gnu-gcc",), "gcc-powerpc64le-linux-gnu")}
MACHINES = {"native": os.uname().machine, "ppc64le": "ppc64le"}


# What the header says


class Header(NamedTuple):
    """The names of a header and what its text tells of them."""

    structs: dict[str, list[tuple[str, str]]]
    """The fields of each struct, nested ones taken apart: (dotted name, kind as in `uapi.Field`)."""
    numbers: set[str]
    """Macros and enumerators that have a value."""
    strings: dict[str, str]
    requests: set[str]
    functions: set[str]
    """Macros with one parameter."""
    flags: dict[str, set[str]]
    """The single-bit macros written inside each struct."""

    @property
    def constants(self) -> set[str]:
        return self.numbers | set(self.strings) | self.requests | self.functions


def read_header(text: str) -> Header:
    """Find every name in the text of a header. There are no conditions in <linux/vfio.h> but its include guard."""
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL).replace("\\\n", " ")
    guard = re.findall(r"^\s*#\s*ifndef\s+(\w+)", text, re.MULTILINE)
    macros = re.findall(r"^\s*#\s*define\s+(\w+)(\(\w+\))?[ \t]*(.*?)\s*$", text, re.MULTILINE)
    code = "".join(f"typedef int {name};\n" for name in TYPES.split()) + re.sub(
        r"^\s*#.*$", "", text, flags=re.MULTILINE
    )
    declared = {node.name: node for node in _declared(CParser().parse(code), c_ast.Struct) if node.name and node.decls}
    header = Header({}, set(), {}, set(), set(), {})
    for name, struct in declared.items():
        header.structs[name] = list(_fields(struct, declared, ""))
    for node in _declared(CParser().parse(code), c_ast.Enumerator):
        header.numbers.add(node.name)
    for name, parameter, body in macros:
        if name in guard:
            continue
        if parameter:
            header.functions.add(name)
        elif body.startswith('"'):
            header.strings[name] = ast.literal_eval(body)
        elif re.match(r"_IO[RW]*\(", body):
            header.requests.add(name)
        else:
            header.numbers.add(name)
    for name, body in re.findall(r"^struct (\w+) \{\n(.*?)^\};", text, re.MULTILINE | re.DOTALL):
        header.flags[name] = set(re.findall(r"#\s*define\s+(\w+)\s+\(1 << \d+\)", body))
    return header


def _declared(node: c_ast.Node, kind: type) -> Iterator[c_ast.Node]:
    if isinstance(node, kind):
        yield node
    for _, child in node.children():
        yield from _declared(child, kind)


def _fields(struct: c_ast.Node, declared: dict[str, c_ast.Node], prefix: str) -> Iterator[tuple[str, str]]:
    for field in struct.decls:
        of = field.type.type if isinstance(field.type, c_ast.TypeDecl) else field.type
        if field.name is None:
            yield from _fields(of, declared, prefix)
        elif isinstance(of, c_ast.Struct):
            yield from _fields(declared[of.name], declared, f"{prefix}{field.name}.")
        elif isinstance(of, c_ast.ArrayDecl):
            item = of.type.type
            yield prefix + field.name, (item.name if isinstance(item, c_ast.Struct) else _kind(item)) + "[]"
        else:
            yield prefix + field.name, "pointer" if isinstance(of, c_ast.PtrDecl) else _kind(of)


def _kind(of: c_ast.Node) -> str:
    return str(of.names[0]).removeprefix("__").removeprefix("aligned_")


# What we say


def our_constants() -> set[str]:
    return {name for name in vars(uapi) if name.startswith("VFIO_")}


def our_fields(name: str) -> list[tuple[str, str]]:
    return [(field.name, field.kind) for field in uapi.fields(uapi.STRUCTS[name])]


def differences(header: Header) -> list[str]:
    """Every name that only one side has, and every field that differs in kind or place."""
    found = [f"the header has {name}, vfio.uapi has not" for name in sorted(header.constants - our_constants())]
    found += [f"vfio.uapi has {name}, the header has not" for name in sorted(our_constants() - header.constants)]
    found += [
        f"the header has struct {name}, vfio.uapi has not" for name in sorted(header.structs - uapi.STRUCTS.keys())
    ]
    found += [
        f"vfio.uapi has struct {name}, the header has not" for name in sorted(uapi.STRUCTS.keys() - header.structs)
    ]
    for name in sorted(header.structs.keys() & uapi.STRUCTS.keys()):
        theirs, ours = header.structs[name], our_fields(name)
        found += [
            f"the header has {kind} {name}.{field}, vfio.uapi has not"
            for field, kind in theirs
            if (field, kind) not in ours
        ]
        found += [
            f"vfio.uapi has {kind} {name}.{field}, the header has not"
            for field, kind in ours
            if (field, kind) not in theirs
        ]
        if theirs != ours and sorted(theirs) == sorted(ours):
            found.append(f"struct {name} has its fields in another order")
    return found


# Where the header is


def header_directory() -> Path:
    """The include directory with the header, or a failure that says how to get one."""
    tried = []
    if named := os.environ.get("VFIO_LINUX_HEADERS"):
        candidates = [("VFIO_LINUX_HEADERS", named)]
    else:
        lab = subprocess.run(
            [sys.executable, "-m", "hwtests.lab", "headers"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent.parent,
            timeout=600,
        )
        if lab.returncode:
            tried.append(f"python -m hwtests.lab headers: {lab.stderr.strip().splitlines()[-1:]}")
        candidates = [("the lab", lab.stdout.strip())] if lab.returncode == 0 else [("the host", "/usr/include")]
    for whose, name in candidates:
        version = header_version(Path(name))
        if version and version >= NEEDED and (Path(name) / "linux" / "vfio.h").exists():
            return Path(name)
        tried.append(f"{name} ({whose}): " + ("Linux {}.{}".format(*version) if version else "no linux/version.h"))
    pytest.fail(
        "no <linux/vfio.h> of Linux 6.12 or later; tried "
        + "; ".join(tried)
        + ". Set VFIO_LINUX_HEADERS to the include "
        "directory of Debian trixie's linux-libc-dev (or of make headers_install), or run python -m hwtests.lab headers"
    )


def header_version(directory: Path) -> tuple[int, int] | None:
    try:
        code = re.search(r"LINUX_VERSION_CODE (\d+)", (directory / "linux" / "version.h").read_text())
    except OSError:
        return None
    return (int(code[1]) >> 16, int(code[1]) >> 8 & 0xFF) if code else None


@pytest.fixture(scope="session")
def directory() -> Path:
    return header_directory()


@pytest.fixture(scope="session")
def header(directory: Path) -> Header:
    return read_header((directory / "linux" / "vfio.h").read_text())


# What compilers make of it


class Compiler(NamedTuple):
    """A C compiler, asked for the values of constant expressions by having it print them as assembly."""

    machine: str
    command: tuple[str, ...]

    def values(self, expressions: list[str]) -> list[int]:
        lines = [f'asm volatile("\\n->{n} %0" :: "i"((long long)({text})));' for n, text in enumerate(expressions)]
        source = "#include <linux/vfio.h>\nvoid values(void) {\n" + "\n".join(lines) + "\n}\n"
        done = subprocess.run(
            [*self.command, "-S", "-w", "-x", "c", "-o", "-", "-"], input=source, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{' '.join(self.command)}:\n{done.stderr}"
        found = {int(n): int(value) for n, value in re.findall(r"^->(\d+) [$#]?(-?\d+)$", done.stdout, re.MULTILINE)}
        return [found[n] for n in range(len(expressions))]


@pytest.fixture(scope="session", params=COMPILERS)
def compiler(request: pytest.FixtureRequest, directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    return find_compiler(request.param, directory, tmp_path_factory.mktemp("include"))


def find_compiler(which: str, directory: Path, scratch: Path) -> Compiler:
    commands, package = COMPILERS[which]
    program = next(filter(None, map(shutil.which, commands)), None)
    if program is None:
        pytest.fail(f"no {commands[0]}: install a C compiler for {which} (Debian: apt install {package})")
    asked = subprocess.run([program, "-print-multiarch"], capture_output=True, text=True)
    multiarch = directory / (asked.stdout.strip() or "-")
    if (multiarch / "asm").is_dir():
        return Compiler(MACHINES[which], (program, "-nostdinc", f"-I{directory}", f"-I{multiarch}"))
    # Without that machine's <asm/...> beside it: the header alone, and the rest from where the compiler looks anyway.
    (scratch / "linux").mkdir()
    shutil.copy(directory / "linux" / "vfio.h", scratch / "linux")
    return Compiler(MACHINES[which], (program, f"-I{scratch}"))


# The tests


def test_uapi_has_exactly_the_names_and_fields_of_the_header(header):
    found = differences(header)
    assert not found, "\n".join(found)


def test_every_constant_has_the_value_that_the_compiler_gives_it(header, compiler):
    names = sorted(header.numbers)
    theirs = dict(zip(names, compiler.values(names), strict=True))
    ours = {name: getattr(uapi, name) for name in names}
    assert ours == {name: value & 0xFFFFFFFF for name, value in theirs.items()}


def test_every_string_is_that_of_the_header(header):
    assert {name: getattr(uapi, name) for name in header.strings} == header.strings


def test_every_request_has_the_number_that_the_compiler_gives_it(header, compiler):
    names = sorted(header.requests)
    theirs = dict(zip(names, compiler.values(names), strict=True))
    assert {name: uapi.request(name, compiler.machine) for name in uapi.REQUESTS} == theirs


def test_encoding_moves_size_and_direction_as_the_compiler_does(compiler):
    generic = {"_IO(1, 2)": 0x102, "_IOR(1, 2, int)": 0x80040102, "_IOW(1, 2, char[8191])": 0x5FFF0102}
    generic["_IOWR(255, 255, struct vfio_eeh_pe_op)"] = 0xC028FFFF
    theirs = [value & 0xFFFFFFFF for value in compiler.values(list(generic))]
    assert [uapi.encode(number, compiler.machine) for number in generic.values()] == theirs


def test_every_macro_with_a_parameter_answers_as_the_compiler_does(header, compiler):
    for name in header.functions:
        theirs = compiler.values([f"{name}({state})" for state in range(16)])
        assert [int(getattr(uapi, name)(state)) for state in range(16)] == theirs, name


def test_every_struct_has_the_size_that_the_compiler_gives_it(header, compiler):
    names = sorted(header.structs)
    theirs = dict(zip(names, compiler.values([f"sizeof(struct {name})" for name in names]), strict=True))
    assert {name: uapi.sizeof(cls) for name, cls in uapi.STRUCTS.items()} == theirs


def test_every_field_is_where_the_compiler_puts_it(header, compiler):
    asked = [(name, field, kind) for name, fields in header.structs.items() for field, kind in fields]
    places = compiler.values([f"__builtin_offsetof(struct {name}, {field})" for name, field, _ in asked])
    sizes = compiler.values(
        ["0" if kind.endswith("[]") else f"sizeof(((struct {name} *)0)->{field})" for name, field, kind in asked]
    )
    theirs = [
        (f"{name}.{field}", place, size, kind)
        for (name, field, kind), place, size in zip(asked, places, sizes, strict=True)
    ]
    ours = [(f"{name}.{field[0]}", *field[1:]) for name in header.structs for field in uapi.fields(uapi.STRUCTS[name])]
    assert ours == theirs
    assert [uapi.offsetof(uapi.STRUCTS[name], field) for name, field, _ in asked] == places


def test_every_array_has_elements_of_the_size_that_the_compiler_gives_them(header, compiler):
    for name, fields in header.structs.items():
        field, kind = fields[-1]
        if kind.endswith("[]"):
            size, item = compiler.values([f"sizeof(struct {name})", f"sizeof(((struct {name} *)0)->{field}[0])"])
            assert uapi.sizeof(uapi.STRUCTS[name].sized(size + 3 * item)) == size + 3 * item
            assert len(getattr(uapi.STRUCTS[name].sized(size + 3 * item), field)) == 3, f"{name}.{field}"


def test_flag_names_know_every_flag_that_the_header_puts_in_a_struct(header):
    for name, flags in header.flags.items():
        if name != "vfio_device_migration_info":  # the bits there are states
            assert names_of_flags(name) == flags, name


def names_of_flags(name: str) -> set[str]:
    first = 16 if name == "vfio_device_feature" else 0  # below are the numbers of features, which come first
    found = [uapi.flag_names(uapi.STRUCTS[name], 1 << bit)[first // 16 :] for bit in range(first, 64)]
    return {flag for flags in found for flag in flags if not flag.startswith("0x")}


# The checks themselves

SMALL = """
#ifndef SMALL_H
#define SMALL_H /* a comment with #define VFIO_NOT_THIS 1 in it */
#define VFIO_NEW 1
#define VFIO_NEW_STRING "new"
#define VFIO_NEW_REQUEST _IO(VFIO_TYPE, \\
                             VFIO_BASE + 99)
#define VFIO_NEW_FUNCTION(x) (x)
enum { VFIO_NEW_ENUMERATOR = 4 };
struct vfio_new { __u32 argsz; };
struct vfio_group_status {
    __u32 argsz;
#define VFIO_NEW_FLAG (1 << 4)
    __s32 flags;
    union { __u8 one; struct vfio_new other; };
    __u64 *bits;
    struct vfio_new more[];
};
#endif
"""


def test_header_is_read_to_the_last_name():
    small = read_header(SMALL)
    assert small.constants == {
        "VFIO_NEW",
        "VFIO_NEW_STRING",
        "VFIO_NEW_REQUEST",
        "VFIO_NEW_FUNCTION",
        "VFIO_NEW_ENUMERATOR",
        "VFIO_NEW_FLAG",
    }
    assert small.strings == {"VFIO_NEW_STRING": "new"}
    assert small.flags["vfio_group_status"] == {"VFIO_NEW_FLAG"}
    assert small.structs["vfio_group_status"] == [
        ("argsz", "u32"),
        ("flags", "s32"),
        ("one", "u8"),
        ("other.argsz", "u32"),
        ("bits", "pointer"),
        ("more", "vfio_new[]"),
    ]


def test_name_that_only_one_side_has_is_reported():
    found = differences(read_header(SMALL))
    assert "the header has VFIO_NEW_ENUMERATOR, vfio.uapi has not" in found
    assert "the header has struct vfio_new, vfio.uapi has not" in found
    assert "the header has s32 vfio_group_status.flags, vfio.uapi has not" in found
    assert "vfio.uapi has u32 vfio_group_status.flags, the header has not" in found
    assert "vfio.uapi has VFIO_BASE, the header has not" in found
    assert "vfio.uapi has struct vfio_eeh_pe_op, the header has not" in found


def test_old_header_fails_with_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "linux").mkdir()
    (tmp_path / "linux" / "version.h").write_text(f"#define LINUX_VERSION_CODE {6 << 16 | 1 << 8}\n")
    monkeypatch.setenv("VFIO_LINUX_HEADERS", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match=r"Linux 6\.1\. Set VFIO_LINUX_HEADERS"):
        header_directory()


def test_missing_compiler_fails_with_the_package_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(pytest.fail.Exception, match="apt install gcc-powerpc64le-linux-gnu"):
        find_compiler("ppc64le", tmp_path, tmp_path)
