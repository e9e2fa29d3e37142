"""Machines by URL: ``fake:power8``, ``fake:power9?page_size=65536&kernel=7.2``, ``fake:FILE.toml``.

    page_size=4096|65536     host page in bytes
    kernel=6.12|7.2          whose answers the kernel gives
    strict=0|1               0: calls that would corrupt or hang a real kernel are answered rather than raised
    freeze=0|1               0: as the lab's QEMU: no PE freezes by itself, one that is frozen goes on working, and a
                             fundamental reset does not reach the devices
    pamu_errno=0|1           0: the PAMU of fake:p4080 returns 0 for most of what it refuses, as the posted patches did
    uid=N                    of the process that has the backend; without it root, uid 0
    memlock=BYTES|unlimited  RLIMIT_MEMLOCK of the process; without it 8 MiB
    ipc_lock=0|1             CAP_IPC_LOCK of the process; without it root has it and nobody else

What the URL does not say is as the topology has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import unquote

from vfio import errors, topology
from vfio.fake.devices import UnknownModel
from vfio.fake.machine import KERNELS, Machine
from vfio.fake.process import Process

SCHEME = "fake:"
DEFAULT_MEMLOCK = 8 << 20
_HIGHEST_ID = (1 << 32) - 2


def names() -> list[str]:
    """The machines that come with the package."""
    return topology.names()


class Options(NamedTuple):
    """What a URL can say; None is for what it does not say."""

    page_size: int | None = None
    kernel: tuple[int, int] | None = None
    strict: bool | None = None
    freeze: bool | None = None
    pamu_errno: bool | None = None
    uid: int | None = None
    memlock: int | None = DEFAULT_MEMLOCK
    ipc_lock: bool | None = None


def machine(url: str) -> tuple[Machine, Process]:
    """The machine that `url` names, just booted, and the process that its backend is.

    Raises `errors.NoSuchBackend` for a machine or an option that there is not, which names those that there are, and for a
    topology that breaks a rule.
    """
    made, options = _boot(url)
    uid = options.uid or 0
    ipc_lock = uid == 0 if options.ipc_lock is None else options.ipc_lock
    return made, Process(made, uid=uid, memlock=options.memlock, ipc_lock=ipc_lock)


def machine_alone(url: str) -> Machine:
    """The machine without a process.  Raises as `machine`, and for an option that is a process's."""
    made, options = _boot(url)
    for name in ("uid", "memlock", "ipc_lock"):
        if getattr(options, name) != getattr(Options(), name):
            raise _refused(url, f"{name} is said by the programs that use a machine, not by the machine")
    return made


def _boot(url: str) -> tuple[Machine, Options]:
    name, question, query = url.removeprefix(SCHEME).partition("?")
    options = _options(url, query) if question else Options()
    try:
        described = topology.load(unquote(name))
        if options.page_size not in (None, 4096) and described.platform.name == "PC":
            raise _refused(url, "the pages of a PC have 4096 bytes")
        made = Machine(
            described,
            page_size=options.page_size or described.platform.page_size,
            kernel=options.kernel or KERNELS[described.platform.kernel],
            strict=options.strict is not False,
            freezes=options.freeze is not False,
        )
    except (topology.TopologyError, UnknownModel) as error:
        raise _refused(url, str(error)) from error
    if options.pamu_errno is not None:
        if made.pamu is None:
            raise _refused(url, f"pamu_errno is for machines with a PAMU, and {name} has none")
        made.pamu.returns_zero = not options.pamu_errno
    return made, options


def _one_of(table: dict[str, object]) -> Callable[[str], object]:
    def read(text: str) -> object:
        if text not in table:
            raise ValueError(f"one of {', '.join(table)}")
        return table[text]

    return read


def _natural(highest: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or len(text) > 20 or int(text) > highest:
            raise ValueError(f"a number, 0 to {highest}")
        return int(text)

    return read


def _bytes(text: str) -> int | None:
    if text == "unlimited":
        return None
    try:
        return _natural((1 << 64) - 1)(text)
    except ValueError:
        raise ValueError("a number of bytes, or unlimited") from None


_SWITCH: dict[str, object] = {"0": False, "1": True}
_READERS: dict[str, Callable[[str], object]] = {
    "page_size": _one_of({"4096": 4096, "65536": 65536}),
    "kernel": _one_of(dict(KERNELS)),
    "strict": _one_of(_SWITCH),
    "freeze": _one_of(_SWITCH),
    "pamu_errno": _one_of(_SWITCH),
    "uid": _natural(_HIGHEST_ID),
    "memlock": _bytes,
    "ipc_lock": _one_of(_SWITCH),
}


def _options(url: str, query: str) -> Options:
    values: dict[str, object] = {}
    for item in query.split("&"):
        name, equals, text = item.partition("=")
        if name not in _READERS:
            raise _refused(url, f"no option {name!r}; there are {', '.join(_READERS)}")
        if name in values:
            raise _refused(url, f"{name} is said twice")
        try:
            values[name] = _READERS[name](unquote(text))
        except ValueError as error:
            said = f"{name}={unquote(text)}" if equals else name
            raise _refused(url, f"{said}: {name} is {error}") from None
    return Options(**values)  # type: ignore[arg-type]


def _refused(url: str, why: str) -> errors.NoSuchBackend:
    error = errors.NoSuchBackend(url, why)
    error.remedy = f"fake:MACHINE?OPTIONS, where MACHINE is one of {', '.join(names())}, or a file: fake:./host.toml"
    return error
