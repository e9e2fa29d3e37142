"""What the real kernel tells of the descriptors of real processes."""

from __future__ import annotations

import os
import resource

_EVENTFD = "anon_inode:[eventfd]"


def lowest_aside() -> int:
    """The lowest of the numbers that the modelled kernel uses for references of its own."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1 << 16
    return most if limit == resource.RLIM_INFINITY else min(limit // 2, most)


def is_eventfd(fd: int, process: int | str = "self") -> bool:
    """Whether a descriptor is an eventfd; OSError where it is none at all."""
    return os.readlink(f"/proc/{process}/fd/{fd}") == _EVENTFD


def eventfd_identity(fd: int, process: int | str = "self") -> str:
    """What tells one eventfd from another, whatever the process and the descriptor."""
    with open(f"/proc/{process}/fdinfo/{fd}", encoding="ascii") as file:
        return next((line for line in file if line.startswith("eventfd-id")), f"descriptor {fd} of {process}")


def eventfds(process: int | str = "self", below: int | None = None) -> set[str]:
    """The identities of a process's eventfds: of all, or of those whose descriptors are `below` a number."""
    found: set[str] = set()
    try:
        names = [int(name) for name in os.listdir(f"/proc/{process}/fd")]
    except OSError:
        return found  # it has ended
    for fd in names:
        if below is None or fd < below:
            try:
                if is_eventfd(fd, process):
                    found.add(eventfd_identity(fd, process))
            except OSError:
                continue  # closed meanwhile
    return found
