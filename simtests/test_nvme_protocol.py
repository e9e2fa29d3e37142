"""The numbers and layouts of NVM Express: PRPs, entries, identify data, status in words."""

from __future__ import annotations

import errno

import pytest

from vfio.drivers import nvme_protocol as nvm


@pytest.mark.parametrize(
    ("iova", "length", "pages"),
    [
        (0x10000, 512, [0x10000]),
        (0x10000, 4096, [0x10000]),
        (0x10000, 4097, [0x10000, 0x11000]),
        (0x10E00, 512, [0x10E00]),
        (0x10E00, 513, [0x10E00, 0x11000]),
        (0x10FFC, 4100, [0x10FFC, 0x11000]),
        (0x10FFC, 4101, [0x10FFC, 0x11000, 0x12000]),
        (0x10000, 3 * 4096, [0x10000, 0x11000, 0x12000]),
        (0x10004, 0, [0x10004]),
        (0x0800_0000_0000_0800, 4096, [0x0800_0000_0000_0800, 0x0800_0000_0000_1000]),
    ],
)
def test_prps_are_where_data_begins_and_each_page_after(iova: int, length: int, pages: list[int]) -> None:
    assert nvm.prps(iova, length, 4096) == pages


def test_prps_are_per_page_of_the_controllers() -> None:
    assert nvm.prps(0x10000, 0x20000, 0x10000) == [0x10000, 0x20000]
    assert len(nvm.prps(0x10200, 1 << 20, 4096)) == 257


def test_submission_entry_has_its_fields_where_the_specification_has_them() -> None:
    entry = nvm.entry(0x02, 0x1234, 0x89ABCDEF, 0x1111, 0x2222, (0xA, 0xB, 0xC))
    assert len(entry) == nvm.SUBMISSION
    assert entry[:8] == bytes.fromhex("02003412efcdab89")
    assert entry[24:40] == (0x1111).to_bytes(8, "little") + (0x2222).to_bytes(8, "little")
    assert entry[40:64] == b"".join(n.to_bytes(4, "little") for n in (0xA, 0xB, 0xC, 0, 0, 0))


def test_completion_entry_is_decoded() -> None:
    found = nvm.completion(bytes.fromhex("3f003f00 00000000 0500 0100 3412 0181"))
    assert (found.result, found.submission_head, found.submission_queue, found.cid) == (0x3F003F, 5, 1, 0x1234)
    assert (found.phase_and_status & 1, found.status) == (1, 0x4080)


def test_capabilities_are_in_bytes_and_seconds() -> None:
    found = nvm.Capabilities(0x0040_1820_0F01_07FF)
    assert (found.queue_entries, found.timeout, found.doorbell_stride) == (2048, 7.5, 4)
    assert (found.smallest_page, found.largest_page) == (4096, 65536)
    assert nvm.Capabilities(2 << 48 | 3 << 32).smallest_page == 16384
    assert nvm.Capabilities(3 << 32).doorbell_stride == 32
    assert nvm.Capabilities(0).timeout == 0.5


def test_namespace_takes_the_format_that_is_in_use() -> None:
    data = bytearray(4096)
    data[:8] = (1000).to_bytes(8, "little")
    data[26] = 0x21  # format 0x11: the upper bits are beside the lower ones
    data[128 + 4 * 0x11 : 132 + 4 * 0x11] = bytes((8, 0, 12, 0))
    found = nvm.namespace(7, bytes(data))
    assert (found.number, found.blocks, found.block_size, found.metadata, found.size) == (7, 1000, 4096, 8, 4096000)


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0x4080, "LBA out of range (generic status 0x80, not to be retried)"),
        (0x0281, "unrecovered read error (media status 0x81)"),
        (0x010C, "invalid queue deletion (command specific status 0x0c)"),
        (0x07FE, "unknown status (vendor specific status 0xfe)"),
        (0x0455, "unknown status (reserved type status 0x55)"),
    ],
)
def test_status_is_spelled_out(status: int, text: str) -> None:
    assert nvm.status_text(status) == text


@pytest.mark.parametrize(
    ("status", "number", "retryable"),
    [(0x4001, errno.EOPNOTSUPP, False), (0x4081, errno.ENOSPC, False), (0x0280, errno.EIO, True)],
)
def test_failed_command_is_an_oserror_with_the_status(status: int, number: int, retryable: bool) -> None:
    error = nvm.CommandFailed("a read", status)
    assert isinstance(error, OSError)
    assert (error.errno, error.status, error.retryable) == (number, status, retryable)
    assert str(error) == f"a read: {nvm.status_text(status)} [{errno.errorcode[number]}]"
