"""What the emulated machines boot: a Debian kernel, its few modules, and a small userland, cached per user.

    CACHE/userland[-amd64]-RECIPE.cpio  busybox, Python and the Python packages that tests need
    CACHE/FLAVOUR-RECIPE/               vmlinux, modules.cpio, release; one of them may be built anew
    CACHE/headers-RECIPE/usr/include    the suite's <linux/*.h>

RECIPE is a digest of everything below that decides what goes in: a changed recipe is another file, an old one is
never half new. Archives concatenate, so a run adds its own piece (`hwtests.lab.overlay`) to two cached ones.
"""

import fcntl
import hashlib
import lzma
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hwtests.lab import bake, cpio, module
from hwtests.lab.architecture import KERNELS, POWER, Architecture, Flavour
from hwtests.lab.errors import LabError
from hwtests.lab.packages import SUITE, Archive, Report, unpack

_USERLAND = [
    "busybox-static",
    "python3",
    "python3-cffi-backend",
    "python3-click",
    "python3-hypothesis",
    "python3-pytest",
    "python3-rich",
]

# Never looked at in the guest, and every byte is unpacked by an emulated processor at each boot.
_PRUNED = [
    "etc/apparmor.d",
    "etc/debconf.conf",
    "usr/bin/dpkg*",
    "usr/bin/debconf*",
    "usr/bin/tar",
    "usr/bin/update-alternatives",
    "usr/libexec",
    "usr/lib/*/gconv",
    "usr/lib/*/libdb-*",
    "usr/lib/*/libcrypto*",
    "usr/lib/*/libssl*",
    "usr/lib/*/ossl-modules",
    "usr/lib/*/engines-3",
    "usr/lib/*/perl-base",
    "usr/lib/systemd",
    "usr/lib/valgrind",
    "usr/lib/dpkg",
    "usr/lib/apt",
    "usr/lib/binfmt.d",
    "usr/lib/tmpfiles.d",
    "usr/lib/python3.*/test",
    "usr/lib/python3.*/idlelib",
    "usr/lib/python3.*/ensurepip",
    "usr/lib/python3.*/pydoc_data",
    "usr/lib/python3.*/turtle*",
    "usr/lib/python3.*/tkinter",
    "usr/lib/python3.*/lib2to3",
    "usr/lib/python3.*/lib-dynload/_ssl*",
    "usr/lib/python3.*/lib-dynload/_hashlib*",
    "usr/lib/python3.*/lib-dynload/_codecs_*",
    "usr/lib/python3.*/lib-dynload/*test*",
    "usr/share",
    "var",
]

MODULES = [
    "vfio",
    "vfio-pci-core",
    "vfio-pci",
    "pci-stub",
    "nvme",
    "e1000e",
    "virtio-rng",
    "virtio_blk",
]


def modules_of(architecture: Architecture) -> list[str]:
    """The modules that a kernel brings, without those that they need."""
    return [*MODULES[:3], *architecture.modules, *MODULES[3:]]


def _recipe(architecture: Architecture, options: tuple[str, ...] = ()) -> str:
    parts = (3, SUITE, architecture.name, _USERLAND, _PRUNED, modules_of(architecture))
    rebuilt = (module.RECIPE, options) if options else ()
    return hashlib.sha256(repr(parts + rebuilt).encode()).hexdigest()[:10]


_NAME = re.compile(rf"(?:userland(?:-amd64)?|headers|{'|'.join(KERNELS)})-[0-9a-f]{{10}}(?:\.cpio)?")
_LOCK_TIMEOUT = 1800  # seconds to wait for another process that builds


