#!/usr/bin/python
# MIT licence (see LICENSE)
"""Ansible module: what a host's devices are."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vfio_facts
short_description: PCI devices, IOMMU groups and drivers of a host, and what of it can be assigned
version_added: 0.1.0
description:
  - Looks, and changes nothing. Needs no privilege.
author:
  - the authors of vfio
requirements:
  - vfio, this project's Python package, on the managed host
options:
  backend:
    description:
      - The kernel to look at. C(unix:PATH) is one that C(vfio fake serve) models, to try a playbook without hardware.
      - By default the environment variable E(VFIO_BACKEND) of the managed host, else its own kernel, C(kernel:).
    type: str
attributes:
  check_mode:
    support: full
    description: It never changes anything.
  facts:
    support: full
    description: Returns C(ansible_facts).
seealso:
  - module: vfio.host.vfio_device
"""

EXAMPLES = r"""
- name: Look
  vfio.host.vfio_facts:

- name: Nothing that the host itself needs
  ansible.builtin.assert:
    that: item.assignable
    fail_msg: "{{ item.address }}: {{ item.why }}"
  loop: "{{ vfio.devices | selectattr('id', 'eq', '1b36:0010') }}"
  loop_control:
    label: "{{ item.address }}"
"""

RETURN = r"""
ansible_facts:
  description: Facts that are added to those of the host.
  returned: success
  type: dict
  contains:
    vfio:
      description: What the library sees.
      type: dict
      contains:
        kernel:
          description: The release of the kernel.
          type: str
          sample: 6.12.0
        power:
          description: Whether the host is a POWER machine.
          type: bool
        devices:
          description: The PCI devices, in the order of their addresses.
          type: list
          elements: dict
          contains:
            address:
              description: PCI address.
              type: str
              sample: "0001:01:00.0"
            id:
              description: Vendor and device id, in hexadecimal.
              type: str
              sample: "1b36:0010"
            subsystem:
              description: Vendor and device id of the subsystem, in hexadecimal.
              type: str
            class:
              description: Class, six hexadecimal digits.
              type: str
              sample: "010802"
            driver:
              description: The driver that has it; null for none.
              type: str
            driver_override:
              description: The only driver that may have it; null where that is not set.
              type: str
            on_vfio:
              description: Whether a VFIO driver has it.
              type: bool
            group:
              description: Number of its IOMMU group; null where it has none.
              type: int
            phb:
              description: On POWER its PCI host bridge, else null.
              type: int
            pe:
              description: On POWER its partitionable endpoint, else null.
              type: int
            bridge:
              description: Whether it is a PCI-to-PCI bridge, which VFIO does not take.
              type: bool
            parent:
              description: Address of the bridge above it; null on a root bus.
              type: str
            in_use_for:
              description: What the host uses it for, such as a mounted file system, as sentences.
              type: list
              elements: str
            assignable:
              description: Whether it can be assigned.
              type: bool
            why:
              description: Why not, or what has to be assigned with it; null where there is nothing to say.
              type: str
            eeh:
              description: On POWER its EEH files by name (eeh_mode, eeh_pe_config_addr, eeh_pe_state), as they are.
              type: dict
        groups:
          description: The IOMMU groups, in the order of their numbers.
          type: list
          elements: dict
          contains:
            group:
              description: Its number.
              type: int
            devices:
              description: Addresses of its devices.
              type: list
              elements: str
            viable:
              description: Whether no driver of the host keeps it from being used through VFIO.
              type: bool
            blockers:
              description: Addresses of the devices that do.
              type: list
              elements: str
            node:
              description: Path, owner and mode of C(/dev/vfio/N); null where it does not exist.
              type: dict
        drivers:
          description: The loaded PCI drivers by name.
          type: dict
          contains:
            module:
              description: The kernel module that it is in; null for one that is built in.
              type: str
            devices:
              description: Addresses of the devices that it has.
              type: list
              elements: str
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vfio.host.plugins.module_utils import library

ARGUMENTS = {"backend": library.BACKEND}


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    library.require(module)
    try:
        found = facts(library.chosen_backend(module))
    except OSError as error:
        library.fail(module, error)
    module.exit_json(changed=False, ansible_facts={"vfio": found})


def facts(backend: Any) -> dict[str, Any]:
    """What RETURN says of ``vfio``."""
    sysfs = library.sysfs
    devices = sysfs.devices(backend)
    uses = library.usage.of_devices(backend)
    blockers = {number: sysfs.blockers(backend, number, uses) for number in sysfs.groups(backend)}
    drivers = backend.listdir(sysfs.DRIVERS) if backend.exists(sysfs.DRIVERS) else []
    return {
        "kernel": sysfs.kernel_release(backend),
        "power": sysfs.on_power(backend),
        "devices": [
            _device(backend, each, blockers.get(each.group, []), uses.get(each.address, [])) for each in devices
        ],
        "groups": [
            {
                "group": number,
                "devices": [each.address for each in devices if each.group == number],
                "viable": not blocking,
                "blockers": [each.address for each in blocking],
                "node": _node(backend, number),
            }
            for number, blocking in blockers.items()
        ],
        "drivers": {
            name: {
                "module": sysfs.module_of(backend, name),
                "devices": [each.address for each in devices if each.driver == name],
            }
            for name in sorted(drivers)
        },
    }


def _device(backend: Any, device: Any, blockers: list[Any], uses: list[str]) -> dict[str, Any]:
    assignable, why = library.sysfs.assignable(device, blockers)
    return {
        "address": device.address,
        "id": device.id,
        "subsystem": f"{device.subsystem_vendor:04x}:{device.subsystem_device:04x}",
        "class": f"{device.class_code:06x}",
        "driver": device.driver,
        "driver_override": device.driver_override,
        "on_vfio": device.on_vfio,
        "group": device.group,
        "phb": device.phb,
        "pe": device.pe,
        "bridge": device.is_bridge,
        "parent": device.parent,
        "in_use_for": uses,
        "assignable": assignable,
        "why": why or None,
        "eeh": library.sysfs.eeh(backend, device.address),
    }


def _node(backend: Any, group: int) -> dict[str, str] | None:
    state = library.plan.node_state(backend, group)
    if state is None:
        return None
    return {
        "path": state.path,
        "owner": library.owner.named(state.uid, state.gid),
        "mode": f"{state.mode:04o}",
    }


if __name__ == "__main__":
    main()
