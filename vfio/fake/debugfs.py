"""/sys/kernel/debug/powerpc, as far as EEH is concerned: what a test of recovery on a real host is made with.

eeh_dev_check       an address: does the kernel find the device's PE frozen?  Then the host recovers it.
eeh_force_recover   DOMAIN:PE, hexadecimal: let the host recover it, frozen or not
eeh_max_freezes     freezes within an hour that a PE is recovered from
"""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING

from vfio.fake.kernel_error import fail
from vfio.fake.kernel_log import INFO
from vfio.fake.kernfs import Attribute, Directory, directory

if TYPE_CHECKING:
    from vfio.fake.machine import Machine

_ADDRESS = re.compile(r"([0-9a-fA-F]+):([0-9a-fA-F]+):([0-9a-fA-F]+)\.([0-9a-fA-F]+)")
_PE = re.compile(r"([0-9a-fA-F]+):([0-9a-fA-F]+)")


def root(machine: Machine) -> Directory:
    """/sys/kernel/debug."""
    host = machine.eeh

    def check(given: str) -> None:
        match = _ADDRESS.match(given)
        if not match:
            raise fail(errno.EINVAL)
        domain, bus, slot, function = (int(number, 16) for number in match.groups())
        pci = machine.driver_core.devices.get(f"{domain:04x}:{bus:02x}:{slot:02x}.{function:x}")
        if pci is None:
            raise fail(errno.ENODEV)
        found = host.check_failure(pci)
        machine.log.write(INFO, f"pci {pci.address}: eeh_dev_check_failure({pci.address}) = {found}")

    def recover(given: str) -> None:
        match = _PE.match(given)
        if not match:
            raise fail(errno.EINVAL)
        pe = host.find(*(int(number, 16) for number in match.groups()))
        if pe is None:
            raise fail(errno.ENODEV)
        host.force_recovery(pe)

    def set_most(given: str) -> None:
        try:
            host.max_freezes = int(given, 0) & 0xFFFF_FFFF
        except ValueError:
            raise fail(errno.EINVAL) from None

    files = {
        "eeh_dev_check": Attribute(store=check, mode=0o600),
        "eeh_force_recover": Attribute(store=recover, mode=0o600),
        "eeh_max_freezes": Attribute(lambda: f"{host.max_freezes}\n", set_most, mode=0o600),
    }
    return directory({"powerpc": directory(dict(files) if machine.topology.platform.eeh else {})}, mode=0o700)
