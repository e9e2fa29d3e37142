"""The piece of the initramfs that one run adds: this checkout, installed, and what to do with it."""

import json
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from hwtests.lab import cpio
from hwtests.lab.errors import LabError

CHECKOUT = Path(__file__).resolve().parents[2]
GUEST_CHECKOUT = "checkout"

_SITE = "usr/lib/python3/dist-packages"
_PARTS = ("vfio", "cli", "hwtests", "simtests", "pyproject.toml", "README.md")
_SKIPPED = ("__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", ".git")

# Console messages of the kernel are off (loglevel=1): they would hit the frames. They come through /dev/kmsg.
_INIT = """\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
$b mkdir -p /dev/pts /dev/shm
$b mount -t devpts devpts /dev/pts
$b mount -t tmpfs tmpfs /run
$b mount -t tmpfs -o mode=1777 tmpfs /dev/shm
$b mount -t debugfs debugfs /sys/kernel/debug
$b ln -s /proc/self/fd /dev/fd
$b --install -s /usr/bin 2>/dev/null
export PATH=/usr/sbin:/usr/bin HOME=/root LANG=C.UTF-8
hostname lab
ip link set lo up
chown alice:alice /home/alice
depmod
case $(uname -m) in ppc64*) iommu=vfio_iommu_spapr_tce ;; *) iommu=vfio_iommu_type1 ;; esac
for module in vfio-pci $iommu; do modprobe $module; done
cd /{checkout}
{action}
poweroff -f
"""
_RUN = "stty -F /dev/console raw -echo\nPYTHONHASHSEED=0 python3 -s -m hwtests.lab.guest /lab/plan.json </dev/null"
_SHELL = """\
stty -F /dev/console rows {rows} cols {columns}
export TERM={terminal}
echo; echo "{welcome}"
setsid cttyhack sh -l"""

_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000:Alice:/home/alice:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\nalice:x:1000:\nnogroup:x:65534:\n",
    "etc/shadow": "root:*:20000::::::\nalice:*:20000::::::\n",
    "etc/hosts": "127.0.0.1 localhost lab\n",
    f"{_SITE}/checkout.pth": f"/{GUEST_CHECKOUT}\n",
}


def for_command(
    command: Sequence[str],
    extra_files: Mapping[Path, str] | None = None,
    lab_files: Mapping[str, str] | None = None,
    boot_log: bool = False,
) -> Iterator[cpio.Entry]:
    """The archive of a machine that runs `command` and powers off. `extra_files` are files of the host and the
    absolute paths that they get in the guest, with their permissions; `lab_files` are names below /lab and contents."""
    yield from _installed(_RUN)
    plan = {"command": list(command), "boot_log": boot_log, "seed": os.urandom(64).hex()}
    yield cpio.directory("lab")
    yield cpio.file("lab/plan.json", json.dumps(plan))
    for name, text in (lab_files or {}).items():
        yield cpio.file(f"lab/{name}", text)
    yield from _extra(extra_files or {})


def for_shell(
    rows: int, columns: int, terminal: str, welcome: str, extra_files: Mapping[Path, str] | None = None
) -> Iterator[cpio.Entry]:
    """The archive of a machine that gives a shell on its console and powers off after it."""
    known = terminal if terminal.replace("-", "").isalnum() else "vt100"
    yield from _installed(_SHELL.format(rows=rows, columns=columns, terminal=known, welcome=welcome))
    yield from _extra(extra_files or {})


def _installed(action: str) -> Iterator[cpio.Entry]:
    yield cpio.file("init", _INIT.format(checkout=GUEST_CHECKOUT, action=action), 0o755)
    for name, text in _FILES.items():
        yield cpio.file(name, text, 0o600 if name == "etc/shadow" else 0o644)
    yield cpio.directory(GUEST_CHECKOUT)
    for name in _PARTS:
        path = CHECKOUT / name
        if path.is_dir():
            yield cpio.directory(f"{GUEST_CHECKOUT}/{name}")
            yield from cpio.tree(path, f"{GUEST_CHECKOUT}/{name}", _SKIPPED)
        elif path.exists():
            yield cpio.file(f"{GUEST_CHECKOUT}/{name}", path.read_bytes())
    yield cpio.symlink(f"{GUEST_CHECKOUT}/vfio_cli", "cli")
    yield from _metadata(CHECKOUT / "pyproject.toml")
    yield from _distribution("ioctl-opt")


def _metadata(pyproject: Path) -> Iterator[cpio.Entry]:
    """What an installer would leave: the name, the entry points and the console scripts."""
    try:
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    except FileNotFoundError:
        return
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise LabError(f"{pyproject} cannot be used: {error}") from error
    name, version = project["name"], project.get("version", "0")
    directory = f"{_SITE}/{name.replace('-', '_')}-{version}.dist-info"
    groups = {"console_scripts": project.get("scripts", {}), **project.get("entry-points", {})}
    lines = []
    for group, points in groups.items():
        lines += [f"[{group}]", *(f"{point} = {target}" for point, target in points.items())]
    yield cpio.directory(directory)
    yield cpio.file(f"{directory}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    yield cpio.file(f"{directory}/entry_points.txt", "\n".join(lines) + "\n")
    for script, target in groups["console_scripts"].items():
        module, _, function = target.partition(":")
        text = f"#!/usr/bin/python3\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
        yield cpio.file(f"usr/bin/{script}", text, 0o755)


def _distribution(name: str) -> Iterator[cpio.Entry]:
    """A pure-Python distribution of the host's, which Debian does not package."""
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError as error:
        raise LabError(f"{name} is not installed for this Python; the guest gets it from here") from error
    directories: set[str] = set()
    for path in sorted(files):
        target = f"{_SITE}/{path}"
        if ".." in path.parts or "__pycache__" in path.parts:
            continue
        for parent in cpio.parents(target):
            if parent.name not in directories and len(parent.name) > len(_SITE):
                directories.add(parent.name)
                yield parent
        yield cpio.file(target, path.read_binary())


def _extra(files: Mapping[Path, str]) -> Iterable[cpio.Entry]:
    for source, target in files.items():
        if not target.startswith("/"):
            raise LabError(f"{target}: a path in the guest must be absolute")
        try:
            data, mode = source.read_bytes(), source.stat().st_mode & 0o777
        except OSError as error:
            raise LabError(f"{source}: cannot be read: {error.strerror}") from error
        yield from cpio.parents(target[1:])
        yield cpio.file(target[1:], data, mode)
