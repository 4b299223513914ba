# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import errno
import itertools
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvm_ffi._kvm import ffi, lib
from kvm_ffi.engine import EngineFault
from kvm_ffi.vsock_engine import MAX_CONNECTIONS, MAX_NAME_BYTES
from tests.support.engine_thread import running, wait_signal, wait_until
from tests.support.ring_driver import WRITE
from tests.support.vsock_driver import (
    BOTH,
    CID,
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    HOST,
    LONG_S,
    NAME,
    RCV,
    REQUEST,
    RESPONSE,
    RING_SIZE,
    RST,
    RW,
    RX_BUFFERS,
    SEND,
    SHUTDOWN,
    TX_BUFFER,
    Packet,
    Vsock,
)

GUEST_PORT = 5000
HOST_PORT = 52
FIRST_HOST_PORT = 1 << 30
LARGE = 256 << 10
SMALL = 16 << 10

MakeVsock = Callable[..., Vsock]


@pytest.fixture
def make_vsock(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeVsock]:
    made: list[Vsock] = []
    # Not tmp_path: a socket's address holds 107 bytes.
    with tempfile.TemporaryDirectory(prefix="hv-") as directory:
        # Where serve() is called from this thread, its working directory counts.
        monkeypatch.chdir(directory)

        def make(**options: float) -> Vsock:
            made.append(Vsock(Path(directory), **options))
            return made[-1]

        yield make
        for vsock in made:
            vsock.close()
        monkeypatch.undo()


@pytest.fixture
def vsock(make_vsock: MakeVsock) -> Vsock:
    made = make_vsock()
    made.offer_rx()
    return made


def guest(op: int, **fields: Any) -> Packet:  # noqa: ANN401 - as a Packet has them
    """A packet of the guest's own connection."""
    return Packet(op, GUEST_PORT, HOST_PORT, **fields)


def open_from_guest(vsock: Vsock) -> socket.socket:
    listener = vsock.listen(HOST_PORT)
    answers = vsock.exchange(guest(REQUEST))
    assert [answer.op for answer in answers] == [RESPONSE]
    return vsock.accept(listener)


def open_from_host(vsock: Vsock, port: int = GUEST_PORT) -> tuple[socket.socket, int]:
    """The socket and the port that it was given."""
    sock = vsock.dial()
    sock.send(f"CONNECT {port}\n".encode())
    assert vsock.serve() == 0
    (request,) = vsock.received()
    assert (request.op, request.dst_port) == (REQUEST, port)
    assert vsock.exchange(Packet(RESPONSE, port, request.src_port)) == []
    assert sock.recv(100) == f"OK {request.src_port}\n".encode()
    return sock, request.src_port


def open_count(vsock: Vsock) -> int:
    stats = vsock.engine.stats()
    return stats["host_connections"] + stats["guest_connections"] - stats["closed"]


# --- from the guest


def test_a_guest_reaches_the_socket_of_its_port(vsock: Vsock) -> None:
    listener = vsock.listen(HOST_PORT)
    (answer,) = vsock.exchange(guest(REQUEST))
    assert answer == Packet(
        RESPONSE, HOST_PORT, GUEST_PORT, buf_alloc=LARGE, src_cid=HOST, dst_cid=CID
    )
    host = vsock.accept(listener)
    assert vsock.exchange(guest(RW, data=b"hello, host")) == []
    assert host.recv(100) == b"hello, host"
    host.send(b"hello, guest")
    (packet,) = vsock.exchange()
    assert (packet.op, packet.data, packet.fwd_cnt) == (RW, b"hello, guest", 11)


def test_a_port_without_a_listener_refuses(vsock: Vsock) -> None:
    (answer,) = vsock.exchange(guest(REQUEST))
    assert (answer.op, answer.src_port, answer.dst_port) == (RST, HOST_PORT, GUEST_PORT)
    assert vsock.engine.stats()["refused"] == 1


def test_a_listener_whose_backlog_is_full_refuses_and_does_not_hold_up(vsock: Vsock) -> None:
    vsock.listen(HOST_PORT, backlog=0)
    packets = [Packet(REQUEST, 6000 + index, HOST_PORT) for index in range(3)]
    assert [answer.op for answer in vsock.exchange(*packets)] == [RESPONSE, RST, RST]


@pytest.mark.parametrize("port", [0, 1 << 31, (1 << 32) - 1])
def test_every_port_has_its_socket(vsock: Vsock, port: int) -> None:
    vsock.listen(port)
    (answer,) = vsock.exchange(Packet(REQUEST, GUEST_PORT, port))
    assert (answer.op, answer.src_port) == (RESPONSE, port)


