"""EEH operations on the PE of a group.  (vfio_spapr_ioctl_eeh_pe_op, arch/powerpc/kernel/eeh.c)"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfio import uapi
from vfio.fake.kernel_error import fail

if TYPE_CHECKING:
    from vfio.fake.pe import Pe
    from vfio.fake.user import Argument

_MINSZ = uapi.offsetof(uapi.vfio_eeh_pe_op, "op") + 4
_MINSZ_INJECT = uapi.sizeof(uapi.vfio_eeh_pe_op)

_LAST_FUNCTION = 19
_CONFIG_FUNCTIONS = frozenset({4, 5, 10, 11})
_MEMORY_FUNCTIONS = frozenset({0, 1, 6, 7})
_DMA_FUNCTIONS = range(12, 20)

_STATES = {
    "none": uapi.VFIO_EEH_PE_STATE_NORMAL,
    "both": uapi.VFIO_EEH_PE_STATE_STOPPED,
    "dma": uapi.VFIO_EEH_PE_STATE_STOPPED_DMA,
    "mmio": uapi.VFIO_EEH_PE_STATE_UNAVAIL,
}


def pe_op(pe: Pe | None, argument: Argument) -> int:
    """VFIO_EEH_PE_OP for one group; `pe` is None where EEH has no PE for it.

    Raises ENODEV without a PE, EFAULT, EINVAL for a bad argsz, flags, operation or error function, ERANGE for a bad
    error type, EIO where the firmware refuses an injection.
    """
    if pe is None:
        raise fail(errno.ENODEV)
    op = argument.read(uapi.vfio_eeh_pe_op, _MINSZ)
    if op.flags:
        raise fail(errno.EINVAL)
    match op.op:
        case uapi.VFIO_EEH_PE_DISABLE | uapi.VFIO_EEH_PE_CONFIGURE:
            pass
        case uapi.VFIO_EEH_PE_ENABLE:
            pe.thaw()
        case uapi.VFIO_EEH_PE_UNFREEZE_IO:
            pe.thaw_mmio()
        case uapi.VFIO_EEH_PE_UNFREEZE_DMA:
            pe.thaw_dma()
        case uapi.VFIO_EEH_PE_GET_STATE:
            return state(pe)
        case uapi.VFIO_EEH_PE_RESET_DEACTIVATE:
            pe.deactivate_reset()
        case uapi.VFIO_EEH_PE_RESET_HOT | uapi.VFIO_EEH_PE_RESET_FUNDAMENTAL:
            pe.assert_reset()
        case uapi.VFIO_EEH_PE_INJECT_ERR:
            _inject(pe, argument, op.argsz)
        case _:
            raise fail(errno.EINVAL)
    return 0


def state(pe: Pe) -> int:
    """What VFIO_EEH_PE_GET_STATE returns."""
    if pe.parent is not None and pe.parent.freeze != "none":
        return uapi.VFIO_EEH_PE_STATE_UNAVAIL
    return _STATES[pe.freeze]


def _inject(pe: Pe, argument: Argument, argsz: int) -> None:
    if argsz < _MINSZ_INJECT:
        raise fail(errno.EINVAL)
    error = argument.read(uapi.vfio_eeh_pe_op).err
    if error.func > _LAST_FUNCTION:
        raise fail(errno.EINVAL)
    if error.type > 1:
        raise fail(errno.ERANGE)
    if not _firmware_injects(pe, error.type, error.func):
        raise fail(errno.EIO)


def _firmware_injects(pe: Pe, kind: int, function: int) -> bool:
    """PHB4 and later inject into config space only; PHB3 into memory space as well, and into a DMA window there is."""
    if function in _CONFIG_FUNCTIONS:
        return True
    if pe.machine.topology.platform.cpu not in ("POWER7", "POWER8"):
        return False
    if function in _DMA_FUNCTIONS:
        group = pe.table_group
        start = group.second_start if kind else group.tce32_start
        return any(table is not None and table.start == start for table in group.tables)
    return function in _MEMORY_FUNCTIONS
