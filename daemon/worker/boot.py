# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Put a kernel, its initrd, its command line and its boot parameters into guest RAM.

Two ways in. linux64: the 64-bit entry of Linux, with a zero page, a GDT and identity page tables.
pvh: the 32-bit entry of the Xen PVH note, with a start_info and no paging. Either is entered with
what load() returns, by enter().

check_fit() holds every rule that depends on sizes alone, so hosteld can refuse a VM before it has a
worker; load() goes by the same function.

Source: Linux Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"; Xen docs/misc/pvh.pandoc.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

from daemon.images.elf import ElfKernel, Segment, parse_elf
from daemon.images.errors import FitError, KernelFormatError
from daemon.images.extents import data_extents
from daemon.images.setup_header import SetupHeader
from daemon.worker.boot_params import (
    DEFAULT_INITRD_ADDR_MAX,
    PAGE_TABLES,
    start_info,
    zero_page,
)
from daemon.worker.layout import (
    ACPI_GPA,
    CMDLINE_GPA,
    CMDLINE_MAX_BYTES,
    GDT_GPA,
    LOW_RAM_LIMIT,
    MIB,
    PAGE_BYTES,
    PAGE_TABLES_GPA,
    PVH_START_INFO_GPA,
    ZERO_PAGE_GPA,
)
from kvm_ffi.types import Gpa
from kvm_ffi.vcpu import Vcpu
from kvm_ffi.x86_64 import LINUX64_GDT, linux64_boot, pvh_boot


class BootMemory(Protocol):
    """What is needed of kvm_ffi.memory.GuestMemory."""

    size_bytes: int

    def write(self, gpa: Gpa, data: bytes) -> None:
        """Copy bytes into guest RAM."""
        ...

    def load_fd(self, gpa: Gpa, fd: int, file_offset: int, length: int) -> None:
        """Read part of a file into guest RAM."""
        ...


@dataclass(frozen=True, slots=True)
class BootSource:
    """What to boot.

    Attributes:
        kernel_fd: an ELF kernel, open for reading; its contents are client-controlled.
        entry: "linux64" or "pvh".
        cmdline: ASCII, without NUL.
        initrd_fd: open for reading, or None.
        setup_header: SetupHeader.raw of the bzImage that the kernel came from, or empty.
    """

    kernel_fd: int
    entry: str
    cmdline: str
    initrd_fd: int | None = None
    setup_header: bytes = b""


@dataclass(frozen=True, slots=True)
class BootState:
    """How the boot vCPU is to be entered.

    Attributes:
        entry: "linux64" or "pvh".
        entry_gpa: of the first instruction.
        boot_info_gpa: of the zero page (linux64) or the start_info (pvh).
    """

    entry: str
    entry_gpa: Gpa
    boot_info_gpa: Gpa


