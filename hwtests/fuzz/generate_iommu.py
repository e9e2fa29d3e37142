"""What the steps on every kind of IOMMU have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from hwtests.fuzz.picture import Container, Picture, Registration
from hwtests.fuzz.program import Operand

Act = Callable[[Container], object]


class IommuSteps(ABC):
    """Adds steps on the containers of a picture."""

    def __init__(self, picture: Picture, progress: Callable[[], object]) -> None:
        self.picture = picture
        self._progress = progress
        self._rng = picture.rng
        self._acts = self.acts()

    @abstractmethod
    def acts(self) -> list[tuple[Act, int]]:
        """All kinds of steps, and how often each is wanted."""

    @abstractmethod
    def beginning(self, version: int) -> list[Act]:
        """What a program begins with, behind SET_IOMMU."""

    @abstractmethod
    def map(self, container: Container) -> tuple[int, int]:
        """A MAP, and its IOVA and size."""

    def sensible(self, container: Container, act: Act) -> Act:
        """That act, or most of the time, where it must fail, one that need not."""
        return act

    def step(self) -> None:
        """Add one; where no container has an IOMMU, mostly what is missing for that."""
        if not any(each.steps and each.version for each in self.picture.containers) and self._rng.random() < 0.7:
            self._progress()
            return
        acts, weights = zip(*self._acts, strict=True)
        container = self.picture.container()
        if container is not None:
            self.sensible(container, self._rng.choices(acts, weights)[0])(container)

    def _call(
        self,
        container: Container,
        request: str,
        struct: dict[str, Operand] | None = None,
        tail: list[Operand] | str | None = None,
    ) -> int:
        return self.picture.ioctl(self.picture.step_of(container), request, struct, tail=tail)

    def _range(self) -> Registration:
        """Part of a buffer, in whole pages: rather one without holes; now and then a bit more of it than there is."""
        found = self._part()
        for _ in range(4):
            if self.picture.registrable(found) or self._rng.random() < 0.15:
                break
            found = self._part()
        return found

    def _part(self) -> Registration:
        number = self._rng.randrange(len(self.picture.buffers))
        buffer = self.picture.buffers[number]
        page = buffer.page_size or self.picture.facts.page_size
        pages = buffer.size // page
        if self._rng.random() < 0.5:
            return Registration(number, 0, buffer.size)
        first = self._rng.randrange(pages)
        count = self._rng.randint(0 if self._rng.random() < 0.1 else 1, pages - first)
        if not buffer.page_size and self._rng.random() < 0.05:
            count += 1
        return Registration(number, first * page, count * page)
