"""How a VFIO request becomes a number, on this machine and on others, and a number requests.

Every VFIO request is ``_IO(VFIO_TYPE, VFIO_BASE + n)``, but what ``_IO`` makes of that differs: see `encode`. And n is
used again for every kind of file, and on containers for every IOMMU model, so that a number alone names no request.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import ioctl_opt  # type: ignore[import-untyped]

from vfio._uapi_constants import VFIO_BASE, VFIO_TYPE
from vfio._uapi_types import Struct, spelt_like

__all__ = [
    "REQUESTS",
    "Request",
    "UnknownRequest",
    "argument",
    "encode",
    "request",
    "request_info",
    "request_names",
]

# What each encoding in the kernel's asm/ioctl.h is for, by the names that uname(2) and people use. (PA-RISC swaps READ
# and WRITE, which no VFIO request has.)
_ENCODINGS = {
    "powerpc": "ppc ppcle ppc32 ppc64 ppc64le ppc64el powerpc powerpcle powerpc64 powerpc64le "
    "mips mipsel mips64 mips64el sparc sparc64 sparcv9 alpha",
    "generic": "x86_64 amd64 x86 i386 i486 i586 i686 aarch64 aarch64_be arm64 arm armhf armel armv5tel armv6l armv7l "
    "armv7hl armv8l riscv riscv32 riscv64 s390 s390x loongarch32 loongarch64 parisc parisc64 hppa m68k sh sh4 "
    "arc csky hexagon microblaze nios2 openrisc xtensa",
}
_ENCODING_OF = {machine: encoding for encoding, machines in _ENCODINGS.items() for machine in machines.split()}
_POWERPC_DIRECTIONS = {
    ioctl_opt.IOC_NONE: 1,
    ioctl_opt.IOC_READ: 2,
    ioctl_opt.IOC_WRITE: 4,
    ioctl_opt.IOC_READ | ioctl_opt.IOC_WRITE: 6,
}
_POWERPC_SIZE_BITS = 13


def encode(generic: int, machine: str | None = None) -> int:
    """Turn an ioctl number in the generic encoding, as `ioctl_opt` makes it, into that of a machine.

    PowerPC (and MIPS, SPARC, Alpha) has 13 bits for the size and 3 for the direction, with NONE = 1, READ = 2 and
    WRITE = 4 at bit 29; everywhere else it is 14 and 2 bits, with NONE = 0. Raises ValueError for an unknown machine
    and for a size that does not fit.
    """
    name = os.uname().machine if machine is None else machine
    encoding = _ENCODING_OF.get(name)
    if encoding is None:
        raise ValueError(f"no ioctl encoding known for machine {name!r}; known are {', '.join(sorted(_ENCODING_OF))}")
    if encoding == "generic":
        return generic
    size = ioctl_opt.IOC_SIZE(generic)
    if size >> _POWERPC_SIZE_BITS:
        raise ValueError(f"ioctl {generic:#x}: an argument of {size} bytes does not fit in {_POWERPC_SIZE_BITS} bits")
    low = ioctl_opt.IOC(ioctl_opt.IOC_NONE, ioctl_opt.IOC_TYPE(generic), ioctl_opt.IOC_NR(generic), size)
    return int(_POWERPC_DIRECTIONS[ioctl_opt.IOC_DIR(generic)] << 29 | low)


class Request(NamedTuple):
    """One request of ``<linux/vfio.h>``."""

    name: str
    n: int
    """Its distance from VFIO_BASE."""
    file: str
    """The kind of file that takes it: ``container``, ``group``, ``device`` or ``migration`` (a migration stream)."""
    argument: type[Struct] | None
    """The struct whose address it takes; None for any other argument."""
    takes: str
    """What its argument is: ``struct``, ``nothing``, ``value`` (an int itself), ``int*`` (the address of a 32-bit int)
    or ``string`` (the address of a NUL-terminated one)."""
    iommu: tuple[str, ...]
    """On a container: the IOMMU models that know it (``type1``, ``spapr``); empty where it does not depend on them."""


REQUESTS: dict[str, Request] = {}
"""Every request by the kernel's name for it; filled by the table in _uapi_requests.py."""


def define(name: str, n: int, file: str, takes: type[Struct] | str, iommu: str = "") -> int:
    """Enter a request in the table and return its number on this machine."""
    argument, kind = (None, takes) if isinstance(takes, str) else (takes, "struct")
    REQUESTS[name] = Request(name, n, file, argument, kind, tuple(iommu.split()))
    return _THIS_MACHINE + n


def _first(machine: str | None) -> int:
    """The number of request n = 0. The number of a request is the lowest part of every encoding, so n can be added."""
    return encode(ioctl_opt.IO(VFIO_TYPE, VFIO_BASE), machine)


_THIS_MACHINE = _first(None)


def request_info(name: str) -> Request:
    """What is known of a request, by its name; KeyError names those that are spelt like it."""
    try:
        return REQUESTS[name]
    except KeyError:
        raise UnknownRequest(name) from None


def request(name: str, machine: str | None = None) -> int:
    """The number of a request on `machine` (``x86_64``, ``ppc64le``, ``aarch64``…), or on the one that this runs on.

    ``VFIO_GET_API_VERSION`` is 0x3b64 on most machines and 0x20003b64 on PowerPC (see `encode`). Raises KeyError for
    an unknown request and ValueError for an unknown machine.
    """
    return _first(machine) + request_info(name).n


def request_names(
    number: int, machine: str | None = None, *, file: str | None = None, iommu: str | None = None
) -> tuple[str, ...]:
    """The requests that share a number on `machine`, or on the one that this runs on; empty for an unknown number.

    `file` (``container``, ``group``, ``device``, ``migration``) leaves those that this kind of file takes, and `iommu`
    (``type1``, ``spapr``) those that do not belong to another IOMMU model.
    """
    n = number - _first(machine)
    return tuple(
        each.name
        for each in REQUESTS.values()
        if each.n == n and file in (None, each.file) and (iommu is None or not each.iommu or iommu in each.iommu)
    )


def argument(name: str) -> type[Struct] | None:
    """The struct whose address a request takes; None for one that takes none. KeyError for an unknown request."""
    return request_info(name).argument


class UnknownRequest(KeyError):
    """No request of ``<linux/vfio.h>`` has this name."""

    def __str__(self) -> str:
        name = self.args[0]
        return ": ".join(filter(None, (f"no VFIO request is called {name}", spelt_like(name, REQUESTS))))
