"""Whether the memory of another process can be reached, and if not, what forbids it."""

from __future__ import annotations

import errno
import os

from vfio.fake.memory import AddressSpace


def trouble(pid: int, uid: int, address: int, content: bytes) -> tuple[str, str] | None:
    """Why not, and what to do about it; None if `content` is found at `address` of the process."""
    try:
        found = AddressSpace(pid, 4096).read(address, len(content))
    except OSError as error:
        return _reason(error, pid, uid)
    if found != content:
        return (
            f"process {pid} is another one for the server than for this program",
            "start the server where the programs are (in the same container)",
        )
    return None


def _reason(error: OSError, pid: int, uid: int) -> tuple[str, str]:
    what = f"the server may not reach the memory of process {pid} (process_vm_readv)"
    if error.errno == errno.ENOSYS:
        return (
            f"{what}: the kernel has no such call, or a sandbox hides it",
            "it needs CONFIG_CROSS_MEMORY_ATTACH; a fake: backend, in the program itself, needs nothing",
        )
    if os.geteuid() != 0 and uid != os.geteuid():
        return (
            f"{what}: the program runs as uid {uid}, and the server as uid {os.geteuid()}",
            "run both as the same user, or the server as root",
        )
    scope = _setting("/proc/sys/kernel/yama/ptrace_scope")
    if scope in ("2", "3"):
        return (
            f"{what}: kernel.yama.ptrace_scope is {scope}",
            "as root: sysctl kernel.yama.ptrace_scope=1"
            if scope == "2"
            else "3 lasts until the next boot: set it to 1 in /etc/sysctl.d, and reboot",
        )
    if _filtered():
        return (
            f"{what}: the server runs under a seccomp filter, or in a container without CAP_SYS_PTRACE",
            "give the container that capability: docker run --cap-add SYS_PTRACE",
        )
    return (
        f"{what}: {os.strerror(error.errno or 0)}; kernel.yama.ptrace_scope is {scope or 'not there'}",
        "a program that is not dumpable (prctl PR_SET_DUMPABLE, or started from a file that it may not read) is out "
        "of reach for all but root with CAP_SYS_PTRACE",
    )


def _setting(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def _filtered() -> bool:
    """Whether this process has a filter of system calls."""
    with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
        return any(line.split()[1] == "2" for line in file if line.startswith("Seccomp:"))
