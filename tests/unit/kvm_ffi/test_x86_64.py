# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import struct

import pytest

from kvm_ffi.capabilities import Capabilities
from kvm_ffi.x86_64 import (
    LINUX64_GDT,
    boot_msrs,
    linux64_boot,
    pvh_boot,
    real_mode_boot,
    vcpu_cpuid,
)
from kvm_ffi.x86_state import CpuidEntry, Segment, Sregs

CAPABILITIES = Capabilities(12, {"KVM_CAP_TSC_DEADLINE_TIMER": 1})
INDEXED = 1


def entry(function: int, index: int = 0, **registers: int) -> CpuidEntry:
    values = {"eax": 0, "ebx": 0, "ecx": 0, "edx": 0} | registers
    return CpuidEntry(function, index, INDEXED if index else 0, **values)


def vendor(name: bytes, max_leaf: int) -> CpuidEntry:
    ebx, edx, ecx = struct.unpack("<3I", name)
    return entry(0, eax=max_leaf, ebx=ebx, ecx=ecx, edx=edx)


AMD = [
    vendor(b"AuthenticAMD", 0x10),
    entry(1, eax=0xA00F11, ebx=0x0502_0800, ecx=1 << 21, edx=0x078B_FBFF),
    entry(0xB, ecx=7, ebx=99),
    entry(0x4000_0000, eax=0x4000_0001, ebx=0x4B4D_564B),
    entry(0x4000_0001, eax=0x0100_7EFB),
    entry(0x8000_0001, ecx=0x3),
    entry(0x8000_0008, eax=0x3030, ecx=0x7001),
    entry(0x8000_001D, 0, eax=0x01FF_C121, ebx=0x01C0_003F),
    entry(0x8000_001D, 3, eax=0x01FF_C163),
    entry(0x8000_001E, eax=77, ebx=0x0133, ecx=2),
    entry(0x8000_001F, eax=0xF),
    entry(0x8000_0026, eax=1, ebx=4),
]
INTEL = [
    vendor(b"GenuineIntel", 0x1F),
    entry(1, eax=0x000C_06F2, ebx=0x0502_0800, ecx=1 << 21),
    entry(4, 0, eax=0xFC00_4121, ebx=0x02C0_003F),
    entry(4, 3, eax=0xFC1F_C163),
    entry(4, 4, eax=0),
    entry(0x1F, ebx=99),
    entry(0x8000_0001, ecx=0x1),
    entry(0x8000_0008, eax=0x3934),
]


def leaves(
    supported: list[CpuidEntry], index: int, count: int
) -> dict[tuple[int, int], CpuidEntry]:
    entries = vcpu_cpuid(supported, index, count, CAPABILITIES)
    by_leaf = {(e.function, e.index): e for e in entries}
    assert len(by_leaf) == len(entries)
    return by_leaf


@pytest.mark.parametrize("supported", [AMD, INTEL])
def test_each_vcpu_has_its_index_as_apic_id_everywhere(supported: list[CpuidEntry]) -> None:
    got = leaves(supported, 3, 6)
    assert got[1, 0].ebx >> 24 == 3
    assert [got[0xB, level].edx for level in range(3)] == [3, 3, 3]


def test_a_guest_is_told_that_it_is_one() -> None:
    ecx = leaves(AMD, 0, 1)[1, 0].ecx
    assert ecx & 1 << 31
    assert ecx & 1 << 24  # TSC deadline timer
    assert ecx & 1 << 21  # x2APIC, from the host


def test_the_deadline_timer_is_offered_only_where_kvm_has_it() -> None:
    entries = vcpu_cpuid(AMD, 0, 1, Capabilities(12, {}))
    assert not any(e.function == 1 and e.ecx & 1 << 24 for e in entries)


def test_kvms_own_leaves_stay_as_they_are() -> None:
    got = leaves(AMD, 0, 4)
    assert [got[0x4000_0000, 0], got[0x4000_0001, 0]] == AMD[3:5]


@pytest.mark.parametrize(("count", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (16, 4), (17, 5)])
def test_the_topology_leaf_counts_cores_in_one_package(count: int, bits: int) -> None:
    got = leaves(AMD, 0, count)
    thread, core, end = (got[0xB, level] for level in range(3))
    assert (thread.eax, thread.ebx, thread.ecx) == (0, 1, 0x100)
    assert (core.eax, core.ebx, core.ecx) == (bits, count, 0x201)
    assert (end.eax, end.ebx, end.ecx) == (0, 0, 2)


