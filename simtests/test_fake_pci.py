"""PCI functions of the modelled machine, and what vfio-pci does with them: open, info, regions, resets, power."""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import replace

import pytest
from fake_pci import (
    EVENTFD,
    FEATURE,
    GET_INFO,
    HOT_RESET,
    HOT_RESET_INFO,
    INTX,
    IOEVENTFD,
    MSI,
    MSIX,
    RESET,
    TRIGGER,
    Host,
    Opened,
    eventfd,
    refused,
    taken,
    until,
)

from vfio.fake import devices, vfio_pci
from vfio.fake import registers as reg
from vfio.fake.bus_driver import VfioDeviceOps
from vfio.fake.fault import BusError, SegmentationFault
from vfio.fake.group import GroupFile
from vfio.fake.user import Argument

EDU, TESTDEV, EDU_ALONE, NVME = "0000:01:00.0", "0000:01:00.1", "0001:01:00.0", "0002:01:00.0"
ROOT = "0000:00:00.0"


@pytest.fixture
def host() -> Host:
    return Host()


def raw(*words: int) -> bytearray:
    return bytearray(struct.pack(f"={len(words)}I", *words))


# --- the host ---


@pytest.mark.parametrize(
    ("machine", "page", "address", "starts"),
    [
        ("power8", 4096, EDU, {0: 0x3FF8000000000}),
        ("power8", 4096, TESTDEV, {0: 0x3FF8000100000, 1: 0}),
        ("power8", 65536, TESTDEV, {0: 0x3FF8000100000, 1: 0}),
        ("power8", 4096, EDU_ALONE, {0: 0x3FF8080000000}),
        ("power8", 4096, NVME, {0: 0x3FF8100000000}),
        ("power9", 4096, NVME, {0: 0x600C100000000}),
        ("pseries", 4096, "0000:00:00.0", {0: 0x200080000000}),
        (
            "pseries",
            4096,
            "0001:00:00.0",
            {0: 0x200100000000, 1: 0x200100020000, 2: 0x1000, 3: 0x200100040000},
        ),
    ],
)
def test_bars_are_where_real_hosts_put_them(machine: str, page: int, address: str, starts: dict[int, int]) -> None:
    pci = Host(machine, page_size=page).machine.device(address)
    assert {index: bar.start for index, bar in pci.bars.items()} == starts


def test_resource_flags_are_those_that_sysfs_shows() -> None:
    assert Host().machine.device(EDU).bars[0].resource_flags == 0x40200
    assert Host().machine.device(NVME).bars[0].resource_flags == 0x140204
    assert Host("pseries").machine.device("0001:00:00.0").bars[2].resource_flags == 0x40101
    assert Host(page_size=65536).machine.device(TESTDEV).bars[0].resource_flags == 0x200


def test_first_enable_decodes_and_last_disable_stops_mastering(host: Host) -> None:
    pci = host.machine.device(EDU)
    pci.enable()
    pci.enable()
    assert pci.command == 0x102
    pci.change_command(set_bits=reg.COMMAND_MASTER)
    pci.disable()
    assert pci.command == 0x106
    pci.disable()
    assert (pci.command, pci.enable_count) == (0x102, 0)


def test_frozen_pe_reads_ones_and_drops_stores(host: Host) -> None:
    edu = host.open(EDU)
    edu.write(4, b"\1\2\3\4")
    assert edu.pci.pe
    for freeze in ("mmio", "both"):
        edu.pci.pe.freeze = freeze  # type: ignore[assignment]
        assert edu.read(4, 4) == b"\xff" * 4
        assert edu.write(4, bytes(4)) == 4
    edu.pci.pe.freeze = "dma"
    assert edu.read(4, 4) == b"\xfe\xfd\xfc\xfb"


