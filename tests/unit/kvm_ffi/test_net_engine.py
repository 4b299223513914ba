# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from kvm_ffi._kvm import ffi, lib
from kvm_ffi.engine import EngineFault
from kvm_ffi.memory import GuestMemory
from kvm_ffi.net_engine import HEADER_BYTES, MAX_PACKET_BYTES, NetEngine
from kvm_ffi.net_tap import Tap
from kvm_ffi.types import Gpa
from tests.support import nic as nic_support
from tests.support.engine_thread import running, wait_signal, wait_until
from tests.support.nic import BUFFER, HEADER, MEMORY, RX_BUFFERS, TX_BUFFER, Nic, header
from tests.support.ring_driver import WRITE, RingDriver

MakeNic = Callable[..., Nic]


@pytest.fixture
def make_nic() -> Iterator[MakeNic]:
    made: list[Nic] = []
    with GuestMemory([(Gpa(0), MEMORY)]) as memory:

        def make(**options: bool) -> Nic:
            made.append(nic_support.make_nic(memory, **options))
            return made[-1]

        yield make
        for nic in made:
            nic.close()


@pytest.fixture
def nic(make_nic: MakeNic) -> Nic:
    return make_nic()


def test_a_frame_arrives_in_one_buffer_with_its_header(nic: Nic) -> None:
    nic.offer_rx(2)
    nic.arrive(b"frame")
    assert nic.serve() == 0
    assert nic.received() == [(0, header(1) + b"frame")]
    assert nic.engine.stats()["rx_packets"] == 1
    assert nic.engine.stats()["rx_bytes"] == 5


