"""Assign the adapters of many hosts in one run of Ansible: each host is a served fake, all of them in this process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from vfio import journal
from vfio.backends import remote_url
from vfio.fake import presets
from vfio.fake.machine import Machine
from vfio.fake.server import Server
from vfio.fake.serving import Listener

COLLECTION = Path(__file__).resolve().parents[2] / "cli" / "ansible"
DEVICES = [{"address": "0000:01:00.0", "whole_group": True}, {"address": "0002:01:00.0"}]
_RECAP = re.compile(r"^(\S+)\s+: ok=(\d+)\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", re.MULTILINE)


class Served:
    """A machine that a thread of this process serves."""

    def __init__(self, name: str, path: Path) -> None:
        self.machine: Machine = presets.machine_alone(f"fake:{name}")
        self.url = remote_url.make(str(path), 0)
        self._listener = Listener(path)
        self._server = Server(self.machine, self._listener.socket)
        self._listener.listen()
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()

    def bound(self) -> set[str]:
        """Addresses of the devices on vfio-pci."""
        with self.machine.lock:
            return set(self.machine.driver_core.vfio_devices)

    def end(self) -> None:
        self._server.stop()
        self._thread.join()
        self._listener.close()


@contextlib.contextmanager
def served(names: Sequence[str]) -> Iterator[list[Served]]:
    """Machines by name, while the block runs."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vfio-fleet-")))
        machines = []
        for number, name in enumerate(names):
            machines.append(Served(name, directory / f"{number}.sock"))
            stack.callback(machines[-1].end)
        yield machines


def environment(directory: Path) -> dict[str, str]:
    """For the commands of Ansible: the collection of this checkout, and `directory` for all that they write."""
    collections = directory / "collections" / "ansible_collections" / "vfio"
    if not collections.exists():
        collections.mkdir(parents=True)
        (collections / "host").symlink_to(COLLECTION)
        (directory / "ansible.cfg").touch()  # rather than one of the user or of the system
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "VFIO_"))}
    return {
        **kept,
        "ANSIBLE_HOME": str(directory / "home"),
        "ANSIBLE_LOCAL_TEMP": str(directory / "tmp"),
        "ANSIBLE_REMOTE_TEMP": str(directory / "remote"),
        "ANSIBLE_COLLECTIONS_PATH": str(directory / "collections"),
        "ANSIBLE_CONFIG": str(directory / "ansible.cfg"),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_PIPELINING": "1",
        journal.DIRECTORY: str(directory / "state"),
        "LC_ALL": "C.UTF-8",
    }


def ansible(tool: str, *words: str, directory: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run one of the commands of ansible-core."""
    command = [sys.executable, "-m", f"ansible.cli.{tool}", *words]
    return subprocess.run(
        command,
        env=environment(directory),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        **options,
    )


def inventory(backends: Mapping[str, str]) -> dict[str, Any]:
    """Hosts by name, each with the URL of its machine."""
    return {
        "all": {
            "hosts": {name: {"vfio_backend": url} for name, url in backends.items()},
            "vars": {
                "ansible_connection": "local",
                "ansible_python_interpreter": sys.executable,
                "vfio_become": False,
                "vfio_devices": DEVICES,
                "vfio_owner": "4321:77",
                "vfio_mode": "0660",
            },
        }
    }


def changes(recap: str, hosts: int) -> int:
    """How many hosts were changed, in the last lines of a playbook.  Raises unless all of them went well."""
    found = [(name, *map(int, counts)) for name, *counts in _RECAP.findall(recap)]
    bad = [name for name, ok, _, unreachable, failed in found if not ok or unreachable or failed]
    if bad or len(found) != hosts:
        raise click.ClickException(
            f"{len(found)} of {hosts} hosts answered; failed: {', '.join(bad) or 'none'}\n{recap}"
        )
    return sum(changed > 0 for _, _, changed, _, _ in found)


@click.command()
@click.option("--hosts", default=100, show_default=True, type=click.IntRange(min=1))
@click.option("--forks", default=10, show_default=True, type=click.IntRange(min=1), help="Hosts at the same time.")
@click.option("--machine", default="power8", show_default=True, metavar="NAME")
def main(hosts: int, forks: int, machine: str) -> None:
    """Assign the adapters of many served fakes with playbooks/assign.yml, twice; the second run changes nothing."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vfio-fleet-") as scratch, served([machine] * hosts) as machines:
        click.echo(f"{hosts} hosts ({machine}) serve after {time.perf_counter() - begin:.2f} s")
        directory = Path(scratch)
        hosts_file = directory / "inventory.json"
        names = [f"host-{number:03}" for number in range(hosts)]
        hosts_file.write_text(
            json.dumps(inventory({name: each.url for name, each in zip(names, machines, strict=True)}))
        )
        for run, expected in (("first", hosts), ("second", 0)):
            begin, spent = time.perf_counter(), _children()
            done = ansible(
                "playbook", "-i", str(hosts_file), "--forks", str(forks), "vfio.host.assign", directory=directory
            )
            seconds, spent = time.perf_counter() - begin, _children() - spent
            if done.returncode:
                raise click.ClickException(f"{run} run: status {done.returncode}\n{done.stdout}{done.stderr}")
            changed = changes(done.stdout, hosts)
            click.echo(
                f"{run} run, {forks} forks: {seconds:.1f} s, {seconds / hosts * 1e3:.0f} ms a host, "
                f"{spent / hosts * 1e3:.0f} ms of CPU a host; {changed} of {hosts} hosts changed"
            )
            if changed != expected:
                raise click.ClickException(f"{expected} hosts should have been changed")


def _children() -> float:
    """Seconds of CPU that commands have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