def test_frozen_pe_sends_no_messages(host: Host) -> None:
    edu = host.open(EDU)
    edu.set_config(reg.COMMAND, b"\x06\x01")
    with eventfd() as fd:
        edu.set_irqs(MSI, EVENTFD | TRIGGER, fd)
        assert edu.pci.pe
        edu.pci.pe.freeze = "dma"
        edu.write(0x60, b"\0\0\0\1")
        assert taken(fd) == 0
        edu.pci.pe.freeze = "none"
        edu.write(0x60, b"\0\0\0\1")
        assert taken(fd) == 1
        edu.close()


# --- probe and remove ---


def test_probe_refuses_a_bridge_and_a_function_without_a_group(host: Host) -> None:
    with refused(errno.EINVAL):
        vfio_pci.probe(host.machine, host.machine.device(ROOT))
    pci = host.machine.device(EDU)
    pci.group = None
    with refused(errno.EINVAL):
        vfio_pci.probe(host.machine, pci)
    assert pci.vfio is None


def test_unused_device_of_the_driver_sleeps(host: Host) -> None:
    pci = host.machine.device(NVME)
    assert pci.power_state is None
    vfio_pci.probe(host.machine, pci)
    assert pci.power_state == 3
    vfio_pci.remove(host.machine, pci)
    assert (pci.power_state, pci.vfio) == (0, None)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        (EDU, 1),
        (EDU + "   ", 1),
        ("", 0),
        (EDU[:-1], 0),
        (EDU + "0", 0),
        (EDU + "\t", 0),
        (TESTDEV, 0),
        ("01:00.0", 0),
        (EDU + " foo", errno.EINVAL),
        (EDU + " vf_token=", errno.EINVAL),
        (EDU + " vf_token=zzzzzzzz-5a5f-4f5a-a211-f591514ba1f3", errno.EINVAL),
        (EDU + " vf_token=bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3", errno.EINVAL),
    ],
)
def test_match_wants_the_whole_address_and_knows_no_options(host: Host, name: str, answer: int) -> None:
    host.bind(EDU)
    data = host.machine.device(EDU).vfio
    assert data
    if answer == errno.EINVAL:
        with refused(errno.EINVAL):
            vfio_pci.OPS.match(data, name)
    else:
        assert vfio_pci.OPS.match(data, name) == answer


def test_driver_without_operations_answers_as_the_core_does(host: Host) -> None:
    ops = VfioDeviceOps()
    for call in (
        lambda: ops.read(None, host.process, 1, 0),
        lambda: ops.write(None, host.process, b"x", 0),
        lambda: ops.ioctl(None, host.process, 7, Argument(host.process, 0)),
        lambda: ops.mmap(None, host.process, 4096, 0, 3),
    ):
        with refused(errno.EINVAL):
            call()
    assert ops.match(None, EDU) is None


# --- open, close ---


def test_open_is_refused_while_the_pe_is_in_reset_and_changes_nothing(host: Host) -> None:
    pci = host.bind(EDU)
    assert pci.pe
    assert pci.vfio
    pci.eeh.blocked = True
    with refused(errno.ENODEV):
        Opened(host.machine, pci, host.process)
    pci.eeh.blocked = False
    assert (pci.enable_count, pci.vfio.users, pci.command) == (0, 0, 0x100)


def test_open_thaws_a_frozen_pe_and_so_does_the_last_close(host: Host) -> None:
    pci = host.machine.device(EDU)
    assert pci.pe
    pci.pe.freeze = "both"
    opened = host.open(EDU)
    assert pci.pe.freeze == "none"
    pci.pe.freeze = "both"
    opened.close()
    assert pci.pe.freeze == "none"


def test_all_descriptors_share_one_state_until_the_last_is_closed(host: Host) -> None:
    first, second = host.open(EDU), host.open(EDU)
    first.set_config(reg.COMMAND, b"\x06\x01")
    first.close()
    assert second.config(reg.COMMAND, 2) == b"\x06\x01"
    second.close()
    assert host.open(EDU).config(reg.COMMAND, 2) == b"\x02\x01"


