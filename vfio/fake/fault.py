"""What touching a mapping can do to a process.  A signal cannot be delivered here, so an exception names it."""

from __future__ import annotations


class BusError(RuntimeError):
    """SIGBUS: the process touched a mapped BAR that is not there now.

    Raised by `load` and `store` while memory decode is off, while the device is in D3hot, and while it is in low
    power: a real program would be killed.
    """


class SegmentationFault(RuntimeError):
    """SIGSEGV: the process stored to a mapping without PROT_WRITE, or touched one that is closed."""
