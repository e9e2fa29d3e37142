"""EEH (Enhanced I/O Error Handling): an I/O error freezes one PE of a POWER host, and software brings it back.

    from vfio import eeh

    value = eeh.of(device).check(bar.read32(0))  # all ones, and the PE is frozen: errors.PeFrozen
    log = eeh.recover(device, driver)  # thaw, log, reset, configure, restore: the device works again
    print(log)

`Eeh` is the operations of a container one by one, `recover` the whole procedure, `Watch` notices a freeze, `status`
tells from sysfs, without opening anything.

Kernel document: "VFIO - Virtual Function I/O", section "PPC64 sPAPR implementation note", item 4.  Sources:
arch/powerpc/kernel/eeh.c, arch/powerpc/platforms/powernv/eeh-powernv.c.
"""

from vfio.eeh.clock import Clock
from vfio.eeh.history import Freezes
from vfio.eeh.log import DeviceLog, Log, Step
from vfio.eeh.operations import Answer, Eeh, ErrorFunction, ResetKind, of
from vfio.eeh.recovery import Driver, recover, recover_idle
from vfio.eeh.restore import DmaEngine
from vfio.eeh.state import PeStatus, State, status, statuses
from vfio.eeh.watch import Notice, Watch

__all__ = [
    "Answer",
    "Clock",
    "DeviceLog",
    "DmaEngine",
    "Driver",
    "Eeh",
    "ErrorFunction",
    "Freezes",
    "Log",
    "Notice",
    "PeStatus",
    "ResetKind",
    "State",
    "Step",
    "Watch",
    "of",
    "recover",
    "recover_idle",
    "status",
    "statuses",
]
