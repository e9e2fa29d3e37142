"""EEH operations on the PE of a group.  (vfio_spapr_ioctl_eeh_pe_op, arch/powerpc/kernel/eeh.c)"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vfio import uapi
from vfio.fake import error_injection
from vfio.fake.kernel_error import KernelWouldBeHurt, fail

if TYPE_CHECKING:
    from vfio.fake.eeh_pe import EehPe
    from vfio.fake.pe import Pe
    from vfio.fake.user import Argument

_MINSZ = uapi.offsetof(uapi.vfio_eeh_pe_op, "op") + 4
_MINSZ_INJECT = uapi.sizeof(uapi.vfio_eeh_pe_op)

_HOT_RESET = {"POWER9": 4.9, "POWER10": 4.9}
_HOT_RESET_ELSEWHERE, _FUNDAMENTAL_RESET = 4.1, 1.3
"""Seconds that the firmware of the lab's machines takes."""


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
            pe.eeh.change_owner()
        case uapi.VFIO_EEH_PE_UNFREEZE_IO:
            pe.eeh.thaw_mmio()
        case uapi.VFIO_EEH_PE_UNFREEZE_DMA:
            pe.eeh.thaw_dma()
        case uapi.VFIO_EEH_PE_GET_STATE:
            return pe.eeh.state
        case uapi.VFIO_EEH_PE_RESET_DEACTIVATE:
            pe.eeh.deactivate_reset()
        case uapi.VFIO_EEH_PE_RESET_HOT:
            _check_locks(pe.eeh)
            pe.eeh.assert_reset()
            pe.machine.clock.advance(hot_reset_seconds(pe.eeh))
        case uapi.VFIO_EEH_PE_RESET_FUNDAMENTAL:
            pe.eeh.assert_reset(reaches_devices=pe.machine.freezes)
            pe.machine.clock.advance(_FUNDAMENTAL_RESET)
        case uapi.VFIO_EEH_PE_INJECT_ERR:
            _inject(pe, argument, op.argsz)
        case _:
            raise fail(errno.EINVAL)
    return 0


def hot_reset_seconds(pe: EehPe) -> float:
    """How long the firmware takes for a hot reset."""
    return _HOT_RESET.get(pe.machine.topology.platform.cpu, _HOT_RESET_ELSEWHERE)


def _check_locks(pe: EehPe) -> None:
    """A hot reset takes the lock of each device.  That of one which is being removed is held until it is closed."""
    if pe.removed and pe.passed and pe.machine.strict:
        raise KernelWouldBeHurt(
            f"VFIO_EEH_PE_RESET_HOT on {pe}, which has failed for good and waits to be removed: the call would wait "
            "for a device lock that is held until this process closes the device, and neither could ever be killed; "
            "close the device"
        )


def _inject(pe: Pe, argument: Argument, argsz: int) -> None:
    if argsz < _MINSZ_INJECT:
        raise fail(errno.EINVAL)
    error = argument.read(uapi.vfio_eeh_pe_op).err
    if error.func > error_injection.LAST_FUNCTION:
        raise fail(errno.EINVAL)
    if error.type > 1:
        raise fail(errno.ERANGE)
    if not error_injection.firmware_takes(pe, error.func, bool(error.type)):
        raise fail(errno.EIO)
    error_injection.inject(pe, error.func, bool(error.type), error.addr, error.mask)
