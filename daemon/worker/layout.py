# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Every guest-physical address and GSI that the machine fixes.

The ports of the legacy devices are no choice of ours; each device's file has its own. RAM runs
from 0 to LOW_RAM_LIMIT and goes on at HIGH_RAM_START; what lies between is for devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

GIB: Final = 1 << 30
MIB: Final = 1 << 20
PAGE_BYTES: Final = 4096

# --- guest-physical memory
LOW_RAM_LIMIT: Final = 3 * GIB
HIGH_RAM_START: Final = 4 * GIB
PCI_MMIO32_START: Final = 0xC000_0000
PCI_MMIO32_BYTES: Final = 0x2000_0000
ECAM_GPA: Final = 0xE000_0000
ECAM_BYTES: Final = MIB  # one bus: 32 slots x 8 functions x 4 KiB
IOAPIC_GPA: Final = 0xFEC0_0000
LAPIC_GPA: Final = 0xFEE0_0000
# Three pages that KVM on VT-x needs somewhere outside RAM (api.rst 4.35 KVM_SET_TSS_ADDR), and one
# for its identity map (4.42).
TSS_GPA: Final = 0xFFFB_D000
IDENTITY_MAP_GPA: Final = 0xFFFB_C000
# A 64-bit window above RAM for BARs: aligned to its own size, which one level-4 entry covers.
PCI_MMIO64_BYTES: Final = 64 * GIB

# --- the first MiB
GDT_GPA: Final = 0x500
PVH_START_INFO_GPA: Final = 0x6000
ZERO_PAGE_GPA: Final = 0x7000
BOOT_STACK_GPA: Final = 0x8FF0
PAGE_TABLES_GPA: Final = 0x9000
CMDLINE_GPA: Final = 0x2_0000
CMDLINE_MAX_BYTES: Final = 2048  # COMMAND_LINE_SIZE of x86, the terminating NUL included
EBDA_START: Final = 0x9_FC00
ACPI_GPA: Final = 0xE_0000  # the RSDP, then the tables; guests scan 0xe0000..0xfffff for it
ACPI_LIMIT: Final = 0x10_0000
KERNEL_MIN_GPA: Final = MIB

# --- GSIs of the IOAPIC
I8042_GSI: Final = 1
COM1_GSI: Final = 4
GED_GSI: Final = 5


class RamRegion(NamedTuple):
    """One run of guest RAM."""

    gpa: int
    size_bytes: int


def ram_regions(memory_bytes: int) -> tuple[RamRegion, ...]:
    """Lay ``memory_bytes`` of RAM out around the 32-bit MMIO hole."""
    low = min(memory_bytes, LOW_RAM_LIMIT)
    high = memory_bytes - low
    regions = [RamRegion(0, low)]
    if high:
        regions.append(RamRegion(HIGH_RAM_START, high))
    return tuple(regions)


def pmem_gpas(memory_bytes: int, sizes: Sequence[int]) -> list[int]:
    """Return where persistent memory of such sizes goes: above RAM, each at a whole GiB."""
    gpas: list[int] = []
    end = _ram_end(memory_bytes)
    for size_bytes in sizes:
        gpas.append(_aligned(end, GIB))
        end = gpas[-1] + size_bytes
    return gpas


def pci_mmio64_start(memory_bytes: int, pmem_sizes: Sequence[int] = ()) -> int:
    """Return where the 64-bit BAR window starts: the first multiple of its size above memory."""
    gpas = pmem_gpas(memory_bytes, pmem_sizes)
    end = gpas[-1] + pmem_sizes[-1] if gpas else _ram_end(memory_bytes)
    return _aligned(end, PCI_MMIO64_BYTES)


def _ram_end(memory_bytes: int) -> int:
    last = ram_regions(memory_bytes)[-1]
    return max(last.gpa + last.size_bytes, HIGH_RAM_START)


def _aligned(gpa: int, size_bytes: int) -> int:
    return -(-gpa // size_bytes) * size_bytes
