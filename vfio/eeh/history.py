"""How often each PE froze in the last hour: a PE that freezes again and again is broken, and recovery stops.

The kernel counts like that for the PEs that it recovers itself, and gives a device up after five
(eeh_handle_normal_event); it does not count what a VFIO user recovers.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from urllib.parse import quote
from weakref import WeakKeyDictionary

from vfio import errors, journal
from vfio.backend import Backend

HOUR = 3600.0
LIMIT = 5


class Freezes:
    """When PEs froze, kept for an hour, in the memory of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._times: WeakKeyDictionary[Backend, dict[int, list[float]]] = WeakKeyDictionary()

    def count(self, backend: Backend, group: int, now: float) -> int:
        """How often the PE of a group froze in the hour before `now` (seconds)."""
        with self._lock:
            return len(self._recent(backend, group, now))

    def add(self, backend: Backend, group: int, now: float) -> None:
        """The PE of a group froze at `now` (seconds)."""
        with self._lock:
            times = self._recent(backend, group, now)
            times.append(now)
            self._keep(backend, group, times)

    def _recent(self, backend: Backend, group: int, now: float) -> list[float]:
        known = self._times.get(backend.unwrapped(), {})
        return [time for time in known.get(group, ()) if now - HOUR < time <= now]

    def _keep(self, backend: Backend, group: int, times: list[float]) -> None:
        self._times.setdefault(backend.unwrapped(), {})[group] = times


class FreezeFile(Freezes):
    """The same in a file beside the journal of assignment, for commands: each is a process of its own."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        name = quote(backend.unwrapped().url.removesuffix(":"), safe="")
        self.path: Path = journal.directory() / f"{name}-freezes.json"

    def _recent(self, backend: Backend, group: int, now: float) -> list[float]:
        return [time for time in self._load().get(str(group), ()) if now - HOUR < time <= now]

    def _keep(self, backend: Backend, group: int, times: list[float]) -> None:
        content = {**self._load(), str(group): times}
        new = self.path.with_suffix(f".{os.getpid()}")
        try:
            self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            new.write_text(json.dumps(content) + "\n", encoding="utf-8")
            new.replace(self.path)
        except OSError as error:
            raise errors.NoJournal(str(self.path.parent), error) from error

    def _load(self) -> dict[str, list[float]]:
        """What the file has; nothing where there is none, or one that makes no sense."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return {str(int(group)): [float(time) for time in times] for group, times in found.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}


PROCESS = Freezes()
"""The freezes of this process."""
