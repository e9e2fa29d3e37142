"""EEH calls on a PE that is not frozen."""

import errno

import pytest

from simtests.conformance.raw import NOWHERE, V1, V2
from vfio import uapi

pytestmark = pytest.mark.power

POWERNV = pytest.mark.targets("powernv8", "powernv8-64k", "powernv9", "powernv9-64k")
DISABLE, ENABLE, UNFREEZE_IO, UNFREEZE_DMA, GET_STATE, DEACTIVATE, HOT, FUNDAMENTAL, CONFIGURE, INJECT = range(10)
both_versions = pytest.mark.parametrize("iommu", [V1, V2])


def inject(container, *, type_=0, func=0, addr=0, mask=0, argsz=40):
    struct = uapi.vfio_eeh_pe_op(op=INJECT, argsz=argsz, err={"type": type_, "func": func, "addr": addr, "mask": mask})
    return container.ioctl(uapi.VFIO_EEH_PE_OP, uapi.buffer(struct))


def test_without_an_iommu_or_a_group_every_operation_raises_einval(program, member):
    container, group = program.container(), program.group(member)
    for _ in range(2):
        for op in (DISABLE, ENABLE, GET_STATE, 99):
            assert container.eeh(op) == -errno.EINVAL
        assert container.ioctl(uapi.VFIO_EEH_PE_OP, NOWHERE) == -errno.EINVAL
        group.set_container(container.fd)


@POWERNV
@both_versions
@pytest.mark.parametrize("op", [DISABLE, ENABLE, UNFREEZE_IO, UNFREEZE_DMA, GET_STATE, DEACTIVATE, CONFIGURE])
def test_operation_on_a_pe_that_is_not_frozen_is_0_and_it_stays_so(program, member, iommu, op):
    container = program.attached(member, iommu)
    assert container.eeh(op) == 0
    assert container.eeh(GET_STATE) == 0


@POWERNV
@pytest.mark.parametrize("op", [10, 11, 99, 0xFFFF_FFFF])
def test_unknown_operation_raises_einval(v2, op):
    assert v2.eeh(op) == -errno.EINVAL


@POWERNV
def test_argument_is_checked_in_order(program, v2, area):
    assert v2.ioctl(uapi.VFIO_EEH_PE_OP, NOWHERE) == -errno.EFAULT
    for argsz in (0, 4, 11):
        assert v2.eeh(GET_STATE, argsz=argsz) == -errno.EINVAL
    assert v2.eeh(GET_STATE, argsz=12) == 0
    for flags in (1, 0x8000_0000):
        assert v2.eeh(GET_STATE, flags=flags) == -errno.EINVAL
    torn = area(2)
    torn.hole(1)
    at = program.page - 12
    torn.write(at, uapi_bytes(argsz=12, op=GET_STATE))
    assert v2.ioctl(uapi.VFIO_EEH_PE_OP, torn.address + at) == 0
    torn.write(at + 1, uapi_bytes(argsz=12, op=GET_STATE)[:11])
    assert v2.ioctl(uapi.VFIO_EEH_PE_OP, torn.address + at + 1) == -errno.EFAULT


@POWERNV
def test_injection_needs_its_whole_struct(program, v2, area):
    for argsz in (12, 16, 39):
        assert inject(v2, argsz=argsz) == -errno.EINVAL
    torn = area(2)
    torn.hole(1)
    at = program.page - 12
    torn.write(at, uapi_bytes(argsz=40, op=INJECT))
    assert v2.ioctl(uapi.VFIO_EEH_PE_OP, torn.address + at) == -errno.EFAULT


@POWERNV
def test_injection_of_an_unknown_function_raises_einval_and_of_an_unknown_type_erange(v2):
    for func in (20, 21, 0xFFFF_FFFF):
        for type_ in (0, 2):
            assert inject(v2, type_=type_, func=func) == -errno.EINVAL
    for type_ in (2, 3, 0xFFFF_FFFF):
        assert inject(v2, type_=type_) == -errno.ERANGE


POWER8 = ("powernv8", "powernv8-64k", "siblings", "siblings-64k")
MEMORY, IO, CONFIG, DMA = (0, 1, 6, 7), (2, 3, 8, 9), (4, 5, 10, 11), range(12, 20)


@pytest.mark.targets(*POWER8)
@both_versions
def test_phb3_injects_into_memory_and_configuration_space_and_into_windows_that_there_are(program, member, iommu):
    container = program.attached(member, iommu)
    for type_ in (0, 1):
        for func in (*MEMORY, *CONFIG):
            assert inject(container, type_=type_, func=func) == 0
        for func in (*IO, *DMA):
            assert inject(container, type_=type_, func=func) == -errno.EIO
    assert container.eeh(GET_STATE) == 0


@pytest.mark.targets(*POWER8)
def test_phb3_injects_into_the_dma_of_each_window_by_its_type(program, v2):
    assert v2.create(12, 1 << 30) == 1 << 59  # with which the default window is made
    for type_ in (0, 1):
        for func in DMA:
            assert inject(v2, type_=type_, func=func) == 0
    assert v2.remove(0) == 0
    for func in DMA:
        assert inject(v2, type_=0, func=func) == -errno.EIO
        assert inject(v2, type_=1, func=func) == 0
    assert v2.eeh(GET_STATE) == 0


@pytest.mark.targets("powernv9", "powernv9-64k", "powernv10", "powernv10-64k")
@both_versions
def test_phb4_injects_into_configuration_space_only(program, member, iommu):
    container = program.attached(member, iommu)
    for type_ in (0, 1):
        for func in range(20):
            assert inject(container, type_=type_, func=func) == (0 if func in CONFIG else -errno.EIO)
    assert container.eeh(GET_STATE) == 0


@pytest.mark.targets("pseries", "pseries-64k")
@pytest.mark.parametrize("op", [*range(11), 99])
def test_guest_without_eeh_raises_enodev_before_the_argument_is_looked_at(v2, op):
    assert v2.eeh(op) == -errno.ENODEV
    assert v2.ioctl(uapi.VFIO_EEH_PE_OP, NOWHERE) == -errno.ENODEV
    assert v2.eeh(op, argsz=4) == -errno.ENODEV


@POWERNV
def test_operations_need_neither_enable_nor_an_open_device_and_charge_nothing(program, v2, member):
    assert v2.eeh(GET_STATE) == 0
    assert program.locked == 0
    assert v2.group.device(member.address) >= 0
    assert v2.eeh(GET_STATE) == 0


@POWERNV
def test_operation_goes_to_every_group_of_the_container(program, v2, second):
    group = program.group(second)
    assert group.set_container(v2.fd) == 0
    for op in (ENABLE, UNFREEZE_IO, UNFREEZE_DMA, GET_STATE, CONFIGURE):
        assert v2.eeh(op) == 0


def uapi_bytes(**fields):
    return bytes(uapi.buffer(uapi.vfio_eeh_pe_op(**fields)))[:12]
