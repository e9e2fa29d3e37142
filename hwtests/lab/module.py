"""VFIO's core module with options that Debian's kernels are built without.

Built out of the kernel's tree, from Debian's source and against its headers, with this host's compiler. What the module
offers has the checksums that the packaged one has, so that Debian's other modules load beside it.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from hwtests.lab.errors import LabError
from hwtests.lab.packages import Archive, Report, unpack

NAME = "vfio"
RECIPE = 1
"""Counted up when what is built here changes."""

_MACHINE = "x86_64"
_NEEDS = {"gcc": "gcc", "make": "make", "strip": "binutils", "tar": "tar", "xz": "xz-utils"}
_DIRECTORY = "drivers/vfio"
# What only the packaged kernel's compiler can, and parts of the directory that stay as they are packaged.
_OFF = (
    "CC_HAS_MIN_FUNCTION_ALIGNMENT",
    "DEBUG_INFO_BTF_MODULES",
    "VFIO_CDX",
    "VFIO_FSL_MC",
    "VFIO_IOMMU_TYPE1",
    "VFIO_MDEV",
    "VFIO_PCI_CORE",
    "VFIO_PLATFORM_BASE",
)
_ELF = b"\x7fELF"
_TIMEOUT = 600  # seconds; it takes about 10


def build(archive: Archive, release: str, options: Sequence[str], scratch: Path, report: Report) -> bytes:
    """vfio.ko for the kernel `release` with these options (without CONFIG_) on. Raises LabError."""
    if os.uname().machine != _MACHINE:
        raise LabError(f"a kernel's module is built with the kernel's own tools, for {_MACHINE}: not on this host")
    if missing := [package for program, package in _NEEDS.items() if shutil.which(program) is None]:
        raise LabError(f"building a kernel's module needs {', '.join(missing)}: apt install {' '.join(missing)}")
    headers, source = _unpacked(archive, release, scratch)
    report(f"building {NAME}.ko of {release} with {', '.join(options)}")
    settings = {**dict.fromkeys(_OFF, ""), **dict.fromkeys(options, "y")}
    make: list[str | Path] = ["make", "-C", headers, f"M={source}", "CC=gcc", f"-j{os.cpu_count()}"]
    make += [f"CONFIG_{option}={value}" for option, value in settings.items()]
    _run([*make, "KCFLAGS=" + " ".join(f"-DCONFIG_{option}=1" for option in options), "modules"])
    _check(_checksums(source / "Module.symvers"), _checksums(headers / "Module.symvers"), release)
    module = source / f"{NAME}.ko"
    _run(["strip", "--strip-debug", module])
    return module.read_bytes()


def _unpacked(archive: Archive, release: str, scratch: Path) -> tuple[Path, Path]:
    """The headers' directory, with tools that run on any host, and that of the module's source."""
    version, abi = ".".join(release.split(".")[:2]), release.rpartition("-")[0]
    try:
        for name in (f"linux-headers-{release}", f"linux-headers-{abi}-common", f"linux-kbuild-{abi}"):
            unpack(archive.fetch(name), scratch)
    except LabError as error:
        raise LabError(f"{error}\nif the mirror has a newer kernel by now: build --refresh") from error
    for name in ("libc6", f"linux-source-{version}"):
        unpack(archive.fetch(name), scratch)
    headers = scratch / "usr" / "src" / f"linux-headers-{release}"
    makefile = headers / "Makefile"
    makefile.write_text(makefile.read_text().replace("include /usr/", f"include {scratch}/usr/"))
    _wrap(scratch / "usr" / "lib" / f"linux-kbuild-{abi}", scratch / "usr" / "lib" / f"{_MACHINE}-linux-gnu")
    tree = f"linux-source-{version}"
    tar = scratch / "usr" / "src" / f"{tree}.tar.xz"
    _run(["tar", "-C", scratch, "-xf", tar, "--use-compress-program", "xz -T0", f"{tree}/{_DIRECTORY}"])
    tar.unlink()
    return headers, scratch / tree / _DIRECTORY


def _wrap(tools: Path, libraries: Path) -> None:
    """Run the kernel's tools with the C library of their own suite: this host's may be older."""
    loader = libraries / "ld-linux-x86-64.so.2"
    for tool in [path for path in tools.rglob("*") if path.is_file() and not path.is_symlink()]:
        with tool.open("rb") as stream:
            if stream.read(len(_ELF)) != _ELF:
                continue
        moved = tool.rename(tool.with_name(f"{tool.name}.elf"))
        tool.write_text(f'#!/bin/sh\nexec {loader} --library-path {libraries} --argv0 "$0" {moved} "$@"\n')
        tool.chmod(0o755)


def _checksums(table: Path) -> dict[str, str]:
    """The checksum of every symbol that the module exports."""
    lines = (line.split("\t") for line in table.read_text().splitlines())
    return {symbol: checksum for checksum, symbol, module, *_ in lines if module.rpartition("/")[2] == NAME}


def _check(built: Mapping[str, str], packaged: Mapping[str, str], release: str) -> None:
    """Other modules find in the new one what they were built for. Raises LabError."""
    if wrong := sorted(symbol for symbol in packaged if built.get(symbol) != packaged[symbol]):
        raise LabError(f"{NAME}.ko as built here does not fit {release}: {', '.join(wrong)} differ")


def _run(command: Sequence[str | Path]) -> None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{command[0]}: no end after {_TIMEOUT} s") from error
    if done.returncode:
        said = (done.stdout + done.stderr).splitlines()[-15:]
        raise LabError(f"{command[0]} failed with status {done.returncode}:\n" + "\n".join(said))
