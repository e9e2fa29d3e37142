"""What a test can do to the modelled kernel: make the nth call of a kind fail, and count calls."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from vfio.fake.kernel_error import fail


class _Planned(NamedTuple):
    nth: int
    errno: int


class Hooks:
    """Failures by the kind of call.

    A kind is the name of a method of the seam (``"write_text"``, ``"open"``), or the name of a request
    (``"VFIO_IOMMU_MAP_DMA"``; requests that share a number share their failures).
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        """How often each kind was called."""
        self._planned: dict[str, list[_Planned]] = {}

    def fail(self, kind: str, errno: int, nth: int = 1) -> None:
        """Let the `nth` call of `kind` from now on (1 is the next) fail with `errno`, without doing anything."""
        if nth < 1:
            raise ValueError(f"the call number {nth} of {kind}: 1 is the next one")
        self._planned.setdefault(kind, []).append(_Planned(self.calls[kind] + nth, errno))

    def clear(self) -> None:
        """Let no call fail any more."""
        self._planned.clear()

    def before(self, *kinds: str) -> None:
        """A call that goes by all of these names is about to be made."""
        for kind in kinds:
            self.calls[kind] += 1
            for planned in self._planned.get(kind, ()):
                if planned.nth == self.calls[kind]:
                    raise fail(planned.errno)
