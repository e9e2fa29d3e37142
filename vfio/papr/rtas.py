"""The RTAS calls of Dynamic DMA Windows and of EEH.

Arguments and answers are 32-bit words; a 64-bit value is two, the high one first.  Statuses are those of QEMU: -3 for a
wrong argument, a wrong number of them, a call that there is not and a platform without the feature; where VFIO refused -1,
or -3 of the two EEH calls that only ask and configure.  Sources: LoPAPR,
chapters "Dynamic DMA Windows" and "Enhanced I/O Error Handling"; hw/ppc/spapr_rtas_ddw.c, spapr_pci.c and
spapr_pci_vfio.c of QEMU; as called by arch/powerpc/platforms/pseries/iommu.c and eeh_pseries.c.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from vfio import errors
from vfio.eeh import State
from vfio.papr.numbers import (
    MAX_RTAS_WORDS,
    EehOption,
    LogKind,
    PeInfo,
    PeMode,
    Rtas,
    SlotReset,
    page_mask,
)

if TYPE_CHECKING:
    from vfio.papr.phb import Phb

T = TypeVar("T")

_U32 = (1 << 32) - 1
_SMALLEST_PAGE_SHIFT = 12
_EEH_CAPABLE = 1
_ASK_AGAIN = 1000
"""Milliseconds after which a guest may ask a PE that is unavailable again."""


class _Wrong(ValueError):
    """An argument is wrong."""


def call(phb: Phb, name: str, arguments: Sequence[int], results: int) -> list[int]:
    """What the call answers, in `results` words (0: none); where it fails, all but the status are 0.

    A number of words that no guest has room for is answered as far as it can have.
    """
    results = max(0, min(results, MAX_RTAS_WORDS))
    try:
        if name not in _CALLS or not all(0 <= word <= _U32 for word in arguments):
            raise _Wrong
        count, allowed, function = _CALLS[name]
        if len(arguments) != count or results not in allowed:
            raise _Wrong
        answer = [int(word) for word in function(phb, results, *arguments)]
    except (_Wrong, errors.NoEeh):
        answer = [int(Rtas.PARAMETER_ERROR)]
    except OSError:
        answer = [int(Rtas.HARDWARE_ERROR)]
    return (answer + [0] * results)[:results]


# --- Dynamic DMA Windows ---


def _query(phb: Phb, results: int, address: int, high: int, low: int) -> list[int]:
    """Free windows, the largest one in TCEs of 4 KiB, page sizes, page sizes that can migrate."""
    _check_ddw(phb, address, high, low)
    available = len(phb.liobns) - len(phb.tables)
    largest = phb.largest_window >> _SMALLEST_PAGE_SHIFT
    block = [min(largest, _U32)] if results == 5 else [largest >> 32, largest & _U32]
    return [Rtas.SUCCESS, available, *block, page_mask(phb.page_sizes), 0]


def _create(phb: Phb, results: int, address: int, high: int, low: int, page_shift: int, window_shift: int) -> list[int]:
    """The LIOBN of the new window, and its bus address."""
    _check_ddw(phb, address, high, low)
    if not page_shift <= window_shift < 64 or 1 << page_shift not in phb.page_sizes:
        raise _Wrong
    if 1 << window_shift > phb.largest_window:
        return [Rtas.HARDWARE_ERROR]
    table = phb.create_window(1 << page_shift, 1 << window_shift)
    return [Rtas.SUCCESS, table.liobn, table.window.start >> 32, table.window.start & _U32]


def _remove(phb: Phb, results: int, liobn: int) -> list[int]:
    if phb.ddw is None or liobn not in phb.tables:
        raise _Wrong
    phb.remove_window(liobn)
    return [Rtas.SUCCESS]


def _reset_windows(phb: Phb, results: int, address: int, high: int, low: int) -> list[int]:
    _check_ddw(phb, address, high, low)
    phb.reset_windows()
    return [Rtas.SUCCESS]


# --- EEH: an operation is one on all PEs of the container ---


def _set_option(phb: Phb, results: int, address: int, high: int, low: int, option: int) -> list[int]:
    _check_pe(phb, address, high, low)
    eeh = phb.container.eeh
    operations: dict[int, Callable[[], None]] = {
        EehOption.DISABLE: eeh.disable,
        EehOption.ENABLE: eeh.enable,
        EehOption.THAW_IO: eeh.unfreeze_io,
        EehOption.THAW_DMA: eeh.unfreeze_dma,
    }
    _chosen(operations, option)()
    return [Rtas.SUCCESS]


def _pe_info(phb: Phb, results: int, address: int, high: int, low: int, option: int) -> list[int]:
    """The address of the PE, or whether devices share it."""
    _check_pe(phb, address, high, low)
    if not phb.container.eeh.available:
        raise _Wrong
    pe = phb.pe_address(address)
    members = sum(phb.pe_address(each) == pe for each in phb.devices)
    answers: dict[int, int] = {
        PeInfo.ADDRESS: pe,
        PeInfo.MODE: PeMode.SHARED if members > 1 else PeMode.NOT_SHARED,
    }
    return [Rtas.SUCCESS, _chosen(answers, option)]


def _state(phb: Phb, results: int, address: int, high: int, low: int) -> list[int]:
    """The state, whether there is EEH, milliseconds to wait while unavailable, milliseconds that recovery takes."""
    _check_pe(phb, address, high, low)
    try:
        state = phb.container.eeh.state
    except OSError:
        raise _Wrong from None
    wait = _ASK_AGAIN if state is State.UNAVAIL else 0
    return [Rtas.SUCCESS, state, _EEH_CAPABLE, wait, 0][:results]


def _slot_reset(phb: Phb, results: int, address: int, high: int, low: int, option: int) -> list[int]:
    _check_pe(phb, address, high, low)
    eeh = phb.container.eeh
    operations: dict[int, Callable[[], None]] = {
        SlotReset.DEACTIVATE: eeh.deassert_reset,
        SlotReset.HOT: eeh.assert_reset,
        SlotReset.FUNDAMENTAL: lambda: eeh.assert_reset("fundamental"),
    }
    operation = _chosen(operations, option)
    if option == SlotReset.DEACTIVATE:
        operation()
        phb.rearm_interrupts()
        return [Rtas.SUCCESS]
    phb.suspend_interrupts()
    try:
        operation()
    except OSError:
        phb.rearm_interrupts()
        raise
    return [Rtas.SUCCESS]


def _configure(phb: Phb, results: int, address: int, high: int, low: int) -> list[int]:
    _check_pe(phb, address, high, low)
    try:
        phb.container.eeh.configure()
    except OSError:
        raise _Wrong from None
    return [Rtas.SUCCESS]


def _error_detail(
    phb: Phb, results: int, address: int, high: int, low: int, own: int, own_size: int, log: int, size: int, kind: int
) -> list[int]:
    """Always that there is none: VFIO hands no log of the host's firmware to whoever has the device."""
    _check_pe(phb, address, high, low)
    if kind not in list(LogKind):
        raise _Wrong
    try:
        for start, length in ((own, own_size), (log, size)):
            list(phb.memory.pieces(start, length))
    except LookupError:
        raise _Wrong from None
    _ = phb.container.eeh.state  # without EEH there are no error logs either
    return [Rtas.NO_ERRORS_FOUND]


