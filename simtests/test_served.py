"""A served machine and the programs that use it: who they are, what they share, and what is left of them."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import vfio
from simtests import kills
from simtests.conformance.forked import ForkedProcess
from simtests.conformance.processes import forked
from simtests.conformance.raw import V2, Member, Program, answer
from simtests.conformance.served import ServedMachine
from vfio import assign, errors, journal, uapi
from vfio.backends import remote, remote_url
from vfio.backends.remote import RemoteBackend

DEVICE = Member("0000:01:00.0", 0)
CONFIG = 7 << 40
NOBODY = 65534


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedMachine]:
    machine = ServedMachine("power8", tmp_path_factory.mktemp("served") / "socket")
    yield machine
    machine.end()


@pytest.fixture
def backend(machine: ServedMachine) -> Iterator[RemoteBackend]:
    """This process, on a fresh machine with a device on vfio-pci."""
    backend = machine.renew()
    backend.write_text(f"/sys/bus/pci/devices/{DEVICE.address}/driver_override", "vfio-pci")
    backend.write_text("/sys/bus/pci/drivers_probe", DEVICE.address)
    yield backend
    backend.exit()


@pytest.fixture
def program(backend: RemoteBackend) -> Iterator[Program]:
    program = Program(backend)
    yield program
    program.close_all()


@pytest.fixture
def another(backend: RemoteBackend) -> Iterator[Callable[..., ForkedProcess]]:
    """Starts other processes."""
    started: list[ForkedProcess] = []

    def start(**options: int) -> ForkedProcess:
        started.append(forked(backend, **options))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for each in started:
        each.exit()


def in_child(run: Callable[[], int]) -> int:
    """What `run` returns in a forked child; 99 for an exception."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = run()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


# --- URLs ---


@pytest.mark.parametrize(
    "options", ["uid=x", "uid=-1", "uid=4294967295", "memlock=1k", "ipc_lock=2", "color=red", "uid=1&uid=1", ""]
)
def test_bad_option_of_a_url_is_told_with_those_that_there_are(machine, options):
    with pytest.raises(errors.NoSuchBackend, match=r"uid=N|twice"):
        vfio.open_backend(f"unix:{machine.path}?{options}")


def test_path_is_quoted(tmp_path):
    url = remote_url.make("/run/a b?c%", 0)
    assert url == "unix:/run/a%20b%3Fc%25?uid=0"
    assert remote_url.parse(url) == remote_url.Address("/run/a b?c%", 0)


def test_nobody_there_says_how_to_start_a_server(tmp_path):
    for path in (tmp_path / "nothing", tmp_path / "file" / "below"):
        with pytest.raises(errors.NoServer, match=r"nobody serves at") as caught:
            vfio.open_backend(f"unix:{path}")
        assert f"vfio fake serve --detach --socket {path}" in caught.value.remedy


def test_backend_is_one_for_the_whole_process(machine, backend, program):
    again = vfio.open_backend(backend.url)
    assert again is backend
    other_url = remote.from_url(backend.url.partition("?")[0] + "?uid=0&memlock=8388608&ipc_lock=1")
    assert Program(other_url).attached(DEVICE, V2)
    assert other_url.locked() == backend.locked()


def test_number_that_no_call_takes_is_refused_before_it_is_sent(backend, program):
    device = program.attached(DEVICE, V2).group.device(DEVICE.address)
    with pytest.raises(OverflowError):
        backend.mmap(device, 1 << 70, 0, 3)
    with pytest.raises(OverflowError):
        backend.chmod(DEVICE.node, -(1 << 64))
    with pytest.raises(ValueError, match="16777216 are possible"):
        backend.write_text("/sys/bus/pci/rescan", "x" * (17 << 20))
    assert answer(backend.pread, device, -1, 0) == -errno.EINVAL
    assert program.ioctl(device, uapi.VFIO_GET_API_VERSION, (1 << 64) - 1) == -errno.ENOTTY
    assert backend.listdir("/dev/vfio") == ["vfio", "0"]


