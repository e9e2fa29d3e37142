"""Steps on device files: what they say, configuration space, registers, mappings, interrupts, DMA."""

from __future__ import annotations

from collections.abc import Callable

from hwtests.fuzz.picture import Container, Device, Picture
from hwtests.fuzz.program import Operand
from vfio import uapi

_MEBIBYTE = 1 << 20
_CONFIG = uapi.VFIO_PCI_CONFIG_REGION_INDEX
_LIVENESS, _STATUS, _RAISE, _ACKNOWLEDGE = 0x04, 0x20, 0x60, 0x64
_NONE, _BOOL, _EVENTFD = 1, 2, 4
_MASK, _UNMASK, _TRIGGER = 8, 16, 32


class DeviceSteps:
    """Adds steps on the devices of a picture."""

    def __init__(
        self, picture: Picture, progress: Callable[[], object], map_memory: Callable[[Container], tuple[int, int]]
    ) -> None:
        self.picture = picture
        self._map_memory = map_memory
        self._progress = progress
        self._rng = picture.rng
        self._acts: list[tuple[Callable[[Device], object], int]] = [
            (self.info, 5),
            (self.region_info, 6),
            (self.irq_info, 6),
            (self.set_irqs, 12),
            (self.interrupt, 5),
            (self.reset, 2),
            (self.hot_reset, 4),
            (self.ioeventfd, 4),
            (self.feature, 5),
            (self.config_read, 12),
            (self.config_write, 10),
            (self.bar_read, 6),
            (self.bar_write, 8),
            (self.mmap, 4),
            (self.access, 6),
            (self.munmap, 2),
            (self.dma, 7),
            (self.eventfd, 3),
            (self.eventfd_use, 6),
        ]

    def step(self) -> None:
        """Add one."""
        device = self.picture.device()
        if device is not None:
            acts, weights = zip(*self._acts, strict=True)
            self._rng.choices(acts, weights)[0](device)
        elif self.picture.steps and self._rng.random() < 0.1:
            self.picture.ioctl(self.picture.any_fd(), "VFIO_DEVICE_GET_INFO", {})
        else:
            self._progress()

    def _call(
        self,
        device: Device,
        request: str,
        struct: dict[str, Operand] | None = None,
        tail: list[Operand] | str | None = None,
    ) -> None:
        self.picture.ioctl(self.picture.step_of(device), request, struct, tail=tail)

    # --- what a device says ---

    def info(self, device: Device) -> None:
        struct: dict[str, Operand] = {"argsz": self._rng.choice((16, 17, 20, 24, 24, 24))}
        self._call(device, "VFIO_DEVICE_GET_INFO", struct)

    def region_info(self, device: Device) -> None:
        struct: dict[str, Operand] = {"index": self._rng.choice((*range(10), 10, 0x7FFFFFFF, 0xFFFFFFFF))}
        if self._rng.random() < 0.4:
            struct["argsz"] = self._rng.choice((32, 39, 40, 48, 64))
        self._call(device, "VFIO_DEVICE_GET_REGION_INFO", struct)

    def irq_info(self, device: Device) -> None:
        self._call(device, "VFIO_DEVICE_GET_IRQ_INFO", {"index": self._rng.choice((*range(6), 0xFFFFFFFF))})

    def reset(self, device: Device) -> None:
        self._call(device, "VFIO_DEVICE_RESET")

    def hot_reset(self, device: Device) -> None:
        rng = self._rng
        if rng.random() < 0.5:
            room = rng.choice((0, 1, 2, 3))
            self._call(device, "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", {}, tail="00" * 8 * room)
        else:
            tail: list[Operand] = [["fd", self.picture.any_fd()] for _ in range(rng.randint(0, 3))]
            count = len(tail) if rng.random() < 0.8 else rng.choice((0, 1, 5, 0xFFFFFFFF))
            self._call(device, "VFIO_DEVICE_PCI_HOT_RESET", {"count": count}, tail=tail)

    def ioeventfd(self, device: Device) -> None:
        rng = self._rng
        region = rng.choice((0, 0, 0, 0, 1, 6, _CONFIG, 9))
        offset = region << 40 | rng.choice((_LIVENESS, _LIVENESS, 0x24, 0x1000, _MEBIBYTE - 4, _MEBIBYTE, 0x05))
        struct: dict[str, Operand] = {
            "flags": rng.choice((1, 2, 4, 4, 4, 8, 0, 12, 16)),
            "offset": offset,
            "data": rng.choice((1, 0x01020304, (1 << 64) - 1)),
            "fd": self._an_eventfd(),
        }
        self._call(device, "VFIO_DEVICE_IOEVENTFD", struct)

    def feature(self, device: Device) -> None:
        rng = self._rng
        feature = rng.choice((*range(12), 13, 0xFFFF, 3, 5))
        how = rng.choice((1 << 16, 1 << 17, 1 << 18, 5 << 16, 6 << 16, 3 << 16, 7 << 16, 0))
        tail = "00" * rng.choice((0, 4, 8, 16, 32))
        self._call(device, "VFIO_DEVICE_FEATURE", {"flags": feature | how}, tail=tail)

    # --- configuration space and registers ---

    def config_read(self, device: Device) -> None:
        rng = self._rng
        offset = rng.choice((rng.randrange(0x40), rng.randrange(0x40), rng.randrange(0x100), 0, 4, 0x3C, 0x100, 0xFFC))
        length = rng.choice((1, 2, 4, 4, 4, 8, 16, 64, 256, 3, 0))
        self.picture.add("pread", fd=self.picture.step_of(device), length=length, offset=_CONFIG << 40 | offset)

    def config_write(self, device: Device) -> None:
        rng = self._rng
        offset = rng.choice(
            (4, 4, 0x10, 0x14, 0x30, 0x3C, rng.randrange(0x40), rng.randrange(0x40), rng.randrange(0x100))
        )
        length = rng.choice((1, 2, 4, 4, 3, 8))
        data = rng.choice((b"\xff" * length, bytes(length), rng.randbytes(length)))
        if offset == 4:
            length, data = 2, rng.choice((0x0006, 0x0007, 0x0406, 0x0000, 0xFFFF, 0x0002, 0x0004)).to_bytes(2, "little")
        fd = self.picture.step_of(device)
        self.picture.add("pwrite", fd=fd, data=data.hex(), offset=_CONFIG << 40 | offset)

    def bar_read(self, device: Device) -> None:
        rng = self._rng
        if device.endpoint.model != "edu":
            where = (
                self._table(device) + rng.randrange(0x40) if rng.random() < 0.7 else rng.choice((4, 5, 6, 8, 9)) << 40
            )
            length = rng.choice((1, 4, 8, 3))
        else:
            register = rng.choice((0, 4, 0x10, 0x18, 0x20, 0x24, 0x60, 0x70, 0x100, 0x1000, rng.randrange(0x80)))
            edge = rng.choice((_MEBIBYTE - 4, _MEBIBYTE - 1, _MEBIBYTE, _MEBIBYTE + 4, 1 << 32))
            where = register if rng.random() < 0.8 else edge
            if rng.random() < 0.1:
                where |= rng.choice((1, 5, 6, 8, 9, 200)) << 40
            length = rng.choice((4, 4, 4, 1, 2, 8, 3, 16, 0))
        self.picture.add("pread", fd=self.picture.step_of(device), length=length, offset=where)

    def bar_write(self, device: Device) -> None:
        rng = self._rng
        fd = self.picture.step_of(device)
        if device.endpoint.model != "edu":
            where = self._table(device) + rng.randrange(0x10) * 4
            self.picture.add("pwrite", fd=fd, data=rng.randbytes(4).hex(), offset=where)
            return
        register = rng.choice((_LIVENESS, _STATUS, _RAISE, _RAISE, _ACKNOWLEDGE, _ACKNOWLEDGE, 0x70, _MEBIBYTE))
        length = rng.choice((4, 4, 4, 4, 1, 2, 8))
        self.picture.add("pwrite", fd=fd, data=self._register_value(register, length), offset=register)

    def _register_value(self, register: int, length: int) -> str:
        rng = self._rng
        value = rng.getrandbits(32)
        if register in (_RAISE, _ACKNOWLEDGE):
            value = rng.choice((1, 2, 3, 0x100, 0xFFFFFFFF))
        elif register == _STATUS:
            value = rng.choice((0, 0x80))
        return value.to_bytes(4, "big").ljust(length, b"\0")[:length].hex()

    def _table(self, device: Device) -> int:
        """Where the MSI-X table is in the device file."""
        return {"nvme": 0x2000, "e1000e": 3 << 40}.get(device.endpoint.model, 0)

    def mmap(self, device: Device) -> None:
        rng, page = self._rng, self.picture.facts.page_size
        region = rng.choice((0, 0, 0, 0, 0, 1, 6, _CONFIG, 9))
        offset = region << 40 | rng.choice((0, 0, 0, page, _MEBIBYTE - page, _MEBIBYTE, page // 2))
        length = rng.choice((page, page, 4096, _MEBIBYTE, _MEBIBYTE + page, 2 * page))
        step = self.picture.add(
            "mmap", fd=self.picture.step_of(device), length=length, offset=offset, prot=rng.choice((3, 3, 1))
        )
        if region == 0:
            device.mappings.append((step, offset, length))

    def access(self, device: Device) -> None:
        """Load or store a register through a mapping."""
        rng = self._rng
        if not device.mappings:
            return self.mmap(device)
        mapping = ["mapping", rng.choice(device.mappings)[0]]
        width = rng.choice((4, 4, 4, 1, 2, 8))
        if rng.random() < 0.5:
            offset = rng.choice((0, 4, 0x10, 0x20, 0x24, 0x60, 0x100, 0x800)) // width * width
            self.picture.add("load", mapping=mapping, offset=offset, width=width)
        else:
            register = rng.choice((_LIVENESS, _RAISE, _ACKNOWLEDGE, 0x70)) // width * width
            value = int.from_bytes(bytes.fromhex(self._register_value(register, 4)), "little") & ((1 << 8 * width) - 1)
            self.picture.add("store", mapping=mapping, offset=register, width=width, value=value)
        return None

    def munmap(self, device: Device) -> None:
        if device.mappings:
            found = self._rng.choice(device.mappings)
            device.mappings.remove(found)
            self.picture.add("munmap", mapping=["mapping", found[0]])

    # --- interrupts ---

    def eventfd(self, device: Device) -> None:
        self.picture.eventfds.append(self.picture.add("eventfd"))

    def eventfd_use(self, device: Device) -> None:
        if not self.picture.eventfds:
            return self.eventfd(device)
        op = self._rng.choice(("eventfd_read", "eventfd_read", "eventfd_read", "eventfd_write"))
        self.picture.add(op, fd=self._rng.choice(self.picture.eventfds))
        return None

    def _an_eventfd(self) -> Operand:
        rng, known = self._rng, self.picture.eventfds
        if not known:
            known.append(self.picture.add("eventfd"))
        wrong: tuple[Operand, ...] = (-1, -1, -2, 9999, ["fd", self.picture.any_fd()])
        return ["fd", rng.choice(known)] if rng.random() < 0.75 else rng.choice(wrong)

    def set_irqs(self, device: Device) -> None:
        rng = self._rng
        index, start, count = rng.choice((0, 0, 0, 1, 1, 1, 2, 2, 3, 4)), 0, 1
        if index == 2 and device.endpoint.model != "edu":
            count = rng.choice((1, 4))
        action, data = _TRIGGER, rng.choice((_EVENTFD, _EVENTFD, _NONE, _BOOL))
        match rng.randrange(8):  # half of them are right
            case 0:
                action = rng.choice((_MASK, _UNMASK, 0, _TRIGGER | _MASK, _MASK | _UNMASK))
            case 1:
                data, count = rng.choice((0, _NONE | _BOOL, _NONE)), 0
            case 2:
                start = rng.choice((1, 2, 64, 65, 0xFFFFFFFF))
            case 3:
                count = rng.choice((0, 2, 65, 0xFFFFFFFF))
            case 4:
                index, action = rng.choice((0, 0, 0, 1, 5)), rng.choice((_MASK, _UNMASK))
        length = min(count, 4)
        tail: list[Operand] | str | None = None
        if data & _EVENTFD:
            tail = [self._an_eventfd() for _ in range(length)]
        elif data & _BOOL:
            tail = bytes(rng.choice((0, 1, 1, 255)) for _ in range(length)).hex()
        self._call(
            device,
            "VFIO_DEVICE_SET_IRQS",
            {"flags": data | action, "index": index, "start": start, "count": count},
            tail=tail,
        )

    def interrupt(self, device: Device) -> None:
        """An interrupt enabled, raised, seen, acknowledged and unmasked, with a step left out now and then."""
        rng, fd = self._rng, self.picture.step_of(device)
        index = rng.choice((0, 0, 1, 2) if device.endpoint.model != "edu" else (0, 0, 1))
        eventfd = self._an_eventfd()

        def set_irqs(flags: int, *tail: Operand) -> None:
            self._call(device, "VFIO_DEVICE_SET_IRQS", {"flags": flags, "index": index, "count": 1}, tail=list(tail))

        def see() -> None:
            if isinstance(eventfd, list):
                self.picture.add("eventfd_read", fd=eventfd[1])

        def register(offset: int, value: int) -> None:
            if device.endpoint.model == "edu":
                self.picture.add("pwrite", fd=fd, data=value.to_bytes(4, "big").hex(), offset=offset)
            else:
                set_irqs(_NONE | _TRIGGER)

        acts: list[Callable[[], object]] = [
            lambda: set_irqs(_EVENTFD | _TRIGGER, eventfd),
            lambda: register(_RAISE, 1),
            see,
            lambda: set_irqs(_NONE | _UNMASK),
            see,
            lambda: register(_ACKNOWLEDGE, 0xFFFFFFFF),
            lambda: set_irqs(rng.choice((_NONE, _BOOL)) | rng.choice((_MASK, _UNMASK, _TRIGGER)), 1),
            see,
        ]
        for act in acts:
            if rng.random() < 0.85:
                act()
        if rng.random() < 0.5:
            self._call(device, "VFIO_DEVICE_SET_IRQS", {"flags": _NONE | _TRIGGER, "index": index, "count": 0})

    # --- DMA ---

    def dma(self, device: Device) -> None:
        """Transfers from or to IOVAs that are, were, or never were mapped; what came in goes out again elsewhere."""
        rng, container = self._rng, device.group.container
        if device.endpoint.model != "edu" or container is None:
            return
        if rng.random() < 0.8:
            enable = (0x0006).to_bytes(2, "little").hex()
            self.picture.add("pwrite", fd=self.picture.step_of(device), data=enable, offset=_CONFIG << 40 | 4)
        place, length = rng.choice((0, 0, 1, 1000)), rng.choice((1, 8, 64, 1000, 3000))
        for to in ("device", "memory") if rng.random() < 0.8 else ("memory",):
            self.picture.add(
                "dma",
                fd=self.picture.step_of(device),
                to=to,
                iova=self._iova(container),
                place=place,
                length=length,
                interrupt=rng.random() < 0.2,
            )

    def _iova(self, container: Container) -> int:
        rng = self._rng
        if container.enabled and rng.random() < 0.5:
            start, size = self._map_memory(container)
        elif container.mapped and rng.random() < 0.9:
            start, size = rng.choice(container.mapped)
        else:
            return rng.choice(self.picture.facts.strange_iovas)
        return start + rng.choice((0, 0, 8, size // 2, max(0, size - 2048)))
