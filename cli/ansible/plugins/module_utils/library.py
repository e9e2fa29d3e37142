"""The vfio library on a managed host, for the modules of this collection."""

from __future__ import annotations

import sys
import traceback
from typing import Any, NoReturn

from ansible.module_utils.basic import AnsibleModule, missing_required_lib

try:
    from vfio_cli import output

    from vfio import apply, backend, desired, errors, owner, persist, plan, sysfs, topology_table, usage

    NOT_IMPORTED = None
except ImportError:
    NOT_IMPORTED = traceback.format_exc()

__all__ = [
    "apply",
    "backend",
    "chosen_backend",
    "desired",
    "errors",
    "fail",
    "owner",
    "persist",
    "plan",
    "require",
    "sysfs",
    "topology_table",
    "usage",
]

BACKEND = {"type": "str"}
"""The option of all modules."""


def require(module: AnsibleModule) -> None:
    """End the module where the library is not installed."""
    if NOT_IMPORTED is not None:
        reason = (
            f"to assign devices there. Install it (Python 3.11 or later): {sys.executable} -m pip install DIR, "
            "with DIR a checkout of vfio, or its wheel"
        )
        module.fail_json(msg=missing_required_lib("vfio", reason=reason), exception=NOT_IMPORTED)


def chosen_backend(module: AnsibleModule) -> Any:
    """The host's kernel, or what the option names.  Raises `errors.NoSuchBackend`."""
    url = module.params["backend"]
    return backend.default() if url is None else backend.open_backend(url)


def fail(module: AnsibleModule, error: OSError) -> NoReturn:
    """End the module with an error: a message for people, and its parts as ``error``."""
    text = str(error) if isinstance(error, errors.VfioError) else f"{error.filename or 'vfio'}: {error.strerror}"
    put_back = list(error.names) if isinstance(error, errors.RolledBack) else []
    module.fail_json(msg=text, error=output.describe(error), put_back=put_back)
    raise AssertionError("fail_json does not return")