# --- who one is ---


def test_process_is_the_one_that_it_is(machine, backend):
    real = remote.from_url(remote_url.make(str(machine.path)))
    assert real.readlink("/proc/self") == str(os.getpid())
    assert f"Uid:\t{os.getuid()}\t" in real.read_text("/proc/self/status")
    assert real.read_text("/proc/self/cmdline") == Path("/proc/self/cmdline").read_text()
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    assert real.locked().limit == (None if soft == resource.RLIM_INFINITY else soft)
    real.exit()


def test_limit_is_the_processes_own_and_counts_as_it_is_at_the_call(machine, backend):
    def run() -> int:
        remote.leave()
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 22, 1 << 22))
        program = Program(remote.from_url(remote_url.make(str(machine.path)) + "?ipc_lock=0"))
        container, memory = program.attached(DEVICE, V2), program.memory(1 << 20)
        assert program.backend.locked().limit == 1 << 22
        assert container.register(memory.address, 1 << 20) == 0
        assert container.unregister(memory.address, 1 << 20) == 0
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, 1 << 16))
        assert container.register(memory.address, 1 << 20) == -errno.ENOMEM
        return 0

    assert in_child(run) == 0


def test_node_is_roots_until_it_is_given_away(backend, another):
    alice = another(uid=1000)
    assert answer(alice.open, DEVICE.node, os.O_RDWR) == -errno.EACCES
    assert answer(alice.chown, DEVICE.node, 1000, 1000) == -errno.EPERM
    backend.chown(DEVICE.node, 1000, 1000)
    group = alice.open(DEVICE.node, os.O_RDWR)
    alice.close(group)
    backend.chmod(DEVICE.node, 0)
    assert answer(alice.open, DEVICE.node, os.O_RDWR) == -errno.EACCES


def test_file_that_was_opened_stays_open_whatever_becomes_of_the_node(backend, another):
    alice = another(uid=1000)
    backend.chown(DEVICE.node, 1000, 1000)
    group = alice.open(DEVICE.node, os.O_RDWR)
    backend.chown(DEVICE.node, 0, 0)
    assert answer(alice.ioctl, group, uapi.VFIO_GROUP_UNSET_CONTAINER) == -errno.EINVAL


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be several users")
def test_server_of_a_user_serves_that_user_and_says_why_it_cannot_serve_root(request):
    directory = Path(tempfile.mkdtemp())  # which others can enter
    directory.chmod(0o755)
    request.addfinalizer(lambda: shutil.rmtree(directory))
    machine = ServedMachine("power8", directory / "socket", uid=NOBODY)
    machine.ask("renew")
    machine.path.chmod(0o666)
    with pytest.raises(errors.ServerRefused) as caught:
        remote.from_url(machine.url)
    assert caught.value.errno == errno.EPERM
    assert "process_vm_readv" in caught.value.why
    assert f"runs as uid 0, and the server as uid {NOBODY}" in caught.value.why

    def as_user(uid: int, dumpable: bool) -> Callable[[], int]:
        def run() -> int:
            remote.leave()
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            remote._libc.prctl(4, int(dumpable), 0, 0, 0)  # PR_SET_DUMPABLE
            try:
                return 0 if remote.from_url(machine.url).listdir("/dev") == ["kmsg", "vfio"] else 1
            except errors.ServerRefused as error:
                return 2 if "dumpable" in error.remedy and "ptrace_scope" in error.why else 3
            except errors.NoSuchBackend as error:
                return 4 if "owner and root alone" in error.why else 5

        return run

    assert in_child(as_user(NOBODY, dumpable=True)) == 0
    assert in_child(as_user(NOBODY, dumpable=False)) == 2
    assert in_child(as_user(1000, dumpable=True)) == 4
    machine.end()


# --- several threads and connections ---


