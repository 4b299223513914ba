# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

from devices.bus import Bus
from devices.legacy.boot_timer import BootTimer
from devices.legacy.pvpanic import PanicEvent, Pvpanic


def test_pvpanic_tells_what_it_knows(pio: Bus) -> None:
    Pvpanic(lambda _event: None).attach(pio)
    assert pio.read(0x505, 1) == 3


def test_panic_is_reported_once_however_often_it_is_written(pio: Bus) -> None:
    seen: list[PanicEvent] = []
    Pvpanic(seen.append).attach(pio)
    for _ in range(100):
        pio.write(0x505, 1, 1)
    pio.write(0x505, 1, 2)
    assert seen == [PanicEvent.PANICKED, PanicEvent.CRASH_LOADED]


def test_unknown_panic_bits_are_ignored(pio: Bus) -> None:
    seen: list[PanicEvent] = []
    Pvpanic(seen.append).attach(pio)
    pio.write(0x505, 1, 0xFC)
    assert seen == []


def test_boot_timer_takes_the_first_123_only(pio: Bus) -> None:
    seen: list[int] = []
    times = iter([1000, 2000])
    BootTimer(seen.append, lambda: next(times)).attach(pio)
    pio.write(0x5B0, 1, 1)
    pio.write(0x5B0, 1, 123)
    pio.write(0x5B0, 1, 123)
    assert seen == [1000]
    assert pio.read(0x5B0, 1) == 0xFF