def test_the_newer_topology_leaf_exists_only_where_the_host_has_it() -> None:
    assert (0x1F, 1) in leaves(INTEL, 0, 4)
    assert (0x1F, 0) not in leaves(AMD, 0, 4)
    assert (0x8000_0026, 0) not in leaves(AMD, 0, 4)


def test_amd_leaves_agree_on_the_number_of_cores() -> None:
    got = leaves(AMD, 2, 6)
    assert got[0x8000_0008, 0].ecx == 0x3005
    assert got[0x8000_0001, 0].ecx & 2
    node = got[0x8000_001E, 0]
    assert (node.eax, node.ebx, node.ecx) == (2, 2, 0)


def test_a_single_vcpu_has_no_siblings() -> None:
    got = leaves(AMD, 0, 1)
    assert not got[1, 0].edx & 1 << 28
    assert got[1, 0].ebx >> 16 & 0xFF == 1
    assert not got[0x8000_0001, 0].ecx & 2


@pytest.mark.parametrize(("supported", "leaf"), [(AMD, 0x8000_001D), (INTEL, 4)])
def test_only_the_last_level_cache_is_shared(supported: list[CpuidEntry], leaf: int) -> None:
    got = leaves(supported, 0, 6)
    assert got[leaf, 0].eax >> 14 & 0xFFF == 0
    assert got[leaf, 3].eax >> 14 & 0xFFF == 7


def test_intel_caches_count_the_cores_of_the_package() -> None:
    got = leaves(INTEL, 0, 6)
    assert got[4, 0].eax >> 26 == 7
    assert got[4, 4].eax == 0


def test_intel_leaves_keep_what_amd_defines_otherwise() -> None:
    got = leaves(INTEL, 0, 4)
    assert got[0x8000_0008, 0] == entry(0x8000_0008, eax=0x3934)
    assert got[0x8000_0001, 0] == entry(0x8000_0001, ecx=0x1)


def test_memory_encryption_is_not_offered() -> None:
    assert leaves(AMD, 0, 1)[0x8000_001F, 0].eax == 0


def test_hundreds_of_vcpus_fit_the_narrow_fields() -> None:
    got = leaves(AMD, 299, 300)
    assert got[1, 0].ebx >> 16 & 0xFF == 0xFF
    assert got[0xB, 1].edx == 299


def test_boot_msrs_make_memory_write_back() -> None:
    assert boot_msrs()[0x2FF] == 0x806
    assert boot_msrs()[0x1A0] & 1


def test_long_mode_entry_is_flat_and_points_at_the_zero_page() -> None:
    sregs = Sregs(cr0=0x6000_0010, apic_base=0xFEE0_0900)
    regs = linux64_boot(
        sregs, 0x100_0200, zero_page_gpa=0x7000, page_table_gpa=0x9000, gdt_gpa=0x500
    )
    assert (regs.rip, regs.rsi, regs.rflags) == (0x100_0200, 0x7000, 2)
    assert (sregs.cs.selector, sregs.cs.l, sregs.cs.db) == (0x10, 1, 0)
    assert (sregs.ds.selector, sregs.ss.base, sregs.ss.limit) == (0x18, 0, 0xFFFF_FFFF)
    assert (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) == (0x8000_0011, 0x9000, 0x20, 0x500)
    assert (sregs.gdt.base, sregs.gdt.limit) == (0x500, len(LINUX64_GDT) - 1)
    assert sregs.apic_base == 0xFEE0_0900


def test_pvh_entry_is_protected_mode_without_paging() -> None:
    sregs = Sregs(cr0=0x6000_0010, efer=0x500, cr4=0x20)
    regs = pvh_boot(sregs, 0x100_0000, 0x6000)
    assert (regs.rip, regs.rbx) == (0x100_0000, 0x6000)
    assert (sregs.cr0, sregs.cr4, sregs.efer) == (0x11, 0, 0)
    assert (sregs.cs.db, sregs.cs.type, sregs.tr.type) == (1, 0xB, 0xB)


def test_real_mode_entry_has_every_segment_at_zero() -> None:
    sregs = Sregs(cs=Segment(base=0xFFFF_0000, selector=0xF000, limit=0xFFFF))
    assert real_mode_boot(sregs, 0x1000).rip == 0x1000
    assert (sregs.cs.base, sregs.cs.selector, sregs.cs.limit) == (0, 0, 0xFFFF)


def test_data_segments_are_not_one_shared_object() -> None:
    sregs = Sregs()
    pvh_boot(sregs, 0, 0)
    sregs.ds.base = 5
    assert sregs.es.base == 0
