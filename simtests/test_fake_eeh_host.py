"""The host of the model recovers PEs that nobody has open, on its virtual clock; and its log."""

from __future__ import annotations

import errno
import os

import pytest

from simtests.fake_pci import refused
from vfio.backend import open_backend
from vfio.fake.backend import FakeBackend
from vfio.fake.kernel_error import KernelWouldBlock

EDU, BESIDE, NVME, BRIDGE = "0001:01:00.0", "0000:01:00.0", "0002:01:00.0", "0001:00:00.0"
SECONDS = 20
"""Long enough for any recovery."""


@pytest.fixture
def backend() -> FakeBackend:
    opened = open_backend("fake:power9")
    assert isinstance(opened, FakeBackend)
    return opened


def bind(backend: FakeBackend, address: str) -> None:
    backend.write_text(f"/sys/bus/pci/devices/{address}/driver_override", "vfio-pci\n")
    backend.write_text("/sys/bus/pci/drivers_probe", address)


def said(backend: FakeBackend, words: str) -> int:
    return sum(words in line for line in backend.machine.log.text.splitlines())


def test_pe_on_vfio_pci_is_thawed_and_its_device_stays(backend):
    bind(backend, EDU)
    before = backend.machine.device(EDU)
    backend.machine.eeh.freeze(EDU)
    assert said(backend, "EEH:") == 0
    backend.machine.clock.advance(0.1)
    assert backend.machine.eeh.of(EDU).freeze == "none"
    assert backend.machine.device(EDU) is before
    assert said(backend, "vfio-pci driver reports: 'can recover'") == 1
    assert said(backend, "EEH: Recovery successful.") == 1


def test_device_without_a_driver_is_removed_and_found_again(backend):
    override = f"/sys/bus/pci/devices/{EDU}/driver_override"
    backend.write_text(override, "vfio-pci\n")  # and not probed
    backend.machine.eeh.freeze(EDU)
    backend.machine.clock.advance(1)
    assert not backend.exists(f"/sys/bus/pci/devices/{EDU}")
    backend.machine.clock.advance(SECONDS)
    assert backend.read_text(override) == "(null)\n"  # it is another device
    assert backend.read_text(f"/sys/bus/pci/devices/{EDU}/eeh_pe_state") == "0x00000078 0x00000800\n"
    assert backend.machine.eeh.of(EDU).freeze_count == 1


def test_device_of_a_driver_that_knows_resets_keeps_it(backend):
    backend.machine.driver_core.load("nvme")
    before = backend.machine.device(NVME)
    backend.machine.eeh.freeze(NVME)
    backend.machine.clock.advance(1)
    assert backend.read_text(f"/sys/bus/pci/devices/{NVME}/eeh_pe_state") == "0x00000078 0x0000090f\n"
    backend.machine.clock.advance(SECONDS)
    assert backend.machine.device(NVME) is before
    assert before.driver == "nvme"
    assert backend.machine.eeh.of(NVME).freeze == "none"
    assert said(backend, "'recovered'") == 1


def test_one_driver_that_can_recover_is_enough_for_the_pe(backend):
    bind(backend, BESIDE)
    backend.machine.eeh.freeze(BESIDE)
    backend.machine.clock.advance(0.1)
    assert backend.machine.eeh.of(BESIDE).freeze == "none"
    assert said(backend, "no driver") == 3  # its neighbour, asked three times


def test_pe_that_fails_too_often_within_an_hour_is_given_up(backend):
    bind(backend, EDU)
    for _ in range(5):
        backend.machine.eeh.freeze(EDU)
        backend.machine.clock.advance(60)
    assert backend.machine.eeh.of(EDU).freeze_count == 5
    backend.machine.eeh.freeze(EDU)
    backend.machine.clock.advance(60)
    assert said(backend, "has failed 6 times in the last hour and has been permanently disabled.") == 1
    assert EDU not in backend.listdir("/sys/bus/pci/devices")
    assert backend.listdir("/dev/vfio") == ["vfio"]
    backend.write_text("/sys/bus/pci/rescan", "1")
    assert EDU not in backend.listdir("/sys/bus/pci/devices")


def test_freezes_are_forgotten_after_an_hour(backend):
    bind(backend, EDU)
    for _ in range(20):
        backend.machine.eeh.freeze(EDU)
        backend.machine.clock.advance(1000)
    assert backend.machine.eeh.of(EDU).freeze == "none"
    assert said(backend, "permanently") == 0


def test_limit_can_be_changed(backend):
    bind(backend, EDU)
    backend.write_text("/sys/kernel/debug/powerpc/eeh_max_freezes", "1000\n")
    assert backend.read_text("/sys/kernel/debug/powerpc/eeh_max_freezes") == "1000\n"
    for _ in range(1000):
        backend.machine.eeh.freeze(EDU)
        backend.machine.clock.advance(0.5)
    assert backend.machine.eeh.of(EDU).freeze_count == 1000
    assert backend.machine.eeh.of(EDU).freeze == "none"