@pytest.mark.parametrize("cuts", [(), (44,), (1, 43, 44, 45), (20, 50, 51)])
def test_header_and_payload_may_be_cut_anywhere(vsock: Vsock, cuts: tuple[int, ...]) -> None:
    host = open_from_guest(vsock)
    vsock.send(guest(RW, data=bytes(range(200))), cuts)
    assert vsock.serve() == 0
    assert host.recv(500) == bytes(range(200))


def test_bytes_behind_the_length_in_the_header_are_not_sent(vsock: Vsock) -> None:
    host = open_from_guest(vsock)
    vsock.exchange(guest(RW, data=b"four and more", length=4))
    assert host.recv(100) == b"four"


def test_a_packet_of_hundreds_of_buffers_arrives_whole(vsock: Vsock) -> None:
    host = open_from_guest(vsock)
    data = os.urandom(2000)
    vsock.send(guest(RW, data=data), [44 + 9 * index for index in range(1, 200)])
    assert vsock.serve() == 0
    assert host.recv(4000) == data


# --- from the host


def test_a_program_of_the_host_reaches_the_guest(vsock: Vsock) -> None:
    sock, port = open_from_host(vsock)
    assert port == FIRST_HOST_PORT
    sock.send(b"ping")
    (packet,) = vsock.exchange()
    assert (packet.op, packet.src_port, packet.dst_port, packet.data) == (
        RW, port, GUEST_PORT, b"ping",
    )  # fmt: skip
    vsock.exchange(Packet(RW, GUEST_PORT, port, b"pong"))
    assert sock.recv(100) == b"pong"


def test_what_follows_the_greeting_is_the_stream(vsock: Vsock) -> None:
    sock = vsock.dial()
    sock.send(b"CONNECT 5000\nearly\nbytes")
    assert vsock.serve() == 0
    (request,) = vsock.received()
    (packet,) = vsock.exchange(Packet(RESPONSE, GUEST_PORT, request.src_port))
    assert packet.data == b"early\nbytes"


def test_a_greeting_may_come_byte_by_byte(vsock: Vsock) -> None:
    sock = vsock.dial()
    for byte in b"CONNECT 5000":
        sock.send(bytes([byte]))
        assert vsock.exchange() == []
    sock.send(b"\n")
    assert [packet.op for packet in vsock.exchange()] == [REQUEST]


@pytest.mark.parametrize(
    "greeting",
    [
        b"\n", b"CONNECT\n", b"CONNECT \n", b"CONNECT x\n", b"CONNECT 5000 \n", b"connect 5000\n",
        b"CONNECT -1\n", b"CONNECT 4294967296\n", b"CONNECT 00000000005000\n",
        b"GET / HTTP/1.1\r\n",
        b"CONNECT 99999999999999999999999999",
    ],
)  # fmt: skip
def test_anything_else_is_hung_up_on(vsock: Vsock, greeting: bytes) -> None:
    sock = vsock.dial()
    sock.send(greeting)
    assert vsock.exchange() == []
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    assert vsock.engine.stats()["refused"] == 1


@pytest.mark.parametrize("port", [0, 7, (1 << 32) - 1])
def test_every_port_of_the_guest_can_be_named(vsock: Vsock, port: int) -> None:
    open_from_host(vsock, port)


def test_a_refusal_of_the_guest_closes_the_socket(vsock: Vsock) -> None:
    sock = vsock.dial()
    sock.send(b"CONNECT 5000\n")
    (request,) = vsock.exchange()
    assert vsock.exchange(Packet(RST, GUEST_PORT, request.src_port)) == []
    assert sock.recv(100) == b""
    assert vsock.engine.stats()["refused"] == 1


def test_connections_to_one_port_of_the_guest_get_ports_of_their_own(vsock: Vsock) -> None:
    ports = [open_from_host(vsock)[1] for _ in range(20)]
    assert ports == list(range(FIRST_HOST_PORT, FIRST_HOST_PORT + 20))


def test_a_program_that_gives_up_takes_its_request_back(vsock: Vsock) -> None:
    sock = vsock.dial()
    sock.send(b"CONNECT 5000\n")
    (request,) = vsock.exchange()
    sock.close()
    assert [packet.op for packet in vsock.exchange()] == [RST]
    # The guest's answer was on its way.
    assert [p.op for p in vsock.exchange(Packet(RESPONSE, GUEST_PORT, request.src_port))] == [RST]


# --- deadlines


def expire(vsock: Vsock) -> None:
    """Wait for the next deadline, which nothing else interrupts."""
    assert lib.vsock_engine_wait(vsock.engine._c, -1) == 0
    assert vsock.serve() == 0


