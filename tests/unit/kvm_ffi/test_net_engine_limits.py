# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Rate limits of a network interface: what passes at once, what waits, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from kvm_ffi.memory import GuestMemory
from kvm_ffi.rate_limiter import UNLIMITED, RateLimit, RateLimiter
from kvm_ffi.types import Gpa
from tests.support.engine_thread import running
from tests.support.nic import HEADER, MEMORY, RX_BUFFERS, Nic, make_nic

FRAME = bytes(100)
# A minute until the next frame fits; of packets one a second, which cannot be slower.
BYTES = RateLimit(bytes_per_s=1, bytes_burst=250)
PACKETS = RateLimit(ops_per_s=1, ops_burst=3)
NONE = UNLIMITED


@pytest.fixture
def limiters() -> tuple[RateLimiter, RateLimiter]:
    """Of receiving and of sending, without a limit at first."""
    return RateLimiter(), RateLimiter()


@pytest.fixture
def nic(limiters: tuple[RateLimiter, RateLimiter]) -> Iterator[Nic]:
    with GuestMemory([(Gpa(0), MEMORY)]) as memory:
        nic = make_nic(memory, rx_limiter=limiters[0], tx_limiter=limiters[1])
        yield nic
        nic.close()


def send(nic: Nic, count: int) -> None:
    """Offer frames of 100 bytes, without a kick."""
    nic.memory.write(Gpa(RX_BUFFERS), HEADER + FRAME)
    heads = [
        nic.tx.chain([(RX_BUFFERS, len(HEADER) + len(FRAME), 0)], first=slot)
        for slot in range(count)
    ]
    nic.tx.offer(*heads)


def on_wire(nic: Nic) -> int:
    count = 0
    while True:
        try:
            nic.wire.recv(2048)
        except BlockingIOError:
            return count
        count += 1


@pytest.mark.parametrize(("limit", "passed"), [(BYTES, 2), (PACKETS, 3), (NONE, 8)])
def test_what_is_sent_beyond_the_limit_stays_in_the_ring(
    nic: Nic, limiters: tuple[RateLimiter, RateLimiter], limit: RateLimit, passed: int
) -> None:
    began = time.monotonic()
    limiters[1].set(limit)
    send(nic, 8)
    for _ in range(3):
        nic.serve()
    most = passed + (int(time.monotonic() - began) if limit is PACKETS else 0)
    sent = on_wire(nic)
    assert passed <= sent <= most
    assert nic.tx.used_idx == nic.tx_queue.state.next_avail == sent
    assert nic.engine.stats()["tx_throttled"] == (passed < 8)


@pytest.mark.parametrize(("limit", "passed"), [(BYTES, 3), (PACKETS, 3), (NONE, 8)])
def test_what_arrives_beyond_the_limit_stays_in_the_tap(
    nic: Nic, limiters: tuple[RateLimiter, RateLimiter], limit: RateLimit, passed: int
) -> None:
    # Of bytes, the packet that goes beyond still passes: nobody knew how long it would be.
    began = time.monotonic()
    limiters[0].set(limit)
    nic.offer_rx(16)
    for _ in range(8):
        nic.arrive(FRAME)
    for _ in range(3):
        nic.serve()
    most = passed + (int(time.monotonic() - began) if limit is PACKETS else 0)
    received = len(nic.received())
    assert passed <= received <= most
    assert nic.rx_queue.state.next_avail == received
    assert nic.engine.stats()["rx_throttled"] == (passed < 8)


def test_a_look_at_an_empty_tap_costs_nothing(
    nic: Nic, limiters: tuple[RateLimiter, RateLimiter]
) -> None:
    limiters[0].set(PACKETS)
    nic.offer_rx(16)
    for _ in range(3):
        nic.arrive(FRAME)
        nic.serve()
        nic.serve()
    assert len(nic.received()) == 3


def test_what_a_packet_went_beyond_is_paid_for(
    nic: Nic, limiters: tuple[RateLimiter, RateLimiter]
) -> None:
    limiters[0].set(BYTES)
    nic.offer_rx(16)
    for _ in range(8):
        nic.arrive(FRAME)
    nic.serve()
    # A larger bucket keeps the debt of 50 bytes.
    limiters[0].set(RateLimit(bytes_per_s=1, bytes_burst=1 << 20))
    nic.engine.wake()
    nic.serve()
    assert len(nic.received()) == 3


def test_a_lifted_limit_counts_at_once(nic: Nic, limiters: tuple[RateLimiter, RateLimiter]) -> None:
    limiters[1].set(BYTES)
    send(nic, 8)
    with running(nic.engine):
        nic.tx_kick.signal()
        _wait(lambda: nic.tx.used_idx == 2)
        limiters[1].set(UNLIMITED)
        nic.engine.wake()
        _wait(lambda: nic.tx.used_idx == 8)
    assert on_wire(nic) == 8


def test_a_limit_that_has_passed_lets_the_next_go_without_a_kick(
    nic: Nic, limiters: tuple[RateLimiter, RateLimiter]
) -> None:
    limiters[1].set(RateLimit(ops_per_s=100, ops_burst=1))
    send(nic, 8)
    began = time.monotonic()
    with running(nic.engine):
        _wait(lambda: nic.tx.used_idx == 8)
    assert time.monotonic() - began >= 0.07


def test_a_held_direction_is_quiet_at_once(
    nic: Nic, limiters: tuple[RateLimiter, RateLimiter]
) -> None:
    limiters[1].set(BYTES)
    send(nic, 8)
    with running(nic.engine):
        _wait(lambda: nic.tx.used_idx == 2)
        nic.engine.quiesce()
        assert nic.tx_queue.state.next_avail == nic.tx_queue.state.next_used == 2
        nic.engine.resume()


def _wait(is_done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.002)
