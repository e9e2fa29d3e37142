"""The Ansible collection: real ansible-core, on this machine, against served fakes."""

from __future__ import annotations

import base64
import importlib
import json
import re
import shlex
import sys
import tarfile
from collections.abc import Iterator
from errno import EIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from simtests.bench import fleet
from vfio import errors

EDU, BESIDE, DISK, BRIDGE = "0000:01:00.0", "0000:01:00.1", "0002:01:00.0", "0000:00:00.0"
OWNED = {"owner": "4321:77", "mode": "0660"}
MODULES = ("vfio_device", "vfio_facts")

Results = dict[str, Any]


class Playbook:
    """Tasks by name, and what they returned."""

    def __init__(self, directory: Path, backend: str, config: Path) -> None:
        self.directory = directory
        self._defaults = {"backend": backend, "config_dir": str(config)}
        self._tasks: list[dict[str, Any]] = []

    def device(self, name: str, arguments: dict[str, Any], **keywords: Any) -> None:
        self._task(name, "vfio_device", {**self._defaults, **arguments}, keywords)

    def facts(self, name: str, backend: str, **keywords: Any) -> None:
        self._task(name, "vfio_facts", {"backend": backend}, keywords)

    def run(self) -> Results:
        names = [task["register"] for task in self._tasks]
        answer = "{{ {" + ", ".join(f"'{name}': {name}" for name in names) + "} | to_json | b64encode }}"
        show = {"name": "Results", "ansible.builtin.debug": {"msg": f"RESULTS {answer} END"}}
        play = {"hosts": "localhost", "gather_facts": False, "tasks": [*self._tasks, show]}
        book, hosts = self.directory / "play.json", self.directory / "hosts.json"
        book.write_text(json.dumps([play]))
        local = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
        hosts.write_text(json.dumps({"all": {"hosts": {"localhost": local}}}))
        done = fleet.ansible("playbook", "-i", str(hosts), str(book), directory=self.directory)
        found = re.search(r"RESULTS (\S+) END", done.stdout)
        assert done.returncode == 0, done.stdout + done.stderr
        assert found, done.stdout
        return json.loads(base64.b64decode(found[1]))

    def _task(self, name: str, module: str, arguments: dict[str, Any], keywords: dict[str, Any]) -> None:
        task = {"name": name, f"vfio.host.{module}": arguments, "register": name, "ignore_errors": True, **keywords}
        self._tasks.append(task)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ansible")


@pytest.fixture(scope="module")
def config(directory: Path) -> Path:
    """What stands for /etc."""
    return directory / "etc"


@pytest.fixture(scope="module")
def machines() -> Iterator[list[fleet.Served]]:
    """One that works, and one that fails when a second device is to come to vfio-pci."""
    with fleet.served(["power8", "power8"]) as found:
        for each in found:
            with each.machine.lock:
                each.machine.driver_core.load("nvme")
        with found[1].machine.lock:
            found[1].machine.hooks.fail("write_text", EIO, nth=4)  # driver_override and drivers_probe of each
        yield found


@pytest.fixture(scope="module")
def results(directory: Path, config: Path, machines: list[fleet.Served]) -> Results:
    """One run of a playbook; each task's result by its name."""
    good, failing = (each.url for each in machines)
    without = directory / "python-without-vfio"
    without.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -S "$@"\n')
    without.chmod(0o755)

    play = Playbook(directory, good, config)
    one = {"address": EDU, "whole_group": True, **OWNED}
    play.facts("before", good, check_mode=True)
    play.device("checked", one, check_mode=True, diff=True)
    play.device("applied", one, diff=True)
    play.device("again", one, diff=True)
    play.facts("after", good)
    several = [{"id": "1B36:0010", "persistent": True}, {"slot": "C99", "optional": True}, {"address": EDU}]
    play.device("several", {"devices": several, **OWNED})
    play.device("back", {"devices": [{"address": EDU, "whole_group": True}, {"class": "0108"}], "state": "absent"})
    play.device("back_again", {"address": EDU, "whole_group": True, "state": "absent"})
    play.facts("at_last", good)
    play.device("failing", {"devices": [{"address": EDU}, {"address": BESIDE}], **OWNED, "backend": failing})
    play.facts("after_failing", failing)
    play.device("no_selector", {"driver": "none"})
    play.device("two_selectors", {"devices": [{"address": EDU, "slot": "C5"}]})
    play.device("no_such_device", {"address": "0000:77:00.0"})
    play.device("no_library", one, vars={"ansible_python_interpreter": str(without)})
    return play.run()


