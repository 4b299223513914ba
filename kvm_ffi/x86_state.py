# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Registers of an x86-64 vCPU as Python values with the UAPI's names, to and from KVM's structs.

Source: Linux Documentation/virt/kvm/api.rst 4.11 KVM_GET_REGS, 4.13 KVM_GET_SREGS.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._kvm import CData


@dataclass(frozen=True, slots=True)
class CpuidEntry:
    """One CPUID leaf (struct kvm_cpuid_entry2); ``flags`` say whether ``index`` counts."""

    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


@dataclass(slots=True)
class Regs:
    """General registers (struct kvm_regs); a fresh one has rflags as after reset."""

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 2


@dataclass(slots=True)
class Segment:
    """One segment register with its hidden part (struct kvm_segment)."""

    base: int = 0
    limit: int = 0
    selector: int = 0
    type: int = 0
    present: int = 0
    dpl: int = 0
    db: int = 0
    s: int = 0
    l: int = 0  # noqa: E741 - the UAPI's name
    g: int = 0
    avl: int = 0
    unusable: int = 0


@dataclass(slots=True)
class DescriptorTable:
    """GDTR or IDTR (struct kvm_dtable)."""

    base: int = 0
    limit: int = 0


@dataclass(slots=True)
class Sregs:
    """Special registers (struct kvm_sregs).

    Change what Vcpu.get_sregs() returned instead of starting from zeros: it knows the APIC base.
    """

    cs: Segment = field(default_factory=Segment)
    ds: Segment = field(default_factory=Segment)
    es: Segment = field(default_factory=Segment)
    fs: Segment = field(default_factory=Segment)
    gs: Segment = field(default_factory=Segment)
    ss: Segment = field(default_factory=Segment)
    tr: Segment = field(default_factory=Segment)
    ldt: Segment = field(default_factory=Segment)
    gdt: DescriptorTable = field(default_factory=DescriptorTable)
    idt: DescriptorTable = field(default_factory=DescriptorTable)
    cr0: int = 0
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    cr8: int = 0
    efer: int = 0
    apic_base: int = 0
    interrupt_bitmap: tuple[int, ...] = (0, 0, 0, 0)


_CPUID = tuple(f.name for f in fields(CpuidEntry))
_REGS = tuple(f.name for f in fields(Regs))
_SEGMENT = tuple(f.name for f in fields(Segment))
_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_TABLES = ("gdt", "idt")
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")


def cpuid_from_c(entry: CData) -> CpuidEntry:
    """From a struct kvm_cpuid_entry2."""
    return CpuidEntry(
        entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx
    )


def cpuid_to_c(value: CpuidEntry, entry: CData) -> None:
    """Into a struct kvm_cpuid_entry2."""
    _copy(value, entry, _CPUID)


def regs_from_c(regs: CData) -> Regs:
    """From a struct kvm_regs."""
    return Regs(*(getattr(regs, name) for name in _REGS))


def regs_to_c(value: Regs, regs: CData) -> None:
    """Into a struct kvm_regs."""
    _copy(value, regs, _REGS)


def sregs_from_c(sregs: CData) -> Sregs:
    """From a struct kvm_sregs."""
    value = Sregs(interrupt_bitmap=tuple(sregs.interrupt_bitmap))
    _copy(sregs, value, _CONTROL)
    for name in _SEGMENTS:
        _copy(getattr(sregs, name), getattr(value, name), _SEGMENT)
    for name in _TABLES:
        _copy(getattr(sregs, name), getattr(value, name), ("base", "limit"))
    return value


def sregs_to_c(value: Sregs, sregs: CData) -> None:
    """Into a struct kvm_sregs."""
    sregs.interrupt_bitmap = value.interrupt_bitmap
    _copy(value, sregs, _CONTROL)
    for name in _SEGMENTS:
        _copy(getattr(value, name), getattr(sregs, name), _SEGMENT)
    for name in _TABLES:
        _copy(getattr(value, name), getattr(sregs, name), ("base", "limit"))


# Any: one side is a dataclass, the other a C struct with the same names.
def _copy(source: Any, target: Any, names: tuple[str, ...]) -> None:  # noqa: ANN401
    for name in names:
        setattr(target, name, getattr(source, name))
