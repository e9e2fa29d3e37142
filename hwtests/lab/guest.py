"""The guest's side: started by /init, runs the command, and reports on the console in frames.

The host may write one letter to the console: `q` stops the command and tells what it was doing.
"""

import contextlib
import fcntl
import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

from hwtests.lab import frames

_DRAIN = 0.3  # seconds of silence after which a background process no longer keeps the output open
_ABORT = 1.0  # seconds that programs have to die of SIGABRT
_EXIT_STOPPED = 124  # status of a command that the host stopped, as timeout(1) has it
# <linux/random.h>: powerpc encodes a write as 4, most others as 1.
_RNDADDENTROPY = 0x80085203 if os.uname().machine.startswith("ppc") else 0x40085203


class Agent:
    """Runs one command."""

    def __init__(self, plan: dict[str, object]) -> None:
        self._plan = plan
        self._encoder = frames.Encoder()
        self._console = os.open("/dev/console", os.O_RDWR | os.O_NOCTTY)
        self._log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        self._stopped = False

    def run(self) -> None:
        boot = self._kernel_log()
        if self._plan["boot_log"]:
            self._send(frames.BOOT, boot)
        self._send(frames.READY, b"")
        status = self._command()
        self._send(frames.KERNEL, self._kernel_log())
        self._send(frames.EXIT, str(status).encode())

    def _command(self) -> int:
        streams = {}
        for channel in (frames.OUTPUT, frames.ERROR, frames.RECORD):
            streams[channel] = os.pipe()
        records = streams[frames.RECORD][1]
        try:
            process = subprocess.Popen(
                [str(word) for word in self._plan["command"]],  # type: ignore[attr-defined]
                stdin=subprocess.DEVNULL,
                stdout=streams[frames.OUTPUT][1],
                stderr=streams[frames.ERROR][1],
                pass_fds=[records],
                env={**_environment(), "VFIO_LAB_RECORDS": str(records)},
                start_new_session=True,
            )
        except OSError as error:
            self._send(frames.ERROR, f"{error.filename}: {error.strerror}\n".encode())
            return 127 if isinstance(error, FileNotFoundError) else 126
        selector = selectors.DefaultSelector()
        for channel, (reading, writing) in streams.items():
            os.close(writing)
            selector.register(reading, selectors.EVENT_READ, channel)
        ended = os.pidfd_open(process.pid)
        selector.register(ended, selectors.EVENT_READ, "ended")
        selector.register(self._console, selectors.EVENT_READ, "host")
        self._forward(selector, process)
        status = process.wait()
        if self._stopped:
            return _EXIT_STOPPED
        return 128 - status if status < 0 else status

    def _forward(self, selector: selectors.BaseSelector, process: "subprocess.Popen[bytes]") -> None:
        """Pass everything on until the command has ended and its streams are closed, or silent."""
        open_streams, quiet_until = 3, None
        while open_streams:
            events = selector.select(None if quiet_until is None else max(0.0, quiet_until - time.monotonic()))
            if not events:
                return
            for key, _ in events:
                if key.data == "ended":
                    selector.unregister(key.fileobj)
                    quiet_until = time.monotonic() + _DRAIN
                elif key.data == "host":
                    if b"q" in os.read(self._console, 64):
                        self._stop(process)
                elif data := os.read(int(key.fd), frames.PAYLOAD):
                    self._send(key.data, data)
                    if quiet_until is not None:
                        quiet_until = time.monotonic() + _DRAIN
                else:
                    selector.unregister(key.fileobj)
                    open_streams -= 1

    def _stop(self, process: "subprocess.Popen[bytes]") -> None:
        self._stopped = True
        self._send(frames.STUCK, _processes(process.pid).encode())
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGABRT)  # Python programs tell where they are (PYTHONFAULTHANDLER)
            time.sleep(_ABORT)
            os.killpg(process.pid, signal.SIGKILL)

    def _kernel_log(self) -> bytes:
        """The kernel messages that were not read before."""
        lines = []
        while True:
            try:
                record = os.read(self._log, 8192).decode("utf-8", "replace")
            except BlockingIOError:
                break
            except BrokenPipeError:  # overwritten before it was read: the next read gets the oldest that is left
                continue
            head, _, text = record.partition(";")
            lines.append(f"[{int(head.split(',')[2]) / 1e6:12.6f}] {text.splitlines()[0]}\n")
        return "".join(lines).encode()

    def _send(self, channel: str, payload: bytes) -> None:
        for start in range(0, max(1, len(payload)), frames.PAYLOAD):
            line = self._encoder.encode(channel, payload[start : start + frames.PAYLOAD])
            while line:
                line = line[os.write(self._console, line) :]


def _environment() -> dict[str, str]:
    """Ours, without what /init set for this program alone."""
    return {**{k: v for k, v in os.environ.items() if k != "PYTHONHASHSEED"}, "PYTHONFAULTHANDLER": "1"}


def _seed_random(seed: bytes) -> None:
    """Give the kernel the host's random bytes: a bare machine without any would stop for two seconds at the first
    program that asks."""
    with open("/dev/urandom", "wb") as device:
        fcntl.ioctl(device, _RNDADDENTROPY, struct.pack("ii", 8 * len(seed), len(seed)) + seed)


def _processes(session: int) -> str:
    """What every process of a session is doing: its command and where in the kernel it waits."""
    text = ""
    for directory in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            if os.getsid(int(directory.name)) != session:
                continue
            command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            state = (directory / "stat").read_text().rpartition(")")[2].split()[0]
            stack = (directory / "stack").read_text()
        except OSError:
            continue
        text += f"{directory.name} ({state}) {command}\n" + "".join(f"    {line}\n" for line in stack.splitlines())
    return text


if __name__ == "__main__":
    plan = json.loads(Path(sys.argv[1]).read_text())
    _seed_random(bytes.fromhex(plan["seed"]))
    Agent(plan).run()
