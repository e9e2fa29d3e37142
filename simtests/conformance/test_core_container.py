"""Containers: version, extensions, choosing an IOMMU type."""

import errno

import pytest

from simtests.conformance.fixtures import EVERY_TYPE, PC, POWER
from simtests.conformance.raw import NOWHERE, TYPE1, TYPE1_V2, V1, V2
from vfio import uapi

EEH = uapi.VFIO_EEH


def expected_extensions(target, iommu=None):
    if target.platform == "PC":
        nesting = int(target.kernel < (7, 2))
        return {
            TYPE1: 1,
            TYPE1_V2: 1,
            uapi.VFIO_TYPE1_NESTING_IOMMU: nesting,
            uapi.VFIO_UNMAP_ALL: 1,
            uapi.VFIO_UPDATE_VADDR: int(iommu is not None),
        }
    return {V1: 1, V2: 1, EEH: int(target.platform == "PowerNV")}


def test_api_version_is_0_whatever_the_argument(program):
    container = program.container()
    for argument in (0, 1, NOWHERE, (1 << 64) - 1):
        assert container.ioctl(uapi.VFIO_GET_API_VERSION, argument) == 0


def test_containers_open_any_number_of_times(program):
    fds = [program.container().fd for _ in range(8)]
    assert len(set(fds)) == 8


@pytest.mark.parametrize("number", [*range(13), 99, 0x7FFF_FFFF])
def test_extensions_are_those_of_the_spapr_backend(program, target, number):
    assert program.container().extension(number) == expected_extensions(target).get(number, 0)


def test_extension_is_compared_with_all_its_64_bits(program):
    container = program.container()
    for number in (1 << 32 | program.older, 1 << 32 | program.native, 1 << 63 | program.native, (1 << 64) - 1):
        assert container.extension(number) == 0


@pytest.mark.parametrize("iommu", EVERY_TYPE)
def test_extensions_are_the_same_with_an_iommu_set(program, member, target, iommu):
    container = program.attached(member, iommu)
    for number in (*range(13), 1 << 32 | iommu):
        assert container.extension(number) == expected_extensions(target, iommu).get(number, 0)


@pytest.mark.parametrize("number", [0, 1, V1, 3, 5, V2, 99])
def test_set_iommu_without_a_group_raises_einval(program, number):
    assert program.container().set_iommu(number) == -errno.EINVAL


@pytest.mark.parametrize(
    "number",
    [
        *(0, 4, 8, 10, 99, 1 << 32 | 2, 1 << 32 | 7, (1 << 64) - 1),
        *(pytest.param(number, marks=POWER) for number in (1, 3, 6, 9)),
        *(pytest.param(number, marks=PC) for number in (V1, EEH, V2, 1 << 32 | TYPE1, 1 << 32 | TYPE1_V2)),
    ],
)
def test_set_iommu_of_a_type_that_nobody_claims_raises_enodev(program, member, number):
    container, group = program.container(), program.group(member)
    assert group.set_container(container.fd) == 0
    assert container.set_iommu(number) == -errno.ENODEV


@pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k")
def test_eeh_is_an_extension_but_no_type(program, member):
    container, group = program.container(), program.group(member)
    assert group.set_container(container.fd) == 0
    assert container.extension(EEH) == 1
    assert container.set_iommu(EEH) == -errno.EINVAL


@pytest.mark.targets("pseries")
def test_eeh_is_claimed_by_nobody_on_a_guest(program, member):
    container, group = program.container(), program.group(member)
    assert group.set_container(container.fd) == 0
    assert container.set_iommu(EEH) == -errno.ENODEV


@pytest.mark.parametrize("iommu", EVERY_TYPE)
def test_failed_set_iommu_leaves_the_container_free_for_another_type(program, member, iommu):
    container, group = program.container(), program.group(member)
    assert group.set_container(container.fd) == 0
    for wrong in (TYPE1 if program.native == V2 else V1, EEH, 99):
        assert container.set_iommu(wrong) < 0
        assert container.enable() == -errno.EINVAL
    assert container.set_iommu(iommu) == 0


@pytest.mark.parametrize("iommu", EVERY_TYPE)
def test_iommu_type_is_set_once(program, member, iommu):
    container = program.attached(member, iommu)
    for number in (V1, V2, 1, 5, 99):
        assert container.set_iommu(number) == -errno.EINVAL


def test_without_an_iommu_every_other_request_raises_einval_and_no_argument_is_looked_at(program, member):
    empty, waiting, group = program.container(), program.container(), program.group(member)
    assert group.set_container(waiting.fd) == 0
    for container in (empty, waiting):
        for offset in (*range(3, 23), 99, 155):
            assert container.ioctl(uapi.VFIO_GET_API_VERSION + offset, NOWHERE) == -errno.EINVAL
        assert container.ioctl(0, NOWHERE) == -errno.EINVAL


@pytest.mark.parametrize("iommu", EVERY_TYPE)
def test_request_that_the_iommu_does_not_know_raises_enotty(program, member, iommu):
    container = program.attached(member, iommu)
    others = (*range(3, 12), 22, 23) if program.native == V2 else (*range(3, 12), 15, 16, *range(18, 24))
    for offset in (*others, 99, 155):
        assert container.ioctl(uapi.VFIO_GET_API_VERSION + offset, NOWHERE) == -errno.ENOTTY
    assert container.ioctl(0, NOWHERE) == -errno.ENOTTY


def test_container_of_another_type_can_be_set_after_its_last_group_has_left(program, member):
    container, group = program.container(), program.group(member)
    for number in (program.older, program.native, program.older):
        assert group.set_container(container.fd) == 0
        assert container.set_iommu(number) == 0
        assert group.unset_container() == 0
        assert container.set_iommu(number) == -errno.EINVAL
        assert container.enable() == -errno.EINVAL


@pytest.mark.lab_only
@pytest.mark.not_recorded("the module goes and comes back")
def test_without_the_iommu_module_nothing_is_an_extension_and_no_type_can_be_set(program, member, iommu_module):
    container, group = program.container(), program.group(member)
    assert group.set_container(container.fd) == 0
    assert iommu_module.unload() is None
    for number in (*range(13), 99):
        assert container.extension(number) == 0
    for number in (V1, V2, EEH, 1, 99):
        assert container.set_iommu(number) == -errno.ENODEV
    assert group.device(member.address) == -errno.EINVAL
    iommu_module.load()
    assert container.extension(program.native) == 1
    assert container.set_iommu(program.native) == 0


@pytest.mark.lab_only
@pytest.mark.not_recorded("the module goes and comes back")
def test_iommu_module_stays_while_a_container_uses_it(program, member, iommu_module):
    container, memory = program.attached(member), program.memory(program.page)
    assert iommu_module.unload() == "EAGAIN"
    assert container.pin(memory.address, memory.length) == 0
    assert container.group.unset_container() == 0
    assert iommu_module.unload() is None
    assert container.extension(program.native) == 0


def test_containers_of_both_types_exist_side_by_side(program, member):
    first = program.attached(member, program.older)
    assert program.container().set_iommu(program.native) == -errno.EINVAL
    if program.older == V1:
        assert first.enable() == 0
    else:
        assert first.map(program.memory(program.page).address, 0, program.page) == 0