def test_a_large_frame_fills_several_buffers(nic: Nic) -> None:
    nic.offer_rx(70)
    frame = bytes(range(256)) * 256
    nic.arrive(frame[:65000])
    assert nic.serve() == 0
    chunks = nic.received()
    needed = -(-(65000 + HEADER_BYTES) // BUFFER)
    assert [head for head, _ in chunks] == list(range(needed))
    assert b"".join(data for _, data in chunks) == header(needed) + frame[:65000]


def test_buffers_that_a_packet_did_not_need_serve_the_next(nic: Nic) -> None:
    nic.offer_rx(80)
    for length in (1000, 1500, 10, 40000, 1):
        nic.arrive(bytes([length & 0xFF]) * length)
    assert nic.serve() == 0
    heads = [head for head, _ in nic.received()]
    assert heads == list(range(1 + 2 + 1 + 40 + 1))
    assert nic.rx_queue.state.next_avail == nic.rx_queue.state.next_used == len(heads)


def test_the_packet_that_exactly_fills_the_last_buffer_fits(nic: Nic) -> None:
    nic.offer_rx(2)
    nic.arrive(b"x" * (2 * BUFFER - HEADER_BYTES))
    assert nic.serve() == 0
    assert len(nic.received()) == 2
    assert nic.engine.stats()["rx_dropped"] == 0


def test_a_packet_one_byte_too_long_is_dropped_and_the_buffers_stay(nic: Nic) -> None:
    nic.offer_rx(2)
    nic.arrive(b"x" * (2 * BUFFER - HEADER_BYTES + 1))
    nic.arrive(b"fits")
    assert nic.serve() == 0
    assert nic.received() == [(0, header(1) + b"fits")]
    assert nic.engine.stats()["rx_dropped"] == 1


def test_the_largest_packet_fits(nic: Nic) -> None:
    nic.offer_rx(80)
    nic.arrive(b"m" * (MAX_PACKET_BYTES - HEADER_BYTES))
    nic.arrive(b"m" * (MAX_PACKET_BYTES - HEADER_BYTES + 1024))
    assert nic.serve() == 0
    assert sum(len(data) for _, data in nic.received()) == MAX_PACKET_BYTES
    assert nic.engine.stats()["rx_dropped"] == 1


def test_without_mergeable_buffers_one_chain_holds_the_packet(make_nic: MakeNic) -> None:
    nic = make_nic(mergeable=False)
    nic.offer_rx(3)
    nic.arrive(b"a" * BUFFER)
    nic.arrive(b"b" * (BUFFER - HEADER_BYTES))
    assert nic.serve() == 0
    assert nic.received() == [(0, header(1) + b"b" * (BUFFER - HEADER_BYTES))]
    assert nic.engine.stats()["rx_dropped"] == 1


def test_a_receive_chain_may_split_the_header(nic: Nic) -> None:
    cuts = [(RX_BUFFERS, 3, WRITE), (RX_BUFFERS + 3, 8, WRITE), (RX_BUFFERS + 11, 500, WRITE)]
    nic.rx.offer(nic.rx.chain(cuts))
    nic.arrive(b"frame")
    assert nic.serve() == 0
    assert nic.received() == [(0, header(1) + b"frame")]


def test_a_receive_chain_of_all_descriptors_works(make_nic: MakeNic) -> None:
    # 1024 buffers and the spare are one more than readv(2) takes.
    nic = make_nic()
    nic.rx = RingDriver(nic.memory, size=1024, base=0x30000)
    queue = nic.rx.queue()
    nic.rx.offer(nic.rx.chain([(RX_BUFFERS, 16, WRITE)] * 1024))
    engine = NetEngine(
        nic.memory, nic.tap.fileno(), rx=queue, tx=nic.tx_queue, rx_kick=nic.rx_kick,
        tx_kick=nic.tx_kick, rx_irq=nic.rx_irq, tx_irq=None, fault=nic.fault, mergeable=True,
    )  # fmt: skip
    nic.arrive(b"x" * (1023 * 16 - HEADER_BYTES))
    nic.arrive(b"x")
    assert lib.net_engine_serve(engine._c) == 0
    assert nic.rx.take_used() == [(0, 1023 * 16)]
    engine.close()


def test_many_packets_in_a_row_walk_around_the_ring(nic: Nic) -> None:
    for round_ in range(40):
        nic.offer_rx(100)
        for index in range(50):
            nic.arrive(bytes([round_, index]) * 600)
        nic.rx_kick.signal()
        assert nic.serve() == 0
        data = b"".join(piece for _, piece in nic.received())
        one = header(2) + bytes(1200)
        assert len(data) == 50 * len(one)
        frames = [data[at + 12 : at + 14] for at in range(0, len(data), len(one))]
        assert frames == [bytes([round_, index]) for index in range(50)]
    assert nic.engine.stats()["rx_dropped"] == 0


def test_a_burst_into_finely_cut_buffers_loses_nothing(nic: Nic) -> None:
    # 60 packets of 17 buffers each are more than the engine's array: it moves to its front.
    buffers = [(RX_BUFFERS + 64 * index, 64, WRITE) for index in range(17)]
    for first in (0, 20, 40):
        nic.rx.chain(buffers, first=first)
    heads = [(0, 20, 40)[index * index % 7 % 3] for index in range(200)]
    nic.rx.offer(*heads)
    lengths = [1000 - index for index in range(60)]
    for length in lengths:
        nic.arrive(bytes(length))
    assert nic.serve() == 0
    expected = [length + HEADER_BYTES for length in lengths]
    assert nic.rx.take_used() == list(zip(heads, expected, strict=False))


def test_packets_wait_in_the_tap_while_the_ring_is_empty(nic: Nic) -> None:
    nic.arrive(b"waits")
    assert nic.serve() == 0
    assert nic.received() == []
    nic.offer_rx(1)
    assert nic.serve() == 0
    assert nic.received() == []  # nobody kicked
    nic.rx_kick.signal()
    assert nic.serve() == 0
    assert nic.received() == [(0, header(1) + b"waits")]
    assert nic.engine.stats()["rx_dropped"] == 0


def test_a_waiting_packet_does_not_keep_a_starved_engine_awake(nic: Nic) -> None:
    nic.arrive(b"waits")
    assert nic.serve() == 0
    before = time.monotonic()
    assert lib.net_engine_wait(nic.engine._c, 50) == 0
    # poll(2) never returns early without an event; a busy loop returns at once.
    assert time.monotonic() - before >= 0.05


def test_kicks_are_asked_for_only_while_the_receive_ring_is_empty(nic: Nic) -> None:
    nic.offer_rx(1)
    nic.arrive(b"x")
    nic.arrive(b"y")
    assert nic.serve() == 0
    assert nic.rx.used_flags == 0
    nic.offer_rx(5)
    nic.rx_kick.signal()
    assert nic.serve() == 0
    assert nic.rx.used_flags == 1


def test_a_runt_without_a_whole_header_is_dropped(nic: Nic) -> None:
    nic.offer_rx(1)
    nic.wire.send(b"short")
    assert nic.serve() == 0
    assert nic.received() == []
    assert nic.engine.stats()["rx_dropped"] == 1


def test_one_interrupt_covers_a_burst(nic: Nic) -> None:
    nic.offer_rx(30)
    for _ in range(30):
        nic.arrive(b"x")
    assert nic.serve() == 0
    assert len(nic.received()) == 30
    assert nic.rx_irq.drain() == 1
    assert nic.engine.stats()["rx_interrupts"] == 1


def test_event_idx_suppresses_receive_interrupts(make_nic: MakeNic) -> None:
    nic = make_nic(event_idx=True)
    nic.offer_rx(9)
    nic.rx.set_used_event(7)
    for _ in range(9):
        nic.arrive(b"x")
        assert nic.serve() == 0
    assert nic.rx_irq.drain() == 1


@pytest.mark.parametrize(
    "buffers",
    [
        pytest.param([(RX_BUFFERS, 11, WRITE)], id="shorter than a header"),
        pytest.param([(RX_BUFFERS, 0, WRITE)], id="empty"),
        pytest.param([(RX_BUFFERS, 64, 0)], id="not writable"),
        pytest.param([(RX_BUFFERS, 64, 0), (RX_BUFFERS, 2048, WRITE)], id="partly readable"),
        pytest.param([(MEMORY - 1, 64, WRITE)], id="leaves memory"),
    ],
)
def test_a_bad_receive_chain_breaks_the_ring(nic: Nic, buffers: list[tuple[int, int, int]]) -> None:
    nic.rx.offer(nic.rx.chain(buffers))
    nic.arrive(b"x")
    assert nic.serve() == -errno.EPROTO
    assert nic.rx_queue.is_broken


def test_a_sent_packet_reaches_the_wire_whole(nic: Nic) -> None:
    nic.send(HEADER + b"payload", cuts=(5, 12, 14))
    assert nic.serve() == 0
    assert nic.wire.recv(100) == HEADER + b"payload"
    assert nic.tx.take_used() == [(0, 0)]
    assert nic.tx_irq.drain() == 1
    assert nic.engine.stats()["tx_bytes"] == 7


@pytest.mark.parametrize("length", [1, HEADER_BYTES - 1, MAX_PACKET_BYTES + 1])
def test_a_malformed_packet_is_completed_and_counted(nic: Nic, length: int) -> None:
    nic.send(bytes(length))
    assert nic.serve() == 0
    assert nic.tx.take_used() == [(0, 0)]
    assert nic.engine.stats()["tx_malformed"] == 1
    with pytest.raises(BlockingIOError):
        nic.wire.recv(1)


@pytest.mark.parametrize("buffers", [[(TX_BUFFER, 64, WRITE)], [(TX_BUFFER, 0, 0)]])
def test_a_packet_without_readable_bytes_is_completed_and_counted(
    nic: Nic, buffers: list[tuple[int, int, int]]
) -> None:
    nic.tx.offer(nic.tx.chain(buffers))
    assert nic.serve() == 0
    assert nic.tx.take_used() == [(0, 0)]
    assert nic.engine.stats()["tx_malformed"] == 1


def test_a_packet_with_a_writable_tail_is_malformed(nic: Nic) -> None:
    nic.tx.offer(nic.tx.chain([(TX_BUFFER, 64, 0), (TX_BUFFER, 64, WRITE)]))
    assert nic.serve() == 0
    assert nic.engine.stats()["tx_malformed"] == 1


def test_what_a_full_tap_refuses_is_dropped_and_completed(nic: Nic) -> None:
    nic.tap.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    for _ in range(10):
        nic.send(HEADER + bytes(1500))
        assert nic.serve() == 0
    assert len(nic.tx.take_used()) == 10
    stats = nic.engine.stats()
    assert stats["tx_dropped"] > 0
    assert stats["tx_packets"] + stats["tx_dropped"] == 10
    assert nic.engine.fault is EngineFault.NONE


def test_a_broken_transmit_ring_ends_the_run(nic: Nic) -> None:
    with running(nic.engine) as thread:
        nic.tx.set_avail_idx(17)
        nic.tx_kick.signal()
        wait_signal(nic.fault)
    assert thread.stopped is False
    assert nic.engine.fault is EngineFault.RING


def test_a_tap_that_goes_away_is_reported_once_and_sending_goes_on(nic: Nic) -> None:
    nic.offer_rx(4)
    with running(nic.engine) as thread:
        nic.wire.close()
        assert wait_signal(nic.fault) == 1
        assert nic.engine.fault is EngineFault.BACKEND
        nic.send(HEADER + b"lost")
        nic.tx_kick.signal()
        wait_until(nic.tx_irq, lambda: nic.tx.used_idx == 1)
    assert thread.stopped is True
    assert nic.engine.stats()["tx_dropped"] == 1
    assert nic.fault.drain() == 0


def test_both_directions_run_until_stopped(nic: Nic) -> None:
    nic.offer_rx(200)
    nic.wire.setblocking(True)
    with running(nic.engine) as thread:
        for index in range(50):
            nic.arrive(bytes([index]) * 60)
            nic.send(HEADER + bytes([index]) * 40)
            nic.tx_kick.signal()
            assert nic.wire.recv(100) == HEADER + bytes([index]) * 40
        wait_until(nic.rx_irq, lambda: nic.rx.used_idx == 50)
    assert thread.stopped is True
    assert [data[12] for _, data in nic.received()] == list(range(50))


def test_a_quiesce_leaves_nothing_popped(nic: Nic) -> None:
    nic.offer_rx(256)
    with running(nic.engine):
        for _ in range(100):
            nic.arrive(b"x" * 60)
            nic.engine.quiesce()
            for queue, driver in ((nic.rx_queue, nic.rx), (nic.tx_queue, nic.tx)):
                state = queue.state
                assert state.next_avail == state.next_used == driver.used_idx
            nic.engine.resume()
        wait_until(nic.rx_irq, lambda: nic.rx.used_idx == 100)


def test_packets_wait_for_a_resume(nic: Nic) -> None:
    nic.offer_rx(4)
    with running(nic.engine):
        nic.engine.quiesce()
        nic.arrive(b"later")
        nic.send(HEADER + b"also later")
        nic.tx_kick.signal()
        assert (nic.rx.used_idx, nic.tx.used_idx) == (0, 0)
        nic.engine.resume()
        wait_until(nic.rx_irq, lambda: nic.rx.used_idx == 1)
        wait_until(nic.tx_irq, lambda: nic.tx.used_idx == 1)


def test_a_socket_is_no_tap_to_configure(nic: Nic) -> None:
    with pytest.raises(OSError):  # noqa: PT011 - which errno is the kernel's business
        Tap([nic.tap.fileno()]).configure(0)


def test_every_counter_is_reported(nic: Nic) -> None:
    assert len(nic.engine.stats()) * 8 == ffi.sizeof("struct net_stats")
    assert set(nic.engine.stats().values()) == {0}
