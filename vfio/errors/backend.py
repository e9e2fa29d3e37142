"""No kernel to ask: backends that there are not, and servers of modelled machines."""

from __future__ import annotations

import errno as E
import shlex

from vfio.errors.base import VfioError


class NoSuchBackend(VfioError, ValueError):
    """A backend URL that nobody understands, or a backend that cannot be reached."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__(
            E.EINVAL, f"no backend {url!r}", why, "set VFIO_BACKEND or --backend to kernel: or leave it out"
        )


class NoServer(NoSuchBackend):
    """Nobody serves a modelled kernel at this socket."""

    def __init__(self, url: str, path: str) -> None:
        super().__init__(url, f"nobody serves at {path}")
        self.remedy = f'start a server:  eval "$(vfio fake serve --detach --socket {shlex.quote(path)})"'


class AlreadyServed(VfioError):
    """There is a server at the socket."""

    def __init__(self, path: str, pid: int) -> None:
        self.pid = pid
        super().__init__(
            E.EADDRINUSE,
            f"cannot serve at {path}",
            f"process {pid} does",
            f"end it:  vfio fake stop --socket {shlex.quote(path)};  or serve elsewhere:  --socket PATH",
        )


class ServerGone(VfioError):
    """The server of the modelled kernel has ended, and its machine with it."""

    def __init__(self, path: str) -> None:
        super().__init__(
            E.ENOTCONN,
            f"the machine at {path} is gone",
            "its server has ended, or has ended the connection",
            "vfio fake serve starts another, with a machine that remembers nothing",
        )


class ServerRefused(VfioError):
    """The server of the modelled kernel does not serve this program."""

    def __init__(self, path: str, errno: int, why: str, remedy: str) -> None:
        super().__init__(errno, f"the server at {path} refuses this program", why, remedy)
