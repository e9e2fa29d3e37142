"""vfio demo: the whole way to a device and back, step by step.

What it shows is what it runs: commands go through their own parsers, lines of Python are evaluated as they stand.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import io
import json
import os
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from textwrap import indent
from typing import TYPE_CHECKING, Any

import click

from vfio import assign, errors, journal, sysfs
from vfio import backend as backends
from vfio.backend import Backend
from vfio.drivers.edu import Edu
from vfio.iommu.pamu import Pamu
from vfio.iommu.spapr import Spapr
from vfio.iommu.spapr_v2 import SpaprTceV2
from vfio.iommu.type1 import Type1

from . import assignment, inventory, output
from .options import Options, common, pci_address

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_URL = "fake:power8"
_COMMANDS = {
    "list": inventory.list_devices,
    "why": inventory.why,
    "bind": assignment.bind,
    "restore": assignment.restore,
}
_FAKE = "fake:"
_HEADING, _TYPED = "bold", "cyan"  # rich's styles
_INDENT = "   "
_NAME = "<vfio demo>"
_NARROW = "an edu has 28 bits of address, unless QEMU is told -device edu,dma_mask=0xffffffffffffffff"


@click.command()
@click.argument("address", type=pci_address, required=False)
@common
def demo(options: Options, address: str | None) -> None:
    """Show the whole way to a device and back: each step, the command or the line of Python for it, and what it gives.

    List, why a device cannot be opened yet, bind its group, DMA windows, DMA through both, an interrupt, restore. The
    device is one of QEMU's edu; without --backend or VFIO_BACKEND it is one of fake:power8, a machine modelled in this
    process. On a real kernel ADDRESS has to be given: that device is bound, reset, and restored exactly, even if a step
    fails.

    \b
    Examples:
      vfio demo
      vfio demo --backend kernel: 0000:01:00.0
    """
    by_default = not (options.url or os.environ.get(backends.ENVIRONMENT))
    if by_default:
        options = replace(options, url=DEFAULT_URL)
    backend = options.backend
    address = address or _an_edu(backend)
    with _journal_of_its_own(backend):
        taken = _takes(backend, address)
        story = Story(options, address, taken)
        try:
            story.begin(by_default)
            story.tell()
        except BaseException as error:
            story.undo(error)
            raise
        finally:
            if options.json:
                output.as_json(story.as_json())


class Story:
    """The steps: for a person they are told at once, as JSON at the end."""

    def __init__(self, options: Options, address: str, taken: list[str]) -> None:
        self.options = options
        self.backend = options.backend
        self.address = address
        self.taken = taken
        """The devices that the group brings along, all of which are restored."""
        self.names: dict[str, Any] = {"backend": self.backend}
        """What the lines of Python see, and what they name."""
        self.steps: list[dict[str, Any]] = []
        self.passed = False
        self._console: Console | None = None

    def begin(self, by_default: bool) -> None:
        """Say on which kernel."""
        url = self.backend.url
        default = " (the default of the demo)" if by_default else ""
        modelled = ", a machine modelled in this process" if _is_fake(self.backend) else ""
        self._say(f"vfio demo on {url}{default}{modelled}")
        self._say(f'$ is a command, >>> is Python, where backend = vfio.open_backend("{url}")')

    def tell(self) -> None:
        """All of it.  Raises the error of the first thing that fails."""
        address, group = self.address, sysfs.group_of(self.backend, self.address)
        self.step("What is there")
        self.command("list")

        self.step(f"Why {address} cannot be opened yet")
        self.command(f"why {address}")

        others = f": {len(self.taken)} devices that the IOMMU cannot tell apart" if len(self.taken) > 1 else ""
        self.step(f"Bind its group{others}")
        self.python("import vfio; from vfio import sysfs; from vfio.drivers.edu import Edu")
        self.python(f"before, locked = sysfs.group_devices(backend, {group}), backend.locked()")
        self.command(f"bind {address} --group")

        self.step("Open it: container, group, device, and a driver for it")
        self.python(f'device = vfio.open_device("{address}", backend); edu = Edu(device)')
        self.python("device.group, device.iommu.name, edu.identify()")
        if self.names["device"].iommu.passed_over:
            self.python("device.iommu.passed_over  # why there is no better IOMMU model")
        self.python("hex(edu.invert(0x12345678))  # a register that gives back the complement", gives="0xedcba987")

        self._dma()

        self.step("An interrupt")
        self.python("vector = device.msi.enable(); edu.interrupt()")
        self.python("vector.wait(timeout=1.0)  # how often it fired", gives=1)

        self.step("Back to how it was")
        self.python("device.close()  # and all that was opened, mapped and enabled with it")
        self.command(f"restore {' '.join(self.taken)}")
        same = f"sysfs.group_devices(backend, {group}) == before, backend.locked() == locked"
        self.python(same, gives=(True, True))
        if self.backend.url.startswith(_FAKE):
            self.python("backend.leaks()", gives=[])
        self.passed = True

    def _dma(self) -> None:
        iommu = self.names["device"].iommu
        if isinstance(iommu, Spapr):
            self._windows(iommu)
        elif isinstance(iommu, Type1):
            self._ranges()
        elif isinstance(iommu, Pamu):
            self._aperture()
        else:
            self.step(f"No DMA: {iommu.name}, and nothing can be mapped")

    def _windows(self, iommu: Spapr) -> None:
        dynamic = isinstance(iommu, SpaprTceV2)
        self.step("DMA windows: the default one, and one far above 4 GiB" if dynamic else "The DMA window")
        self.python("device.iommu.windows[0]")
        self._buffer("1 << 16")
        if dynamic:
            # A PAPR guest has tables of one level, and no window that is larger than its memory.
            size = "1 << 36, levels=2" if iommu.info.levels > 1 else "1 << 28"
            self.python(f"window = device.iommu.create_window({size}); window")
            self.python("registration = device.iommu.register(buffer)  # pinned once, for both windows")

        self.step("DMA through the default window, there and back")
        self.python("low = device.iommu.map(buffer); low")
        self._there_and_back("low", "below 4 GiB")
        if dynamic:
            self.step("DMA through the 64-bit window, with the same memory")
            self.python("high = window.map(buffer, window.start + window.size // 2); high")
            self._there_and_back("high", "above 4 GiB", _NARROW)

    def _ranges(self) -> None:
        self.step("One space of IOVA: what can be mapped, and what is reserved between")
        self.python("[(hex(first), hex(last)) for first, last in device.iommu.info.ranges]")
        self._buffer("1 << 16")

        self.step("DMA, there and back")
        self.python("low = device.iommu.map(buffer); low")
        self._there_and_back("low", "below 4 GiB")
        self.step("DMA from the far end of that space, with the same memory")
        self.python("last = device.iommu.info.ranges[-1][1]")
        self.python("high = device.iommu.map(buffer, last + 1 - buffer.length); high")
        self._there_and_back("high", "above 4 GiB", _NARROW)

    def _aperture(self) -> None:
        self.step("An aperture of 64 KiB in 16 windows, each for one contiguous piece of memory")
        self.python("device.iommu.configure(size=1 << 16, windows=16)")
        self._buffer("1 << 13")
        self.python("low = device.iommu.map(buffer); low")
        self.python("banks = [device.iommu.map_msi_bank(n) for n in range(device.iommu.msi_banks)]  # for interrupts")
        self.python("[str(window) for window in device.iommu.windows[:4]]")
        self.step("DMA, there and back")
        self._there_and_back("low", "by windows")

    def _buffer(self, how: str) -> None:
        self.python(f"buffer = vfio.DmaBuffer({how}, backend=backend)")

    def _there_and_back(self, dma: str, text: str, otherwise: str = "") -> None:
        length = len(text)
        self.python(f'{dma}[0:{length}] = b"{text}"')
        moves = f"edu.load({dma}.iova, {length}); edu.store({dma}.iova + 4096, {length})"
        self.python(f"{moves}  # the device reads, and writes")
        self.python(f"{dma}[4096:{4096 + length}]", text.encode(), otherwise)

    def step(self, title: str) -> None:
        """A heading for what follows."""
        self.steps.append({"title": title, "done": []})
        self._say(f"{len(self.steps)}. {title}", _HEADING)

    def command(self, line: str) -> None:
        """Run one of the other commands, and show what it prints."""
        done = self._typed("command", f"vfio {line}", "$ ")
        name, *words = shlex.split(line)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            _COMMANDS[name].main(words, prog_name=f"vfio {name}", standalone_mode=False, obj=self.options)
        if self.options.json:
            done["result"] = json.loads(printed.getvalue())
        else:
            self._say(indent(printed.getvalue().rstrip("\n"), _INDENT))

    def python(self, line: str, gives: object = None, otherwise: str = "") -> None:
        """Run a line of Python, and show the value of its last statement as the interpreter does.

        Raises `errors.CallFailed` (EIO), with `otherwise` as the remedy, where the value is not what it `gives`.
        """
        done = self._typed("python", line, ">>> ")
        *first, last = ast.parse(line).body
        value = None
        if isinstance(last, ast.Expr):
            exec(compile(ast.Module(first, []), _NAME, "exec"), self.names)
            value = eval(compile(ast.Expression(last.value), _NAME, "eval"), self.names)
        else:
            exec(line, self.names)
        if value is not None:
            done["result"] = repr(value)
            self._say(indent(repr(value), _INDENT))
        if gives is not None and value != gives:
            what = f"the demo failed at step {len(self.steps)}"
            raise errors.CallFailed(errno.EIO, what, f"{line} gives {value!r}, not {gives!r}", otherwise)

    def undo(self, error: BaseException) -> None:
        """Close and restore, wherever the story stopped.  Raises `errors.NotPutBack` if that fails too."""
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(assign.restore, self.taken, backend=self.backend)
                if "device" in self.names:
                    stack.callback(self.names["device"].close)
        except OSError as failure:
            if isinstance(error, OSError):
                failures = getattr(failure, "failures", [(self.address, failure)])
                raise errors.NotPutBack(error, failures) from error
            raise
        if not self.options.json:
            output.note(f"stopped at step {len(self.steps)}, and undone: {', '.join(self.taken)} as before")

    def as_json(self) -> dict[str, Any]:
        """The steps as data: what commands print with --json, and the repr of what Python gives."""
        return {"backend": self.backend.url, "address": self.address, "passed": self.passed, "steps": self.steps}

    def _typed(self, kind: str, line: str, prompt: str) -> dict[str, Any]:
        done = {kind: line, "result": None}
        self.steps[-1]["done"].append(done)
        self._say(_INDENT + prompt + line, _TYPED)
        return done

    def _say(self, text: str = "", style: str = "") -> None:
        if self.options.json:
            return
        if self._console is None:
            from rich.console import Console  # 50 ms that other commands do not wait for

            self._console = Console(markup=False, highlight=False, emoji=False)
        self._console.print(text, style=style, soft_wrap=True)


def _is_fake(backend: Backend) -> bool:
    return backend.unwrapped().url.startswith(_FAKE)


def _is_edu(device: sysfs.PciDevice) -> bool:
    return (device.vendor, device.device) == Edu.ID


def _an_edu(backend: Backend) -> str:
    """The first edu of a modelled machine; elsewhere the user has to say which device may be taken."""
    if not _is_fake(backend):
        raise click.UsageError(
            f"on {backend.url!r} say which device: the ADDRESS of an edu, which is bound to vfio-pci, reset and restored"
        )
    for device in sysfs.devices(backend):
        if _is_edu(device):
            return device.address
    raise errors.CallFailed(
        errno.ENODEV,
        "nothing to show the way with",
        f"{backend.url} has no edu device",
        f"leave out --backend and VFIO_BACKEND: then it is {DEFAULT_URL}",
    )


def _takes(backend: Backend, address: str) -> list[str]:
    """The devices that binding this one's group takes, if all of it can be undone by restoring them."""
    device = sysfs.device(backend, address)
    what = f"cannot show the way with {address}"
    if not _is_edu(device):
        raise errors.CallFailed(
            errno.ENODEV,
            what,
            f"it is {device.vendor:04x}:{device.device:04x}, and no edu (1234:11e8)",
            f"vfio selftest {address} --bind tests any device",
        )
    members = [device] if device.group is None else sysfs.group_devices(backend, device.group)
    known = journal.load(backend).devices
    for each in members:
        if each.on_vfio or each.address in known:
            raise errors.CallFailed(
                errno.EBUSY,
                what,
                f"{each.address} is assigned already, and the way begins before that",
                f"vfio restore {each.address}  (or test it as it is: vfio selftest {address})",
            )
    planned = assign.bind([address], whole_group=True, dry_run=True, backend=backend)
    return [move.device.address for move in planned.moves]


@contextlib.contextmanager
def _journal_of_its_own(backend: Backend) -> Iterator[None]:
    """Nothing on the disk outlives a modelled machine, and no other process sees it: nor shall it see its journal."""
    if not _is_fake(backend):
        yield
        return
    before = os.environ.get(journal.DIRECTORY)
    with tempfile.TemporaryDirectory(prefix="vfio-demo-") as directory:
        os.environ[journal.DIRECTORY] = directory
        try:
            yield
        finally:
            os.environ.pop(journal.DIRECTORY)
            if before is not None:
                os.environ[journal.DIRECTORY] = before


COMMANDS = (demo,)
