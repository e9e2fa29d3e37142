"""Raw calls at the seam, said briefly.

Every call answers as the kernel does: a number, negative for an errno.  So a case reads

    assert v2.map(memory.address, 0x10000, PAGE) == -errno.EINVAL
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vfio import uapi
from vfio.backend import Backend, Mapping, Memory

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

NOWHERE = 0x1000
"""An address where a process has nothing: every kernel keeps the lowest addresses free."""
READ, WRITE = uapi.VFIO_DMA_MAP_FLAG_READ, uapi.VFIO_DMA_MAP_FLAG_WRITE
V1, V2 = uapi.VFIO_SPAPR_TCE_IOMMU, uapi.VFIO_SPAPR_TCE_v2_IOMMU
TYPE1, TYPE1_V2 = uapi.VFIO_TYPE1_IOMMU, uapi.VFIO_TYPE1v2_IOMMU
SECOND_WINDOW = 1 << 59
"""Bus address of the window in the second slot."""
_PINNED_AT = 0x4000_0000
"""Where `Container.pin` maps on Type1."""


def iommu_types(platform: str) -> tuple[int, int]:
    """The two versions of the IOMMU model that machines of this platform have, the older one first."""
    return (TYPE1, TYPE1_V2) if platform == "PC" else (V1, V2)


def answer(call: Callable[..., Any], *arguments: object) -> Any:
    """What the kernel answers: the result, or the negative errno."""
    try:
        return call(*arguments)
    except OSError as error:
        if not error.errno:
            raise
        return -error.errno


def foreign(request: int) -> int:
    """The request in the other encoding of ioctl numbers: that of x86 on POWER, and the other way round."""
    return request ^ 0x2000_0000


def other_directions(request: int) -> list[int]:
    """The request as if it were _IOR, _IOW or _IOWR, in the encoding of this machine."""
    if request & 0x2000_0000:  # POWER: three bits, NONE is 1
        return [request & 0x1FFF_FFFF | bits << 29 for bits in (2, 4, 6)]
    return [request | bits << 30 for bits in (1, 2, 3)]


@dataclass(frozen=True)
class Member:
    """A device on vfio-pci, and its group."""

    address: str
    group: int

    @property
    def node(self) -> str:
        return f"/dev/vfio/{self.group}"


class Program:
    """A process that makes calls.  What it has left open is closed by `close_all`.

    `native` is the IOMMU type that programs choose on this machine, `older` the first version of the same model.
    """

    def __init__(self, backend: Backend, types: tuple[int, int] = (V1, V2)) -> None:
        self.backend = backend
        self.older, self.native = types
        self.page = backend.page_size
        self._files: list[int] = []
        self._rest: list[Mapping | Memory] = []

    # --- files ---

    def open(self, path: str, flags: int = os.O_RDWR) -> int:
        """A descriptor, or the negative errno."""
        return self._keep(answer(self.backend.open, path, flags))

    def container(self) -> Container:
        fd = self.open("/dev/vfio/vfio")
        assert fd >= 0, os.strerror(-fd)
        return Container(self, fd)

    def group(self, member: Member) -> Group:
        fd = self.open(member.node)
        assert fd >= 0, f"{member.node}: {os.strerror(-fd)}"
        return Group(self, fd)

    def dup(self, fd: int) -> int:
        return self._keep(answer(self.backend.dup, fd))

    def take(self, fd: int) -> int:
        """Count a descriptor that came by other means among those to close."""
        return self._keep(fd)

    def close(self, fd: int) -> None:
        self._files.remove(fd)
        self.backend.close(fd)

    def _keep(self, fd: int) -> int:
        if fd >= 0:
            self._files.append(fd)
        return fd

    def ioctl(self, fd: int, request: int, arg: int | WriteableBuffer = 0) -> int:
        result: int = answer(self.backend.ioctl, fd, request, arg)
        return result

    # --- memory ---

    def memory(self, length: int, page_size: int | None = None) -> Memory:
        found = self.backend.allocate(length, page_size)
        self._rest.append(found)
        return found

    def mmap(self, fd: int, length: int, offset: int, prot: int = 3) -> Mapping:
        found = self.backend.mmap(fd, length, offset, prot)
        self._rest.append(found)
        return found

    @property
    def locked(self) -> int:
        """Locked memory of this process, bytes."""
        return self.backend.locked().locked

    def close_all(self) -> None:
        """Close every file, newest first, and give the memory back."""
        for mapping in [each for each in self._rest if isinstance(each, Mapping)]:
            mapping.close()
        while self._files:
            with suppress(OSError):
                self.backend.close(self._files.pop())
        for each in self._rest:
            each.close()
        self._rest.clear()

    # --- what most cases begin with ---

    def attached(self, member: Member, iommu: int | None = None) -> Container:
        """A container of that IOMMU type, or of the native one, with the group of `member` in it."""
        container, group = self.container(), self.group(member)
        assert group.set_container(container.fd) == 0
        assert container.set_iommu(self.native if iommu is None else iommu) == 0
        container.group = group
        return container


class Group:
    """A group's file."""

    def __init__(self, program: Program, fd: int) -> None:
        self.program, self.fd = program, fd

    def ioctl(self, request: int, arg: int | WriteableBuffer = 0) -> int:
        return self.program.ioctl(self.fd, request, arg)

    def status(self) -> int:
        """The flags, or the negative errno."""
        status = uapi.vfio_group_status()
        result = self.ioctl(uapi.VFIO_GROUP_GET_STATUS, uapi.buffer(status))
        return result or status.flags

    def set_container(self, fd: int) -> int:
        return self.ioctl(uapi.VFIO_GROUP_SET_CONTAINER, bytearray(fd.to_bytes(4, "little", signed=True)))

    def unset_container(self) -> int:
        return self.ioctl(uapi.VFIO_GROUP_UNSET_CONTAINER)

    def device(self, name: str) -> int:
        """A descriptor, or the negative errno."""
        return self.program._keep(self.ioctl(uapi.VFIO_GROUP_GET_DEVICE_FD, bytearray(name.encode() + b"\0")))

    def close(self) -> None:
        self.program.close(self.fd)


