# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import os
import select
from collections.abc import Iterator

import pytest

from kvm_ffi.timer import Timer

HOUR_NS = 3600 * 10**9


@pytest.fixture
def timer() -> Iterator[Timer]:
    made = Timer()
    yield made
    made.close()


def is_readable(timer: Timer, timeout_s: float) -> bool:
    return bool(select.select([timer.fd], [], [], timeout_s)[0])


def test_it_expires_once(timer: Timer) -> None:
    timer.set(1)
    assert is_readable(timer, 30)
    assert timer.drain()
    assert not timer.drain()
    assert not is_readable(timer, 0)


def test_what_was_set_before_is_forgotten(timer: Timer) -> None:
    timer.set(1)
    assert is_readable(timer, 30)
    timer.set(HOUR_NS)
    assert not timer.drain()


def test_zero_stops_it(timer: Timer) -> None:
    timer.set(1)
    timer.set(0)
    assert not timer.drain()


def test_it_is_not_inherited_by_programs(timer: Timer) -> None:
    assert not os.get_inheritable(timer.fd)
