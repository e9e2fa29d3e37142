"""Debian packages for another architecture, through a private apt root: the host's own apt state is never touched.

`apt-get` gets its own source list, package lists, archive directory and an empty status file, and nothing of the
host's configuration but how to reach the network (`Acquire::*`: proxies, credentials, certificates).

A mirror may list what it does not hold: a point release on its way. Such a version is ruled out, and apt takes an older
one, from the same list or from what the mirror has under the suite's other name, which may be of the release before.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote

from hwtests.lab.errors import LabError
from hwtests.lab.mirror import ENVIRONMENT, mirrors

SUITE = "trixie"
_ALIAS = "stable"  # as long as it is that

_MISSING = re.compile(r"Failed to fetch \S+/([^/_]+)_([^/_]+)_[^/_]+\.deb\s+404")
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_ATTEMPTS = 3
_STEP_TIMEOUT = 600  # seconds for one apt-get, of which a silent mirror gets 30 a connection

Report = Callable[[str], None]


class Archive:
    """The packages of `SUITE` for `architecture`, in Debian's words, below a directory of our own."""

    def __init__(self, root: Path, report: Report, architecture: str) -> None:
        self._root = root
        self._architecture = architecture
        self._report = report
        self._configuration = root / "apt.conf"
        self._opened = False

    def closure(self, names: Sequence[str]) -> list[Path]:
        """Download `names` and all that they depend on; their .deb files."""
        self._open()
        debs = self._root / "cache" / "archives"
        self._clear(debs)
        self._apt_get(f"downloading {len(names)} packages and their dependencies", "install", "--download-only", *names)
        return sorted(debs.glob("*.deb"))

    def fetch(self, name: str) -> Path:
        """Download one package without its dependencies; its .deb file."""
        self._open()
        debs = self._root / "single"
        self._clear(debs)
        self._apt_get(f"downloading {name}", "download", name, directory=debs)
        found = sorted(debs.glob("*.deb"))
        if len(found) != 1:
            raise LabError(f"apt-get download {name} left {len(found)} packages, not one")
        return found[0]

    def fetch_newest(self, metapackage: str, pattern: str) -> Path:
        """Download, of the packages whose names match `pattern`, the one that `metapackage` depends on: metapackages
        outlive versions. Where a mirror lists that one before it has it, download the newest that it has."""
        self._open()
        output = self._run(["apt-cache", "depends", "--no-recommends", metapackage]).stdout
        wanted: list[str] = re.findall(r"^\s*Depends: (\S+)$", output, re.MULTILINE)
        listed = sorted(self._run(["apt-cache", "pkgnames"]).stdout.split(), key=_release, reverse=True)
        matching = [name for name in dict.fromkeys(wanted + listed) if re.fullmatch(pattern, name)]
        if not matching:
            raise LabError(f"{SUITE}/{self._architecture} has no package {pattern}; {metapackage} depends on {wanted}")
        for name in matching:
            try:
                return self.fetch(name)
            except LabError as error:
                if name == matching[-1]:
                    raise
                self._report(f"{error}; trying an older one")
        raise AssertionError("the last one returns or raises")

    def _open(self) -> None:
        """Write the configuration and fetch the package lists, from the first mirror that has them."""
        if self._opened:
            return
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            raise LabError(
                "the lab needs apt-get and dpkg-deb (packages apt and dpkg) to fetch a system for its machines"
            )
        candidates = mirrors()
        failures = []
        for mirror in candidates[:3]:
            self._configure(mirror)
            try:
                self._apt_get(f"reading package lists of {SUITE}/{self._architecture}", "update", "--error-on=any")
            except LabError as error:
                failures.append(f"{mirror}: {error}")
            else:
                self._opened = True
                return
        raise LabError(
            "no package lists from any mirror (set " + ENVIRONMENT + " to the URL of another)\n" + "\n".join(failures)
        )

    def _configure(self, mirror: str) -> None:
        root = self._root
        for name in ("lists/partial", "cache/archives/partial", "empty", "single"):
            (root / name).mkdir(parents=True, exist_ok=True)
        (root / "status").write_text("")
        signed = f" [signed-by={_KEYRING}]" if _KEYRING.exists() else ""
        (root / "sources.list").write_text(f"deb{signed} {mirror} {SUITE} main\n")
        (root / "preferences").write_text("")
        self._configuration.write_text(
            f'Dir::Etc::main "{root}/empty/none";\n'
            f'Dir::Etc::parts "{root}/empty";\n'
            f'Dir::Etc::sourcelist "{root}/sources.list";\n'
            f'Dir::Etc::sourceparts "{root}/empty";\n'
            f'Dir::Etc::preferences "{root}/preferences";\n'
            f'Dir::Etc::preferencesparts "{root}/empty";\n'
            f'Dir::State::lists "{root}/lists";\n'
            f'Dir::State::status "{root}/status";\n'
            f'Dir::Cache "{root}/cache";\n'
            f'APT::Architecture "{self._architecture}";\n'
            f'APT::Architectures {{ "{self._architecture}"; }};\n'
            'APT::Install-Recommends "false";\n'
            'APT::Sandbox::User "root";\n'
            'Acquire::Languages "none";\n'
            'Acquire::Retries "2";\n'
            'Acquire::http::Timeout "30";\n'
            'Acquire::https::Timeout "30";\n' + self._host_network_settings()
        )

    def _host_network_settings(self) -> str:
        dump = subprocess.run(["apt-config", "dump", "Acquire"], capture_output=True, text=True, check=False).stdout
        wanted = re.compile(r"^Acquire::(https?|ftp|proxy)\b.*(proxy|verify|cert|key|cainfo)", re.IGNORECASE)
        return "".join(f"{line}\n" for line in dump.splitlines() if wanted.match(line))

    def _apt_get(self, what: str, *arguments: str, directory: Path | None = None) -> None:
        """Run apt-get, again after a failure: mirrors have bad moments, and a change of the archive under way shows
        as a wrong hash."""
        for attempt in range(1, _ATTEMPTS + 1):
            self._report(what if attempt == 1 else f"{what} (attempt {attempt} of {_ATTEMPTS})")
            try:
                self._run(["apt-get", "-q", "-y", *arguments], directory)
                return
            except LabError as error:
                if attempt == _ATTEMPTS:
                    raise
                self._rule_out(_MISSING.findall(str(error)))

    def _rule_out(self, missing: Sequence[tuple[str, str]]) -> None:
        """Have apt choose other versions than these. A file's name lacks the epoch of its version."""
        preferences, sources = self._root / "preferences", self._root / "sources.list"
        if missing and not preferences.read_text():
            preferences.write_text(_pin("*", f"release n={SUITE}", 500) + _pin("*", "release o=*", -1))
            sources.write_text(sources.read_text() + sources.read_text().replace(f" {SUITE} ", f" {_ALIAS} "))
            self._run(["apt-get", "update"])
        with preferences.open("a") as file:
            file.writelines(_pin(name, f"version *{unquote(version)}", -1) for name, version in missing)

    def _run(self, command: list[str], directory: Path | None = None) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                command,
                cwd=directory or self._root,
                env={"APT_CONFIG": str(self._configuration), "LC_ALL": "C.UTF-8", **_passed_environment()},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=True,
                timeout=_STEP_TIMEOUT,
            )
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{' '.join(command)}: no end after {_STEP_TIMEOUT} s") from error
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if line.startswith(("E:", "W:"))] or ["no message"]
            raise LabError(f"{' '.join(command[:4])} failed: " + "; ".join(lines)) from error

    @staticmethod
    def _clear(directory: Path) -> None:
        for deb in directory.glob("*.deb"):
            deb.unlink()


def unpack(deb: Path, into: Path) -> None:
    """Unpack the files of a package, running none of its scripts."""
    into.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(["dpkg-deb", "-x", deb, into], capture_output=True, text=True, check=False)
    if result.returncode:
        raise LabError(f"{deb.name} cannot be unpacked: {result.stderr.strip()}")


def _pin(package: str, what: str, priority: int) -> str:
    return f"Package: {package}\nPin: {what}\nPin-Priority: {priority}\n\n"


def _release(name: str) -> list[int]:
    """The numbers in a name: 6.12.117 is newer than 6.12.94."""
    return [int(number) for number in re.findall(r"\d+", name)]


def _passed_environment() -> dict[str, str]:
    names = ("PATH", "HOME", "http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")
    return {name: os.environ[name] for name in names if name in os.environ}
