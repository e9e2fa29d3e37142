"""Interrupts of a device as a user gets them: INTx, MSI, MSI-X, error and request.  (vfio_pci_intrs.c)"""

from __future__ import annotations

import errno
import functools
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from vfio import uapi
from vfio.fake import registers as reg
from vfio.fake.eventfd import EventFd, VirqFd
from vfio.fake.kernel_error import fail

if TYPE_CHECKING:
    from vfio.fake.process import Process
    from vfio.fake.user import Argument
    from vfio.fake.vfio_pci_device import VfioPciDevice

INTX, MSI, MSIX, ERR, REQ = 0, 1, 2, 3, 4
COUNT = 5
"""Interrupt indexes of a vfio-pci device."""

_NONE, _BOOL, _EVENTFD = 1, 2, 4
_DATA, _ACTIONS = 0x07, 0x38
_MASK, _UNMASK, _TRIGGER = 0x08, 0x10, 0x20
_MINSZ = 20
_MSI_ADDRESS = 0xFFFF_0000_0000
_MESSAGE_SIZE = 4  # bytes
_ENOTSUPP = 524  # the kernel's own errno, which has no name in user space


class Interrupts:
    """The interrupts of one opened device.  At most one of INTx, MSI and MSI-X is active."""

    def __init__(self, vdev: VfioPciDevice) -> None:
        self._vdev = vdev
        self._pci = vdev.pci
        self.active: int | None = None
        """INTX, MSI or MSIX."""
        self.msi_queue_max = 0
        """Logarithm of the vectors that the last MSI had."""
        self._disabled = False  # the user's DisINTx
        self._masked = False
        self._trigger: EventFd | None = None
        self._unmask: VirqFd | None = None
        self._vectors: dict[int, EventFd] = {}
        self._allocated = 0
        self._waiting: set[int] = set()
        """MSI vectors whose message is kept until there is an eventfd for it."""
        self._single: dict[int, EventFd] = {}  # ERR and REQ
        self._dynamic = self._pci.machine.topology.platform.name == "PC"
        """Whether MSI-X vectors can be allocated one by one: no interrupt controller of POWER can."""

    @property
    def msi_active(self) -> bool:
        return self.active == MSI

    # --- what there is ---

    def count(self, index: int) -> int:
        """Interrupts of an index; 0 for those that the device does not have."""
        registers = self._pci.registers
        if index == INTX:
            return 1 if self._vdev.config.interrupt_pin else 0
        if index == MSI and (at := registers.find(reg.CAP_MSI)):
            return 1 << ((self._pci.host_read(at + reg.MSI_FLAGS, 2) & reg.MSI_QUEUE_MAX) >> 1)
        if index == MSIX and (at := registers.find(reg.CAP_MSIX)):
            return (self._pci.host_read(at + reg.MSIX_FLAGS, 2) & reg.MSIX_SIZE) + 1
        return int(index == REQ or (index == ERR and self._pci.is_express))

    def info(self, argument: Argument) -> int:
        """VFIO_DEVICE_GET_IRQ_INFO."""
        info = argument.read(uapi.vfio_irq_info)
        if info.index >= COUNT or (info.index == ERR and not self._pci.is_express):
            raise fail(errno.EINVAL)
        info.count = self.count(info.index)
        info.flags = uapi.VFIO_IRQ_INFO_EVENTFD
        if info.index == INTX:
            info.flags |= uapi.VFIO_IRQ_INFO_MASKABLE | uapi.VFIO_IRQ_INFO_AUTOMASKED
        elif info.index != MSIX or not info.count or not self._dynamic:
            info.flags |= uapi.VFIO_IRQ_INFO_NORESIZE
        argument.copy_out(bytes(uapi.buffer(info)))
        return 0

    def set(self, process: Process, argument: Argument) -> int:
        """VFIO_DEVICE_SET_IRQS."""
        argsz, flags, index, start, count = struct.unpack("=5I", argument.copy_in(_MINSZ))
        if argsz < _MINSZ or index >= COUNT or count >= 0xFFFF_FFFF - start or flags & ~(_DATA | _ACTIONS):
            raise fail(errno.EINVAL)
        there = self.count(index)
        if start >= there or start + count > there:
            raise fail(errno.EINVAL)
        kind = flags & _DATA
        if kind not in (_NONE, _BOOL, _EVENTFD):
            raise fail(errno.EINVAL)
        size = count * {_NONE: 0, _BOOL: 1, _EVENTFD: 4}[kind]
        if argsz - _MINSZ < size:
            raise fail(errno.EINVAL)
        data = argument.copy_in(size, _MINSZ) if size else b""
        values = list(data) if kind == _BOOL else [fd for (fd,) in struct.iter_unpack("=i", data)]
        actions: dict[tuple[int, int], Callable[[Process, int, int, int, list[int]], int]] = {
            (INTX, _MASK): self._intx_mask,
            (INTX, _UNMASK): self._intx_unmask,
            (INTX, _TRIGGER): self._intx_trigger,
            (MSI, _TRIGGER): self._msi_trigger,
            (MSIX, _TRIGGER): self._msix_trigger,
            (ERR, _TRIGGER): self._err_trigger,
            (REQ, _TRIGGER): self._req_trigger,
        }
        action = actions.get((index, flags & _ACTIONS))
        if action is None:
            raise fail(errno.ENOTTY)
        return action(process, kind, start, count, values)

    def signal(self, index: int) -> None:
        """Tell the user of an error (ERR) or of a wish for the device (REQ); nothing where nobody listens."""
        if eventfd := self._single.get(index):
            eventfd.signal()

    def close(self) -> None:
        """The last descriptor of the device is gone."""
        if self.active == INTX:
            self._intx_disable()
        elif self.active is not None:
            self._msi_disable()
        self._disabled = False

    def forget(self) -> None:
        """Drop ERR and REQ, the last thing of closing."""
        for eventfd in self._single.values():
            eventfd.put()
        self._single.clear()

    # --- INTx ---

    def disable_intx(self, disabled: bool) -> None:
        """The user set or cleared DisINTx in COMMAND."""
        if disabled == self._disabled:
            return
        self._disabled = disabled
        if disabled:
            self.mask_intx()
        else:
            self.unmask_intx()

    def mask_intx(self) -> bool:
        """Mask; True if it was not."""
        if self.active != INTX:
            self._pci.change_command(set_bits=reg.COMMAND_INTX_DISABLE)
            return False
        if self._masked:
            return False
        self._masked = True
        self._pci.change_command(set_bits=reg.COMMAND_INTX_DISABLE)
        return True

    def unmask_intx(self) -> None:
        """Unmask; a line that is still asserted signals again at once, and stays masked."""
        if self.active != INTX:
            self._pci.change_command(clear_bits=reg.COMMAND_INTX_DISABLE)
        elif self._masked and not self._disabled:
            if self._pci.line_asserted:
                self._send_intx()
            else:
                self._masked = False
                self._pci.change_command(clear_bits=reg.COMMAND_INTX_DISABLE)

    def _intx_asserted(self) -> None:
        """The handler of the line: masks it, because only the user's driver can make the device let go."""
        if not self._masked:
            self._masked = True
            self._pci.change_command(set_bits=reg.COMMAND_INTX_DISABLE)
            self._send_intx()

    def _send_intx(self) -> None:
        if self.active == INTX and not self._disabled and self._trigger:
            self._trigger.signal()

    def _intx_enable(self, trigger: EventFd | None) -> None:
        if not self._pci.irq:
            raise fail(errno.ENODEV)
        self.active, self._trigger, self._masked = INTX, trigger, self._disabled
        if self._masked:
            self._pci.change_command(set_bits=reg.COMMAND_INTX_DISABLE)
        else:
            self._pci.change_command(clear_bits=reg.COMMAND_INTX_DISABLE)
        self._pci.intx_handler = self._intx_asserted
        self._pci.check_line()

    def _intx_disable(self) -> None:
        self._drop_unmask()
        self._pci.intx_handler = None
        if self._trigger:
            self._trigger.put()
        self._trigger, self.active = None, None

    def _intx_mask(self, process: Process, kind: int, start: int, count: int, values: list[int]) -> int:
        if self.active != INTX or start or count != 1:
            raise fail(errno.EINVAL)
        if kind == _EVENTFD:
            raise fail(errno.ENOTTY)
        if kind == _NONE or values[0]:
            self.mask_intx()
        return 0

    def _intx_unmask(self, process: Process, kind: int, start: int, count: int, values: list[int]) -> int:
        if self.active != INTX or start or count != 1:
            raise fail(errno.EINVAL)
        if kind == _EVENTFD and values[0] >= 0:
            self._unmask = self._pci.machine.virqfds.listen(process, values[0], self.unmask_intx, self._unmask)
        elif kind == _EVENTFD:
            self._drop_unmask()
        elif kind == _NONE or values[0]:
            self.unmask_intx()
        return 0

    def _drop_unmask(self) -> None:
        if self._unmask:
            self._unmask.put()
            self._unmask = None

    def _intx_trigger(self, process: Process, kind: int, start: int, count: int, values: list[int]) -> int:
        if self.active == INTX and not count and kind == _NONE:
            self._intx_disable()
            return 0
        if self.active not in (INTX, None) or start or count != 1:
            raise fail(errno.EINVAL)
        if kind == _EVENTFD:
            trigger = EventFd(process, values[0]) if values[0] >= 0 else None
            if self.active == INTX:
                if self._trigger:
                    self._trigger.put()
                self._trigger = trigger
                return 0
            try:
                self._intx_enable(trigger)
            except OSError:
                if trigger:
                    trigger.put()
                raise
            return 0
        if self.active != INTX:
            raise fail(errno.EINVAL)
        if kind == _NONE or values[0]:
            self._send_intx()
        return 0

    # --- MSI and MSI-X ---

    def _msi_trigger(self, process: Process, kind: int, start: int, count: int, values: list[int]) -> int:
        return self._messages(MSI, process, kind, start, count, values)

    def _msix_trigger(self, process: Process, kind: int, start: int, count: int, values: list[int]) -> int:
        return self._messages(MSIX, process, kind, start, count, values)

    def _messages(self, index: int, process: Process, kind: int, start: int, count: int, values: list[int]) -> int:
        if self.active == index and not count and kind == _NONE:
            self._msi_disable()
            return 0
        if self.active not in (index, None):
            raise fail(errno.EINVAL)
        if kind == _EVENTFD:
            if self.active == index:
                self._set_vectors(process, start, values)
                return 0
            self._msi_enable(index, start + count)
            try:
                self._set_vectors(process, start, values)
            except OSError:
                self._msi_disable()
                raise
            return 0
        if self.active != index:
            raise fail(errno.EINVAL)
        for vector in range(start, start + count):
            if vector in self._vectors and (kind == _NONE or values[vector - start]):
                self._vectors[vector].signal()
        return 0

    def _msi_enable(self, index: int, vectors: int) -> None:
        if not vectors:
            raise fail(errno.ERANGE)
        pci = self._pci
        if pci.power_state != 0:
            raise fail(errno.EINVAL)
        group = pci.group and pci.machine.vfio.groups.get(pci.group.number)
        if group and group.noiommu and pci.machine.topology.iommu.ranges:
            raise fail(_ENOTSUPP)  # the host's IOMMU remaps all messages, and does not know this function
        if index == MSI:
            self.msi_queue_max = (vectors - 1).bit_length()
            pci.enable_msi(_MSI_ADDRESS, self.msi_queue_max)
            if pci.has_xics or self._dynamic:
                # Nobody has asked for these interrupts yet.  An XICS, and a PC, keep one for later; a XIVE drops them.
                for vector in range(vectors):
                    pci.set_vector(vector, functools.partial(self._waiting.add, vector))
        else:
            pci.enable_msix(_MSI_ADDRESS, vectors)
        self.active, self._allocated = index, vectors

    def _msi_disable(self) -> None:
        for vector in list(self._vectors):
            self._clear_vector(vector)
        if self.active == MSI:
            for vector in range(self._allocated):
                self._pci.set_vector(vector, None)
            self._waiting.clear()
        self._pci.disable_messages()
        self.active, self._allocated = None, 0

    def _set_vectors(self, process: Process, start: int, fds: list[int]) -> None:
        """Each vector its eventfd, or none for a negative one; if one fails, all up to it lose theirs."""
        for vector, fd in enumerate(fds, start):
            try:
                self._set_vector(process, vector, fd)
            except OSError:
                for undone in range(start, vector + 1):
                    self._clear_vector(undone)
                raise

    def _set_vector(self, process: Process, vector: int, fd: int) -> None:
        self._clear_vector(vector)
        if fd < 0:
            return
        if vector >= self._allocated and not (self._dynamic and self.active == MSIX):
            raise fail(errno.EINVAL)
        eventfd = EventFd(process, fd)
        self._vectors[vector] = eventfd
        self._pci.set_vector(vector, eventfd.signal)
        if vector in self._waiting:
            self._waiting.discard(vector)
            eventfd.signal()

    def _clear_vector(self, vector: int) -> None:
        if eventfd := self._vectors.pop(vector, None):
            astray = self.active == MSI and self._pci.machine.topology.platform.name in ("PowerNV", "PC")
            self._pci.set_vector(vector, self._send_astray if astray else None)
            eventfd.put()

    def _send_astray(self) -> None:
        """An interrupt was given back: powernv and a PC clear the address and data of its message in the device, which
        cannot mask it.  The message is now a write of zeros at bus address 0, the user's own."""
        self._pci.dma_write(0, bytes(_MESSAGE_SIZE))

    # --- error and request ---

    def _err_trigger(self, process: Process, kind: int, start: int, count: int, values: list[int]) -> int:
        return self._one(ERR, process, kind, count, values)

    def _req_trigger(self, process: Process, kind: int, start: int, count: int, values: list[int]) -> int:
        return self._one(REQ, process, kind, count, values)

    def _one(self, index: int, process: Process, kind: int, count: int, values: list[int]) -> int:
        if kind == _NONE:
            if index not in self._single:
                raise fail(errno.EINVAL)
            if count:
                self._single[index].signal()
            else:
                self._single.pop(index).put()
            return 0
        if not count or (kind == _EVENTFD and values[0] < -1):
            raise fail(errno.EINVAL)
        if kind == _BOOL:
            if values[0]:
                self.signal(index)
            return 0
        eventfd = EventFd(process, values[0]) if values[0] >= 0 else None
        if old := self._single.pop(index, None):
            old.put()
        if eventfd:
            self._single[index] = eventfd
        return 0
