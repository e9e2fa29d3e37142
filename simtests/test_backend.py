"""The seam: choosing a backend, and the calls of the kernel backend that any Linux can answer."""

import errno
import fcntl
import mmap
import os
import subprocess
import sys
import termios

import pytest

from vfio import backend, errors, uapi
from vfio.backends import kernel


@pytest.fixture
def here():
    return backend.open_backend("kernel:")


def test_kernel_is_the_default(monkeypatch):
    monkeypatch.delenv("VFIO_BACKEND", raising=False)
    assert backend.open_backend().url == "kernel:"


def test_environment_names_the_backend(monkeypatch):
    monkeypatch.setenv("VFIO_BACKEND", "trace:kernel:")
    assert backend.open_backend().url == "trace:kernel:"
    assert backend.default() is backend.default()


@pytest.mark.parametrize("url", ["nonsense:", "kernel", "kernel:x", "trace:nonsense:"])
def test_unknown_url_is_refused(url):
    with pytest.raises(errors.NoSuchBackend) as caught:
        backend.open_backend(url)
    assert caught.value.errno == errno.EINVAL


def test_buffer_shorter_than_its_argsz_is_a_value_error_before_the_call(here):
    argument = bytearray(uapi.buffer(uapi.vfio_region_info()))
    with pytest.raises(ValueError, match="argsz is 32 but the buffer has only 31 bytes"):
        here.ioctl(-1, uapi.VFIO_DEVICE_GET_REGION_INFO, argument[:31])
    with pytest.raises(ValueError, match="argsz is 32"):
        here.prepare(-1, uapi.VFIO_DEVICE_GET_REGION_INFO, argument[:31])


def test_name_of_a_device_is_not_taken_for_an_argsz(here):
    with pytest.raises(OSError, match="Bad file descriptor"):
        here.ioctl(-1, uapi.VFIO_GROUP_GET_DEVICE_FD, bytearray(b"0000:01:00.0\0"))


def test_ioctl_fills_a_buffer_in_place(here):
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, b"abc")
        answer = bytearray(4)
        assert here.ioctl(read_end, termios.FIONREAD, answer) == 0
        assert int.from_bytes(answer, sys.byteorder) == 3
        prepared = here.prepare(read_end, termios.FIONREAD, answer[:0] + bytearray(4))
        assert prepared() == 0
    finally:
        os.close(read_end)
        os.close(write_end)


def test_integer_argument_goes_through_as_64_bits(here):
    read_end, write_end = os.pipe()
    memory = here.allocate(here.page_size)
    try:
        os.write(write_end, b"abcd")
        assert here.ioctl(read_end, termios.FIONREAD, memory.address) == 0
        assert int.from_bytes(memory.view[:4], sys.byteorder) == 4
        for bad in (1, (1 << 64) - 4096):
            with pytest.raises(OSError) as caught:  # noqa: PT011
                here.ioctl(read_end, termios.FIONREAD, bad)
            assert caught.value.errno == errno.EFAULT
    finally:
        memory.close()
        os.close(read_end)
        os.close(write_end)


def test_opened_files_are_closed_on_exec(here):
    fd = here.open("/dev/null", os.O_RDWR)
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    here.close(fd)


def test_memory_is_zeroed_aligned_and_shared_with_a_fork(here):
    with here.allocate(3 * here.page_size) as memory:
        assert memory.address % here.page_size == 0
        assert bytes(memory.view) == bytes(3 * here.page_size)
        pid = os.fork()
        if pid == 0:
            memory.view[0:5] = b"child"
            os._exit(0)
        os.waitpid(pid, 0)
        assert memory.view[0:5] == b"child"


def test_populate_refuses_what_is_not_there(here):
    with here.allocate(here.page_size) as memory:
        here.populate(memory.address, memory.length)
        gone = memory.address
    with pytest.raises(OSError) as caught:  # noqa: PT011
        here.populate(gone, here.page_size)
    assert caught.value.errno == errno.ENOMEM


def test_hugetlb_pages_of_a_size_that_no_machine_has_are_einval(here):
    with pytest.raises(OSError) as caught:  # noqa: PT011
        here.allocate(1 << 13, 1 << 13)
    assert caught.value.errno == errno.EINVAL


def test_locked_memory_is_what_the_kernel_accounts(here):
    code = (
        "import ctypes, resource; resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20));"
        "from vfio.backend import open_backend; b = open_backend('kernel:'); m = b.allocate(8 * b.page_size);"
        "assert ctypes.CDLL(None).mlock(ctypes.c_void_p(m.address), ctypes.c_size_t(m.length)) == 0;"
        "a = b.locked(); print(a.locked == 8 * b.page_size, a.limit)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", str(1 << 20)]


def test_mapping_reads_and_writes_with_the_width_that_was_asked_for(tmp_path, here):
    file = tmp_path / "bar"
    file.write_bytes(bytes(range(256)) * 16)
    fd = os.open(file, os.O_RDWR)
    try:
        mapping = here.mmap(fd, 4096, 0, mmap.PROT_READ | mmap.PROT_WRITE)
        assert isinstance(mapping, kernel.KernelMapping)
        assert mapping.load(8, 8) == int.from_bytes(bytes(range(8, 16)), sys.byteorder)
        mapping.store(4, 4, 0x01020304)
        view = mapping.view(4)
        assert view[1] == 0x01020304
        mapping.close()
        mapping.close()
        with pytest.raises(ValueError, match="released"):
            view[0]
    finally:
        os.close(fd)
    assert file.read_bytes()[4:8] == (0x01020304).to_bytes(4, sys.byteorder)


def test_import_needs_no_parser_no_command_and_little_else():
    code = "import sys, vfio; print(*sorted(set(sys.modules) & {'pycparser', 'cffi', 'click', 'rich', 'importlib.metadata'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
