# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A guest that boot.load() placed and boot.enter() started finds what it was promised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from daemon.worker import boot, layout
from kvm_ffi.exits import EXIT_HLT, EXIT_PIO_WRITE, ExitTable
from kvm_ffi.memory import GuestMemory
from kvm_ffi.system import Kvm
from kvm_ffi.types import Gpa
from tests.support.tiny_kernel import LOAD_GPA, elf

PORT = 0x500
RAM_BYTES = 16 << 20
REPORT_EAX = b"\x66\xba\x00\x05\xef"  # mov dx, PORT; out dx, eax
HLT = b"\xf4"
LOAD_DS = b"\xb8\x18\x00\x00\x00\x8e\xd8"  # mov eax, __BOOT_DS; mov ds, eax
READ_HDR_MAGIC = b"\x8b\x86\x02\x02\x00\x00"  # mov eax, [rsi + 0x202]
READ_START_INFO_MAGIC = b"\x8b\x03"  # mov eax, [ebx]


def report(kvm: Kvm, tmp_path: Path, code: bytes, entry: str) -> int:
    """Boot ``code`` and return what it writes to PORT."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(elf(code, pvh=entry == "pvh"))
    exits = ExitTable()
    exits.claim_pio(PORT, 4)
    with kernel.open("rb") as file, GuestMemory([(Gpa(0), RAM_BYTES)]) as memory:
        vm = kvm.create_vm()
        vm.add_guest_memory(memory)
        vm.set_tss_address(Gpa(layout.TSS_GPA))
        vcpu = vm.create_vcpu(0, exits)
        vcpu.set_cpuid(kvm.supported_cpuid())
        state = boot.load(memory, boot.BootSource(file.fileno(), entry, "quiet"))
        boot.enter(vcpu, state)
        assert vcpu.run() == EXIT_PIO_WRITE, hex(vcpu.get_regs().rip)
        exit_: Any = vcpu.exit
        value: int = exit_.value
        assert vcpu.run() == EXIT_HLT
        assert vcpu.get_regs().rip > LOAD_GPA
        vcpu.close()
        vm.close()
    return value


def test_the_64_bit_entry_finds_its_gdt_page_tables_and_zero_page(kvm: Kvm, tmp_path: Path) -> None:
    code = LOAD_DS + READ_HDR_MAGIC + REPORT_EAX + HLT
    assert report(kvm, tmp_path, code, "linux64").to_bytes(4, "little") == b"HdrS"


def test_the_pvh_entry_finds_its_start_info(kvm: Kvm, tmp_path: Path) -> None:
    code = READ_START_INFO_MAGIC + REPORT_EAX + HLT
    assert report(kvm, tmp_path, code, "pvh") == 0x336EC578
