"""Freescale's PAMU: an aperture of IOVA, cut into windows of one size.  No kernel ever merged VFIO for it.

The only thing that speaks this interface is the model, ``fake:p4080``; `vfio.iommu.pamu_abi` has its requests and structs,
and says where they are from.  Source: the request for comments "vfio API changes needed for powerpc" (Stuart Yoder), and
the patches that followed in 2013.

A device's DMA has one aperture, and a number of windows in it; both are powers of two.  A window is enabled for one
physically contiguous piece of memory, so that windows of 64 MiB want pages of 64 MiB.  Devices write their MSIs through
the aperture as well, into one of up to three pages of the interrupt controller, the MSI banks, and nobody says into which:
each wants a window.  Three ways to have them were discussed:

- A, implicitly: the kernel maps them, into the last three windows, which the process leaves free.
- B, explicitly, by a new flag of MAP_DMA: ``VFIO_DMA_MAP_FLAG_MSI`` maps them all from an IOVA on, without an address.
- C, explicitly, by an ordinary MAP_DMA: ``VFIO_GROUP_GET_MSI_FD`` gives a file whose mapping is the banks.

The patches did none of these quite, and that is what is here: the process asks how many there are (`Pamu.msi_banks`), and
maps and unmaps one at a time where it likes (`Pamu.map_msi_bank`).

The example of that mail is a guest of 256 MiB in pages of 64 MiB, and three MSI banks:

    >>> import vfio
    >>> backend = vfio.open_backend("fake:p4080")
    >>> backend.write_text("/sys/bus/pci/devices/0000:01:00.0/driver_override", "vfio-pci")
    >>> backend.write_text("/sys/bus/pci/drivers_probe", "0000:01:00.0")
    >>> device = vfio.open_device("0000:01:00.0", backend)
    >>> pamu = device.iommu
    >>> pamu.configure(size=512 << 20, windows=8)
    >>> ram = vfio.DmaBuffer(256 << 20, page_size=64 << 20, backend=backend)
    >>> guest = pamu.map(ram, iova=0)
    >>> banks = [pamu.map_msi_bank(index) for index in range(pamu.msi_banks)]
    >>> for window in pamu.windows:
    ...     print(window)
    0   0x00000000  64 MiB
    1   0x04000000  64 MiB
    2   0x08000000  64 MiB
    3   0x0c000000  64 MiB
    4   0x10000000  4 KiB    msi bank 1
    5   0x14000000  4 KiB    msi bank 2
    6   0x18000000  4 KiB    msi bank 3
    7            -  disabled
    >>> device.close()
    >>> ram.close()
    >>> backend.leaks()
    []
"""

from __future__ import annotations

import errno
from struct import Struct
from struct import error as StructError
from typing import TYPE_CHECKING, ClassVar, NamedTuple, cast

from vfio import errors
from vfio.closing import Closing
from vfio.dma import Dma, DmaMemory
from vfio.iommu import pamu_abi as abi
from vfio.iommu.model import Iommu
from vfio.iommu.slot import READ, WRITE, Slot

if TYPE_CHECKING:
    from vfio.container import Container
    from vfio.iommu.window import DmaWindow

_MODEL_ONLY = "no kernel ever merged VFIO for the PAMU: only the model, fake:p4080, speaks it"
_SMALLEST = _BANK = 4096
_MOST_WINDOWS = 256


class PamuError(errors.VfioError):
    """A rule of the PAMU was broken, or the model refused.  It says that no kernel has this interface."""

    def __init__(self, errno: int, what: str, why: str = "", remedy: str = "") -> None:
        super().__init__(errno, what, why, f"{remedy}\n  ({_MODEL_ONLY})" if remedy else f"({_MODEL_ONLY})")


class Geometry(NamedTuple):
    """The aperture: first and last IOVA, in bytes."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start + 1


class Stash(NamedTuple):
    """Where a device's writes go besides memory: the cache of level `cache` (1 to 3) of `cpu`."""

    cpu: int
    cache: int


class Window(NamedTuple):
    """One window of the aperture."""

    number: int
    iova: int
    size: int
    """Bytes that it maps: at most its own; 0 while it is disabled."""
    bank: int | None
    """Index of the MSI bank that it maps, from 0 on; None for memory."""

    @property
    def enabled(self) -> bool:
        return self.size > 0

    def __str__(self) -> str:
        """As the mail's table has it, which counts banks from 1."""
        if not self.enabled:
            return f"{self.number:<3} {'-':>10}  disabled"
        text = f"{self.number:<3} {self.iova:#010x}  {errors.size(self.size)}"
        return text if self.bank is None else f"{text}    msi bank {self.bank + 1}"