def test_thread_that_waits_keeps_no_other_thread_waiting(backend, program, another):
    other = another()
    group = other.open(DEVICE.node, os.O_RDWR)
    container = other.open("/dev/vfio/vfio", os.O_RDWR)
    other.ioctl(group, uapi.VFIO_GROUP_SET_CONTAINER, bytearray(container.to_bytes(4, "little")))
    other.ioctl(container, uapi.VFIO_SET_IOMMU, V2)
    device = other.ioctl(group, uapi.VFIO_GROUP_GET_DEVICE_FD, bytearray(DEVICE.address.encode() + b"\0"))
    path = f"/sys/bus/pci/devices/{DEVICE.address}/driver"
    answers: list[object] = []
    worker = threading.Thread(
        target=lambda: answers.append(backend.write_text("/sys/bus/pci/drivers/vfio-pci/unbind", DEVICE.address))
    )
    worker.start()
    while backend.exists(path):
        pass
    for _ in range(20):
        assert backend.listdir("/dev") == ["kmsg", "vfio"]
    assert answers == []
    other.close(device)
    worker.join()
    assert answers == [None]


def test_program_that_is_killed_while_it_waits_is_gone_when_the_wait_ends(machine, backend, program, another):
    container = program.attached(DEVICE, V2)
    device = container.group.device(DEVICE.address)
    waiting = another()
    path = f"/sys/bus/pci/devices/{DEVICE.address}/driver"

    def wait() -> None:
        with suppress(EOFError, OSError):
            waiting.write_text("/sys/bus/pci/drivers/vfio-pci/unbind", DEVICE.address)

    thread = threading.Thread(target=wait)
    thread.start()
    while backend.exists(path):
        pass
    os.kill(waiting.pid, signal.SIGKILL)
    thread.join()
    assert pids(machine) == {os.getpid(), waiting.pid}  # as the kernel has it: it dies when its call has ended
    program.close(device)
    while pids(machine) != {os.getpid()}:
        pass
    assert not backend.exists(DEVICE.node)


