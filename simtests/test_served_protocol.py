"""Clients of a served machine that say what no client says: they are disconnected, and nobody else notices."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from simtests.conformance.raw import V2, Member, Program, answer
from simtests.conformance.served import ServedMachine
from vfio import errors, uapi
from vfio.backends import remote, wire
from vfio.backends.remote import RemoteBackend
from vfio.backends.wire import Kind
from vfio.fake import server

PATIENCE = 0.3
LARGE = 300_000
"""Bytes: more than a socket holds."""
DEVICE = Member("0000:01:00.0", 0)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedMachine]:
    """A server that has little patience."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "PATIENCE", PATIENCE)
        machine = ServedMachine("power8", tmp_path_factory.mktemp("served") / "socket")
    yield machine
    machine.end()


@pytest.fixture
def good(machine: ServedMachine) -> Iterator[RemoteBackend]:
    """A client that behaves, and is served before and after; the server has no more descriptors than before."""
    backend = machine.renew()
    before = len(os.listdir(f"/proc/{machine.pid}/fd"))
    assert backend.listdir("/dev") == ["kmsg", "vfio"]
    yield backend
    assert backend.listdir("/dev") == ["kmsg", "vfio"]
    assert len(os.listdir(f"/proc/{machine.pid}/fd")) == before
    assert [client["pid"] for client in remote.status(str(machine.path))["clients"]] == [os.getpid()]
    backend.exit()


class Peer:
    """A raw connection."""

    def __init__(self, machine: ServedMachine) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(machine.path))
        self.socket.settimeout(10)
        self.incoming = wire.Incoming()
        self.sequence = 0

    def send(self, data: bytes, descriptors: tuple[int, ...] = ()) -> None:
        self.socket.sendmsg([data], wire.ancillary(descriptors))

    def ask(self, kind: int, body: bytes = b"", numbers: dict[int, int] | None = None) -> wire.Frame:
        """A request as it should be, and its answer; `numbers` are descriptors by the number that is told."""
        named = numbers or {}
        self.sequence += 1
        self.send(wire.encode(kind, self.sequence, body, tuple(named)), tuple(named.values()))
        while (frame := self.incoming.frame()) is None:
            assert self.incoming.receive(self.socket)
        assert frame.sequence == self.sequence
        return frame

    def hello(self) -> Peer:
        assert self.ask(Kind.HELLO, hello()).kind == Kind.RESULT
        return self

    def is_disconnected(self) -> bool:
        try:
            while data := self.socket.recv(65536):
                assert data
        except ConnectionResetError:
            pass
        self.socket.close()
        return True


def hello(*, version: int = wire.VERSION, values: object = None) -> bytes:
    if values is None:
        values = [0, None, -1, True, *remote._proof(), False]
    return wire.MAGIC + bytes([version]) + json.dumps(values).encode()


def header(length: int, kind: int, descriptors: int = 0) -> bytes:
    return wire.HEADER.pack(length, kind, descriptors, 1)


BEFORE_HELLO = {
    "zeros": bytes(64),
    "text": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "noise": random.Random(1).randbytes(4096),
    "huge length": header(0xFFFF_FFFF, Kind.HELLO),
    "one byte too long": header(wire.LONGEST + 1, Kind.HELLO),
    "more descriptors than fit": header(8, Kind.HELLO, 3) + bytes(8),
    "too many descriptors": header(4096, Kind.HELLO, 1000),
    "descriptors that did not come": header(8, Kind.HELLO, 2) + bytes(8),
    "no greeting": wire.encode(Kind.HELLO, 1, b"hello?"),
    "greeting alone": wire.encode(Kind.HELLO, 1, wire.GREETING),
    "hello of no list": wire.encode(Kind.HELLO, 1, hello(values={})),
    "hello of wrong kinds": wire.encode(Kind.HELLO, 1, hello(values=[0, 0, 0, 0, 0, 0, 0])),
    "hello of no groups": wire.encode(Kind.HELLO, 1, hello(values=[0, [], 0, True, *remote._proof(), False])),
    "hello without memory": wire.encode(Kind.HELLO, 1, hello(values=[0, None, 0, True, 0, "", False])),
    "hello of a child without a parent": wire.encode(
        Kind.HELLO, 1, hello(values=[7, None, 7, True, *remote._proof(), True])
    ),
    "call before hello": wire.encode(Kind.LISTDIR, 1, b'["/dev"]'),
    "child before hello": wire.encode(Kind.ADOPT, 1, json.dumps(remote._proof()).encode()),
    "answer": wire.encode(Kind.RESULT, 1),
    "write before hello": wire.encode(Kind.WRITE_TEXT, 1, b'["/sys/bus/pci/rescan", "1"]'),
    "stop without greeting": wire.encode(Kind.STOP, 1),
    "descriptors without any": wire.encode(Kind.DESCRIPTORS, 1),
}


