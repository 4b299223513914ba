# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

from collections.abc import Callable

import pytest

from kvm_ffi._kvm import lib
from kvm_ffi.errors import CapabilityMissing, KvmError
from kvm_ffi.system import Kvm
from kvm_ffi.vcpu import Vcpu
from kvm_ffi.vm import ClockState
from kvm_ffi.x86_64 import boot_msrs, vcpu_cpuid
from kvm_ffi.x86_state import Regs
from tests.support.tiny_guest import CODE, HLT, TinyGuest

MSR_KERNEL_GS_BASE = 0xC000_0102


def test_general_registers_round_trip(guest: TinyGuest) -> None:
    names = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "rip")
    regs = Regs(**{name: 0x1000 + i for i, name in enumerate(names)})
    for n in range(8, 16):
        setattr(regs, f"r{n}", n << 40)
    guest.vcpu.set_regs(regs)
    assert guest.vcpu.get_regs() == regs


def test_special_registers_round_trip(guest: TinyGuest) -> None:
    sregs = guest.vcpu.get_sregs()
    sregs.ds.base = 0x1234_0000
    sregs.gdt.base, sregs.gdt.limit = 0x500, 0x1F
    sregs.cr2 = 0xDEAD_B000
    guest.vcpu.set_sregs(sregs)
    assert guest.vcpu.get_sregs() == sregs


@pytest.mark.parametrize("name", [
    "fpu", "lapic", "vcpu_events", "debug_regs", "xcrs", "xsave", "mp_state",
])  # fmt: skip
def test_saved_state_can_be_restored(irq_guest: TinyGuest, name: str) -> None:
    get: Callable[[], object] = getattr(irq_guest.vcpu, f"get_{name}")
    restore: Callable[[object], None] = getattr(irq_guest.vcpu, f"set_{name}")
    saved = get()
    restore(saved)
    assert get() == saved


@pytest.mark.parametrize("name", ["fpu", "lapic", "xsave"])
def test_state_of_the_wrong_length_is_refused(irq_guest: TinyGuest, name: str) -> None:
    restore: Callable[[bytes], None] = getattr(irq_guest.vcpu, f"set_{name}")
    with pytest.raises(ValueError, match="bytes, must be"):
        restore(b"\0" * 16)


@pytest.mark.parametrize("chip", [
    lib.KVM_IRQCHIP_PIC_MASTER, lib.KVM_IRQCHIP_PIC_SLAVE, lib.KVM_IRQCHIP_IOAPIC,
])  # fmt: skip
def test_interrupt_controllers_round_trip(irq_guest: TinyGuest, chip: int) -> None:
    saved = irq_guest.vm.get_irqchip(chip)
    irq_guest.vm.set_irqchip(saved)
    assert irq_guest.vm.get_irqchip(chip) == saved


def test_the_pit_round_trips(irq_guest: TinyGuest) -> None:
    irq_guest.vm.create_pit()
    saved = irq_guest.vm.get_pit()
    irq_guest.vm.set_pit(saved)
    assert len(irq_guest.vm.get_pit()) == len(saved)


def test_the_clock_goes_on_from_where_it_is_set(guest: TinyGuest) -> None:
    day_ns = 86_400 * 10**9
    guest.vm.set_clock(ClockState(day_ns))
    assert day_ns <= guest.vm.get_clock().clock_ns < 2 * day_ns


def test_msrs_round_trip(guest: TinyGuest) -> None:
    guest.vcpu.set_msrs({MSR_KERNEL_GS_BASE: 0x1234_5000})
    assert guest.vcpu.get_msrs([MSR_KERNEL_GS_BASE]) == {MSR_KERNEL_GS_BASE: 0x1234_5000}


def test_kvm_takes_the_boot_msrs(guest: TinyGuest) -> None:
    guest.vcpu.set_msrs(boot_msrs())
    assert guest.vcpu.get_msrs(boot_msrs()) == boot_msrs()


