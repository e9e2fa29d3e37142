"""Compile the guest's Python modules once, in a guest.

Python compiles slowly under emulation: without this every boot pays a second for starting Python and four for pytest.
A throw-away machine imports what tests import and writes the compiled files, as a cpio archive, to a bare disk.
"""

import subprocess
import tempfile
from pathlib import Path

from hwtests.lab import cpio, qemu
from hwtests.lab.architecture import Architecture
from hwtests.lab.errors import LabError

_TIMEOUT = 180.0  # seconds; it takes about 20
_DISK = 64 << 20  # bytes, of which the archive fills a tenth

_INIT = """\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
$b --install -s /usr/bin 2>/dev/null
export PATH=/usr/sbin:/usr/bin HOME=/root LANG=C.UTF-8
depmod
for module in virtio_pci virtio_blk; do modprobe -q $module; done
cd /lab
mkdir tests
echo 'import os; assert os' > tests/test_nothing.py
python3 -E -s warm.py &
python3 -m pytest -q -p no:cacheprovider tests
wait
python3 -E -s carry.py
sync
poweroff -f
"""

# Names that tests, the agent and the command import, directly or not.
_WARM = """\
import importlib
for name in '''
    argparse ast asyncio binascii bisect cProfile click click.testing collections concurrent.futures configparser contextlib
    copy csv ctypes dataclasses datetime decimal difflib doctest enum errno fcntl fnmatch fractions functools getpass glob
    grp hashlib hypothesis hypothesis.strategies importlib.metadata importlib.resources io itertools json
    logging lzma math mmap multiprocessing pathlib pdb pickle platform pprint pwd queue random re resource rich.console
    rich.live rich.markup rich.panel rich.progress rich.status rich.table rich.text rich.traceback rich.tree select
    selectors shlex shutil signal site socket sqlite3 statistics string struct subprocess sysconfig tarfile tempfile
    textwrap threading timeit tomllib traceback types typing unittest.mock uuid warnings weakref xml.etree.ElementTree
    zipfile zlib _cffi_backend
'''.split():
    try:
        importlib.import_module(name)
    except ImportError:
        pass
"""

_CARRY = """\
from pathlib import Path
import cpio
def compiled():
    for directory in sorted(Path('/usr/lib').rglob('__pycache__')):
        name = str(directory)[1:]
        yield cpio.directory(name)
        yield from cpio.tree(directory, name)
with open('/dev/vda', 'r+b') as disk:
    cpio.write(disk, compiled())
"""


def compiled_modules(architecture: Architecture, vmlinux: Path, modules: Path, userland: Path) -> list[cpio.Entry]:
    """The compiled files of what is worth it, to append to `userland`. Raises LabError."""
    program = qemu.find(architecture)
    with tempfile.TemporaryDirectory(prefix="vfio-lab-") as name:
        disk, initrd = Path(name) / "disk", Path(name) / "initrd"
        with disk.open("wb") as stream:
            stream.truncate(_DISK)
        with initrd.open("wb") as stream:
            for part in (userland, modules):
                stream.write(part.read_bytes())
            cpio.write(stream, _files())
        words = [program, *architecture.machine, "-m", "1G", "-smp", "2", "-nodefaults", "-nographic"]
        words += ["-serial", "stdio", "-monitor", "none", "-net", "none", "-no-reboot"]
        words += ["-drive", f"if=none,id=disk,format=raw,file={disk}", "-device", "virtio-blk-pci,drive=disk"]
        words += [
            "-kernel",
            str(vmlinux),
            "-initrd",
            str(initrd),
            "-append",
            f"console={architecture.console} quiet panic=-1 cryptomgr.notests=1",
        ]
        try:
            result = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT, check=False)
        except subprocess.TimeoutExpired as error:
            raise LabError(f"compiling the guest's Python modules: no end after {_TIMEOUT:g} s") from error
        try:
            entries = list(cpio.read(disk.read_bytes()))
        except ValueError as error:
            said = (result.stdout + result.stderr).decode("utf-8", "replace").splitlines()[-15:]
            raise LabError("compiling the guest's Python modules failed:\n" + "\n".join(said)) from error
    if not any(entry.name.endswith(".pyc") for entry in entries):
        raise LabError("compiling the guest's Python modules gave none")
    return entries


def _files() -> list[cpio.Entry]:
    source = Path(cpio.__file__).read_text(encoding="utf-8")
    return [
        cpio.file("init", _INIT, 0o755),
        cpio.directory("lab"),
        cpio.file("lab/cpio.py", source),
        cpio.file("lab/warm.py", _WARM),
        cpio.file("lab/carry.py", _CARRY),
    ]
