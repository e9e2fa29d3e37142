"""What is installed is what is in the checkout."""

from __future__ import annotations

import tomllib
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent


def test_every_package_of_the_library_is_installed() -> None:
    listed = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    found = [each.parent.relative_to(CHECKOUT) for each in (CHECKOUT / "vfio").rglob("__init__.py")]
    assert sorted(listed) == sorted([*(".".join(each.parts) for each in found), "vfio_cli"])
