# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import threading

import pytest

from kvm_ffi.eventfd import EventFd
from kvm_ffi.exits import ExitKind
from kvm_ffi.irq_routing import IrqRouter
from kvm_ffi.types import Gpa
from kvm_ffi.vcpu import Vcpu
from tests.support.tiny_guest import SPIN, TinyGuest

PORT = 0x510
HANDLER = 0x2000
LAPIC = 0xFEE0_0000
SPURIOUS_VECTOR_REGISTER = 0xF0
WAIT = b"\xfb\xf4" + SPIN  # sti; hlt; jmp $
# mov al, 0x99; mov dx, PORT; out dx, al
REPORT = b"\xb0\x99\xba" + PORT.to_bytes(2, "little") + b"\xee"


@pytest.fixture
def waiting_guest(irq_guest: TinyGuest) -> TinyGuest:
    """Its local APIC is on; it waits in HLT for an interrupt, whose handler writes to PORT."""
    irq_guest.exits.claim_pio(PORT, 1)
    irq_guest.memory.write(Gpa(HANDLER), REPORT)
    lapic = bytearray(irq_guest.vcpu.get_lapic())
    lapic[SPURIOUS_VECTOR_REGISTER : SPURIOUS_VECTOR_REGISTER + 2] = b"\xff\x01"
    irq_guest.vcpu.set_lapic(bytes(lapic))
    irq_guest.load(WAIT)
    return irq_guest


def set_handler(guest: TinyGuest, vector: int) -> None:
    guest.memory.write(Gpa(4 * vector), HANDLER.to_bytes(4, "little"))


def run_with_deadline(guest: TinyGuest, vcpu: Vcpu | None = None) -> ExitKind:
    """Run to the next exit; a lost interrupt is KICKED instead of a hang."""
    timer = threading.Timer(10, guest.vcpu.kick)
    timer.start()
    kind = ExitKind((vcpu or guest.vcpu).run())
    timer.cancel()
    timer.join()
    return kind


def test_a_message_reaches_the_guest(waiting_guest: TinyGuest) -> None:
    set_handler(waiting_guest, 0x40)
    assert waiting_guest.vm.signal_msi(LAPIC, 0x40)
    assert run_with_deadline(waiting_guest) == ExitKind.PIO_WRITE


def test_an_irqfd_with_a_message_route_wakes_a_halted_guest(waiting_guest: TinyGuest) -> None:
    set_handler(waiting_guest, 0x41)
    router = IrqRouter(waiting_guest.vm)
    gsi = router.allocate_msi()
    router.set_msi(gsi, LAPIC, 0x41)
    router.commit()
    with EventFd() as irq:
        waiting_guest.vm.assign_irqfd(gsi, irq)
        timer = threading.Timer(0.02, irq.signal)
        timer.start()
        assert run_with_deadline(waiting_guest) == ExitKind.PIO_WRITE
        timer.join()


def test_an_interrupt_signalled_before_its_irqfd_is_assigned_is_delivered(
    waiting_guest: TinyGuest,
) -> None:
    set_handler(waiting_guest, 0x42)
    router = IrqRouter(waiting_guest.vm)
    gsi = router.allocate_msi()
    router.set_msi(gsi, LAPIC, 0x42)
    router.commit()
    with EventFd() as irq:
        irq.signal()
        waiting_guest.vm.assign_irqfd(gsi, irq)
        assert run_with_deadline(waiting_guest) == ExitKind.PIO_WRITE


def test_a_deassigned_irqfd_keeps_its_signals(irq_guest: TinyGuest) -> None:
    router = IrqRouter(irq_guest.vm)
    gsi = router.allocate_msi()
    router.set_msi(gsi, LAPIC, 0x42)
    router.commit()
    with EventFd() as irq:
        irq_guest.vm.assign_irqfd(gsi, irq)
        irq_guest.vm.deassign_irqfd(gsi, irq)
        irq.signal()
        assert irq.drain() == 1


def test_a_raised_line_interrupts_through_the_pic(waiting_guest: TinyGuest) -> None:
    set_handler(waiting_guest, 4)  # the PIC's reset state has its vectors at 0
    waiting_guest.vm.set_irq_line(4, True)
    assert run_with_deadline(waiting_guest) == ExitKind.PIO_WRITE


def test_an_nmi_reaches_the_guest(waiting_guest: TinyGuest) -> None:
    set_handler(waiting_guest, 2)
    waiting_guest.vcpu.nmi()
    assert run_with_deadline(waiting_guest) == ExitKind.PIO_WRITE


def test_a_second_vcpu_starts_at_the_vector_of_its_sipi(waiting_guest: TinyGuest) -> None:
    waiting_guest.memory.write(Gpa(0x5000), REPORT)
    second = waiting_guest.vm.create_vcpu(1, waiting_guest.exits)
    # mov dword [0x300], INIT all but self; mov dword [0x300], SIPI 5 all but self; jmp $
    init = b"\x66\xc7\x06\x00\x03" + 0x000C_4500.to_bytes(4, "little")
    sipi = b"\x66\xc7\x06\x00\x03" + 0x000C_4605.to_bytes(4, "little")
    waiting_guest.load(init + sipi + SPIN, ds_base=LAPIC)
    kinds: list[int] = []
    thread = threading.Thread(target=lambda: kinds.append(second.run()))
    thread.start()
    boot_thread = threading.Thread(target=waiting_guest.vcpu.run)
    boot_thread.start()
    thread.join(timeout=10)
    waiting_guest.vcpu.kick()
    boot_thread.join(timeout=10)
    assert kinds == [ExitKind.PIO_WRITE]
