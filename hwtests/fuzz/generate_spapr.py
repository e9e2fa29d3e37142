"""Steps on the sPAPR IOMMU: accounting, registration, windows, mappings, EEH."""

from __future__ import annotations

from hwtests.fuzz.generate_iommu import Act, IommuSteps
from hwtests.fuzz.picture import Container, Registration, Window
from hwtests.fuzz.program import Operand
from vfio import uapi

_READ, _WRITE = uapi.VFIO_DMA_MAP_FLAG_READ, uapi.VFIO_DMA_MAP_FLAG_WRITE
_PAGES = (1, 1, 1, 2, 2, 3, 4, 8)  # of an UNMAP


class SpaprSteps(IommuSteps):
    """Adds steps on the containers of a picture."""

    def acts(self) -> list[tuple[Act, int]]:
        return [
            (self.get_info, 4),
            (self.enable, 4),
            (self.disable, 3),
            (self.register, 14),
            (self.unregister, 7),
            (self.map, 30),
            (self.unmap, 16),
            (self.create, 12),
            (self.remove, 8),
            (self.eeh, 6),
        ]

    def beginning(self, version: int) -> list[Act]:
        first, _ = self.picture.facts.versions
        return [self.enable] if version == first else [self.register] * self._rng.randint(0, 2)

    def sensible(self, container: Container, act: Act) -> Act:
        if self._rng.random() < 0.25:
            return act
        if container.version == uapi.VFIO_SPAPR_TCE_IOMMU:
            if act in (self.register, self.unregister, self.create, self.remove):
                act = self.map
            return self.enable if act == self.map and not container.enabled else act
        if act in (self.enable, self.disable):
            act = self.map
        return self.register if act in (self.map, self.unmap) and not container.enabled else act

    def get_info(self, container: Container) -> None:
        struct: dict[str, Operand] = {"argsz": 16} if self._rng.random() < 0.3 else {}
        self._call(container, "VFIO_IOMMU_SPAPR_TCE_GET_INFO", struct)

    def enable(self, container: Container) -> None:
        self._call(container, "VFIO_IOMMU_ENABLE")
        container.enabled |= self.picture.intact and container.version == uapi.VFIO_SPAPR_TCE_IOMMU

    def disable(self, container: Container) -> None:
        self._call(container, "VFIO_IOMMU_DISABLE")
        container.enabled &= not self.picture.intact or container.version != uapi.VFIO_SPAPR_TCE_IOMMU

    # --- registration ---

    def register(self, container: Container) -> None:
        known = container.registrations
        if known and self._rng.random() < 0.3:  # again, or something that overlaps it
            again = self._rng.choice(known)
            found = Registration(again.buffer, again.offset, again.size)
            if self._rng.random() < 0.6:
                page = self.picture.facts.page_size
                found.offset += self._rng.choice((0, page, -page))
                found.size += self._rng.choice((0, page, -page))
        else:
            found = self._range()
        self._registration(container, "VFIO_IOMMU_SPAPR_REGISTER_MEMORY", found)
        if self.picture.intact and container.version == 7 and self.picture.registrable(found):
            container.enabled = True
            known.append(found)

    def unregister(self, container: Container) -> None:
        known = container.registrations
        if not known or self._rng.random() < 0.2:
            self._registration(container, "VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY", self._range())
            return
        found = self._rng.choice(known)
        if self._rng.random() < 0.3:
            part = Registration(found.buffer, found.offset, max(0, found.size - self.picture.facts.page_size))
            self._registration(container, "VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY", part)
            return
        self._registration(container, "VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY", found)
        if self.picture.intact:
            known.remove(found)

    def _registration(self, container: Container, request: str, found: Registration) -> None:
        vaddr: Operand = ["buffer", found.buffer, found.offset]
        size = found.size
        usual = vaddr, size
        if self._rng.random() < 0.04:
            vaddr = self._rng.choice((0, ["bad", "kernel"], ["bad", "hole"], (1 << 64) - self.picture.facts.page_size))
        if self._rng.random() < 0.03:
            size = self._rng.choice((1 << 30, 1 << 60, 1 << 63, (1 << 64) - self.picture.facts.page_size))
        self._call(container, request, {"vaddr": vaddr, "size": size})
        self.picture.intact &= (vaddr, size) == usual

    # --- mappings ---

    def map(self, container: Container) -> tuple[int, int]:
        """A MAP, and its IOVA and size."""
        memory = self._memory(container)
        window = self._window(container, self._page_of(memory))
        page = 1 << window.shift
        # All of it inside the memory, mostly: which part, and how many pages.
        pages = max(1, memory.size >> window.shift)
        first = self._rng.randrange(pages)
        count = self._rng.randint(1, min(pages - first, 8))
        if self._rng.random() < 0.1:
            count += self._rng.choice((1, 2, 16))
        size, iova = page * count, self._iova(window, page * count)
        flags = self._rng.choice(
            (_READ | _WRITE, _READ | _WRITE, _READ, _WRITE, 0) if self._rng.random() < 0.5 else (3,)
        )
        vaddr: Operand = ["buffer", memory.buffer, memory.offset + first * page]
        struct: dict[str, Operand] = {"flags": flags, "vaddr": vaddr, "iova": iova, "size": size}
        if self._rng.random() < 0.08:
            self._nearly(struct, page)
        self._call(container, "VFIO_IOMMU_MAP_DMA", struct)
        at = iova if isinstance(iova, int) else window.start + int(iova[3])
        if container.enabled and self.picture.intact:
            self._default_appears(container)
            container.mapped.append((at, size))
        return at, size

    def unmap(self, container: Container) -> None:
        window = self._window(container)
        struct: dict[str, Operand]
        if container.mapped and self._rng.random() < 0.6:
            iova, size = self._rng.choice(container.mapped)
            struct = {"iova": iova, "size": size}
        elif self._rng.random() < 0.1:
            struct = {"iova": window.start, "size": min(window.size, 1 << window.shift << 20)}
        else:
            size = (1 << window.shift) * self._rng.choice(_PAGES)
            struct = {"iova": self._iova(window, size), "size": size}
        if self._rng.random() < 0.08:
            self._nearly(struct, 1 << window.shift)
        self._call(container, "VFIO_IOMMU_UNMAP_DMA", struct)

    def _nearly(self, struct: dict[str, Operand], page: int) -> None:
        """Make one operand a bit wrong."""
        name = self._rng.choice([name for name in ("vaddr", "iova", "size") if name in struct])
        if name == "size" and self._rng.random() < 0.5:
            struct[name] = 0
        elif name == "iova" and self._rng.random() < 0.5:
            first, second = self.picture.facts.window_size, self.picture.facts.second_window
            struct[name] = self._rng.choice((first, second, second - page, 2 * second, 1 << 63))
        else:
            struct[name] = self.picture.nearly(struct[name])

    def _window(self, container: Container, page: int = 1 << 64) -> Window:
        """A window that the container has, or its default one; rather with pages of at most `page` bytes."""
        default = self._default()
        known = [*container.windows, default] if container.default_pending else container.windows
        fitting = [each for each in known if 1 << each.shift <= page]
        if fitting and self._rng.random() < 0.85:
            return self._rng.choice(fitting)
        return self._rng.choice([*container.windows, default])

    def _iova(self, window: Window, size: int) -> Operand:
        """An IOVA in the window: near its start, so that mappings meet; at its end; or somewhere."""
        page = 1 << window.shift
        pages = max(1, window.size >> window.shift)
        count = max(1, size >> window.shift)
        if self._rng.random() < 0.8:
            at = self._rng.randrange(min(pages, 12))
            if window.start == 0 and at == 0 and self._rng.random() < 0.7:
                at = min(pages - 1, 1)  # what happens at IOVA 0 is mostly forbidden
        else:
            at = max(0, pages - self._rng.choice((count, count, 1, count + 1)))
            at = self._rng.choice((at, self._rng.randrange(pages)))
        if window.step >= 0 and self._rng.random() < 0.5:
            return ["result", window.step, "start_addr", at * page]
        return window.start + at * page

    def _memory(self, container: Container) -> Registration:
        """Memory to map: mostly registered."""
        if container.registrations and self._rng.random() < 0.9:
            return self._rng.choice(container.registrations)
        return self._range()

    def _page_of(self, memory: Registration) -> int:
        return self.picture.buffers[memory.buffer].page_size or self.picture.facts.page_size

    # --- windows ---

    def create(self, container: Container) -> None:
        rng, facts = self._rng, self.picture.facts
        shift = rng.choice(facts.page_shifts)
        if rng.random() < 0.6:  # one that the memory at hand can be mapped through
            shift = rng.choice(
                [each for each in facts.page_shifts if 1 << each in (4096, facts.page_size, facts.huge_page)]
            )
        levels = rng.choice((1, 1, 1, 2, 2, 3, 4, 5)) if facts.levels > 1 else 1
        size = 1 << shift + rng.choice(
            (0, 1, 4, 5, 8, 9, 10, 12, 13, 16, 18) if levels == 1 else (4, 10, 13, 16, 18, 20, 21, 22)
        )
        expected = True
        if rng.random() < 0.25:
            expected = False
            match rng.randrange(4):
                case 0:
                    shift = rng.choice((0, 11, 13, 20, 63, 64, 76, 0xFFFFFFFF))
                case 1:
                    size = rng.choice((0, 1, 4095, size - 1, size + 1, size * 3, 1 << 63, (1 << 64) - 1))
                case 2:
                    levels = rng.choice((0, 6, 2, 3, 0xFFFFFFFF))
                case _:
                    size = 1 << rng.randrange(64)
        struct: dict[str, Operand] = {"page_shift": shift, "window_size": size, "levels": levels}
        if rng.random() < 0.1:
            struct |= {"__resv1": 0x55555555, "__resv2": 0x66666666}
        step = self._call(container, "VFIO_IOMMU_SPAPR_TCE_CREATE", struct)
        if self.picture.intact and container.version == 7 and expected:
            self._created(container, step, shift, size)

    def _default_appears(self, container: Container) -> None:
        """The default window is made by the first call that needs one."""
        if container.default_pending:
            container.default_pending = False
            container.windows.append(self._default())

    def _default(self) -> Window:
        return Window(self.picture.facts.window_start, self.picture.facts.window_size, 12)

    def _created(self, container: Container, step: int, shift: int, size: int) -> None:
        facts = self.picture.facts
        self._default_appears(container)
        if len(container.windows) < 2:
            taken = any(each.start == 0 for each in container.windows)
            start = facts.second_window if taken or not facts.bare_metal else 0
            container.windows.append(Window(start, size, shift, step))

    def remove(self, container: Container) -> None:
        rng, facts = self._rng, self.picture.facts
        window = rng.choice(container.windows) if container.windows and rng.random() < 0.8 else None
        if window:
            start = window.start + rng.choice((0, 0, 0, 1, (1 << window.shift) * 3, window.size - 1, window.size))
        else:
            start = rng.choice((0, 0, facts.second_window, facts.window_size, 1 << 63, 4096))
        self._call(container, "VFIO_IOMMU_SPAPR_TCE_REMOVE", {"start_addr": start})
        if self.picture.intact and container.version == uapi.VFIO_SPAPR_TCE_v2_IOMMU:
            if container.default_pending and start == facts.window_start:
                container.default_pending = False
            container.windows = [each for each in container.windows if not each.start <= start < each.start + each.size]

    # --- EEH ---

    def eeh(self, container: Container) -> None:
        rng = self._rng
        operation = rng.choice((0, 1, 2, 3, 4, 4, 4, 8, 10, 11, 0xFFFFFFFF, 9, 9))
        struct: dict[str, Operand] = {"op": operation}
        if operation == uapi.VFIO_EEH_PE_INJECT_ERR:
            struct |= {
                "err.type": rng.choice((0, 1, 1, 2, 0xFFFFFFFF)),
                "err.func": rng.choice((*range(20), 20, 21, 0xFFFFFFFF)),
                "err.addr": rng.choice((0, 0x1000, self.picture.facts.second_window)),
                "err.mask": rng.choice((0, 0xFFF, (1 << 64) - 1)),
            }
        elif rng.random() < 0.5:
            struct["argsz"] = 12
        self._call(container, "VFIO_EEH_PE_OP", struct)
