#!/usr/bin/python
# MIT licence (see LICENSE)
"""Ansible module: assign devices to VFIO, or give them back to the host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vfio_device
short_description: Assign PCI devices to VFIO, or give them back to the host
version_added: 0.1.0
description:
  - Makes the devices of a host what they are to be, as C(vfio apply) does with a plan - driver, owner and mode of their
    groups' nodes, and whether that survives a reboot.
  - All devices of a task are changed, or none. When a change fails, those made before it are put back.
  - What was changed is written down on the host, so that O(state=absent), or C(vfio restore --all) there, puts it back.
author:
  - the authors of vfio
requirements:
  - vfio, this project's Python package, on the managed host
options:
  address:
    description: The device with this PCI address, such as V(0001:01:00.0).
    type: str
  id:
    description: Every device with this vendor and device id, in hexadecimal, such as V(1b36:0010).
    type: str
  slot:
    description: Every function of the device in this physical slot, a name in C(/sys/bus/pci/slots).
    type: str
  class:
    description: Every device of this class - 2, 4 or 6 hexadecimal digits, such as V(0108) for NVMe.
    type: str
  devices:
    description:
      - Several devices at once. Each has exactly one of O(address), O(id), O(slot) and O(class).
      - What an entry leaves out is as in the option of the same name beside the list.
    type: list
    elements: dict
    suboptions:
      address:
        description: As O(address).
        type: str
      id:
        description: As O(id).
        type: str
      slot:
        description: As O(slot).
        type: str
      class:
        description: As O(class).
        type: str
      driver:
        description: As O(driver).
        type: str
      whole_group:
        description: As O(whole_group).
        type: bool
      owner:
        description: As O(owner).
        type: str
      mode:
        description: As O(mode).
        type: raw
      persistent:
        description: As O(persistent).
        type: bool
      optional:
        description: As O(optional).
        type: bool
  state:
    description:
      - V(present) puts the devices on O(driver).
      - V(absent) gives them back to the driver that they had before they were assigned, and takes away what made that
        survive a reboot. O(driver), O(owner), O(mode) and O(persistent) have no place beside it.
    type: str
    choices: [present, absent]
    default: present
  driver:
    description:
      - The driver that is to have the devices - V(vfio-pci) where this is left out, or another one.
      - V(none) is no driver; V(host) is the one that they had before.
    type: str
  whole_group:
    description: Whether the other devices of their IOMMU groups are meant too. By default they are not.
    type: bool
  owner:
    description:
      - Who gets C(/dev/vfio/N) of their groups, as V(USER) or V(USER:GROUP), names or numbers.
      - Left as it is by default.
    type: str
  mode:
    description:
      - Permission bits of C(/dev/vfio/N), up to V(0777). Left as they are by default.
      - Octal digits in quotes, such as V('0660'); a number without quotes is taken as YAML reads it.
    type: raw
  persistent:
    description:
      - Whether it survives a reboot, with files below O(config_dir). V(false) takes them away.
      - Left as it is by default.
    type: bool
  optional:
    description: Whether it is no error that there is no such device. By default it is one.
    type: bool
  force:
    description: Take devices even if the host has them in use (a file system mounted, swap, a network interface up).
    type: bool
    default: false
  wait:
    description: How many seconds to wait for a process that has open what has to leave VFIO.
    type: float
    default: 0
  config_dir:
    description:
      - The directory that C(udev/rules.d) and C(modprobe.d) are in.
      - By default the environment variable E(VFIO_CONFIG_DIR) of the managed host, else C(/etc).
    type: path
  backend:
    description:
      - The kernel to work on. C(unix:PATH) is one that C(vfio fake serve) models, to try a playbook without hardware.
      - By default the environment variable E(VFIO_BACKEND) of the managed host, else its own kernel, C(kernel:).
    type: str
attributes:
  check_mode:
    support: full
    description: Compares, and changes nothing. Needs no privilege.
  diff_mode:
    support: full
    description: Shows each device, node and file that differs, before and after.
notes:
  - Changing anything on a real host needs root (C(become=true)).
seealso:
  - module: vfio.host.vfio_facts
"""

EXAMPLES = r"""
- name: One adapter, for the virtual machines of a user
  vfio.host.vfio_device:
    address: "0001:01:00.0"
    whole_group: true
    owner: alice:kvm
    mode: "0660"
    persistent: true
  become: true

- name: Every NVMe disk of a kind, and what is in a slot, all or none
  vfio.host.vfio_device:
    devices:
      - id: "1b36:0010"
        optional: true
      - slot: C5
        whole_group: true
    owner: alice
  become: true

- name: Given back to the host
  vfio.host.vfio_device:
    address: "0001:01:00.0"
    whole_group: true
    state: absent
    wait: 30
  become: true
"""

