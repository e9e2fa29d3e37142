"""Boot a machine, run one command in it, and never leave anything behind."""

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from hwtests.lab import cpio, frames, image, overlay, qemu
from hwtests.lab.errors import LabError
from hwtests.lab.packages import Report
from hwtests.lab.targets import Target

BOOT_TIMEOUT = 120.0  # seconds until the guest reports; a boot takes 4 to 10
TIMEOUT = 300.0  # seconds for the command
_ANSWER_TIMEOUT = 10.0  # seconds that a guest has to stop its command when asked

Sink = Callable[[str, bytes], None]  # channel and payload of a frame, as it arrives


class MachineDied(LabError):
    """The machine never came up, stopped by itself, or no longer answers. The message ends with its last words."""


@dataclass
class Outcome:
    """How a command ended."""

    status: int = 0  # exit status; 128 + n after signal n; 124 when its time was up
    timed_out: bool = False
    kernel_log: str = ""  # what the kernel said while it ran
    boot_log: str = ""  # and before, if asked for
    stuck: str = ""  # what its processes were doing when its time was up
    lost: int = 0  # frames of output that the console lost
    console: list[str] = field(default_factory=list)  # last lines of the console


class Session:
    """A booted machine with its command running; a context manager that ends it.

    `deadline` (monotonic seconds) may be moved while events are read.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", errors: BinaryIO, directory: Path) -> None:
        self.deadline = time.monotonic() + BOOT_TIMEOUT
        self._process = process
        self._errors = errors
        self._directory = directory
        self._decoder = frames.Decoder()
        self._arrived: deque[tuple[str, bytes]] = deque()  # frames read but not yet handed out
        self._asked = False
        self.outcome = Outcome()

    def wait_ready(self, boot_timeout: float = BOOT_TIMEOUT) -> None:
        """Read the console until the command starts. Raises MachineDied."""
        self.deadline = time.monotonic() + boot_timeout
        for channel, payload in self._frames():
            if channel == frames.BOOT:
                self.outcome.boot_log += payload.decode("utf-8", "replace")
            elif channel == frames.READY:
                # QEMU has all that it needs: should this process be killed, no file stays behind.
                shutil.rmtree(self._directory, ignore_errors=True)
                return
        raise self._died(f"the machine did not come up in {boot_timeout:g} s")

    def run(self, sink: Sink, timeout: float) -> Outcome:
        """Pass what the command writes to `sink` until it ends; after `timeout` seconds, or past a `deadline` that
        `sink` moved, stop it. Raises MachineDied when the machine stops, or does not answer."""
        outcome = self.outcome
        self.deadline = time.monotonic() + timeout
        while True:
            for channel, payload in self._frames():
                if channel in (frames.OUTPUT, frames.ERROR, frames.RECORD):
                    sink(channel, payload)
                elif channel == frames.KERNEL:
                    outcome.kernel_log += payload.decode("utf-8", "replace")
                elif channel == frames.STUCK:
                    outcome.stuck += payload.decode("utf-8", "replace")
                elif channel == frames.EXIT:
                    outcome.status = int(payload)
                    outcome.lost = self._decoder.lost
                    outcome.console = self._decoder.console
                    return outcome
            if self._asked:
                raise self._died("the machine no longer answers")
            self.stop()

    def stop(self) -> None:
        """Ask the guest to stop its command and to say what it was doing."""
        self._asked = self.outcome.timed_out = True
        self.deadline = time.monotonic() + _ANSWER_TIMEOUT
        assert self._process.stdin is not None
        with suppress(OSError):  # if it is gone, the next read tells
            self._process.stdin.write(b"q")
            self._process.stdin.flush()

    def _frames(self) -> Iterator[tuple[str, bytes]]:
        """Frames until the deadline. Raises MachineDied when the machine stops."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while True:
            while self._arrived:
                yield self._arrived.popleft()
            if (left := self.deadline - time.monotonic()) <= 0:
                return
            if not select.select([descriptor], [], [], left)[0]:
                continue
            data = os.read(descriptor, 65536)
            if not data:
                self._process.wait()
                raise self._died("the machine stopped by itself")
            self._arrived.extend(self._decoder.feed(data))

    def _died(self, what: str) -> MachineDied:
        self._errors.seek(0)
        words = self._errors.read().decode("utf-8", "replace").strip()
        tail = "\n".join(f"  | {line}" for line in [*words.splitlines()[-10:], *self._decoder.console[-60:]])
        return MachineDied(f"{what}\n{tail}" if tail else f"{what}; its console was silent")


