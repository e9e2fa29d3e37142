"""Configuration space as vfio-pci lets a user see it: part hardware, part a shadow copy.  (vfio_pci_config.c)

Every byte belongs to the header, to a capability, or to a gap.  For the header and the capabilities of `permissions`,
two masks say which bits are virtual (kept in the shadow copy) and which can be written; other capabilities are
read-only but for the virtual list pointer; gaps are the hardware's, unguarded.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfio.fake import capability_length, permissions
from vfio.fake import registers as reg
from vfio.fake.kernel_error import fail
from vfio.fake.permissions import Permissions

if TYPE_CHECKING:
    from vfio.fake.vfio_pci_device import VfioPciDevice

_HEADER, _GAP = 0, 0xFF
"""What the map says of bytes of the header, and of bytes that belong to nothing."""

_HIDDEN_SPACE = 4  # bytes of an unknown extended capability that has to stay, as an anchor of the list


class ConfigSpace:
    """The user's view of one device, made at its first open."""

    def __init__(self, vdev: VfioPciDevice) -> None:
        """ENODEV while the device's configuration space is blocked."""
        self._vdev = vdev
        self._pci = vdev.pci
        self.size = self._pci.config_size
        self.map = bytearray(reg.HEADER_END) + bytearray((_GAP,)) * (self.size - reg.HEADER_END)
        """By byte: the ID of the capability that it belongs to, or `_HEADER` or `_GAP`."""
        self.virtual = bytearray(self.size)
        """The shadow copy."""
        self._bars_dirty = True
        self._msi = Permissions(0)
        self._fill(0, reg.HEADER_END)
        self._real_bars = bytes(self.virtual)
        if vdev.hides_intx:
            self.virtual[reg.INTERRUPT_PIN] = 0
        self._find_capabilities()
        if self._has_extended():
            self._find_extended()

    # --- access ---

    def read(self, offset: int, count: int) -> bytes:
        """EFAULT for a range that leaves configuration space, ENODEV for hardware that is out of reach."""
        self._check(offset, count)
        found = b""
        while len(found) < count:
            at = offset + len(found)
            width = self._width(at, count - len(found))
            found += self._read(at, width).to_bytes(width, "little")
        return found

    def write(self, offset: int, data: bytes) -> int:
        """As `read`.  What comes before a piece that fails has been written."""
        self._check(offset, len(data))
        done = 0
        while done < len(data):
            width = self._width(offset + done, len(data) - done)
            self._write(offset + done, width, int.from_bytes(data[done : done + width], "little"))
            done += width
        return done

    @property
    def command(self) -> int:
        """COMMAND as the user set it."""
        return self._virtual(reg.COMMAND, 2)

    @property
    def interrupt_pin(self) -> int:
        return self.virtual[reg.INTERRUPT_PIN]

    def _check(self, offset: int, count: int) -> None:
        if offset + count > self.size:
            raise fail(errno.EFAULT)

    def _width(self, at: int, count: int) -> int:
        """The piece to access next: aligned, within a word of 4 bytes, within one capability."""
        same = 1
        while (at + same) % 4 and at + same < self.size and self.map[at + same] == self.map[at]:
            same += 1
        count = min(count, same)
        if count >= 4 and at % 4 == 0:
            return 4
        return 2 if count >= 2 and at % 2 == 0 else 1

    def _read(self, at: int, width: int) -> int:
        identity = self.map[at]
        if identity == _GAP:
            return self._pci.config_read(at, width)
        start = self._start(at)
        found = self._permissions(at)
        if found is None:
            return self._read_only(at, width, at - start)
        if identity == _HEADER and _is_bar(at):
            self._fix_bars()
        virt = found.virtual(at - start, width)
        value = self._virtual(at, width)
        if virt != (1 << 8 * width) - 1:
            value = self._pci.config_read(at, width) & ~virt | value & virt
        return value

    def _read_only(self, at: int, width: int, offset: int) -> int:
        """A capability without masks: hardware, with the list pointer from the shadow copy."""
        value = self._pci.config_read(at, width).to_bytes(width, "little")
        if at >= reg.STANDARD_SIZE:
            if offset < 4:
                value = bytes(self.virtual[at : at + width])
        elif offset < 2:
            virtual = min(width, 2 - offset)
            value = bytes(self.virtual[at : at + virtual]) + value[virtual:]
        return int.from_bytes(value, "little")

    def _write(self, at: int, width: int, value: int) -> None:
        identity = self.map[at]
        if identity == _GAP:
            self._pci.config_write(at, width, value)
            return
        if self._raw(at):
            self._pci.config_write(at, width, value)
            return
        found = self._permissions(at)
        if found is None:
            return
        start = self._start(at)
        offset = at - start
        if identity == _HEADER:
            self._write_header(found, at, width, value)
        elif at >= reg.STANDARD_SIZE:
            self._write_masked(found, at, width, offset, value)
        elif identity == reg.CAP_MSI:
            self._write_masked(found, at, width, offset, value)
            if offset <= reg.MSI_FLAGS <= offset + width:
                self._write_msi_flags(start)
        elif identity == reg.CAP_PM:
            self._write_masked(found, at, width, offset, value)
            if offset == reg.PM_CTRL:
                self._vdev.set_power_state(value & reg.PM_STATE)
        elif identity == reg.CAP_EXPRESS:
            self._write_express(found, at, width, offset, value)
        elif identity == reg.CAP_AF:
            self._write_af(found, at, width, offset, value)
        elif identity == reg.CAP_VPD:
            self._write_vpd(found, at, width, offset, value)
        else:
            self._write_masked(found, at, width, offset, value)

    def _write_masked(self, found: Permissions, at: int, width: int, offset: int, value: int) -> None:
        virt, write = found.virtual(offset, width), found.writable(offset, width)
        if write & virt:
            self._set_virtual(at, width, self._virtual(at, width) & ~(write & virt) | value & write & virt)
        if write & ~virt:
            real = self._pci.config_read(at, width)
            self._pci.config_write(at, width, real & ~(write & ~virt) | value & write & ~virt)

    # --- header ---

    def _write_header(self, found: Permissions, at: int, width: int, value: int) -> None:
        if at == reg.COMMAND:
            self._before_command(value)
        self._write_masked(found, at, width, at, value)
        if at == reg.COMMAND:
            decode = reg.COMMAND_MEMORY | reg.COMMAND_IO
            self._set_virtual(reg.COMMAND, 2, self.command & ~decode | value & decode)
        if reg.COMMAND <= at <= reg.COMMAND + 1:
            self._vdev.interrupts.disable_intx(bool(self.command & reg.COMMAND_INTX_DISABLE))
        if _is_bar(at):
            self._bars_dirty = True

    def _before_command(self, value: int) -> None:
        """Decode is enabled that the hardware lost, or BARs changed: somebody reset the device behind our back."""
        real = self._pci.config_read(reg.COMMAND, 2)
        lost = value & self.command & ~real & (reg.COMMAND_MEMORY | reg.COMMAND_IO)
        bars = range(reg.BAR0, reg.BAR0 + 24, 4)
        changed = any(self._saved_bar(bar) and self._saved_bar(bar) != self._pci.config_read(bar, 4) for bar in bars)
        if lost or changed:
            for bar in (*bars, reg.ROM_BAR):
                self._pci.config_write(bar, 4, self._saved_bar(bar))

    def _saved_bar(self, at: int) -> int:
        return int.from_bytes(self._real_bars[at : at + 4], "little")

    def _fix_bars(self) -> None:
        """Make the shadow BARs read as hardware would: no more address bits than the size leaves, fixed type bits."""
        if not self._bars_dirty:
            return
        index = 0
        while index < 6:
            bar, at = self._pci.bars.get(index), reg.BAR0 + 4 * index
            index += 1
            if bar is None or not bar.start:
                self._set_virtual(at, 4, 0)  # what the host did not assign does not exist
                continue
            self._set_virtual(at, 4, self._virtual(at, 4) & -bar.size & 0xFFFF_FFFF | bar.type_bits)
            if bar.bits64:
                self._set_virtual(at + 4, 4, self._virtual(at + 4, 4) & (-bar.size >> 32) & 0xFFFF_FFFF)
                index += 1
        rom = self._pci.bars.get(6)
        mask = -rom.size & 0xFFFF_FFFF | 1 if rom and rom.start else 0
        self._set_virtual(reg.ROM_BAR, 4, self._virtual(reg.ROM_BAR, 4) & mask)
        self._bars_dirty = False

    # --- capabilities with a meaning ---

    def _write_msi_flags(self, start: int) -> None:
        """MSI is enabled by SET_IRQS, not from here; and the queue is no longer than what was allocated there."""
        interrupts = self._vdev.interrupts
        flags = self._virtual(start + reg.MSI_FLAGS, 2)
        if not interrupts.msi_active:
            flags &= ~reg.MSI_ENABLE
        if (flags & reg.MSI_QUEUE_SIZE) >> 4 > interrupts.msi_queue_max:
            flags = flags & ~reg.MSI_QUEUE_SIZE | interrupts.msi_queue_max << 4
        self._set_virtual(start + reg.MSI_FLAGS, 2, flags)
        self._pci.config_write(start + reg.MSI_FLAGS, 2, flags)

    def _write_express(self, found: Permissions, at: int, width: int, offset: int, value: int) -> None:
        start = at - offset
        control = start + reg.EXP_DEVCTL
        before = self._virtual(control, 2)
        self._write_masked(found, at, width, offset, value)
        if self._virtual(control, 2) & reg.EXP_DEVCTL_FLR:
            self._set_virtual(control, 2, self._virtual(control, 2) & ~reg.EXP_DEVCTL_FLR)
            if self._pci.config_read(start + reg.EXP_DEVCAP, 4) & reg.EXP_DEVCAP_FLR:
                self._vdev.try_reset()
        if (before ^ (after := self._virtual(control, 2))) & 0x7000:
            # A read request no shorter than the payload that the host set.
            real = self._pci.config_read(control, 2)
            request = max(after >> 12 & 7, real >> 5 & 7)
            self._pci.config_write(control, 2, real & ~0x7000 | request << 12)

    def _write_af(self, found: Permissions, at: int, width: int, offset: int, value: int) -> None:
        start = at - offset
        self._write_masked(found, at, width, offset, value)
        if self.virtual[start + reg.AF_CTRL] & 1:
            self.virtual[start + reg.AF_CTRL] &= ~1
            able = self._pci.config_read(start + reg.AF_CAP, 1)
            if able & reg.AF_CAP_FLR and able & reg.AF_CAP_TP:
                self._vdev.try_reset()

    def _write_vpd(self, found: Permissions, at: int, width: int, offset: int, value: int) -> None:
        """Writing the byte with the flag accesses the data, and toggles the flag to say that it is done."""
        start = at - offset
        self._write_masked(found, at, width, offset, value)
        if offset > 3 or offset + width <= 3:
            return
        address = self._virtual(start + 2, 2)
        vpd, place = self._pci.model.vpd, address & 0x7FFF
        if place % 4 or place + 4 > len(vpd):
            return  # the flag does not toggle: the user's driver times out
        if address & 0x8000:
            vpd[place : place + 4] = self.virtual[start + 4 : start + 8]
        else:
            self.virtual[start + 4 : start + 8] = vpd[place : place + 4]
        self._set_virtual(start + 2, 2, address ^ 0x8000)

    # --- the map ---

    def _permissions(self, at: int) -> Permissions | None:
        identity = self.map[at]
        if at >= reg.STANDARD_SIZE:
            return permissions.EXTENDED.get(identity)
        return self._msi if identity == reg.CAP_MSI else permissions.STANDARD.get(identity)

    def _raw(self, at: int) -> bool:
        if at >= reg.STANDARD_SIZE:
            return self.map[at] in permissions.EXTENDED_RAW
        return self.map[at] == reg.CAP_VENDOR

    def _start(self, at: int) -> int:
        """Where the run of bytes begins that `at` is in: the kernel, too, takes two capabilities of one kind that
        touch for one."""
        if self.map[at] == _HEADER and at < reg.STANDARD_SIZE:
            return 0
        base = reg.STANDARD_SIZE if at >= reg.STANDARD_SIZE else reg.HEADER_END
        identity = self.map[at]
        while at > base and self.map[at - 1] == identity:
            at -= 1
        return at

    def _find_capabilities(self) -> None:
        pci = self._pci
        if not pci.config_read(reg.STATUS, 2) & reg.STATUS_CAP_LIST:
            return
        previous, at, found = reg.CAPABILITIES, pci.config_read(reg.CAPABILITIES, 1), 0
        for _ in range((reg.STANDARD_SIZE - reg.HEADER_END) // 4):
            if not at:
                break
            identity, following = pci.config_read(at, 1), pci.config_read(at + 1, 1)
            length = capability_length.standard(pci, identity, at)
            if not length:
                self.virtual[previous] = following
                at = following
                continue
            self._claim(at, length, identity)
            if identity == reg.CAP_PM:
                self._set_virtual(at + 2, 2, self._virtual(at + 2, 2) & ~permissions.PMC_PME)
                self._set_virtual(at + 4, 2, self._virtual(at + 4, 2) & ~permissions.PMCSR_PME)
            elif identity == reg.CAP_MSI:
                self._msi = permissions.msi(pci.config_read(at + reg.MSI_FLAGS, 2))
            previous, at = at + 1, following
            found += 1
        if not found:
            self._set_virtual(reg.STATUS, 2, self._virtual(reg.STATUS, 2) & ~reg.STATUS_CAP_LIST)

    def _has_extended(self) -> bool:
        """Only PCI Express and the second PCI-X have extended capabilities, and only where the first word is one."""
        carriers = {reg.CAP_EXPRESS, permissions.CAP_PCIX} & set(self.map[reg.HEADER_END : reg.STANDARD_SIZE])
        return bool(self.size > reg.STANDARD_SIZE and carriers and self._pci.config_read(reg.STANDARD_SIZE, 4))

    def _find_extended(self) -> None:
        pci = self._pci
        previous, at, found = 0, reg.STANDARD_SIZE, 0
        for _ in range((self.size - reg.STANDARD_SIZE) // 4):
            if at < reg.STANDARD_SIZE:
                break
            header = pci.config_read(at, 4)
            identity, following = header & 0xFFFF, header >> 20 & 0xFFC
            length = capability_length.extended(pci, identity, at)
            hidden = not length
            if hidden and previous:
                self._set_virtual(previous, 4, self._virtual(previous, 4) & 0xFFFFF | following << 20)
                at = following
                continue
            self._claim(at, length or _HIDDEN_SPACE, identity & 0xFF)
            if hidden:
                self._set_virtual(at, 4, self._virtual(at, 4) & 0xFFC00000)
            else:
                found += 1
            previous, at = at, following
        if not found:
            self._set_virtual(reg.STANDARD_SIZE, 4, 0)

    def _claim(self, at: int, length: int, identity: int) -> None:
        length = min(length, self.size - at)
        self.map[at : at + length] = bytes((identity,)) * length
        self._fill(at, length)

    def _fill(self, at: int, length: int) -> None:
        for byte in range(at, at + length):
            self.virtual[byte] = self._pci.config_read(byte, 1)

    def _virtual(self, at: int, width: int) -> int:
        return int.from_bytes(self.virtual[at : at + width], "little")

    def _set_virtual(self, at: int, width: int, value: int) -> None:
        self.virtual[at : at + width] = value.to_bytes(width, "little")


def _is_bar(at: int) -> bool:
    return reg.BAR0 <= at < reg.BAR0 + 24 or reg.ROM_BAR <= at < reg.ROM_BAR + 4
