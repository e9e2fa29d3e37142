"""What a program may take for granted of the machine that it is to run on; all of it is known before any call."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vfio.topology import Topology

HUGE_PAGES = {"powernv8-64k": (16 << 20, 2), "pseries": (2 << 20, 4), "pseries-64k": (2 << 20, 4)}
"""Targets with hugetlb pages: the size of one in bytes, and how many a program may have."""


@dataclass(frozen=True)
class Endpoint:
    """The device of a group that is bound to vfio-pci."""

    address: str
    group: int
    model: str
    opens_fast: bool
    """Opening it does not reset its bus, which takes seconds."""


@dataclass(frozen=True)
class Facts:
    """A target, as a program sees it."""

    target: str
    fake: str
    """URL of the same machine, modelled."""
    page_size: int
    huge_page: int
    """Bytes of a hugetlb page; 0 where there are none."""
    huge_pages: int
    platform: str
    cpu: str
    window_start: int
    window_size: int
    second_window: int
    """Bus address of a window created beside the default one."""
    page_sizes: int
    """Mask of IOMMU page sizes."""
    levels: int
    endpoints: tuple[Endpoint, ...]

    @classmethod
    def of(cls, target: str, page_size: int, topology: Topology) -> Facts:
        """The facts of a target of the lab that runs the packaged `topology`."""
        huge_page, huge_pages = HUGE_PAGES.get(target, (0, 0))
        first = {group: devices[0] for group, devices in topology.groups().items()}
        return cls(
            target=target,
            fake=f"fake:{topology.name}?page_size={page_size}&freeze=0",
            page_size=page_size,
            huge_page=huge_page,
            huge_pages=huge_pages,
            platform=topology.platform.name,
            cpu=topology.platform.cpu,
            window_start=topology.iommu.default_window.start,
            window_size=topology.iommu.default_window.size,
            second_window=topology.iommu.second_window_start,
            page_sizes=topology.iommu.page_sizes,
            levels=topology.iommu.levels,
            endpoints=tuple(
                Endpoint(
                    device.address,
                    group,
                    device.model,
                    # Only a bus reset is slow, and a neighbour that no VFIO driver holds makes it impossible.
                    device.reset != ("bus",) or len(topology.groups()[group]) > 1,
                )
                for group, device in sorted(first.items())
            ),
        )

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Facts:
        return cls(**{**data, "endpoints": tuple(Endpoint(**each) for each in data["endpoints"])})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def page_shifts(self) -> list[int]:
        """log2 of the IOMMU page sizes."""
        return [bit for bit in range(64) if self.page_sizes >> bit & 1]

    @property
    def bare_metal(self) -> bool:
        return self.platform == "PowerNV"

    def endpoint(self, address: str) -> Endpoint | None:
        """The endpoint at `address`, if it is one."""
        return next((each for each in self.endpoints if each.address == address), None)