def _check_pe(phb: Phb, address: int, high: int, low: int) -> None:
    if high << 32 | low != phb.buid or not phb.is_pe(address):
        raise _Wrong


def _check_ddw(phb: Phb, address: int, high: int, low: int) -> None:
    _check_pe(phb, address, high, low)
    if phb.ddw is None:
        raise _Wrong


def _chosen(choices: dict[int, T], option: int) -> T:
    if option not in choices:
        raise _Wrong
    return choices[option]


_CALLS: dict[str, tuple[int, tuple[int, ...], Callable[..., list[int]]]] = {
    "ibm,query-pe-dma-window": (3, (5, 6), _query),
    "ibm,create-pe-dma-window": (5, (4,), _create),
    "ibm,remove-pe-dma-window": (1, (1,), _remove),
    "ibm,reset-pe-dma-window": (3, (1,), _reset_windows),
    "ibm,set-eeh-option": (4, (1,), _set_option),
    "ibm,get-config-addr-info2": (4, (2,), _pe_info),
    "ibm,read-slot-reset-state2": (3, (4, 5), _state),
    "ibm,set-slot-reset": (4, (1,), _slot_reset),
    "ibm,configure-pe": (3, (1,), _configure),
    "ibm,slot-error-detail": (8, (1,), _error_detail),
}

NAMES = tuple(_CALLS)
"""The calls that there are."""
