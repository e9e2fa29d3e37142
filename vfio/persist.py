"""What makes an assignment survive a reboot: rules of udev, and options of modprobe, in files of our own.

    udev/rules.d/60-vfio-assign.rules    per device: its driver_override, its driver, and who may open its group
    modprobe.d/vfio-assign.conf          per device id: vfio-pci takes it, and is loaded before the driver of the host

below a directory that is ``/etc`` on a host.  All that we write is between two marks; lines outside them belong to
somebody else and stay, and a file with nothing else in it is removed.  A device's rules are about its address.  Groups
are numbered anew at every boot, so the rule of a node finds it by a device that is in the group.

The rules run before those that load drivers (80-drivers.rules).  udev notices by itself that its rules were changed.
Sources: udev(7), modprobe.d(5), the kernel's Documentation/ABI/testing/sysfs-bus-pci.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from vfio import errors, owner
from vfio.backend import DEFAULT_URL, Backend, open_backend

DIRECTORY = "VFIO_CONFIG_DIR"
"""Environment variable that names the directory of the files instead of /etc."""
RULES = "udev/rules.d/60-vfio-assign.rules"
OPTIONS = "modprobe.d/vfio-assign.conf"

_BEGIN = "# Begin: written by vfio apply. Change the plan and apply it; vfio apply --forget removes all of this."
_END = "# End: written by vfio apply."
_VFIO_PCI = "vfio-pci"
_NONE = "none"

_FOR_DEVICE = re.compile(r'ACTION=="add", SUBSYSTEM=="pci", KERNEL=="([0-9a-f:.]+)", .*')
_OVERRIDE = re.compile(r'ACTION=="add", SUBSYSTEM=="pci", KERNEL=="([0-9a-f:.]+)", ATTR\{driver_override\}="([^"]+)"')
_LOAD = re.compile(r'ACTION=="add", SUBSYSTEM=="pci", KERNEL=="([0-9a-f:.]+)".*"kmod load ([^"]+)"')
_NODE = re.compile(
    r'SUBSYSTEM=="vfio", KERNEL=="\[0-9\]\*", TEST=="/sys/kernel/iommu_groups/%k/devices/([0-9a-f:.]+)"'
    r'(?:, OWNER="([^"]+)")?(?:, GROUP="([^"]+)")?(?:, MODE="([0-7]+)")?'
)
_ID = re.compile(r"# ([0-9a-f]{4}:[0-9a-f]{4}), instead of: (.*)")
_THEIR_IDS = re.compile(r"\s*options\s+vfio[-_]pci\s(?:.*\s)?ids=")
_SAFE = re.compile(r"[\w .,:@()+-]+", re.ASCII)


@dataclass(frozen=True)
class Rule:
    """What happens to a device at every boot."""

    address: str
    driver: str
    """``none``: no driver is to have it."""
    module: str | None = None
    """The kernel module of the driver."""
    user: str | None = None
    """Who gets its group's node: a name or a number, of a user and of a group of users."""
    group: str | None = None
    mode: int | None = None
    """Permission bits of the node."""


