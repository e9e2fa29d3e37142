"""A VFIO kernel in Python, arranged and named as the kernel that it models.

    backend.py        the seam's calls, made by a modelled process
    machine.py        the computer: its PHBs, PEs, groups and devices, its kernel, its processes
    process.py        a process: address space, open files, limits, capabilities
    file.py           open files and their reference counts

Kernel state is reachable from one `Machine`, and from no global; it is gone with it.
"""

from vfio.fake.kernel_error import KernelWouldBeHurt, KernelWouldBlock

__all__ = ["KernelWouldBeHurt", "KernelWouldBlock"]