def test_last_close_restores_the_configuration_of_before(host: Host) -> None:
    opened = host.open(EDU)
    for offset, data in ((reg.COMMAND, b"\x07\x05"), (reg.CACHE_LINE_SIZE, b"\x08"), (reg.BAR0, b"\xff" * 4)):
        opened.set_config(offset, data)
    opened.close()
    assert opened.pci.registers.get(reg.COMMAND, 4) == 0x00100102
    assert opened.pci.registers.get(reg.CACHE_LINE_SIZE, 1) == 0
    assert opened.pci.registers.get(reg.BAR0, 4) == 0x80000000


def test_last_close_gives_interrupts_back(host: Host) -> None:
    opened = host.open(EDU)
    with eventfd() as fd:
        opened.set_irqs(INTX, EVENTFD | TRIGGER, fd)
        opened.close()
        assert opened.pci.intx_handler is None
        assert taken(fd) == 0


# --- GET_INFO ---


def test_reset_flag_tells_whether_the_open_could_reset_the_function(host: Host) -> None:
    for address, flags in ((EDU, 2), (EDU_ALONE, 3), (NVME, 3)):
        data = raw(24, 0, 0, 0, 0, 0)
        assert host.open(address).ioctl(GET_INFO, data) == 0
        assert data == raw(24, flags, 9, 5, 0, 0)


def test_info_writes_no_more_than_argsz(host: Host) -> None:
    data = raw(17, 9, 9, 9, 0xABCDEF, 7)
    host.open(EDU).ioctl(GET_INFO, data)
    assert data == raw(17, 2, 9, 5, 0xABCD00, 7)
    with refused(errno.EINVAL):
        host.open(EDU).ioctl(GET_INFO, raw(15, 0, 0, 0))


def test_atomic_operations_are_told_where_device_and_root_port_complete_them(host: Host) -> None:
    host.machine.device("0002:00:00.0").registers.change(0x48 + 0x24, 4, set_bits=0x180)
    host.machine.device(NVME).registers.change(0x80 + 0x24, 4, set_bits=0x380)
    nvme = host.open(NVME)
    short = raw(24, 0, 0, 0, 0, 0)
    nvme.ioctl(GET_INFO, short)
    assert short == raw(36, 0x83, 9, 5, 0, 0)
    data = raw(36, 0, 0, 0, 0, 0, 0, 0, 0)
    nvme.ioctl(GET_INFO, data)
    assert data == raw(36, 0x83, 9, 5, 24, 0) + struct.pack("=HHII", 5, 1, 0, 3)


# --- regions ---


def test_msix_bar_says_that_it_can_be_mapped_whole(host: Host) -> None:
    nvme = host.open(NVME)
    assert nvme.region(0) == (40, 15, 0, 0x4000, b"")
    assert nvme.region(0, 48) == (48, 15, 32, 0x4000, struct.pack("=HHI", 3, 1, 0) + bytes(8))


def test_regions_have_the_sizes_and_flags_of_the_device(host: Host) -> None:
    edu = host.open(EDU)
    assert [edu.region(index)[1:4] for index in range(8)] == [(7, 0, 1 << 20), *[(0, 0, 0)] * 6, (3, 0, 256)]
    for index in (8, 9, 0xFFFFFFFF):
        with refused(errno.EINVAL):
            edu.region(index)


def test_bar_smaller_than_a_page_is_mappable_where_it_is_alone_in_it() -> None:
    assert Host(page_size=65536).open(TESTDEV).region(0)[1] == 7
    host = Host(page_size=65536)
    neighbour = host.machine.device(EDU)
    host.machine.device(TESTDEV).bars[0].start = neighbour.bars[0].start - 0x1000
    assert host.open(TESTDEV).region(0)[1] == 3


# --- BARs ---


