# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import pytest

from kvm_ffi.errors import KvmError
from kvm_ffi.eventfd import EventFd
from kvm_ffi.exits import ExitKind
from kvm_ffi.types import Gpa
from kvm_ffi.vcpu import CoalescedWrite
from tests.support.tiny_guest import HLT, RAM_SIZE, TinyGuest

PORT = 0x510
MMIO = 0xD000_0000
PAGE = 4096


def test_a_kick_by_port_does_not_exit(guest: TinyGuest) -> None:
    guest.exits.claim_pio(PORT, 1)
    with EventFd() as kick:
        guest.vm.assign_ioeventfd(PORT, 1, kick, is_pio=True)
        guest.load(b"\xee\xee\xee" + HLT, regs={"rdx": PORT})
        assert guest.accesses() == []
        assert kick.drain() == 3


def test_a_kick_by_memory_does_not_exit(guest: TinyGuest) -> None:
    with EventFd() as kick:
        guest.vm.assign_ioeventfd(MMIO, 0, kick)
        guest.load(b"\xa3\x00\x00\x66\xa3\x00\x00" + HLT, ds_base=MMIO)
        assert guest.run() == ExitKind.HLT
        assert kick.drain() == 2
    assert guest.exits.counters()["mmio_unclaimed"] == 0


def test_only_the_matching_value_kicks(guest: TinyGuest) -> None:
    guest.exits.claim_pio(PORT, 2)
    with EventFd() as kick:
        guest.vm.assign_ioeventfd(PORT, 2, kick, is_pio=True, datamatch=7)
        # mov ax, 7; out dx, ax; mov ax, 8; out dx, ax
        guest.load(b"\xb8\x07\x00\xef\xb8\x08\x00\xef" + HLT, regs={"rdx": PORT})
        assert guest.accesses() == [("PIO_WRITE", PORT, 2, 8)]
        assert kick.drain() == 1


def test_a_deassigned_kick_exits_again(guest: TinyGuest) -> None:
    guest.exits.claim_pio(PORT, 1)
    with EventFd() as kick:
        guest.vm.assign_ioeventfd(PORT, 1, kick, is_pio=True)
        guest.vm.deassign_ioeventfd(PORT, 1, kick, is_pio=True)
        guest.load(b"\xee" + HLT, regs={"rdx": PORT})
        assert guest.run() == ExitKind.PIO_WRITE
        assert kick.drain() == 0


def test_a_kick_cannot_be_assigned_twice(guest: TinyGuest) -> None:
    with EventFd() as kick:
        guest.vm.assign_ioeventfd(PORT, 1, kick, is_pio=True)
        with pytest.raises(KvmError, match="KVM_IOEVENTFD"):
            guest.vm.assign_ioeventfd(PORT, 1, kick, is_pio=True)


def test_coalesced_port_writes_wait_in_order(guest: TinyGuest) -> None:
    guest.exits.claim_pio(PORT, 4)
    guest.vm.register_coalesced_pio(PORT, 4)
    guest.load(b"\xee\xef\x66\xef" + HLT, regs={"rdx": PORT, "rax": 0x1122_3344})
    assert guest.accesses() == []
    assert guest.vcpu.take_coalesced_writes() == [
        CoalescedWrite(PORT, 0x44, 1, is_pio=True),
        CoalescedWrite(PORT, 0x3344, 2, is_pio=True),
        CoalescedWrite(PORT, 0x1122_3344, 4, is_pio=True),
    ]
    assert guest.vcpu.take_coalesced_writes() == []


def test_coalesced_memory_writes_wait_too(guest: TinyGuest) -> None:
    guest.vm.register_coalesced_mmio(Gpa(MMIO), PAGE)
    guest.load(b"\x66\xa3\x10\x00" + HLT, ds_base=MMIO, regs={"rax": 5})
    assert guest.run() == ExitKind.HLT
    assert guest.vcpu.take_coalesced_writes() == [CoalescedWrite(MMIO + 0x10, 5, 4, is_pio=False)]


def test_a_full_coalescing_ring_exits_instead_of_losing_writes(guest: TinyGuest) -> None:
    guest.exits.claim_pio(PORT, 1)
    guest.vm.register_coalesced_pio(PORT, 1)
    writes = 1000
    # again: out dx, al; dec cx; jnz again
    guest.load(b"\xee\x49\x75\xfc" + HLT, regs={"rdx": PORT, "rcx": writes})
    seen = 0
    while guest.run() == ExitKind.PIO_WRITE:
        seen += 1 + len(guest.vcpu.take_coalesced_writes())
    assert seen + len(guest.vcpu.take_coalesced_writes()) == writes


def test_the_dirty_log_names_the_pages_written_since_the_last_call(guest: TinyGuest) -> None:
    guest.load(b"\xa2\x00\x30\xa2\x00\x90" + HLT)  # mov [0x3000], al; mov [0x9000], al
    guest.vm.get_dirty_log(0, RAM_SIZE)
    guest.run()
    dirty = int.from_bytes(guest.vm.get_dirty_log(0, RAM_SIZE), "little")
    assert dirty & (1 << 3 | 1 << 9) == 1 << 3 | 1 << 9
    assert dirty >> RAM_SIZE // PAGE == 0
    assert int.from_bytes(guest.vm.get_dirty_log(0, RAM_SIZE), "little") == 0


def test_the_dirty_log_of_a_slot_that_does_not_keep_one_is_refused(guest: TinyGuest) -> None:
    region = guest.memory.regions[0]
    guest.vm.set_memslot(0, region.gpa, region.size_bytes, region.hva)
    with pytest.raises(KvmError, match="KVM_GET_DIRTY_LOG"):
        guest.vm.get_dirty_log(0, RAM_SIZE)


def test_a_write_to_a_read_only_slot_is_an_mmio_exit(guest: TinyGuest) -> None:
    region = guest.memory.regions[0]
    guest.vm.set_memslot(1, Gpa(MMIO), region.size_bytes, region.hva, read_only=True)
    guest.exits.claim_mmio(MMIO, PAGE)
    guest.memory.write(Gpa(0x100), b"\x2a")
    guest.load(b"\xa0\x00\x01\xa2\x00\x01" + HLT, ds_base=MMIO)  # mov al, [0x100]; mov [0x100], al
    assert guest.accesses() == [("MMIO_WRITE", MMIO + 0x100, 1, 0x2A)]


def test_overlapping_memslots_are_refused(guest: TinyGuest) -> None:
    region = guest.memory.regions[0]
    with pytest.raises(KvmError, match="KVM_SET_USER_MEMORY_REGION"):
        guest.vm.set_memslot(1, Gpa(PAGE), region.size_bytes, region.hva)