def by_address(result: Results) -> dict[str, Any]:
    return {each["address"]: each for each in result["ansible_facts"]["vfio"]["devices"]}


def by_group(result: Results) -> dict[int, Any]:
    return {each["group"]: each for each in result["ansible_facts"]["vfio"]["groups"]}


# --- vfio_device ---


def test_check_mode_tells_what_apply_then_does(results):
    checked, applied = results["checked"], results["applied"]
    assert checked["changed"] is True
    assert checked["commands"][:2] == [
        f"echo vfio-pci > /sys/bus/pci/devices/{EDU}/driver_override",
        f"echo {EDU} > /sys/bus/pci/drivers_probe",
    ]
    assert "chown 4321:77 /dev/vfio/0" in checked["commands"]
    for key in ("changed", "commands", "notes", "diff"):
        assert applied[key] == checked[key]


def test_diff_has_each_device_and_node_before_and_after(results):
    device, beside, node = results["applied"]["diff"]
    assert device == {
        "before_header": EDU,
        "after_header": EDU,
        "before": "driver: none\ndriver_override: none\n",
        "after": "driver: vfio-pci\ndriver_override: vfio-pci\n",
    }
    assert beside["before_header"] == BESIDE
    assert (node["after_header"], node["after"]) == ("/dev/vfio/0", "owner: 4321:77\nmode: 0660\n")


def test_second_run_changes_nothing(results):
    assert results["applied"]["changed"] is True
    assert {key: results["again"][key] for key in ("changed", "commands", "diff")} == {
        "changed": False,
        "commands": [],
        "diff": [],
    }


def test_several_devices_share_what_is_said_beside_the_list(results):
    several = results["several"]
    assert several["changed"] is True
    assert "chown 4321:77 /dev/vfio/2" in several["commands"]
    assert not any(EDU in command for command in several["commands"])
    assert several["notes"] == ["there is no device with slot C99, which is optional"]


def test_absent_gives_back_to_the_host_what_survived_reboots_too(results, config):
    assert results["back"]["changed"] is True
    assert any("60-vfio-assign.rules" in command for command in results["back"]["commands"])
    assert [path for path in config.rglob("*") if path.is_file()] == []
    assert results["back_again"]["changed"] is False
    before, after = by_address(results["before"]), by_address(results["at_last"])
    assert {address: each["driver"] for address, each in after.items()} == {
        address: each["driver"] for address, each in before.items()
    }
    assert after[DISK]["driver"] == "nvme"


def test_failed_change_is_rolled_back_and_told(results):
    failing = results["failing"]
    assert failing["failed"] is True
    assert failing["error"]["class"] == "RolledBack"
    assert failing["error"]["errno"] == "EIO"
    assert failing["put_back"] == [EDU, BESIDE]
    assert f"put back as before: {EDU}, {BESIDE}" in failing["msg"]
    assert {each["driver"] for each in by_address(results["after_failing"]).values()} == {None, "nvme"}
    assert {each["driver_override"] for each in by_address(results["after_failing"]).values()} == {None}


def test_arguments_that_contradict_each_other_are_refused(results):
    assert "one of the following is required: address, id, slot, class, devices" in results["no_selector"]["msg"]
    assert "mutually exclusive: address|id|slot|class found in devices" in results["two_selectors"]["msg"]
    for name in ("no_selector", "two_selectors"):
        assert results[name]["failed"] is True


def test_device_that_is_not_there_is_told_with_the_rule(results):
    missing = results["no_such_device"]
    assert missing["failed"] is True
    assert missing["error"]["class"] == "BadPlan"
    assert missing["error"]["what"] == "vfio_device: device[0].address"
    assert "0000:77:00.0: no device of this host is there" in missing["msg"]


