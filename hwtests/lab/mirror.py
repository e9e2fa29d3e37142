"""Where packages come from: the Debian archive that this host's apt already uses, or `VFIO_LAB_MIRROR`."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from hwtests.lab.errors import LabError

ENVIRONMENT = "VFIO_LAB_MIRROR"

_RELEASES = {"buster", "bullseye", "bookworm", "trixie", "forky", "duke", "sid"}
_SUITES = _RELEASES | {"unstable", "testing", "stable", "oldstable", "oldoldstable"}
_ONE_LINE = re.compile(r"^\s*deb\s+(?:\[(?P<options>[^\]]*)\]\s*)?(?P<uri>\S+)\s+(?P<suite>\S+)(?P<components>.*)$")


def mirrors(apt: Path = Path("/etc/apt"), environment: Mapping[str, str] = os.environ) -> list[str]:
    """Mirrors of the Debian main archive, the most likely first.

    Raises LabError where there is none: another distribution's apt, or no apt at all.
    """
    if chosen := environment.get(ENVIRONMENT, "").strip():
        return [chosen.rstrip("/")]
    found: dict[str, bool] = {}  # URI -> is surely Debian's own
    for uri, suite, components, options in _entries(apt):
        if suite in _SUITES and "main" in components:
            uri = uri.rstrip("/")
            found[uri] = found.get(uri, False) or uri.endswith("/debian") or "debian-archive" in options
    if not found:
        raise LabError(
            f"no mirror of the Debian archive in {apt}/sources.list or {apt}/sources.list.d: "
            f"set {ENVIRONMENT} to the URL of one"
        )
    return sorted(found, key=lambda uri: not found[uri])


def _entries(apt: Path) -> Iterator[tuple[str, str, list[str], str]]:
    """(URI, suite, components, options) of every binary-package source of apt."""
    sources = apt / "sources.list.d"
    for path in [apt / "sources.list", *sorted(sources.glob("*.list")), *sorted(sources.glob("*.sources"))]:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        yield from _deb822(text) if path.suffix == ".sources" else _one_line(text)


def _one_line(text: str) -> Iterator[tuple[str, str, list[str], str]]:
    for line in text.splitlines():
        if match := _ONE_LINE.match(line.partition("#")[0]):
            yield match["uri"], match["suite"], match["components"].split(), match["options"] or ""


def _deb822(text: str) -> Iterator[tuple[str, str, list[str], str]]:
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace():
                fields[name] = fields.get(name, "") + " " + line.strip()
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in ("no", "false", "0"):
            continue
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                yield uri, suite, fields.get("components", "").split(), fields.get("signed-by", "")
