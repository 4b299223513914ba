# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvm_ffi.eventfd import EventFd
from kvm_ffi.uart import INPUT_SIZE_BYTES, OUTPUT_SIZE_BYTES, Uart
from tests.support.uart_model import UartModel

DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCRATCH = 0, 1, 2, 2, 3, 4, 5, 6, 7
DLAB = 0x80
LOOPBACK = 0x10
NO_INTERRUPT = 1


@pytest.fixture
def irq() -> Iterator[EventFd]:
    with EventFd() as eventfd:
        yield eventfd


@pytest.fixture
def uart(irq: EventFd) -> Iterator[Uart]:
    port = Uart(irq)
    yield port
    port.close()


def test_it_looks_like_a_16550a_to_a_driver(uart: Uart) -> None:
    uart.write(FCR, 1)
    assert uart.read(IIR) >> 6 == 3  # Linux' autoconfig: 3 is a 16550A with working FIFOs
    uart.write(MCR, LOOPBACK | 0xA)
    assert uart.read(MSR) & 0xF0 == 0x90  # ... and its loopback test


def test_output_is_announced_once_until_it_is_read(uart: Uart) -> None:
    for byte in b"ab":
        uart.write(DATA, byte)
    assert uart.output.drain() == 1
    assert uart.read_output() == b"ab"
    assert uart.read_output() == b""
    uart.write(DATA, ord("c"))
    assert uart.output.drain() == 1


def test_output_that_nobody_reads_is_dropped_and_counted(uart: Uart) -> None:
    for _ in range(OUTPUT_SIZE_BYTES + 3):
        uart.write(DATA, 0x41)
    assert uart.dropped_bytes == 3
    uart.output.drain()
    assert len(uart.read_output()) == 64 * 1024
    assert uart.output.drain() == 1  # more remains


def test_a_ring_that_wraps_keeps_the_order(uart: Uart) -> None:
    sent = bytes(i % 251 for i in range(OUTPUT_SIZE_BYTES))
    for byte in sent:
        uart.write(DATA, byte)
    received = uart.read_output()
    for byte in sent[: len(received)]:
        uart.write(DATA, byte)
    for _ in range(OUTPUT_SIZE_BYTES // len(received)):
        received += uart.read_output()
    assert received == sent + sent[: len(received) - len(sent)]


def test_input_beyond_the_buffer_is_refused(uart: Uart) -> None:
    assert uart.write_input(bytes(INPUT_SIZE_BYTES + 5)) == INPUT_SIZE_BYTES
    assert uart.write_input(b"more") == 1  # one byte is in the receive register


def test_input_comes_out_in_order_and_never_overruns(uart: Uart) -> None:
    uart.write(FCR, 1)
    sent = bytes(range(100))
    uart.write_input(sent)
    received = bytearray()
    while (status := uart.read(LSR)) & 1:
        assert not status & 2
        received.append(uart.read(DATA))
    assert received == sent


def test_loopback_returns_what_is_sent_and_overruns(uart: Uart) -> None:
    uart.write(MCR, LOOPBACK)
    uart.write(DATA, 0x12)
    uart.write(DATA, 0x34)
    assert uart.read(LSR) & 3 == 3
    assert uart.read(DATA) == 0x12
    assert uart.read_output() == b""


def test_received_data_interrupts_once(uart: Uart, irq: EventFd) -> None:
    uart.write(IER, 1)
    uart.write_input(b"abc")
    assert irq.drain() == 1
    assert uart.read(IIR) == 4
    for _ in range(3):
        uart.read(DATA)
    assert uart.read(IIR) == NO_INTERRUPT
    assert irq.drain() == 0


def test_an_empty_transmitter_interrupts_when_that_is_enabled(uart: Uart, irq: EventFd) -> None:
    uart.write(IER, 2)
    assert irq.drain() == 1
    assert uart.read(IIR) == 2
    assert uart.read(IIR) == NO_INTERRUPT  # reading it was the acknowledgement
    uart.write(DATA, 0)
    assert irq.drain() == 1


def test_the_divisor_hides_data_and_interrupt_enable(uart: Uart) -> None:
    uart.write(LCR, DLAB)
    uart.write(DATA, 0x0C)
    uart.write(IER, 0x01)
    assert (uart.read(DATA), uart.read(IER)) == (0x0C, 0x01)
    uart.write(LCR, 3)
    assert uart.read(IER) == 0
    assert uart.read_output() == b""


@given(offset=st.integers(8, 2**32 - 1), value=st.integers(0, 255))
def test_registers_that_do_not_exist_do_nothing(offset: int, value: int) -> None:
    port = Uart()
    port.write(offset, value)
    assert port.read(offset) == 0xFF
    port.close()


def test_threads_lose_no_byte(uart: Uart) -> None:
    writers, per_writer = 4, 5_000
    received = bytearray()

    def write(mark: int) -> None:
        for _ in range(per_writer):
            uart.write(DATA, mark)

    threads = [threading.Thread(target=write, args=(mark,)) for mark in range(writers)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        received += uart.read_output()
    received += uart.read_output()
    assert [received.count(mark) for mark in range(writers)] == [per_writer] * writers


class UartMachine(RuleBasedStateMachine):
    """The C UART and the model get the same operations and must never differ."""

    def __init__(self) -> None:
        super().__init__()
        self.irq = EventFd()
        self.uart = Uart(self.irq)
        self.model = UartModel(INPUT_SIZE_BYTES, OUTPUT_SIZE_BYTES)

    @rule(offset=st.integers(0, 7))
    def read(self, offset: int) -> None:
        assert self.uart.read(offset) == self.model.read(offset)

    @rule(offset=st.integers(0, 7), value=st.integers(0, 255))
    def write(self, offset: int, value: int) -> None:
        self.uart.write(offset, value)
        self.model.write(offset, value)

    @rule(data=st.binary(max_size=40))
    def type_in(self, data: bytes) -> None:
        assert self.uart.write_input(data) == self.model.put_input(data)

    @rule()
    def type_in_too_much(self) -> None:
        data = bytes(range(256)) * 300
        assert self.uart.write_input(data) == self.model.put_input(data)

    @rule()
    def take_output(self) -> None:
        assert self.uart.read_output() == self.model.take_output()

    @invariant()
    def interrupts_and_announcements_agree(self) -> None:
        assert self.irq.drain() == self.model.interrupts
        assert self.uart.output.drain() == self.model.announcements
        self.model.interrupts = self.model.announcements = 0

    def teardown(self) -> None:
        self.uart.close()
        self.irq.close()


TestUartMatchesItsModel = pytest.mark.slow(UartMachine.TestCase)