def test_access_is_short_at_the_end_of_a_bar_and_refused_behind_it(host: Host) -> None:
    edu = host.open(EDU)
    assert edu.read(0xFFFFC, 64) == b"\xff" * 4
    assert edu.write(0xFFFFC, bytes(64)) == 4
    for offset in (1 << 20, 1 << 40, 5 << 40, 6 << 40, 8 << 40):
        with refused(errno.EINVAL):
            edu.read(offset, 4)
        with refused(errno.EINVAL):
            edu.write(offset, b"abcd")


def test_memory_is_out_of_reach_while_decode_is_off(host: Host) -> None:
    edu = host.open(EDU)
    edu.set_config(reg.COMMAND, b"\x00\x01")
    with refused(errno.EIO):
        edu.read(0, 4)
    with refused(errno.EIO):
        edu.write(0, b"abcd")


def test_msix_table_reads_ones_and_drops_writes(host: Host) -> None:
    nvme = host.open(NVME)
    assert nvme.read(0x1FFC, 8) == bytes(4) + b"\xff" * 4
    assert nvme.write(0x2000, b"\0" * 32) == 32
    assert nvme.read(0x2000 + 65 * 16 - 4, 8) == b"\xff" * 4 + bytes(4)
    nvme.set_config(reg.COMMAND, b"\0\0")
    assert nvme.read(0x2000, 4) == b"\xff" * 4


# --- mmap ---


def mapped(opened: Opened, offset: int = 0, length: int = 4096, prot: int = 3) -> object:
    return vfio_pci.OPS.mmap(opened.vdev, opened.process, length, offset, prot)


def test_mapping_reaches_the_device_with_exact_width(host: Host) -> None:
    edu = host.open(EDU)
    mapping = vfio_pci.OPS.mmap(edu.vdev, edu.process, 4096, 0, 3)
    assert mapping.view(4) is None
    mapping.store(4, 4, 0x04030201)
    assert mapping.load(4, 4) == 0xFBFCFDFE
    assert mapping.load(0, 8) == (1 << 64) - 1
    assert mapping.load(0, 2) == 0


def test_touching_a_mapping_that_the_kernel_took_away_is_a_bus_error(host: Host) -> None:
    nvme = host.open(NVME)
    mapping = vfio_pci.OPS.mmap(nvme.vdev, nvme.process, 4096, 0, 3)
    nvme.set_config(reg.COMMAND, b"\0\0")
    with pytest.raises(BusError, match=f"{NVME} BAR 0, byte 0x8: SIGBUS at a load: memory decode is off"):
        mapping.load(8, 4)
    nvme.set_config(reg.COMMAND, b"\2\0")
    nvme.set_config(0x64, b"\3")
    with pytest.raises(BusError, match="D3hot"):
        mapping.store(8, 4, 0)
    nvme.set_config(0x64, b"\0")
    assert mapping.load(8, 4) == 0x10400


def test_store_without_prot_write_is_a_segmentation_fault(host: Host) -> None:
    edu = host.open(EDU)
    mapping = vfio_pci.OPS.mmap(edu.vdev, edu.process, 4096, 0, 1)
    assert mapping.load(0, 4) == 0xED000001
    with pytest.raises(SegmentationFault, match="PROT_WRITE"):
        mapping.store(4, 4, 1)
    mapping.close()
    mapping.close()
    with pytest.raises(SegmentationFault, match="closed"):
        mapping.load(0, 4)


@pytest.mark.parametrize(("offset", "width"), [(4096, 4), (2, 4), (-4, 4), (0, 3), (4094, 4)])
def test_access_that_no_instruction_makes_is_an_index_error(host: Host, offset: int, width: int) -> None:
    edu = host.open(EDU)
    mapping = vfio_pci.OPS.mmap(edu.vdev, edu.process, 4096, 0, 3)
    with pytest.raises(IndexError, match="4096"):
        mapping.load(offset, width)