class Container:
    """A container's file; `group` is the one that `Program.attached` put in."""

    group: Group

    def __init__(self, program: Program, fd: int) -> None:
        self.program, self.fd = program, fd

    def seen_by(self, other: Program, fd: int) -> Container:
        """The same container, as the descriptor `fd` of another process."""
        return Container(other, other.take(fd))

    def ioctl(self, request: int, arg: int | WriteableBuffer = 0) -> int:
        return self.program.ioctl(self.fd, request, arg)

    def close(self) -> None:
        self.program.close(self.fd)

    def extension(self, number: int) -> int:
        return self.ioctl(uapi.VFIO_CHECK_EXTENSION, number)

    def set_iommu(self, number: int) -> int:
        return self.ioctl(uapi.VFIO_SET_IOMMU, number)

    def pin(self, vaddr: int, size: int) -> int:
        """Have memory counted and held: sPAPR v2 registers it, which it must be before `map`; Type1 maps it elsewhere."""
        if self.program.native == V2:
            return self.register(vaddr, size)
        return self.map(vaddr, _PINNED_AT, size)

    def unpin(self, vaddr: int, size: int) -> int:
        """Undo `pin`."""
        return self.unregister(vaddr, size) if self.program.native == V2 else self.unmap(_PINNED_AT, size)

    def asks(self) -> int:
        """What VFIO_IOMMU_(SPAPR_TCE_)GET_INFO answers."""
        if self.program.native == V2:
            return self.get_info(uapi.buffer(uapi.vfio_iommu_spapr_tce_info()))
        return self.ioctl(uapi.VFIO_IOMMU_GET_INFO, uapi.buffer(uapi.vfio_iommu_type1_info()))

    # --- sPAPR TCE ---

    def info(self) -> uapi.vfio_iommu_spapr_tce_info:
        info = uapi.vfio_iommu_spapr_tce_info()
        assert self.get_info(uapi.buffer(info)) == 0
        return info

    def get_info(self, buffer: int | WriteableBuffer) -> int:
        return self.ioctl(uapi.VFIO_IOMMU_SPAPR_TCE_GET_INFO, buffer)

    def enable(self, arg: int = 0) -> int:
        return self.ioctl(uapi.VFIO_IOMMU_ENABLE, arg)

    def disable(self, arg: int = 0) -> int:
        return self.ioctl(uapi.VFIO_IOMMU_DISABLE, arg)

    def register(self, vaddr: int, size: int, flags: int = 0) -> int:
        struct = uapi.vfio_iommu_spapr_register_memory(vaddr=vaddr, size=size, flags=flags)
        return self.ioctl(uapi.VFIO_IOMMU_SPAPR_REGISTER_MEMORY, uapi.buffer(struct))

    def unregister(self, vaddr: int, size: int, flags: int = 0) -> int:
        struct = uapi.vfio_iommu_spapr_register_memory(vaddr=vaddr, size=size, flags=flags)
        return self.ioctl(uapi.VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY, uapi.buffer(struct))

    def map(self, vaddr: int, iova: int, size: int, flags: int = READ | WRITE) -> int:
        struct = uapi.vfio_iommu_type1_dma_map(vaddr=vaddr, iova=iova, size=size, flags=flags)
        return self.ioctl(uapi.VFIO_IOMMU_MAP_DMA, uapi.buffer(struct))

    def unmap(self, iova: int, size: int, flags: int = 0) -> int:
        struct = uapi.vfio_iommu_type1_dma_unmap(iova=iova, size=size, flags=flags)
        return self.ioctl(uapi.VFIO_IOMMU_UNMAP_DMA, uapi.buffer(struct))

    def create(self, shift: int, size: int, levels: int = 1, flags: int = 0) -> int:
        """The new window's bus address, or the negative errno."""
        struct = uapi.vfio_iommu_spapr_tce_create(page_shift=shift, window_size=size, levels=levels, flags=flags)
        result = self.ioctl(uapi.VFIO_IOMMU_SPAPR_TCE_CREATE, uapi.buffer(struct))
        return result or struct.start_addr

    def remove(self, start: int, flags: int = 0) -> int:
        struct = uapi.vfio_iommu_spapr_tce_remove(start_addr=start, flags=flags)
        return self.ioctl(uapi.VFIO_IOMMU_SPAPR_TCE_REMOVE, uapi.buffer(struct))

    def eeh(self, op: int, flags: int = 0, argsz: int = 40) -> int:
        struct = uapi.vfio_eeh_pe_op(op=op, flags=flags, argsz=argsz)
        return self.ioctl(uapi.VFIO_EEH_PE_OP, uapi.buffer(struct))
