# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import calendar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.bus import Bus
from devices.legacy.cmos_rtc import CmosRtc

NOON = calendar.timegm((2026, 2, 3, 16, 5, 9))  # a Tuesday
SEC, MINUTE, HOUR, WEEKDAY, DAY, MONTH, YEAR, CENTURY = 0, 2, 4, 6, 7, 8, 9, 0x32


class _Machine:
    def __init__(self) -> None:
        self.now = float(NOON)
        self.bus = Bus("pio")
        CmosRtc(lambda: self.now).attach(self.bus)

    def get(self, index: int) -> int:
        self.bus.write(0x70, 1, index)
        return self.bus.read(0x71, 1)

    def set(self, index: int, value: int) -> None:
        self.bus.write(0x70, 1, index)
        self.bus.write(0x71, 1, value)

    def time(self) -> list[int]:
        return [self.get(i) for i in (CENTURY, YEAR, MONTH, DAY, HOUR, MINUTE, SEC)]


@pytest.fixture
def machine() -> _Machine:
    return _Machine()


def test_time_is_bcd_utc_by_default(machine: _Machine) -> None:
    assert machine.time() == [0x20, 0x26, 0x02, 0x03, 0x16, 0x05, 0x09]
    assert machine.get(WEEKDAY) == 3


def test_binary_mode(machine: _Machine) -> None:
    machine.set(0x0B, 0x06)
    assert machine.time() == [20, 26, 2, 3, 16, 5, 9]


def test_twelve_hour_mode_sets_the_afternoon_bit(machine: _Machine) -> None:
    machine.set(0x0B, 0x00)
    assert machine.get(HOUR) == 0x84


def test_no_update_is_ever_in_progress(machine: _Machine) -> None:
    assert machine.get(0x0A) == 0x26


def test_battery_is_good(machine: _Machine) -> None:
    assert machine.get(0x0D) == 0x80


def test_guest_sets_its_own_clock_and_it_runs_on(machine: _Machine) -> None:
    machine.set(0x0B, 0x82)
    for index, value in [(CENTURY, 0x19), (YEAR, 0x99), (MONTH, 0x12), (DAY, 0x31)]:
        machine.set(index, value)
    for index, value in [(HOUR, 0x23), (MINUTE, 0x59), (SEC, 0x58)]:
        machine.set(index, value)
    machine.set(0x0B, 0x02)
    machine.now += 2
    assert machine.time() == [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]


def test_nonsense_time_is_not_adopted(machine: _Machine) -> None:
    machine.set(0x0B, 0x82)
    machine.set(MONTH, 0x77)
    machine.set(0x0B, 0x02)
    assert machine.time() == [0x20, 0x26, 0x02, 0x03, 0x16, 0x05, 0x09]


def test_scratch_ram_keeps_its_bytes(machine: _Machine) -> None:
    machine.set(0x7F, 0xA5)
    assert machine.get(0x7F) == 0xA5


def test_interrupts_cannot_be_enabled(machine: _Machine) -> None:
    machine.set(0x0B, 0x72)
    assert machine.get(0x0B) == 0x02


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1)),
        max_size=300,
    )
)
def test_garbage_never_breaks_the_clock(writes: list[tuple[int, int, int]]) -> None:
    machine = _Machine()
    for offset, length, value in writes:
        machine.bus.write(0x70 + offset, length, value)
        assert 0 <= machine.bus.read(0x70 + offset, length) < 1 << (8 * length)
    machine.set(0x0B, 0x02)
    machine.set(0x0B, 0x02)
    assert all(byte & 0xF <= 9 for byte in machine.time())
