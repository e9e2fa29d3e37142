"""What is said where the memory of a program cannot be reached: the setting that forbids it."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest

from vfio.fake import reach
from vfio.fake.memory import AddressSpace

CONTENT = b"sixteen letters."


BUFFER = ctypes.create_string_buffer(CONTENT, 16)


@pytest.fixture
def memory() -> tuple[int, bytes]:
    """Of this process: where, and what is there."""
    return ctypes.addressof(BUFFER), CONTENT


@pytest.fixture
def refuse(monkeypatch):
    """Lets the call fail with an errno, on a host with these settings."""

    def make(number: int, scope: str = "", filtered: bool = False) -> None:
        def read(*_: object) -> bytes:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(AddressSpace, "read", read)
        monkeypatch.setattr(reach, "_setting", lambda path: scope)
        monkeypatch.setattr(reach, "_filtered", lambda: filtered)

    return make


def test_memory_that_is_there_is_no_trouble(memory):
    assert reach.trouble(os.getpid(), os.getuid(), *memory) is None


def test_other_content_means_another_process(memory):
    address, content = memory
    why, _ = reach.trouble(os.getpid(), os.getuid(), address, content[::-1])
    assert "another one for the server" in why


@pytest.mark.parametrize(
    ("scope", "filtered", "said", "remedy"),
    [
        ("2", False, "kernel.yama.ptrace_scope is 2", "sysctl kernel.yama.ptrace_scope=1"),
        ("3", False, "kernel.yama.ptrace_scope is 3", "reboot"),
        ("1", True, "seccomp", "--cap-add SYS_PTRACE"),
        ("1", False, "ptrace_scope is 1", "dumpable"),
        ("", False, "ptrace_scope is not there", "dumpable"),
    ],
)
def test_setting_that_forbids_it_is_named(memory, refuse, scope, filtered, said, remedy):
    refuse(errno.EPERM, scope, filtered)
    why, what_to_do = reach.trouble(1, os.geteuid(), *memory)
    assert "process_vm_readv" in why
    assert said in why
    assert remedy in what_to_do


def test_kernel_without_the_call_is_named(memory, refuse):
    refuse(errno.ENOSYS)
    why, remedy = reach.trouble(1, os.geteuid(), *memory)
    assert "no such call" in why
    assert "CONFIG_CROSS_MEMORY_ATTACH" in remedy


def test_another_user_is_named(memory, refuse, monkeypatch):
    refuse(errno.EPERM)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    why, remedy = reach.trouble(1, 1001, *memory)
    assert "runs as uid 1001, and the server as uid 1000" in why
    assert "same user" in remedy
