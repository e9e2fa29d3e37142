"""Writes programs: a seed and the facts of a target in, steps out.

The generator believes that what it meant to be valid succeeds, and from that keeps a picture of what is open, attached,
registered and mapped, so that most calls reach deep into the kernel; some are then spoiled on purpose. The picture may
be wrong: the steps that follow are then nearly valid ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from hwtests.fuzz.facts import Endpoint, Facts
from hwtests.fuzz.generate_device import DeviceSteps
from hwtests.fuzz.generate_iommu import IommuSteps
from hwtests.fuzz.generate_spapr import SpaprSteps
from hwtests.fuzz.generate_type1 import Type1Steps
from hwtests.fuzz.picture import Container, Group, Picture
from hwtests.fuzz.program import Buffer, Operand, Program

PROFILES = ("v2", "v2", "v1", "core", "device", "device", "hostile")


@dataclass(frozen=True)
class _Weights:
    core: int
    iommu: int
    device: int


_WEIGHTS = {
    "v2": _Weights(8, 80, 12),
    "v1": _Weights(10, 75, 15),
    "core": _Weights(70, 20, 10),
    "device": _Weights(8, 22, 70),
    "hostile": _Weights(34, 40, 26),
}
_SPOILED = {"hostile": 0.4}
_OFTEN_SPOILED = 0.08


def generate(facts: Facts, seed: str, steps: int) -> Program:
    """The program of that seed, of about `steps` steps."""
    rng = random.Random(f"{seed} {facts.page_size} {facts.cpu} {facts.platform}")
    profile = rng.choice(PROFILES)
    picture = Picture(facts, rng, _buffers(facts, rng), _SPOILED.get(profile, _OFTEN_SPOILED))
    core = CoreSteps(picture)
    iommu: IommuSteps = (Type1Steps if facts.type1 else SpaprSteps)(picture, core.progress)
    device = DeviceSteps(picture, core.progress, iommu.map)
    _prelude(picture, core, iommu, profile)
    weights = _WEIGHTS[profile]
    while len(picture.steps) < steps:
        (part,) = rng.choices((core, iommu, device), (weights.core, weights.iommu, weights.device))
        part.step()
    memlock = (
        rng.choice((0, 64 << 10, 1 << 20, 9 << 20, 1 << 31, (1 << 31) + (1 << 24))) if rng.random() < 0.15 else None
    )
    return Program(seed, picture.buffers, tuple(picture.steps), memlock)


def _buffers(facts: Facts, rng: random.Random) -> tuple[Buffer, ...]:
    page = facts.page_size
    found = []
    for _ in range(rng.randint(1, 3)):
        pages = rng.choice((1, 2, 4, 4, 8, 16))
        holes = ((rng.randrange(pages), rng.choice(("none", "read"))),) if pages > 1 and rng.random() < 0.3 else ()
        found.append(Buffer(pages * page, 0, holes))
    if facts.huge_page and rng.random() < 0.25:
        found.append(Buffer(facts.huge_page * rng.randint(1, facts.huge_pages), facts.huge_page))
    return tuple(found)


def _prelude(picture: Picture, core: CoreSteps, iommu: IommuSteps, profile: str) -> None:
    """What most programs begin with: a group in a container, an IOMMU, memory; now and then a step is missing."""
    rng = picture.rng
    acts: list[Callable[[], object]] = [
        core.open_container,
        lambda: core.open_group(picture.favourite),
        core.set_container,
    ]
    first, second = picture.facts.versions
    version = {"v1": first, "v2": second}.get(profile, rng.choice((first, second, second)))
    acts.append(lambda: core.set_iommu(version))
    if profile != "core":
        acts += [lambda: core.get_device(0)] * (rng.random() < 0.8)
    for act in acts:
        if rng.random() < 0.97:
            act()
    if profile != "core" and picture.containers:
        for each in (*iommu.beginning(version), *([iommu.map] * rng.randint(0, 2))):
            each(picture.containers[0])


class CoreSteps:
    """Opening, closing, and what containers and groups answer by themselves."""

    def __init__(self, picture: Picture) -> None:
        self.picture = picture
        self._acts: list[tuple[Callable[[], object], int]] = [
            (self.open_container, 5),
            (self.open_group, 8),
            (self.dup, 4),
            (self.close, 9),
            (self.set_container, 9),
            (self.unset_container, 5),
            (self.set_iommu, 9),
            (self.check_extension, 4),
            (self.api_version, 1),
            (self.group_status, 6),
            (self.get_device, 8),
            (self.unknown, 3),
            (self.plain_file_call, 2),
        ]

    def step(self) -> None:
        """Add one."""
        acts, weights = zip(*self._acts, strict=True)
        self.picture.rng.choices(acts, weights)[0]()

    def progress(self) -> None:
        """The next thing that is needed to open a device."""
        picture = self.picture
        if not any(each.steps for each in picture.containers):
            self.open_container()
        elif not any(each.steps for each in picture.groups):
            self.open_group()
        elif not any(each.container for each in picture.groups):
            self.set_container()
        elif not any(each.container and each.container.version for each in picture.groups):
            joined = next(each.container for each in picture.groups if each.container)
            first, second = picture.facts.versions
            self.set_iommu(picture.rng.choice((first, second, second)), joined)
        elif any(each.container and each.container.version and self._own(each).opens_fast for each in picture.groups):
            self.get_device(0)
        else:
            self.open_group(picture.favourite)

    def _own(self, group: Group) -> Endpoint:
        """The endpoint of a group."""
        return next(each for each in self.picture.facts.endpoints if each.group == group.number)

    def open_container(self) -> None:
        step = self.picture.add("open", path="/dev/vfio/vfio")
        self.picture.containers.append(Container([step]))

    def open_group(self, number: int | None = None) -> None:
        picture, rng = self.picture, self.picture.rng
        numbers = [each.group for each in picture.facts.endpoints]
        if number is None:
            number = picture.favourite if rng.random() < 0.65 else rng.choice([*numbers, 97])
        step = picture.add("open", path=f"/dev/vfio/{number}")
        if number in numbers and not any(group.number == number for group in picture.groups):
            picture.groups.append(Group([step], number))

    def dup(self) -> None:
        holder = self.picture.any_holder()
        if holder is not None and holder.steps:
            step = self.picture.add("dup", fd=self.picture.rng.choice(holder.steps))
            holder.steps.append(step)

    def close(self) -> None:
        picture, rng = self.picture, self.picture.rng
        if rng.random() < 0.05:
            picture.add("close", fd=picture.any_fd())
            return
        holder = picture.any_holder()
        if holder is not None and holder.steps:
            picture.add("close", fd=holder.steps.pop(rng.randrange(len(holder.steps))))
            picture.forget(holder)

    def set_container(self) -> None:
        picture, rng = self.picture, self.picture.rng
        free = [each for each in picture.groups if each.steps and each.container is None]
        group = rng.choice(free) if free and rng.random() < 0.7 else picture.group()
        container = picture.container()
        if group is None:
            return self.open_group()
        if container is None:
            return self.open_container()
        wrong: tuple[Operand, ...] = (["fd", picture.any_fd()], -1, 9999)
        right = rng.random() < 0.9
        target: Operand = ["fd", picture.step_of(container)] if right else rng.choice(wrong)
        picture.ioctl(picture.step_of(group), "VFIO_GROUP_SET_CONTAINER", int_argument=target)
        if picture.intact and right and group.container is None and container.steps:
            group.container = container
            container.groups.append(group)
        return None

    def unset_container(self) -> None:
        picture = self.picture
        group = picture.group()
        if group is not None:
            picture.ioctl(picture.step_of(group), "VFIO_GROUP_UNSET_CONTAINER")
            if picture.intact and not any(device.group is group for device in picture.devices):
                picture.detach(group)

    def set_iommu(self, version: int = 0, container: Container | None = None) -> None:
        picture, rng = self.picture, self.picture.rng
        container = container or picture.container()
        if container is None:
            return self.open_container()
        first, second = picture.facts.versions
        version = version or rng.choice((first, second, second, second, *picture.facts.strange_types, 1 << 32 | second))
        picture.ioctl(picture.step_of(container), "VFIO_SET_IOMMU", value=version)
        if picture.intact and container.groups and not container.version and version in (first, second):
            container.version = version
            container.enabled = picture.facts.type1
        return None

    def check_extension(self) -> None:
        container = self.picture.container()
        if container is not None:
            value = self.picture.rng.choice((*range(11), 7, 2, 5, 77, 1 << 32 | 7, (1 << 64) - 1))
            self.picture.ioctl(self.picture.step_of(container), "VFIO_CHECK_EXTENSION", value=value)

    def api_version(self) -> None:
        container = self.picture.container()
        if container is not None:
            self.picture.ioctl(self.picture.step_of(container), "VFIO_GET_API_VERSION")

    def group_status(self) -> None:
        group = self.picture.group()
        if group is not None:
            self.picture.ioctl(self.picture.step_of(group), "VFIO_GROUP_GET_STATUS", {})

    def get_device(self, choice: int | None = None) -> None:
        """GET_DEVICE_FD: mostly of the group's own device (for certain with `choice` 0)."""
        picture, rng = self.picture, self.picture.rng
        group = picture.group()
        if choice == 0:  # not one that opens slowly
            group = next((each for each in picture.groups if each.steps and self._own(each).opens_fast), group)
        if group is None:
            return
        own = self._own(group)
        if not own.opens_fast:
            choice = 1
        if choice == 0 or (choice is None and rng.random() < 0.7):
            step = picture.ioctl(picture.step_of(group), "VFIO_GROUP_GET_DEVICE_FD", string=own.address)
            if picture.intact and group.container is not None and group.container.version:
                picture.open_device(step, own, group)
            return
        other = rng.choice(picture.facts.endpoints).address
        names: tuple[str, ...] = (
            "",
            own.address[:-1],
            own.address[5:],
            f"{own.address}x",
            f"{own.address} foo",
            other,
            "nonsense",
        )
        longest = picture.facts.page_size - 1
        names += (f"{other[:-1]}1", "x" * longest, "x" * (longest + 1), f"{other[:-1]}1 vf_token=1")
        if own.opens_fast:
            names += (
                f"{own.address}  ",
                f"{own.address} vf_token=12345678-1234-1234-1234-123456789abc",
                f"{own.address} vf_token=1234",
            )
        picture.ioctl(picture.step_of(group), "VFIO_GROUP_GET_DEVICE_FD", string=rng.choice(names))

    def unknown(self) -> None:
        """A request that the file does not know, or one in the encoding of another machine."""
        picture, rng = self.picture, self.picture.rng
        numbers = (*(f"VFIO+{n}" for n in (22, 23, 40, 63, 155)), "other", "sized")
        how, at = ("bad", rng.choice(("null", "hole", "kernel"))) if rng.random() < 0.5 else ("value", "")
        args = {"by": how, "at": at} if at else {"by": how, "value": rng.choice((0, 1, 1 << 63))}
        picture.add("ioctl", fd=picture.any_fd(), number=rng.choice(numbers), **args)

    def plain_file_call(self) -> None:
        """pread, pwrite or mmap of a file that is no device."""
        picture, rng = self.picture, self.picture.rng
        holder = rng.choice([*picture.containers, *picture.groups]) if picture.containers or picture.groups else None
        if holder is None or not holder.steps:
            return
        step = picture.step_of(holder)
        match rng.randrange(3):
            case 0:
                picture.add("pread", fd=step, length=rng.choice((0, 8)), offset=rng.choice((0, 1 << 40)))
            case 1:
                picture.add("pwrite", fd=step, data="00" * rng.choice((0, 8)), offset=0)
            case _:
                picture.add("mmap", fd=step, length=picture.facts.page_size, offset=0, prot=3)
