"""Names of vendors, devices and classes, from the pci.ids file of this host, where it has one.

The file is megabytes of text, and a command needs a few names of it: they are searched for, nothing else is parsed.
Format: https://pci-ids.ucw.cz
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

FILES = (Path("/usr/share/misc/pci.ids"), Path("/usr/share/hwdata/pci.ids"))


class PciIds:
    """The content of one pci.ids file."""

    def __init__(self, text: str) -> None:
        self._text = "\n" + text + "\n"

    def vendor(self, vendor: int) -> str | None:
        """The name of a vendor."""
        return self._entry(f"\n{vendor:04x}  ")[0]

    def device(self, vendor: int, device: int) -> str | None:
        """The name of a vendor's device."""
        return self._below(f"\n{vendor:04x}  ", f"\n\t{device:04x}  ")

    def device_class(self, code: int) -> str | None:
        """The name of a class (24 bits): that of its subclass, else that of its base class."""
        base = f"\nC {code >> 16:02x}  "
        return self._below(base, f"\n\t{code >> 8 & 0xFF:02x}  ") or self._entry(base)[0]

    def _entry(self, head: str, start: int = 0, end: int | None = None) -> tuple[str | None, int]:
        """The rest of the line that begins with `head`, and where the line ends."""
        found = self._text.find(head, start, end)
        if found < 0:
            return None, -1
        stop = self._text.index("\n", found + 1)
        return self._text[found + len(head) : stop], stop

    def _below(self, head: str, line: str) -> str | None:
        _, start = self._entry(head)
        if start < 0:
            return None
        # The entries that belong to it are the lines from here on that begin with a tab (or a comment).
        end = start
        while self._text[end + 1 : end + 2] in ("\t", "#"):
            end = self._text.index("\n", end + 1)
        return self._entry(line, start, end + 1)[0]


@functools.cache
def load(files: Sequence[Path] = FILES) -> PciIds:
    """The first of these files that there is; names nothing where there is none."""
    for file in files:
        try:
            return PciIds(file.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue
    return PciIds("")
