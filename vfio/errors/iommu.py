"""IOMMU models, windows, and memory that is registered or mapped."""

from __future__ import annotations

import errno as E
from collections.abc import Iterable, Sequence

from vfio.errors.base import VfioError, size, span


class NoIommuModel(VfioError):
    """SET_IOMMU accepted none of the models that were tried."""

    def __init__(self, tried: Iterable[tuple[str, int]], remedy: str) -> None:
        tried = list(tried)
        why = ", ".join(f"{name}: {E.errorcode.get(number, number)}" for name, number in tried)
        super().__init__(tried[-1][1] if tried else E.ENODEV, "no IOMMU model fits this container", why, remedy)


class NotEnabled(VfioError):
    """sPAPR v1 before ENABLE."""

    def __init__(self, what: str) -> None:
        super().__init__(E.EPERM, what, "the container is not enabled", "call iommu.enable() first")


class OutsideWindow(VfioError):
    """The IOVA range is in no DMA window, or runs past the end of one."""

    def __init__(self, what: str, iova: int, length: int, windows: Sequence[str], errno: int = E.ENXIO) -> None:
        super().__init__(
            errno,
            what,
            f"IOVA {span(iova, length)} is inside no DMA window; windows: {', '.join(windows) or 'none'}",
            "choose an IOVA inside a window, or create one: iommu.create_window(size=...)",
        )


class Misaligned(VfioError, ValueError):
    """An address or a length that is not a multiple of a page."""

    def __init__(self, what: str, values: str, page: int, page_of: str) -> None:
        super().__init__(E.EINVAL, what, f"{values} must be multiples of {page_of} of {size(page)}")


class NotRegistered(VfioError):
    """Memory that is in no registration (sPAPR v2)."""

    def __init__(self, what: str, address: int, length: int) -> None:
        super().__init__(
            E.EINVAL,
            what,
            f"no single registration of this process holds all of the memory at {span(address, length)}",
            "register it first: iommu.register(buffer)",
        )


class PageTooLarge(VfioError):
    """The window's page is larger than the pages behind the memory."""

    def __init__(self, what: str, window_page: int, memory_page: int, why: str = "") -> None:
        super().__init__(
            E.EINVAL,
            what,
            why or f"the window's pages are {size(window_page)}, but the memory is in pages of {size(memory_page)}",
            f"use memory with pages of {size(window_page)} (DmaBuffer(..., page_size={window_page})), "
            f"or a window with pages of {size(memory_page)}",
        )


class NoFreeWindow(VfioError):
    """All DMA windows of the container are in use."""

    def __init__(self, windows: Sequence[str], limit: int, errno: int = E.ENOSPC) -> None:
        super().__init__(
            errno,
            "cannot create a DMA window",
            f"all {limit} are in use: {', '.join(windows)}",
            "remove one first: window.close() (the default window too can be removed)",
        )


class BadWindow(VfioError, ValueError):
    """A page size, size or number of levels that cannot be a DMA window here."""

    def __init__(self, why: str, remedy: str, errno: int = E.EINVAL) -> None:
        super().__init__(errno, "cannot create a DMA window", why, remedy)


class AlreadyMapped(VfioError):
    """The IOVA range overlaps a mapping; sPAPR kernels would replace it without a word."""

    def __init__(self, what: str, iova: int, length: int) -> None:
        super().__init__(
            E.EEXIST,
            what,
            f"IOVA {span(iova, length)} overlaps a range that is in use",
            "unmap it first, or leave iova out",
        )


class NotMapped(VfioError):
    """Nothing that this object mapped is there."""

    def __init__(self, what: str, iova: int, length: int) -> None:
        super().__init__(E.ENOENT, what, f"{span(iova, length)} is not the range of a mapping")


class StillMapped(VfioError):
    """Memory is not given back while a device can reach it: the kernel would leak the registration."""

    def __init__(self, what: str, count: int) -> None:
        super().__init__(E.EBUSY, what, f"{count} mapping(s) of it are still in place", "unmap it first")


class NoSpace(VfioError):
    """There is no free range of this length."""

    def __init__(
        self, what: str, length: int, largest: int, remedy: str = "unmap something, or create a larger window"
    ) -> None:
        super().__init__(
            E.ENOSPC,
            what,
            f"the largest free range is {size(largest)} and {size(length)} are needed",
            remedy,
        )


class Harmful(VfioError):
    """A call that is known to hurt a real kernel; it was not made."""

    def __init__(self, what: str, why: str, remedy: str = "") -> None:
        super().__init__(E.EINVAL, what, why, remedy)