def test_a_program_that_does_not_greet_is_hung_up_on(make_vsock: MakeVsock) -> None:
    vsock = make_vsock(peer_timeout_s=0.05)
    sock = vsock.dial()
    assert vsock.serve() == 0
    expire(vsock)
    assert sock.recv(1) == b""


def test_a_guest_that_does_not_answer_is_given_up(make_vsock: MakeVsock) -> None:
    vsock = make_vsock(peer_timeout_s=0.05)
    vsock.offer_rx()
    sock = vsock.dial()
    sock.send(b"CONNECT 5000\n")
    assert [packet.op for packet in vsock.exchange()] == [REQUEST]
    expire(vsock)
    assert sock.recv(1) == b""
    assert [packet.op for packet in vsock.received()] == [RST]


def test_a_guest_that_does_not_confirm_the_end_is_reset(make_vsock: MakeVsock) -> None:
    vsock = make_vsock(peer_timeout_s=0.05)
    vsock.offer_rx()
    open_from_guest(vsock).close()
    assert [(p.op, p.flags) for p in vsock.exchange()] == [(SHUTDOWN, BOTH)]
    expire(vsock)
    assert [packet.op for packet in vsock.received()] == [RST]


# --- ends


def test_the_host_may_end_its_half_alone(vsock: Vsock) -> None:
    host = open_from_guest(vsock)
    host.send(b"last words")
    host.shutdown(socket.SHUT_WR)
    packets = vsock.exchange()
    assert [(p.op, p.data, p.flags) for p in packets] == [
        (RW, b"last words", 0), (SHUTDOWN, b"", SEND),
    ]  # fmt: skip
    vsock.exchange(guest(RW, data=b"still there"))
    assert host.recv(100) == b"still there"
    assert open_count(vsock) == 1


def test_the_guest_may_end_its_half_alone(vsock: Vsock) -> None:
    host = open_from_guest(vsock)
    assert vsock.exchange(guest(RW, data=b"last words"), guest(SHUTDOWN, flags=SEND)) == []
    assert host.recv(100) == b"last words"
    assert host.recv(100) == b""
    host.send(b"still there")
    assert [packet.data for packet in vsock.exchange()] == [b"still there"]


def test_both_halves_ended_one_by_one_end_the_connection(vsock: Vsock) -> None:
    host = open_from_guest(vsock)
    vsock.exchange(guest(SHUTDOWN, flags=SEND))
    host.send(b"bye")
    host.shutdown(socket.SHUT_WR)
    packets = vsock.exchange()
    assert [(p.op, p.data, p.flags) for p in packets] == [(RW, b"bye", 0), (SHUTDOWN, b"", BOTH)]
    assert vsock.exchange(guest(RST)) == []
    assert open_count(vsock) == 0


def test_a_host_that_closes_is_told_of_at_once_and_its_data_before(vsock: Vsock) -> None:
    host = open_from_guest(vsock)
    host.send(b"last words")
    host.close()
    packets = vsock.exchange()
    assert [(p.op, p.data, p.flags) for p in packets] == [
        (RW, b"last words", 0), (SHUTDOWN, b"", BOTH),
    ]  # fmt: skip
    # What the guest had sent meanwhile is no offence.
    assert vsock.exchange(guest(RW, data=b"late"), guest(RST)) == []
    assert vsock.engine.stats()["violations"] == 0


def test_a_guest_that_closes_is_answered_with_a_reset_when_all_is_written(vsock: Vsock) -> None:
    host = open_from_guest(vsock)
    packets = vsock.exchange(guest(RW, data=b"last words"), guest(SHUTDOWN, flags=BOTH))
    assert [packet.op for packet in packets] == [RST]
    assert host.recv(100) == b"last words"
    assert host.recv(100) == b""
    # The ports are free again.
    assert [p.op for p in vsock.exchange(guest(REQUEST))] == [RESPONSE]


def test_a_host_that_stops_reading_still_has_its_say(vsock: Vsock) -> None:
    host = open_from_guest(vsock)
    host.send(b"reply")
    host.shutdown(socket.SHUT_RD)
    packets = vsock.exchange(guest(RW, data=b"nobody reads this"))
    assert {(p.op, p.data or p.flags) for p in packets} == {(RW, b"reply"), (SHUTDOWN, RCV)}
    assert open_count(vsock) == 1


