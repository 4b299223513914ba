# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Console ports: a driver's rings on one side, programs on real sockets on the other."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.virtio import console as console_module
from devices.virtio import console_port
from devices.virtio.console import VirtioConsole
from devices.virtio.console_port import PortConfig
from kvm_ffi.timer import Timer

if TYPE_CHECKING:
    from tests.unit.devices.virtio.conftest import Machine, MachineFactory

VERSION_1, MULTIPORT, EVENT_IDX = 1 << 32, 1 << 1, 1 << 29
READY, ADD, REMOVE, PORT_READY, CONSOLE, RESIZE, OPEN, NAME = range(8)
NEEDS_RESET = 64
CONTROL_RX, CONTROL_TX = 2, 3
TTY, AGENT, LOG = 0, 1, 2  # ports, as the rig's device numbers them
BUFFERS_GPA, MESSAGE_GPA, DATA_GPA = 0x60000, 0x70000, 0x80000
BUFFER_BYTES = 256
BUFFERS = 8
BACKLOG_BYTES = 64 * 1024
MANY = bytes(range(256)) * 4096  # a MiB: more than any socket holds
VERSIONS = st.sampled_from((VERSION_1, VERSION_1 | EVENT_IDX))


def rx_of(port: int) -> int:
    return 2 + 2 * port if port else 0


class Rig:
    """A console and two named ports, and the driver's side of them."""

    def __init__(self, machine: Machine, console: VirtioConsole, directory: Path) -> None:
        self.machine = machine
        self.console = console
        self.directory = directory
        self.programs: list[socket.socket] = []

    def close(self) -> None:
        for program in self.programs:
            program.close()
        self.machine.close()

    def start(self, features: int = VERSION_1) -> None:
        """Bring the driver up, with buffers for control messages and for what each port gets."""
        self.machine.start(features | MULTIPORT)
        for index in (CONTROL_RX, rx_of(TTY), rx_of(AGENT), rx_of(LOG)):
            for number in range(BUFFERS):
                self.offer(index, number)
            self.kick(index)
        self.control(0, READY, 1)
        for port in (TTY, AGENT, LOG):
            self.control(port, PORT_READY, 1)

    def kick(self, index: int) -> None:
        self.machine.transport._kicks[index].signal()
        self.settle()

    def settle(self) -> None:
        """Let the device do all that it can do now."""
        for _ in range(10_000):
            if not self.machine.loop.dispatch():
                return
        raise AssertionError("the device does not come to rest")

    def offer(self, index: int, number: int) -> None:
        gpa = BUFFERS_GPA + (index * BUFFERS + number) * BUFFER_BYTES
        self.machine.post(index, [(gpa, BUFFER_BYTES, True)], head=number)

    def take(self, index: int) -> list[bytes]:
        """Return what the driver was given in a queue, and offer the buffers again."""
        found = []
        while used := self.machine.used(index):
            for number, written in used:
                gpa = BUFFERS_GPA + (index * BUFFERS + number) * BUFFER_BYTES
                found.append(self.machine.memory.read(gpa, written))
                self.offer(index, number)
            self.kick(index)
        return found

    def control(self, port: int, event: int, value: int) -> None:
        self.machine.memory.write(MESSAGE_GPA, struct.pack("<IHH", port, event, value))
        self.machine.post(CONTROL_TX, [(MESSAGE_GPA, 8, False)])
        self.kick(CONTROL_TX)

    def news(self) -> list[tuple[int, int, int, bytes]]:
        """Return the control messages that the driver was sent."""
        return [(*struct.unpack("<IHH", raw[:8]), raw[8:]) for raw in self.take(CONTROL_RX)]

    def received(self, port: int) -> bytes:
        """Return what a port's reader in the guest was given."""
        return b"".join(self.take(rx_of(port)))

    def write(self, port: int, data: bytes) -> bool:
        """Write in the guest; whether the device has taken it."""
        gpa = DATA_GPA + port * 0x20000
        self.machine.memory.write(gpa, data)
        self.machine.post(rx_of(port) + 1, [(gpa, len(data), False)])
        self.kick(rx_of(port) + 1)
        return bool(self.machine.used(rx_of(port) + 1))

    def connect(self, name: str) -> socket.socket:
        """Be a program of the host."""
        program = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.programs.append(program)
        program.connect(str(self.directory / name))
        program.setblocking(False)
        self.settle()
        return program

    def drain(self, program: socket.socket) -> bytes:
        """Read in the program all that there is."""
        found = bytearray()
        while True:
            try:
                piece = program.recv(1 << 20)
            except BlockingIOError:
                return bytes(found)
            found += piece
            self.settle()
            if not piece:
                return bytes(found)


