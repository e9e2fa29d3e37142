"""The hypercalls of the TCEs: H_PUT_TCE, H_PUT_TCE_INDIRECT, H_STUFF_TCE, H_GET_TCE.

A TCE is the guest address of a page, with `TCE_READ` and `TCE_WRITE` in its low bits: without either it lets no device
through.  An IOBA (I/O bus address) is what VFIO calls an IOVA.  Codes are those of KVM and QEMU, which know H_PARAMETER
for every argument; all TCEs of a call are looked at before the first is set.  Sources:
arch/powerpc/kvm/book3s_64_vio.c, hw/ppc/spapr_iommu.c of QEMU; as called by arch/powerpc/platforms/pseries/iommu.c.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vfio.papr.numbers import LIST_BYTES, MAX_INDIRECT, TCE_BYTES, TCE_READ, TCE_WRITE, Hcall, Opcode
from vfio.papr.table import BadTce, TceTable

if TYPE_CHECKING:
    from vfio.papr.phb import Phb

Answer = tuple[int, ...]

_NO = (Hcall.PARAMETER,)
_U64 = 1 << 64


def call(phb: Phb, opcode: int, arguments: Sequence[int]) -> Answer:
    """What the hypercall answers: H_FUNCTION for one that is none of these."""
    if opcode not in _CALLS:
        return (Hcall.FUNCTION,)
    count, function = _CALLS[opcode]
    if len(arguments) != count or not all(0 <= each < _U64 for each in arguments):
        return _NO
    table = phb.tables.get(arguments[0])
    if table is None:
        return _NO
    try:
        return function(phb, table, *arguments[1:])
    except BadTce:
        return _NO
    except OSError as error:
        return (Hcall.RESOURCE if error.errno == errno.ENOMEM else Hcall.HARDWARE,)


def _entry(table: TceTable, ioba: int, count: int) -> int | None:
    """The number of the entry for `ioba`; None unless `count` entries from there are in the window."""
    page = table.window.page_size
    entry, offset = divmod(ioba - table.window.start, page)
    if offset or entry < 0 or entry + count > table.entries:
        return None
    return entry


def _put(phb: Phb, table: TceTable, ioba: int, tce: int) -> Answer:
    entry = _entry(table, ioba, 1)
    if entry is None:
        return _NO
    table.put(entry, [tce])
    return (Hcall.SUCCESS,)


def _put_indirect(phb: Phb, table: TceTable, ioba: int, tces: int, count: int) -> Answer:
    entry = _entry(table, ioba, count)
    if entry is None or count > MAX_INDIRECT or tces % LIST_BYTES:
        return _NO
    try:
        # Copied once: what the guest writes there meanwhile is not looked at.
        found = struct.unpack(f">{count}Q", phb.memory.read(tces, count * TCE_BYTES))
    except LookupError:
        return _NO
    table.put(entry, found)
    return (Hcall.SUCCESS,)


def _stuff(phb: Phb, table: TceTable, ioba: int, tce: int, count: int) -> Answer:
    entry = _entry(table, ioba, count)
    if entry is None or tce & (TCE_READ | TCE_WRITE):
        return _NO
    table.stuff(entry, tce, count)
    return (Hcall.SUCCESS,)


def _get(phb: Phb, table: TceTable, ioba: int) -> Answer:
    entry = _entry(table, ioba, 1)
    return _NO if entry is None else (Hcall.SUCCESS, table.get(entry))


_CALLS: dict[int, tuple[int, Callable[..., Answer]]] = {
    Opcode.H_PUT_TCE: (3, _put),
    Opcode.H_PUT_TCE_INDIRECT: (4, _put_indirect),
    Opcode.H_STUFF_TCE: (4, _stuff),
    Opcode.H_GET_TCE: (2, _get),
}
