# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from devices.virtio.rng import MAX_REQUEST_BYTES, VirtioRng

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.virtio.device import VirtioDevice
    from tests.unit.devices.virtio.conftest import Machine

DATA_GPA = 0x40000


@pytest.fixture
def machine(make_machine: Callable[[VirtioDevice], Machine]) -> Machine:
    machine = make_machine(VirtioRng())
    machine.start()
    return machine


def test_buffer_is_filled_with_what_the_host_gives(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getrandom", lambda size: b"\xa5" * size)
    machine.post(0, [(DATA_GPA, 10, True), (DATA_GPA + 100, 6, True)])
    machine.kick(0)
    machine.loop.dispatch()
    assert machine.used(0) == [(0, 16)]
    assert machine.memory.read(DATA_GPA, 11) == b"\xa5" * 10 + b"\0"
    assert machine.memory.read(DATA_GPA + 100, 7) == b"\xa5" * 6 + b"\0"


def test_overlapping_descriptors_do_not_choose_the_hosts_allocation(machine: Machine) -> None:
    buffer = (DATA_GPA, 0x10000, True)
    machine.post(0, [buffer] * 8)
    machine.kick(0)
    machine.loop.dispatch()
    assert machine.used(0) == [(0, MAX_REQUEST_BYTES)]


def test_one_kick_drains_the_queue_and_interrupts_once(machine: Machine) -> None:
    machine.post(0, [(DATA_GPA, 8, True)], head=0)
    machine.post(0, [(DATA_GPA, 8, True)], head=1)
    machine.kick(0)
    machine.loop.dispatch()
    assert machine.used(0) == [(0, 8), (1, 8)]
    assert machine.interrupts(1) == 1
    assert machine.device.stats() == {
        "kicks": 1,
        "requests": 2,
        "written_bytes": 16,
        "interrupts": 1,
    }


def test_endless_driver_does_not_hold_the_loop(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refill(size: int) -> bytes:
        machine.post(0, [(DATA_GPA, 1, True)])
        return b"x" * size

    monkeypatch.setattr(os, "getrandom", refill)
    machine.post(0, [(DATA_GPA, 1, True)])
    machine.kick(0)
    assert machine.loop.dispatch() == 1
    assert machine.device.stats()["requests"] == machine.queue_size
    assert machine.loop.dispatch() == 1  # it kicked itself


def test_event_idx_driver_is_told_when_to_kick(
    make_machine: Callable[[VirtioDevice], Machine],
) -> None:
    machine = make_machine(VirtioRng())
    machine.start(1 << 32 | 1 << 29)
    machine.post(0, [(DATA_GPA, 8, True)])
    machine.kick(0)
    machine.loop.dispatch()
    assert machine.used(0) == [(0, 8)]
    avail_event = machine.memory.read(0x10000 + 0x2000 + 4 + 8 * machine.queue_size, 2)
    assert avail_event == b"\x01\x00"