@pytest.mark.parametrize(
    ("offset", "length", "fits"),
    [
        (0, 1, True),
        (0, 1 << 20, True),
        (0, (1 << 20) + 1, False),
        ((1 << 20) - 4096, 4096, True),
        ((1 << 20) - 4096, 4097, False),
        (1 << 20, 1, False),
        (1 << 40, 4096, False),
        (6 << 40, 4096, False),
        (7 << 40, 256, False),
        (8 << 40, 4096, False),
        (9 << 40, 4096, False),
    ],
)
def test_only_whole_pages_of_a_memory_bar_can_be_mapped(host: Host, offset: int, length: int, fits: bool) -> None:
    edu = host.open(EDU)
    if fits:
        mapped(edu, offset, length)
    else:
        with refused(errno.EINVAL):
            mapped(edu, offset, length)


def test_io_bar_cannot_be_mapped() -> None:
    e1000e = Host("pseries").open("0001:00:00.0")
    with refused(errno.EINVAL):
        mapped(e1000e, 2 << 40)


# --- RESET ---


def test_reset_keeps_the_configuration_and_the_messages(host: Host) -> None:
    edu = host.open(EDU_ALONE)
    edu.set_config(reg.COMMAND, b"\x06\x01")
    edu.set_config(0x0C, b"\x08")
    with eventfd() as fd:
        edu.set_irqs(MSI, EVENTFD | TRIGGER, fd)
        assert edu.ioctl(RESET, bytearray(4)) == 0
        assert edu.config(reg.COMMAND, 2) == b"\x06\x01"
        assert edu.config(0x0C, 1) == b"\x08"
        edu.write(0x60, b"\0\0\0\1")
        assert taken(fd) == 1
        edu.close()


def test_reset_that_did_not_work_at_open_is_refused(host: Host) -> None:
    with refused(errno.EINVAL):
        host.open(EDU).ioctl(RESET, bytearray(4))


def test_reset_takes_its_time_of_the_virtual_clock(host: Host) -> None:
    nvme = host.open(NVME)
    before = host.machine.clock.now()
    nvme.ioctl(RESET, bytearray(4))
    assert host.machine.clock.now() - before == pytest.approx(0.1)


def test_reset_by_power_state_goes_to_d3hot_and_back() -> None:
    e1000e = Host("pseries").open("0001:00:00.0")
    resets: list[int] = []
    e1000e.pci.model.reset = lambda: resets.append(1)  # type: ignore[method-assign]
    assert e1000e.ioctl(RESET, bytearray(4)) == 0
    assert resets == [1]
    assert e1000e.pci.power_state == 0


def test_reset_during_an_eeh_reset_returns_0(host: Host) -> None:
    edu = host.open(EDU_ALONE)
    assert edu.pci.pe
    edu.pci.eeh.blocked = True
    assert edu.ioctl(RESET, bytearray(4)) == 0


# --- hot reset ---


def test_hot_reset_info_lists_every_function_of_the_bus(host: Host) -> None:
    edu = host.open(EDU)
    data = raw(12, 7, 7)
    with refused(errno.ENOSPC):
        edu.ioctl(HOT_RESET_INFO, data)
    assert data == raw(12, 0, 2)
    data = bytearray(struct.pack("=3I", 28, 7, 7) + bytes(16))
    assert edu.ioctl(HOT_RESET_INFO, data) == 0
    assert data == struct.pack("=3I", 28, 0, 2) + struct.pack("=IHBBIHBB", 0, 0, 1, 0, 0, 0, 1, 1)
    with refused(errno.EINVAL):
        edu.ioctl(HOT_RESET_INFO, raw(11, 0, 0))


def test_device_on_a_root_bus_has_no_hot_reset() -> None:
    edu = Host("pseries").open("0000:00:00.0")
    with refused(errno.ENODEV):
        edu.ioctl(HOT_RESET_INFO, raw(12, 0, 0))
    with refused(errno.ENODEV):
        edu.ioctl(HOT_RESET, raw(16, 0, 1, 0))


