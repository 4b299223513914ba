# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The bytes that a kernel finds in RAM when it is entered: page tables, zero page, start_info.

Source: Linux Documentation/arch/x86/boot.rst and zero-page.rst, <asm/bootparam.h>;
xen/include/public/arch-x86/hvm/start_info.h; Intel SDM volume 3, 4.5.
"""

from __future__ import annotations

import struct
from typing import Final

from daemon.images.setup_header import (
    BOOT_FLAG,
    HDR_BOOT_FLAG,
    HDR_CMD_LINE_PTR,
    HDR_CMDLINE_SIZE,
    HDR_INITRD_ADDR_MAX,
    HDR_KERNEL_ALIGNMENT,
    HDR_LOADFLAGS,
    HDR_MAGIC,
    HDR_RAMDISK_IMAGE,
    HDR_RAMDISK_SIZE,
    HDR_START,
    HDR_TYPE_OF_LOADER,
    HDR_VERSION,
    LOADED_HIGH,
    MAGIC,
)
from daemon.worker.layout import (
    ACPI_GPA,
    ACPI_LIMIT,
    CMDLINE_GPA,
    CMDLINE_MAX_BYTES,
    EBDA_START,
    ECAM_BYTES,
    ECAM_GPA,
    GIB,
    KERNEL_MIN_GPA,
    MIB,
    PAGE_BYTES,
    PAGE_TABLES_GPA,
    PVH_START_INFO_GPA,
    ram_regions,
)

_PRESENT_WRITABLE: Final = 0x3
_LARGE_PAGE: Final = 0x80
_LARGE_PAGE_BYTES: Final = 2 * MIB


def _identity_page_tables() -> bytes:
    # 4 GiB, so that all low RAM is covered, and with it whatever a kernel finds through its boot
    # parameters before it has tables of its own. 2 MiB pages, because a vCPU without the pdpe1gb
    # CPUID bit would fault on 1 GiB ones. Built once, in the zygote: each worker copies 24 KiB.
    gpa = PAGE_TABLES_GPA
    directories = [gpa + (2 + index) * PAGE_BYTES for index in range(4)]
    level4 = struct.pack("<Q", (gpa + PAGE_BYTES) | _PRESENT_WRITABLE)
    level3 = struct.pack("<4Q", *(directory | _PRESENT_WRITABLE for directory in directories))
    level2 = struct.pack(
        "<2048Q",
        *(
            address | _PRESENT_WRITABLE | _LARGE_PAGE
            for address in range(0, 4 * GIB, _LARGE_PAGE_BYTES)
        ),
    )
    return level4.ljust(PAGE_BYTES, b"\x00") + level3.ljust(PAGE_BYTES, b"\x00") + level2


PAGE_TABLES: Final = _identity_page_tables()

# struct boot_params, by offset.
_ACPI_RSDP_ADDR: Final = 0x070
_EXT_RAMDISK_IMAGE: Final = 0x0C0
_EXT_RAMDISK_SIZE: Final = 0x0C4
_EXT_CMD_LINE_PTR: Final = 0x0C8
_E820_ENTRIES: Final = 0x1E8
_E820_TABLE: Final = 0x2D0
_E820_ENTRY: Final = struct.Struct("<QQI")
_LOADER_UNDEFINED: Final = 0xFF  # boot.rst, type_of_loader: a loader without an assigned number

_E820_RAM: Final = 1
_E820_RESERVED: Final = 2

_START_INFO: Final = struct.Struct("<IIIIQQQQII")
_START_INFO_MAGIC: Final = 0x336E_C578
_START_INFO_VERSION: Final = 1
_MODLIST_ENTRY: Final = struct.Struct("<QQQQ")
_MEMMAP_ENTRY: Final = struct.Struct("<QQII")
_MODLIST_GPA: Final = PVH_START_INFO_GPA + 64
_MEMMAP_GPA: Final = _MODLIST_GPA + 64

# What Linux's header.S says, for kernels that come as ELF and so without a header.
DEFAULT_INITRD_ADDR_MAX: Final = 0x7FFF_FFFF
_DEFAULT_VERSION: Final = 0x020F
_DEFAULT_ALIGNMENT: Final = 2 * MIB


def memory_map(memory_bytes: int) -> tuple[tuple[int, int, int], ...]:
    """Return (gpa, size in bytes, e820 type) of all that a guest must know of, in order.

    The ECAM is in it because Linux uses an MCFG only for what firmware reserved.
    """
    low, *high = ram_regions(memory_bytes)
    return (
        (0, EBDA_START, _E820_RAM),
        (EBDA_START, 0xA_0000 - EBDA_START, _E820_RESERVED),
        (ACPI_GPA, ACPI_LIMIT - ACPI_GPA, _E820_RESERVED),
        (KERNEL_MIN_GPA, low.size_bytes - KERNEL_MIN_GPA, _E820_RAM),
        (ECAM_GPA, ECAM_BYTES, _E820_RESERVED),
        *((region.gpa, region.size_bytes, _E820_RAM) for region in high),
    )


def zero_page(
    memory_bytes: int, initrd: tuple[int, int], setup_header: bytes, rsdp_gpa: int
) -> bytes:
    """Build Linux's struct boot_params.

    Args:
        memory_bytes: RAM of the VM.
        initrd: its address and size in bytes; (0, 0) without one.
        setup_header: kept as it is where a loader has nothing to say; empty for a plain ELF kernel.
        rsdp_gpa: where the RSDP is.
    """
    page = bytearray(PAGE_BYTES)
    header = setup_header or _default_header()
    page[HDR_START : HDR_START + len(header)] = header
    page[HDR_TYPE_OF_LOADER] = _LOADER_UNDEFINED
    page[HDR_LOADFLAGS] |= LOADED_HIGH
    initrd_gpa, initrd_bytes = initrd
    for low_at, high_at, value in (
        (HDR_RAMDISK_IMAGE, _EXT_RAMDISK_IMAGE, initrd_gpa),
        (HDR_RAMDISK_SIZE, _EXT_RAMDISK_SIZE, initrd_bytes),
        (HDR_CMD_LINE_PTR, _EXT_CMD_LINE_PTR, CMDLINE_GPA),
    ):
        struct.pack_into("<I", page, low_at, value & 0xFFFF_FFFF)
        struct.pack_into("<I", page, high_at, value >> 32)
    struct.pack_into("<Q", page, _ACPI_RSDP_ADDR, rsdp_gpa)
    entries = memory_map(memory_bytes)
    page[_E820_ENTRIES] = len(entries)
    for index, entry in enumerate(entries):
        _E820_ENTRY.pack_into(page, _E820_TABLE + index * _E820_ENTRY.size, *entry)
    return bytes(page)


def start_info(memory_bytes: int, initrd: tuple[int, int], rsdp_gpa: int) -> bytes:
    """Build PVH's struct hvm_start_info with its module list and memory map behind it.

    Args:
        memory_bytes: RAM of the VM.
        initrd: its address and size in bytes; (0, 0) without one.
        rsdp_gpa: where the RSDP is.
    """
    entries = memory_map(memory_bytes)
    initrd_gpa, initrd_bytes = initrd
    has_module = initrd_bytes > 0
    info = _START_INFO.pack(
        _START_INFO_MAGIC,
        _START_INFO_VERSION,
        0,
        int(has_module),
        _MODLIST_GPA if has_module else 0,
        CMDLINE_GPA,
        rsdp_gpa,
        _MEMMAP_GPA,
        len(entries),
        0,
    )
    modules = _MODLIST_ENTRY.pack(initrd_gpa, initrd_bytes, 0, 0)
    memmap = b"".join(_MEMMAP_ENTRY.pack(gpa, size, kind, 0) for gpa, size, kind in entries)
    return (
        info.ljust(_MODLIST_GPA - PVH_START_INFO_GPA, b"\x00")
        + modules.ljust(_MEMMAP_GPA - _MODLIST_GPA, b"\x00")
        + memmap
    )


def _default_header() -> bytes:
    header = bytearray(HDR_CMDLINE_SIZE + 4 - HDR_START)
    for offset, form, value in (
        (HDR_BOOT_FLAG, "<H", BOOT_FLAG),
        (HDR_VERSION, "<H", _DEFAULT_VERSION),
        (HDR_INITRD_ADDR_MAX, "<I", DEFAULT_INITRD_ADDR_MAX),
        (HDR_KERNEL_ALIGNMENT, "<I", _DEFAULT_ALIGNMENT),
        (HDR_CMDLINE_SIZE, "<I", CMDLINE_MAX_BYTES - 1),
    ):
        struct.pack_into(form, header, offset - HDR_START, value)
    header[HDR_MAGIC - HDR_START : HDR_MAGIC - HDR_START + 4] = MAGIC
    return bytes(header)
