# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What a vCPU is before its first instruction: CPUID, MSRs, and the registers of each way to boot.

Sources: Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E; Linux
Documentation/arch/x86/boot.rst; Xen docs/misc/pvh.pandoc; Linux
Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from ._kvm import lib
from .x86_state import CpuidEntry, DescriptorTable, Regs, Segment, Sregs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .capabilities import Capabilities
    from .types import Gpa

MSR_IA32_MISC_ENABLE: Final = 0x1A0
MSR_MTRR_DEF_TYPE: Final = 0x2FF

_MISC_ENABLE_FAST_STRINGS: Final = 1 << 0
_MTRR_ENABLED_WRITE_BACK: Final = 0x806  # MTRRs on; memory that no range names is write-back

_CR0_PE: Final = 1 << 0
_CR0_ET: Final = 1 << 4
_CR0_PG: Final = 1 << 31
_CR4_PAE: Final = 1 << 5
_EFER_LME: Final = 1 << 8
_EFER_LMA: Final = 1 << 10

# CPUID leaves that say how CPUs are arranged.
_LEAF_FEATURES: Final = 0x1
_LEAF_CACHES: Final = 0x4
_LEAF_TOPOLOGY: Final = 0xB
_LEAF_TOPOLOGY_V2: Final = 0x1F
_LEAF_AMD_FEATURES: Final = 0x8000_0001
_LEAF_AMD_SIZES: Final = 0x8000_0008
_LEAF_AMD_CACHES: Final = 0x8000_001D
_LEAF_AMD_TOPOLOGY: Final = 0x8000_001E
_LEAF_AMD_ENCRYPTION: Final = 0x8000_001F
_LEAF_AMD_TOPOLOGY_V2: Final = 0x8000_0026

_ECX_TSC_DEADLINE: Final = 1 << 24
_ECX_HYPERVISOR: Final = 1 << 31
_EDX_HTT: Final = 1 << 28
_AMD_ECX_CMP_LEGACY: Final = 1 << 1
_LEVEL_SMT: Final = 1
_LEVEL_CORE: Final = 2


@dataclass(frozen=True, slots=True)
class _Place:
    """One vCPU among others: one socket of cores without SMT, APIC ids from 0."""

    index: int
    count: int
    is_amd: bool
    has_tsc_deadline: bool

    @property
    def id_bits(self) -> int:
        """The width of a core id within the socket."""
        return (self.count - 1).bit_length()

    @property
    def last_id(self) -> int:
        """The highest core id that fits that width."""
        return (1 << self.id_bits) - 1


def vcpu_cpuid(
    supported: Sequence[CpuidEntry],
    vcpu_index: int,
    vcpu_count: int,
    capabilities: Capabilities,
) -> list[CpuidEntry]:
    """CPUID for one vCPU: all that host and KVM offer, with the topology of this VM.

    The host's brand string, its cache sizes and KVM's paravirtual leaves at 0x40000000 stay as
    they are. Asynchronous page faults stay offered too: with the in-kernel local APIC they need
    nothing from user space.

    Args:
        supported: Kvm.supported_cpuid().
        vcpu_index: from 0; the APIC id.
        vcpu_count: of the VM; 1 and up.
        capabilities: of the host.
    """
    max_leaf = next((e.eax for e in supported if e.function == 0), 0)
    place = _Place(
        index=vcpu_index,
        count=vcpu_count,
        is_amd=_is_amd(supported),
        has_tsc_deadline=capabilities.has("KVM_CAP_TSC_DEADLINE_TIMER"),
    )
    entries = [
        _PATCHES[entry.function](entry, place) if entry.function in _PATCHES else entry
        for entry in supported
        if entry.function not in _REPLACED
    ]
    for leaf in (_LEAF_TOPOLOGY, _LEAF_TOPOLOGY_V2):
        if leaf <= max_leaf:
            entries += _topology_leaf(leaf, place)
    return entries


def _is_amd(supported: Sequence[CpuidEntry]) -> bool:
    """Whether the leaves above 0x80000007 are AMD's, which Hygon has too."""
    vendors = (b"AuthenticAMD", b"HygonGenuine")
    return any(
        struct.pack("<3I", e.ebx, e.edx, e.ecx) in vendors for e in supported if e.function == 0
    )


