"""Capability chains of info structs, well-formed and hostile."""

import struct

import pytest

from vfio import errors, info, uapi


def region_info(*capabilities, room=256):
    """A vfio_region_info with (offset, id, version, next) headers in it."""
    found = uapi.vfio_region_info.sized(room)
    view = uapi.buffer(found)
    for offset, number, version, following in capabilities:
        struct.pack_into("=HHI", view, offset, number, version, following)
    return found


def test_no_capabilities_is_an_empty_chain():
    assert list(info.chain(region_info(), 0, "test")) == []


def test_chain_is_followed_in_its_own_order_and_cut_at_the_next_in_memory():
    found = region_info((32, 1, 1, 96), (64, 3, 1, 0), (96, 2, 5, 64), room=128)
    caps = list(info.chain(found, 32, "test"))
    assert [(cap.id, cap.version, len(cap.data)) for cap in caps] == [(1, 1, 32), (2, 5, 32), (3, 1, 32)]


def test_chain_that_runs_in_a_circle_is_an_error():
    with pytest.raises(errors.CallFailed, match="in a circle at offset 32"):
        list(info.chain(region_info((32, 1, 1, 64), (64, 2, 1, 32)), 32, "test"))


@pytest.mark.parametrize("offset", [249, 256, 0xFFFFFFF8])
def test_chain_that_leaves_the_struct_is_an_error(offset):
    with pytest.raises(errors.CallFailed, match="outside the 256 bytes"):
        list(info.chain(region_info((32, 1, 1, offset)), 32, "test"))
