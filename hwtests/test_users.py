"""What another user, or another program, meets on a real kernel."""

import errno
import os
import subprocess
import sys

import pytest

import vfio
from hwtests.devices import bound
from vfio import holders, sysfs


@pytest.mark.lab_only
def test_locked_memory_limit_refuses_enable(backend, device_address, as_alice):
    code = f"""
import resource, vfio
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
with vfio.open_device({device_address!r}, model=vfio.SpaprTce) as device:
    try: device.iommu.enable()
    except OSError as error: print(type(error).__name__, error.errno)
"""
    with bound(backend, device_address, user="alice"):
        assert as_alice(code) == f"LockedMemoryLimit {errno.ENOMEM}\n"


def test_user_without_the_node_is_told_who_owns_it_and_what_changes_that(backend, bound_address, as_alice):
    answer = as_alice(
        f"import vfio\ntry: vfio.open_device({bound_address!r})\nexcept OSError as e: print(type(e).__name__, e.errno); print(e)"
    )
    assert answer.startswith(f"AccessDenied {errno.EACCES}\n")
    assert "root:root with mode 0600" in answer
    assert "chown alice /dev/vfio/" in answer


def test_user_who_was_given_the_node_opens_the_device(backend, device_address, as_alice):
    with bound(backend, device_address, user="alice"):
        answer = as_alice(
            f"import vfio\nwith vfio.open_device({device_address!r}) as d: print(hex(d.config.read16(0)))"
        )
    assert answer == "0x1234\n"


def test_locked_memory_limit_is_reported_with_figures_and_remedies(backend, device_address, as_alice):
    code = f"""
import resource, vfio
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
with vfio.open_device({device_address!r}) as device:
    iommu = device.iommu
    for attempt in (lambda: iommu.register(vfio.DmaBuffer(2 << 20)), lambda: iommu.create_window(1 << 30, 4096)):
        try: attempt()
        except OSError as e: print(type(e).__name__, e.errno, "ulimit -l" in str(e), "LimitMEMLOCK=" in str(e))
    print(device.backend.locked().locked)
"""
    with bound(backend, device_address, user="alice"):
        answer = as_alice(code).splitlines()
    assert answer == [f"LockedMemoryLimit {errno.ENOMEM} True True"] * 2 + ["0"]


def test_container_of_another_process_refuses_with_eperm(device):
    container = device.group.container
    with device.iommu.map(vfio.DmaBuffer(1 << 16)):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                container.iommu.map(vfio.DmaBuffer(1 << 16))
            except OSError as error:
                os.write(writer, str(error.errno).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        os.close(writer)
        assert os.read(reader, 10) == str(errno.EPERM).encode()
        os.close(reader)


def test_holders_are_found_by_another_process(backend, bound_address):
    number = sysfs.group_of(backend, bound_address)
    with vfio.Group(number, backend):
        code = f"import vfio; print(vfio.holders.of(vfio.open_backend(), '/dev/vfio/{number}')[0].pid)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert int(done.stdout) == os.getpid()
    assert holders.of(backend, f"/dev/vfio/{number}") == []
