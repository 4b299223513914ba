# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from devices.legacy.serial import SerialPort
from kvm_ffi.exits import ExitTable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.unit.devices.conftest import FakeVm

THR, IER, LSR = 0, 1, 5
IER_RECEIVED = 1
LSR_DATA_READY = 1


@pytest.fixture
def serial(vm: FakeVm) -> Iterator[SerialPort]:
    serial = SerialPort(vm, ExitTable())
    yield serial
    serial.close()


def test_interrupt_is_bound_to_gsi_4_until_close(vm: FakeVm) -> None:
    serial = SerialPort(vm, ExitTable())
    assert [gsi for gsi, _ in vm.irqfds] == [4]
    serial.close()
    assert vm.irqfds == set()


def test_guest_output_is_signalled_and_read(serial: SerialPort) -> None:
    for byte in b"login: ":
        serial._uart.write(THR, byte)
    assert serial.output.drain() > 0
    assert serial.read_output() == b"login: "
    assert serial.stats()["output_bytes"] == 7


def test_input_reaches_the_guest_and_interrupts(serial: SerialPort) -> None:
    serial._uart.write(IER, IER_RECEIVED)
    assert serial.write_input(b"root") == 4
    assert serial._irq.eventfd.drain() > 0
    assert serial._uart.read(LSR) & LSR_DATA_READY
    assert serial._uart.read(THR) == ord("r")