def group_of(host: Host, address: str) -> int:
    pci = host.machine.device(address)
    assert pci.group
    number = pci.group.number
    parts = {"number": number, "node": str(number), "iommu_group": pci.group, "closed": lambda self: None}
    return host.process.install(GroupFile(type("Held", (), parts)()))


def test_hot_reset_wants_the_groups_of_all_functions_and_vfio_drivers(host: Host) -> None:
    edu = host.open(EDU)
    mine, other = group_of(host, EDU), group_of(host, NVME)
    with refused(errno.EINVAL):
        edu.ioctl(HOT_RESET, raw(16, 0, 1, mine))  # the other function has no VFIO driver
    host.bind(TESTDEV)
    with refused(errno.EINVAL):
        edu.ioctl(HOT_RESET, raw(16, 0, 1, other))
    assert edu.ioctl(HOT_RESET, raw(16, 0, 1, mine)) == 0
    assert edu.ioctl(HOT_RESET, raw(20, 0, 2, mine, mine)) == 0
    assert edu.ioctl(HOT_RESET, raw(20, 0, 2, other, mine)) == 0
    for fd in (mine, other):
        host.process.close(fd)


def test_hot_reset_checks_its_argument_in_the_kernels_order(host: Host) -> None:
    edu = host.open(EDU_ALONE)
    with eventfd() as fd:
        for words, number in (
            ((11, 0, 1), errno.EINVAL),
            ((16, 1, 1, 0), errno.EINVAL),
            ((12, 0, 0), errno.EINVAL),
            ((20, 0, 2, 0, 0), errno.EINVAL),
            ((16, 0, 1, fd), errno.EINVAL),
            ((16, 0, 1, 0x7FFFFFFF), errno.EBADF),
            ((16, 0, 1, 0xFFFFFFFF), errno.EBADF),
        ):
            with refused(number):
                edu.ioctl(HOT_RESET, raw(*words))