def test_host_without_the_library_is_told_what_to_install(results):
    message = results["no_library"]["msg"]
    assert results["no_library"]["failed"] is True
    assert "Failed to import the required Python library (vfio)" in message
    assert re.search(r"Install it \(Python 3\.11 or later\): \S+ -m pip install", message)


# --- vfio_facts ---


def test_facts_are_devices_groups_and_drivers(results):
    assert results["before"]["changed"] is False
    facts = results["before"]["ansible_facts"]["vfio"]
    assert facts["power"] is True
    assert facts["drivers"]["nvme"] == {"module": "nvme", "devices": [DISK]}
    device = by_address(results["before"])[EDU]
    assert (device["id"], device["class"], device["group"], device["phb"], device["pe"]) == (
        "1234:11e8",
        "00ff00",
        0,
        0,
        0xFD,
    )
    assert (device["assignable"], device["why"], device["driver"], device["on_vfio"]) == (True, None, None, False)
    assert device["eeh"] == {
        "eeh_mode": "0x200",
        "eeh_pe_config_addr": "0xfd",
        "eeh_pe_state": "0x00000078 0x00000800",
    }
    bridge = by_address(results["before"])[BRIDGE]
    assert (bridge["bridge"], bridge["assignable"], bridge["why"]) == (True, False, "a bridge stays with the host")
    group = by_group(results["before"])[2]
    assert (group["devices"], group["viable"], group["blockers"], group["node"]) == ([DISK], False, [DISK], None)


def test_facts_follow_an_assignment(results):
    device = by_address(results["after"])[EDU]
    assert (device["driver"], device["driver_override"], device["on_vfio"]) == ("vfio-pci", "vfio-pci", True)
    group = by_group(results["after"])[0]
    assert (group["devices"], group["viable"]) == ([EDU, BESIDE], True)
    assert group["node"] == {"path": "/dev/vfio/0", "owner": "4321:77", "mode": "0660"}


# --- arguments ---


@pytest.fixture(scope="module")
def modules(directory: Path) -> Iterator[dict[str, ModuleType]]:
    """The modules, imported here."""
    path = fleet.environment(directory)["ANSIBLE_COLLECTIONS_PATH"]
    sys.path.insert(0, path)
    try:
        yield {
            name: importlib.import_module(f"ansible_collections.vfio.host.plugins.modules.{name}") for name in MODULES
        }
    finally:
        sys.path.remove(path)


def params(module: ModuleType, **given: Any) -> dict[str, Any]:
    return {**dict.fromkeys(module.ARGUMENTS), "state": "present", **given}


@pytest.mark.parametrize(
    ("mode", "meant"), [("0660", 0o660), ("660", 0o660), ("0o600", 0o600), (0o640, 0o640), ("0", 0), (None, None)]
)
def test_mode_is_octal_digits_or_a_number(modules, mode, meant):
    module = modules["vfio_device"]
    (device,) = module.wanted(params(module, address=EDU, mode=mode)).devices
    assert device.mode == meant


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"mode": "u+rw"}, "'u\\+rw' is not a mode in octal digits"),
        ({"mode": "0690"}, "'0690' is not a mode in octal digits"),
        ({"mode": True}, "True is not a mode in octal digits"),
        ({"mode": "7777"}, r"0o7777 \(4095\) is not in 0o0\.\.0o777"),
        ({"mode": 660}, "did you mean 0o660"),
        ({"mode": -1}, "is not in 0o0"),
        ({"state": "absent", "driver": "vfio-pci"}, "driver: has no place beside state=absent"),
        ({"state": "absent", "persistent": False}, "persistent: has no place beside state=absent"),
        ({"driver": "none", "owner": "root"}, "no /dev/vfio/N to give away"),
        ({"driver": "a/b"}, "is not a name"),
    ],
)
def test_argument_that_breaks_a_rule_is_refused(modules, given, rule):
    module = modules["vfio_device"]
    with pytest.raises(errors.BadPlan, match=rule):
        module.wanted(params(module, address=EDU, **given))


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_wait_that_is_no_number_of_seconds_is_refused(modules, seconds):
    with pytest.raises(errors.BadPlan, match="is not a number of seconds"):
        modules["vfio_device"]._seconds(seconds)


