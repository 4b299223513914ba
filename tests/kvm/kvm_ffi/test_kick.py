# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import select
import threading
import time

import pytest

from kvm_ffi.errors import KvmError
from kvm_ffi.eventfd import EventFd
from kvm_ffi.exits import EXIT_KICKED, ExitKind
from kvm_ffi.system import Kvm
from tests.support.tiny_guest import HLT, SPIN, TinyGuest


def run_in_thread(guest: TinyGuest) -> tuple[threading.Thread, list[int]]:
    kinds: list[int] = []
    thread = threading.Thread(target=lambda: kinds.append(guest.vcpu.run()))
    thread.start()
    return thread, kinds


def test_a_kick_ends_a_guest_that_spins(guest: TinyGuest) -> None:
    guest.load(SPIN)
    thread, kinds = run_in_thread(guest)
    guest.vcpu.kick()
    thread.join(timeout=10)
    assert kinds == [EXIT_KICKED]


def test_no_kick_is_lost_whatever_the_thread_is_doing(guest: TinyGuest) -> None:
    guest.load(SPIN)
    rounds = 200
    kinds: list[int] = []
    may_run = threading.Semaphore(0)
    kicked = threading.Semaphore(0)

    def run_again_and_again() -> None:
        for _ in range(rounds):
            may_run.acquire()
            kinds.append(guest.vcpu.run())
            guest.vcpu.clear_kick()
            kicked.release()

    thread = threading.Thread(target=run_again_and_again)
    thread.start()
    for i in range(rounds):
        may_run.release()
        # From "before run() has begun" to "deep inside the guest".
        time.sleep(i % 20 * 20e-6)
        guest.vcpu.kick()
        assert kicked.acquire(timeout=10), f"kick {i} was lost"
    thread.join(timeout=10)
    assert kinds == [EXIT_KICKED] * rounds


def test_a_kick_before_run_counts(guest: TinyGuest) -> None:
    guest.load(SPIN)
    guest.vcpu.kick()
    assert guest.run() == ExitKind.KICKED


def test_a_kick_holds_until_it_is_cleared(guest: TinyGuest) -> None:
    guest.load(HLT)
    guest.vcpu.kick()
    assert [guest.run(), guest.run()] == [ExitKind.KICKED] * 2
    guest.vcpu.clear_kick()
    assert guest.run() == ExitKind.HLT


def test_a_kicked_vcpu_has_finished_its_io(guest: TinyGuest) -> None:
    guest.exits.claim_pio(0x510, 1)
    guest.load(b"\xec" + HLT, regs={"rdx": 0x510})  # in al, dx
    assert guest.run() == ExitKind.PIO_READ
    guest.vcpu.exit.value = 0x5A
    guest.vcpu.kick()
    assert guest.run() == ExitKind.KICKED
    regs = guest.vcpu.get_regs()
    assert (regs.rax, regs.rip) == (0x5A, 0x1001)


def test_a_vcpu_that_waits_for_its_init_can_be_kicked(kvm: Kvm) -> None:
    with TinyGuest(kvm, has_irqchip=True) as guest:
        second = guest.vm.create_vcpu(1, guest.exits)
        kinds: list[int] = []
        thread = threading.Thread(target=lambda: kinds.append(second.run()))
        thread.start()
        second.kick()
        thread.join(timeout=10)
        assert kinds == [EXIT_KICKED]


def test_a_running_vcpu_can_neither_be_closed_nor_run_twice(guest: TinyGuest) -> None:
    # The guest itself says that it is running.
    started = EventFd()
    guest.vm.assign_ioeventfd(0x510, 1, started, is_pio=True)
    guest.load(b"\xee" + SPIN, regs={"rdx": 0x510})
    thread, _ = run_in_thread(guest)
    select.select([started], [], [], 10)
    with pytest.raises(KvmError, match="busy"):
        guest.vcpu.close()
    with pytest.raises(KvmError, match="busy"):
        guest.vcpu.run()
    guest.vcpu.kick()
    thread.join(timeout=10)
    started.close()


def test_a_kick_after_close_does_nothing(guest: TinyGuest) -> None:
    guest.vcpu.close()
    guest.vcpu.kick()
    guest.vcpu.clear_kick()


def test_run_after_close_is_refused(guest: TinyGuest) -> None:
    guest.vcpu.close()
    with pytest.raises(KvmError, match="KVM_RUN"):
        guest.vcpu.run()
