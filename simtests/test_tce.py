"""Sizes and shapes of TCE tables; the figures were read from a real kernel's locked-memory account."""

import errno

import pytest

from vfio import errors
from vfio.iommu import tce

K4, K64, M16, M256 = 1 << 12, 1 << 16, 1 << 24, 1 << 28


@pytest.mark.parametrize(
    ("window", "page", "levels", "on_4k", "on_64k"),
    [
        (1 << 31, K4, 1, 8192, 8192),
        (1 << 30, K64, 1, 256, 256),
        (K4, K4, 1, 8, 128),
        (M256, M256, 1, 8, 128),
        (1 << 36, K4, 2, 262208, 262272),
        (1 << 40, K4, 3, 4198416, 4194944),
    ],
)
def test_charge_is_what_the_kernel_charges(window, page, levels, on_4k, on_64k):
    assert tce.Shape(window, page, levels, K4).charged == on_4k * 1024
    assert tce.Shape(window, page, levels, K64).charged == on_64k * 1024


@pytest.mark.parametrize(("host", "levels"), [(K4, 4), (K64, 3)])
def test_most_levels_of_4k_pages_that_the_kernel_builds(host, levels):
    assert tce.shape(1 << 30, K4, levels, host, 5).levels == levels
    with pytest.raises(errors.BadWindow, match="address bits") as caught:
        tce.shape(1 << 30, K4, levels + 1, host, 5)
    assert caught.value.errno == errno.EINVAL


def test_level_larger_than_16_mib_is_refused_with_the_levels_that_work():
    with pytest.raises(errors.BadWindow, match=r"128 MiB.*\n.*levels=2, 3, 4 works"):
        tce.shape(1 << 36, K4, 1, K4, 5)


def test_fewest_levels_that_work_are_chosen():
    assert tce.shape(1 << 33, K4, None, K4, 5).levels == 1
    assert tce.shape(1 << 34, K4, None, K4, 5).levels == 2


def test_window_that_no_number_of_levels_can_hold_is_refused():
    with pytest.raises(errors.BadWindow):
        tce.shape(1 << 63, K4, None, K4, 5)


@pytest.mark.parametrize("size", [0, -4096, 3 << 30])
def test_size_that_is_no_power_of_two_is_refused(size):
    with pytest.raises(errors.BadWindow, match="power of two"):
        tce.shape(size, K4, None, K4, 5)


def test_window_smaller_than_a_page_is_refused():
    with pytest.raises(errors.BadWindow, match="less than one page of 16 MiB"):
        tce.shape(1 << 20, M16, None, K4, 5)


def test_levels_that_the_platform_lacks_are_refused():
    with pytest.raises(errors.BadWindow, match="levels=1 or fewer"):
        tce.shape(1 << 20, K4, 2, K4, 1)
