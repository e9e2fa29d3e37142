"""The library on a Freescale PAMU, which the model alone has: the example of the request for comments, DMA, errors."""

from __future__ import annotations

import doctest
import errno
from collections.abc import Callable, Iterator

import pytest
from pamu_host import ADDRESS, MIB, p4080

import vfio
from vfio import selftest, topology
from vfio.drivers.edu import Edu
from vfio.fake.backend import FakeBackend
from vfio.iommu import pamu as pamu_module
from vfio.iommu.pamu import Geometry, Pamu, PamuError, Stash

WINDOW = 64 * MIB

# The table of the mail, with its placeholders for the physical addresses of the guest's memory.
TABLE = """
    0   0x00000000  0xX_XX000000  64MB
    1   0x04000000  0xX_XX000000  64MB
    2   0x08000000  0xX_XX000000  64MB
    3   0x0C000000  0xX_XX000000  64MB
    4   0x10000000  0xf_fe044000  4KB    // msi bank 1
    5   0x14000000  0xf_fe045000  4KB    // msi bank 2
    6   0x18000000  0xf_fe046000  4KB    // msi bank 3
    7            -             -  disabled
"""


@pytest.fixture
def backend() -> FakeBackend:
    return p4080()


@pytest.fixture
def device(backend: FakeBackend) -> Iterator[vfio.Device]:
    with vfio.open_device(ADDRESS, backend) as device:
        device.enable_bus_master()
        yield device
    assert backend.leaks() == []


@pytest.fixture
def pamu(device: vfio.Device) -> Pamu:
    """With the geometry of the example."""
    assert isinstance(device.iommu, Pamu)
    device.iommu.configure(512 * MIB, 8)
    return device.iommu


@pytest.fixture
def ram(backend: FakeBackend, pamu: Pamu) -> Iterator[vfio.DmaBuffer]:
    with vfio.DmaBuffer(256 * MIB, page_size=WINDOW, backend=backend) as buffer:
        yield buffer
        pamu.close()


@pytest.fixture
def guest(pamu: Pamu, ram: vfio.DmaBuffer) -> vfio.Dma:
    """The example: memory from IOVA 0 on, and the banks behind it."""
    dma = pamu.map(ram, 0)
    for index in range(3):
        pamu.map_msi_bank(index)
    return dma


# --- the example ---


def test_the_examples_of_the_docstrings_work() -> None:
    result = doctest.testmod(pamu_module)
    assert (result.failed, result.attempted > 10) == (0, True)


def test_the_windows_of_the_model_are_those_of_the_mails_table(
    backend: FakeBackend, guest: vfio.Dma, ram: vfio.DmaBuffer
) -> None:
    (container,) = backend.machine.vfio.containers
    windows = container.iommu.windows  # type: ignore[union-attr]
    for line in TABLE.strip().splitlines():
        number, iova, address, size = line.split()[:4]
        window = windows.get(int(number))
        if size == "disabled":
            assert window is None
            continue
        assert window.table.start == int(iova, 16)
        assert window.table.size == {"64MB": 64 * MIB, "4KB": 4096}[size]
        there = window.table.translate(window.table.start).address
        if "X" in address:
            assert there == ram.address + int(number) * WINDOW
        else:
            assert there == int(address.replace("_", ""), 16)
            assert window.bank is backend.machine.pamu.banks[int(line[-1]) - 1]  # type: ignore[union-attr]
    assert len(windows) == 7


# --- attributes ---


def test_it_is_chosen_by_itself(device: vfio.Device) -> None:
    assert isinstance(device.iommu, Pamu)
    assert "no kernel ever merged it" in device.iommu.name


def test_attributes_are_got_and_set(pamu: Pamu) -> None:
    assert (pamu.geometry, pamu.window_count, pamu.window_size) == (Geometry(0, 512 * MIB - 1), 8, WINDOW)
    assert pamu.stash == Stash(0, 0)
    pamu.stash = Stash(cpu=3, cache=2)
    assert pamu.stash == Stash(3, 2)
    pamu.geometry = Geometry(1 << 32, (1 << 32) + (1 << 30) - 1)
    pamu.window_count = 256
    assert (pamu.window_size, pamu.windows[1].number, len(pamu.windows)) == (4 * MIB, 1, 256)


def test_new_windows_drop_the_banks(pamu: Pamu) -> None:
    bank = pamu.map_msi_bank(0)
    pamu.window_count = 4
    assert not any(window.enabled for window in pamu.windows)
    bank.close()


# --- DMA ---