def test_a_guest_that_stops_reading_is_sent_nothing_more(vsock: Vsock) -> None:
    host = open_from_guest(vsock)
    assert vsock.exchange(guest(SHUTDOWN, flags=RCV)) == []
    with pytest.raises(BrokenPipeError):
        host.send(b"unread")
    vsock.exchange(guest(RW, data=b"spoken"))
    assert host.recv(100) == b"spoken"


def test_a_host_that_leaves_a_guest_that_stopped_reading_ends_the_connection(vsock: Vsock) -> None:
    host = open_from_guest(vsock)
    vsock.exchange(guest(SHUTDOWN, flags=RCV))
    host.close()
    assert [(p.op, p.flags) for p in vsock.exchange()] == [(SHUTDOWN, BOTH)]


def test_a_reset_of_the_guest_closes_the_socket(vsock: Vsock) -> None:
    host = open_from_guest(vsock)
    assert vsock.exchange(guest(RST)) == []
    assert host.recv(100) == b""
    assert open_count(vsock) == 0


def test_both_sides_may_end_at_once(vsock: Vsock) -> None:
    open_from_guest(vsock).close()
    vsock.send(guest(SHUTDOWN, flags=BOTH))
    packets = vsock.exchange()
    assert packets[-1].op == RST
    assert open_count(vsock) == 0
    assert vsock.engine.stats()["violations"] == 0


# --- a slow reader on the host


def fill(vsock: Vsock, host: socket.socket) -> bytes:
    """Send until the guest's credit is used up; what was sent."""
    host.setblocking(False)
    sent = bytearray()
    told = 0
    while len(sent) - told < LARGE:
        piece = os.urandom(min(40000, LARGE - (len(sent) - told)))
        for packet in vsock.exchange(guest(RW, data=piece)):
            told = packet.fwd_cnt
        sent += piece
    return bytes(sent)


def drain(vsock: Vsock, host: socket.socket) -> bytes:
    got = bytearray()
    while True:
        try:
            piece = host.recv(1 << 20)
        except BlockingIOError:
            piece = b""
        if not piece:
            return bytes(got)
        got += piece
        assert vsock.serve() == 0


def test_all_that_the_credit_allows_is_kept_for_a_slow_reader(vsock: Vsock) -> None:
    host = open_from_guest(vsock)
    sent = fill(vsock, host)
    assert len(sent) > LARGE
    assert drain(vsock, host) == sent
    news = vsock.received()
    assert {packet.op for packet in news} == {CREDIT_UPDATE}
    assert len(sent) - news[-1].fwd_cnt < LARGE // 2


def test_the_buffer_goes_round(vsock: Vsock) -> None:
    host = open_from_guest(vsock)
    sent, got = fill(vsock, host), b""
    for _ in range(20):
        got += host.recv(70000)
        vsock.offer_rx(len(vsock.exchange()))
        credit = vsock.exchange(guest(CREDIT_REQUEST))[-1]
        vsock.offer_rx(1)
        piece = os.urandom(min(30000, LARGE - (len(sent) - credit.fwd_cnt)))
        vsock.exchange(guest(RW, data=piece))
        sent += piece
    got += drain(vsock, host)
    assert got == sent


def test_more_than_can_be_kept_ends_the_connection(vsock: Vsock) -> None:
    host = open_from_guest(vsock)
    fill(vsock, host)
    assert [p.op for p in vsock.exchange(guest(RW, data=bytes(LARGE)))] == [RST]
    assert drain(vsock, host) != b""
    assert host.recv(1) == b""
    assert vsock.engine.stats()["violations"] == 1


def test_a_slow_reader_does_not_hold_up_the_others(vsock: Vsock) -> None:
    host = open_from_guest(vsock)
    fill(vsock, host)
    sock, port = open_from_host(vsock)
    vsock.exchange(Packet(RW, GUEST_PORT, port, b"quick"))
    assert sock.recv(100) == b"quick"


@pytest.mark.parametrize("ends", [(BOTH,), (SEND, RCV)])
def test_a_slow_reader_gets_all_that_a_closed_guest_sent(
    vsock: Vsock, ends: tuple[int, ...]
) -> None:
    host = open_from_guest(vsock)
    sent = fill(vsock, host)
    assert vsock.exchange(*(guest(SHUTDOWN, flags=flags) for flags in ends)) == []
    assert drain(vsock, host) == sent
    assert host.recv(1) == b""
    assert [packet.op for packet in vsock.received()] == [RST]


def test_even_when_the_guest_does_not_wait_for_it(vsock: Vsock) -> None:
    host = open_from_guest(vsock)
    sent = fill(vsock, host)
    assert vsock.exchange(guest(SHUTDOWN, flags=BOTH), guest(RST)) == []
    # The guest may use the ports again meanwhile.
    assert [p.op for p in vsock.exchange(guest(RW, data=b"?"))] == [RST]
    assert drain(vsock, host) == sent
    assert host.recv(1) == b""
    assert open_count(vsock) == 0