class Pamu(Iommu):
    """The PAMU of a Freescale P4080: `configure`, then map whole windows.  No kernel has it; ``fake:p4080`` does.

    A fresh container has an aperture of all 36 bits in as many windows as the hardware has, and may map nothing before
    both were set.
    """

    name: ClassVar[str] = "Freescale PAMU (only modelled: no kernel ever merged it)"
    extension: ClassVar[int] = abi.VFIO_FSL_PAMU_IOMMU

    def __init__(self, container: Container) -> None:
        super().__init__(container)
        self._dmas: list[Dma] = []
        self._banks: list[MsiBank] = []
        self._shaped = False
        """Whether the aperture was set."""
        self._settle(self.geometry, self.window_count, ready=False)

    @classmethod
    def explain_refusal(cls, container: Container, error: OSError) -> tuple[str, str]:
        return _MODEL_ONLY, "VFIO_BACKEND=fake:p4080"

    # --- attributes ---

    @property
    def geometry(self) -> Geometry:
        """The aperture.  Set it before `window_count`, and while nothing is mapped.

        Its size is a power of two, at least 4 KiB, and its start a multiple of that; raises `PamuError` (EINVAL;
        EBUSY while memory is mapped).  Setting it drops all windows.
        """
        return Geometry(*abi.GEOMETRY.unpack_from(self._get(abi.ATTR_GEOMETRY, "aperture"), abi.HEADER.size))

    @geometry.setter
    def geometry(self, wanted: tuple[int, int]) -> None:
        found = Geometry(*wanted)
        what = f"cannot set the aperture {errors.span(found.start, found.size)}"
        with self.lock:
            self._check_idle(what)
            if found.start < 0 or found.size < _SMALLEST or found.size.bit_count() != 1 or found.start % found.size:
                why = "its size must be a power of two, at least 4 KiB, and its start a multiple of the size"
                raise PamuError(errno.EINVAL, what, why)
            self._set(abi.ATTR_GEOMETRY, abi.GEOMETRY, found, what, "the hardware has no such bus addresses")
            self._shaped = True
            self._settle(found, self.window_count, ready=False)

    @property
    def window_count(self) -> int:
        """How many windows the aperture has: before it is set, as many as the hardware can.

        A power of two, at most 256; raises `PamuError` (EINVAL, also before `geometry` was set; EBUSY while memory is
        mapped).  Setting it disables all windows, those of MSI banks too.
        """
        return int(abi.WINDOWS.unpack_from(self._get(abi.ATTR_WINDOWS, "number of windows"), abi.HEADER.size)[0])

    @window_count.setter
    def window_count(self, count: int) -> None:
        what = f"cannot set the number of windows to {count}"
        with self.lock:
            self._check_idle(what)
            if not 0 < count <= _MOST_WINDOWS or count.bit_count() != 1 or self._geometry.size // count < _SMALLEST:
                why = f"it must be a power of two, at most {_MOST_WINDOWS}, and leave 4 KiB for each"
                raise PamuError(errno.EINVAL, what, why)
            rule = "the hardware has fewer windows" if self._shaped else "the aperture has to be set first: geometry"
            self._set(abi.ATTR_WINDOWS, abi.WINDOWS, (count,), what, rule)
            self._settle(self._geometry, count, ready=True)

    @property
    def stash(self) -> Stash:
        """Into which cache the device's writes are put besides memory; zeros before it is set.

        Raises `PamuError` (EINVAL) for a CPU or a cache that there is not.
        """
        return Stash(*abi.STASH.unpack_from(self._get(abi.ATTR_STASH, "stashing"), abi.HEADER.size))

    @stash.setter
    def stash(self, wanted: tuple[int, int]) -> None:
        cpu, cache = wanted
        what = f"cannot stash in cache {cache} of CPU {cpu}"
        self._set(abi.ATTR_STASH, abi.STASH, (cpu, cache), what, "there is no such CPU, or no such cache of it")

    def configure(self, size: int, windows: int, start: int = 0) -> None:
        """Set the aperture, `size` bytes from `start`, and the number of its windows.  Raises what setting each does."""
        self.geometry = Geometry(start, start + size - 1)
        self.window_count = windows

    @property
    def window_size(self) -> int:
        """Bytes of each window."""
        return self._geometry.size // self._count

    @property
    def windows(self) -> tuple[Window, ...]:
        """All windows, and what this object has mapped in them."""
        size, start = self.window_size, self._geometry.start
        enabled = {at: (size, None) for dma in self._dmas for at in range(dma.iova, dma.iova + dma.length, size)}
        enabled |= {bank.iova: (_BANK, bank.index) for bank in self._banks}  # type: ignore[misc]
        places = [(number, start + number * size) for number in range(self._count)]
        return tuple(Window(number, iova, *enabled.get(iova, (0, None))) for number, iova in places)

    # --- memory ---

    def map(self, memory: DmaMemory, iova: int | None = None, *, read: bool = True, write: bool = True) -> Dma:
        """Map `memory` at `iova`, or in the first free windows behind IOVA 0; closing the result unmaps it.

        `iova` and the length are bytes, multiples of `window_size`.  The memory of each window has to be physically
        contiguous: pages of at least `window_size`.  Raises `PamuError`: ENODEV before `configure`, EINVAL outside the
        aperture and for what is not whole windows, EBUSY where one is enabled, ENOSPC where no run is free, EFAULT for
        memory in pieces, ENOMEM past the limit of locked memory.
        """
        address, length = memory.address, memory.length
        what = f"cannot map {errors.size(length)} at {address:#x}"
        with self.lock:
            iova = self._place(what, iova, length)
            flags = (READ if read else 0) | (WRITE if write else 0)
            if not flags:
                raise PamuError(errno.EINVAL, what, "a device that may neither read nor write it has no use for it")
            place = cast("DmaWindow", self._aperture)  # which has what a mapping asks of a window
            slot = Slot(place, iova, length, flags)
            slot.map(address)
            dma = Dma(place, slot, memory, None)
            self._dmas.append(dma)
            memory.dma = dma
            return dma

    def map_error(self, window: object, error: OSError, address: int, iova: int, length: int) -> errors.VfioError:
        """What a failed MAP means."""
        what = f"cannot map {errors.size(length)} at {address:#x} to IOVA {iova:#x}"
        why, remedy = "", ""
        if error.errno == errno.EFAULT:
            why = f"the memory of each window has to be one page of at least {errors.size(self.window_size)}, aligned to it"
            remedy = f"DmaBuffer(..., page_size={self.window_size:#x}), or smaller windows: configure(...)"
        elif error.errno == errno.ENOMEM:
            why = "it is charged to locked memory, and RLIMIT_MEMLOCK does not allow it"
            remedy = "ulimit -l, or CAP_IPC_LOCK"
        return PamuError(error.errno or errno.EIO, what, why, remedy)

    def unmap_error(self, window: object, error: OSError, iova: int, length: int) -> errors.VfioError:
        """What a failed UNMAP means."""
        return PamuError(error.errno or errno.EIO, f"cannot unmap IOVA {errors.span(iova, length)}")

    # --- MSI banks ---

    @property
    def msi_banks(self) -> int:
        """How many MSI banks the host has, any of which a device may have to reach."""
        return self.backend.ioctl(self.container.fd, abi.VFIO_IOMMU_PAMU_GET_MSI_BANK_COUNT)

    def map_msi_bank(self, index: int, iova: int | None = None) -> MsiBank:
        """Map MSI bank `index` (from 0) in the window at `iova`, or in the first free one behind IOVA 0.

        Closing the result unmaps it.  Raises `PamuError`: ENODEV for a bank that there is not and before `configure`,
        EINVAL for an IOVA at which no window begins, EBUSY where it is enabled, ENOSPC where none is free.
        """
        what = f"cannot map MSI bank {index}"
        with self.lock:
            if not 0 <= index < self.msi_banks:
                raise PamuError(errno.ENODEV, what, f"there are {self.msi_banks}, counted from 0")
            iova = self._place(what, iova, self.window_size)
            argument = abi.MSI_BANK_MAP.pack(abi.MSI_BANK_MAP.size, READ | WRITE, index, iova)
            self._call(abi.VFIO_IOMMU_PAMU_MAP_MSI_BANK, bytearray(argument), what)
            bank = MsiBank(self, index, iova)
            self._banks.append(bank)
            return bank

    def unmap_msi_bank(self, bank: MsiBank) -> None:
        """What closing an `MsiBank` does; harmless when it is unmapped."""
        with self.lock:
            if bank in self._banks:
                argument = bytearray(abi.MSI_BANK_UNMAP.pack(abi.MSI_BANK_UNMAP.size, 0, bank.iova))
                self._call(abi.VFIO_IOMMU_PAMU_UNMAP_MSI_BANK, argument, f"cannot unmap MSI bank {bank.index}")
                self._banks.remove(bank)

    # --- what every model has ---

    def check_detach(self) -> None:
        """Nothing stands in the way: what is mapped stays, for the groups that stay."""

    def remap(self) -> None:
        """Nothing was unmapped."""

    def gone(self) -> None:
        for dma in self._dmas:
            dma.gone()
        self._dmas.clear()
        self._banks.clear()

    def close(self) -> None:
        with self.lock:
            for bank in reversed(self._banks[:]):
                bank.close()
            for dma in reversed(self._dmas[:]):
                dma.close()

    def forget(self, dma: Dma) -> None:
        """It is unmapped."""
        self._dmas.remove(dma)
        dma.gone()

    # --- how ---

    def _settle(self, geometry: Geometry, count: int, ready: bool) -> None:
        """What the attributes are now.  With new windows the old ones are gone."""
        self._geometry, self._count, self._ready = geometry, count, ready
        self._aperture = _Aperture(self)
        self._banks.clear()

    def _check_idle(self, what: str) -> None:
        if self._dmas:
            raise PamuError(errno.EBUSY, what, f"{len(self._dmas)} mapping(s) are in place", "unmap them first")

    def _place(self, what: str, iova: int | None, length: int) -> int:
        """Where `length` bytes go: whole windows that are free."""
        if not self._ready:
            raise PamuError(
                errno.ENODEV, what, "the aperture has no windows yet", "iommu.configure(size, windows) first"
            )
        size, aperture = self.window_size, self._geometry
        if length <= 0 or (length | (iova or 0)) % size:
            values = f"length {length:#x}" + ("" if iova is None else f", IOVA {iova:#x}")
            why = f"{values} must be multiples of the windows of {errors.size(size)}"
            raise PamuError(errno.EINVAL, what, why, "smaller windows: configure(...)")
        if iova is not None and not (aperture.start <= iova and iova + length - 1 <= aperture.end):
            why = f"{errors.span(iova, length)} is not inside the aperture {errors.span(aperture.start, aperture.size)}"
            raise PamuError(errno.EINVAL, what, why)
        taken = {window.iova for window in self.windows if window.enabled}
        begin = aperture.start or size  # devices and their drivers take an address of 0 for none
        starts = range(begin, aperture.end + 2 - length, size) if iova is None else (iova,)
        for start in starts:
            if taken.isdisjoint(range(start, start + length, size)):
                return start
        if iova is None:
            raise PamuError(errno.ENOSPC, what, f"no {length // size} windows in a row are free", "unmap something")
        raise PamuError(errno.EBUSY, what, f"a window of {errors.span(iova, length)} is enabled", "unmap it first")

    def _get(self, kind: int, name: str) -> bytearray:
        argument = abi.attribute(kind)
        self._call(abi.VFIO_IOMMU_PAMU_GET_ATTR, argument, f"cannot get the {name}")
        return argument

    def _set(self, kind: int, layout: Struct, values: tuple[int, ...], what: str, rule: str) -> None:
        """Set an attribute, and read it back: drivers of 2013 returned 0 for what they had refused.

        `rule` is what a refusal (EINVAL) means.
        """
        try:
            body = layout.pack(*values)
        except StructError as unfit:
            raise PamuError(errno.EINVAL, what, rule) from unfit
        self._call(abi.VFIO_IOMMU_PAMU_SET_ATTR, abi.attribute(kind, body), what, rule)
        found = bytes(self._get(kind, what)[abi.HEADER.size :][: len(body)])
        if found != body:
            raise PamuError(errno.EINVAL, what, f"the driver returned 0 and did nothing: {rule}")

    def _call(self, request: int, argument: bytearray, what: str, rule: str = "") -> None:
        try:
            self.backend.ioctl(self.container.fd, request, argument)
        except OSError as error:
            why = rule if error.errno == errno.EINVAL else ""
            raise PamuError(error.errno or errno.EIO, what, why) from error


class MsiBank(Closing):
    """An MSI bank that is mapped; closing it unmaps it.  Made by `Pamu.map_msi_bank`."""

    def __init__(self, iommu: Pamu, index: int, iova: int) -> None:
        self._iommu = iommu
        self.index = index
        self.iova = iova
        """Where devices find its 4 KiB, in bytes."""

    def close(self) -> None:
        self._iommu.unmap_msi_bank(self)

    def __repr__(self) -> str:
        return f"<MsiBank {self.index} at IOVA {self.iova:#x}>"


class _Aperture:
    """What mappings know of where they are."""

    def __init__(self, iommu: Pamu) -> None:
        self.iommu = iommu

    def unmap(self, dma: Dma, slot: Slot) -> None:
        with self.iommu.lock:
            slot.unmap()
            self.iommu.forget(dma)

    def __str__(self) -> str:
        return f"aperture {errors.span(self.iommu._geometry.start, self.iommu._geometry.size)}"
