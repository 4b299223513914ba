# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import pytest

from kvm_ffi.eventfd import EventFd
from kvm_ffi.exits import ExitKind
from kvm_ffi.types import Gpa
from kvm_ffi.uart import Uart
from tests.support.tiny_guest import HLT, TinyGuest

COM1 = 0x3F8
COM1_GSI = 4


def test_what_a_guest_prints_is_served_in_c_and_announced(guest: TinyGuest) -> None:
    uart = Uart()
    guest.exits.attach_uart(uart, COM1)
    guest.memory.write(Gpa(0x3000), b"hello")
    guest.load(b"\xf3\x6e" + HLT, regs={"rdx": COM1, "rcx": 5, "rsi": 0x3000})
    assert guest.run() == ExitKind.HLT
    assert uart.output.drain() == 1
    assert uart.read_output() == b"hello"
    assert guest.exits.counters()["uart"] == 5


def test_a_wide_access_reaches_one_register_per_byte(guest: TinyGuest) -> None:
    uart = Uart()
    guest.exits.attach_uart(uart, COM1)
    guest.load(b"\xef" + HLT, regs={"rdx": COM1 + 6, "rax": 0x5A00})  # out dx, ax: MSR, SCR
    guest.run()
    assert uart.read(7) == 0x5A


def test_input_reaches_the_guest(guest: TinyGuest) -> None:
    uart = Uart()
    guest.exits.attach_uart(uart, COM1)
    assert uart.write_input(b"k") == 1
    guest.load(b"\xec" + HLT, regs={"rdx": COM1})
    assert guest.run() == ExitKind.HLT
    assert guest.vcpu.get_regs().rax == ord("k")


def test_input_interrupts_a_guest_that_waits(irq_guest: TinyGuest) -> None:
    with EventFd() as irq:
        uart = Uart(irq)
        irq_guest.exits.attach_uart(uart, COM1)
        irq_guest.exits.claim_pio(0x510, 1)
        irq_guest.vm.assign_irqfd(COM1_GSI, irq)
        uart.write(1, 1)  # IER: data available
        # The handler passes the byte on: mov dx, COM1; in al, dx; mov dx, 0x510; out dx, al
        irq_guest.memory.write(Gpa(0x2000), b"\xba\xf8\x03\xec\xba\x10\x05\xee")
        irq_guest.memory.write(Gpa(4 * COM1_GSI), b"\x00\x20\x00\x00")
        irq_guest.load(b"\xfb\xf4\xeb\xfe")  # sti; hlt; jmp $
        uart.write_input(b"x")
        assert irq_guest.run() == ExitKind.PIO_WRITE
        assert irq_guest.vcpu.exit.value == ord("x")


def test_a_fifth_uart_is_refused(guest: TinyGuest) -> None:
    for port in (0x3F8, 0x2F8, 0x3E8, 0x2E8):
        guest.exits.attach_uart(Uart(), port)
    with pytest.raises(ValueError, match="one UART too many"):
        guest.exits.attach_uart(Uart(), 0x5F8)
