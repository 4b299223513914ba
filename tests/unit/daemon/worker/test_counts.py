# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""When it is told how often a watchdog has expired."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from daemon.worker import counts as module
from daemon.worker.counts import Counts
from daemon.worker.disk_errors import INTERVAL_S


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def expire(counts: Counts, *, is_last: bool = False) -> bool:
    counts.add_watchdog()
    return counts.look((), is_last=is_last)


def test_a_watchdog_that_expires_each_second_is_told_at_once_and_then_once_a_minute(
    clock: SimpleNamespace,
) -> None:
    counts = Counts()
    told = []
    for _ in range(200):
        if expire(counts):
            told.append(counts.told["watchdog_expired"])
        clock.now += 1
    assert told == [1, 61, 121, 181]


def test_what_waits_is_told_when_it_is_due_without_another_one(clock: SimpleNamespace) -> None:
    counts = Counts()
    assert expire(counts)
    assert not expire(counts)
    assert (counts.due, counts.is_due) == (clock.now + INTERVAL_S, False)
    clock.now += INTERVAL_S
    assert counts.is_due
    assert counts.look(())
    assert counts.told["watchdog_expired"] == 2
    clock.now += INTERVAL_S
    assert not counts.look(())
    assert counts.due is None


def test_nothing_waits_at_the_end(clock: SimpleNamespace) -> None:
    counts = Counts()
    assert expire(counts)
    assert expire(counts, is_last=True)
    assert counts.told["watchdog_expired"] == 2