def test_a_slow_reader_that_leaves_frees_what_was_kept(vsock: Vsock) -> None:
    host = open_from_guest(vsock)
    fill(vsock, host)
    host.close()
    assert [(p.op, p.flags) for p in vsock.exchange()][-1] == (SHUTDOWN, BOTH)


# --- a slow reader in the guest


def test_no_more_is_sent_than_the_guest_has_room_for(vsock: Vsock) -> None:
    listener = vsock.listen(HOST_PORT)
    vsock.exchange(guest(REQUEST, buf_alloc=10))
    host = vsock.accept(listener)
    host.send(b"0123456789abcdef")
    packets = vsock.exchange()
    assert [(p.op, p.data) for p in packets] == [(RW, b"0123456789"), (CREDIT_REQUEST, b"")]
    # An answer without news is no reason to ask again.
    assert vsock.exchange(guest(CREDIT_UPDATE, buf_alloc=10)) == []
    packets = vsock.exchange(guest(CREDIT_UPDATE, buf_alloc=10, fwd_cnt=4))
    assert [(p.op, p.data) for p in packets] == [(RW, b"abcd"), (CREDIT_REQUEST, b"")]
    assert [p.data for p in vsock.exchange(guest(RW, buf_alloc=99, fwd_cnt=14))] == [b"ef"]


def test_the_end_needs_no_credit(vsock: Vsock) -> None:
    listener = vsock.listen(HOST_PORT)
    vsock.exchange(guest(REQUEST, buf_alloc=4))
    host = vsock.accept(listener)
    host.send(b"0123")
    assert [p.data for p in vsock.exchange()] == [b"0123"]
    host.close()
    assert [(p.op, p.flags) for p in vsock.exchange()] == [(SHUTDOWN, BOTH)]


def test_the_end_waits_for_data_that_waits_for_credit(vsock: Vsock) -> None:
    listener = vsock.listen(HOST_PORT)
    vsock.exchange(guest(REQUEST, buf_alloc=4))
    host = vsock.accept(listener)
    host.send(b"01234567")
    host.close()
    assert [p.op for p in vsock.exchange()] == [RW, CREDIT_REQUEST]
    packets = vsock.exchange(guest(CREDIT_UPDATE, buf_alloc=4, fwd_cnt=4))
    assert [(p.op, p.data or p.flags) for p in packets] == [(RW, b"4567"), (SHUTDOWN, BOTH)]


@pytest.mark.parametrize("fwd_cnt", [1, 1 << 31, (1 << 32) - 1])
def test_a_guest_that_took_more_than_was_sent_gets_almost_nothing(
    vsock: Vsock, fwd_cnt: int
) -> None:
    host = open_from_guest(vsock)
    vsock.exchange(guest(CREDIT_UPDATE, buf_alloc=100, fwd_cnt=fwd_cnt))
    host.send(bytes(1000))
    assert sum(len(packet.data) for packet in vsock.exchange()) <= 100


def test_credit_is_told_when_asked_for(vsock: Vsock) -> None:
    open_from_guest(vsock)
    (packet,) = vsock.exchange(guest(RW, data=b"123"), guest(CREDIT_REQUEST))
    assert (packet.op, packet.buf_alloc, packet.fwd_cnt) == (CREDIT_UPDATE, LARGE, 3)


# --- the receive ring


def test_a_stream_is_cut_to_the_buffers_that_the_guest_has(make_vsock: MakeVsock) -> None:
    vsock = make_vsock(buffer_bytes=144)
    vsock.offer_rx(100)
    host = open_from_guest(vsock)
    data = os.urandom(5050)
    host.send(data)
    packets = vsock.exchange()
    assert [len(packet.data) for packet in packets] == [100] * 50 + [50]
    assert b"".join(packet.data for packet in packets) == data


def test_data_waits_in_the_socket_while_the_ring_is_empty(make_vsock: MakeVsock) -> None:
    vsock = make_vsock()
    vsock.offer_rx(2)
    host = open_from_guest(vsock)
    host.send(bytes(20000))
    assert [len(packet.data) for packet in vsock.exchange()] == [4052]
    assert vsock.rx.used_flags == 0  # a kick is wanted
    vsock.offer_rx(10)
    assert sum(len(packet.data) for packet in vsock.exchange()) == 20000 - 4052


