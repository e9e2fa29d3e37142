"""The guest's half of `pytest --lab`: run exactly the items that the host chose, and send every report to it."""

import json
import os
import warnings
from collections.abc import Generator
from pathlib import Path

import pytest

ITEMS = Path("/lab/items")  # node IDs, a line each, in the order to run them


class GuestPlugin:
    """Sends what happens as JSON lines to the descriptor VFIO_LAB_RECORDS."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._records = int(os.environ["VFIO_LAB_RECORDS"])
        self._log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._log, 0, os.SEEK_END)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        found = {item.nodeid: item for item in items}
        wanted = ITEMS.read_text(encoding="utf-8").splitlines()
        if missing := [name for name in wanted if name not in found]:
            raise pytest.UsageError("the guest does not collect what the host does: " + ", ".join(missing))
        items[:] = [found[name] for name in wanted]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if messages := self._kernel_messages():
            report.sections.append((f"Kernel log {report.when}", messages))
        return report

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._send({"event": "start", "nodeid": nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._send({"event": "report", "data": data})

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._send({"event": "finish", "nodeid": nodeid})

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage, nodeid: str) -> None:
        self._send(
            {
                "event": "warning",
                "category": warning_message.category.__name__,
                "text": str(warning_message.message),
                "file": warning_message.filename,
                "line": warning_message.lineno,
                "nodeid": nodeid,
            }
        )

    def _send(self, record: dict[str, object]) -> None:
        line = json.dumps(record, default=repr).encode() + b"\n"
        while line:
            line = line[os.write(self._records, line) :]

    def _kernel_messages(self) -> str:
        """What the kernel said since the last report."""
        lines = []
        while True:
            try:
                record = os.read(self._log, 8192).decode("utf-8", "replace")
            except BlockingIOError:
                break
            except BrokenPipeError:
                continue
            lines.append(record.partition(";")[2].splitlines()[0])
        return "\n".join(lines)