def listen(path: Path) -> int:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen(4)
    return sock.detach()


def make_console(directory: Path) -> VirtioConsole:
    configs = [PortConfig(name, name == "tty") for name in ("agent", "tty", "log")]
    return VirtioConsole(configs, [listen(directory / config.name) for config in configs])


@pytest.fixture
def make_rig(make_machine: MachineFactory) -> Iterator[Callable[[], Rig]]:
    rigs: list[Rig] = []
    with tempfile.TemporaryDirectory() as directory:

        def make() -> Rig:
            console = make_console(Path(directory))
            rigs.append(Rig(make_machine(console), console, Path(directory)))
            return rigs[-1]

        yield make
        for rig in rigs:
            rig.close()


@pytest.fixture
def rig(make_rig: Callable[[], Rig]) -> Rig:
    made = make_rig()
    made.start()
    made.news()
    return made


def test_driver_learns_of_each_port_and_its_name(make_rig: Callable[[], Rig]) -> None:
    rig = make_rig()
    rig.start()
    assert rig.news() == [
        (AGENT, ADD, 0, b""),
        (TTY, ADD, 0, b""),
        (LOG, ADD, 0, b""),
        (TTY, CONSOLE, 1, b""),
        (TTY, NAME, 1, b"tty"),
        (TTY, OPEN, 1, b""),
        (AGENT, NAME, 1, b"agent"),
        (AGENT, OPEN, 0, b""),
        (LOG, NAME, 1, b"log"),
        (LOG, OPEN, 0, b""),
    ]
    words = [rig.machine.read(0x2000 + at, 4) for at in (0, 4, 8)]
    assert words == [0, 3, 0]


def test_driver_learns_who_comes_and_goes(rig: Rig) -> None:
    program = rig.connect("agent")
    assert rig.news() == [(AGENT, OPEN, 1, b"")]
    program.close()
    rig.settle()
    assert rig.news() == [(AGENT, OPEN, 0, b"")]


def test_bytes_of_the_program_reach_the_guest_in_whole_buffers(rig: Rig) -> None:
    rig.control(AGENT, OPEN, 1)
    program = rig.connect("agent")
    program.send(MANY[:1000])
    rig.settle()
    assert [len(piece) for piece in rig.take(rx_of(AGENT))] == [256, 256, 256, 232]
    assert rig.console.port_stats()["agent"]["received_bytes"] == 1000


def test_guest_that_does_not_read_leaves_the_rest_in_the_socket(rig: Rig) -> None:
    rig.control(AGENT, OPEN, 1)
    program = rig.connect("agent")
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < len(MANY):
            sent += program.send(MANY[sent:])
            rig.settle()
    assert sent < len(MANY)
    assert rig.received(AGENT) == MANY[:sent]


def test_bytes_wait_until_the_guest_opens_the_port(rig: Rig) -> None:
    program = rig.connect("agent")
    program.send(b"early")
    rig.settle()
    assert rig.received(AGENT) == b""
    rig.control(AGENT, OPEN, 1)
    assert rig.received(AGENT) == b"early"


def test_what_the_guest_writes_reaches_the_program(rig: Rig) -> None:
    program = rig.connect("agent")
    assert rig.write(AGENT, b"one ")
    assert rig.write(AGENT, b"two")
    assert program.recv(100) == b"one two"


def test_program_that_does_not_read_holds_its_own_port_up_and_nothing_is_lost(rig: Rig) -> None:
    program, other = rig.connect("agent"), rig.connect("log")
    piece = MANY[: 64 * 1024]
    taken = 0
    while rig.write(AGENT, piece):
        taken += 1
    # The one that was not taken lies in the ring; of what was, the device keeps one at most.
    assert rig.write(LOG, b"not held up")
    assert other.recv(100) == b"not held up"
    assert rig.drain(program) == piece * (taken + 1)
    assert rig.machine.used(rx_of(AGENT) + 1) != []