def test_header_and_payload_of_a_receive_chain_may_be_cut_anywhere(make_vsock: MakeVsock) -> None:
    vsock = make_vsock()
    edges = [0, 3, 43, 45, 46, 1000, 2000]
    buffers = [(RX_BUFFERS + start, end - start, WRITE) for start, end in itertools.pairwise(edges)]
    vsock.offer_rx(1)
    host = open_from_guest(vsock)
    vsock.rx.offer(vsock.rx.chain(buffers))
    data = os.urandom(1900)
    host.send(data)
    vsock.rx_kick.signal()
    assert [packet.data for packet in vsock.exchange()] == [data]


def test_chains_of_very_many_buffers_are_filled_in_order(make_vsock: MakeVsock) -> None:
    # 16 chains of up to 256 buffers are more than one read takes.
    vsock = make_vsock()
    vsock.offer_rx(1)
    host = open_from_guest(vsock)
    buffers = [(RX_BUFFERS + 16 * index, 16, WRITE) for index in range(200)]
    head = vsock.rx.chain(buffers, first=10)
    data = os.urandom(3156)
    host.send(data * 3)
    vsock.rx.offer(*[head] * 12)
    vsock.rx_kick.signal()
    assert vsock.serve() == 0
    assert [written for _, written in vsock.rx.take_used()] == [3200] * 3


@pytest.mark.parametrize(
    "buffers",
    [
        pytest.param([(RX_BUFFERS, 44, WRITE)], id="a header alone"),
        pytest.param([(RX_BUFFERS, 4096, 0)], id="not writable"),
        pytest.param([(RX_BUFFERS, 4, 0), (RX_BUFFERS, 4096, WRITE)], id="partly readable"),
        pytest.param([(8 << 20, 4096, WRITE)], id="outside memory"),
    ],
)
def test_a_bad_receive_chain_breaks_the_ring(
    make_vsock: MakeVsock, buffers: list[tuple[int, int, int]]
) -> None:
    vsock = make_vsock()
    vsock.rx.offer(vsock.rx.chain(buffers))
    vsock.rx_kick.signal()
    vsock.send(guest(REQUEST))
    assert vsock.serve() == -errno.EPROTO
    assert vsock.rx_queue.is_broken
    assert vsock.tx_queue.is_broken


def test_answers_without_room_stop_the_transmit_ring_and_nothing_is_lost(
    make_vsock: MakeVsock,
) -> None:
    vsock = make_vsock()
    for index in range(200):
        # Each from a buffer of its own, for the ring holds them all at once.
        raw = Packet(RW, index, HOST_PORT).pack()
        gpa = TX_BUFFER + 64 * index
        vsock.memory.write(gpa, raw)  # type: ignore[arg-type]
        vsock.tx.offer(vsock.tx.chain([(gpa, len(raw), 0)], first=index))
    vsock.tx_kick.signal()
    assert vsock.serve() == 0
    taken = vsock.tx.used_idx
    assert taken < 100
    vsock.offer_rx()
    assert vsock.serve() == 0
    assert vsock.tx.used_idx == 200
    packets = vsock.received()
    assert [(p.op, p.dst_port) for p in packets] == [(RST, index) for index in range(200)]


# --- a hostile guest


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(guest(REQUEST, src_cid=CID + 1), id="in another's name"),
        pytest.param(guest(REQUEST, dst_cid=1), id="to another"),
        pytest.param(guest(REQUEST, src_cid=CID | 1 << 32), id="upper half of its cid"),
        pytest.param(guest(RW, data=b"x", length=2), id="longer than its chain"),
        pytest.param(guest(RW, length=(1 << 32) - 1), id="longest"),
    ],
)
def test_a_malformed_packet_is_dropped_and_counted(vsock: Vsock, packet: Packet) -> None:
    vsock.listen(HOST_PORT)
    assert vsock.exchange(packet) == []
    assert vsock.engine.stats()["tx_malformed"] == 1
    assert vsock.tx.take_used() == [(0, 0)]


@pytest.mark.parametrize("length", [0, 1, 43])
def test_a_runt_is_dropped_and_counted(vsock: Vsock, length: int) -> None:
    vsock.send_raw(bytes(length))
    assert vsock.serve() == 0
    assert vsock.engine.stats()["tx_malformed"] == 1


def test_a_packet_with_a_writable_part_is_malformed(vsock: Vsock) -> None:
    vsock.memory.write(TX_BUFFER, guest(REQUEST).pack())  # type: ignore[arg-type]
    vsock.tx.offer(vsock.tx.chain([(TX_BUFFER, 44, 0), (TX_BUFFER + 64, 64, WRITE)]))
    vsock.tx_kick.signal()
    assert vsock.serve() == 0
    assert vsock.engine.stats()["tx_malformed"] == 1


