"""Groups without an IOMMU: /dev/vfio/noiommu-N."""

import errno

import pytest
from click.testing import CliRunner
from vfio_cli.main import cli

import vfio
import vfio.drivers.edu
from simtests.conformance.raw import Group, Member, Program
from vfio import errors, topology, uapi
from vfio.fake.backend import FakeBackend
from vfio.fake.machine import Machine
from vfio.fake.process import Process
from vfio.iommu.noiommu import NoIommu, UnsafeWarning

BARE, WITH_IOMMU = "0000:00:04.0", "0000:00:05.0"


@pytest.fixture
def backend(tmp_path):
    """A PC on which one device, BARE, has no IOMMU."""
    source = (topology._PACKAGED / "x86.toml").read_text().replace("group = 1\n", "", 1)
    machine = Machine(topology.parse(source))
    backend = FakeBackend(machine, Process(machine))
    yield backend
    assert machine.leaks() == []


def bind(backend, *addresses):
    for address in addresses:
        backend.write_text(f"/sys/bus/pci/devices/{address}/driver_override", "vfio-pci\n")
        backend.write_text("/sys/bus/pci/drivers/vfio-pci/bind", address)


@pytest.fixture
def bare(backend):
    """The device on vfio-pci, in its group; root has allowed it."""
    backend.machine.vfio.noiommu = True
    bind(backend, BARE, WITH_IOMMU)
    return backend.machine.device(BARE).group.number


def test_device_without_an_iommu_does_not_bind_unless_root_allows_it(backend):
    with pytest.raises(OSError, match="Invalid argument") as caught:
        bind(backend, BARE)
    assert caught.value.errno == errno.EINVAL
    assert backend.listdir("/dev/vfio") == ["vfio"]


def test_node_says_that_there_is_no_iommu_and_goes_with_the_driver(backend, bare):
    assert f"noiommu-{bare}" in backend.listdir("/dev/vfio")
    assert backend.read_text(f"/sys/kernel/iommu_groups/{bare}/name") == "vfio-noiommu\n"
    backend.write_text("/sys/bus/pci/drivers/vfio-pci/unbind", BARE)
    assert f"noiommu-{bare}" not in backend.listdir("/dev/vfio")
    assert not backend.exists(f"/sys/kernel/iommu_groups/{bare}")


def test_opening_warns_of_what_the_device_can_reach(backend, bare):
    with pytest.warns(UnsafeWarning, match="can read and write all memory of the host"):
        device = vfio.open_device(BARE, backend)
    with device:
        assert type(device.iommu) is NoIommu
        assert vfio.drivers.edu.Edu(device).invert(0) == 0xFFFF_FFFF


def test_protected_group_opens_without_a_warning(backend, bare, recwarn):
    with vfio.open_device(WITH_IOMMU, backend) as device:
        assert device.iommu.name == "Type1v2"
        assert not device.group.unprotected
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore::vfio.iommu.noiommu.UnsafeWarning")
def test_nothing_can_be_mapped(backend, bare):
    with vfio.open_device(BARE, backend) as device, vfio.DmaBuffer(4096, backend=backend) as buffer:
        with pytest.raises(errors.CallFailed, match="physical addresses") as caught:
            device.iommu.map(buffer)
        assert caught.value.errno == errno.ENOTTY


def test_user_without_cap_sys_rawio_gets_eperm(backend, bare):
    node = f"/dev/vfio/noiommu-{bare}"
    backend.chmod(node, 0o666)
    other = backend.another_process(uid=1000)
    with pytest.raises(errors.CallFailed, match="CAP_SYS_RAWIO") as caught:
        vfio.Group(bare, other)
    assert caught.value.errno == errno.EPERM


def test_container_takes_one_kind_of_group_and_its_driver_alone(backend, bare):
    program = Program(backend)
    protected = backend.machine.device(WITH_IOMMU).group.number
    container, group = program.container(), Group(program, program.open(f"/dev/vfio/noiommu-{bare}"))
    assert [container.extension(n) for n in (uapi.VFIO_TYPE1_IOMMU, uapi.VFIO_NOIOMMU_IOMMU)] == [1, 1]
    assert group.set_container(container.fd) == 0
    assert [container.extension(n) for n in (uapi.VFIO_TYPE1_IOMMU, uapi.VFIO_NOIOMMU_IOMMU)] == [0, 1]
    assert program.group(Member(WITH_IOMMU, protected)).set_container(container.fd) == -errno.EPERM
    assert container.set_iommu(uapi.VFIO_TYPE1_IOMMU) == -errno.ENODEV
    assert container.set_iommu(uapi.VFIO_NOIOMMU_IOMMU) == 0
    assert container.map(0x1000, 0, 4096) == -errno.ENOTTY
    program.close_all()


# --- for whoever looks at it from outside ---


def run(backend, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vfio.backend.open_backend", lambda url=None: backend)
        return CliRunner().invoke(cli, words, prog_name="vfio")


def test_user_without_rights_is_told_whose_the_node_is(backend, bare):
    alice = backend.another_process(uid=1000)
    with pytest.raises(errors.AccessDenied, match=f"/dev/vfio/noiommu-{bare}"):
        vfio.Group(bare, alice)


def test_node_is_given_away_and_restored_by_its_own_name(backend, bare, state_dir):
    node = f"/dev/vfio/noiommu-{bare}"
    result = run(backend, "bind", BARE, "--user", "1234")
    assert (result.exit_code, result.stdout) == (0, f"{node}: belongs to 1234:root, mode 0600\n")
    assert backend.stat(node).uid == 1234
    assert f"{node}, 1234:root 0600" in run(backend, "show", BARE).stdout
    assert run(backend, "restore", "--all").exit_code == 0
    assert backend.stat(node).uid == 0


def test_why_warns_before_the_device_is_opened(backend, bare):
    result = run(backend, "why", BARE)
    assert (result.exit_code, result.stdout) == (0, f"{BARE} is ready to be opened by root (uid 0)\n")
    assert result.stderr.startswith(f"vfio: group {bare} has no IOMMU (/dev/vfio/noiommu-{bare}): its device can read")
    assert run(backend, "why", WITH_IOMMU).stderr == ""


@pytest.mark.filterwarnings("ignore::vfio.iommu.noiommu.UnsafeWarning")
def test_groups_that_do_not_mix_are_told_apart(backend, bare):
    with vfio.Container(backend) as container, vfio.Group(bare, backend) as alone, vfio.Group(2, backend) as protected:
        for first, second in ((alone, protected), (protected, alone)):
            container.attach(first)
            with pytest.raises(errors.CallFailed, match="with an IOMMU and groups without one") as caught:
                container.attach(second)
            assert caught.value.errno == errno.EPERM
            container.detach(first)
