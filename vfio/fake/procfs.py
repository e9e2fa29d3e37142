"""/proc: the processes of the machine with their files and memory, and what the kernel tells of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfio.fake.group import GroupFile
from vfio.fake.kernfs import Attribute, Directory, Link, Node, directory, text

if TYPE_CHECKING:
    from vfio.fake.file import File
    from vfio.fake.machine import Machine
    from vfio.fake.process import Process

_CAP_IPC_LOCK = 1 << 14
_ALL_CAPABILITIES = (1 << 41) - 1
_SWAPS = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
_ROOT = "1 1 0:2 / / rw - rootfs rootfs rw\n22 1 0:22 / /sys rw,relatime - sysfs sys rw\n"
_REVISIONS = {"POWER7": "003f 0203", "POWER8": "004d 0200", "POWER9": "004e 1200", "POWER10": "0080 0200"}


def root(machine: Machine, process: Process) -> Directory:
    """The directory, as a process sees it."""
    host = machine.driver_core.host
    kernel = directory(
        {
            "osrelease": text(host.release),
            "random": directory({"boot_id": text(host.boot_id)}),
            "tainted": Attribute(lambda: f"{machine.tainted}\n", mode=0o644),
        },
        mode=0o555,
    )
    files: dict[str, Node | None] = {
        "cpuinfo": Attribute(lambda: _cpuinfo(machine)),
        "meminfo": Attribute(lambda: _meminfo(machine)),
        "mounts": Link("self/mounts"),
        "powerpc": directory({"eeh": text("EEH Subsystem is enabled")}, mode=0o555),
        "self": Link(str(process.pid)),
        "swaps": Attribute(lambda: _swaps(machine)),
        "sys": directory({"kernel": kernel}, mode=0o555),
    }
    processes = {str(each.pid): each for each in machine.processes if each.pid > 0}

    def lookup(name: str) -> Node | None:
        return _process(machine, processes[name]) if name in processes else files.get(name)

    return Directory(lambda: [*processes, *files], lookup, mode=0o555)


def _process(machine: Machine, process: Process) -> Directory:
    uid = process.uid
    words = machine.driver_core.host.command(process)
    links = {str(fd): Link(_link(file)) for fd, file in process.files.items()}
    return directory(
        {
            "cmdline": Attribute(lambda: "".join(f"{word}\0" for word in words), uid=uid),
            "comm": Attribute(lambda: f"{words[0].rpartition('/')[2][:15]}\n", uid=uid),
            "fd": directory(links, mode=0o500, uid=uid),
            "maps": Attribute(lambda: "".join(f"{line}\n" for line, _ in _areas(process)), mode=0o400, uid=uid),
            "mountinfo": Attribute(lambda: _mountinfo(machine), uid=uid),
            "mounts": Attribute(lambda: _mounts(machine), uid=uid),
            "smaps": Attribute(lambda: _smaps(process), mode=0o400, uid=uid),
            "status": Attribute(lambda: _status(machine, process, words[0]), uid=uid),
        },
        mode=0o555,
        uid=uid,
    )


def _link(file: File) -> str:
    """What a descriptor is a link to."""
    gone = isinstance(file, GroupFile) and file.group.iommu_group is None
    return f"{file.link} (deleted)" if gone else file.link


def _status(machine: Machine, process: Process, command: str) -> str:
    locked = process.locked_pages * machine.page_size // 1024
    capabilities = _ALL_CAPABILITIES if process.uid == 0 else 0
    capabilities = capabilities | _CAP_IPC_LOCK if process.ipc_lock else capabilities & ~_CAP_IPC_LOCK
    uids, gids = ("\t".join([str(number)] * 4) for number in (process.uid, process.groups[0]))
    groups = " ".join(map(str, process.groups[1:]))
    return (
        f"Name:\t{command.rpartition('/')[2][:15]}\nState:\tR (running)\nTgid:\t{process.pid}\nPid:\t{process.pid}\n"
        f"PPid:\t1\nUid:\t{uids}\nGid:\t{gids}\nGroups:\t{groups} \n"
        f"VmLck:\t{locked:8} kB\nVmPin:\t{0:8} kB\nCapEff:\t{capabilities:016x}\n"
    )


def _areas(process: Process) -> list[tuple[str, int]]:
    """The lines of maps, and the size of the pages behind each."""
    found = []
    with open(f"/proc/{process.memory.pid}/maps", encoding="utf-8", errors="replace") as file:
        for line in file:
            span, _, rest = line.rstrip("\n").partition(" ")
            start, end = (int(number, 16) for number in span.split("-"))
            at = start
            for large, large_end, page in process.memory.large_areas(start, end - start):
                if at < large:
                    found.append((f"{at:08x}-{large:08x} {rest}", process.memory.page_size))
                found.append((f"{max(at, large):08x}-{min(end, large_end):08x} {rest}", page))
                at = min(end, large_end)
            if at < end:
                found.append((f"{at:08x}-{end:08x} {rest}", process.memory.page_size))
    return found


def _smaps(process: Process) -> str:
    entries = []
    for line, page in _areas(process):
        start, end = (int(number, 16) for number in line.split(" ", 1)[0].split("-"))
        size = f"Size:{(end - start) // 1024:19} kB\n"
        entries.append(f"{line}\n{size}KernelPageSize:{page // 1024:9} kB\nMMUPageSize:{page // 1024:12} kB\n")
    return "".join(entries)


def _cpuinfo(machine: Machine) -> str:
    platform = machine.topology.platform
    if platform.name == "P4080DS":
        return (
            f"processor\t: 0\ncpu\t\t: {platform.cpu}\nclock\t\t: 1500.000000MHz\nrevision\t: 2.0 (pvr 8023 0020)\n\n"
            f"timebase\t: 50000000\nplatform\t: P4080 DS\nmodel\t\t: fsl,{platform.name} (modelled)\n"
        )
    if platform.name == "PC":
        return f"processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: {platform.cpu}\ncpu MHz\t\t: 2000.000\n\n"
    bare = platform.name == "PowerNV"
    model = f"IBM {platform.name} (modelled)"
    firmware = "firmware\t: OPAL\n" if bare else ""
    return (
        f"processor\t: 0\ncpu\t\t: {platform.cpu}{'' if bare else ' (architected)'}, altivec supported\n"
        f"clock\t\t: 1000.000000MHz\nrevision\t: 2.0 (pvr {_REVISIONS.get(platform.cpu, '0000 0000')})\n\n"
        f"timebase\t: 512000000\nplatform\t: {platform.name}\nmodel\t\t: {model}\n"
        f"machine\t\t: {'PowerNV' if bare else 'CHRP'} {model}\n"
        f"{firmware}MMU\t\t: {platform.mmu}\n"
    )


def _meminfo(machine: Machine) -> str:
    total = machine.driver_core.host.memory // 1024
    sizes = [1 << bit for bit in range(64) if machine.topology.iommu.page_sizes >> bit & 1]
    huge = next((size for size in sizes if size > machine.page_size and size > 1 << 16), 16 << 20)
    fields = {"MemTotal": total, "MemFree": total * 9 // 10, "MemAvailable": total * 9 // 10}
    lines = [f"{name + ':':14}{value:10} kB\n" for name, value in fields.items()]
    return "".join(lines) + f"HugePages_Total:       0\nHugePages_Free:        0\nHugepagesize:{huge // 1024:11} kB\n"


def _mountinfo(machine: Machine) -> str:
    lines = [_ROOT]
    for number, (major, minor, name, where, btrfs) in enumerate(_mounted(machine), start=30):
        device = "0:31" if btrfs else f"{major}:{minor}"
        kind = "btrfs" if btrfs else "ext4"
        lines.append(f"{number} 1 {device} / {_escape(where)} rw,relatime - {kind} /dev/{name} rw\n")
    return "".join(lines)


def _mounts(machine: Machine) -> str:
    lines = ["rootfs / rootfs rw 0 0\nsys /sys sysfs rw,relatime 0 0\n"]
    for _, _, name, where, btrfs in _mounted(machine):
        lines.append(f"/dev/{name} {_escape(where)} {'btrfs' if btrfs else 'ext4'} rw,relatime 0 0\n")
    return "".join(lines)


def _mounted(machine: Machine) -> list[tuple[int, int, str, str, bool]]:
    """Device number and name of the disks that are mounted, where, and whether with btrfs."""
    return [
        (*disk.number, disk.name, where, disk.btrfs)
        for _, disk in machine.driver_core.host.disks.values()
        for where in disk.mounted
    ]


def _swaps(machine: Machine) -> str:
    disks = [disk for _, disk in machine.driver_core.host.disks.values() if disk.swap]
    return _SWAPS + "".join(f"/dev/{_escape(disk.name)} partition\t1048572\t0\t-2\n" for disk in disks)


def _escape(field: str) -> str:
    """Blanks are octal escapes."""
    return "".join(f"\\{ord(letter):03o}" if letter in " \t\n\\" else letter for letter in field)
