# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import threading

import pytest

from kvm_ffi.exits import ExitKind
from kvm_ffi.types import Gpa
from kvm_ffi.x86_64 import pvh_boot
from kvm_ffi.x86_state import DescriptorTable
from tests.support.tiny_guest import CODE, HLT, TinyGuest

PORT = 0x510
MMIO = 0xD000_0000


def test_a_port_write_comes_to_python_with_its_width(guest: TinyGuest) -> None:
    guest.exits.claim_pio(PORT, 4)
    # out dx, al; out dx, ax; out dx, eax
    guest.load(b"\xee\xef\x66\xef" + HLT, regs={"rdx": PORT, "rax": 0x1122_3344})
    assert guest.accesses() == [
        ("PIO_WRITE", PORT, 1, 0x44),
        ("PIO_WRITE", PORT, 2, 0x3344),
        ("PIO_WRITE", PORT, 4, 0x1122_3344),
    ]


def test_a_port_read_gets_pythons_answer(guest: TinyGuest) -> None:
    guest.exits.claim_pio(PORT, 4)
    guest.load(b"\x66\xed" + HLT, regs={"rdx": PORT})  # in eax, dx
    assert guest.accesses({PORT: 0xCAFE_F00D}) == [("PIO_READ", PORT, 4, 0xCAFE_F00D)]
    assert guest.vcpu.get_regs().rax == 0xCAFE_F00D


def test_a_narrow_port_read_leaves_the_rest_of_the_register(guest: TinyGuest) -> None:
    guest.exits.claim_pio(PORT, 1)
    guest.load(b"\xec" + HLT, regs={"rdx": PORT, "rax": 0x1122_3344})  # in al, dx
    guest.accesses({PORT: 0xFFFF_FFAA})
    assert guest.vcpu.get_regs().rax == 0x1122_33AA


def test_a_memory_write_comes_to_python_with_its_width(guest: TinyGuest) -> None:
    guest.exits.claim_mmio(MMIO, 0x1000)
    # mov [0x10], al; mov [0x20], ax; mov [0x30], eax
    code = b"\xa2\x10\x00\xa3\x20\x00\x66\xa3\x30\x00"
    guest.load(code + HLT, ds_base=MMIO, regs={"rax": 0x1122_3344})
    assert guest.accesses() == [
        ("MMIO_WRITE", MMIO + 0x10, 1, 0x44),
        ("MMIO_WRITE", MMIO + 0x20, 2, 0x3344),
        ("MMIO_WRITE", MMIO + 0x30, 4, 0x1122_3344),
    ]


def test_a_memory_read_gets_pythons_answer(guest: TinyGuest) -> None:
    guest.exits.claim_mmio(MMIO, 0x1000)
    guest.load(b"\x66\xa1\x08\x00" + HLT, ds_base=MMIO)  # mov eax, [8]
    assert guest.accesses({MMIO + 8: 0xCAFE_F00D}) == [("MMIO_READ", MMIO + 8, 4, 0xCAFE_F00D)]
    assert guest.vcpu.get_regs().rax == 0xCAFE_F00D


def test_string_output_is_handed_out_one_element_at_a_time(guest: TinyGuest) -> None:
    guest.exits.claim_pio(PORT, 1)
    guest.memory.write(Gpa(0x3000), b"abcde")
    guest.load(b"\xf3\x6e" + HLT, regs={"rdx": PORT, "rcx": 5, "rsi": 0x3000})  # rep outsb
    assert [value for _, _, _, value in guest.accesses()] == list(b"abcde")


def test_string_input_takes_one_answer_per_element(guest: TinyGuest) -> None:
    guest.exits.claim_pio(PORT, 2)
    guest.load(b"\xf3\x6d" + HLT, regs={"rdx": PORT, "rcx": 3, "rdi": 0x3000})  # rep insw
    for answer in (0x1111, 0x2222, 0x3333):
        assert guest.run() == ExitKind.PIO_READ
        guest.vcpu.exit.value = answer
    assert guest.run() == ExitKind.HLT
    assert guest.memory.read(Gpa(0x3000), 6) == b"\x11\x11\x22\x22\x33\x33"


def test_string_output_to_nobody_never_comes_to_python(guest: TinyGuest) -> None:
    guest.load(b"\xf3\x6e" + HLT, regs={"rdx": PORT, "rcx": 5, "rsi": 0x3000})
    assert guest.run() == ExitKind.HLT
    assert guest.exits.counters()["pio_unclaimed"] == 5


def test_unclaimed_ports_answer_all_ones(guest: TinyGuest) -> None:
    guest.load(b"\x66\xed" + HLT, regs={"rdx": PORT})
    assert guest.run() == ExitKind.HLT
    assert guest.vcpu.get_regs().rax == 0xFFFF_FFFF