def test_a_device_reads_and_writes_through_the_windows(device: vfio.Device, guest: vfio.Dma) -> None:
    edu = Edu(device)
    for window in range(4):
        at = window * WINDOW
        guest[at : at + 6] = f"page {window}".encode()
        edu.load(guest.iova + at, 6)
        edu.store(guest.iova + at + WINDOW - 4096, 6)
        assert guest[at + WINDOW - 4096 : at + WINDOW - 4090] == f"page {window}".encode()


@pytest.mark.parametrize(
    "iova",
    [
        pytest.param(7 * WINDOW, id="a disabled window"),
        pytest.param(512 * MIB, id="behind the aperture"),
        pytest.param(0x10001000, id="behind the bank of a window"),
    ],
)
def test_dma_outside_goes_nowhere_and_is_noted(
    backend: FakeBackend, device: vfio.Device, guest: vfio.Dma, iova: int
) -> None:
    pci = backend.machine.device(ADDRESS)
    pci.dma_write(iova, b"astray")
    assert pci.dma_read(iova, 6) == bytes(6)
    assert pci.pe is not None
    assert [(fault.address, fault.write) for fault in pci.pe.dma_faults] == [(iova, True), (iova, False)]
    assert device.config.read32(0) == 0x11E81234


def test_a_window_that_may_only_be_read_is_not_written(
    backend: FakeBackend, device: vfio.Device, pamu: Pamu, ram: vfio.DmaBuffer
) -> None:
    dma = pamu.map(ram, write=False)
    dma[0:4] = b"kept"
    pci = backend.machine.device(ADDRESS)
    assert pci.dma_read(dma.iova, 4) == b"kept"
    pci.dma_write(dma.iova, b"lost")
    assert dma[0:4] == b"kept"


def test_after_unmap_it_is_out_of_reach(
    backend: FakeBackend, device: vfio.Device, pamu: Pamu, ram: vfio.DmaBuffer
) -> None:
    dma = pamu.map(ram)
    ram[0:4] = b"seen"
    pci = backend.machine.device(ADDRESS)
    assert pci.dma_read(dma.iova, 4) == b"seen"
    dma.close()
    assert (dma.mapped, pci.dma_read(dma.iova, 4)) == (False, bytes(4))


def test_without_an_iova_windows_behind_0_are_taken(pamu: Pamu, ram: vfio.DmaBuffer) -> None:
    with pamu.map(ram) as dma:
        assert dma.iova == WINDOW


def test_a_device_can_write_to_a_bank_that_is_mapped(
    backend: FakeBackend, device: vfio.Device, pamu: Pamu, guest: vfio.Dma
) -> None:
    backend.machine.device(ADDRESS).dma_write(0x14000140, b"\x05\0\0\0")
    assert backend.machine.pamu is not None
    assert [bank.written for bank in backend.machine.pamu.banks] == [[], [(0x140, b"\x05\0\0\0")], []]


def test_an_interrupt_needs_its_bank(
    device: vfio.Device, pamu: Pamu, ram: vfio.DmaBuffer, backend: FakeBackend
) -> None:
    edu = Edu(device)
    pamu.map(ram, 0)
    with device.msi.enable() as vector:
        edu.interrupt()
        with pytest.raises(vfio.errors.TimedOut):
            vector.wait(timeout=0)
        pe = backend.machine.device(ADDRESS).pe
        assert pe is not None
        assert pe.dma_faults[-1].reason == "no window maps the MSI bank of message 0"
        with pamu.map_msi_bank(0):
            edu.interrupt()
            assert vector.wait(timeout=1.0) == 1


def test_selftest_maps_windows_and_the_banks_that_its_interrupts_need(backend: FakeBackend) -> None:
    steps = list(selftest.steps(ADDRESS, backend))
    assert [(step.name, step.status) for step in steps] == [
        (name, "ok") for name in ("open", "device", "registers", "DMA", "INTx", "MSI", "nothing left")
    ]
    assert backend.leaks() == []


# --- errors ---


