"""The commands of QEMU's NVMe controller: identify, queues, features; read, write, flush and their like.

NVM Express Base Specification 1.4, sections 5 and 6.  Status and order of checks are those of QEMU 7.2's nvme.  It has
commands that are not here (log pages, namespace management, format, copy, verify): they end as invalid opcodes.  Data
is described by PRPs only.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vfio.fake.devices.nvme import Nvme
    from vfio.fake.devices.nvme_disk import Disk

_DO_NOT_RETRY = 0x4000
_INVALID_OPCODE, _INVALID_FIELD, _TRANSFER_ERROR = 0x001, 0x002, 0x004
_INVALID_NAMESPACE, _SEQUENCE_ERROR, _INVALID_PRP_OFFSET, _LBA_RANGE = 0x00B, 0x00C, 0x013, 0x080
_INVALID_CQID, _INVALID_QID, _QUEUE_SIZE, _EVENTS_LIMIT, _INVALID_VECTOR, _QUEUE_DELETION = (
    *(0x100, 0x101, 0x102, 0x105, 0x108, 0x10C),
)
_NOT_SAVEABLE, _NOT_CHANGEABLE, _NOT_NAMESPACE_SPECIFIC = 0x10D, 0x10E, 0x10F
_COMPARE_FAILURE = 0x285

_NAMESPACES = 256
"""The largest number that a namespace can have."""
_BROADCAST = 0xFFFF_FFFF
_TRANSFER_SHIFT = 7
"""Most pages of one transfer, as a logarithm (MDTS)."""
_EVENTS = 4
_IDENTIFY_SIZE = 4096
_ENTRY = struct.Struct("<BBHIQQQQ6I")

Done = tuple[int, int] | None
"""Status and result; None for a command that is held."""


class TransferFailed(Exception):
    """A DMA of the controller did not reach memory."""


class _Failed(Exception):
    """The command ends with this status."""

    def __init__(self, status: int, *, retry: bool = False) -> None:
        self.status = status if retry else status | _DO_NOT_RETRY


class Command:
    """A submission queue entry."""

    def __init__(self, entry: bytes) -> None:
        fields = _ENTRY.unpack(entry)
        self.opcode, self.flags, self.cid, self.namespace, _, _, self.prp1, self.prp2 = fields[:8]
        self.dwords: tuple[int, ...] = fields[8:]
        """Those from 10 on."""


def admin(controller: Nvme, command: Command) -> Done:
    """What becomes of an admin command."""
    handlers: dict[int, Callable[[Nvme, Command], int | None]] = {
        0x00: _delete_submissions,
        0x01: _create_submissions,
        0x04: _delete_completions,
        0x05: _create_completions,
        0x06: _identify,
        0x08: _abort,
        0x09: _set_feature,
        0x0A: _get_feature,
        0x0C: _hold_event,
    }
    return _do(controller, command, handlers)


def io(controller: Nvme, command: Command) -> Done:
    """What becomes of an I/O command."""
    number = command.namespace
    if not number or (number > _NAMESPACES and number != _BROADCAST):
        return _INVALID_NAMESPACE | _DO_NOT_RETRY, 0
    if command.opcode != 0 and number not in controller.disks:
        return _INVALID_FIELD | _DO_NOT_RETRY, 0
    handlers: dict[int, Callable[[Nvme, Command], int | None]] = {
        0x00: _flush,
        0x01: _write,
        0x02: _read,
        0x05: _compare,
        0x08: _write_zeroes,
        0x09: _manage,
    }
    return _do(controller, command, {0: _flush} if controller.admin_only else handlers)


def _do(controller: Nvme, command: Command, handlers: dict[int, Callable[[Nvme, Command], int | None]]) -> Done:
    handler = handlers.get(command.opcode)
    if handler is None:
        return _INVALID_OPCODE | _DO_NOT_RETRY, 0
    if command.flags & 0xC0:  # data by SGL
        return _INVALID_FIELD | _DO_NOT_RETRY, 0
    if command.flags & 0x03:  # fused with another
        return _INVALID_FIELD, 0
    try:
        result = handler(controller, command)
    except _Failed as failed:
        return failed.status, int(handler is _abort)
    except TransferFailed:
        return _TRANSFER_ERROR | (_DO_NOT_RETRY if handler in (_read, _write, _compare) else 0), 0
    return None if result is None else (0, result)


# --- data ---


def _pages(controller: Nvme, command: Command, length: int) -> Iterator[tuple[int, int]]:
    """The data of a command, as (address, bytes) of its pages: PRP 1, and PRP 2 or the lists that it points to."""
    page = controller.page_size
    here = min(length, page - command.prp1 % page)
    yield command.prp1, here
    length -= here
    if not length:
        return
    if length <= page:
        yield _aligned(command.prp2, page), length
        return
    entries = _list(controller, command.prp2, page)
    while length:
        entry = entries.pop(0)
        if not entries and length > page:
            entries = _list(controller, _aligned(entry, page), page)
            entry = entries.pop(0)
        here = min(length, page)
        yield _aligned(entry, page), here
        length -= here


def _list(controller: Nvme, address: int, page: int) -> list[int]:
    """A list of PRPs, which ends with its page."""
    data = controller.fetch(address, page - address % page & ~7)
    return [entry for (entry,) in struct.iter_unpack("<Q", data)]


def _aligned(entry: int, page: int) -> int:
    if entry % page:
        raise _Failed(_INVALID_PRP_OFFSET)
    return entry


def _runs(controller: Nvme, command: Command, length: int) -> list[tuple[int, int]]:
    """`_pages` with neighbours joined."""
    found: list[tuple[int, int]] = []
    for address, count in _pages(controller, command, length):
        if found and sum(found[-1]) == address:
            found[-1] = (found[-1][0], found[-1][1] + count)
        else:
            found.append((address, count))
    return found


def _from_host(controller: Nvme, command: Command, length: int) -> bytes:
    return b"".join(controller.fetch(address, count) for address, count in _runs(controller, command, length))


def _to_host(controller: Nvme, command: Command, data: bytes) -> None:
    at = 0
    for address, count in _runs(controller, command, len(data)):
        controller.deliver(address, data[at : at + count])
        at += count


# --- queues ---


def _delete_submissions(controller: Nvme, command: Command) -> int:
    number = command.dwords[0] & 0xFFFF
    if not number or number not in controller.submissions:
        raise _Failed(_INVALID_QID)
    queue = controller.submissions.pop(number)
    completions = controller.completions[queue.completions]
    completions.waiting = [each for each in completions.waiting if each[0] is not queue]
    return 0


def _create_submissions(controller: Nvme, command: Command) -> int:
    number, size = command.dwords[0] & 0xFFFF, command.dwords[0] >> 16
    flags, completions = command.dwords[1] & 0xFFFF, command.dwords[1] >> 16
    if not completions or completions not in controller.completions:
        raise _Failed(_INVALID_CQID)
    if not 1 <= number <= controller.queues or number in controller.submissions:
        raise _Failed(_INVALID_QID)
    _check_queue(controller, command, size, flags)
    controller.create_submissions(number, command.prp1, size + 1, completions)
    return 0


def _delete_completions(controller: Nvme, command: Command) -> int:
    number = command.dwords[0] & 0xFFFF
    if not number or number not in controller.completions:
        raise _Failed(_INVALID_CQID)
    if any(queue.completions == number for queue in controller.submissions.values()):
        raise _Failed(_QUEUE_DELETION, retry=True)
    controller.delete_completions(number)
    return 0


def _create_completions(controller: Nvme, command: Command) -> int:
    number, size = command.dwords[0] & 0xFFFF, command.dwords[0] >> 16
    flags, vector = command.dwords[1] & 0xFFFF, command.dwords[1] >> 16
    if not 1 <= number <= controller.queues or number in controller.completions:
        raise _Failed(_INVALID_QID)
    _check_queue(controller, command, size, 1)
    if vector >= (controller.vectors if controller.msix_enabled else 1):
        raise _Failed(_INVALID_VECTOR)
    _check_queue(controller, command, size, flags)
    controller.create_completions(number, command.prp1, size + 1, vector, bool(flags & 2))
    return 0


def _check_queue(controller: Nvme, command: Command, size: int, flags: int) -> None:
    """`size` is one less than the entries."""
    if not 1 <= size < controller.queue_entries:
        raise _Failed(_QUEUE_SIZE)
    _aligned(command.prp1, controller.page_size)
    if not flags & 1:  # not in one piece
        raise _Failed(_INVALID_FIELD)


# --- what it says of itself ---


def _identify(controller: Nvme, command: Command) -> int:
    which, number = command.dwords[0] & 0xFF, command.namespace
    if which in (0x00, 0x11):  # a namespace
        _check_namespace(number)
        disk = controller.disks.get(number)
        data = _namespace(controller, disk) if disk else b""
    elif which == 0x01:
        data = _controller(controller)
    elif which in (0x02, 0x10):  # the namespaces behind a number
        if number >= _BROADCAST - 1:
            raise _Failed(_INVALID_NAMESPACE)
        data = b"".join(each.to_bytes(4, "little") for each in sorted(controller.disks) if each > number)
    elif which == 0x03:  # names of a namespace
        _check_namespace(number)
        if number not in controller.disks:
            raise _Failed(_INVALID_FIELD)
        data = bytes((4, 1, 0, 0, 0))  # its command set, which is NVM
    else:
        raise _Failed(_INVALID_FIELD)
    _to_host(controller, command, data.ljust(_IDENTIFY_SIZE, b"\0"))
    return 0


def _check_namespace(number: int) -> None:
    if not 1 <= number <= _NAMESPACES:
        raise _Failed(_INVALID_NAMESPACE)


def _controller(controller: Nvme) -> bytes:
    data = bytearray(_IDENTIFY_SIZE)

    def text(at: int, length: int, value: str) -> None:
        data[at : at + length] = value.encode()[:length].ljust(length)

    def numbers(at: int, form: str, *values: int) -> None:
        struct.pack_into("<" + form, data, at, *values)

    pci = controller.pci
    numbers(0, "HH", pci.vendor, pci.subsystem_vendor)
    text(4, 20, controller.serial)
    text(24, 40, "QEMU NVMe Ctrl")
    text(64, 8, "7.2.22")
    numbers(72, "BBBBBBHI", 6, 0x00, 0x54, 0x52, 0, _TRANSFER_SHIFT, 0, 0x0001_0400)  # IEEE identifier, version
    numbers(92, "II", 0x100, 0x8000)  # events of namespaces; extended LBA formats
    numbers(111, "B", 1)  # an I/O controller
    numbers(256, "HBBBB", 0x10A, 3, _EVENTS - 1, 3, 7)  # optional admin commands, aborts, events, firmware, logs
    numbers(266, "HH", 0x157, 0x175)  # temperatures of warning and of danger, in kelvins
    numbers(512, "BBHIH", 0x66, 0x44, 0, _NAMESPACES, 0x15D)  # sizes of queue entries; optional commands
    numbers(525, "B", 7)  # a volatile write cache
    numbers(534, "HI", 3, 1)  # formats of copy, SGLs
    name = f"nqn.2019-08.org.qemu:{controller.serial}".encode()
    data[768 : 768 + len(name)] = name
    numbers(2048, "HxxII", 0x9C4, 16, 4)  # its one power state
    return bytes(data)


def _namespace(controller: Nvme, disk: Disk) -> bytes:
    data = bytearray(_IDENTIFY_SIZE)
    shift = controller.block_size.bit_length() - 1
    formats = [(metadata, bits) for bits in (9, 12) for metadata in (0, 8, 16, 64)]
    if (0, shift) not in formats:
        formats.append((0, shift))
    blocks = disk.size >> shift
    struct.pack_into("<QQQ", data, 0, blocks, blocks, blocks)
    struct.pack_into("<BBBBB", data, 24, 0x14, len(formats) - 1, formats.index((0, shift)), 3, 0x1F)
    data[33] = 1  # deallocated blocks read as zeros
    granule = max(4096, controller.block_size) // controller.block_size - 1
    struct.pack_into("<HH", data, 68, granule, granule)  # blocks that are deallocated together
    for n, (metadata, bits) in enumerate(formats):
        struct.pack_into("<HBB", data, 128 + 4 * n, metadata, bits, 0)
    return bytes(data)


# --- features, aborts, events ---

_ARBITRATION, _TEMPERATURE, _ERROR_RECOVERY, _WRITE_CACHE, _QUEUES, _VECTOR, _EVENT_MASK = 1, 4, 5, 6, 7, 9, 0xB
_FEATURES = {1: 7, 2: 0, 4: 0x157, 5: 0, 6: 1, 7: 0x3F003F, 8: 0, 9: 0, 0xA: 0, 0xB: 0, 0xE: 0, 0x16: 0, 0x19: 0}
"""What each is as long as nobody sets it; vector configuration is per vector."""
_CHANGEABLE = (_TEMPERATURE, _ERROR_RECOVERY, _WRITE_CACHE, _QUEUES, _EVENT_MASK, 0x19)


def _set_feature(controller: Nvme, command: Command) -> int:
    feature, value = command.dwords[0] & 0xFF, command.dwords[1]
    if command.dwords[0] >> 31:
        raise _Failed(_NOT_SAVEABLE)
    if feature not in _FEATURES:
        raise _Failed(_INVALID_FIELD)
    _check_feature_namespace(controller, command, feature)
    if feature not in _CHANGEABLE:
        raise _Failed(_NOT_CHANGEABLE)
    if feature == _QUEUES:
        if any(controller.completions.keys() - {0}):
            raise _Failed(_SEQUENCE_ERROR)
        if value & 0xFFFF == 0xFFFF or value >> 16 == 0xFFFF:
            raise _Failed(_INVALID_FIELD)
        return _FEATURES[_QUEUES]
    controller.features[feature] = value
    return 0


def _get_feature(controller: Nvme, command: Command) -> int:
    feature, value = command.dwords[0] & 0xFF, command.dwords[1]
    if feature not in _FEATURES:
        raise _Failed(_INVALID_FIELD)
    if feature == _ERROR_RECOVERY:
        _check_feature_namespace(controller, command, feature)
    if feature == _VECTOR:
        if value & 0xFFFF > controller.queues:
            raise _Failed(_INVALID_FIELD)
        return value & 0xFFFF | (0x1_0000 if not value & 0xFFFF else 0)
    return controller.features.get(feature, _FEATURES[feature])


def _check_feature_namespace(controller: Nvme, command: Command, feature: int) -> None:
    number = command.namespace
    if feature == _ERROR_RECOVERY:
        if number != _BROADCAST:
            _check_namespace(number)
            if number not in controller.disks:
                raise _Failed(_INVALID_FIELD)
    elif number and number != _BROADCAST:
        _check_namespace(number)
        raise _Failed(_NOT_NAMESPACE_SPECIFIC)


def _abort(controller: Nvme, command: Command) -> int:
    """Nothing is ever left to abort."""
    if command.dwords[0] & 0xFFFF not in controller.submissions:
        raise _Failed(_INVALID_FIELD)
    return 1


def _hold_event(controller: Nvme, command: Command) -> None:
    """An asynchronous event request is held until there is an event, and there is none."""
    if controller.events_wanted >= _EVENTS:
        raise _Failed(_EVENTS_LIMIT, retry=True)
    controller.events_wanted += 1


# --- blocks ---


def _range(controller: Nvme, command: Command, moved: bool = True) -> tuple[Disk, int, int]:
    """The disk, and the range of it in bytes."""
    disk, size = controller.disks[command.namespace], controller.block_size
    first, count = command.dwords[0] | command.dwords[1] << 32, (command.dwords[2] & 0xFFFF) + 1
    if moved and count * size > controller.page_size << _TRANSFER_SHIFT:
        raise _Failed(_INVALID_FIELD)
    if (first + count) * size > disk.size:
        raise _Failed(_LBA_RANGE)
    return disk, first * size, count * size


def _flush(controller: Nvme, command: Command) -> int:
    if command.namespace != _BROADCAST and command.namespace not in controller.disks:
        raise _Failed(_INVALID_FIELD)
    for number, disk in controller.disks.items():
        if command.namespace in (number, _BROADCAST):
            disk.flush()
    return 0


def _read(controller: Nvme, command: Command) -> int:
    disk, offset, length = _range(controller, command)
    _to_host(controller, command, disk.read(offset, length))
    return 0


def _write(controller: Nvme, command: Command) -> int:
    disk, offset, length = _range(controller, command)
    disk.write(offset, _from_host(controller, command, length))
    return 0


def _compare(controller: Nvme, command: Command) -> int:
    disk, offset, length = _range(controller, command)
    if _from_host(controller, command, length) != disk.read(offset, length):
        raise _Failed(_COMPARE_FAILURE, retry=True)
    return 0


def _write_zeroes(controller: Nvme, command: Command) -> int:
    disk, offset, length = _range(controller, command, moved=False)
    disk.write(offset, bytes(length))
    return 0


def _manage(controller: Nvme, command: Command) -> int:
    """Dataset management: what is said to be unused keeps its data, as on a drive of QEMU's without ``discard``."""
    if command.dwords[1] & 4:
        _from_host(controller, command, 16 * ((command.dwords[0] & 0xFF) + 1))
    return 0
