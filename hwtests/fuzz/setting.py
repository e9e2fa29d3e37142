"""Puts a machine into the state in which every program finds it."""

from __future__ import annotations

import os
import time
from contextlib import suppress

from hwtests.fuzz.facts import Endpoint, Facts
from vfio import uapi
from vfio.backend import Backend

_DEVICES, _DRIVERS = "/sys/bus/pci/devices", "/sys/bus/pci/drivers"
_CONFIG = 7 << 40
_LIVENESS, _STATUS, _PENDING, _ACKNOWLEDGE = 0x04, 0x20, 0x24, 0x64
_SOURCE, _DESTINATION, _COUNT, _COMMAND, _ENGINE = 0x80, 0x88, 0x90, 0x98, 0x40000
_CAPACITY = 4095  # bytes of edu's buffer that can be reached


def bind(backend: Backend, facts: Facts) -> None:
    """Put the endpoints, and nothing else, on vfio-pci."""
    for endpoint in facts.endpoints:
        directory = f"{_DEVICES}/{endpoint.address}"
        backend.write_text(f"{directory}/driver_override", "vfio-pci")
        with suppress(OSError):
            driver = backend.readlink(f"{directory}/driver").rpartition("/")[2]
            backend.write_text(f"{_DRIVERS}/{driver}/unbind", endpoint.address)
        backend.write_text(f"{_DRIVERS}/vfio-pci/bind", endpoint.address)


def settle(backend: Backend, facts: Facts, endpoint: Endpoint, memory: bool) -> None:
    """Give an edu the registers, and if need be the `memory`, that it has after power-on; it has no reset."""
    container = backend.open("/dev/vfio/vfio", os.O_RDWR)
    group = backend.open(f"/dev/vfio/{endpoint.group}", os.O_RDWR)
    backend.ioctl(group, uapi.VFIO_GROUP_SET_CONTAINER, bytearray(container.to_bytes(4, "little")))
    backend.ioctl(container, uapi.VFIO_SET_IOMMU, facts.versions[1])
    name = bytearray(endpoint.address.encode() + b"\0")
    device = backend.ioctl(group, uapi.VFIO_GROUP_GET_DEVICE_FD, name)
    try:
        backend.pwrite(device, (6).to_bytes(2, "little"), _CONFIG + 4)
        pending = backend.pread(device, 4, _PENDING)
        # What is written to the liveness register is read back inverted: all ones make it zero.
        for register, value in ((_ACKNOWLEDGE, pending), (_LIVENESS, b"\xff" * 4), (_STATUS, bytes(4))):
            backend.pwrite(device, value, register)
        if not memory:
            return
        # Nothing is mapped: the DMA reads zeros.
        for register, number in ((_SOURCE, 0), (_DESTINATION, _ENGINE), (_COUNT, _CAPACITY), (_COMMAND, 1)):
            backend.pwrite(device, number.to_bytes(8, facts.edu_order), register)
        while int.from_bytes(backend.pread(device, 4, _COMMAND), facts.edu_order) & 1:
            time.sleep(0.001)
        for register in (_SOURCE, _DESTINATION, _COUNT):
            backend.pwrite(device, bytes(8), register)
    finally:
        for fd in (device, group, container):
            backend.close(fd)