REFUSALS: dict[str, tuple[Callable[[Pamu, vfio.DmaBuffer], object], int, str]] = {
    "an aperture of three MiB": (lambda p, ram: p.configure(3 * MIB, 1), errno.EINVAL, "power of two"),
    "an aperture beyond the hardware": (
        lambda p, ram: p.configure(1 << 40, 8),
        errno.EINVAL,
        "cannot set the aperture",
    ),
    "three windows": (lambda p, ram: p.configure(512 * MIB, 3), errno.EINVAL, "power of two"),
    "512 windows": (lambda p, ram: p.configure(512 * MIB, 512), errno.EINVAL, "at most 256"),
    "a cache that there is not": (lambda p, ram: setattr(p, "stash", Stash(0, 9)), errno.EINVAL, "cache 9 of CPU 0"),
    "not whole windows": (lambda p, ram: p.map(ram, 4096), errno.EINVAL, "multiples of the windows of 64 MiB"),
    "outside the aperture": (lambda p, ram: p.map(ram, 512 * MIB), errno.EINVAL, "not inside the aperture"),
    "an enabled window": (lambda p, ram: (p.map_msi_bank(0, WINDOW), p.map(ram, 0)), errno.EBUSY, "is enabled"),
    "no room": (lambda p, ram: [p.map(ram) for _ in range(2)], errno.ENOSPC, "no 4 windows in a row are free"),
    "no rights": (lambda p, ram: p.map(ram, read=False, write=False), errno.EINVAL, "neither read nor write"),
    "memory in pieces": (
        lambda p, ram: p.map(vfio.MemoryRange(ram.address + 4096, WINDOW)),
        errno.EFAULT,
        "page_size=",
    ),
    "geometry while mapped": (lambda p, ram: (p.map(ram), p.configure(MIB, 1)), errno.EBUSY, "unmap them first"),
    "a bank that there is not": (lambda p, ram: p.map_msi_bank(3), errno.ENODEV, "there are 3, counted from 0"),
    "a bank in a taken window": (lambda p, ram: [p.map_msi_bank(0, 0) for _ in range(2)], errno.EBUSY, "is enabled"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_breaks_a_rule_is_refused_and_says_that_no_kernel_has_this(
    pamu: Pamu, ram: vfio.DmaBuffer, case: str
) -> None:
    call, number, words = REFUSALS[case]
    with pytest.raises(PamuError) as caught:
        call(pamu, ram)
    assert caught.value.errno == number
    assert words in str(caught.value)
    assert "no kernel ever merged VFIO for the PAMU: only the model, fake:p4080, speaks it" in str(caught.value)


def test_mapping_before_configure_says_what_to_do(device: vfio.Device, backend: FakeBackend) -> None:
    with vfio.DmaBuffer(4096, backend=backend) as buffer, pytest.raises(PamuError) as caught:
        device.iommu.map(buffer)
    assert (caught.value.errno, "configure(size, windows) first" in caught.value.remedy) == (errno.ENODEV, True)


def test_locked_memory_is_charged_and_its_limit_named() -> None:
    backend = p4080("?ipc_lock=0&memlock=65536")
    with vfio.open_device(ADDRESS, backend) as device, vfio.DmaBuffer(WINDOW, WINDOW, backend) as buffer:
        assert isinstance(device.iommu, Pamu)
        device.iommu.configure(512 * MIB, 8)
        with pytest.raises(PamuError, match="RLIMIT_MEMLOCK") as caught:
            device.iommu.map(buffer)
        assert caught.value.errno == errno.ENOMEM


def test_a_machine_without_it_says_that_it_is_only_modelled() -> None:
    backend = vfio.open_backend("fake:power8")
    backend.write_text("/sys/bus/pci/devices/0001:01:00.0/driver_override", "vfio-pci")
    backend.write_text("/sys/bus/pci/drivers_probe", "0001:01:00.0")
    with pytest.raises(vfio.VfioError, match="no kernel ever merged VFIO for the PAMU") as caught:
        vfio.open_device("0001:01:00.0", backend, Pamu)
    assert caught.value.errno == errno.ENODEV


@pytest.mark.parametrize(
    "case", ["an aperture beyond the hardware", "a cache that there is not", "a bank that there is not"]
)
def test_a_driver_that_returns_0_for_all_is_found_out(case: str) -> None:
    backend = p4080("?pamu_errno=0")
    with vfio.open_device(ADDRESS, backend) as device, vfio.DmaBuffer(WINDOW, WINDOW, backend) as buffer:
        assert isinstance(device.iommu, Pamu)
        call, number, _words = REFUSALS[case]
        with pytest.raises(PamuError) as caught:
            call(device.iommu, buffer)
        assert caught.value.errno == number


# --- the topology ---


def test_the_topology_has_the_banks_of_the_mail_and_says_where_it_is_from() -> None:
    machine = topology.load("p4080")
    assert machine.iommu.pamu == topology.Pamu(36, 256, (0xFFE044000, 0xFFE045000, 0xFFE046000), 8)
    assert "no kernel ever merged" in machine.description


@pytest.mark.parametrize(
    ("old", "new"), [("windows = 256", "windows = 100"), ("[0xf_fe04_4000,", '["x",'), ("aperture_bits", "bits")]
)
def test_a_pamu_against_the_rules_is_no_topology(old: str, new: str) -> None:
    source = (topology._PACKAGED / "p4080.toml").read_text(encoding="utf-8")
    with pytest.raises(topology.TopologyError):
        topology.parse(source.replace(old, new, 1))
