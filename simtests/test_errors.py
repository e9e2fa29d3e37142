"""Messages: what failed, the rule with its values, and the mend."""

import errno

import pytest

from vfio import errors


def test_every_error_is_an_oserror_that_keeps_its_errno():
    error = errors.OutsideWindow("cannot map", 0x80000000, 0x1000, ["default window 0x0..0x80000000"])
    assert isinstance(error, OSError)
    assert error.errno == errno.ENXIO
    assert "0x80000000..0x80001000" in str(error)
    assert "default window 0x0..0x80000000" in str(error)


def test_group_that_is_not_viable_names_each_blocker_and_the_command_that_frees_it():
    blockers = [errors.Blocker("0001:03:00.1", "tg3", "network interface enP1p3s0f1 is up")]
    error = errors.GroupNotViable(7, blockers)
    assert str(error) == (
        "group 7 is not viable: 0001:03:00.1 is on tg3 (network interface enP1p3s0f1 is up) [EPERM]\n"
        "  free it:  vfio bind 0001:03:00.1"
    )


def test_busy_names_the_process():
    assert "held by pid 42 (qemu-system-ppc)" in str(errors.Busy("group 3", [errors.Holder(42, "qemu-system-ppc")]))


def test_locked_memory_says_how_much_is_needed_and_three_ways_to_allow_it():
    text = str(errors.LockedMemoryLimit("cannot register", 1 << 20, 1 << 16, 1 << 18))
    for part in ("1 MiB", "64 KiB", "256 KiB", "ulimit -l 1088", "limits.conf", "LimitMEMLOCK=1088K"):
        assert part in text


def test_timeouts_are_timeout_errors():
    with pytest.raises(TimeoutError):
        raise errors.TimedOut("waiting", 1)


@pytest.mark.parametrize(("count", "text"), [(0, "0 bytes"), (4095, "4095 bytes"), (4096, "4 KiB"), (1 << 40, "1 TiB")])
def test_sizes_are_exact(count, text):
    assert errors.size(count) == text
