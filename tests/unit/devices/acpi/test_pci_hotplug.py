# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The hotplug registers, as a well-behaved guest uses them and as a hostile one may."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.acpi.pci_hotplug import PCI_HOTPLUG_PORT, PciHotplug
from devices.acpi.power import GenericEventDevice
from devices.bus import Bus

if TYPE_CHECKING:
    from tests.unit.devices.conftest import FakeIrq

GED = 0x5C0
UP, DOWN, EJECT = (PCI_HOTPLUG_PORT + offset for offset in (0, 4, 8))
PLUG_EVENT = 2


class Plugged:
    """The registers on a bus, with the slots that were ejected."""

    def __init__(self, pio: Bus, irq: FakeIrq) -> None:
        self.pio, self.irq = pio, irq
        self.ejected: list[int] = []
        events = GenericEventDevice(irq)
        events.attach(pio)
        self.hotplug = PciHotplug(events, self.ejected.append)
        self.hotplug.attach(pio)


@pytest.fixture
def plugged(pio: Bus, irq: FakeIrq) -> Plugged:
    return Plugged(pio, irq)


def test_a_new_device_is_told_once_by_an_event(plugged: Plugged, pio: Bus) -> None:
    plugged.hotplug.tell_changed(3)
    assert plugged.irq.count == 1
    assert pio.read(GED, 4) == PLUG_EVENT
    assert [pio.read(UP, 4), pio.read(UP, 4), pio.read(DOWN, 4)] == [1 << 3, 0, 0]


def test_slots_that_come_together_are_told_together(plugged: Plugged, pio: Bus) -> None:
    plugged.hotplug.tell_changed(1)
    plugged.hotplug.tell_changed(31)
    assert pio.read(UP, 4) == 1 << 31 | 1 << 1


def test_a_guest_that_is_asked_ejects_the_slot(plugged: Plugged, pio: Bus) -> None:
    plugged.hotplug.ask_to_eject(7)
    assert pio.read(GED, 4) == PLUG_EVENT
    assert [pio.read(DOWN, 4), pio.read(DOWN, 4), pio.read(UP, 4)] == [1 << 7, 0, 0]
    pio.write(EJECT, 4, 1 << 7)
    assert plugged.ejected == [7]
    pio.write(EJECT, 4, 1 << 7)
    assert plugged.ejected == [7]


def test_what_was_not_asked_for_is_not_ejected(plugged: Plugged, pio: Bus) -> None:
    plugged.hotplug.ask_to_eject(7)
    pio.write(EJECT, 4, 0xFFFFFFFF ^ 1 << 7)
    assert plugged.ejected == []
    pio.write(EJECT, 4, 0xFFFFFFFF)
    assert plugged.ejected == [7]


def test_what_is_to_be_kept_is_not_ejected(plugged: Plugged, pio: Bus) -> None:
    plugged.hotplug.ask_to_eject(7)
    assert plugged.hotplug.keep(7)
    assert pio.read(DOWN, 4) == 0
    pio.write(EJECT, 4, 1 << 7)
    assert plugged.ejected == []
    assert not plugged.hotplug.keep(7)


def test_a_guest_may_be_asked_again(plugged: Plugged, pio: Bus) -> None:
    plugged.hotplug.ask_to_eject(7)
    pio.read(DOWN, 4)
    plugged.hotplug.ask_to_eject(7)
    assert pio.read(DOWN, 4) == 1 << 7
    assert plugged.irq.count == 2


def test_a_device_that_was_pulled_out_is_dropped_and_its_slot_looked_at_again(
    plugged: Plugged, pio: Bus
) -> None:
    plugged.hotplug.ask_to_eject(7)
    plugged.hotplug.tell_gone(7)
    assert [pio.read(UP, 4), pio.read(DOWN, 4)] == [1 << 7, 1 << 7]
    pio.write(EJECT, 4, 1 << 7)
    # What has come into the slot meanwhile is not ejected in its place, but found.
    assert plugged.ejected == []
    assert [pio.read(UP, 4), pio.read(DOWN, 4)] == [1 << 7, 0]
    pio.write(EJECT, 4, 1 << 7)
    assert (plugged.ejected, pio.read(UP, 4)) == ([], 0)


SLOT = st.integers(1, 31)
GUEST = st.tuples(
    st.sampled_from(["read", "write"]),
    st.integers(0, 11),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 2**32 - 1),
)
HOST = st.tuples(st.sampled_from(["tell_changed", "ask_to_eject", "keep", "tell_gone"]), SLOT)


@given(st.lists(st.one_of(GUEST, HOST), max_size=60))
def test_whatever_a_guest_writes_it_ejects_only_what_it_was_asked_for(
    steps: list[tuple[str, int] | tuple[str, int, int, int]],
) -> None:
    from tests.unit.devices.conftest import FakeIrq

    pio = Bus("pio")
    plugged = Plugged(pio, FakeIrq())
    asked: set[int] = set()
    for step in steps:
        if len(step) == 2:
            getattr(plugged.hotplug, step[0])(step[1])
            asked |= {step[1]} if step[0] == "ask_to_eject" else set()
            asked -= {step[1]} if step[0] in ("keep", "tell_gone") else set()
            continue
        kind, offset, length, value = step
        if kind == "read":
            assert 0 <= pio.read(PCI_HOTPLUG_PORT + offset, length) < 1 << 8 * length
            continue
        plugged.ejected.clear()
        pio.write(PCI_HOTPLUG_PORT + offset, length, value)
        allowed = (
            {slot for slot in asked if value >> slot & 1} if (offset, length) == (8, 4) else set()
        )
        assert set(plugged.ejected) == allowed
        assert len(plugged.ejected) == len(allowed)
        asked -= allowed