@pytest.mark.parametrize("op", [0, RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 8, 65535])
def test_a_packet_for_no_connection_is_answered_with_a_reset(vsock: Vsock, op: int) -> None:
    assert [packet.op for packet in vsock.exchange(guest(op))] == [RST]


def test_a_reset_for_no_connection_is_not_answered(vsock: Vsock) -> None:
    assert vsock.exchange(guest(RST)) == []


@pytest.mark.parametrize("kind", [0, 2, 65535])
def test_an_unknown_type_of_socket_is_refused_in_its_own_type(vsock: Vsock, kind: int) -> None:
    vsock.listen(HOST_PORT)
    (packet,) = vsock.exchange(guest(REQUEST, type=kind))
    assert (packet.op, packet.type) == (RST, kind)


@pytest.mark.parametrize("op", [0, REQUEST, RESPONSE, 8])
def test_an_operation_that_does_not_fit_ends_the_connection(vsock: Vsock, op: int) -> None:
    host = open_from_guest(vsock)
    assert [packet.op for packet in vsock.exchange(guest(op))] == [RST]
    assert host.recv(1) == b""
    assert vsock.engine.stats()["violations"] == 1


def test_data_after_the_guest_said_that_there_is_none_ends_the_connection(vsock: Vsock) -> None:
    open_from_guest(vsock)
    packets = vsock.exchange(guest(SHUTDOWN, flags=SEND), guest(RW, data=b"oh"))
    assert [packet.op for packet in packets] == [RST]


@pytest.mark.parametrize("op", [RW, SHUTDOWN])
def test_data_before_the_answer_ends_the_connection(vsock: Vsock, op: int) -> None:
    sock = vsock.dial()
    sock.send(b"CONNECT 5000\n")
    (request,) = vsock.exchange()
    assert [p.op for p in vsock.exchange(Packet(op, GUEST_PORT, request.src_port))] == [RST]
    assert sock.recv(1) == b""


def test_a_broken_transmit_ring_ends_the_run(vsock: Vsock) -> None:
    with running(vsock.engine) as thread:
        vsock.tx.set_avail_idx(RING_SIZE + 1)
        vsock.tx_kick.signal()
        wait_signal(vsock.fault)
    assert thread.stopped is False
    assert vsock.engine.fault is EngineFault.RING


# --- many connections


def test_a_thousand_connections_stay_apart(vsock: Vsock) -> None:
    listener = vsock.listen(HOST_PORT, backlog=4096)
    hosts = {}
    for index in range(1000):
        (answer,) = vsock.exchange(Packet(REQUEST, 10000 + index, HOST_PORT))
        vsock.offer_rx(1)
        assert answer.op == RESPONSE
        hosts[index] = vsock.accept(listener)
    for index, host in hosts.items():
        host.send(f"to {index}".encode())
        (packet,) = vsock.exchange(Packet(RW, 10000 + index, HOST_PORT, f"from {index}".encode()))
        vsock.offer_rx(1)
        assert host.recv(100) == f"from {index}".encode()
        assert (packet.dst_port, packet.data) == (10000 + index, f"to {index}".encode())
    assert open_count(vsock) == 1000


def test_only_the_first_of_very_many_have_large_buffers(vsock: Vsock) -> None:
    vsock.listen(HOST_PORT, backlog=4096)
    sizes = []
    for index in range(MAX_CONNECTIONS):
        (answer,) = vsock.exchange(Packet(REQUEST, 10000 + index, HOST_PORT))
        vsock.offer_rx(1)
        assert answer.op == RESPONSE
        sizes.append(answer.buf_alloc)
    assert set(sizes) == {LARGE, SMALL}
    assert sum(sizes) <= 32 << 20
    (answer,) = vsock.exchange(Packet(REQUEST, 1, HOST_PORT))
    assert answer.op == RST


def test_programs_of_the_host_wait_while_all_slots_are_taken(vsock: Vsock) -> None:
    vsock.listen(HOST_PORT, backlog=4096)
    for index in range(MAX_CONNECTIONS):
        vsock.exchange(Packet(REQUEST, 10000 + index, HOST_PORT))
        vsock.offer_rx(1)
    sock = vsock.dial()
    sock.send(b"CONNECT 5000\n")
    assert vsock.exchange() == []
    assert [p.op for p in vsock.exchange(Packet(RST, 10000, HOST_PORT))] == [REQUEST]


# --- life


