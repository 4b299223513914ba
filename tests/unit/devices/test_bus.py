# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.bus import Bus
from devices.errors import BadRegisterAccess

if TYPE_CHECKING:
    from tests.unit.devices.conftest import FakeExitTable, FakeHandler


class _Refusing:
    def read(self, offset: int, length: int) -> int:
        raise BadRegisterAccess("no such register")

    def write(self, offset: int, length: int, value: int) -> None:
        raise BadRegisterAccess("no such register")


def test_access_reaches_handler_with_its_offset(make_handler: Callable[..., FakeHandler]) -> None:
    bus, handler = Bus("mmio"), make_handler(0x1234)
    bus.add(0x1000, 16, handler)
    bus.write(0x1004, 2, 0xBEEF)
    assert bus.read(0x1008, 2) == 0x1234
    assert (handler.reads, handler.writes) == ([(8, 2)], [(4, 2, 0xBEEF)])


def test_unclaimed_address_reads_all_ones(pio: Bus) -> None:
    assert [pio.read(0x10, n) for n in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFFFFFF]


def test_unclaimed_write_is_dropped(pio: Bus) -> None:
    pio.write(0x10, 4, 1)


def test_access_that_leaves_its_range_reaches_nobody(
    pio: Bus, make_handler: Callable[..., FakeHandler]
) -> None:
    handler = make_handler()
    pio.add(0x10, 2, handler)
    assert pio.read(0x11, 2) == 0xFFFF
    assert handler.reads == []


def test_answer_and_value_are_cut_to_the_width(
    pio: Bus, make_handler: Callable[..., FakeHandler]
) -> None:
    handler = make_handler(0x12345678)
    pio.add(0, 4, handler)
    pio.write(0, 1, 0xABCD)
    assert (pio.read(0, 1), handler.writes) == (0x78, [(0, 1, 0xCD)])


@pytest.mark.parametrize(("base", "length"), [(0x10, 8), (0x0F, 2), (0x17, 1), (0, 0x100)])
def test_overlap_is_refused_and_names_both(
    pio: Bus, make_handler: Callable[..., FakeHandler], base: int, length: int
) -> None:
    pio.add(0x10, 8, make_handler())
    with pytest.raises(ValueError, match=r"FakeHandler at .* overlaps FakeHandler at 0x10\.\.0x17"):
        pio.add(base, length, make_handler())


def test_neighbours_are_no_overlap(pio: Bus, make_handler: Callable[..., FakeHandler]) -> None:
    low, high = make_handler(1), make_handler(2)
    pio.add(0x10, 8, low)
    pio.add(0x18, 8, high)
    assert (pio.read(0x17, 1), pio.read(0x18, 1)) == (1, 2)


def test_empty_range_is_refused(pio: Bus, make_handler: Callable[..., FakeHandler]) -> None:
    with pytest.raises(ValueError, match="empty range"):
        pio.add(0x10, 0, make_handler())


def test_claims_follow_the_ranges(
    exit_table: FakeExitTable, make_handler: Callable[..., FakeHandler]
) -> None:
    bus = Bus("pio", exit_table.claim, exit_table.unclaim)
    bus.add(0x10, 8, make_handler())
    bus.add(0x20, 8, make_handler())
    bus.remove(0x10)
    assert exit_table.claims == {(0x20, 8)}
    assert bus.read(0x10, 1) == 0xFF


def test_removing_an_unknown_range_is_an_error(pio: Bus) -> None:
    with pytest.raises(ValueError, match="no range starts at 0x10"):
        pio.remove(0x10)


def test_guest_error_of_a_handler_stays_inside(pio: Bus, caplog: pytest.LogCaptureFixture) -> None:
    pio.add(0x10, 1, _Refusing())
    with caplog.at_level(logging.WARNING):
        for _ in range(1000):
            pio.write(0x10, 1, 0)
            assert pio.read(0x10, 1) == 0xFF
    assert 0 < len(caplog.records) < 20


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 40)), max_size=30))
def test_lookup_agrees_with_a_plain_search(ranges: list[tuple[int, int]]) -> None:
    class Tag:
        def __init__(self, tag: int) -> None:
            self.tag = tag

        def read(self, offset: int, length: int) -> int:
            return self.tag

        def write(self, offset: int, length: int, value: int) -> None:
            pass

    bus, owner = Bus("pio"), [0xFF] * 256
    for tag, (base, length) in enumerate(ranges):
        if all(owner[a] == 0xFF for a in range(base, base + length)):
            bus.add(base, length, Tag(tag))
            owner[base : base + length] = [tag] * length
    assert [bus.read(a, 1) for a in range(256)] == owner
