"""The parts of a machine: what `vfio.topology` reads from a file, and the lab and the modelled kernel build."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

_SECTOR, _ROM_DATA = 512, 0x40
"""Unit of the length of an expansion ROM's image, and where its data structure is, bytes."""


@dataclass(frozen=True)
class Window:
    """A DMA window: the range of bus addresses that one TCE table translates."""

    start: int  # bus address, bytes
    size: int  # bytes
    page_size: int  # bytes that one TCE covers


@dataclass(frozen=True)
class Pamu:
    """A Freescale PAMU, of which only the model knows."""

    aperture_bits: int  # bits of a bus address: 36
    windows: int  # most windows of a domain, a power of two
    msi_banks: tuple[int, ...]  # physical addresses of the pages to which devices write their MSIs
    cpus: int  # into whose caches a device's writes can be stashed


@dataclass(frozen=True)
class Iommu:
    """What VFIO_IOMMU_SPAPR_TCE_GET_INFO says of every PE of the machine, and where windows appear.

    On a PC there are no windows, but `ranges` of IOVA, and of the rest only `page_sizes` means something.
    """

    default_window: Window
    second_window_start: (
        int  # bus address of the first window created beside the default one; 0 without dynamic windows
    )
    page_sizes: int  # mask: bit n set means IOMMU pages of 1 << n bytes
    levels: int  # most levels that a TCE table can have
    windows: int  # most windows of a PE, the default one included
    dynamic_windows: bool = True  # whether windows can be created and removed (DDW); without, there is no v2 (IODA1)
    ranges: tuple[tuple[int, int], ...] = ()  # Type1: first and last IOVA of what can be mapped, ascending
    remaps_interrupts: bool = True  # a PC: whether devices are kept from sending each other's interrupts
    pamu: Pamu | None = None  # of a Freescale P4080, which has nothing else of this but `page_sizes`


@dataclass(frozen=True)
class Platform:
    """The host that the kernel sees, in the words of /proc/cpuinfo."""

    name: str  # "PowerNV" (bare metal), "pSeries" (a PAPR guest), "PC" (x86-64) or "P4080DS"
    cpu: str  # "POWER8", ...
    mmu: str  # "Hash" or "Radix"; empty elsewhere
    eeh: bool  # whether EEH answers
    page_size: int = 4096  # host page in bytes, unless the target or the URL says otherwise
    kernel: str = "6.12"  # whose answers the modelled kernel gives, unless the URL says otherwise
    release: str | None = None  # what uname -r says, where it is known
    memory: int = 16 << 30  # bytes of RAM, unless [machine] says
    noiommu: bool = False  # whether the kernel is built to give users devices without an IOMMU (CONFIG_VFIO_NOIOMMU)


@dataclass(frozen=True)
class Machine:
    """How QEMU is asked for this machine."""

    type: str  # of -machine, with its options
    memory: int  # bytes
    devices: tuple[str, ...]  # arguments of -device that belong to no PHB


@dataclass(frozen=True)
class Driver:
    """A PCI driver of the host's, loaded when the machine has booted."""

    name: str
    ids: tuple[tuple[int, int], ...] = ()  # vendor and device; it also takes every device that names it
    vfio: bool = False  # a variant driver of vfio-pci: its devices are open to VFIO


@dataclass(frozen=True)
class Interface:
    """A network interface."""

    name: str
    up: bool = True


@dataclass(frozen=True)
class Disk:
    """A block device, a partition too, and what the host uses it for."""

    name: str
    number: tuple[int, int]  # major, minor
    mounted: tuple[str, ...] = ()  # where
    swap: bool = False
    btrfs: bool = False  # a member of a btrfs that is mounted under another member's name
    holders: tuple[str, ...] = ()  # what is built on it: dm-0, md0
    multipath: bool = False  # an NVMe namespace that hangs under its subsystem rather than under one controller


@dataclass(frozen=True)
class Bar:
    """A BAR of a function."""

    index: int  # 0 to 5; a 64-bit one takes the next as well
    size: int  # bytes, a power of two
    io: bool = False  # I/O ports, not memory
    bits64: bool = False  # can be anywhere in 64 bits
    prefetchable: bool = False


@dataclass(frozen=True)
class Msix:
    """The MSI-X table of a function."""

    vectors: int  # 0: it has no MSI-X
    bar: int = 0  # index of the BAR with the table and the pending bits
    table: int = 0  # where the table is in it, bytes
    pba: int = 0  # where the pending bits are, bytes


