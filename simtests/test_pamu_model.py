"""The model of a Freescale PAMU, call by call: an errno for every rule.  No kernel ever merged this interface."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pamu_host import ADDRESS, MIB, OTHER, RW, Calls, p4080

import vfio
from vfio import uapi
from vfio.fake.backend import FakeBackend
from vfio.iommu import pamu_abi as abi
from vfio.iommu.pamu import Pamu

APERTURE, COUNT, WINDOW = 512 * MIB, 8, 64 * MIB
CHECKED = [
    abi.VFIO_IOMMU_PAMU_GET_ATTR,
    abi.VFIO_IOMMU_PAMU_SET_ATTR,
    abi.VFIO_IOMMU_PAMU_MAP_MSI_BANK,
    abi.VFIO_IOMMU_PAMU_UNMAP_MSI_BANK,
]


def calls_of(backend: FakeBackend) -> Iterator[Calls]:
    with vfio.Container(backend) as container, vfio.Group(0, backend) as group:
        container.attach(group)
        backend.ioctl(container.fd, uapi.VFIO_SET_IOMMU, abi.VFIO_FSL_PAMU_IOMMU)
        yield Calls(backend, container)
    assert backend.leaks() == []


@pytest.fixture
def backend() -> FakeBackend:
    return p4080()


@pytest.fixture
def calls(backend: FakeBackend) -> Iterator[Calls]:
    yield from calls_of(backend)


@pytest.fixture
def ready(calls: Calls) -> Calls:
    """With the geometry of the example."""
    assert (calls.geometry(0, APERTURE - 1), calls.windows(COUNT)) == (0, 0)
    return calls


@pytest.fixture
def ram(backend: FakeBackend) -> Iterator[vfio.DmaBuffer]:
    with vfio.DmaBuffer(256 * MIB, page_size=WINDOW, backend=backend) as buffer:
        yield buffer


# --- what there is ---


def test_only_pamu_is_there() -> None:
    with vfio.Container(p4080()) as container:
        assert container.check_extension(abi.VFIO_FSL_PAMU_IOMMU)
        others = [
            uapi.VFIO_TYPE1_IOMMU,
            uapi.VFIO_TYPE1v2_IOMMU,
            uapi.VFIO_SPAPR_TCE_IOMMU,
            uapi.VFIO_SPAPR_TCE_v2_IOMMU,
        ]
        assert not any(container.check_extension(kind) for kind in (*others, uapi.VFIO_EEH))


@pytest.mark.parametrize("machine", ["power7", "power8", "pseries"])
def test_no_other_machine_has_it(machine: str) -> None:
    with vfio.Container(vfio.open_backend(f"fake:{machine}")) as container:
        assert not container.check_extension(abi.VFIO_FSL_PAMU_IOMMU)


def test_its_numbers_are_none_of_the_kernels() -> None:
    numbers = [*CHECKED, abi.VFIO_IOMMU_PAMU_GET_MSI_BANK_COUNT]
    assert [uapi.request_names(number) for number in numbers] == [()] * 5
    assert not [name for name in dir(uapi) if "PAMU" in name.upper()]


def test_layouts_are_those_of_the_posted_patches() -> None:
    assert abi.attribute(abi.ATTR_GEOMETRY, abi.GEOMETRY.pack(1, 2)).hex() == (
        "20000000" "00000000" "00000000" "00000000" "0100000000000000" "0200000000000000"
    )  # fmt: skip
    assert (abi.MSI_BANK_MAP.size, abi.MSI_BANK_UNMAP.size) == (24, 16)


def test_before_anything_is_set_it_has_all_addresses_and_all_windows(calls: Calls) -> None:
    assert abi.GEOMETRY.unpack_from(calls.get(abi.ATTR_GEOMETRY)) == (0, (1 << 36) - 1)
    assert abi.WINDOWS.unpack_from(calls.get(abi.ATTR_WINDOWS)) == (256,)


def test_there_are_three_banks(calls: Calls) -> None:
    assert calls.backend.ioctl(calls.fd, abi.VFIO_IOMMU_PAMU_GET_MSI_BANK_COUNT) == 3


def test_get_info_is_no_request_of_it(calls: Calls) -> None:
    assert calls.short(uapi.VFIO_IOMMU_GET_INFO) == "ENOTTY"


@pytest.mark.parametrize("request_number", CHECKED)
def test_a_struct_that_is_too_short_raises_einval(calls: Calls, request_number: int) -> None:
    assert calls.short(request_number) == "EINVAL"


@pytest.mark.parametrize("request_number", CHECKED)
def test_a_bad_address_raises_efault(calls: Calls, request_number: int) -> None:
    with pytest.raises(OSError, match="Bad address"):
        calls.backend.ioctl(calls.fd, request_number, 8)


# --- attributes ---


@pytest.mark.parametrize(
    ("first", "last"),
    [
        pytest.param(0, APERTURE, id="a size that is no power of two"),
        pytest.param(0, 3 * MIB - 1, id="three MiB"),
        pytest.param(MIB, MIB + 2 * MIB - 1, id="not aligned to its size"),
        pytest.param(0, 2047, id="less than a page"),
        pytest.param(4096, 4095, id="nothing"),
        pytest.param(8192, 0, id="backwards"),
        pytest.param(0, (1 << 37) - 1, id="more than the hardware has"),
    ],
)
def test_a_geometry_against_the_rules_raises_einval(calls: Calls, first: int, last: int) -> None:
    assert calls.geometry(first, last) == "EINVAL"
    assert abi.GEOMETRY.unpack_from(calls.get(abi.ATTR_GEOMETRY)) == (0, (1 << 36) - 1)


def test_a_geometry_that_is_set_is_got(calls: Calls) -> None:
    assert calls.geometry(APERTURE, 2 * APERTURE - 1) == 0
    assert abi.GEOMETRY.unpack_from(calls.get(abi.ATTR_GEOMETRY)) == (APERTURE, 2 * APERTURE - 1)


@pytest.mark.parametrize("count", [0, 3, 257, 512, 1 << 31])
def test_a_number_of_windows_against_the_rules_raises_einval(calls: Calls, count: int) -> None:
    calls.geometry(0, APERTURE - 1)
    assert calls.windows(count) == "EINVAL"


def test_windows_before_the_geometry_raise_einval(calls: Calls) -> None:
    assert calls.windows(8) == "EINVAL"


def test_windows_smaller_than_a_page_raise_einval(calls: Calls) -> None:
    assert (calls.geometry(0, 16383), calls.windows(8), calls.windows(4)) == (0, "EINVAL", 0)


@pytest.mark.parametrize(
    ("cpu", "cache", "expected"), [(0, 1, 0), (7, 3, 0), (8, 1, "EINVAL"), (0, 0, "EINVAL"), (0, 4, "EINVAL")]
)
def test_stashing_takes_a_cpu_and_a_cache_that_there_are(
    calls: Calls, cpu: int, cache: int, expected: int | str
) -> None:
    assert calls.stash(cpu, cache) == expected
    assert abi.STASH.unpack_from(calls.get(abi.ATTR_STASH)) == ((cpu, cache) if expected == 0 else (0, 0))


def test_an_unknown_attribute_raises_einval(calls: Calls) -> None:
    assert (calls.set(3), calls.try_get(3)) == ("EINVAL", "EINVAL")


def test_flags_of_an_attribute_raise_einval(calls: Calls) -> None:
    assert calls.set(abi.ATTR_GEOMETRY, abi.GEOMETRY.pack(0, 4095), flags=1) == "EINVAL"


def test_attributes_are_fixed_while_memory_is_mapped(ready: Calls, ram: vfio.DmaBuffer) -> None:
    assert ready.map(0, ram.address, WINDOW) == 0
    assert (ready.geometry(0, 4095), ready.windows(4)) == ("EBUSY", "EBUSY")
    assert ready.unmap(0, WINDOW) == 0
    assert (ready.geometry(0, 4095), ready.windows(1)) == (0, 0)


# --- MAP and UNMAP ---


def test_map_before_windows_are_set_raises_enodev(calls: Calls, ram: vfio.DmaBuffer) -> None:
    assert calls.map(0, ram.address, WINDOW) == "ENODEV"
    calls.geometry(0, APERTURE - 1)
    assert calls.map(0, ram.address, WINDOW) == "ENODEV"


@pytest.mark.parametrize(
    ("iova", "offset", "size", "flags"),
    [
        pytest.param(0, 0, WINDOW, 0, id="neither read nor write"),
        pytest.param(0, 0, WINDOW, 8, id="an unknown flag"),
        pytest.param(0, 0, 0, RW, id="nothing"),
        pytest.param(0, 0, 2048, RW, id="less than a page"),
        pytest.param(0, 0, 4096, RW, id="less than a window"),
        pytest.param(0, 0, WINDOW + 4096, RW, id="a window and a page"),
        pytest.param(4096, 0, WINDOW, RW, id="not at the beginning of a window"),
        pytest.param(APERTURE, 0, WINDOW, RW, id="behind the aperture"),
        pytest.param(APERTURE - WINDOW, 0, 2 * WINDOW, RW, id="past its end"),
        pytest.param((1 << 64) - WINDOW, 0, WINDOW, RW, id="an IOVA that wraps"),
    ],
)
def test_map_against_the_rules_raises_einval(
    ready: Calls, ram: vfio.DmaBuffer, iova: int, offset: int, size: int, flags: int
) -> None:
    assert ready.map(iova, ram.address + offset, size, flags) == "EINVAL"
    assert ready.backend.locked().locked == 0


def test_below_the_aperture_raises_einval(calls: Calls, ram: vfio.DmaBuffer) -> None:
    assert (calls.geometry(APERTURE, 2 * APERTURE - 1), calls.windows(COUNT)) == (0, 0)
    assert calls.map(0, ram.address, WINDOW) == "EINVAL"
    assert calls.map(APERTURE, ram.address, WINDOW) == 0


def test_memory_in_pieces_raises_efault(ready: Calls) -> None:
    with vfio.DmaBuffer(WINDOW, page_size=16 * MIB, backend=ready.backend) as small:
        assert ready.map(0, small.address, WINDOW) == "EFAULT"
    assert ready.backend.locked().locked == 0


def test_memory_that_is_not_aligned_to_the_window_raises_efault(ready: Calls, ram: vfio.DmaBuffer) -> None:
    assert ready.map(0, ram.address + 4096, WINDOW) == "EFAULT"


def test_memory_that_is_not_there_raises_efault(ready: Calls) -> None:
    assert ready.map(0, 1 << 46, WINDOW) == "EFAULT"


def test_ordinary_pages_fit_windows_of_a_page(calls: Calls) -> None:
    assert (calls.geometry(0, 65535), calls.windows(16)) == (0, 0)
    with vfio.DmaBuffer(16384, backend=calls.backend) as buffer:
        assert calls.map(0, buffer.address, 16384) == 0
        assert calls.unmap(0, 16384) == 0


def test_overlap_raises_ebusy(ready: Calls, ram: vfio.DmaBuffer) -> None:
    assert ready.map(WINDOW, ram.address, 2 * WINDOW) == 0
    assert ready.map(0, ram.address, 2 * WINDOW) == "EBUSY"
    assert ready.map(2 * WINDOW, ram.address, WINDOW) == "EBUSY"


def test_a_window_of_a_bank_raises_ebusy_and_nothing_stays(ready: Calls, ram: vfio.DmaBuffer) -> None:
    assert ready.map_bank(0, 2 * WINDOW) == 0
    assert ready.map(0, ram.address, 4 * WINDOW) == "EBUSY"
    assert ready.map(0, ram.address, 2 * WINDOW) == 0


def test_what_is_mapped_is_charged() -> None:
    backend = p4080(f"?ipc_lock=0&memlock={WINDOW}")
    for calls in calls_of(backend):
        calls.geometry(0, APERTURE - 1)
        calls.windows(COUNT)
        with vfio.DmaBuffer(2 * WINDOW, page_size=WINDOW, backend=backend) as ram:
            assert calls.map(0, ram.address, 2 * WINDOW) == "ENOMEM"
            assert calls.map(0, ram.address, WINDOW) == 0
            assert backend.locked().locked == WINDOW
            assert calls.map(WINDOW, ram.address + WINDOW, WINDOW) == "ENOMEM"
            assert (calls.unmap(0, WINDOW), backend.locked().locked) == (0, 0)


def test_unmap_with_flags_raises_einval(ready: Calls) -> None:
    assert ready.unmap(0, WINDOW, flags=1) == "EINVAL"


def test_unmap_of_nothing_returns_0(ready: Calls) -> None:
    assert ready.unmap(0, APERTURE) == 0


def test_unmap_may_split_a_mapping_but_no_window(ready: Calls, ram: vfio.DmaBuffer) -> None:
    assert ready.map(0, ram.address, 4 * WINDOW) == 0
    assert ready.unmap(WINDOW, 4096) == "EINVAL"
    assert ready.unmap(WINDOW, WINDOW) == 0
    assert ready.map(0, ram.address, WINDOW) == "EBUSY"
    assert ready.map(2 * WINDOW, ram.address, WINDOW) == "EBUSY"
    assert ready.map(WINDOW, ram.address + WINDOW, WINDOW) == 0
    assert ready.backend.locked().locked == 4 * WINDOW
    assert (ready.unmap(0, APERTURE), ready.backend.locked().locked) == (0, 0)


# --- MSI banks ---


@pytest.mark.parametrize(
    ("index", "iova", "flags", "expected"),
    [
        pytest.param(0, 4 * WINDOW, RW, 0, id="a bank"),
        pytest.param(2, 4 * WINDOW, uapi.VFIO_DMA_MAP_FLAG_WRITE, 0, id="the last one, to write to"),
        pytest.param(0, 4 * WINDOW, 0, "EINVAL", id="neither read nor write"),
        pytest.param(0, 4 * WINDOW, 4, "EINVAL", id="an unknown flag"),
        pytest.param(3, 4 * WINDOW, RW, "ENODEV", id="a bank that there is not"),
        pytest.param(0, APERTURE, RW, "EINVAL", id="behind the aperture"),
        pytest.param(0, 0, RW, "EBUSY", id="a window that is enabled"),
    ],
)
def test_a_bank_is_mapped_by_the_rules(
    ready: Calls, ram: vfio.DmaBuffer, index: int, iova: int, flags: int, expected: int | str
) -> None:
    assert ready.map(0, ram.address, WINDOW) == 0
    assert ready.map_bank(index, iova, flags) == expected


def test_a_bank_before_windows_are_set_raises_enodev(calls: Calls) -> None:
    assert calls.map_bank(0, 0) == "ENODEV"


def test_a_bank_is_unmapped_where_it_was_mapped(ready: Calls) -> None:
    assert ready.map_bank(1, WINDOW) == 0
    assert ready.unmap_bank(0) == "EINVAL"
    assert ready.unmap_bank(WINDOW, flags=1) == "EINVAL"
    assert ready.unmap_bank(WINDOW) == 0
    assert ready.unmap_bank(WINDOW) == "EINVAL"


# --- the habit of 2013 ---


def test_the_posted_patches_returned_0_for_attributes_and_banks_that_they_refused() -> None:
    for calls in calls_of(p4080("?pamu_errno=0")):
        assert [
            calls.geometry(0, 5),
            calls.windows(3),
            calls.stash(99, 9),
            calls.set(7),
            calls.try_get(7),
            calls.map_bank(9, 0),
            calls.map_bank(0, 0),
            calls.unmap_bank(0),
        ] == [0] * 8
        assert abi.GEOMETRY.unpack_from(calls.get(abi.ATTR_GEOMETRY)) == (0, (1 << 36) - 1)


def test_they_did_refuse_a_short_struct_and_a_bad_map() -> None:
    for calls in calls_of(p4080("?pamu_errno=0")):
        assert calls.short(abi.VFIO_IOMMU_PAMU_SET_ATTR) == "EINVAL"
        assert calls.map(0, 1 << 20, 4096, flags=0) == "EINVAL"


def test_the_switch_is_refused_where_there_is_no_pamu() -> None:
    with pytest.raises(vfio.errors.NoSuchBackend, match="pamu_errno is for machines with a PAMU"):
        vfio.open_backend("fake:power8?pamu_errno=0")


# --- groups ---


def test_groups_share_a_domain_and_one_may_leave() -> None:
    backend = p4080("", ADDRESS, OTHER)
    with vfio.Container(backend) as container, vfio.Group(0, backend) as one, vfio.Group(1, backend) as two:
        container.attach(one)
        container.attach(two)
        pamu = container.set_iommu(Pamu)
        pamu.configure(APERTURE, COUNT)
        with vfio.DmaBuffer(WINDOW, page_size=WINDOW, backend=backend) as ram, pamu.map(ram) as dma:
            ram[0:4] = b"both"
            pes = {pe.group.number: pe for pe in backend.machine.pes}
            assert [pes[number].dma_read(dma.iova, 4) for number in (0, 1)] == [b"both", b"both"]
            container.detach(one)
            assert [pes[number].dma_read(dma.iova, 4) for number in (0, 1)] == [bytes(4), b"both"]
    assert backend.leaks() == []