@dataclass(frozen=True)
class Kernel:
    """A kernel ready to boot."""

    vmlinux: Path
    modules: Path  # cpio archive of the modules
    userland: Path  # cpio archive of everything else
    release: str  # as uname -r prints it


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/vfio-lab`, by default `~/.cache/vfio-lab`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "vfio-lab"


def kernel(flavour: str, report: Report) -> Kernel:
    """The kernel of `flavour` with its userland, built if the cache has none."""
    build([flavour], report)
    image = _image(flavour)
    release = (image / "release").read_text().strip()
    return Kernel(image / "vmlinux", image / "modules.cpio", _userland(KERNELS[flavour].architecture), release)


def build(flavours: Iterable[str], report: Report, refresh: bool = False) -> None:
    """Build what the cache lacks of these kernels and their userland, or everything anew with `refresh`."""
    flavours = list(flavours)
    for architecture in dict.fromkeys(KERNELS[flavour].architecture for flavour in flavours):
        _build(architecture, [name for name in flavours if KERNELS[name].architecture is architecture], report, refresh)


def _build(architecture: Architecture, flavours: list[str], report: Report, refresh: bool) -> None:
    wanted = [flavour for flavour in flavours if refresh or not _image(flavour).exists()]
    userland = _userland(architecture)
    if not wanted and userland.exists():
        return
    with _building(cache_directory(), architecture, report) as archive:
        for flavour in dict.fromkeys(each for name in wanted for each in (KERNELS[name].base, name) if each):
            if refresh or not _image(flavour).exists():  # another process may just have built it
                _replace(_image(flavour), partial(_build_kernel, archive, flavour, report))
        if refresh or not userland.exists():
            boots = next(_image(flavour) for flavour in flavours if _image(flavour).exists())
            _replace(userland, partial(_build_userland, archive, architecture, boots, report))


def _image(flavour: str) -> Path:
    chosen = KERNELS[flavour]
    return cache_directory() / f"{flavour}-{_recipe(chosen.architecture, chosen.options)}"


def _userland(architecture: Architecture = POWER) -> Path:
    other = "" if architecture is POWER else f"{architecture.name}-"
    return cache_directory() / f"userland-{other}{_recipe(architecture)}.cpio"


def headers(report: Report, refresh: bool = False) -> Path:
    """The include directory of the suite's kernel headers: the ABI of the kernels that the lab boots. The parts of
    one architecture are below it, in `powerpc64le-linux-gnu` and so on."""
    root = cache_directory()
    target = root / f"headers-{_recipe(POWER)}"
    if refresh or not target.exists():
        with _building(root, POWER, report) as archive:
            if refresh or not target.exists():
                _replace(target, lambda new: unpack(archive.fetch("linux-libc-dev"), new))
    return target / "usr" / "include"


def clean() -> list[str]:
    """Delete the cache; the names of what was deleted."""
    root = cache_directory()
    if not root.exists():
        return []
    with _lock(root, lambda _: None):
        names = sorted(path.name for path in root.iterdir() if path.name != "lock")
        for name in names:
            _delete(root / name)
    return names


@contextmanager
def _building(root: Path, architecture: Architecture, report: Report) -> Iterator[Archive]:
    """The archive to build from, with every other builder kept out, and nothing left behind but the package lists."""
    with _lock(root, report):
        archive = Archive(root / "apt", report, architecture.name)
        try:
            yield archive
        finally:
            _delete(root / "apt")
        current = {_recipe(kernel.architecture, kernel.options) for kernel in KERNELS.values()}
        for old in root.iterdir():
            if (_NAME.fullmatch(old.name) and old.name.partition(".")[0][-10:] not in current) or old.name.startswith(
                "new-"
            ):
                _delete(old)


@contextmanager
def _lock(root: Path, report: Report) -> Iterator[None]:
    """Hold the cache's lock; the kernel drops it whatever becomes of this process."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LabError(f"the cache {root} cannot be used: {error.strerror} (XDG_CACHE_HOME moves it)") from error
    try:
        deadline = time.monotonic() + _LOCK_TIMEOUT
        waiting = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise LabError(f"another process has held {root}/lock for {_LOCK_TIMEOUT} s") from None
                if not waiting:
                    report("waiting for another process that builds the image")
                waiting = True
                time.sleep(0.2)
        yield
    finally:
        os.close(descriptor)


def _replace(target: Path, build: Callable[[Path], None]) -> None:
    """Build beside `target`, then put it in place with one rename: readers see the old one or the new one."""
    scratch = Path(tempfile.mkdtemp(prefix="new-", dir=target.parent))
    try:
        new = scratch / target.name
        build(new)
        if target.is_dir():
            target.rename(scratch / "old")
        new.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _build_userland(archive: Archive, architecture: Architecture, kernel: Path, report: Report, target: Path) -> None:
    debs = archive.closure(_USERLAND)
    report(f"unpacking {len(debs)} packages")
    root = target.with_suffix(".root")
    for deb in debs:
        unpack(deb, root)
    for pattern in _PRUNED:
        for path in list(root.glob(pattern)):
            _delete(path)
    with target.open("wb") as stream:
        cpio.write(stream, [*_skeleton(root), *cpio.tree(root, skip={"__pycache__"})])
    report("compiling the guest's Python modules, in a guest")
    compiled = bake.compiled_modules(architecture, kernel / "vmlinux", kernel / "modules.cpio", target)
    with target.open("ab") as stream:
        cpio.write(stream, compiled)


def _skeleton(root: Path) -> Iterator[cpio.Entry]:
    """The directories and links that Debian's base-files, usr-merge and update-alternatives would make."""
    for name in ("dev", "proc", "sys", "run", "tmp", "root", "etc", "home", "home/alice", "var", "usr", "usr/lib64"):
        yield cpio.directory(name, 0o1777 if name == "tmp" else 0o755)
    for name in ("bin", "sbin", "lib", "lib64"):
        if not (root / name).exists():
            yield cpio.symlink(name, f"usr/{name}")
    yield cpio.symlink("var/run", "/run")
    yield cpio.device("dev/console", 5, 1)
    yield cpio.device("dev/null", 1, 3, 0o666)


def _build_kernel(archive: Archive, flavour: str, report: Report, target: Path) -> None:
    if KERNELS[flavour].base:
        _rebuild_kernel(archive, KERNELS[flavour], report, target)
        return
    deb = archive.fetch_newest(f"linux-image-{flavour}", rf"linux-image-[0-9].*-{re.escape(flavour)}")
    name = deb.name.partition("_")[0]
    report(f"unpacking {name}")
    root = target.with_suffix(".root")
    unpack(deb, root)
    release = name.removeprefix("linux-image-")
    target.mkdir()
    (target / "release").write_text(release + "\n")
    architecture = KERNELS[flavour].architecture
    (root / "boot" / f"{architecture.kernel}-{release}").rename(target / "vmlinux")
    base = root / "usr" / "lib" / "modules" / release
    with (target / "modules.cpio").open("wb") as stream:
        cpio.write(stream, module_entries(base, f"usr/lib/modules/{release}", modules_of(architecture)))


def _rebuild_kernel(archive: Archive, flavour: Flavour, report: Report, target: Path) -> None:
    """The base with its module built anew, in an archive behind those that it has."""
    assert flavour.base
    shutil.copytree(_image(flavour.base), target)
    release = (target / "release").read_text().strip()
    data = module.build(archive, release, flavour.options, target.with_suffix(".root"), report)
    with (target / "modules.cpio").open("ab") as stream:
        cpio.write(stream, [cpio.file(f"usr/lib/modules/{release}/kernel/{module.NAME}.ko", data)])


def module_entries(base: Path, prefix: str, names: Iterable[str]) -> Iterator[cpio.Entry]:
    """The named modules below `base` and the modules that they need, unpacked: `xz` is slow under emulation."""
    found = {path.name.partition(".ko")[0].replace("-", "_"): path for path in base.rglob("*.ko*")}
    wanted = [name.replace("-", "_") for name in names]
    builtin = {Path(line).stem.replace("-", "_") for line in (base / "modules.builtin").read_text().split()}
    needs: dict[str, list[str]] = {}
    contents: dict[str, bytes] = {}
    while wanted:
        name = wanted.pop()
        if name in needs or name in builtin:
            continue
        if name not in found:
            raise LabError(f"the kernel in {base} has no module {name}")
        data = found[name].read_bytes()
        contents[name] = lzma.decompress(data) if found[name].suffix == ".xz" else data
        match = re.search(rb"\0depends=([^\0]*)\0", contents[name])
        needs[name] = [need.replace("-", "_") for need in match[1].decode().split(",") if need] if match else []
        wanted += needs[name]
    yield from cpio.parents(f"{prefix}/kernel/x")
    for name, data in sorted(contents.items()):
        yield cpio.file(f"{prefix}/kernel/{found[name].name.partition('.ko')[0]}.ko", data)
    for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
        yield cpio.file(f"{prefix}/{name}", (base / name).read_bytes())