@dataclass(frozen=True)
class Device:
    """A PCI function."""

    model: str  # of QEMU's -device: "edu", "nvme", ...; what the modelled kernel does not know is a plain endpoint
    address: str  # domain:bus:slot.function, as sysfs names it
    vendor: int  # PCI vendor ID
    device: int  # PCI device ID
    device_class: int  # PCI class code, 24 bits
    slot: str = ""  # slot.function on the bus below the PHB; empty for the root port
    group: int | None = None  # IOMMU group; on POWER bridges have none
    pe: int | None = None  # PE number
    reset: tuple[str, ...] = ()  # ways to reset it, in the order of sysfs reset_method; empty: it has none
    properties: tuple[tuple[str, str], ...] = ()  # of QEMU's -device
    drive: int = 0  # bytes of the backing drive, for a device that has one
    bars: tuple[Bar, ...] | None = None  # None: those of the model
    msix: Msix | None = None  # None: that of the model, as far as its BAR is there
    rom: int = 0  # bytes of the expansion ROM, a power of two; `option_rom` is in it; 0: the function has none
    subsystem_vendor: int | None = None
    subsystem_device: int | None = None
    revision: int | None = None  # of these three, None is what the model has
    secondary_bus: int | None = None  # a bridge: number of the bus below it
    window: Window | None = None  # the default window of its PE, where that is not the machine's
    reserved: tuple[tuple[int, int], ...] = ()  # a PC: first and last IOVA of what firmware uses the device for (RMRR)
    driver: str | None = None  # of the host's, that has it after boot
    driver_override: str | None = None  # that was written before
    overridable: bool = True  # whether there is a driver_override file (kernels before 3.16 have none)
    physical_slot: str | None = None  # name of the slot of the host's that it is in
    interfaces: tuple[Interface, ...] = ()
    disks: tuple[Disk, ...] = ()

    @property
    def bus(self) -> int:
        """Number of the bus that it sits on."""
        return int(self.address.split(":")[1], 16)


@dataclass(frozen=True)
class Phb:
    """A PCI host bridge."""

    index: int  # of QEMU's PHB
    domain: int  # PCI domain that the kernel gives it
    devices: tuple[Device, ...]
    root_port: Device | None = None  # absent on pseries, whose devices sit on the PHB's own bus
    chipset: tuple[Device, ...] = ()  # functions of the machine itself, which QEMU need not be asked for

    @property
    def functions(self) -> tuple[Device, ...]:
        """The root port, if there is one, the devices, and what belongs to the chipset."""
        return (*((self.root_port,) if self.root_port else ()), *self.devices, *self.chipset)

    def parent(self, device: Device) -> Device | None:
        """The bridge above a device; None on a root bus."""
        return next((each for each in self.functions if each.secondary_bus == device.bus), None)


@dataclass(frozen=True)
class Topology:
    """A machine."""

    name: str
    description: str
    platform: Platform
    iommu: Iommu
    machine: Machine | None  # None: not a machine of the lab
    phbs: tuple[Phb, ...]
    drivers: tuple[Driver, ...] = ()

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices of every PHB, without the root ports and what belongs to the chipset."""
        return tuple(device for phb in self.phbs for device in phb.devices)

    @property
    def memory(self) -> int:
        """Bytes of RAM."""
        return self.machine.memory if self.machine else self.platform.memory

    def device(self, address: str) -> Device:
        """The device, or the root port, at `address`. Raises KeyError."""
        for phb in self.phbs:
            for device in phb.functions:
                if device.address == address:
                    return device
        raise KeyError(f"{self.name} has no device {address}")

    def groups(self) -> dict[int, tuple[Device, ...]]:
        """The devices of every IOMMU group, without those of the chipset."""
        found: dict[int, tuple[Device, ...]] = {}
        for device in self.devices:
            if device.group is not None:
                found[device.group] = (*found.get(device.group, ()), device)
        return found

    def default_window(self, group: int) -> Window:
        """The window that the PE of this group has at boot."""
        own = (device.window for device in self.groups().get(group, ()) if device.window)
        return next(own, self.iommu.default_window)

    def only(self, indexes: Iterable[int]) -> Topology:
        """The same machine with only these PHBs, which starts faster. The kernel numbers groups as it finds them, so
        groups are numbered anew; domains and PEs stay. Raises ValueError for a PHB that is not there."""
        wanted = set(indexes)
        if missing := wanted - {phb.index for phb in self.phbs}:
            have = ", ".join(str(phb.index) for phb in self.phbs)
            raise ValueError(f"{self.name} has no PHB {min(missing)}; it has {have}")
        phbs = [phb for phb in self.phbs if phb.index in wanted]
        groups = sorted({device.group for phb in phbs for device in phb.devices if device.group is not None})
        renumbered = {old: new for new, old in enumerate(groups)}

        def moved(device: Device) -> Device:
            return device if device.group is None else replace(device, group=renumbered[device.group])

        return replace(self, phbs=tuple(replace(phb, devices=tuple(map(moved, phb.devices))) for phb in phbs))


def option_rom(size: int) -> bytes:
    """What is in an expansion ROM of `size` bytes: an image that ends 512 bytes before it does (PCI Firmware
    Specification, 5.1)."""
    length = size - _SECTOR
    data = b"PCIR" + bytes(6) + b"\x18\0" + bytes(4) + (length // _SECTOR).to_bytes(2, "little") + bytes(3) + b"\x80"
    header = b"\x55\xaa" + bytes(22) + _ROM_DATA.to_bytes(2, "little")
    start = header.ljust(_ROM_DATA, b"\0") + data.ljust(_SECTOR - _ROM_DATA, b"\0")
    return start + (bytes(range(256)) * (length // 256))[: length - len(start)]