def test_unclaimed_memory_answers_all_ones_and_drops_writes(guest: TinyGuest) -> None:
    guest.load(b"\x66\xa3\x00\x00\x66\xa1\x00\x00" + HLT, ds_base=MMIO, regs={"rax": 5})
    assert guest.run() == ExitKind.HLT
    assert guest.vcpu.get_regs().rax == 0xFFFF_FFFF
    assert guest.exits.counters()["mmio_unclaimed"] == 2


def test_a_range_claimed_while_the_vm_lives_takes_effect(guest: TinyGuest) -> None:
    guest.load(b"\xee\xee\xee" + HLT, regs={"rdx": PORT})
    guest.exits.claim_pio(PORT, 1)
    assert guest.run() == ExitKind.PIO_WRITE
    guest.exits.unclaim_pio(PORT, 1)
    assert guest.run() == ExitKind.HLT


def test_a_claimed_range_is_never_missed_while_others_come_and_go(guest: TinyGuest) -> None:
    reads = 3000
    guest.exits.claim_mmio(MMIO, 0x1000)
    # again: mov al, [0]; dec cx; jnz again
    guest.load(b"\xa0\x00\x00\x49\x75\xfa" + HLT, ds_base=MMIO, regs={"rcx": reads})
    is_done = threading.Event()

    def come_and_go() -> None:
        while not is_done.is_set():
            guest.exits.claim_mmio(MMIO - 0x1000, 0x1000)
            guest.exits.claim_mmio(MMIO + 0x1000, 0x1000)
            guest.exits.unclaim_mmio(MMIO - 0x1000, 0x1000)
            guest.exits.unclaim_mmio(MMIO + 0x1000, 0x1000)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    seen = guest.accesses({MMIO: 0})
    is_done.set()
    thread.join()
    assert len(seen) == reads


def test_counters_outlive_their_vcpu(guest: TinyGuest) -> None:
    guest.load(b"\xee" + HLT, regs={"rdx": PORT})
    guest.run()
    guest.vm.close()
    counters = guest.exits.counters()
    assert (counters["pio_unclaimed"], counters["hlt"]) == (1, 1)


def test_a_triple_fault_is_a_shutdown(guest: TinyGuest) -> None:
    guest.memory.write(Gpa(CODE), b"\x0f\x0b")  # ud2
    sregs = guest.vcpu.get_sregs()
    regs = pvh_boot(sregs, CODE, 0)
    sregs.idt = DescriptorTable(0, 0)
    guest.vcpu.set_sregs(sregs)
    guest.vcpu.set_regs(regs)
    assert guest.run() == ExitKind.SHUTDOWN


def test_an_instruction_that_kvm_cannot_emulate_is_reported_with_its_bytes(
    guest: TinyGuest,
) -> None:
    fldenv = b"\xd9\x26\x00\x00"  # fldenv [0], which KVM's emulator lacks, on what is not memory
    guest.load(fldenv + HLT, ds_base=MMIO)
    assert guest.run() == ExitKind.INTERNAL_ERROR
    assert guest.vcpu.exit.suberror == 1  # KVM_INTERNAL_ERROR_EMULATION
    assert guest.vcpu.instruction_bytes().startswith(fldenv)
    assert guest.vcpu.get_regs().rip == CODE


def test_running_off_into_nothing_is_an_internal_error_without_bytes(guest: TinyGuest) -> None:
    guest.memory.write(Gpa(CODE), b"\xb8\x00\x00\x00\xd0\xff\xe0")  # mov eax, MMIO; jmp eax
    sregs = guest.vcpu.get_sregs()
    regs = pvh_boot(sregs, CODE, 0)
    guest.vcpu.set_sregs(sregs)
    guest.vcpu.set_regs(regs)
    assert guest.run() == ExitKind.INTERNAL_ERROR
    assert guest.vcpu.instruction_bytes() == b""


@pytest.mark.parametrize("width", [1, 2, 4])
def test_many_reads_in_a_row_keep_their_answers_apart(guest: TinyGuest, width: int) -> None:
    guest.exits.claim_mmio(MMIO, 0x1000)
    code = {1: b"\xa4", 2: b"\xa5", 4: b"\x66\xa5"}[width]  # movs from DS:SI (MMIO) to ES:DI (RAM)
    guest.load(b"\xf3" + code + HLT, ds_base=MMIO, regs={"rcx": 4, "rsi": 0, "rdi": 0x3000})
    answers = [0x0101_0101 * n for n in range(1, 5)]
    for answer in answers:
        assert guest.run() == ExitKind.MMIO_READ
        guest.vcpu.exit.value = answer
    assert guest.run() == ExitKind.HLT
    expected = b"".join(answer.to_bytes(4, "little")[:width] for answer in answers)
    assert guest.memory.read(Gpa(0x3000), 4 * width) == expected
