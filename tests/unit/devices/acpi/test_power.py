# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from devices.acpi.power import GenericEventDevice, PowerControl
from devices.bus import Bus

if TYPE_CHECKING:
    from tests.unit.devices.conftest import FakeIrq

GED, SLEEP_CONTROL, SLEEP_STATUS, RESET = 0x5C0, 0x5C4, 0x5C5, 0x5C6
S5_ENTER = 5 << 2 | 0x20


@pytest.fixture
def events(pio: Bus) -> list[str]:
    events: list[str] = []
    PowerControl(lambda: events.append("off"), lambda: events.append("reset")).attach(pio)
    return events


def test_sleep_type_5_powers_off(pio: Bus, events: list[str]) -> None:
    pio.write(SLEEP_CONTROL, 1, S5_ENTER)
    assert events == ["off"]


@pytest.mark.parametrize("value", [5 << 2, 3 << 2 | 0x20, 0x20, 0])
def test_other_sleep_values_do_nothing(pio: Bus, events: list[str], value: int) -> None:
    pio.write(SLEEP_CONTROL, 1, value)
    pio.write(SLEEP_STATUS, 1, S5_ENTER)
    assert events == []


def test_reset_register_resets(pio: Bus, events: list[str]) -> None:
    pio.write(RESET, 1, 1)
    assert events == ["reset"]


def test_sleep_status_is_clear(pio: Bus, events: list[str]) -> None:
    assert pio.read(SLEEP_STATUS, 1) == 0


def test_power_button_is_pending_until_read(pio: Bus, irq: FakeIrq) -> None:
    ged = GenericEventDevice(irq)
    ged.attach(pio)
    ged.power_button()
    assert irq.count == 1
    assert (pio.read(GED, 4), pio.read(GED, 4)) == (1, 0)


def test_event_register_is_read_only(pio: Bus, irq: FakeIrq) -> None:
    GenericEventDevice(irq).attach(pio)
    pio.write(GED, 4, 0xFFFFFFFF)
    assert (pio.read(GED, 4), irq.count) == (0, 0)
