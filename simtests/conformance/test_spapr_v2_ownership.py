"""sPAPR TCE: a container belongs to the address space that used it first."""

import errno
import threading

import pytest

from simtests.conformance.raw import NOWHERE, V1, V2, Group
from vfio import uapi

pytestmark = pytest.mark.power

IOVA = 0x100000
REQUESTS = [
    uapi.VFIO_IOMMU_SPAPR_TCE_GET_INFO,
    uapi.VFIO_IOMMU_MAP_DMA,
    uapi.VFIO_IOMMU_UNMAP_DMA,
    uapi.VFIO_IOMMU_ENABLE,
    uapi.VFIO_IOMMU_DISABLE,
    uapi.VFIO_IOMMU_SPAPR_REGISTER_MEMORY,
    uapi.VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY,
    uapi.VFIO_IOMMU_SPAPR_TCE_CREATE,
    uapi.VFIO_IOMMU_SPAPR_TCE_REMOVE,
    uapi.VFIO_EEH_PE_OP,
    uapi.VFIO_GET_API_VERSION + 3,
    uapi.VFIO_GET_API_VERSION + 22,
    uapi.VFIO_GET_API_VERSION + 99,
]


@pytest.fixture
def shared(other_program, request):
    """Makes the container's file another process's as well: the process, and the container as it sees it."""

    def share(container=None):
        container, other = container or request.getfixturevalue("v2"), other_program()
        return other, container.seen_by(other, other.backend.receive(container.fd))

    return share


def belongs_to_another(container):
    return {container.ioctl(request, NOWHERE) for request in REQUESTS} == {-errno.EPERM}


OWNING = {
    "register": lambda container: container.register(1, 1),
    "create": lambda container: container.create(12, 1 << 30, flags=1),
    "create of nothing": lambda container: container.ioctl(uapi.VFIO_IOMMU_SPAPR_TCE_CREATE, NOWHERE),
    "remove": lambda container: container.remove(1, flags=1),
    "register of nothing": lambda container: container.ioctl(uapi.VFIO_IOMMU_SPAPR_REGISTER_MEMORY, NOWHERE),
}
NOT_OWNING = {
    "info": lambda container: container.get_info(uapi.buffer(uapi.vfio_iommu_spapr_tce_info())),
    "map": lambda container: container.map(0, IOVA, 4096),
    "unmap": lambda container: container.unmap(IOVA, 4096),
    "unregister": lambda container: container.unregister(0x10000, 0x10000),
    "eeh": lambda container: container.eeh(4),
    "enable": lambda container: container.enable(),
    "unknown": lambda container: container.ioctl(uapi.VFIO_GET_API_VERSION + 99),
}


@pytest.mark.parametrize("call", OWNING.values(), ids=OWNING.keys())
def test_call_that_takes_possession_does_so_even_if_it_fails(v2, shared, call):
    _, theirs = shared()
    assert call(v2) < 0
    assert belongs_to_another(theirs)
    assert not belongs_to_another(v2)


@pytest.mark.parametrize("call", NOT_OWNING.values(), ids=NOT_OWNING.keys())
def test_other_calls_do_not_take_possession(program, v2, shared, call):
    other, theirs = shared()
    call(v2)
    assert theirs.info().flags == 1
    memory = other.memory(other.page)
    assert theirs.register(memory.address, other.page) == 0
    assert belongs_to_another(v2)
    assert theirs.unregister(memory.address, other.page) == 0


def test_process_that_was_handed_the_files_can_be_the_owner(program, v2, shared):
    other, theirs = shared()
    memory = other.memory(4 * other.page)
    assert theirs.register(memory.address, memory.length) == 0
    assert theirs.map(memory.address, IOVA, memory.length) == 0
    assert other.locked > memory.length
    assert program.locked == 0
    assert belongs_to_another(v2)
    assert theirs.unmap(IOVA, memory.length) == 0
    assert theirs.unregister(memory.address, memory.length) == 0


def test_threads_of_the_owner_are_the_owner(program, v2, shared):
    memory = program.memory(4 * program.page)
    answers = []

    def in_a_thread(call, *arguments):
        worker = threading.Thread(target=lambda: answers.append(call(*arguments)))
        worker.start()
        worker.join()

    _, theirs = shared()
    in_a_thread(v2.register, memory.address, memory.length)
    assert v2.map(memory.address, IOVA, memory.length) == 0
    in_a_thread(v2.unmap, IOVA, memory.length)
    in_a_thread(v2.unregister, memory.address, memory.length)
    assert answers == [0, 0, 0]
    assert belongs_to_another(theirs)


def test_calls_of_the_core_are_everybodys(v2, shared, member):
    other, theirs = shared()
    assert v2.create(13, 1 << 30) == -errno.EINVAL
    assert theirs.ioctl(uapi.VFIO_GET_API_VERSION) == 0
    assert theirs.extension(V2) == 1
    assert theirs.set_iommu(V2) == -errno.EINVAL
    group = Group(other, other.take(other.backend.receive(v2.group.fd)))
    assert group.status() == 3
    assert group.device(member.address) >= 0


def test_owner_stays_after_its_process_has_gone_until_the_last_group_leaves(v2, shared, program):
    other, theirs = shared()
    memory = other.memory(other.page)
    assert theirs.register(memory.address, other.page) == 0
    other.backend.exit()
    assert belongs_to_another(v2)
    assert v2.group.unset_container() == 0
    assert v2.group.set_container(v2.fd) == 0
    assert v2.set_iommu(V2) == 0
    mine = program.memory(program.page)
    assert v2.register(mine.address, program.page) == 0


def test_anybody_with_the_group_takes_it_out(v2, shared, program):
    other, _ = shared()
    memory = program.memory(program.page)
    assert v2.register(memory.address, program.page) == 0
    assert program.locked == program.page
    group = Group(other, other.take(other.backend.receive(v2.group.fd)))
    assert group.unset_container() == 0
    assert program.locked == 0  # given back to who was charged
    assert v2.register(memory.address, program.page) == -errno.EINVAL


def test_enable_of_v1_takes_possession(program, member, shared):
    v1 = program.attached(member, V1)
    _, theirs = shared(v1)
    assert v1.disable() == 0
    assert theirs.disable() == 0
    assert v1.enable() == 0
    assert belongs_to_another(theirs)
    assert v1.disable() == 0
    assert belongs_to_another(theirs)


def test_refused_enable_of_v1_takes_possession(other_program, program, member, target):
    v1 = program.attached(member, V1)
    other = other_program(memlock=0, ipc_lock=False)
    theirs = v1.seen_by(other, other.backend.receive(v1.fd))
    assert theirs.enable() == -errno.ENOMEM
    assert belongs_to_another(v1)