def test_without_a_program_what_the_guest_writes_is_dropped_and_counted(rig: Rig) -> None:
    assert rig.write(AGENT, b"anybody?")
    assert rig.console.port_stats()["agent"]["dropped_bytes"] == 8
    assert rig.drain(rig.connect("agent")) == b""


def test_console_keeps_its_last_words_for_who_comes_later(rig: Rig) -> None:
    for start in range(0, 4 * BACKLOG_BYTES, BACKLOG_BYTES // 2):
        assert rig.write(TTY, MANY[start + 1 : start + 1 + BACKLOG_BYTES // 2])
    tail = MANY[1 : 4 * BACKLOG_BYTES + 1][-BACKLOG_BYTES:]
    assert rig.drain(rig.connect("tty")) == tail
    assert rig.console.port_stats()["tty"]["dropped_bytes"] == 3 * BACKLOG_BYTES


def test_console_never_waits_for_its_reader(rig: Rig) -> None:
    program = rig.connect("tty")
    for _ in range(32):
        assert rig.write(TTY, MANY[: 32 * 1024])
    assert rig.drain(program).endswith(MANY[: 32 * 1024])


def test_next_program_is_served_when_the_one_before_has_left(rig: Rig) -> None:
    first, second = rig.connect("agent"), rig.connect("agent")
    rig.write(AGENT, b"for the first")
    first.close()
    rig.settle()
    rig.write(AGENT, b"for the second")
    assert second.recv(100) == b"for the second"
    assert rig.console.port_stats()["agent"]["connections"] == 2


def test_what_waited_for_a_program_that_left_is_dropped(rig: Rig) -> None:
    program = rig.connect("agent")
    while rig.write(AGENT, MANY[: 64 * 1024]):
        pass
    program.close()
    rig.settle()
    assert rig.machine.used(rx_of(AGENT) + 1) != []
    assert rig.drain(rig.connect("agent")) == b""


def test_program_that_has_said_all_still_listens(rig: Rig) -> None:
    rig.control(AGENT, OPEN, 1)
    program = rig.connect("agent")
    program.send(b"question")
    program.shutdown(socket.SHUT_WR)
    rig.settle()
    assert rig.received(AGENT) == b"question"
    rig.write(AGENT, b"answer")
    assert program.recv(100) == b"answer"


def test_all_of_a_program_that_writes_and_leaves_is_delivered(rig: Rig) -> None:
    rig.control(AGENT, OPEN, 1)
    program = rig.connect("agent")
    program.send(MANY[:50_000])
    program.close()
    rig.settle()
    assert rig.received(AGENT) == MANY[:50_000]
    assert rig.news()[-1] == (AGENT, OPEN, 0, b"")
    assert rig.connect("agent").send(b"next") == 4


def test_all_of_a_program_that_never_read_is_delivered_too(rig: Rig) -> None:
    rig.control(AGENT, OPEN, 1)
    program = rig.connect("agent")
    program.send(MANY[:50_000])
    rig.settle()
    while rig.write(AGENT, MANY[: 64 * 1024]):
        pass
    program.close()
    rig.settle()
    # Its part of the ring is free for what the guest writes next, and drops.
    assert rig.machine.used(rx_of(AGENT) + 1) != []
    assert rig.write(AGENT, b"more")
    assert rig.received(AGENT) == MANY[:50_000]
    assert rig.news()[-1] == (AGENT, OPEN, 0, b"")
    assert rig.connect("agent").send(b"next") == 4
    rig.settle()
    assert rig.received(AGENT) == b"next"


def test_program_that_only_stops_reading_is_hung_up_on(rig: Rig) -> None:
    rig.control(AGENT, OPEN, 1)
    program = rig.connect("agent")
    program.send(b"last words")
    program.shutdown(socket.SHUT_RD)
    rig.write(AGENT, b"hello?")
    assert rig.received(AGENT) == b"last words"
    assert rig.news()[-1] == (AGENT, OPEN, 0, b"")
    with pytest.raises(BrokenPipeError):
        program.send(b"and another thing")


def test_connection_that_cannot_be_taken_is_taken_later(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console_port, "ACCEPT_RETRY_NS", 50_000_000)
    program = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    rig.programs.append(program)
    lowest_free = os.dup(program.fileno())
    os.close(lowest_free)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        program.connect(str(rig.directory / "agent"))
        rig.settle()  # raises when the device does not come to rest
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    while not rig.console.port_stats()["agent"]["connections"]:
        assert rig.machine.loop.dispatch(timeout_s=10)


def test_what_a_program_left_is_dropped_when_the_guest_closes_the_port(rig: Rig) -> None:
    rig.control(AGENT, OPEN, 1)
    program = rig.connect("agent")
    program.send(MANY[:50_000])
    program.close()
    rig.settle()
    rig.control(AGENT, OPEN, 0)
    rig.take(rx_of(AGENT))
    rig.control(AGENT, OPEN, 1)
    rig.connect("agent").send(b"next")
    rig.settle()
    assert rig.received(AGENT) == b"next"


def test_program_that_left_before_the_guest_opened_is_forgotten(rig: Rig) -> None:
    program = rig.connect("agent")
    program.send(b"nobody hears this")
    program.close()
    rig.settle()
    rig.control(AGENT, OPEN, 1)
    assert rig.received(AGENT) == b""


def test_paused_device_leaves_sockets_and_rings_alone(rig: Rig) -> None:
    rig.control(AGENT, OPEN, 1)
    program = rig.connect("agent")
    rig.console.quiesce()
    program.send(b"later")
    assert not rig.write(AGENT, b"later too")
    assert rig.received(AGENT) == b""
    rig.console.resume()
    rig.settle()
    assert rig.received(AGENT) == b"later"
    assert program.recv(100) == b"later too"


def test_reset_hangs_up_and_the_next_driver_starts_anew(rig: Rig) -> None:
    program = rig.connect("agent")
    rig.machine.set_status(0)
    assert program.recv(100) == b""
    rig.start()
    rig.connect("agent")
    assert (AGENT, OPEN, 1, b"") in rig.news()


def test_driver_without_multiport_has_the_console_alone(make_rig: Callable[[], Rig]) -> None:
    rig = make_rig()
    rig.machine.start(VERSION_1, queues=[0, 1])
    rig.offer(0, 0)
    program = rig.connect("tty")
    program.send(b"in")
    rig.settle()
    assert rig.received(TTY) == b"in"
    assert rig.write(TTY, b"out")
    assert program.recv(100) == b"out"


def test_news_wait_for_buffers_and_do_not_add_up(rig: Rig) -> None:
    for _ in range(30):
        rig.control(0, READY, 1)
        rig.connect("agent").close()
        rig.settle()
    told = rig.news()
    # 8 buffers were there, the rest is the last of each kind.
    assert len(told) <= BUFFERS + 4
    assert told[-1] == (AGENT, OPEN, 0, b"")


def test_unknown_ports_and_events_are_ignored(rig: Rig) -> None:
    for port, event in ((99, OPEN), (0xFFFFFFFF, PORT_READY), (AGENT, 77), (AGENT, RESIZE)):
        rig.control(port, event, 1)
    assert rig.news() == []
    assert not rig.machine.status & NEEDS_RESET


def short_message(rig: Rig) -> None:
    rig.machine.post(CONTROL_TX, [(MESSAGE_GPA, 7, False)])
    rig.kick(CONTROL_TX)


def buffer_without_room(rig: Rig) -> None:
    rig.control(AGENT, OPEN, 1)
    rig.connect("agent").send(MANY[: BUFFERS * BUFFER_BYTES + 1])
    rig.settle()
    rig.machine.post(rx_of(AGENT), [(DATA_GPA, 8, False)])
    rig.kick(rx_of(AGENT))


def small_control_buffer(rig: Rig) -> None:
    for port in (AGENT, LOG, TTY) * 3:
        rig.control(port, PORT_READY, 1)
    rig.machine.post(CONTROL_RX, [(DATA_GPA, 4, True)])
    rig.kick(CONTROL_RX)


def write_that_overlaps_itself(rig: Rig) -> None:
    rig.connect("agent")
    rig.machine.post(rx_of(AGENT) + 1, [(DATA_GPA, 0x40000, False)] * 5)
    rig.kick(rx_of(AGENT) + 1)


@pytest.mark.parametrize(
    "break_it",
    [short_message, buffer_without_room, small_control_buffer, write_that_overlaps_itself],
)
def test_malformed_request_ends_the_device_and_it_comes_to_rest(
    rig: Rig, break_it: Callable[[Rig], None]
) -> None:
    waiting = rig.connect("log")
    rig.control(LOG, OPEN, 1)
    break_it(rig)
    assert rig.machine.status & NEEDS_RESET
    waiting.send(b"nobody takes this")
    rig.settle()
    rig.machine.set_status(0)
    rig.start()
    assert not rig.machine.status & NEEDS_RESET


@pytest.mark.parametrize("n_consoles", [0, 2])
def test_too_many_ports_are_refused(n_consoles: int) -> None:
    ports = [PortConfig(f"p{n}", n < n_consoles) for n in range(9 if n_consoles == 0 else 2)]
    with pytest.raises(ValueError, match="ports"):
        VirtioConsole(ports, [])


@settings(max_examples=40)
@given(
    features=VERSIONS,
    steps=st.lists(
        st.tuples(st.sampled_from("swrt"), st.integers(1, 3000)), min_size=1, max_size=40
    ),
)
def test_both_streams_arrive_whole_whatever_the_pieces(
    make_rig_of: Callable[[], Rig], features: int, steps: list[tuple[str, int]]
) -> None:
    rig = make_rig_of()
    rig.start(features)
    rig.control(AGENT, OPEN, 1)
    program = rig.connect("agent")
    to_guest, to_host = bytearray(), bytearray()
    in_guest, in_host = bytearray(), bytearray()
    for what, size in steps:
        if what == "s":
            to_guest += (piece := os.urandom(size))
            program.send(piece)
            rig.settle()
        elif what == "w":
            to_host += (piece := os.urandom(size))
            assert rig.write(AGENT, piece)
        elif what == "r":
            in_guest += rig.received(AGENT)
        else:
            in_host += rig.drain(program)
    assert in_guest + rig.received(AGENT) == to_guest
    assert in_host + rig.drain(program) == to_host


@settings(max_examples=60)
@given(
    messages=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 3), st.integers(0, 0xFFFFFFFF)),
            st.one_of(st.integers(0, 8), st.integers(0, 0xFFFF)),
            st.integers(0, 0xFFFF),
        ),
        max_size=30,
    ),
    chains=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 5000), st.booleans()), max_size=10),
)
def test_garbage_of_a_driver_leaves_a_device_that_serves_the_next_one(
    make_rig_of: Callable[[], Rig],
    messages: list[tuple[int, int, int]],
    chains: list[tuple[int, int, bool]],
) -> None:
    rig = make_rig_of()
    rig.start()
    rig.connect("agent").send(MANY[:9000])
    for message in messages:
        rig.control(*message)
    for index, length, is_writable in chains:
        rig.machine.post(index, [(DATA_GPA, length, is_writable)])
        rig.kick(index)
    rig.machine.set_status(0)
    rig.start()
    rig.control(AGENT, OPEN, 1)
    rig.connect("agent").send(b"still there")
    rig.settle()
    assert rig.received(AGENT) == b"still there"