@dataclass
class Persistent:
    """The content of both files."""

    rules: dict[str, Rule] = field(default_factory=dict)
    """By address."""
    ids: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By id (``vendor:device``) that vfio-pci takes: the modules of the drivers that would take it otherwise."""


@dataclass(frozen=True)
class FileChange:
    """A file before and after; None: it does not exist."""

    path: str
    before: str | None
    after: str | None

    def make(self) -> None:
        """Replace the file as a whole.  Raises `errors.NotPrivileged`, `errors.CallFailed`."""
        self._write(self.after)

    def undo(self) -> None:
        """Give the file its former content."""
        self._write(self.before)

    @property
    def made(self) -> bool:
        """Whether the file is not as it was before."""
        return _read(Path(self.path)) != self.before

    def shell(self) -> str:
        """The equivalent shell command."""
        return f"rm {self.path}" if self.after is None else f"cat > {self.path} <<'EOF'\n{self.after}EOF"

    def _write(self, text: str | None) -> None:
        path = Path(self.path)
        try:
            if text is None:
                path.unlink(missing_ok=True)
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            new = path.with_name(f".{path.name}.new")  # a name that neither udev nor modprobe reads
            try:
                with new.open("w", encoding="utf-8") as file:
                    os.fchmod(file.fileno(), 0o644)
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                new.replace(path)
            finally:
                new.unlink(missing_ok=True)
        except OSError as error:
            number = error.errno or errno.EIO
            if number in (errno.EACCES, errno.EPERM):
                raise errors.NotPrivileged(
                    f"write {self.path}", str(owner.me(open_backend(DEFAULT_URL))), number
                ) from error
            raise errors.CallFailed(number, f"cannot write {self.path}", os.strerror(number)) from error


def directory(backend: Backend, named: str | os.PathLike[str] | None = None) -> Path | None:
    """Where the files are: what is named here or in VFIO_CONFIG_DIR, else ``/etc`` of the host that the backend is.

    None for a backend that is not the kernel of this host: /etc is none of its business.
    """
    if named := named or os.environ.get(DIRECTORY):
        return Path(named)
    return Path("/etc") if backend.unwrapped().url == DEFAULT_URL else None


def load(where: Path | None) -> Persistent:
    """What the files say.  Raises `errors.Refused` for a line between our marks that we did not write."""
    found = Persistent()
    if where is None:
        return found
    for number, line in _ours(where / RULES):
        if match := _OVERRIDE.fullmatch(line):
            found.rules[match[1]] = Rule(match[1], match[2])
        elif (match := _LOAD.fullmatch(line)) and match[1] in found.rules:
            found.rules[match[1]] = replace(found.rules[match[1]], module=match[2])
        elif (match := _NODE.fullmatch(line)) and match[1] in found.rules:
            mode = None if match[4] is None else int(match[4], 8)
            found.rules[match[1]] = replace(found.rules[match[1]], user=match[2], group=match[3], mode=mode)
        elif not _FOR_DEVICE.fullmatch(line) and not line.startswith("#"):
            raise _not_ours(where / RULES, number, line)
    for number, line in _ours(where / OPTIONS):
        if match := _ID.fullmatch(line):
            found.ids[match[1]] = tuple(match[2].split(", ")) if match[2] != _NONE else ()
        elif not line.startswith(("options vfio-pci ids=", "softdep ")):
            raise _not_ours(where / OPTIONS, number, line)
    return found


def changes(where: Path, after: Persistent) -> list[FileChange]:
    """What has to be written for the files to say that.

    Raises `errors.Refused` where somebody else's options of vfio-pci have ids: modprobe would take one of both.
    """
    if after.ids:
        _refuse_their_ids(where)
    wanted = {
        RULES: [line for address in sorted(after.rules) for line in _rules_of(after.rules[address])],
        OPTIONS: list(_options_of(after.ids)),
    }
    found = []
    for name, lines in wanted.items():
        path = where / name
        before = _read(path)
        new = _replaced(path, before, lines)
        if new != before:
            found.append(FileChange(str(path), before, new))
    return found


def usable(text: str) -> bool:
    """Whether a name can stand in a rule as it is."""
    return _SAFE.fullmatch(text) is not None


def _rules_of(rule: Rule) -> Iterator[str]:
    """The lines for a device.  One write a line: udev makes the writes of one line in an order of its own."""
    device = f'ACTION=="add", SUBSYSTEM=="pci", KERNEL=="{rule.address}"'
    elsewhere = f'TEST=="driver", DRIVER!="{rule.driver}"'
    if rule.driver == _VFIO_PCI:  # other VFIO drivers are variants of it: the device is where it should be
        elsewhere = 'TEST=="driver", TEST!="vfio-dev"'
    elif rule.driver == _NONE:
        elsewhere = 'TEST=="driver"'
    yield f'{device}, ATTR{{driver_override}}="{rule.driver}"'
    yield f'{device}, {elsewhere}, ATTR{{driver/unbind}}="%k"'
    if rule.driver != _NONE:
        # A driver that is loaded takes it now; one that is not, when it is.
        yield f'{device}, TEST!="driver", ATTR{{[subsystem/pci]drivers_probe}}="%k"'
        yield f'{device}, TEST!="driver", RUN{{builtin}}+="kmod load {rule.module or rule.driver}"'
    settings = {"OWNER": rule.user, "GROUP": rule.group, "MODE": None if rule.mode is None else f"{rule.mode:04o}"}
    if any(settings.values()):
        node = f'SUBSYSTEM=="vfio", KERNEL=="[0-9]*", TEST=="/sys/kernel/iommu_groups/%k/devices/{rule.address}"'
        yield ", ".join([node, *(f'{key}="{value}"' for key, value in settings.items() if value is not None)])


def _options_of(ids: Mapping[str, Iterable[str]]) -> Iterator[str]:
    for id in sorted(ids):
        yield f"# {id}, instead of: {', '.join(ids[id]) or _NONE}"
    if ids:
        yield f"options vfio-pci ids={','.join(sorted(ids))}"
    for module in sorted({module for modules in ids.values() for module in modules}):
        yield f"softdep {module} pre: vfio-pci"


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        number = getattr(error, "errno", None) or errno.EINVAL
        raise errors.CallFailed(number, f"cannot read {path}", getattr(error, "strerror", "") or str(error)) from error


def _marks(path: Path, lines: list[str]) -> tuple[int, int] | None:
    """The indexes of our two marks; None where there is none."""
    begin, end = ([i for i, line in enumerate(lines) if line == mark] for mark in (_BEGIN, _END))
    if not begin and not end:
        return None
    if len(begin) != 1 or len(end) != 1 or begin > end:
        raise errors.Refused(
            f"cannot change {path}",
            "its marks of what vfio wrote are not one beginning and one end",
            f"put it right by hand, or remove it: rm {path}",
            errno.EINVAL,
        )
    return begin[0], end[0]


def _ours(path: Path) -> list[tuple[int, str]]:
    """The lines between our marks, each with its number."""
    lines = (_read(path) or "").splitlines()
    marks = _marks(path, lines)
    return [] if marks is None else [(i + 1, lines[i]) for i in range(marks[0] + 1, marks[1])]


def _replaced(path: Path, before: str | None, ours: list[str]) -> str | None:
    """The file with these lines between the marks; None where nothing is left."""
    lines = (before or "").splitlines()
    start, end = _marks(path, lines) or (len(lines), len(lines) - 1)
    block = [_BEGIN, *ours, _END] if ours else []
    after = [*lines[:start], *block, *lines[end + 1 :]]
    if after == lines:
        return before
    return "".join(f"{line}\n" for line in after) if after else None


def _not_ours(path: Path, number: int, line: str) -> errors.Refused:
    return errors.Refused(
        f"{path}:{number}: {line}",
        "it stands between the marks of what vfio wrote, and vfio did not write it",
        "move it behind the end mark, or to a file of its own",
        errno.EINVAL,
    )


def _refuse_their_ids(where: Path) -> None:
    for path in sorted((where / OPTIONS).parent.glob("*.conf")):
        if path.name == Path(OPTIONS).name:
            continue
        for number, line in enumerate((_read(path) or "").splitlines(), start=1):
            if _THEIR_IDS.match(line):
                raise errors.Refused(
                    f"cannot give ids to vfio-pci in {where / OPTIONS}",
                    f"{path}:{number} gives it others, and modprobe would take only one of both",
                    "remove that line and put those devices into the plan, or name devices by address instead of id",
                    errno.EEXIST,
                )