def _features(entry: CpuidEntry, place: _Place) -> CpuidEntry:
    """Leaf 1: APIC id, CPUs per package, hypervisor bit, TSC deadline timer.

    KVM leaves the timer's bit to us, since it is there only with an in-kernel local APIC. The bits
    for MONITOR/MWAIT stay as KVM offers them: clear, unless the host lets guests idle by MWAIT.
    """
    ecx = entry.ecx | _ECX_HYPERVISOR
    if place.has_tsc_deadline:
        ecx |= _ECX_TSC_DEADLINE
    edx = entry.edx | _EDX_HTT if place.count > 1 else entry.edx & ~_EDX_HTT
    # Both fields are 8 bits wide; a larger machine is described by leaf 0xb alone.
    cpus = min(place.count, 0xFF)
    ebx = (entry.ebx & 0xFFFF) | cpus << 16 | (place.index & 0xFF) << 24
    return replace(entry, ebx=ebx, ecx=ecx, edx=edx)


def _caches(entry: CpuidEntry, place: _Place) -> CpuidEntry:
    """Leaves 4 and 0x8000001d: who shares a cache. The host's answer would be about host CPUs."""
    cache_type, level = entry.eax & 0x1F, entry.eax >> 5 & 7
    if cache_type == 0:
        return entry
    sharing = place.last_id if level >= 3 else 0
    eax = (entry.eax & 0x3FFF) | min(sharing, 0xFFF) << 14
    if entry.function == _LEAF_CACHES:
        eax |= min(place.last_id, 0x3F) << 26
    return replace(entry, eax=eax)


def _amd_features(entry: CpuidEntry, place: _Place) -> CpuidEntry:
    """Leaf 0x80000001: CmpLegacy says that the CPUs which leaf 1 counts are cores, not threads."""
    if not place.is_amd:
        return entry
    ecx = entry.ecx & ~_AMD_ECX_CMP_LEGACY
    return replace(entry, ecx=ecx | _AMD_ECX_CMP_LEGACY if place.count > 1 else ecx)


def _amd_sizes(entry: CpuidEntry, place: _Place) -> CpuidEntry:
    """Leaf 0x80000008: cores per package (Intel has no such field)."""
    if not place.is_amd:
        return entry
    ecx = (entry.ecx & ~0xF0FF) | min(place.count - 1, 0xFF) | min(place.id_bits, 0xF) << 12
    return replace(entry, ecx=ecx)


def _amd_topology(entry: CpuidEntry, place: _Place) -> CpuidEntry:
    """Leaf 0x8000001e: APIC id, core id, one thread per core, one node."""
    if not place.is_amd:
        return entry
    return replace(entry, eax=place.index, ebx=place.index & 0xFF, ecx=0, edx=0)


def _amd_encryption(entry: CpuidEntry, place: _Place) -> CpuidEntry:
    """Leaf 0x8000001f: cleared, because an encrypted guest needs a launch that we do not do."""
    del place
    return replace(entry, eax=0, ebx=0, ecx=0, edx=0)


def _topology_leaf(leaf: int, place: _Place) -> list[CpuidEntry]:
    """Leaves 0xb and 0x1f: one thread, all cores, the end; edx is the x2APIC id."""

    def level(index: int, id_bits: int, cpus: int, level_type: int) -> CpuidEntry:
        flags = lib.KVM_CPUID_FLAG_SIGNIFCANT_INDEX
        ecx = level_type << 8 | index
        return CpuidEntry(leaf, index, flags, id_bits, cpus, ecx, place.index)

    return [
        level(0, 0, 1, _LEVEL_SMT),
        level(1, place.id_bits, place.count, _LEVEL_CORE),
        level(2, 0, 0, 0),
    ]


# Made anew by _topology_leaf(), or left out: Linux looks at 0x80000026 before 0xb.
_REPLACED: Final = frozenset({_LEAF_TOPOLOGY, _LEAF_TOPOLOGY_V2, _LEAF_AMD_TOPOLOGY_V2})
_PATCHES: Final[dict[int, Callable[[CpuidEntry, _Place], CpuidEntry]]] = {
    _LEAF_FEATURES: _features,
    _LEAF_CACHES: _caches,
    _LEAF_AMD_FEATURES: _amd_features,
    _LEAF_AMD_SIZES: _amd_sizes,
    _LEAF_AMD_CACHES: _caches,
    _LEAF_AMD_TOPOLOGY: _amd_topology,
    _LEAF_AMD_ENCRYPTION: _amd_encryption,
}