def test_frozen_bridge_takes_what_is_below_through_its_recovery(backend):
    backend.machine.eeh.freeze(BRIDGE)
    backend.machine.clock.advance(SECONDS)
    assert {BRIDGE, EDU} <= set(backend.listdir("/sys/bus/pci/devices"))
    assert backend.machine.eeh.of(EDU).parent is backend.machine.eeh.of(BRIDGE)
    assert backend.machine.eeh.of(BRIDGE).freeze == "none"


def test_frozen_pe_below_a_frozen_bridge_is_recovered_with_it(backend):
    bind(backend, EDU)
    backend.machine.eeh.of(BRIDGE).freeze = "both"
    backend.machine.eeh.freeze(EDU)
    backend.machine.clock.advance(SECONDS)
    assert said(backend, "Recovering PHB#1-PE#fe") == 1
    assert [backend.machine.eeh.of(each).freeze for each in (BRIDGE, EDU)] == ["none", "none"]


def test_two_freezes_are_handled_one_after_the_other(backend):
    backend.machine.eeh.freeze(EDU)
    backend.machine.eeh.freeze(NVME)
    backend.machine.clock.advance(1)
    assert said(backend, "Recovering") == 1
    backend.machine.clock.advance(2 * SECONDS)
    assert said(backend, "Recovery successful") == 2


def test_pe_of_a_bridge_shows_its_state_too(backend):
    backend.machine.eeh.of(BRIDGE).freeze = "both"
    assert backend.read_text(f"/sys/bus/pci/devices/{BRIDGE}/eeh_pe_state") == "0x00000000 0x00000801\n"


def test_thaw_forgets_a_freeze(backend):
    backend.machine.eeh.freeze(EDU)
    backend.read_text(f"/sys/bus/pci/devices/{EDU}/eeh_pe_state")
    backend.machine.eeh.thaw(EDU)
    backend.machine.clock.advance(SECONDS)
    assert backend.machine.log.text == ""
    assert backend.read_text(f"/sys/bus/pci/devices/{EDU}/eeh_pe_state") == "0x00000078 0x00000800\n"


def test_device_without_a_pe_cannot_be_frozen():
    backend = open_backend("fake:document")
    assert isinstance(backend, FakeBackend)
    with pytest.raises(KeyError):
        backend.machine.eeh.freeze("ffff:00:00.0")


# --- debugfs ---


@pytest.mark.parametrize(
    ("file", "text", "number"),
    [
        ("eeh_dev_check", "nonsense", errno.EINVAL),
        ("eeh_dev_check", "0009:01:00.0", errno.ENODEV),
        ("eeh_force_recover", "1", errno.EINVAL),
        ("eeh_force_recover", "1:77", errno.ENODEV),
        ("eeh_max_freezes", "many", errno.EINVAL),
    ],
)
def test_debugfs_refuses_what_it_cannot_understand(backend, file, text, number):
    with refused(number):
        backend.write_text(f"/sys/kernel/debug/powerpc/{file}", text)


def test_debugfs_is_roots(backend):
    alice = backend.another_process(uid=1000)
    with refused(errno.EACCES):
        alice.read_text("/sys/kernel/debug/powerpc/eeh_max_freezes")


# --- the log ---


def test_kmsg_gives_a_record_a_read_and_ends_with_eagain(backend):
    log = backend.machine.log
    log.write(3, "one")
    backend.machine.clock.advance(1.5)
    log.write(6, "two")
    fd = backend.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    assert [backend.pread(fd, 8192, 0) for _ in range(2)] == [b"3,0,0,-;one\n", b"6,1,1500000,-;two\n"]
    for _ in range(2):
        with refused(errno.EAGAIN):
            backend.pread(fd, 8192, 0)
    log.write(4, "lost")
    log.write(4, "three")
    with refused(errno.EINVAL):
        backend.pread(fd, 4, 0)
    assert backend.pread(fd, 8192, 0) == b"4,3,1500000,-;three\n"
    backend.close(fd)


def test_kmsg_says_once_that_records_were_lost(backend):
    log = backend.machine.log
    log.write(6, "first")
    fd = backend.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    for number in range(5000):
        log.write(6, f"{number}")
    with refused(errno.EPIPE):
        backend.pread(fd, 8192, 0)
    assert backend.pread(fd, 8192, 0).endswith(b";1000\n")
    backend.close(fd)


def test_kmsg_is_roots_and_a_blocking_read_would_wait(backend):
    with refused(errno.EPERM):
        backend.another_process(uid=1000).open("/dev/kmsg", os.O_RDONLY)
    fd = backend.open("/dev/kmsg", os.O_RDONLY)
    with pytest.raises(KernelWouldBlock):
        backend.pread(fd, 8192, 0)
    backend.close(fd)
