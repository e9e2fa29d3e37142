"""Addresses of PCI devices, as people write them and as sysfs spells them.

Nothing but the result of `parse` reaches a path: a text that is not an address is refused first.
"""

from __future__ import annotations

import re

from vfio import errors

_ADDRESS = re.compile(r"(?:([0-9a-f]{1,8}):)?([0-9a-f]{1,2}):([01]?[0-9a-f])\.([0-7])", re.IGNORECASE)


def parse(text: str) -> str:
    """The address as sysfs spells it (``dddd:bb:dd.f``), from ``0001:01:00.0``, ``1:1:0.0`` or ``01:00.0``.

    Raises `errors.InvalidAddress` for anything else.
    """
    match = _ADDRESS.fullmatch(text)
    if not match:
        raise errors.InvalidAddress(text)
    domain, bus, device, function = (int(part or "0", 16) for part in match.groups())
    return f"{domain:04x}:{bus:02x}:{device:02x}.{function}"


def is_address(text: str) -> bool:
    """Whether `text` is an address spelled as in sysfs."""
    try:
        return parse(text) == text
    except errors.InvalidAddress:
        return False
