"""What a program may take for granted of the machine that it is to run on; all of it is known before any call."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from vfio import uapi
from vfio.topology import Topology

HUGE_PAGES = {
    "powernv8-64k": (16 << 20, 2),
    "pseries": (2 << 20, 4),
    "pseries-64k": (2 << 20, 4),
    "q35": (2 << 20, 4),
}
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
    ranges: tuple[tuple[int, int], ...]
    """Type1: first and last IOVA of what can be mapped; empty where there are windows instead."""
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
            ranges=topology.iommu.ranges,
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
        endpoints = tuple(Endpoint(**each) for each in data["endpoints"])
        return cls(**{**data, "endpoints": endpoints, "ranges": tuple(map(tuple, data["ranges"]))})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def page_shifts(self) -> list[int]:
        """log2 of the IOMMU page sizes."""
        return [bit for bit in range(64) if self.page_sizes >> bit & 1]

    @property
    def type1(self) -> bool:
        """Whether the IOMMU is Type1; if not, it is sPAPR TCE."""
        return bool(self.ranges)

    @property
    def versions(self) -> tuple[int, int]:
        """What SET_IOMMU takes for the first and the second version of the IOMMU."""
        if self.type1:
            return uapi.VFIO_TYPE1_IOMMU, uapi.VFIO_TYPE1v2_IOMMU
        return uapi.VFIO_SPAPR_TCE_IOMMU, uapi.VFIO_SPAPR_TCE_v2_IOMMU

    @property
    def strange_types(self) -> tuple[int, int, int, int, int]:
        """What else a program may ask SET_IOMMU for, in vain."""
        return (0, 2, 7, 6, 99) if self.type1 else (0, 1, 3, 5, 99)

    @property
    def strange_iovas(self) -> tuple[int, int, int]:
        """Bus addresses where there may be nothing."""
        if self.type1:
            return (0x100000, self.ranges[0][1] - 0x1FFF, self.ranges[-1][1] - 0xFFFF)
        return (0x100000, self.window_size - 8192, self.second_window + 0x10000)

    @property
    def edu_order(self) -> Literal["little", "big"]:
        """Byte order of edu's registers, which is that of the processor's first days."""
        return "little" if self.platform == "PC" else "big"

    @property
    def bare_metal(self) -> bool:
        return self.platform == "PowerNV"

    def endpoint(self, address: str) -> Endpoint | None:
        """The endpoint at `address`, if it is one."""
        return next((each for each in self.endpoints if each.address == address), None)
