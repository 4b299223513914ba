# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.bus import Bus
from devices.legacy.i8042 import CTRL_ALT_DEL, I8042, MAX_PENDING_BYTES

if TYPE_CHECKING:
    from tests.unit.devices.conftest import FakeIrq

DATA, COMMAND = 0x60, 0x64
OUTPUT_FULL = 1


class _Machine:
    def __init__(self, irq: FakeIrq) -> None:
        self.irq, self.resets, self.bus = irq, 0, Bus("pio")
        self.device = I8042(irq, self._reset)
        self.device.attach(self.bus)

    def _reset(self) -> None:
        self.resets += 1

    def drain(self) -> bytes:
        """Read until the status says empty, bounded by twice the buffer."""
        out = bytearray()
        while self.bus.read(COMMAND, 1) & OUTPUT_FULL and len(out) < 2 * MAX_PENDING_BYTES:
            out.append(self.bus.read(DATA, 1))
        return bytes(out)


@pytest.fixture
def machine(irq: FakeIrq) -> _Machine:
    return _Machine(irq)


def test_reset_command_resets(machine: _Machine) -> None:
    machine.bus.write(COMMAND, 1, 0xFE)
    assert machine.resets == 1


def test_pulse_that_leaves_the_reset_line_alone_does_not_reset(machine: _Machine) -> None:
    machine.bus.write(COMMAND, 1, 0xFF)
    assert machine.resets == 0


def test_output_port_with_reset_line_low_resets(machine: _Machine) -> None:
    machine.bus.write(COMMAND, 1, 0xD1)
    machine.bus.write(DATA, 1, 0xFE)
    assert machine.resets == 1


def test_self_test_passes(machine: _Machine) -> None:
    machine.bus.write(COMMAND, 1, 0xAA)
    assert machine.drain() == b"\x55"


def test_keyboard_interface_test_passes(machine: _Machine) -> None:
    machine.bus.write(COMMAND, 1, 0xAB)
    assert machine.drain() == b"\x00"


def test_control_register_reads_back(machine: _Machine) -> None:
    machine.bus.write(COMMAND, 1, 0x60)
    machine.bus.write(DATA, 1, 0x44)
    machine.bus.write(COMMAND, 1, 0x20)
    assert machine.drain() == b"\x64"  # the auxiliary port stays disabled


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"\xf2", b"\xfa\xab\x83"),
        (b"\xff", b"\xfa\xaa"),
        (b"\xed\x07", b"\xfa\xfa"),
        (b"\xf4", b"\xfa"),
        (b"\x01", b"\xfe"),
    ],
    ids=["identify", "reset", "leds", "enable", "unknown"],
)
def test_keyboard_answers_at_once(machine: _Machine, sent: bytes, answer: bytes) -> None:
    for byte in sent:
        machine.bus.write(DATA, 1, byte)
    assert machine.drain() == answer


def test_ctrl_alt_del_queues_scancodes_and_interrupts(machine: _Machine) -> None:
    assert machine.device.ctrl_alt_del()
    assert machine.irq.count == 1
    assert machine.drain() == CTRL_ALT_DEL
    assert machine.irq.count == len(CTRL_ALT_DEL)  # one edge per byte


def test_ctrl_alt_del_on_a_disabled_keyboard_does_nothing(machine: _Machine) -> None:
    machine.bus.write(COMMAND, 1, 0xAD)
    assert not machine.device.ctrl_alt_del()
    assert machine.drain() == b""


def test_ctrl_alt_del_that_nobody_reads_is_lost(machine: _Machine) -> None:
    pressed = [machine.device.ctrl_alt_del() for _ in range(10)]
    assert pressed == [True] * 8 + [False] * 2
    assert machine.drain() == CTRL_ALT_DEL * 8


def test_no_interrupt_while_the_guest_has_it_disabled(machine: _Machine) -> None:
    machine.bus.write(COMMAND, 1, 0x60)
    machine.bus.write(DATA, 1, 0x00)
    machine.device.ctrl_alt_del()
    assert machine.irq.count == 0


def test_empty_data_port_reads_zero(machine: _Machine) -> None:
    assert machine.bus.read(DATA, 1) == 0


accesses = st.lists(
    st.tuples(st.booleans(), st.sampled_from([DATA, COMMAND]), st.integers(0, 0xFDFF)),
    max_size=200,
)


@given(accesses)
def test_garbage_leaves_a_controller_that_still_answers(
    log: list[tuple[bool, int, int]],
) -> None:
    class Irq:
        def signal(self) -> None:
            pass

    bus = Bus("pio")
    I8042(Irq(), lambda: None).attach(bus)
    for is_write, port, value in log:
        if is_write:
            bus.write(port, 1, value)
        else:
            assert 0 <= bus.read(port, 1) <= 0xFF
    for _ in range(MAX_PENDING_BYTES):
        bus.read(DATA, 1)
    assert not bus.read(COMMAND, 1) & OUTPUT_FULL
    bus.write(COMMAND, 1, 0xAA)
    assert bus.read(DATA, 1) == 0x55
