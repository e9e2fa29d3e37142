"""What the host lacks, or does not allow this process."""

from __future__ import annotations

import errno as E

from vfio.errors.base import VfioError, size


class NoVfio(VfioError):
    """The kernel has no VFIO, or its module is not loaded."""

    def __init__(self, path: str, errno: int = E.ENOENT) -> None:
        super().__init__(
            errno,
            f"cannot open {path}",
            "the kernel has no VFIO, or its modules are not loaded",
            "modprobe vfio-pci (on POWER also vfio_iommu_spapr_tce); the kernel needs CONFIG_VFIO and CONFIG_VFIO_PCI",
        )


class ModuleMissing(VfioError):
    """A kernel module that has to be there is not loaded."""

    def __init__(self, what: str, module: str, errno: int = E.ENODEV) -> None:
        super().__init__(errno, what, f"the {module} module is not loaded", f"modprobe {module}")


class KernelTooOld(VfioError):
    """VFIO is broken on POWER in kernels older than 6.4."""

    def __init__(self, errno: int, what: str, release: str) -> None:
        super().__init__(
            errno,
            what,
            f"this is kernel {release}, and VFIO does not work on POWER in kernels older than 6.4",
            "boot a kernel 6.4 or later",
        )


class AccessDenied(VfioError):
    """The file's owner and mode keep this user out."""

    def __init__(self, path: str, owner: str, mode: int, user: str, errno: int = E.EACCES) -> None:
        super().__init__(
            errno,
            f"cannot open {path}",
            f"it belongs to {owner} with mode {mode & 0o7777:04o}, and this process is {user}",
            f"as root: chown {user} {path}    (or: vfio bind ADDRESS --group --user {user})",
        )


class LockedMemoryLimit(VfioError):
    """RLIMIT_MEMLOCK does not allow the charge."""

    def __init__(self, what: str, needed: int, locked: int, limit: int | None, errno: int = E.ENOMEM) -> None:
        kib = (locked + needed + 1023) // 1024
        super().__init__(
            errno,
            what,
            f"it locks {size(needed)}, {size(locked)} are locked already, and RLIMIT_MEMLOCK is "
            + ("unlimited" if limit is None else size(limit)),
            f"in the shell: ulimit -l {kib};  in /etc/security/limits.conf: USER - memlock {kib};  "
            f"in a systemd unit: LimitMEMLOCK={kib}K;  or give the process CAP_IPC_LOCK",
        )
