"""A PE that fails for good while a user has it open.  Its device is gone until the next boot.

Run last: hwtests/test_unrecoverable.py.
"""

import pytest

from simtests.conformance.freezing import FREEZABLE, PeState
from simtests.conformance.pci_calls import (
    COMMAND,
    CONFIG,
    PROBE,
    endpoint_address,
    eventfds,
    opened,
    outcome,
    signals,
)
from vfio import sysfs, uapi

ENABLE, GET_STATE = 1, 4
ERR, REQ = 3, 4


@pytest.mark.targets(*FREEZABLE)
@pytest.mark.not_recorded("the device is gone afterwards")
def test_pe_that_fails_for_good_asks_its_user_to_let_go_and_is_gone_when_he_has(
    backend, target, freezer, kernel_messages
):
    address = endpoint_address(target)
    backend.write_text(sysfs.path(address, "driver_override"), "vfio-pci\n")
    backend.write_text(PROBE, address)
    with opened(backend, address) as device, eventfds(2) as (error, request):
        listen(device, ERR, error)
        listen(device, REQ, request)
        freezer.set_max_freezes(0)
        freezer(address)
        freezer.force_recovery(address)
        freezer.sleep(0.1)
        assert signals(request) == 1
        assert signals(error, wait=0.2) == 0
        freezer.set_max_freezes(5)
        assert eeh(device, GET_STATE) == 4  # the host thawed MMIO, for its log
        assert freezer.look(address) == PeState(0x28, 0xC03)
        assert backend.read_text(f"/sys/bus/pci/devices/{address}/eeh_mode") == "0x600\n"
        assert device.read(CONFIG, COMMAND, 2) == "ENODEV"
        assert isinstance(device.read(CONFIG, 0, 4), bytes)
        assert outcome(device.open_again) == "ENODEV"
        assert eeh(device, ENABLE) == 0
        assert eeh(device, GET_STATE) == 0
        assert any(line.endswith("permanently disabled.") for line in kernel_messages.new())
        backend.close(device.fd)
        device._descriptors.remove(device.fd)
        freezer.until(lambda: not backend.exists(f"/sys/bus/pci/devices/{address}"))
        assert eeh(device, GET_STATE) == "EINVAL"
        status = uapi.vfio_group_status()
        assert outcome(backend.ioctl, device.group, uapi.VFIO_GROUP_GET_STATUS, uapi.buffer(status)) == "ENODEV"
        backend.write_text("/sys/bus/pci/rescan", "1")
        freezer.sleep(1)
        assert not backend.exists(f"/sys/bus/pci/devices/{address}")


def eeh(device, op):
    struct = uapi.vfio_eeh_pe_op(op=op)
    return outcome(device.backend.ioctl, device.container, uapi.VFIO_EEH_PE_OP, uapi.buffer(struct))


def listen(device, index, fd):
    flags = uapi.VFIO_IRQ_SET_DATA_EVENTFD | uapi.VFIO_IRQ_SET_ACTION_TRIGGER
    assert device.set_irqs(index, flags, count=1, data=fd.to_bytes(4, "little")) == 0
