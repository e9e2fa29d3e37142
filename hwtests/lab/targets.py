"""What can be booted: a machine (a topology) and a kernel for it."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hwtests.lab.architecture import KERNELS, POWER, Architecture
from hwtests.lab.errors import LabError
from vfio import topology


@dataclass(frozen=True)
class Target:
    """A machine with a kernel."""

    name: str
    machine_name: str  # of the packaged topology
    flavour: str  # of the kernel
    description: str
    append: str = ""  # added to the kernel's command line

    @property
    def page_size(self) -> int:
        """Page size of the kernel, in bytes."""
        return KERNELS[self.flavour].page_size

    @property
    def architecture(self) -> Architecture:
        """Of its processor."""
        return KERNELS[self.flavour].architecture

    def machine(self, phbs: Iterable[int] | None = None) -> topology.Topology:
        """The topology, or the part of it with these PHBs. Raises LabError for a PHB that is not there."""
        whole = topology.load(self.machine_name)
        try:
            return whole if phbs is None else whole.only(phbs)
        except ValueError as error:
            raise LabError(str(error)) from error


@dataclass(frozen=True)
class System:
    """What a hardware test runs on: a target of the lab, or this host."""

    name: str  # of the target, or "host"
    page_size: int  # bytes
    platform: str  # "PowerNV" or "pSeries", as /proc/cpuinfo says, or "PC"
    topology: topology.Topology | None  # None on a real host

    @property
    def kernel(self) -> tuple[int, int]:
        """Version of the running kernel: (6, 12)."""
        major, minor = os.uname().release.split(".")[:2]
        return int(major), int(re.match(r"\d+", minor)[0])  # type: ignore[index]

    @classmethod
    def of_target(cls, name: str) -> "System":
        """The machine of that target."""
        chosen = target(name)
        machine = chosen.machine()
        return cls(name, chosen.page_size, machine.platform.name, machine)

    @classmethod
    def of_host(cls) -> "System":
        """The machine that this process runs on."""
        found = re.search(r"^platform\s*: (\S+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return cls("host", os.sysconf("SC_PAGESIZE"), found[1] if found else "unknown", None)


def _targets() -> dict[str, Target]:
    # 16M pages need the 64K kernel: under emulation the 4K one hangs at the first touch. The bare POWER9 and POWER10
    # have no huge pages: their firmware's device tree names none.
    hugepages = {
        "powernv8-64k": "default_hugepagesz=16M hugepagesz=16M hugepages=4",
        "pseries": "default_hugepagesz=2M hugepagesz=2M hugepages=16",
        "pseries-64k": "default_hugepagesz=2M hugepagesz=2M hugepages=16",
    }
    machines = {"powernv8": "power8", "powernv9": "power9", "powernv10": "power10", "pseries": "pseries"}
    machines["siblings"] = "siblings"  # a POWER8 whose first group has several functions
    found = {}
    for name, machine in machines.items():
        described = topology.load(machine).description
        for flavour, kernel in KERNELS.items():
            if kernel.architecture is not POWER:
                continue
            target = name + flavour.removeprefix("powerpc64le")
            append = hugepages.get(target, "")
            found[target] = Target(target, machine, flavour, f"{described}; {kernel.page_size >> 10}K pages", append)
    for name, machine, flavour in (("q35", "x86", "amd64"), ("noiommu", "noiommu", "amd64-noiommu")):
        found[name] = Target(name, machine, flavour, topology.load(machine).description, "intel_iommu=on")
    return found


TARGETS = _targets()


def target(name: str) -> Target:
    """The target of that name. Raises LabError, listing all."""
    try:
        return TARGETS[name]
    except KeyError:
        raise LabError(f"no target {name!r}; there are {', '.join(TARGETS)}") from None