def test_last_close_resets_a_bus_whose_functions_could_not_be_reset_alone(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    resets: list[str] = []
    for address in (EDU, TESTDEV):
        model = host.machine.device(address).model
        monkeypatch.setattr(model, "reset", lambda address=address: resets.append(address))
    first, second = host.open(EDU), host.open(TESTDEV)
    first.close()
    assert resets == []
    second.close()
    assert resets == [EDU, TESTDEV]


# --- EEH ---


def test_eeh_reset_forgets_the_configuration_and_its_end_brings_it_back_as_at_boot(host: Host) -> None:
    edu = host.open(EDU)
    edu.set_config(reg.COMMAND, b"\x06\x01")
    with eventfd() as fd:
        edu.set_irqs(MSI, EVENTFD | TRIGGER, fd)
        assert edu.pci.pe
        edu.pci.eeh.assert_reset()
        assert edu.pci.registers.get(reg.BAR0, 4) == 0
        edu.pci.eeh.deactivate_reset()
        assert edu.pci.registers.get(reg.BAR0, 4) == 0x80000000
        assert edu.config(reg.COMMAND, 2) == b"\x02\x01"
        edu.set_config(reg.COMMAND, b"\x06\x01")
        edu.write(0x60, b"\0\0\0\1")
        assert taken(fd) == 0  # MSI is dead until it is set up again
        edu.set_irqs(MSI, 1 | TRIGGER, count=0)
        edu.set_irqs(MSI, EVENTFD | TRIGGER, fd)
        edu.write(0x60, b"\0\0\0\1")
        assert taken(fd) == 1
        edu.close()


# --- IOEVENTFD ---


def ioeventfd(opened: Opened, offset: int, fd: int, *, data: int = 0x01000000, size: int = 4, argsz: int = 32) -> int:
    return opened.ioctl(IOEVENTFD, bytearray(struct.pack("=IIQQiI", argsz, size, offset, data, fd, 0)))


def test_ioeventfd_writes_little_endian_whenever_it_is_signalled(host: Host) -> None:
    edu = host.open(EDU)
    with eventfd() as fd, eventfd() as interrupt:
        edu.set_irqs(INTX, EVENTFD | TRIGGER, interrupt)
        assert ioeventfd(edu, 0x60, fd) == 0
        os.eventfd_write(fd, 1)
        until(lambda: taken(interrupt) == 1)
        assert edu.read(0x24, 4) == b"\0\0\0\1"
        assert taken(fd) == 0
        assert ioeventfd(edu, 0x60, -1) == 0
        edu.close()


def test_eventfd_of_two_ioeventfds_makes_both_writes(host: Host) -> None:
    import os

    edu = host.open(EDU)
    with eventfd() as fd:
        ioeventfd(edu, 0x60, fd)
        ioeventfd(edu, 4, fd, data=0)
        os.eventfd_write(fd, 1)
        until(lambda: edu.read(0x24, 4) == b"\0\0\0\1" and edu.read(4, 4) == b"\xff" * 4)
        edu.close()


def test_ioeventfd_refuses_in_the_kernels_order(host: Host) -> None:
    edu, nvme = host.open(EDU), host.open(NVME)
    with eventfd() as fd, open("/dev/null", encoding="ascii") as null:
        assert ioeventfd(edu, 0, fd) == 0
        for opened, offset, how, number in (
            (edu, 0, {"argsz": 27}, errno.EINVAL),
            (edu, 0, {"size": 3}, errno.EINVAL),
            (edu, 0, {"size": 0}, errno.EINVAL),
            (edu, 0, {"size": 16}, errno.EINVAL),
            (edu, 0, {"fd": -2}, errno.EINVAL),
            (edu, (1 << 20) - 2, {}, errno.EINVAL),
            (edu, 1 << 40, {}, errno.EINVAL),
            (edu, 6 << 40, {}, errno.EINVAL),
            (edu, 7 << 40, {}, errno.EINVAL),
            (nvme, 0x2000, {}, errno.EINVAL),
            (nvme, 0x1FFC, {"size": 8}, errno.EINVAL),
            (nvme, 0x1FF8, {"size": 8}, 0),
            (edu, 0, {}, errno.EEXIST),
            (edu, 8, {"fd": -1}, errno.ENODEV),
            (edu, 8, {"fd": 99999}, errno.EBADF),
            (edu, 8, {"fd": null.fileno()}, errno.EINVAL),
        ):
            how = {"fd": fd, **how}
            if number:
                with refused(number):
                    ioeventfd(opened, offset, **how)  # type: ignore[arg-type]
            else:
                assert ioeventfd(opened, offset, **how) == 0  # type: ignore[arg-type]
        edu.close()
        nvme.close()


def test_ioeventfd_of_8_bytes_is_gone_in_7_2() -> None:
    edu = Host(kernel=(7, 2)).open(EDU)
    with eventfd() as fd:
        with refused(errno.EINVAL):
            ioeventfd(edu, 0x80, fd, size=8)
        assert ioeventfd(edu, 0x80, fd) == 0
        edu.close()


# --- FEATURE ---

GET, SET, PROBE = 1 << 16, 1 << 17, 1 << 18


def feature(opened: Opened, flags: int, *data: int, argsz: int | None = None) -> int:
    size = 8 + 4 * len(data) if argsz is None else argsz
    return opened.ioctl(FEATURE, bytearray(struct.pack(f"=II{len(data)}i", size, flags, *data)))


def test_features_are_refused_in_the_kernels_order(host: Host) -> None:
    nvme = host.open(NVME)
    for flags, number in (
        (3 | 1 << 19, errno.EINVAL),
        (3 | GET | SET, errno.EINVAL),
        (1 | GET, errno.ENOTTY),
        (0 | SET, errno.ENOTTY),
        (11 | GET, errno.ENOTTY),
        (12 | GET, errno.ENOTTY),
        (3 | GET, errno.EINVAL),
        (3, errno.EINVAL),
        (4 | SET, errno.EINVAL),
        (3 | GET | SET | PROBE, errno.EINVAL),
    ):
        with refused(number):
            feature(nvme, flags)
    with refused(errno.EINVAL):
        feature(nvme, 3 | PROBE, argsz=7)
    for number in (3, 4, 5):
        assert feature(nvme, number | PROBE) == 0
        assert feature(nvme, number | SET | PROBE) == 0


def test_precopy_feature_is_known_to_7_2() -> None:
    nvme = Host(kernel=(7, 2)).open(NVME)
    with refused(errno.EINVAL):
        feature(nvme, 12 | GET)


def test_low_power_lasts_until_it_is_left_and_is_entered_once(host: Host) -> None:
    nvme = host.open(NVME)
    mapping = vfio_pci.OPS.mmap(nvme.vdev, nvme.process, 4096, 0, 3)
    assert feature(nvme, 3 | SET) == 0
    assert nvme.pci.power_state == 3
    with refused(errno.EINVAL):
        feature(nvme, 3 | SET)
    with pytest.raises(BusError, match="low power"):
        mapping.load(0, 4)
    assert nvme.read(8, 4) == b"\x00\x04\x01\x00"  # an access wakes it for as long as it takes
    assert nvme.pci.power_state == 3
    assert feature(nvme, 5 | SET) == 0
    assert nvme.pci.power_state == 0
    assert mapping.load(8, 4) == 0x10400


def test_wakeup_eventfd_tells_of_the_first_access_which_ends_low_power(host: Host) -> None:
    nvme = host.open(NVME)
    with eventfd() as fd:
        assert feature(nvme, 4 | SET, fd, 0) == 0
        assert taken(fd) == 0
        assert nvme.read(8, 4) == b"\x00\x04\x01\x00"
        assert taken(fd) == 1
        assert nvme.pci.power_state == 0
        for bad, number in ((-1, errno.EINVAL), (99999, errno.EBADF)):
            with refused(number):
                feature(nvme, 4 | SET, bad, 0)


def test_waking_from_low_power_sets_messages_up_again(host: Host) -> None:
    edu = host.open(EDU)
    edu.set_config(reg.COMMAND, b"\x06\x01")
    with eventfd() as fd:
        edu.set_irqs(MSI, EVENTFD | TRIGGER, fd)
        feature(edu, 3 | SET)
        edu.set_config(0x42, b"\0\0")
        edu.write(0x60, b"\0\0\0\1")
        assert taken(fd) == 1
        edu.close()


def test_unknown_requests_raise_enotty(host: Host) -> None:
    edu = host.open(EDU)
    for n in (0, 6, 14, 15, 18, 19, 20, 100, None):
        with refused(errno.ENOTTY):
            edu.ioctl(n, raw(8, 0))


def test_messages_of_msix_survive_a_reset(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(devices.MODELS, "nvme", devices.MODELS["endpoint"])
    opened = Host().open(NVME)
    opened.set_config(reg.COMMAND, b"\x06\x00")
    with eventfd() as fd:
        opened.set_irqs(MSIX, EVENTFD | TRIGGER, -1, fd)
        opened.ioctl(RESET, bytearray(4))
        opened.write(8, struct.pack("<I", 1))
        assert taken(fd) == 1
        assert opened.config(0x42, 2) == struct.pack("<H", 0x8007)
        opened.close()


def test_properties_of_a_topology_reach_the_device() -> None:
    host = Host()
    device = replace(host.machine.topology.device(NVME), model="endpoint", properties=(("vectors", "0x40"),))
    assert devices.make_model(device).vectors == 64


def test_function_below_phb4_stays_in_d0() -> None:
    nvme = Host("power9").open(NVME)
    nvme.set_config(0x64, b"\3")
    assert nvme.config(0x64, 1) == b"\x08"
    assert nvme.pci.power_state == 0
    assert nvme.read(8, 4) == b"\x00\x04\x01\x00"
