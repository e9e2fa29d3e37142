"""A VFIO kernel in Python, arranged and named as the kernel that it models.

    backend.py        the seam's calls, made by a modelled process
    machine.py        the computer: its PHBs, PEs, groups and devices, its kernel, its processes
    process.py        a process: address space, open files, limits, capabilities
    file.py           open files and their reference counts

A machine of many programs (``vfio fake serve``) is the same machine, with

    serving.py         its socket: where it is, how it is started and ended
    server.py          the loop that takes requests (vfio/backends/wire.py says what they are) and sees programs end
    calls.py           requests as calls of the seam
    client_process.py  a process of the model that is a real one
    open_files.py      open files that are descriptors of other programs
    reach.py           whether their memory can be reached

Kernel state is reachable from one `Machine`, and from no global; it is gone with it.
"""

from vfio.fake.kernel_error import KernelWouldBeHurt, KernelWouldBlock

__all__ = ["KernelWouldBeHurt", "KernelWouldBlock"]