RETURN = r"""
commands:
  description: The shell commands that do the same; none where nothing differs.
  returned: success
  type: list
  elements: str
  sample:
    - echo vfio-pci > /sys/bus/pci/devices/0001:01:00.0/driver_override
    - echo 0001:01:00.0 > /sys/bus/pci/drivers_probe
notes:
  description: What else one should know, as sentences, such as an optional device that is not there.
  returned: success
  type: list
  elements: str
  sample: []
error:
  description: What failed, in parts.
  returned: when an operation fails
  type: dict
  contains:
    class:
      description: The class of the library's error.
      type: str
    errno:
      description: Its errno, by name.
      type: str
    what:
      description: What was tried.
      type: str
    why:
      description: Which rule was broken.
      type: str
    remedy:
      description: What mends it.
      type: str
  sample:
    class: Busy
    errno: EBUSY
    what: group 1 is in use
    why: qemu-system-ppc64 (pid 4711) has it open
    remedy: null
put_back:
  description: What had been changed before the failure, and was put back. Addresses of devices, and paths.
  returned: when an operation fails
  type: list
  elements: str
  sample: ["0001:01:00.0"]
"""

import math
import re
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vfio.host.plugins.module_utils import library

SELECTORS = ("address", "id", "slot", "class")

WHICH = {key: {"type": "str"} for key in SELECTORS}
WHAT = {
    "driver": {"type": "str"},
    "whole_group": {"type": "bool"},
    "owner": {"type": "str"},
    "mode": {"type": "raw"},
    "persistent": {"type": "bool"},
    "optional": {"type": "bool"},
}
ARGUMENTS = {
    **WHICH,
    **WHAT,
    "devices": {
        "type": "list",
        "elements": "dict",
        "options": {**WHICH, **WHAT},
        "mutually_exclusive": [SELECTORS],
        "required_one_of": [SELECTORS],
    },
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "force": {"type": "bool", "default": False},
    "wait": {"type": "float", "default": 0.0},
    "config_dir": {"type": "path"},
    "backend": library.BACKEND,
}

_OCTAL = re.compile(r"(?:0o)?([0-7]{1,4})")


def main() -> None:
    module = AnsibleModule(
        argument_spec=ARGUMENTS,
        mutually_exclusive=[(*SELECTORS, "devices")],
        required_one_of=[(*SELECTORS, "devices")],
        supports_check_mode=True,
    )
    library.require(module)
    try:
        comparison = library.apply.apply(
            wanted(module.params),
            library.chosen_backend(module),
            check=module.check_mode,
            force=module.params["force"],
            wait=_seconds(module.params["wait"]),
            persist_dir=module.params["config_dir"],
        )
    except OSError as error:
        library.fail(module, error)
    result = {"changed": comparison.changed, "commands": comparison.shell(), "notes": comparison.notes}
    if module._diff:
        result["diff"] = [
            {
                "before_header": record.name,
                "after_header": record.name,
                "before": record.before_text,
                "after": record.after_text,
            }
            for record in comparison.records()
        ]
    module.exit_json(**result)


def wanted(params: dict[str, Any]) -> Any:
    """The plan that the arguments are.  Raises `errors.BadPlan`."""
    common = {key: params[key] for key in WHAT}
    entries = params["devices"]
    if entries is None:
        entries = [params]
    origin = library.topology_table.Origin("vfio_device", "", library.errors.BadPlan)
    return library.desired.Desired(
        tuple(_entry(each, common, index, params["state"] == "absent") for index, each in enumerate(entries)), origin
    )


def _entry(entry: dict[str, Any], common: dict[str, Any], index: int, absent: bool) -> Any:
    what = {key: common[key] if entry[key] is None else entry[key] for key in WHAT}
    if absent:
        for key in ("driver", "owner", "mode", "persistent"):
            if what[key] is not None:
                raise library.errors.BadPlan(f"vfio_device: device[{index}].{key}", "has no place beside state=absent")
        what["driver"], what["persistent"] = "host", False
    if what["mode"] is not None:
        what["mode"] = _mode(what["mode"], index)
    given = {key: value for key, value in what.items() if value is not None}
    # None is its own word in the library: as it is.
    given["persistent"] = what["persistent"]
    which = {"device_class" if key == "class" else key: entry[key] for key in SELECTORS}
    return library.desired.DesiredDevice(**which, **given)


def _mode(value: Any, index: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    digits = _OCTAL.fullmatch(str(value))
    if digits is None:
        raise library.errors.BadPlan(
            f"vfio_device: device[{index}].mode", f"{value!r} is not a mode in octal digits, such as '0660'"
        )
    return int(digits[1], 8)


def _seconds(value: float) -> float:
    if not 0 <= value < math.inf:
        raise library.errors.BadPlan("vfio_device: wait", f"{value} is not a number of seconds, 0 or more")
    return value


if __name__ == "__main__":
    main()