def check_fit(
    kernel: ElfKernel,
    *,
    initrd_bytes: int,
    memory_bytes: int,
    cmdline: str,
    setup_header: bytes = b"",
) -> int:
    """Check that a kernel, its initrd and its command line fit a VM.

    Args:
        kernel: as parse_elf returned it.
        initrd_bytes: 0 without one.
        memory_bytes: RAM of the VM.
        cmdline: ASCII, without NUL.
        setup_header: SetupHeader.raw, or empty.

    Returns:
        The address for the initrd: the end of low RAM, as boot loaders do, so that the kernel has
        the most room before it. 0 without an initrd.

    Raises:
        FitError: it does not; ``field`` is memory_mib, initrd or cmdline.
    """
    header = SetupHeader(setup_header) if setup_header else None
    _check_cmdline(cmdline, header)
    low_ram_end = min(memory_bytes, LOW_RAM_LIMIT)
    if kernel.end_gpa > low_ram_end:
        raise FitError(
            "memory_too_small",
            f"memory_mib={memory_bytes // MIB}: the kernel alone is loaded up to "
            f"{kernel.end_gpa:#x}, must be at least {_mib(kernel.end_gpa)}",
            field="memory_mib",
        )
    if not initrd_bytes:
        return 0
    addr_max = DEFAULT_INITRD_ADDR_MAX if header is None else header.initrd_addr_max
    ceiling = min(addr_max + 1, LOW_RAM_LIMIT)
    floor = -(-kernel.end_gpa // PAGE_BYTES) * PAGE_BYTES
    gpa = (min(ceiling, low_ram_end) - initrd_bytes) // PAGE_BYTES * PAGE_BYTES
    if gpa < floor:
        raise _initrd_too_large(initrd_bytes, memory_bytes, floor, ceiling)
    return gpa


def load(memory: BootMemory, source: BootSource, *, rsdp_gpa: int = ACPI_GPA) -> BootState:
    """Load all that a boot needs into guest RAM.

    Only what the kernel's file really holds is read: its holes stay RAM that no page backs.

    Args:
        memory: laid out as layout.ram_regions() says, and still all zeros.
        source: what to boot.
        rsdp_gpa: where the caller puts the ACPI tables.

    Raises:
        KernelFormatError: the kernel is none, or lacks that entry.
        FitError: it does not fit this VM.
        OSError: a file cannot be read, or ends early.
    """
    kernel = parse_elf(source.kernel_fd)
    entry_gpa = kernel.linux64_gpa if source.entry == "linux64" else kernel.pvh_gpa
    if entry_gpa is None:
        raise KernelFormatError(f"the kernel has no {source.entry} entry")
    initrd_bytes = 0 if source.initrd_fd is None else os.fstat(source.initrd_fd).st_size
    initrd_gpa = check_fit(
        kernel,
        initrd_bytes=initrd_bytes,
        memory_bytes=memory.size_bytes,
        cmdline=source.cmdline,
        setup_header=source.setup_header,
    )
    for segment in kernel.segments:
        _load_segment(memory, source.kernel_fd, segment)
    if source.initrd_fd is not None and initrd_bytes:
        memory.load_fd(Gpa(initrd_gpa), source.initrd_fd, 0, initrd_bytes)
    memory.write(Gpa(CMDLINE_GPA), source.cmdline.encode("ascii") + b"\x00")
    initrd = (initrd_gpa, initrd_bytes)
    if source.entry == "linux64":
        memory.write(Gpa(GDT_GPA), LINUX64_GDT)
        memory.write(Gpa(PAGE_TABLES_GPA), PAGE_TABLES)
        page = zero_page(memory.size_bytes, initrd, source.setup_header, rsdp_gpa)
        memory.write(Gpa(ZERO_PAGE_GPA), page)
        return BootState(source.entry, Gpa(entry_gpa), Gpa(ZERO_PAGE_GPA))
    info = start_info(memory.size_bytes, initrd, rsdp_gpa)
    memory.write(Gpa(PVH_START_INFO_GPA), info)
    return BootState(source.entry, Gpa(entry_gpa), Gpa(PVH_START_INFO_GPA))


def enter(vcpu: Vcpu, state: BootState) -> None:
    """Set the boot vCPU's registers so that its first instruction is the kernel's.

    Raises:
        KvmError: KVM refused them.
    """
    sregs = vcpu.get_sregs()
    if state.entry == "linux64":
        regs = linux64_boot(
            sregs,
            state.entry_gpa,
            zero_page_gpa=state.boot_info_gpa,
            page_table_gpa=PAGE_TABLES_GPA,
            gdt_gpa=GDT_GPA,
        )
    else:
        regs = pvh_boot(sregs, state.entry_gpa, state.boot_info_gpa)
    vcpu.set_sregs(sregs)
    vcpu.set_regs(regs)


def _load_segment(memory: BootMemory, fd: int, segment: Segment) -> None:
    start = segment.file_offset
    for data, end in data_extents(fd, start, start + segment.file_bytes):
        memory.load_fd(Gpa(segment.gpa + data - start), fd, data, end - data)


def _check_cmdline(cmdline: str, header: SetupHeader | None) -> None:
    limit = CMDLINE_MAX_BYTES - 1
    if header is not None:
        limit = min(limit, header.cmdline_max_bytes)
    if not cmdline.isascii() or "\x00" in cmdline:
        raise FitError("cmdline_not_ascii", "cmdline must be ASCII without NUL", field="cmdline")
    if len(cmdline) > limit:
        raise FitError(
            "cmdline_too_long",
            f"cmdline of {len(cmdline)} bytes: this kernel takes at most {limit}",
            field="cmdline",
        )


def _initrd_too_large(initrd_bytes: int, memory_bytes: int, floor: int, ceiling: int) -> FitError:
    needed = floor + -(-initrd_bytes // PAGE_BYTES) * PAGE_BYTES
    if needed > ceiling:
        rule = f"this kernel takes at most {max(ceiling - floor, 0)} bytes"
    else:
        rule = f"memory_mib={memory_bytes // MIB} must be at least {_mib(needed)}"
    return FitError(
        "initrd_too_large",
        f"initrd of {initrd_bytes} bytes does not fit above the kernel, which ends at {floor:#x}: "
        f"{rule}",
        field="initrd",
    )


def _mib(size_bytes: int) -> int:
    return -(-size_bytes // MIB)