@dataclass(frozen=True)
class Options:
    """How to boot."""

    phbs: tuple[int, ...] | None = None  # PHBs to have, by index; None for all
    memory: int = 0  # bytes; 0 for the topology's
    append: str = ""  # added to the kernel's command line
    boot_log: bool = False  # send the kernel log of the boot as well
    extra_files: Mapping[Path, str] = field(default_factory=dict)  # host file -> absolute guest path
    lab_files: Mapping[str, str] = field(default_factory=dict)  # name below /lab in the guest -> contents


@contextmanager
def session(
    target: Target, command: Sequence[str], report: Report, options: Options | None = None
) -> Iterator[Session]:
    """Boot `target` with `command` as what it does. The machine is gone when the block ends, however it ends."""
    options = options or Options()
    pieces = overlay.for_command(command, options.extra_files, options.lab_files, options.boot_log)
    with _prepared(target, pieces, report, options, "stdio") as (words, directory), tempfile.TemporaryFile() as errors:
        report(f"booting {target.name}")
        process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            preexec_fn=_die_with_parent(),
        )
        try:
            yield Session(process, errors, directory)
        finally:
            _end(process)


def run(
    target: Target,
    command: Sequence[str],
    sink: Sink,
    report: Report,
    options: Options | None = None,
    timeout: float = TIMEOUT,
    boot_timeout: float = BOOT_TIMEOUT,
) -> Outcome:
    """Boot `target`, run `command`, and pass what it writes to `sink`. Raises LabError, of which MachineDied."""
    with session(target, command, report, options) as booted:
        booted.wait_ready(boot_timeout)
        report("")
        return booted.run(sink, timeout)


def shell(target: Target, report: Report, options: Options | None = None) -> int:
    """Boot `target` with a shell on this terminal; QEMU's exit status."""
    options = options or Options()
    columns, rows = shutil.get_terminal_size()
    welcome = f"This is {target.name}. Leave with exit, or at any time with Ctrl-A then X."
    pieces = overlay.for_shell(rows, columns, os.environ.get("TERM", "vt100"), welcome, options.extra_files)
    with _prepared(target, pieces, report, options, "mon:stdio") as (words, _), _terminal_restored():
        report(f"booting {target.name}; leave with exit, or with Ctrl-A then X")
        report("")
        process = subprocess.Popen(words, preexec_fn=_die_with_parent())
        try:
            return process.wait()
        finally:
            _end(process)


@contextmanager
def _prepared(
    target: Target, pieces: Iterable[cpio.Entry], report: Report, options: Options, serial: str
) -> Iterator[tuple[list[str], Path]]:
    """QEMU's command line, and the directory with the files of this run."""
    program = qemu.find(target.architecture)
    machine = target.machine(options.phbs)
    kernel = image.kernel(target.flavour, report)
    with tempfile.TemporaryDirectory(prefix="vfio-lab-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        initrd = directory / "initrd"
        with initrd.open("wb") as stream:
            for part in (kernel.userland, kernel.modules):
                with part.open("rb") as source:
                    shutil.copyfileobj(source, stream, 1 << 20)
            cpio.write(stream, pieces)
        drives = {}
        for address, size in qemu.drives_of(machine).items():
            drives[address] = directory / f"drive-{address}"
            with drives[address].open("wb") as stream:
                stream.truncate(size)
        roms = {}
        for address, content in qemu.roms_of(machine).items():
            roms[address] = directory / f"rom-{address}"
            roms[address].write_bytes(content)
        append = f"{target.append} {options.append}".strip()
        arguments = qemu.arguments(machine, kernel.vmlinux, initrd, drives, append, options.memory, serial, roms)
        yield [program, *arguments], directory


@contextmanager
def _terminal_restored() -> Iterator[None]:
    """QEMU makes the terminal raw, and leaves it so when it is killed."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def _die_with_parent() -> Callable[[], None]:
    """To run in the child: have the kernel kill it when this process dies, even by SIGKILL."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    set_parent_death_signal = 1

    def ask() -> None:
        prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)

    return ask


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(OSError):
                stream.close()
