"""The processors that the lab emulates, and what differs between them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """A processor architecture."""

    name: str  # Debian's
    emulator: str  # QEMU's program
    package: str  # Debian's package of that program
    machine: tuple[str, ...]  # arguments of QEMU: the machine that a plain Linux boots on fastest
    console: str
    kernel: str  # file name in /boot of the kernel that QEMU loads, without the release
    modules: tuple[str, ...]  # of the kernel, beside those that every architecture needs


POWER = Architecture(
    name="ppc64el",
    emulator="qemu-system-ppc64",
    package="qemu-system-ppc",
    machine=("-M", "pseries,x-vof=on"),
    console="hvc0",
    kernel="vmlinux",
    modules=("vfio_iommu_spapr_tce",),
)
X86 = Architecture(
    name="amd64",
    emulator="qemu-system-x86_64",
    package="qemu-system-x86",
    machine=("-M", "q35", "-cpu", "max"),
    console="ttyS0",
    kernel="vmlinuz",
    modules=("vfio_iommu_type1", "virtio_pci"),
)


@dataclass(frozen=True)
class Flavour:
    """A kernel of Debian's."""

    architecture: Architecture
    page_size: int  # bytes
    base: str | None = None  # the flavour that it is, with a module built anew; None: one that Debian packages
    options: tuple[str, ...] = ()  # that the module has on


KERNELS = {
    "powerpc64le": Flavour(POWER, 4096),
    "powerpc64le-64k": Flavour(POWER, 65536),
    "amd64": Flavour(X86, 4096),
    "amd64-noiommu": Flavour(X86, 4096, "amd64", ("VFIO_NOIOMMU",)),
}
"""By the name that Debian's packages have, where they do."""