@pytest.mark.parametrize("data", BEFORE_HELLO.values(), ids=BEFORE_HELLO.keys())
def test_stranger_that_says_nonsense_is_disconnected(machine, good, data):
    peer = Peer(machine)
    peer.send(data)
    assert peer.is_disconnected()


AFTER_HELLO = {
    "unknown request": wire.encode(77, 2),
    "second hello": wire.encode(Kind.HELLO, 2, hello()),
    "child that nobody announced": wire.encode(Kind.ADOPT, 2, json.dumps(remote._proof()).encode()),
    "no JSON": wire.encode(Kind.LISTDIR, 2, b"\xff\xfe["),
    "deep JSON": wire.encode(Kind.LISTDIR, 2, b"[" * 1_000_000),
    "endless number": wire.encode(Kind.POPULATE, 2, b"[" + b"9" * 5000 + b",1]"),
    "number of 65 bits": wire.encode(Kind.POPULATE, 2, b"[36893488147419103232,1]"),
    "too few arguments": wire.encode(Kind.CHMOD, 2, b'["/dev"]'),
    "too many arguments": wire.encode(Kind.LOCKED, 2, b"[1]"),
    "argument of another kind": wire.encode(Kind.READ_TEXT, 2, b"[[]]"),
    "truth for a number": wire.encode(Kind.POPULATE, 2, b"[true, false]"),
    "short ioctl": wire.encode(Kind.IOCTL, 2, b"\0" * 7),
    "short load": wire.encode(Kind.LOAD, 2, b"\0"),
    "short write": wire.encode(Kind.PWRITE, 2, b"\0"),
    "mapping that is not there": wire.encode(Kind.LOAD, 2, wire.LOAD.pack(99, 0, 4)),
    "unmapping what is not there": wire.encode(Kind.MUNMAP, 2, b"[99]"),
    "read of 1 GiB": wire.encode(Kind.PREAD, 2, wire.PREAD.pack(5, 1 << 30, 0)),
    "two requests at once": wire.encode(Kind.LOCKED, 2) + wire.encode(Kind.LOCKED, 3),
    "request and a half": wire.encode(Kind.LOCKED, 2) + wire.encode(Kind.LOCKED, 3)[:5],
    "write of no text": wire.encode(Kind.WRITE_TEXT, 2, b'["/sys", 1]'),
}


@pytest.mark.parametrize("data", AFTER_HELLO.values(), ids=AFTER_HELLO.keys())
def test_client_that_says_nonsense_is_disconnected(machine, good, data):
    peer = Peer(machine).hello()
    peer.send(data)
    assert peer.is_disconnected()


def test_frames_of_noise_end_nobody_elses_connection(machine, good):
    chance = random.Random(7)
    for _ in range(300):
        peer = Peer(machine).hello()
        kind = chance.choice([*map(int, Kind), chance.randrange(1 << 16)])
        if kind == Kind.STOP:
            continue
        noise = chance.randbytes(chance.randrange(200))
        peer.send(wire.encode(kind, 2, chance.choice([noise, b"[]", b'["/sys"]', json.dumps([1, 2, 3, 4]).encode()])))
        peer.socket.shutdown(socket.SHUT_WR)
        assert peer.is_disconnected()


