# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import logging

import pytest

from devices.ratelimit import GuestLog, RateLimiter


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_burst_then_silence() -> None:
    limiter = RateLimiter(burst=3, per_second=1, clock=_Clock())
    assert [limiter.admit() for _ in range(5)] == [0, 0, 0, None, None]


def test_next_admitted_event_tells_how_many_were_refused() -> None:
    clock = _Clock()
    limiter = RateLimiter(burst=1, per_second=1, clock=clock)
    assert [limiter.admit(), limiter.admit(), limiter.admit()] == [0, None, None]
    clock.now = 1.0
    assert limiter.admit() == 2


def test_tokens_do_not_pile_up_beyond_the_burst() -> None:
    clock = _Clock()
    limiter = RateLimiter(burst=2, per_second=1, clock=clock)
    clock.now = 1000.0
    assert [limiter.admit() for _ in range(3)] == [0, 0, None]


def test_guest_log_counts_what_it_left_out(caplog: pytest.LogCaptureFixture) -> None:
    clock = _Clock()
    guest_log = GuestLog(logging.getLogger("t"), RateLimiter(1, 1, clock))
    guest_log.warning("first n=%d", 1)
    guest_log.warning("lost n=%d", 2)
    clock.now = 1.0
    guest_log.warning("third n=%d", 3)
    assert [r.getMessage() for r in caplog.records] == ["first n=1", "third n=3 suppressed=1"]