def test_entry_of_the_list_overrules_what_is_said_beside_it(modules):
    module = modules["vfio_device"]
    nothing = dict.fromkeys((*module.WHICH, *module.WHAT))
    entries = [{**nothing, "address": EDU, "owner": "1:2", "whole_group": False}, {**nothing, "id": "1b36:0010"}]
    first, second = module.wanted(params(module, devices=entries, owner="3:4", whole_group=True)).devices
    assert (first.owner, first.whole_group, first.persistent) == ("1:2", False, None)
    assert (second.owner, second.whole_group, second.driver) == ("3:4", True, "vfio-pci")


# --- what one gets ---


@pytest.fixture(scope="module")
def documents(directory: Path) -> dict[str, Any]:
    done = fleet.ansible("doc", "--json", *(f"vfio.host.{name}" for name in MODULES), directory=directory)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", MODULES)
def test_documentation_has_the_arguments_that_there_are(modules, documents, name):
    def outline(options: dict[str, Any], nested: str) -> dict[str, Any]:
        return {
            key: [option.get(field) for field in ("type", "elements", "choices", "default")]
            + [outline(option.get(nested) or {}, nested)]
            for key, option in options.items()
        }

    document = documents[f"vfio.host.{name}"]
    assert outline(document["doc"]["options"], "suboptions") == outline(modules[name].ARGUMENTS, "options")
    assert document["examples"].strip()


def test_documentation_has_all_that_facts_return(documents, results):
    described = documents["vfio.host.vfio_facts"]["return"]["ansible_facts"]["contains"]["vfio"]["contains"]
    facts = results["after"]["ansible_facts"]["vfio"]
    assert set(described) == set(facts)
    for name in ("devices", "groups"):
        assert set(described[name]["contains"]) == set(facts[name][0])
    assert set(described["drivers"]["contains"]) == set(facts["drivers"]["nvme"])


def test_ansible_doc_renders_the_modules(directory):
    done = fleet.ansible("doc", *(f"vfio.host.{name}" for name in MODULES), directory=directory)
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("> MODULE vfio.host.vfio_device", "> MODULE vfio.host.vfio_facts", "check_mode", "whole_group"):
        assert text in done.stdout


def test_collection_is_built_whole(directory):
    done = fleet.ansible(
        "galaxy", "collection", "build", str(fleet.COLLECTION), "--output-path", str(directory), directory=directory
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(directory / "vfio-host-0.1.0.tar.gz") as archive:
        names = {name for name in archive.getnames() if "." in name or name == "LICENSE"}
    assert names == {
        "FILES.json",
        "LICENSE",
        "MANIFEST.json",
        "README.md",
        "meta/runtime.yml",
        "playbooks/assign.yml",
        "playbooks/inventory.example.yml",
        "plugins/module_utils/library.py",
        "plugins/modules/vfio_device.py",
        "plugins/modules/vfio_facts.py",
    }


# --- a fleet ---


def test_playbook_assigns_on_every_host_and_then_changes_nothing(directory):
    with fleet.served(["power8"] * 3) as machines:
        backends = {f"host-{number}": each.url for number, each in enumerate(machines)}
        hosts = directory / "fleet.json"
        hosts.write_text(json.dumps(fleet.inventory(backends)))
        for expected in (3, 0):
            done = fleet.ansible("playbook", "-i", str(hosts), "--forks", "3", "vfio.host.assign", directory=directory)
            assert done.returncode == 0, done.stdout + done.stderr
            assert fleet.changes(done.stdout, 3) == expected
        for each in machines:
            assert each.bound() == {EDU, BESIDE, DISK}
            with each.machine.lock:
                nodes = {group: (node.uid, node.gid, node.mode) for group, node in each.machine.vfio.groups.items()}
            assert nodes == dict.fromkeys((0, 2), (4321, 77, 0o660))


def test_example_inventory_is_one(directory):
    example = fleet.COLLECTION / "playbooks" / "inventory.example.yml"
    done = fleet.ansible("inventory", "-i", str(example), "--list", directory=directory)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (len(found["compute"]["hosts"]), found["fake"]["hosts"]) == (50, ["one"])
