# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Token buckets on a clock of our own: what they let through, and how long they make one wait."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm_ffi._kvm import ffi, lib
from kvm_ffi.rate_limiter import MAX_BURST, MAX_RATE, RateLimit, RateLimiter

SECOND = 1_000_000_000


class Limiter:
    """A limiter and a clock that moves by hand."""

    def __init__(self, **limit: int) -> None:
        self.limiter = RateLimiter()
        self.now = 1_000 * SECOND
        self.set(**limit)

    def set(self, **limit: int) -> int:
        config = ffi.new("struct rate_limit *", limit)
        result: int = lib.rate_limiter_set(self.limiter.raw, config, self.now)
        return result

    def take(self, length: int = 0) -> int:
        wait: int = lib.rate_limiter_take(self.limiter.raw, length, self.now)
        return wait

    def drain(self, length: int = 0) -> int:
        """Take until one has to wait; how many went."""
        for count in range(10_000_000):
            if self.take(length):
                return count
        raise AssertionError("no limit")

    def serve(self, seconds: int, late_ns: int, length: int = 0) -> int:
        """What goes in a time, for an engine that wakes late_ns after the time it asked for."""
        end = self.now + seconds * SECOND
        count = 0
        while self.now < end:
            wait = self.take(length)
            count += wait == 0
            self.now += wait + late_ns if wait else 0
        return count


def test_without_a_limit_nothing_waits() -> None:
    assert RateLimiter().limit == RateLimit()
    limiter = Limiter()
    assert {limiter.take(0xFFFFFFFF) for _ in range(1000)} == {0}


@pytest.mark.parametrize("ops", [50, 1_000, 20_000, 100_000])
@pytest.mark.parametrize("late_us", [0, 60, 300])
def test_a_limit_is_delivered_within_a_hundredth(ops: int, late_us: int) -> None:
    limiter = Limiter(ops_per_s=ops)
    limiter.drain()
    assert limiter.serve(2, late_us * 1000) == pytest.approx(2 * ops, rel=0.01)


def test_bytes_are_counted_where_requests_differ_in_size() -> None:
    limiter = Limiter(bytes_per_s=10_000_000)
    limiter.drain(4096)
    assert limiter.serve(3, 60_000, 4096) * 4096 == pytest.approx(30_000_000, rel=0.01)


def test_an_idle_device_has_its_burst_and_no_more() -> None:
    limiter = Limiter(ops_per_s=100, ops_burst=30)
    assert limiter.drain() == 30
    limiter.now += 3600 * SECOND
    assert limiter.drain() == 30


def test_the_default_burst_is_a_tenth_of_a_second() -> None:
    assert Limiter(ops_per_s=1000).drain() == 100
    assert Limiter(ops_per_s=3).drain() == 1


def test_a_burst_that_only_a_timer_could_keep_is_raised() -> None:
    assert Limiter(ops_per_s=100_000, ops_burst=1).drain() == 1000


def test_the_wait_is_exactly_until_the_request_fits() -> None:
    limiter = Limiter(ops_per_s=50, ops_burst=1)
    assert limiter.take() == 0
    assert limiter.take() == 20_000_000
    limiter.now += 19_999_999
    assert limiter.take() == 1
    limiter.now += 1
    assert limiter.take() == 0


def test_a_request_larger_than_the_bucket_goes_and_is_paid_for_later() -> None:
    limiter = Limiter(bytes_per_s=1_000_000, bytes_burst=100_000)
    assert limiter.take(32 << 20) == 0
    # The debt, and then a full 512 bytes.
    assert limiter.take(512) == ((32 << 20) - 100_000 + 512) * 1000


def test_what_waits_for_one_bucket_takes_nothing_from_the_other() -> None:
    limiter = Limiter(bytes_per_s=1000, bytes_burst=1000, ops_per_s=10, ops_burst=2)
    assert limiter.take(1000) == 0
    assert [limiter.take(1000) for _ in range(5)] == [SECOND] * 5
    assert limiter.take(0) == 0


def test_a_change_counts_at_once_and_forgives_no_debt() -> None:
    limiter = Limiter(ops_per_s=10, ops_burst=1)
    limiter.drain()
    limiter.set(ops_per_s=1000, ops_burst=10)
    assert limiter.take() == SECOND // 1000
    limiter.set()
    assert limiter.take() == 0


def test_a_clock_that_stands_still_or_goes_back_gives_nothing() -> None:
    limiter = Limiter(ops_per_s=1000, ops_burst=10)
    limiter.drain()
    limiter.now -= 5 * SECOND
    assert limiter.take() == SECOND // 1000


@pytest.mark.parametrize("name", ["bytes_per_s", "bytes_burst", "ops_per_s", "ops_burst"])
def test_a_limit_out_of_range_is_refused_and_changes_nothing(name: str) -> None:
    limiter = RateLimiter(RateLimit(ops_per_s=5))
    for value in (-1, MAX_RATE + 1):
        with pytest.raises(ValueError, match=f"{name}={value}: must be 0.."):
            limiter.set(RateLimit(**{name: value}))
    assert limiter.limit == RateLimit(ops_per_s=5)
    assert Limiter().set(**{name: MAX_RATE + 1}) < 0


class Model:
    """The same bucket in fractions of a token."""

    def __init__(self, rate: int, burst: int) -> None:
        self.rate = rate
        self.capacity = self.level = Fraction(
            min(MAX_BURST, max(burst or rate // 10, rate // 100, 1))
        )

    def take(self, tokens: int, elapsed_ns: int) -> Fraction:
        """The wait in nanoseconds."""
        self.level = min(self.capacity, self.level + Fraction(elapsed_ns * self.rate, SECOND))
        need = min(Fraction(tokens), self.capacity)
        if self.level >= need:
            self.level -= tokens
            return Fraction(0)
        return (need - self.level) * SECOND / self.rate


@given(
    rate=st.integers(1, MAX_RATE),
    burst=st.integers(0, MAX_BURST),
    steps=st.lists(
        st.tuples(st.integers(0, 0xFFFFFFFF), st.integers(0, 1 << 62) | st.integers(0, SECOND)),
        max_size=30,
    ),
)
def test_a_bucket_does_what_fractions_say(
    rate: int, burst: int, steps: list[tuple[int, int]]
) -> None:
    limiter = Limiter(bytes_per_s=rate, bytes_burst=burst)
    limiter.now = 1_000 * SECOND
    model = Model(rate, burst)
    for tokens, elapsed in steps:
        elapsed = min(elapsed, (1 << 63) - limiter.now)
        limiter.now += elapsed
        assert limiter.take(tokens) == -(-model.take(tokens, elapsed) // 1)
