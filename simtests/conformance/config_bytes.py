"""Every byte of configuration space, written and read back in every width: measured, stored, compared.

What a device's configuration space held is stored as runs of bytes, by their offset in hex.  Of what was read back only
those bytes are stored that are not what was written, so that the file shows at a glance what a user cannot change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from simtests.conformance.pci_calls import CONFIG, RawDevice

DIRECTORY = Path(__file__).parents[1] / "config_space"
MODELS = ("edu", "pci-testdev", "nvme", "e1000e")
"""Devices of the lab's machines."""
PATTERNS = (0x00, 0xFF, 0x55, 0xAA)
PASSES = ((1, 0), (2, 0), (4, 0), (2, 1), (4, 2))
"""Width of each access, and where the first one begins: the last two lie across words, which the kernel takes apart."""

Runs = dict[str, str]


def measure(device: RawDevice) -> dict[str, Any]:
    """What is in configuration space, and for each way of writing what was read back; all is put back."""
    size = device.region(CONFIG).size
    before = _read(device, 0, size)
    left = {}
    for width, first in PASSES:
        images = {pattern: bytearray([pattern]) * size for pattern in PATTERNS}
        for at in range(first, size - width + 1, width):
            for pattern, image in images.items():
                assert device.write(CONFIG, at, bytes([pattern]) * width) == width
                image[at : at + width] = _read(device, at, width)
            assert device.write(CONFIG, at, before[at : at + width]) == width
        assert _read(device, 0, size) == before, f"not all could be put back after accesses of {width} bytes"
        for pattern, image in images.items():
            left[f"{pattern:02x} in accesses of {width} from {first}"] = runs(image, lambda at, same=pattern: same)
    return {"size": size, "before": runs(before, lambda at: 0), "left": left}


def _read(device: RawDevice, at: int, count: int) -> bytes:
    found = device.read(CONFIG, at, count)
    assert isinstance(found, bytes), f"{count} bytes at {at:#x}: {found}"
    return found


def runs(image: bytes | bytearray, usual: Callable[[int], int]) -> Runs:
    """The bytes that are not as usual."""
    found: Runs = {}
    start = None
    for at in range(len(image) + 1):
        differs = at < len(image) and image[at] != usual(at)
        if differs and start is None:
            start = at
        elif not differs and start is not None:
            found[f"{start:03x}"] = image[start:at].hex()
            start = None
    return found


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Each byte that is not as it was recorded."""
    lines = [] if found["size"] == wanted["size"] else [f"size {found['size']}, not {wanted['size']}"]
    lines += _between("before", found["before"], wanted["before"])
    for name in sorted(found["left"].keys() | wanted["left"].keys()):
        lines += _between(name, found["left"].get(name, {}), wanted["left"].get(name, {}))
    return lines


def _between(name: str, found: Runs, wanted: Runs) -> Iterator[str]:
    here, there = _bytes(found), _bytes(wanted)
    for at in sorted(here.keys() | there.keys()):
        if here.get(at) != there.get(at):
            yield f"{name}: at {at:#x} {_text(here.get(at))}, recorded {_text(there.get(at))}"


def _bytes(stored: Runs) -> dict[int, int]:
    return {int(start, 16) + n: byte for start, text in stored.items() for n, byte in enumerate(bytes.fromhex(text))}


def _text(byte: int | None) -> str:
    return "as usual" if byte is None else f"{byte:#04x}"


def path(target: str) -> Path:
    """Where what was recorded on a target of the lab is."""
    return DIRECTORY / f"{target}.json"


def recorded(target: str, model: str) -> dict[str, Any]:
    """What was recorded of a device."""
    found: dict[str, Any] = json.loads(path(target).read_text())["devices"][model]
    return found