def test_every_bit_of_a_hello_can_be_wrong(machine, good):
    right = wire.encode(Kind.HELLO, 1, hello())
    for position in range(len(wire.GREETING) + wire.HEADER.size + 4):
        for bit in (1, 16, 128):
            data = bytearray(right)
            data[position] ^= bit
            peer = Peer(machine)
            peer.send(bytes(data))
            peer.socket.shutdown(socket.SHUT_WR)
            assert peer.is_disconnected()


def test_another_version_is_told_which_one_is_spoken(machine, good):
    peer = Peer(machine)
    frame = peer.ask(Kind.HELLO, hello(version=200))
    assert frame.kind == Kind.REFUSED
    number, why, _ = json.loads(frame.body)
    assert number == errno.EPROTONOSUPPORT
    assert f"version {wire.VERSION}" in why
    assert peer.is_disconnected()


def test_client_of_another_version_raises_what_the_server_says(machine, monkeypatch):
    machine.renew().exit()
    monkeypatch.setattr(wire, "GREETING", wire.MAGIC + b"\xc8")
    with pytest.raises(errors.ServerRefused, match="version 1 of the protocol") as caught:
        remote.from_url(machine.url)
    assert caught.value.errno == errno.EPROTONOSUPPORT


# --- descriptors ---


def test_descriptors_that_no_frame_names_end_the_connection(machine, good):
    peer = Peer(machine).hello()
    peer.send(wire.encode(Kind.LOCKED, 2), (0, 1, 2))
    assert peer.is_disconnected()


