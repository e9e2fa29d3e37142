"""POWER7, whose IODA1 bridges have no Dynamic DMA Windows: v1 by itself, and errors that name the platform."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from vfio_cli.main import cli

import vfio
from vfio import selftest, topology
from vfio.drivers.edu import Edu
from vfio.fake.backend import FakeBackend

ADDRESS = "0000:03:00.0"
NAME = r"POWER7 \(PowerNV, IODA1\)"


def bound(url: str, address: str) -> FakeBackend:
    backend = vfio.open_backend(url)
    assert isinstance(backend, FakeBackend)
    backend.write_text(f"/sys/bus/pci/devices/{address}/driver_override", "vfio-pci")
    backend.write_text("/sys/bus/pci/drivers_probe", address)
    return backend


@pytest.fixture
def backend() -> FakeBackend:
    return bound("fake:power7", ADDRESS)


@pytest.fixture
def v1(backend: FakeBackend) -> Iterator[vfio.SpaprTce]:
    with vfio.open_device(ADDRESS, backend) as device:
        assert isinstance(device.iommu, vfio.SpaprTce)
        yield device.iommu
    assert backend.leaks() == []


def test_opening_falls_back_to_v1_and_says_why(v1: vfio.SpaprTce) -> None:
    (why,) = v1.passed_over
    assert why.startswith("cannot set IOMMU model sPAPR TCE v2: POWER7 (PowerNV, IODA1) has no Dynamic DMA Windows")


def test_the_fallback_is_logged(backend: FakeBackend, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vfio"), vfio.open_device(ADDRESS, backend):
        pass
    (record,) = caplog.records
    assert record.getMessage().startswith("sPAPR TCE v1 is used: cannot set IOMMU model sPAPR TCE v2: POWER7")


def test_where_v2_works_nothing_was_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    power8 = bound("fake:power8", "0001:01:00.0")
    with caplog.at_level(logging.INFO, "vfio"), vfio.open_device("0001:01:00.0", power8) as device:
        assert (device.iommu.name, device.iommu.passed_over) == ("sPAPR TCE v2", ())
    assert caplog.records == []


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(lambda iommu: iommu.create_window(1 << 30), id="create a window"),
        pytest.param(lambda iommu: iommu.create_window(1 << 36, 1 << 16, 2), id="create a large window"),
        pytest.param(lambda iommu: iommu.register(vfio.MemoryRange(1 << 20, 4096)), id="register memory"),
        pytest.param(lambda iommu: iommu.windows[0].close(), id="remove the window"),
    ],
)
def test_what_needs_a_dynamic_window_names_the_platform(
    v1: vfio.SpaprTce, ask: Callable[[vfio.SpaprTce], object]
) -> None:
    with pytest.raises(vfio.VfioError, match=f"{NAME} has no Dynamic DMA Windows") as caught:
        ask(v1)
    assert caught.value.errno == errno.ENOTTY
    assert len(v1.windows) == 1


def test_asking_for_v2_by_name_names_the_platform_and_what_works(backend: FakeBackend) -> None:
    with pytest.raises(vfio.VfioError, match=f"{NAME} has no Dynamic DMA Windows") as caught:
        vfio.open_device(ADDRESS, backend, vfio.SpaprTceV2)
    assert (caught.value.errno, caught.value.remedy) == (errno.EINVAL, "use v1: vfio.SpaprTce")
    assert backend.leaks() == []


def test_v1_by_name_names_the_platform_as_well(backend: FakeBackend) -> None:
    with vfio.open_device(ADDRESS, backend, vfio.SpaprTce) as device:
        assert isinstance(device.iommu, vfio.SpaprTce)
        with pytest.raises(vfio.VfioError, match=NAME):
            device.iommu.create_window(1 << 30)


def test_v1_by_choice_on_power8_points_to_v2() -> None:
    backend = bound("fake:power8", "0001:01:00.0")
    with vfio.open_device("0001:01:00.0", backend, vfio.SpaprTce) as device:
        assert isinstance(device.iommu, vfio.SpaprTce)
        with pytest.raises(vfio.VfioError, match=r"v1 has the one window of POWER8 \(PowerNV\)") as caught:
            device.iommu.create_window(1 << 30)
        assert (caught.value.errno, caught.value.remedy) == (errno.ENOTTY, "use v2")


def test_the_selftest_says_in_one_line_why_it_is_v1(backend: FakeBackend) -> None:
    first = next(selftest.steps(ADDRESS, backend))
    assert first.detail.startswith("group 0, sPAPR TCE v1, as nothing better works: ")
    assert first.detail.endswith("POWER7 (PowerNV, IODA1) has no Dynamic DMA Windows [EINVAL]")


def test_a_device_does_dma_in_the_one_window(backend: FakeBackend) -> None:
    with vfio.open_device(ADDRESS, backend) as device:
        device.enable_bus_master()
        edu = Edu(device)
        with vfio.DmaBuffer(8192, backend=backend) as buffer, device.iommu.map(buffer) as dma:
            dma[0:5] = b"POWER"
            edu.load(dma.iova, 5)
            edu.store(dma.iova + 4096, 5)
            assert dma[4096:4101] == b"POWER"


def test_the_command_names_the_platform_for_a_disk(tmp_path: Path) -> None:
    source = (Path(topology.__file__).parent / "topologies" / "power7.toml").read_text(encoding="utf-8")
    file = tmp_path / "disk.toml"
    file.write_text(
        source.replace('model = "edu"', 'model = "nvme"', 1).replace("class = 0x00ff00", "class = 0x010802", 1)
    )
    words = ["nvme", ADDRESS, "identify", "--window", "64", "--bind", "--backend", f"fake:{file}"]
    result = CliRunner().invoke(cli, words, prog_name="vfio")
    assert result.exit_code == 1
    assert "cannot create a DMA window of 256 MiB: POWER7 (PowerNV, IODA1) has no Dynamic DMA Windows" in result.stderr


def test_a_second_group_in_a_container_is_refused(backend: FakeBackend) -> None:
    other = "0000:04:00.0"
    backend.write_text(f"/sys/bus/pci/devices/{other}/driver_override", "vfio-pci")
    backend.write_text("/sys/bus/pci/drivers_probe", other)
    with vfio.Container(backend) as container, vfio.Group(0, backend) as one, vfio.Group(1, backend) as two:
        container.attach(one)
        container.choose_iommu()
        with pytest.raises(vfio.VfioError, match="sPAPR TCE v1 takes one group a container") as caught:
            container.attach(two)
        assert caught.value.errno == errno.EBUSY
