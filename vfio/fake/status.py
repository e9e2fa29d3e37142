"""What a server tells about itself: its machine, its clients and what they hold."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from vfio.fake import introspection
from vfio.fake.client_process import UNADOPTED, command_of

if TYPE_CHECKING:
    from vfio.fake.client_process import ClientProcess
    from vfio.fake.machine import Machine
    from vfio.fake.server import Server


def of(server: Server) -> dict[str, Any]:
    """Plain data; sizes are in bytes.  A client is a program, however many connections it has."""
    machine = server.machine
    with machine.lock:
        return {
            "pid": os.getpid(),
            "uptime": round(time.time() - server.started, 3),
            "requests": server.answered,
            "machine": {
                "platform": machine.topology.platform.name,
                "cpu": machine.topology.platform.cpu,
                "page_size": machine.page_size,
                "kernel": ".".join(map(str, machine.kernel)),
            },
            "clients": [_client(process) for process in server.processes.values()],
            "open_files": len(server.files),
            "bindings": _bindings(machine),
            "held": introspection.held(machine.vfio),
            "locked": sum(process.locked_pages for process in machine.processes) * machine.page_size,
            **_vfio(machine),
        }


def _client(process: ClientProcess) -> dict[str, Any]:
    return {
        "pid": process.pid,
        "uid": process.uid,
        "command": command_of(process.pid) if process.pid != UNADOPTED else "",
        "connections": process.connections,
        "files": {str(fd): file.link for fd, file in sorted(process.files.items())},
        "mappings": len(process.mappings),
        "locked": process.locked_pages * process.machine.page_size,
        "memlock": process.memlock,
        "ipc_lock": process.ipc_lock,
    }


def _bindings(machine: Machine) -> list[dict[str, Any]]:
    """The devices that have a driver or an owner that they did not have when the machine was started."""
    return [
        {"address": pci.address, "driver": pci.driver, "group": pci.group.number if pci.group else None}
        for pci in machine.driver_core.devices.values()
        if pci.driver != machine.topology.device(pci.address).driver
    ]


def _vfio(machine: Machine) -> dict[str, Any]:
    described = introspection.describe(machine.vfio)
    groups = machine.vfio.groups.values()
    return {
        "containers": described["containers"],
        "devices": described["devices"],
        "nodes": [
            {"path": f"/dev/vfio/{group.number}", "uid": group.uid, "gid": group.gid, "mode": f"{group.mode:04o}"}
            for group in groups
        ],
    }