def test_an_unknown_msr_is_named(guest: TinyGuest) -> None:
    with pytest.raises(KvmError, match="msr=0x12345"):
        guest.vcpu.get_msrs([MSR_KERNEL_GS_BASE, 0x12345])
    with pytest.raises(KvmError, match="msr=0x12345"):
        guest.vcpu.set_msrs({0x12345: 1})


def test_every_listed_msr_that_is_readable_is_read(guest: TinyGuest, kvm: Kvm) -> None:
    listed = kvm.msr_index_list()
    values = guest.vcpu.get_msrs([0x12345, *listed], skip_unreadable=True)
    assert set(values) <= set(listed)
    assert MSR_KERNEL_GS_BASE in values


def test_kvm_takes_our_cpuid_and_gives_it_back(kvm: Kvm) -> None:
    with TinyGuest(kvm, has_irqchip=True) as guest:
        second = guest.vm.create_vcpu(1, guest.exits)
        wanted = vcpu_cpuid(kvm.supported_cpuid(), 1, 2, kvm.capabilities)
        second.set_cpuid(wanted)
        got = {(e.function, e.index): e for e in second.get_cpuid()}
    topology = [e for e in wanted if e.function == 0xB]
    assert [got[0xB, e.index] for e in topology] == topology
    assert got[1, 0].ebx >> 24 == 1


def test_a_guest_sees_the_hypervisor(guest: TinyGuest) -> None:
    guest.load(b"\x66\xb8\x00\x00\x00\x40\x0f\xa2" + HLT)  # mov eax, 0x40000000; cpuid
    guest.run()
    assert guest.vcpu.get_regs().rbx == int.from_bytes(b"KVMK", "little")


def test_an_address_translates_to_itself_without_paging(guest: TinyGuest) -> None:
    guest.load(HLT)
    assert guest.vcpu.translate(CODE) == CODE


def test_the_tsc_has_a_frequency(guest: TinyGuest) -> None:
    assert guest.vcpu.get_tsc_khz() > 100_000


def test_kvmclock_ctrl_of_a_guest_without_kvmclock_is_refused(guest: TinyGuest) -> None:
    with pytest.raises(KvmError, match="KVM_KVMCLOCK_CTRL"):
        guest.vcpu.kvmclock_ctrl()


def test_the_host_has_what_a_machine_needs(kvm: Kvm) -> None:
    kvm.capabilities.require(
        "KVM_CAP_IRQCHIP", "KVM_CAP_IRQFD", "KVM_CAP_IOEVENTFD", "KVM_CAP_IMMEDIATE_EXIT"
    )
    assert kvm.capabilities.max_vcpus >= 16
    assert kvm.capabilities.max_gsi_routes >= 1024


def test_a_capability_that_no_x86_host_has_is_missing(guest: TinyGuest) -> None:
    with pytest.raises(CapabilityMissing, match="KVM_CAP_S390_UCONTROL"):
        guest.vm.enable_cap("KVM_CAP_S390_UCONTROL")


def test_create_vm_on_a_closed_descriptor_names_the_ioctl() -> None:
    system = Kvm.open()
    system.close()
    with pytest.raises(KvmError, match="KVM_CREATE_VM: Bad file descriptor"):
        system.create_vm()


def test_a_vm_outlives_the_system_descriptor() -> None:
    system = Kvm.open()
    vm = system.create_vm()
    system.close()
    vm.create_vcpu(0)
    vm.close()


def test_what_is_not_kvm_is_refused() -> None:
    with pytest.raises(KvmError, match="KVM_GET_API_VERSION"):
        Kvm.open("/dev/null")


def test_a_vcpu_index_cannot_be_used_twice(guest: TinyGuest) -> None:
    with pytest.raises(KvmError, match="KVM_CREATE_VCPU: File exists"):
        guest.vm.create_vcpu(0)


def test_closing_twice_does_nothing(guest: TinyGuest) -> None:
    vcpu: Vcpu = guest.vcpu
    vcpu.close()
    vcpu.close()
    guest.vm.close()
    guest.vm.close()
