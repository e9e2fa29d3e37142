# ruff: noqa: F403
"""``<linux/vfio.h>`` of Linux 6.12 in Python: every struct, constant and request, under the kernel's names.

Making a struct, with argsz filled in, and reading what the kernel answered::

    status = uapi.vfio_group_status()
    fcntl.ioctl(group, uapi.VFIO_GROUP_GET_STATUS, uapi.buffer(status))
    status.flags & uapi.VFIO_GROUP_FLAGS_VIABLE

``vfio_irq_set.sized(n)`` makes one with room behind it; `from_buffer` sees existing bytes as a struct.
Constants are plain ints. Request numbers are those of the machine that this runs on; `request` gives them for others.
Layouts are those of the running machine. Nothing here makes a system call on a device.

The structs live in `_uapi_build.py` (C, from which two modules are generated) on top of `_uapi_types.py`; constants,
requests, their encoding, and the way from numbers back to names have a module each. This one puts them under one name.
"""

from vfio._uapi_constants import *
from vfio._uapi_ioctl import *
from vfio._uapi_names import *
from vfio._uapi_requests import *
from vfio._uapi_structs import *
from vfio._uapi_types import *