def boot_msrs() -> dict[int, int]:
    """What firmware would leave in each vCPU's MSRs; all others start as KVM makes them."""
    return {
        MSR_IA32_MISC_ENABLE: _MISC_ENABLE_FAST_STRINGS,
        MSR_MTRR_DEF_TYPE: _MTRR_ENABLED_WRITE_BACK,
    }


# The 64-bit boot protocol wants __BOOT_CS = 0x10 and __BOOT_DS = 0x18; boot.rst, "64-bit Boot
# Protocol".
_BOOT_CS: Final = 0x10
_BOOT_DS: Final = 0x18
_DESCRIPTOR_CODE64: Final = 0x00AF_9B00_0000_FFFF
_DESCRIPTOR_DATA: Final = 0x00CF_9300_0000_FFFF
LINUX64_GDT: Final = struct.pack("<4Q", 0, 0, _DESCRIPTOR_CODE64, _DESCRIPTOR_DATA)
"""The table that a caller of linux64_boot() writes to ``gdt_gpa``."""


def _flat(selector: int, segment_type: int, *, l: int = 0, db: int = 1) -> Segment:  # noqa: E741
    """A present ring-0 code or data segment over all of the address space."""
    return Segment(
        limit=0xFFFF_FFFF, selector=selector, type=segment_type, present=1, s=1, g=1, l=l, db=db
    )


def _task_segment() -> Segment:
    """A busy TSS: VT-x refuses to enter protected mode without one."""
    return Segment(limit=0x67, type=0xB, present=1)


def _set_data_segments(sregs: Sregs, segment: Segment) -> None:
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, replace(segment))


def real_mode_boot(sregs: Sregs, entry_gpa: Gpa | int) -> Regs:
    """Start in real mode with every segment at 0: guests of a few bytes.

    Args:
        sregs: from Vcpu.get_sregs(); changed in place.
        entry_gpa: of the first instruction, below 64 KiB.

    Returns:
        The general registers, for the caller to fill in further.
    """
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment: Segment = getattr(sregs, name)
        segment.base = 0
        segment.selector = 0
    return Regs(rip=entry_gpa)


def pvh_boot(sregs: Sregs, entry_gpa: Gpa | int, start_info_gpa: Gpa | int) -> Regs:
    """Start at the entry of a PVH ELF note: 32-bit, flat, no paging.

    Args:
        sregs: from Vcpu.get_sregs(); changed in place.
        entry_gpa: XEN_ELFNOTE_PHYS32_ENTRY.
        start_info_gpa: of struct hvm_start_info.

    Returns:
        The general registers.
    """
    sregs.cs = _flat(0x8, 0xB)
    _set_data_segments(sregs, _flat(0x10, 0x3))
    sregs.tr = _task_segment()
    sregs.cr0 = _CR0_PE | _CR0_ET
    sregs.cr4 = 0
    sregs.efer = 0
    return Regs(rip=entry_gpa, rbx=start_info_gpa)


def linux64_boot(
    sregs: Sregs,
    entry_gpa: Gpa | int,
    *,
    zero_page_gpa: Gpa | int,
    page_table_gpa: Gpa | int,
    gdt_gpa: Gpa | int,
) -> Regs:
    """Start by Linux' 64-bit boot protocol: long mode, identity-mapped.

    Args:
        sregs: from Vcpu.get_sregs(); changed in place.
        entry_gpa: of startup_64; 0x200 past the start of a bzImage's protected-mode part.
        zero_page_gpa: of struct boot_params.
        page_table_gpa: of a PML4 that maps kernel, zero page, command line and GDT to themselves.
        gdt_gpa: where LINUX64_GDT has been written.

    Returns:
        The general registers.
    """
    sregs.cs = _flat(_BOOT_CS, 0xB, l=1, db=0)
    _set_data_segments(sregs, _flat(_BOOT_DS, 0x3))
    sregs.tr = _task_segment()
    sregs.gdt = DescriptorTable(gdt_gpa, len(LINUX64_GDT) - 1)
    sregs.idt = DescriptorTable(0, 0)
    # Not KVM's reset value, which has the caches off: some hosts would honour that.
    sregs.cr0 = _CR0_PE | _CR0_ET | _CR0_PG
    sregs.cr3 = page_table_gpa
    sregs.cr4 = _CR4_PAE
    sregs.efer = _EFER_LME | _EFER_LMA
    return Regs(rip=entry_gpa, rsi=zero_page_gpa)
