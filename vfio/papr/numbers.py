"""Numbers of PAPR: hypercalls, RTAS calls, and what they answer.

Source: Power Architecture Platform Reference (LoPAPR), as Linux has them in arch/powerpc/include/asm/hvcall.h,
arch/powerpc/include/asm/rtas.h and arch/powerpc/platforms/pseries/, and QEMU in include/hw/ppc/spapr.h.
"""

from __future__ import annotations

from enum import IntEnum

TCE_READ = 1
"""The device may read the page."""
TCE_WRITE = 2
"""The device may write the page."""
TCE_BYTES = 8
MAX_INDIRECT = 512
"""TCEs in one H_PUT_TCE_INDIRECT: as many as a list of 4 KiB holds."""
LIST_BYTES = 4096

MAX_RTAS_WORDS = 16
"""Arguments and results of an RTAS call together: what the block of a guest has room for."""

LIOBN = 0x80000000
"""Logical I/O bus numbers of a PHB: this, its index in bits 8 and up, the number of the window below."""
BUID = 0x0800000020000000
"""BUID (bus unit id) of PHB 0; the next ones follow."""
TOKEN = 0x2000
"""The first token of an RTAS call."""
PE_ADDRESS = 1
"""What tells the address of a PE, ``00BB0001``, from that of a function, ``00BBDF00``."""


class Opcode(IntEnum):
    """Hypercalls."""

    H_GET_TCE = 0x1C
    H_PUT_TCE = 0x20
    H_STUFF_TCE = 0x138
    H_PUT_TCE_INDIRECT = 0x13C
    H_RTAS = 0xF000
    """Of KVM and QEMU, not of PAPR: the firmware that they give a guest makes it for each RTAS call."""


class Hcall(IntEnum):
    """What a hypercall answers."""

    SUCCESS = 0
    HARDWARE = -1
    FUNCTION = -2
    PARAMETER = -4
    RESOURCE = -16


class Rtas(IntEnum):
    """What an RTAS call answers in its first word."""

    SUCCESS = 0
    NO_ERRORS_FOUND = 1
    HARDWARE_ERROR = -1
    PARAMETER_ERROR = -3


class EehOption(IntEnum):
    """Option of ibm,set-eeh-option."""

    DISABLE = 0
    ENABLE = 1
    THAW_IO = 2
    THAW_DMA = 3


class PeInfo(IntEnum):
    """Option of ibm,get-config-addr-info2."""

    ADDRESS = 0
    MODE = 1


class PeMode(IntEnum):
    """Answer of ibm,get-config-addr-info2 to `PeInfo.MODE`."""

    NOT_SHARED = 1
    SHARED = 2


class SlotReset(IntEnum):
    """Option of ibm,set-slot-reset."""

    DEACTIVATE = 0
    HOT = 1
    FUNDAMENTAL = 3


class LogKind(IntEnum):
    """Option of ibm,slot-error-detail."""

    TEMPORARY = 1
    PERMANENT = 2


PAGE_SHIFTS = (12, 16, 24, 25, 26, 27, 28, 34, 21)
"""Page sizes of a window: bit n of the mask of ibm,query-pe-dma-window is pages of ``1 << PAGE_SHIFTS[n]`` bytes."""


def page_mask(sizes: list[int]) -> int:
    """The mask for page sizes in bytes; those that PAPR has no bit for are left out."""
    return sum(1 << n for n, shift in enumerate(PAGE_SHIFTS) if 1 << shift in sizes)


def page_shifts(mask: int) -> list[int]:
    """The page shifts of a mask, smallest first."""
    return sorted(shift for n, shift in enumerate(PAGE_SHIFTS) if mask >> n & 1)