@pytest.fixture(scope="module")
def make_rig_of() -> Iterator[Callable[[], Rig]]:
    """As make_rig, for many examples of one test; each rig replaces the one before."""
    from tests.unit.devices.conftest import FakeExitTable, FakeRouter, FakeVm
    from tests.unit.devices.virtio.conftest import Machine

    rigs: list[Rig] = []
    with tempfile.TemporaryDirectory() as directory:

        def make() -> Rig:
            for rig in rigs:
                rig.close()
            where = Path(tempfile.mkdtemp(dir=directory))
            console = make_console(where)
            machine = Machine(console, FakeVm(), FakeRouter(), FakeExitTable())
            rigs[:] = [Rig(machine, console, where)]
            return rigs[0]

        yield make
        rigs[0].close()


def test_a_device_without_enough_descriptors_leaves_its_listeners_to_the_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Timer] = []

    def second_fails() -> Timer:
        if made:
            raise OSError(errno.EMFILE, "Too many open files")
        made.append(Timer())
        return made[0]

    monkeypatch.setattr(console_module, "Timer", second_fails)
    listeners = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    with pytest.raises(OSError, match="Too many open files"):
        VirtioConsole(
            [PortConfig("tty", True), PortConfig("agent", False)],
            [listener.fileno() for listener in listeners],
        )
    for listener in listeners:
        os.fstat(listener.fileno())
        listener.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(made[0].fd)
