"""The two lists of capabilities in configuration space.  Nothing is trusted: a list that runs in a circle, or leads where
no capability can be, ends there, and a fault says so."""

from __future__ import annotations

from collections.abc import Iterator

from vfio._pci_header import HEADER_SIZE, STANDARD_SIZE, Header
from vfio._pci_register import Source

_LEAST = 4
"""Bytes of the smallest capability, of either kind."""


def standard(source: Source, faults: list[str]) -> Iterator[tuple[int, int]]:
    """Where each standard capability begins, and its ID."""
    header = Header(source, 0)
    if source.size < STANDARD_SIZE or not header.status.capabilities:
        return
    at, seen = header.capabilities_pointer & 0xFC, set[int]()
    while at:
        if at < HEADER_SIZE:
            faults.append(f"the list of capabilities leads into the header, to {at:#x}")
            return
        if at in seen:
            faults.append(f"the list of capabilities runs in a circle, back to {at:#x}")
            return
        seen.add(at)
        identity, following = source.read(at, 2)
        if identity == 0xFF:
            faults.append(f"the capability at {at:#x} reads all ones")
            return
        yield at, identity
        at = following & 0xFC


def extended(source: Source, faults: list[str]) -> Iterator[tuple[int, int, int]]:
    """Where each extended capability begins, its ID and its version."""
    at, seen = STANDARD_SIZE if source.size >= STANDARD_SIZE + _LEAST else 0, set[int]()
    while at:
        if at < STANDARD_SIZE:
            faults.append(f"the list of extended capabilities leads into the first 256 bytes, to {at:#x}")
            return
        if at + _LEAST > source.size:
            faults.append(f"the list of extended capabilities leads to {at:#x}, behind the end")
            return
        if at in seen:
            faults.append(f"the list of extended capabilities runs in a circle, back to {at:#x}")
            return
        seen.add(at)
        header = int.from_bytes(source.read(at, 4), "little")
        if header == 0xFFFF_FFFF:
            if at > STANDARD_SIZE:  # a device may answer so where it has no extended capabilities at all
                faults.append(f"the extended capability at {at:#x} reads all ones")
            return
        if header & 0xFFFF:  # else a place holder, which vfio-pci leaves for one that it hides
            yield at, header & 0xFFFF, header >> 16 & 0xF
        at = header >> 20 & 0xFFC