def test_more_descriptors_than_a_request_may_name_end_the_connection(machine, good):
    peer = Peer(machine).hello()
    numbers = tuple(range(250))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # which come when they come
        for _ in range(wire.MOST_NAMED // 250 + 8):
            peer.send(wire.encode(Kind.DESCRIPTORS, 0, b"", numbers), (2,) * 250)
            numbers = tuple(number + 250 for number in numbers)
    assert peer.is_disconnected()


def test_number_that_stands_for_two_descriptors_ends_the_connection(machine, good):
    peer = Peer(machine).hello()
    peer.send(wire.encode(Kind.LOCKED, 2, b"", (5, 5)), (0, 1))
    assert peer.is_disconnected()


@pytest.fixture
def strangers(tmp_path: Path) -> Iterator[list[int]]:
    """Descriptors of everything that is no file of the model."""
    ours, theirs = socket.socketpair()
    found = [os.eventfd(0), *os.pipe(), ours.fileno(), theirs.fileno(), os.open(tmp_path, os.O_RDONLY)]
    found += [os.open("/dev/null", os.O_RDWR), os.memfd_create("stranger"), os.open("/proc/self/maps", os.O_RDONLY)]
    yield found
    for fd in found:
        if fd not in (ours.fileno(), theirs.fileno()):
            os.close(fd)
    ours.close()
    theirs.close()


def test_descriptors_of_other_kinds_are_no_files_of_the_model(good, strangers):
    for fd in strangers:
        assert answer(good.ioctl, fd, uapi.VFIO_GET_API_VERSION) == -errno.EBADF
        assert answer(good.pread, fd, 4, 0) == -errno.EBADF
        assert answer(good.pwrite, fd, b"1234", 0) == -errno.EBADF
        assert answer(good.mmap, fd, 4096, 0, 1) == -errno.EBADF


def test_descriptors_of_other_kinds_are_no_containers_and_no_eventfds(machine, good, strangers):
    bind(good)
    program = Program(good)
    group = program.group(DEVICE)
    for fd in strangers:
        assert group.set_container(fd) == -errno.EBADFD
    group.close()
    device = program.attached(DEVICE, V2).group.device(DEVICE.address)
    for fd in strangers[1:]:
        data = uapi.vfio_irq_set.sized(24, flags=36, index=1, start=0, count=1, data=struct.pack("=i", fd))
        assert program.ioctl(device, uapi.VFIO_DEVICE_SET_IRQS, uapi.buffer(data)) == -errno.EINVAL
    program.close_all()


def test_descriptor_by_a_false_name_is_what_it_is(machine, good):
    program = Program(good)
    container = program.container()
    peer = Peer(machine).hello()
    body = wire.IOCTL.pack(1234, 0, 1, uapi.VFIO_GET_API_VERSION, 0)
    assert peer.ask(Kind.IOCTL, body, {1234: container.fd}).kind == Kind.RESULT
    assert peer.ask(Kind.IOCTL, body, {1234: 2}).kind == Kind.FAILURE
    assert peer.ask(Kind.IOCTL, body).kind == Kind.FAILURE
    peer.socket.close()
    program.close_all()


def test_interrupts_with_more_descriptors_than_a_message_takes(machine, good):
    bind(good)
    program, eventfds = Program(good), [os.eventfd(0) for _ in range(600)]
    device = program.attached(DEVICE, V2).group.device(DEVICE.address)
    data = uapi.vfio_irq_set.sized(
        20 + 4 * 600, flags=36, index=2, start=0, count=600, data=struct.pack("=600i", *eventfds)
    )
    assert program.ioctl(device, uapi.VFIO_DEVICE_SET_IRQS, uapi.buffer(data)) == -errno.EINVAL
    program.close_all()
    for fd in eventfds:
        os.close(fd)


# --- time ---


def test_part_of_a_frame_and_no_more_is_waited_for_only_so_long(machine, good):
    peer = Peer(machine).hello()
    peer.send(wire.encode(Kind.LISTDIR, 2, b'["/dev"]')[:-3])
    assert peer.is_disconnected()


def test_frame_that_drips_is_waited_for_only_so_long(machine, good):
    peer = Peer(machine).hello()
    peer.socket.settimeout(PATIENCE / 20)
    for byte in wire.encode(Kind.LISTDIR, 2, b'["/dev", "' + b"x" * 100_000):
        try:
            peer.send(bytes([byte]))
            assert peer.socket.recv(1) == b""
            break
        except TimeoutError:
            continue
        except (BrokenPipeError, ConnectionResetError):
            break
    else:
        pytest.fail("all of it was waited for")
    peer.socket.close()


def test_stranger_that_says_nothing_is_waited_for_only_so_long(machine, good):
    assert Peer(machine).is_disconnected()


def test_client_that_does_not_take_its_answer_is_waited_for_only_so_long(machine, good):
    bind(good)
    program = Program(good)
    device = program.attached(DEVICE, V2).group.device(DEVICE.address)
    good.pwrite(device, b"\x02\x00", (7 << 40) + 4)
    peer = Peer(machine).hello()
    peer.send(wire.encode(Kind.PREAD, 2, wire.PREAD.pack(device, LARGE, 0), (device,)), (device,))
    program.close_all()  # the one that does not listen keeps nobody waiting
    assert good.listdir("/dev/vfio") == ["vfio", "0"]
    while len(remote.status(str(machine.path))["clients"]) > 1:
        pass
    received = 0
    with contextlib.suppress(ConnectionResetError):
        while data := peer.socket.recv(1 << 16):
            received += len(data)
    assert received < LARGE
    peer.socket.close()


def test_answer_that_is_larger_than_a_sockets_buffer_arrives_whole(machine, good):
    bind(good)
    program = Program(good)
    device = program.attached(DEVICE, V2).group.device(DEVICE.address)
    good.pwrite(device, b"\x02\x00", (7 << 40) + 4)
    assert len(good.pread(device, LARGE, 0)) == LARGE
    program.close_all()


def test_hundreds_that_connect_at_once_are_all_greeted(machine, good):
    peers = []
    for _ in range(200):
        peers.append(peer := Peer(machine))
        peer.send(wire.encode(Kind.HELLO, 1, hello()))
    for peer in peers:
        while peer.incoming.frame() is None:
            assert peer.incoming.receive(peer.socket)
        peer.socket.close()


def bind(backend: RemoteBackend) -> None:
    backend.write_text(f"/sys/bus/pci/devices/{DEVICE.address}/driver_override", "vfio-pci")
    backend.write_text("/sys/bus/pci/drivers_probe", DEVICE.address)
