"""A served machine for the cases: a real server in a process of its own, with a fresh machine for each case."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any

from simtests.conformance import modules
from simtests.conformance.forked import _receive, _send
from vfio.backends import remote, remote_url
from vfio.backends.remote import RemoteBackend
from vfio.fake import presets
from vfio.fake.server import Server

PROCESS = "?uid=0&memlock=8388608&ipc_lock=1"
"""The process that a `fake:` URL means."""


class ServedMachine:
    """The server, and what a case does to its machine from outside."""

    def __init__(self, machine: str, path: Path, uid: int | None = None) -> None:
        self.path = path
        self.url = remote_url.make(str(path)) + PROCESS
        self._socket, theirs = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            self._socket.close()
            _serve(theirs, machine, path, uid)
        theirs.close()

    @property
    def pid(self) -> int:
        return self._pid

    def ask(self, name: str, *arguments: object) -> Any:
        """`renew`, `leaks`, `load` and `unload` (a driver of the host)."""
        _send(self._socket, (name, arguments))
        return _receive(self._socket)

    def renew(self) -> RemoteBackend:
        """A fresh machine, and this process on it."""
        self.ask("renew")
        return remote.from_url(self.url)

    def end(self) -> None:
        """End the server; a later one has our end of its connection too, so that closing ours would not be enough."""
        _send(self._socket, ("end", ()))
        self._socket.close()
        os.waitpid(self._pid, 0)


class _Served:
    def __init__(self, machine: str, listener: socket.socket) -> None:
        self._url, self._listener = f"fake:{machine}", listener
        self._server: Server | None = None
        self._thread = threading.Thread()

    def renew(self) -> None:
        if self._server:
            self._server.stop()
            self._thread.join()
        self._server = Server(presets.machine_alone(self._url), self._listener.dup())
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()

    def leaks(self) -> list[str]:
        assert self._server
        machine = self._server.machine
        with machine.lock:
            self._server.files.settle()
            return machine.leaks()

    def load(self, name: str) -> None:
        assert self._server
        with self._server.machine.lock:
            self._server.machine.driver_core.load(name)

    def unload(self, name: str) -> None:
        assert self._server
        with self._server.machine.lock:
            self._server.machine.driver_core.unload(name)

    def load_iommu(self) -> None:
        self._module("load_iommu")

    def unload_iommu(self) -> str | None:
        return self._module("unload_iommu")

    def _module(self, what: str) -> str | None:
        assert self._server
        with self._server.machine.lock:
            self._server.files.settle()
            return modules.ACTIONS[what](self._server.machine)


def _serve(connection: socket.socket, machine: str, path: Path, uid: int | None) -> None:
    """The server's life; it never returns."""
    try:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(64)
        if uid is not None:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            listener.listen(64)  # who listens is whom clients see
        served = _Served(machine, listener)
        while True:
            name, arguments = _receive(connection)
            if name == "end":
                os._exit(0)
            _send(connection, getattr(served, name)(*arguments))
    except EOFError:
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(1)
