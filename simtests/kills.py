"""Programs that are killed in the middle of anything, one after the other, on one served machine.

    python -m simtests.kills 1000

Each does all that a program can do, in a loop, until SIGKILL ends it at some instant.  After each the machine is looked
at: nobody is there, nothing is open, pinned, mapped or attached, and the next one finds a clean host.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from simtests.conformance.raw import V2, Member, Program
from simtests.conformance.served import ServedMachine
from vfio import uapi
from vfio.backend import open_backend
from vfio.backends import remote

_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None)
_ADDRESS, _GROUP = "0000:01:00.0", 0
_CONFIG = 7 << 40
_LONGEST = 0.012
"""Seconds that one lives: about what it takes to do everything twice."""


def storm(machine: ServedMachine, count: int, seed: int = 1) -> list[str]:
    """Start and kill `count` programs; what was wrong afterwards, in words."""
    chance = random.Random(seed)
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # so that the ends of children of children can be waited for
    wrong: list[str] = []
    machine.renew().exit()
    for number in range(count):
        ready, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            _live(machine.url, told)
        os.close(told)
        os.read(ready, 1)
        os.close(ready)
        time.sleep(chance.random() * _LONGEST)
        os.killpg(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while True:
                os.waitpid(-pid, 0)
        wrong += [f"after {number}: {what}" for what in _left(machine)]
    return wrong


def _left(machine: ServedMachine) -> list[str]:
    """What a clean machine has not."""
    found = remote.status(str(machine.path))
    counts = {name: found[name] for name in ("clients", "open_files", "held", "containers", "locked") if found[name]}
    opened = [device for device in found["devices"] if device["opened"]]
    return [f"{name}: {value}" for name, value in counts.items()] + [f"open: {device}" for device in opened]


def _live(url: str, told: int) -> None:
    """The life of a program, which is ended from outside."""
    status = 1
    try:
        os.setpgid(0, 0)
        remote.leave()
        program = Program(open_backend(url))
        member = Member(_ADDRESS, _GROUP)
        _bind(program, first=True)
        os.write(told, b"+")
        while True:
            _everything(program, member)
            _bind(program, first=False)
    finally:
        os._exit(status)


def _everything(program: Program, member: Member) -> None:
    backend = program.backend
    container = program.attached(member, V2)
    memory = program.memory(4 * program.page)
    huge = program.memory(16 << 20, 16 << 20)
    assert container.register(memory.address, memory.length) == 0
    assert container.register(huge.address, huge.length) == 0
    window = container.create(16, 1 << 30)
    assert window > 0
    assert container.map(memory.address, 0x100000, memory.length) == 0
    assert container.map(huge.address, window + (1 << 24), huge.length) == 0
    device = container.group.device(member.address)
    backend.pwrite(device, b"\x06\x00", _CONFIG + 4)
    mapping = program.mmap(device, program.page, 0)
    mapping.load(0, 4)
    eventfd = os.eventfd(0)
    data = uapi.vfio_irq_set.sized(24, flags=36, index=1, start=0, count=1, data=eventfd.to_bytes(4, sys.byteorder))
    assert program.ioctl(device, uapi.VFIO_DEVICE_SET_IRQS, uapi.buffer(data)) == 0
    os.close(eventfd)
    program.dup(device)
    child = os.fork()
    if child == 0:
        with suppress(OSError):
            backend.pread(device, 4, _CONFIG)
            mapping.load(0, 4)
        os._exit(0)
    os.waitpid(child, 0)
    assert container.unmap(0x100000, memory.length) == 0
    program.close_all()


def _bind(program: Program, *, first: bool) -> None:
    write = program.backend.write_text
    with suppress(OSError):
        write(f"/sys/bus/pci/devices/{_ADDRESS}/driver_override", "vfio-pci")
    if not first:
        with suppress(OSError):
            write("/sys/bus/pci/drivers/vfio-pci/unbind", _ADDRESS)
    with suppress(OSError):
        write("/sys/bus/pci/drivers_probe", _ADDRESS)


def main(words: list[str]) -> int:
    """The command."""
    count = int(words[0]) if words else 1000
    with tempfile.TemporaryDirectory() as directory:
        machine = ServedMachine("power8", Path(directory, "socket"))
        begin = time.monotonic()
        wrong = storm(machine, count)
        machine.end()
    print(f"{count} programs killed in {time.monotonic() - begin:.1f} s, {len(wrong)} left something")
    print("\n".join(wrong[:20]), end="")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
