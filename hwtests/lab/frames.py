"""Several byte streams over one serial console that the kernel and the firmware write to as well.

A frame is one line: mark, channel, sequence number, how the payload is packed, base64 payload, CRC-32 of all that.
Whatever on the console is no intact frame is console text; a number that is missing says that a frame was hit.
Both sides import this file, and the guest does so at every boot: standard library only, and little of it.
"""

import re
import zlib
from binascii import a2b_base64, b2a_base64
from collections import deque

OUTPUT = "O"  # standard output of the command
ERROR = "E"  # its standard error
RECORD = "R"  # a line that the command wrote to the descriptor VFIO_LAB_RECORDS
READY = "B"  # the guest is up and the command starts
KERNEL = "K"  # kernel log since the command started
BOOT = "D"  # kernel log of the boot
STUCK = "S"  # what the processes of the command were doing when it was stopped
EXIT = "X"  # exit status of the command, decimal

PAYLOAD = 12288  # most bytes that one frame should carry: a lost frame loses no more, and a line stays readable

_PACK_ABOVE = 128  # shorter payloads do not shrink
_FRAME = re.compile(rb"~L([A-Z])(\d+)([pz])([A-Za-z0-9+/=]*)#([0-9a-f]{8})~")
_CONSOLE_LINES = 400  # of console text kept


class Encoder:
    """Makes frames, numbering them."""

    def __init__(self) -> None:
        self._number = 0

    def encode(self, channel: str, payload: bytes) -> bytes:
        """The line, with its newline, that carries `payload` on `channel`."""
        packed, how = payload, "p"
        if len(payload) > _PACK_ABOVE:
            packed, how = zlib.compress(payload, 1), "z"
        body = f"{channel}{self._number}{how}".encode() + b2a_base64(packed, newline=False)
        self._number += 1
        return b"~L%s#%08x~\n" % (body, zlib.crc32(body))


class Decoder:
    """Finds frames in what the console sent, in pieces of any size."""

    def __init__(self) -> None:
        self.lost = 0  # frames that never arrived intact
        self._partial = b""
        self._expected = 0
        self._console: deque[str] = deque(maxlen=_CONSOLE_LINES)

    @property
    def console(self) -> list[str]:
        """The last lines of console text that were no frames."""
        rest = self._partial.decode("utf-8", "replace").strip()
        return [*self._console, rest] if rest and not rest.startswith("~L") else list(self._console)

    def feed(self, data: bytes) -> list[tuple[str, bytes]]:
        """(channel, payload) of every frame that `data` completes."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [frame for line in lines for frame in self._line(line)]

    def _line(self, line: bytes) -> list[tuple[str, bytes]]:
        found = []
        end = 0
        for match in _FRAME.finditer(line):
            channel, number, how, text, crc = match.groups()
            if zlib.crc32(channel + number + how + text) != int(crc, 16):
                continue
            self._note(line[end : match.start()])
            end = match.end()
            packed = a2b_base64(text)
            found.append((channel.decode(), zlib.decompress(packed) if how == b"z" else packed))
            self.lost += max(0, int(number) - self._expected)
            self._expected = int(number) + 1
        self._note(line[end:])
        return found

    def _note(self, text: bytes) -> None:
        if line := text.decode("utf-8", "replace").strip():
            self._console.append(line)
