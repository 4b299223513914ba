# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The watchdog's registers, by a clock of the test's own; only its timer is the kernel's."""

from __future__ import annotations

import select
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.acpi.watchdog import Watchdog
from devices.bus import Bus

CONTROL, COUNTDOWN, LEFT, STATUS = 0x5E0, 0x5E4, 0x5E8, 0x5EC
SECOND_NS = 10**9
FIRST = 300  # counts of 100 ms
LEAST, MOST = 10, 36_000


class Rig:
    """A watchdog on a bus."""

    def __init__(self, *, has_reset: bool = False) -> None:
        self.now_ns = 0
        self.expired = 0
        self.pio = Bus("pio")
        self.dog = Watchdog(self._expire, has_reset=has_reset, clock=lambda: self.now_ns)
        self.dog.attach(self.pio)

    def _expire(self) -> None:
        self.expired += 1

    def write(self, port: int, value: int) -> None:
        self.pio.write(port, 4, value)

    def read(self, port: int) -> int:
        return self.pio.read(port, 4)

    def let_expire(self) -> None:
        """Have the kernel's timer come due now, and the event loop look at it."""
        self.dog.timer.set(1)
        assert select.select([self.dog.timer.fd], [], [], 30)[0]
        self.dog.expire()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.dog.close()


def test_it_does_not_run_until_it_is_started(rig: Rig) -> None:
    assert (rig.read(CONTROL), rig.read(LEFT), rig.read(COUNTDOWN)) == (0, 0, FIRST)
    rig.write(LEFT, 1)
    assert rig.read(LEFT) == 0


def test_started_it_counts_down_and_each_reset_starts_it_from_the_top(rig: Rig) -> None:
    rig.write(COUNTDOWN, 50)
    rig.write(CONTROL, 1)
    rig.now_ns = 2 * SECOND_NS
    assert (rig.read(CONTROL), rig.read(LEFT)) == (1, 30)
    rig.write(LEFT, 1)
    assert rig.read(LEFT) == 50


def test_stopped_it_does_not_expire(rig: Rig) -> None:
    rig.write(CONTROL, 1)
    rig.write(CONTROL, 0)
    rig.now_ns = 100 * SECOND_NS
    assert (rig.read(CONTROL), rig.read(LEFT)) == (0, 0)
    rig.dog.expire()
    assert rig.expired == 0


def test_expired_it_tells_once_and_counts_no_more_until_it_is_reset(rig: Rig) -> None:
    rig.write(CONTROL, 1)
    rig.let_expire()
    rig.dog.expire()
    assert (rig.expired, rig.read(LEFT)) == (1, 0)
    rig.write(LEFT, 1)
    assert rig.read(LEFT) == FIRST


def test_reset_in_the_last_moment_counts(rig: Rig) -> None:
    rig.write(CONTROL, 1)
    rig.dog.timer.set(1)
    assert select.select([rig.dog.timer.fd], [], [], 30)[0]
    rig.write(LEFT, 1)
    rig.dog.expire()
    assert rig.expired == 0


def test_held_it_stands_still_and_goes_on_with_what_was_left(rig: Rig) -> None:
    rig.write(CONTROL, 1)
    rig.now_ns = 10 * SECOND_NS
    rig.dog.hold()
    rig.dog.hold()
    rig.now_ns = 1000 * SECOND_NS
    assert rig.read(LEFT) == 200
    rig.dog.release()
    rig.now_ns = 1005 * SECOND_NS
    assert rig.read(LEFT) == 150


def test_one_that_was_due_when_it_was_held_expires_after_that(rig: Rig) -> None:
    rig.write(CONTROL, 1)
    rig.now_ns = 100 * SECOND_NS
    rig.dog.hold()
    rig.dog.release()
    assert select.select([rig.dog.timer.fd], [], [], 30)[0]
    rig.dog.expire()
    assert rig.expired == 1


def test_one_that_does_not_run_is_held_and_released_without_a_start(rig: Rig) -> None:
    rig.dog.hold()
    rig.dog.release()
    assert rig.read(LEFT) == 0


def test_guest_learns_that_it_was_reset_by_it_and_can_clear_that() -> None:
    rig = Rig(has_reset=True)
    assert rig.read(STATUS) == 1
    rig.write(STATUS, 0)
    assert rig.read(STATUS) == 1
    rig.write(STATUS, 1)
    assert rig.read(STATUS) == 0
    rig.write(STATUS, 1)
    assert rig.read(STATUS) == 0
    rig.dog.close()


@pytest.mark.parametrize(
    ("written", "kept"), [(0, LEAST), (LEAST, LEAST), (MOST, MOST), (0xFFFFFFFF, MOST)]
)
def test_countdown_is_kept_within_its_limits(rig: Rig, written: int, kept: int) -> None:
    rig.write(CONTROL, 1)
    rig.write(COUNTDOWN, written)
    assert (rig.read(COUNTDOWN), rig.read(LEFT)) == (kept, kept)


@given(
    st.lists(
        st.tuples(
            st.integers(0x5E0, 0x5EF),
            st.sampled_from((1, 2, 4)),
            st.integers(0, 0xFFFFFFFF),
        ),
        max_size=40,
    )
)
def test_whatever_is_written_it_counts_within_its_limits(
    writes: list[tuple[int, int, int]],
) -> None:
    rig = Rig()
    for port, length, value in writes:
        rig.pio.write(port, length, value)
        rig.pio.read(port, length)
    assert rig.read(CONTROL) in (0, 1)
    assert LEAST <= rig.read(COUNTDOWN) <= MOST
    assert rig.read(LEFT) == rig.read(COUNTDOWN) * rig.read(CONTROL)
    rig.dog.close()
