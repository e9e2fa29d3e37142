"""Container: /dev/vfio/vfio, the holder of groups that share one IOMMU.

Kernel document: "VFIO - Virtual Function I/O", sections "Groups, Devices, and IOMMUs" and "VFIO Usage Example".
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from vfio import diagnose, errors, iommu, sysfs, uapi
from vfio.backend import Backend, default
from vfio.closing import Closing
from vfio.iommu.model import Iommu

if TYPE_CHECKING:
    from vfio.eeh import Eeh
    from vfio.group import Group

PATH = "/dev/vfio/vfio"

M = TypeVar("M", bound=Iommu)


class Container(Closing):
    """An open container.

    Groups are attached first; then `set_iommu` or `choose_iommu` gives the container its IOMMU, through which memory
    is mapped for all its groups.  Closing a container, its groups and their devices works in any order; two threads may
    use one container.

    Raises `errors.NoVfio` where the kernel has no VFIO, `errors.AccessDenied` where this user may not open it.
    """

    def __init__(self, backend: Backend | None = None) -> None:
        self.backend = backend or default()
        self.groups: list[Group] = []
        self.iommu: Iommu | None = None
        self.lock = threading.RLock()
        self._fd: int | None = None
        try:
            self._fd = self.backend.open(PATH, os.O_RDWR)
        except OSError as error:
            raise diagnose.open_error(self.backend, PATH, error) from error
        version = self.backend.ioctl(self._fd, uapi.VFIO_GET_API_VERSION)
        if version != uapi.VFIO_API_VERSION:
            self.close()
            raise errors.CallFailed(
                errno.EPROTO, f"{PATH} cannot be used", f"its API version is {version}, not {uapi.VFIO_API_VERSION}"
            )

    @property
    def fd(self) -> int:
        """The file descriptor; raises `errors.Closed` after `close`."""
        if self._fd is None:
            raise errors.Closed("container")
        return self._fd

    @property
    def closed(self) -> bool:
        return self._fd is None

    def check_extension(self, extension: int) -> bool:
        """Whether the kernel has `extension` (``uapi.VFIO_*_IOMMU``, ``VFIO_EEH``…) at all.

        It is no promise that the platform has it: on POWER both sPAPR versions answer True everywhere, and only
        `set_iommu` tells the truth.
        """
        return self.backend.ioctl(self.fd, uapi.VFIO_CHECK_EXTENSION, extension) > 0

    def attach(self, group: Group) -> None:
        """Put `group` into this container (VFIO_GROUP_SET_CONTAINER).  It takes the group's DMA from the host.

        Raises `errors.GroupNotViable`, or `errors.CallFailed` with EBUSY where the IOMMU model takes one group only
        (sPAPR v1) or memory is about to move (Type1), EPERM where its windows cannot be shared (pseries once a window
        exists) or only one of the groups has an IOMMU, EINVAL for a group that has a container, or for which what is
        mapped is reserved (Type1).
        """
        with self.lock:
            argument = bytearray(self.fd.to_bytes(4, sys.byteorder))
            try:
                self.backend.ioctl(group.fd, uapi.VFIO_GROUP_SET_CONTAINER, argument)
            except OSError as error:
                raise self._attach_error(group, error) from error
            group.container = self
            self.groups.append(group)
            if self.iommu:
                self.iommu.joined()

    def detach(self, group: Group) -> None:
        """Take `group` out again (VFIO_GROUP_UNSET_CONTAINER).

        With the last group the IOMMU goes, and all that was mapped.  With others left, a sPAPR kernel empties the shared
        windows: what was mapped through this library is mapped again before this returns.  Raises `errors.Busy` while
        a device of the group is open.
        """
        with self.lock:
            if group not in self.groups:
                raise errors.CallFailed(
                    errno.EINVAL, f"cannot detach group {group.number}", "it is not in this container"
                )
            if self.iommu and len(self.groups) > 1:
                self.iommu.check_detach()
            try:
                self.backend.ioctl(group.fd, uapi.VFIO_GROUP_UNSET_CONTAINER)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    raise errors.Busy(f"cannot detach group {group.number}", [], "close its devices first") from error
                raise errors.CallFailed(error.errno or errno.EIO, f"cannot detach group {group.number}") from error
            self.forget(group)

    def set_iommu(self, model: type[M]) -> M:
        """Give the container the IOMMU `model` (VFIO_SET_IOMMU), for example ``vfio.SpaprTceV2``.

        Raises `errors.CallFailed`: EINVAL without a group or with a model set, ENODEV where the kernel lacks it, EBUSY
        for sPAPR v1 with several groups.
        """
        with self.lock:
            what = f"cannot set IOMMU model {model.name}"
            if not self.groups:
                raise errors.CallFailed(
                    errno.EINVAL, what, "the container has no group", "container.attach(group) first"
                )
            if self.iommu:
                raise errors.CallFailed(errno.EINVAL, what, f"the container has {self.iommu.name} already")
            try:
                self.backend.ioctl(self.fd, uapi.VFIO_SET_IOMMU, model.extension)
            except OSError as error:
                raise errors.CallFailed(error.errno or errno.EIO, what, *model.explain_refusal(self, error)) from error
            try:
                self.iommu = found = model(self)
            except BaseException:
                self._unset_iommu()
                raise
            return found

    @cached_property
    def eeh(self) -> Eeh:
        """The error handling of POWER: the state of the PEs, and what brings them back."""
        from vfio.eeh import Eeh  # only who needs it waits for it

        return Eeh(self)

    def choose_iommu(self) -> Iommu:
        """Give the container the best IOMMU model that the platform accepts, and return it.

        Raises `errors.NoIommuModel` with what each answered.
        """
        return iommu.choose(self)

    def forget(self, group: Group) -> None:
        """The kernel has let go of `group`: its last file was closed, or it was detached."""
        with self.lock:
            if group in self.groups:
                self.groups.remove(group)
            group.container = None
            if not self.iommu:
                return
            if self.groups:
                self.iommu.remap()
            else:
                self.iommu.gone()
                self.iommu = None

    def close(self) -> None:
        """Unmap what is still mapped, newest first, and close.  Groups and devices that are open stay usable."""
        with self.lock:
            if self._fd is None:
                return
            try:
                if self.iommu:
                    self.iommu.close()
            finally:
                fd, self._fd, self.iommu = self._fd, None, None
                self.backend.close(fd)

    def _unset_iommu(self) -> None:
        """Take all groups out and in again, which is the only way to be rid of a model that was set."""
        groups = self.groups[:]
        for group in groups:
            self.detach(group)
        for group in groups:
            self.attach(group)

    def _attach_error(self, group: Group, error: OSError) -> errors.VfioError:
        what = f"cannot attach group {group.number}"
        number = error.errno or errno.EIO
        if number == errno.EPERM:
            blockers = sysfs.blockers(self.backend, group.number)
            if blockers or not group.viable:
                return errors.GroupNotViable(group.number, blockers)
            if too_old := diagnose.broken_on_power(self.backend):
                return errors.KernelTooOld(number, what, too_old)
            if any(other.unprotected != group.unprotected for other in self.groups):
                why = "groups with an IOMMU and groups without one cannot be in one container"
                return errors.CallFailed(number, what, why, "use a container of its own")
        if number == errno.EINVAL and group.container is not None:
            return errors.CallFailed(number, what, "it is in a container already", "detach it there first")
        return errors.CallFailed(number, what, *(self.iommu.explain_attach(error) if self.iommu else ()))

    def __repr__(self) -> str:
        numbers = ", ".join(str(group.number) for group in self.groups)
        return f"<Container groups [{numbers}], {self.iommu.name if self.iommu else 'no IOMMU'}>"
