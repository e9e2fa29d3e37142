"""The guest's side: runs the programs of a file, each in a process of its own, and sends their records to the host.

    python3 -m hwtests.fuzz.guest /lab/programs

The first line of the file has the facts of the target, each other line a program. What goes to the descriptor
VFIO_LAB_RECORDS are JSON lines: ``[k]`` before program k, and ``[k, records, why]`` after it, where `why` says why there
are fewer records than steps: its process died, or was ended for taking too long.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from hwtests.fuzz import setting
from hwtests.fuzz.arena import hugetlb_pages
from hwtests.fuzz.execute import Executor, Run
from hwtests.fuzz.facts import Endpoint, Facts
from hwtests.fuzz.program import Program
from vfio.backend import Backend, open_backend

_LONGEST = 30.0  # seconds that a program may take
_CAP_IPC_LOCK = 14
_CAPABILITY_VERSION_3 = 0x20080522

_CLEAN, _TOUCHED, _TRANSFERRED = "clean", "touched", "transferred"
"""How a program leaves the device: as it was, with other registers, or with other memory as well."""

_libc = ctypes.CDLL(None, use_errno=True)


class Runner:
    """Runs programs, and leaves the machine to each as the first one found it."""

    def __init__(self, backend: Backend, facts: Facts) -> None:
        self._backend = backend
        self._facts = facts
        self._edus = [each for each in facts.endpoints if each.model == "edu" and each.opens_fast]
        self._configs = {path: path.read_bytes() for path in map(_config, facts.endpoints)}

    def run(self, program: Program) -> Run:
        """Run a program in a process of its own."""
        for buffer in program.buffers:
            if buffer.page_size:
                _provide(buffer.page_size, hugetlb_pages(buffer))
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            self._child(program, writing)
        os.close(writing)
        text, status = _collect(child, reading)
        *records, end = text.split("\n")
        # Of a process that died nobody knows what it did last.
        left = end or f"transferred: it ended with status {os.waitstatus_to_exitcode(status)}"
        if left != _CLEAN:
            self._settle(memory=not left.startswith(_TOUCHED))
        return Run([json.loads(record) for record in records], left.partition(": ")[2])

    def _child(self, program: Program, writing: int) -> NoReturn:
        """Write a line for each record, and then, without an end, what state the device is left in."""
        end = _TRANSFERRED
        try:
            if program.memlock is not None:
                _limit(program.memlock)
            executor = Executor(self._backend, self._facts, program)
            for record in executor.run():
                _write(writing, json.dumps(record, separators=(",", ":")) + "\n")
            end = _TRANSFERRED if executor.transferred else _TOUCHED if executor.touched_device else _CLEAN
        except BaseException as error:
            end = f"{_TRANSFERRED}: {type(error).__name__}: {error}"
        finally:
            _write(writing, end)
            os._exit(0)  # as a process that cleans up nothing: the kernel has to

    def _settle(self, memory: bool) -> None:
        for path, before in self._configs.items():
            now = path.read_bytes()
            with path.open("r+b", buffering=0) as file:
                for at in range(0x40, len(before), 4):
                    if now[at : at + 4] != before[at : at + 4]:
                        os.pwrite(file.fileno(), before[at : at + 4], at)
        for endpoint in self._edus:
            setting.settle(self._backend, self._facts, endpoint, memory)


def _provide(page_size: int, pages: int) -> None:
    """Have that many free hugetlb pages: those that a program unregistered while they were mapped are free never again."""
    directory = Path(f"/sys/kernel/mm/hugepages/hugepages-{page_size >> 10}kB")
    all_pages, free = (int((directory / f"{name}_hugepages").read_text()) for name in ("nr", "free"))
    if free < pages:
        (directory / "nr_hugepages").write_text(str(all_pages + pages - free))


def _config(endpoint: Endpoint) -> Path:
    return Path("/sys/bus/pci/devices", endpoint.address, "config")


def _collect(child: int, reading: int) -> tuple[str, int]:
    """All that a child writes, and its status; a child that takes too long is killed."""
    end = time.monotonic() + _LONGEST
    text = b""
    while True:
        left = end - time.monotonic()
        if left <= 0:
            os.kill(child, signal.SIGKILL)
            break
        if select.select([reading], [], [], left)[0]:
            data = os.read(reading, 1 << 16)
            if not data:
                break
            text += data
    os.close(reading)
    return text.decode(), os.waitpid(child, 0)[1]


def _limit(memlock: int) -> None:
    """Take CAP_IPC_LOCK from this process, and set its RLIMIT_MEMLOCK."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (memlock, memlock))
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()
    if _libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    sets[0] &= ~(1 << _CAP_IPC_LOCK)
    if _libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def _write(descriptor: int, text: str) -> None:
    data = text.encode()
    while data:
        data = data[os.write(descriptor, data) :]


def main(path: str) -> None:
    """Run the programs of the file at `path`."""
    records = int(os.environ["VFIO_LAB_RECORDS"])

    def send(*message: object) -> None:
        _write(records, json.dumps(message, separators=(",", ":")) + "\n")

    lines = Path(path).read_text().splitlines()
    facts = Facts.from_json(json.loads(lines[0]))
    backend = open_backend("kernel:")
    setting.bind(backend, facts)
    runner = Runner(backend, facts)
    for number, line in enumerate(lines[1:]):
        send(number)
        run = runner.run(Program.loads(line))
        send(number, run.records, run.ended)


if __name__ == "__main__":
    main(sys.argv[1])
