"""What is not done to a kernel, because it would hurt it, the emulator, or the patience of the user.

The guard is asked before every call and told the outcome of every one, so that what it refuses depends only on answers
that both kernels gave alike. It is pessimistic: a window that existed once may exist now, memory that was let go of by
any container is not registered any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hwtests.fuzz.arena import Arena
from hwtests.fuzz.facts import Facts
from vfio import uapi

_EDU_CAPACITY = 4095  # bytes; QEMU ends the machine for one more
_RESETS = (uapi.VFIO_EEH_PE_RESET_DEACTIVATE, uapi.VFIO_EEH_PE_RESET_HOT, uapi.VFIO_EEH_PE_RESET_FUNDAMENTAL)
ANYBODY = "what lies there is anybody's"
_LOW_POWER = (uapi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, uapi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP)
_EDU_UNSAFE = ((0x08, 0x10), (0x80, 0xA0))
"""Registers of edu that start something: the factorial, whose thread answers at its leisure, and the DMA engine."""
_MSIX_TABLES = {"nvme": (0, 0x2000, 0x2410), "e1000e": (3, 0, 0x50)}
"""Of each model: region, first byte, end."""


class Kind(NamedTuple):
    """What a descriptor is: "container", "group", "device" or "eventfd", and the address of a device."""

    name: str
    address: str = ""


@dataclass(frozen=True)
class _Window:
    start: int
    size: int  # bytes, as asked for
    shift: int
    reach: int  # bytes from the start that its table can hold, at the most


class Guard:
    """Of one run of a program."""

    def __init__(self, facts: Facts, arena: Arena) -> None:
        self._facts = facts
        self._arena = arena
        # The default window appears by itself.
        self._windows = [self._window(facts.window_start, facts.window_size, 12, 1)]
        self._registered: set[tuple[int, int]] = set()
        self._second_version = False
        self._created: list[_Window] = []  # and not removed
        self._low_power = False

    # --- before a call ---

    def refuse(self, kind: Kind, n: int | None, payload: bytes, value: int) -> str:
        """Why this ioctl is not to be made, with `payload` at its address or `value` as its argument; empty if it may."""
        if n is None:
            return ""
        payload = payload.ljust(64, b"\0")  # a shorter one ends at a page that cannot be read
        if kind.name == "container":
            match n:
                case 13:
                    return self._map(_u64(payload, 8), _u64(payload, 16), _u64(payload, 24))
                case 14:
                    return self._unmap(_u64(payload, 8), _u64(payload, 16))
                case 17:
                    return self._register(_u64(payload, 8), _u64(payload, 16))
                case 19:
                    return self._create(_u32(payload, 8), _u64(payload, 16), _u32(payload, 24))
                case 21 if _u32(payload, 8) in _RESETS:
                    return "an EEH reset takes seconds"
        elif kind.name == "group" and n == 6:
            return self._open_device(payload)
        elif kind.name == "device":
            if n == 13 and self._resettable(kind.address) and _u32(payload, 4) == 0 and _u32(payload, 8):
                return "a hot reset takes seconds"
            if n == 16 and _u64(payload, 8) >> 63:
                return "the kernel takes the offset for negative, and looks in front of its BARs"
            if n == 16 and self.register(kind, _u64(payload, 8), 8):
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
        # Behind the end of a table QEMU finds its beginning: every window that may be there has to hold the range.
        here = [window for window in self._windows if window.start <= iova < window.start + window.reach]
        if not here or any(iova + length > window.start + window.size for window in here):
            return "outside of a window QEMU does not do what hardware does"
        return ""

    # --- after a call ---

    def observe(self, kind: Kind, n: int | None, payload: bytes, value: int, result: int, after: bytes) -> None:
        """Take note of a call that did not fail; of a CREATE also where it failed when it gave its result back."""
        payload = payload.ljust(64, b"\0")
        if kind.name == "group" and n == 5:
            self._registered.clear()
        if kind.name == "device" and n == 17 and _u32(payload, 4) & 0xFFFF in _LOW_POWER:
            self._low_power = True
        if kind.name != "container" or result:
            return
        match n:
            case 2:
                self._second_version |= value == uapi.VFIO_SPAPR_TCE_v2_IOMMU
            case 17:
                self._registered.add((_u64(payload, 8), _u64(payload, 16)))
            case 18:
                self._registered.discard((_u64(payload, 8), _u64(payload, 16)))
            case 19:
                shift, size, levels = _u32(payload, 8), _u64(payload, 16), _u32(payload, 24)
                lost = after == payload[: len(after)]  # it may be at either place
                for start in (self._facts.window_start, self._facts.second_window) if lost else (_u64(after, 32),):
                    self._windows.append(self._window(start, size, shift, levels))
                    self._created.append(self._windows[-1])
            case 20:
                at = _u64(payload, 8)
                self._created = [each for each in self._created if not each.start <= at < each.start + each.size]

    def closed(self) -> None:
        """A descriptor was closed: a container may have let go of its registrations."""
        self._registered.clear()

    # --- rules ---

    def _window(self, start: int, size: int, shift: int, levels: int) -> _Window:
        page = self._facts.page_size
        entries = max(1, size >> shift)
        per_level = max(-(-(entries - 1).bit_length() // max(1, levels)), (page // 8).bit_length() - 1)
        return _Window(start, size, shift, max(size, 1 << min(63, per_level * levels + shift)))

    def _runs_past(self, iova: int, size: int) -> str:
        for window in self._windows:
            inside = window.start <= iova < window.start + window.reach
            if inside and size > 1 << window.shift and iova + size > window.start + window.size:
                return "past the end of a window: the kernel does not look"
        return ""

    def _map(self, vaddr: int, iova: int, size: int) -> str:
        if why := self._runs_past(iova, size):
            return why
        if not self._arena.known(vaddr):
            return ANYBODY
        if iova == 0 and not self._first_page_succeeds(vaddr, size):
            return "a MAP whose first page fails, at IOVA 0, hangs PHB3"
        return ""

    def _unmap(self, iova: int, size: int) -> str:
        return self._runs_past(iova, size) or (
            "an UNMAP of nothing at IOVA 0 hangs PHB3" if iova == 0 and size == 0 else ""
        )

    def _first_page_succeeds(self, vaddr: int, size: int) -> bool:
        largest = max(1 << window.shift for window in self._windows if window.start == 0)
        if size < largest or not self._arena.sound(vaddr, largest):
            return False
        if not self._second_version:
            return True
        found = self._arena.find(vaddr)
        page = found and self._arena.buffers[found[0]].page_size
        return (page or self._facts.page_size) >= largest and any(
            start <= vaddr and vaddr + largest <= start + length and not (page and (start | length) & (page - 1))
            for start, length in self._registered
        )

    def _register(self, vaddr: int, size: int) -> str:
        if not self._arena.known(vaddr):
            return ANYBODY
        if 1 << 32 < size < 1 << 52:
            return "the kernel would try to allocate a list of all these pages"
        return ""

    def _create(self, shift: int, size: int, levels: int) -> str:
        known = shift < 64 and bool(self._facts.page_sizes >> shift & 1)
        power = size and not size & (size - 1)
        if not known or not power or levels > 5 or (levels == 0 and self._facts.bare_metal):
            return ""
        if not self._facts.bare_metal:  # where the number of levels is hardly looked at
            if levels > 1:
                return ""
            if self._created:
                return "a second window that the firmware refuses blacklists the device"
            return "" if 4 <= size.bit_length() - 1 - shift <= 18 else "a window that the firmware may refuse"
        entries = max(0, size.bit_length() - 1 - shift)
        level = max(-(-entries // levels), (self._facts.page_size // 8).bit_length() - 1)  # log2 of its entries
        if entries > 22 and level <= 21:
            return "to clear so many entries takes seconds"
        return "whether a table of that size can be allocated is luck" if 19 < level <= 21 else ""

    def _open_device(self, payload: bytes) -> str:
        name = payload.split(b"\0", 1)[0].decode("latin-1").split(" ")[0]
        endpoint = self._facts.endpoint(name)
        return "opening it takes seconds" if endpoint and not endpoint.opens_fast else ""

    def _resettable(self, address: str) -> bool:
        endpoint = self._facts.endpoint(address)
        return endpoint is not None and (endpoint.model != "edu" or not self._facts.bare_metal)


def _u32(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "little")


def _u64(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 8], "little")
