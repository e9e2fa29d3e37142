"""What the lab is doing, on standard error: a moving line on a terminal, plain lines elsewhere."""

import sys
from types import TracebackType

from rich.console import Console
from rich.status import Status


class Progress:
    """Shows one step at a time; nothing is left on a terminal at the end."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._status: Status | None = None

    def report(self, step: str) -> None:
        """Show what is going on now; an empty step clears it."""
        if not self._console.is_terminal:
            if step:
                print(f"lab: {step}", file=sys.stderr, flush=True)
            return
        if self._status is not None:
            self._status.stop()
            self._status = None
        if step:
            self._status = self._console.status(f"lab: {step}")
            self._status.start()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.report("")