def test_many_threads_of_a_program_get_their_own_answers(backend, program):
    fds = [program.container().fd for _ in range(8)]
    wrong: list[object] = []

    def work(fd: int) -> None:
        for number in range(60):
            link = backend.readlink(f"/proc/self/fd/{fd}")
            names = backend.listdir("/dev")
            version = backend.ioctl(fd, uapi.VFIO_CHECK_EXTENSION, V2 if number % 2 else 99)
            if (link, names, version) != ("/dev/vfio/vfio", ["kmsg", "vfio"], number % 2):
                wrong.append((link, names, version))

    threads = [threading.Thread(target=work, args=(fd,)) for fd in fds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_call_that_is_interrupted_leaves_the_program_usable(backend, another):
    other = another()
    Program(other).attached(DEVICE, V2).group.device(DEVICE.address)

    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(Interrupted):
            backend.write_text("/sys/bus/pci/drivers/vfio-pci/unbind", DEVICE.address)
    finally:
        signal.signal(signal.SIGALRM, before)
    for _ in range(3):
        assert backend.listdir("/dev") == ["kmsg", "vfio"]
    other.exit()
    while backend.exists(f"/sys/kernel/iommu_groups/{DEVICE.group}") and backend.exists(DEVICE.node):
        pass
    assert backend.readlink("/proc/self") == str(os.getpid())


def test_64_programs_at_once_get_their_own_answers(machine, backend):
    def run() -> int:
        remote.leave()
        mine = remote.from_url(machine.url)
        fd = mine.open("/dev/vfio/vfio", os.O_RDWR)
        memory = mine.allocate(mine.page_size)
        me = str(os.getpid())
        for number in range(25):
            if mine.readlink("/proc/self") != me or mine.ioctl(fd, uapi.VFIO_CHECK_EXTENSION, V2) != 1:
                return 1
            if mine.readlink(f"/proc/self/fd/{fd}") != "/dev/vfio/vfio" or number > 25:
                return 2
        memory.close()
        return 0

    children = []
    for _ in range(64):
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                status = run()
            finally:
                os._exit(status)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 64
    assert pids(machine) == {os.getpid()}


# --- programs that are started by others ---


def test_program_that_is_executed_uses_a_descriptor_that_it_was_given(machine, backend, program):
    group = program.group(DEVICE)
    script = (
        "import sys, vfio\n"
        "backend, fd = vfio.open_backend(sys.argv[1]), int(sys.argv[2])\n"
        "status = vfio.uapi.vfio_group_status()\n"
        "backend.ioctl(fd, vfio.uapi.VFIO_GROUP_GET_STATUS, vfio.uapi.buffer(status))\n"
        "print(status.flags, backend.readlink(f'/proc/self/fd/{fd}'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, machine.url, str(group.fd)],
        pass_fds=[group.fd],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("1 /dev/vfio/0\n", "")


def test_program_that_is_executed_inherits_nothing_that_it_was_not_given(backend, program):
    program.group(DEVICE)
    child = subprocess.Popen(["sleep", "60"])
    program.close_all()
    program.group(DEVICE)
    child.kill()
    child.wait()


def test_child_of_a_program_whose_server_has_ended_hears_of_it(tmp_path):
    machine = ServedMachine("power8", tmp_path / "socket")
    backend = machine.renew()
    machine.end()

    def run() -> int:
        try:
            backend.listdir("/dev")
        except errors.ServerGone:
            return 7
        return 0

    assert in_child(run) == 7


# --- what is left ---


def test_killed_in_the_middle_of_anything_nothing_is_left(machine):
    assert kills.storm(machine, 60, seed=3) == []
    again = remote.from_url(machine.url)
    assert again.listdir("/dev/vfio")[0] == "vfio"
    again.exit()


def test_reset_of_a_pe_outlives_the_program_that_began_it(machine, backend, another):
    other = another()
    container = Program(other).attached(DEVICE, V2)
    assert container.group.device(DEVICE.address) >= 0
    assert container.eeh(uapi.VFIO_EEH_PE_ENABLE) == 0
    assert container.eeh(uapi.VFIO_EEH_PE_RESET_HOT) == 0
    other.kill()
    program = Program(backend)
    again = program.attached(DEVICE, V2)
    assert again.group.device(DEVICE.address) == -errno.ENODEV
    assert again.eeh(uapi.VFIO_EEH_PE_RESET_DEACTIVATE) == 0
    assert again.group.device(DEVICE.address) >= 0
    program.close_all()


def test_memory_of_a_program_that_has_ended_is_out_of_the_devices_reach(machine, backend, program, another):
    other = another()
    container = Program(other).attached(DEVICE, V2)
    memory = other.allocate(4096)
    assert container.register(memory.address, 4096) == 0
    assert container.map(memory.address, 0x100000, 4096) == 0
    device = program.take(other.give(container.group.device(DEVICE.address)))
    other.kill()
    backend.pwrite(device, b"\x06\x00", CONFIG + 4)
    for register, value in ((0x80, 0x100000), (0x88, 0x40000), (0x90, 16), (0x98, 1)):
        backend.pwrite(device, value.to_bytes(8, "little"), register)
    assert pids(machine) == {os.getpid()}


# --- memory of a device ---


MEMORY_DEVICE = """
[[phb.device]]
address = "0000:02:00.0"
vendor = 0x1af4
device = 0x1110
class = 0x050000
group = 9
pe = 9
model = "ivshmem-plain"
"""


@pytest.fixture
def memory_machine(tmp_path: Path) -> Iterator[RemoteBackend]:
    """A machine with a device that is nothing but memory."""
    from vfio import topology

    text = (Path(topology.__file__).parent / "topologies" / "document.toml").read_text()
    file = tmp_path / "host.toml"
    file.write_text(text + MEMORY_DEVICE)
    machine = ServedMachine(str(file), tmp_path / "socket")
    backend = machine.renew()
    backend.write_text("/sys/bus/pci/devices/0000:02:00.0/driver_override", "vfio-pci")
    backend.write_text("/sys/bus/pci/drivers_probe", "0000:02:00.0")
    yield backend
    backend.exit()
    machine.end()


def test_bar_of_plain_memory_is_the_same_memory_for_every_program(memory_machine):
    program = Program(memory_machine)
    device = program.attached(Member("0000:02:00.0", 9), V2).group.device("0000:02:00.0")
    memory_machine.pwrite(device, b"\x02\x00", CONFIG + 4)
    mapping = program.mmap(device, 1 << 20, 2 << 40)
    view = mapping.view(4)
    assert view is not None
    assert len(view) == 1 << 18
    view[0] = 0x12345678
    assert mapping.load(0, 4) == 0x12345678
    assert memory_machine.pread(device, 4, 2 << 40) == (0x12345678).to_bytes(4, sys.byteorder)
    mapping.store(8, 8, 0xFEDC)
    assert mapping.view(8)[1] == 0xFEDC

    def run() -> int:
        view[1] = 77  # a child has the mapping of its parent
        return 0

    assert in_child(run) == 0
    assert mapping.load(4, 4) == 77
    part = program.mmap(device, 4096, (2 << 40) + 4096, 1)
    view[1024] = 5
    assert part.view(4)[0] == 5
    with pytest.raises(TypeError):
        part.view(4)[0] = 6
    part.close()
    mapping.close()
    assert mapping.view(4) is None
    program.close_all()


def test_registers_have_no_view(backend, program):
    device = program.attached(DEVICE, V2).group.device(DEVICE.address)
    assert program.mmap(device, 4096, 0).view(4) is None


# --- the end of the server ---


def test_program_whose_server_has_ended_is_told_and_can_go_on_with_the_next_one(tmp_path):
    machine = ServedMachine("power8", tmp_path / "socket")
    backend = machine.renew()
    fd = backend.open("/dev/vfio/vfio", os.O_RDWR)
    boot = backend.read_text("/proc/sys/kernel/random/boot_id")
    machine.end()
    for call in (lambda: backend.listdir("/dev"), lambda: backend.ioctl(fd, uapi.VFIO_GET_API_VERSION)):
        with pytest.raises(errors.ServerGone, match="is gone") as caught:
            call()
        assert caught.value.errno == errno.ENOTCONN
        assert "vfio fake serve" in caught.value.remedy
    os.close(fd)
    machine.path.unlink()
    second = ServedMachine("power8", machine.path)
    fresh = second.renew()
    assert fresh is not backend
    assert fresh.listdir("/dev") == ["kmsg", "vfio"]
    assert fresh.read_text("/proc/sys/kernel/random/boot_id") != boot
    second.end()


def test_journal_of_an_earlier_machine_is_ignored(machine, backend):
    assign.bind([DEVICE.address], user="1000", backend=backend)
    assert journal.load(backend).nodes
    fresh = machine.renew()
    assert not journal.load(fresh).nodes


# --- status ---


def test_status_tells_who_is_there_and_what_they_hold(machine, backend, program):
    container = program.attached(DEVICE, V2)
    memory = program.memory(1 << 16)
    assert container.register(memory.address, 1 << 16) == 0
    found = remote.status(str(machine.path))
    assert found["pid"] == machine.pid
    assert found["machine"] == {"platform": "PowerNV", "cpu": "POWER8", "page_size": 4096, "kernel": "6.12"}
    (client,) = found["clients"]
    assert (client["pid"], client["uid"], client["locked"]) == (os.getpid(), 0, 1 << 16)
    assert client["files"] == {str(container.fd): "/dev/vfio/vfio", str(container.group.fd): "/dev/vfio/0"}
    assert found["open_files"] == 2
    assert found["locked"] == 1 << 16
    assert found["bindings"] == [{"address": DEVICE.address, "driver": "vfio-pci", "group": 0}]
    assert found["nodes"] == [{"path": "/dev/vfio/0", "uid": 0, "gid": 0, "mode": "0600"}]
    assert found["containers"][0]["groups"] == [0]


def pids(machine: ServedMachine) -> set[int]:
    return {client["pid"] for client in remote.status(str(machine.path))["clients"]}
