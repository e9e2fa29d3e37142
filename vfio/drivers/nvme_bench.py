"""How fast is a disk, with several commands on their way?"""

from __future__ import annotations

import random
import time
from itertools import count
from typing import Literal, NamedTuple

from vfio import errors
from vfio.dma import DmaBuffer
from vfio.drivers.nvme import Command, Nvme

Pattern = Literal["random", "sequential"]


class Result(NamedTuple):
    """What was done."""

    commands: int
    bytes: int
    seconds: float
    latencies: list[float]
    """Seconds from issuing a command to taking its completion, in ascending order."""

    @property
    def iops(self) -> float:
        """Commands per second."""
        return self.commands / self.seconds

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.bytes / self.seconds

    def latency(self, percent: float) -> float:
        """Seconds within which `percent` (0 to 100) of the commands were done."""
        return self.latencies[min(len(self.latencies) - 1, int(len(self.latencies) * percent / 100))]


def run(
    disk: Nvme,
    seconds: float,
    *,
    block: int = 4096,
    pattern: Pattern = "random",
    write: bool = False,
    namespace: int | None = None,
) -> Result:
    """Read, or write, pieces of `block` bytes for `seconds`, with `disk.depth` commands on their way.

    `write` destroys what is on the disk.  Raises ValueError for a block that is no whole number of logical blocks or that
    one command cannot move, and what the driver raises.
    """
    space = disk.namespace(namespace)
    if block < 1 or block % space.block_size or block > min(disk.largest_transfer, space.size):
        most = min(disk.largest_transfer, space.size)
        raise ValueError(f"blocks of {block} bytes: multiples of {space.block_size} up to {most} are possible")
    step = block // space.block_size
    places = space.blocks // step
    begin = disk.start_write if write else disk.start_read
    latencies: list[float] = []
    memory = max(block, disk.device.backend.page_size)
    large = disk.window.page_size if disk.window and disk.window.page_size > disk.device.backend.page_size else None
    with DmaBuffer(disk.depth * memory, large, disk.device.backend) as buffer, disk.map(buffer) as dma:
        free = [n * memory for n in range(disk.depth)]
        busy: dict[Command, int] = {}
        start = time.perf_counter()
        try:
            for n in count():
                while not free or (busy and time.perf_counter() >= start + seconds):
                    done = disk.poll(disk.timeout)
                    if not done:
                        raise errors.TimedOut(next(iter(busy)).text, disk.timeout)
                    for command in done:
                        command.check()
                        free.append(busy.pop(command))
                        latencies.append(command.ended - command.begun)
                if n and time.perf_counter() >= start + seconds:
                    break
                place = random.randrange(places) if pattern == "random" else n % places
                offset = free.pop()
                busy[begin(place * step, step, dma, offset, space.number)] = offset
        finally:
            disk.drain()
    elapsed = time.perf_counter() - start
    return Result(len(latencies), len(latencies) * block, elapsed, sorted(latencies))
