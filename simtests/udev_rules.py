"""As much of udev as the rules of `vfio.persist` need: match keys, writes to attributes, modules, owners of nodes.

Sources: udev(7).  Whatever is not understood is an error.
"""

from __future__ import annotations

import fnmatch
import re

from fake_host import Host

from vfio import sysfs
from vfio.fake.driver import identity

_KEY = re.compile(r'([A-Z]+)(?:\{([^"]*?)\})?(==|!=|\+=|=)"([^"]*)"(?:, |$)')


def boot(host: Host, rules: str, options: str = "", *, modules: tuple[str, ...] = ()) -> None:
    """What a reboot makes of the host: every device on no driver, no module loaded but `modules`; then coldplug.

    `options` is a file of modprobe.d.
    """
    for pci in host.devices.values():
        if pci.driver is not None:
            host.machine.driver_core.release(pci)
        pci.driver_override = None
    core = host.machine.driver_core
    known = dict(core.drivers)
    core.drivers.clear()

    def load(name: str) -> None:
        for line in options.splitlines():
            if (match := re.fullmatch(r"softdep (\S+) pre: (\S+)", line)) and match[1] == name:
                load(match[2])
        for driver in known.values():
            if name in (driver.name, driver.module) and driver.name not in core.drivers:
                core.drivers[driver.name] = driver
                core._attach_all(driver)
                for line in options.splitlines():
                    if (ids := re.fullmatch(r"options vfio-pci ids=(\S+)", line)) and driver.name == "vfio-pci":
                        for id in ids[1].split(","):
                            core.new_id(driver, id.replace(":", " "))

    for name in modules:
        load(name)
    groups: set[int] = set()
    for address, pci in list(host.devices.items()):
        run = _event(host, rules, {"ACTION": "add", "SUBSYSTEM": "pci", "KERNEL": address}, sysfs.path(address))
        for name in run:
            load(name)
        for driver in known.values():  # 80-drivers.rules: what the modalias matches
            if driver.takes(identity(pci)):
                load(driver.name)
        for group in set(host.nodes) - groups:
            groups.add(group)
            event = {"ACTION": "add", "SUBSYSTEM": "vfio", "KERNEL": str(group)}
            assert _event(host, rules, event, f"/sys/devices/virtual/vfio/{group}") == []


def _event(host: Host, rules: str, event: dict[str, str], where: str) -> list[str]:
    """Carry out the rules; returns the modules to be loaded afterwards."""
    run: list[str] = []
    for line in rules.splitlines():
        if line.startswith("#") or not line:
            continue
        keys = [match.groups() for match in _KEY.finditer(line)]
        assert "".join(match[0] for match in _KEY.finditer(line)) == line, line
        matches = [key for key in keys if key[2] in ("==", "!=")]
        if all(_matches(host, event, where, key) for key in matches):
            for key in keys[len(matches) :]:
                _assign(host, event, where, key, run)
    return run


def _matches(host: Host, event: dict[str, str], where: str, key: tuple[str, str | None, str, str]) -> bool:
    name, _, operator, value = key
    value = value.replace("%k", event["KERNEL"])
    if name == "TEST":
        found = host.exists(value if value.startswith("/") else f"{where}/{value}")
    elif name == "DRIVER":
        found = sysfs.driver_of(host, event["KERNEL"]) == value
    else:
        found = fnmatch.fnmatchcase(event[name], value)
    return found == (operator == "==")


def _assign(
    host: Host, event: dict[str, str], where: str, key: tuple[str, str | None, str, str], run: list[str]
) -> None:
    name, argument, operator, value = key
    value = value.replace("%k", event["KERNEL"])
    node = f"/dev/vfio/{event['KERNEL']}"
    if (name, argument, operator) == ("RUN", "builtin", "+="):
        command, module = value.rsplit(" ", 1)
        assert command == "kmod load"
        run.append(module)
    elif name == "ATTR" and argument and operator == "=":
        path = argument.replace("[subsystem/pci]", "/sys/bus/pci/")
        host.write_text(path if path.startswith("/") else f"{where}/{path}", value)
    elif name == "OWNER":
        host.chown(node, int(value), -1)
    elif name == "GROUP":
        host.chown(node, -1, int(value))
    elif name == "MODE":
        host.chmod(node, int(value, 8))
    else:
        raise AssertionError(f"a key that this udev does not know: {key}")