def test_both_directions_run_until_stopped(vsock: Vsock) -> None:
    listener = vsock.listen(HOST_PORT)
    with running(vsock.engine) as thread:
        vsock.send(guest(REQUEST))
        wait_until(vsock.rx_irq, lambda: vsock.rx.used_idx == 1)
        host = vsock.accept(listener)
        host.settimeout(LONG_S)
        for index in range(50):
            vsock.send(guest(RW, data=bytes([index]) * 100))
            assert host.recv(200) == bytes([index]) * 100
            host.send(bytes([index]) * 50)
            wait_until(vsock.rx_irq, lambda n=index: vsock.rx.used_idx == 2 + n)
    assert thread.stopped is True
    assert [packet.data[:1] for packet in vsock.received()[1:]] == [bytes([i]) for i in range(50)]


def test_the_engine_looks_for_sockets_in_its_directory(
    vsock: Vsock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    vsock.listen(HOST_PORT)
    with running(vsock.engine):
        vsock.send(guest(REQUEST))
        wait_until(vsock.rx_irq, lambda: vsock.rx.used_idx == 1)
    assert [packet.op for packet in vsock.received()] == [RESPONSE]


def test_a_quiesce_leaves_nothing_popped(vsock: Vsock) -> None:
    listener = vsock.listen(HOST_PORT)
    with running(vsock.engine):
        vsock.send(guest(REQUEST))
        wait_until(vsock.rx_irq, lambda: vsock.rx.used_idx == 1)
        host = vsock.accept(listener)
        for _ in range(100):
            host.send(b"x" * 60)
            vsock.engine.quiesce()
            for queue, driver in ((vsock.rx_queue, vsock.rx), (vsock.tx_queue, vsock.tx)):
                assert queue.state.next_avail == queue.state.next_used == driver.used_idx
            vsock.engine.resume()
        wait_until(vsock.rx_irq, lambda: vsock.engine.stats()["rx_bytes"] == 6000)


def test_no_deadline_passes_while_the_engine_is_held(make_vsock: MakeVsock) -> None:
    vsock = make_vsock(peer_timeout_s=0.3)
    vsock.offer_rx()
    sock = vsock.dial()
    sock.send(b"CONNECT 5000\n")
    with running(vsock.engine):
        wait_until(vsock.rx_irq, lambda: vsock.rx.used_idx == 1)
        vsock.engine.quiesce()
        other = vsock.dial()
        other.settimeout(0.5)
        with pytest.raises(TimeoutError):
            other.recv(1)
        vsock.engine.resume()
        sock.settimeout(LONG_S)
        assert sock.recv(1) == b""  # and then it does pass


def test_closing_the_engine_closes_every_connection(vsock: Vsock) -> None:
    host = open_from_guest(vsock)
    sock, _ = open_from_host(vsock)
    vsock.engine.close()
    assert host.recv(1) == sock.recv(1) == b""


def test_interrupts_are_suppressed_by_event_idx(make_vsock: MakeVsock) -> None:
    vsock = make_vsock(event_idx=True)
    vsock.offer_rx()
    vsock.rx.set_used_event(5)
    host = open_from_guest(vsock)
    for _ in range(8):
        host.send(b"x")
        assert vsock.serve() == 0
    assert vsock.rx_irq.drain() == 1


def test_one_interrupt_covers_a_burst(vsock: Vsock) -> None:
    host = open_from_guest(vsock)
    vsock.rx_irq.drain()
    host.send(bytes(100000))
    assert len(vsock.exchange()) == -(-100000 // 4052)
    assert vsock.engine.stats()["rx_interrupts"] <= 4


def test_a_name_that_does_not_fit_is_refused(make_vsock: MakeVsock, tmp_path: Path) -> None:
    made = make_vsock()
    config = ffi.new("struct vsock_config *")
    assert len(config.name) == MAX_NAME_BYTES + 1
    with pytest.raises(ValueError, match="at most"):
        type(made.engine)(
            made.memory, guest_cid=CID, listener_fd=made.listener.fileno(), directory_fd=-1,
            name="n" * (MAX_NAME_BYTES + 1), rx=made.rx_queue, tx=made.tx_queue,
            rx_kick=made.rx_kick, tx_kick=made.tx_kick, rx_irq=None, tx_irq=None, fault=made.fault,
        )  # fmt: skip


def test_every_counter_is_reported(make_vsock: MakeVsock) -> None:
    stats = make_vsock().engine.stats()
    assert len(stats) * 8 == ffi.sizeof("struct vsock_stats")
    assert set(stats.values()) == {0}


def test_the_socket_keeps_its_name(vsock: Vsock) -> None:
    assert (vsock.directory / NAME).is_socket()
