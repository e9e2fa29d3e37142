"""What is not done to a kernel, because it would hurt it, the emulator, or the patience of the user.

The guard is asked before every call and told the outcome of every one, so that what it refuses depends only on answers
that both kernels gave alike. What it thinks of calls to a container depends on the IOMMU: `guard_spapr`, `guard_type1`.
"""

from __future__ import annotations

from typing import NamedTuple

from hwtests.fuzz.arena import Arena
from hwtests.fuzz.facts import Facts
from hwtests.fuzz.guard_iommu import IommuRules, u32, u64
from hwtests.fuzz.guard_spapr import SpaprRules
from hwtests.fuzz.guard_type1 import Type1Rules
from vfio import uapi

_EDU_CAPACITY = 4095  # bytes; QEMU ends the machine for one more
_LOW_POWER = (uapi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, uapi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP)
_EDU_UNSAFE = ((0x08, 0x10), (0x80, 0xA0))
"""Registers of edu that start something: the factorial, whose thread answers at its leisure, and the DMA engine."""
_MSIX_TABLES = {"nvme": (0, 0x2000, 0x2410), "e1000e": (3, 0, 0x50)}
"""Of each model: region, first byte, end."""


class Kind(NamedTuple):
    """What a descriptor is: "container", "group", "device" or "eventfd", and the address of a device."""

    name: str
    address: str = ""


class Guard:
    """Of one run of a program."""

    def __init__(self, facts: Facts, arena: Arena) -> None:
        self._facts = facts
        self._iommu: IommuRules = (Type1Rules if facts.type1 else SpaprRules)(facts, arena)
        self._low_power = False

    # --- before a call ---

    def refuse(self, kind: Kind, n: int | None, payload: bytes, value: int) -> str:
        """Why this ioctl is not to be made, with `payload` at its address or `value` as its argument; empty if it may."""
        if n is None:
            return ""
        payload = payload.ljust(64, b"\0")  # a shorter one ends at a page that cannot be read
        if kind.name == "container":
            return self._iommu.refuse(n, payload)
        if kind.name == "group" and n == 6:
            return self._open_device(payload)
        if kind.name == "device":
            if n == 13 and self._resettable(kind.address) and u32(payload, 4) == 0 and u32(payload, 8):
                return "a hot reset takes seconds"
            if n == 16 and u64(payload, 8) >> 63:
                return "the kernel takes the offset for negative, and looks in front of its BARs"
            if n == 16 and self.register(kind, u64(payload, 8), 8):
                return "an ioeventfd on a register that starts something"
        return ""

    def register(self, kind: Kind, offset: int, length: int, mapped: bool = False) -> str:
        """Why the BARs of a device are not to be touched in that range of its file; empty if they may."""
        if mapped and self._low_power:
            return "a device in low power: a SIGBUS"
        region, at = offset >> 40, offset & (1 << 40) - 1
        endpoint = self._facts.endpoint(kind.address)
        if region > 5 or endpoint is None:
            return ""
        if endpoint.model == "edu":
            unsafe = _EDU_UNSAFE if region == 0 else ()
            return "a register that starts something" if any(at < b and a < at + length for a, b in unsafe) else ""
        # Other devices are modelled without registers, but for the MSI-X table, which is vfio-pci's business.
        table, start, end = _MSIX_TABLES.get(endpoint.model, (0, 0, 0))
        inside = not mapped and region == table and start <= at and at + length <= end
        return "" if inside else "a register that is not modelled"

    def dma(self, kind: Kind, iova: int, device_offset: int, length: int) -> str:
        """Why the DMA engine is not to be started; empty if it may."""
        endpoint = self._facts.endpoint(kind.address)
        if kind.name != "device" or endpoint is None or endpoint.model != "edu":
            return "no DMA engine"
        if not (length > 0 and device_offset >= 0 and device_offset + length <= _EDU_CAPACITY):
            return "QEMU ends the machine for that"
        return self._iommu.dma(iova, length)

    # --- after a call ---

    def observe(self, kind: Kind, n: int | None, payload: bytes, value: int, result: int, after: bytes) -> None:
        """Take note of a call that did not fail; of a CREATE also where it failed when it gave its result back."""
        payload = payload.ljust(64, b"\0")
        if kind.name == "group" and n == 5:
            self._iommu.closed()
        if kind.name == "device" and n == 17 and u32(payload, 4) & 0xFFFF in _LOW_POWER:
            self._low_power = True
        if kind.name == "container" and not result:
            self._iommu.observe(n, payload, value, after)

    def closed(self) -> None:
        """A descriptor was closed: a container may have let go of what it had."""
        self._iommu.closed()

    # --- rules ---

    def _open_device(self, payload: bytes) -> str:
        name = payload.split(b"\0", 1)[0].decode("latin-1").split(" ")[0]
        endpoint = self._facts.endpoint(name)
        return "opening it takes seconds" if endpoint and not endpoint.opens_fast else ""

    def _resettable(self, address: str) -> bool:
        endpoint = self._facts.endpoint(address)
        return endpoint is not None and (endpoint.model != "edu" or not self._facts.bare_metal)
