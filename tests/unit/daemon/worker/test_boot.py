# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What a guest finds in its RAM when it is entered, and what is refused before that."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.images import setup_header
from daemon.images.bzimage import read_setup_header
from daemon.images.elf import ElfKernel, Segment
from daemon.images.errors import FitError, KernelFormatError
from daemon.worker import boot_params, layout
from daemon.worker.boot import BootSource, BootState, check_fit, enter, load
from kvm_ffi.memory import GuestMemory
from kvm_ffi.types import Gpa
from kvm_ffi.x86_64 import LINUX64_GDT
from kvm_ffi.x86_state import Regs, Sregs
from tests.support.kernels import (
    CODE,
    ENTRY,
    MIB,
    PACKERS,
    bzimage,
    elf,
    open_bytes,
    phdr,
    pvh_note,
)

RAM_BYTES = 64 * MIB
KERNEL = elf(notes=pvh_note(ENTRY + 16))
PLAIN = ElfKernel((Segment(ENTRY, 0, MIB, 2 * MIB),), ENTRY, None)
INITRD = b"070701" + os.urandom(9000)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory([(Gpa(0), RAM_BYTES)]) as made:
        yield made


@pytest.fixture
def kernel_fd() -> Iterator[int]:
    with open_bytes(KERNEL) as fd:
        yield fd


@pytest.fixture
def initrd_fd() -> Iterator[int]:
    with open_bytes(INITRD) as fd:
        yield fd


class FakeVcpu:
    """Takes registers as a Vcpu does."""

    def __init__(self) -> None:
        self.sregs = Sregs()
        self.regs = Regs()

    def get_sregs(self) -> Sregs:
        return self.sregs

    def set_sregs(self, sregs: Sregs) -> None:
        self.sregs = sregs

    def set_regs(self, regs: Regs) -> None:
        self.regs = regs


def raw_header() -> bytes:
    with open_bytes(bzimage(PACKERS["gzip"](KERNEL))) as fd:
        header = read_setup_header(fd)
    assert header is not None
    return header.raw


def boot_it(memory: GuestMemory, kernel_fd: int, entry: str, **more: object) -> BootState:
    return load(memory, BootSource(kernel_fd, entry, "console=ttyS0", **more))  # type: ignore[arg-type]


def u32(memory: GuestMemory, gpa: int) -> int:
    return int.from_bytes(memory.read(Gpa(gpa), 4), "little")


def e820(memory: GuestMemory) -> list[tuple[int, int, int]]:
    count = memory.read(Gpa(layout.ZERO_PAGE_GPA + 0x1E8), 1)[0]
    table = memory.read(Gpa(layout.ZERO_PAGE_GPA + 0x2D0), count * 20)
    return list(struct.iter_unpack("<QQI", table))


def test_segments_and_bss_are_where_the_kernel_wants_them(
    memory: GuestMemory, kernel_fd: int
) -> None:
    boot_it(memory, kernel_fd, "linux64")
    assert memory.read(Gpa(ENTRY), len(CODE)) == CODE
    assert memory.read(Gpa(ENTRY + len(CODE)), 8192) == bytes(8192)


def test_holes_of_the_kernel_file_take_no_guest_memory(memory: GuestMemory) -> None:
    with open_bytes(elf([phdr(filesz=32 * MIB, memsz=32 * MIB)])) as fd:
        os.ftruncate(fd, 64 * MIB)
        boot_it(memory, fd, "linux64")
    assert os.fstat(memory.fd).st_blocks * 512 < 2 * MIB
    assert memory.read(Gpa(ENTRY), len(CODE)) == CODE


def test_linux64_is_entered_in_long_mode_with_the_zero_page(
    memory: GuestMemory, kernel_fd: int
) -> None:
    state = boot_it(memory, kernel_fd, "linux64")
    assert (state.entry_gpa, state.boot_info_gpa) == (ENTRY, layout.ZERO_PAGE_GPA)
    vcpu = FakeVcpu()
    enter(vcpu, state)  # type: ignore[arg-type]  # a fake
    assert (vcpu.regs.rip, vcpu.regs.rsi) == (ENTRY, layout.ZERO_PAGE_GPA)
    assert (vcpu.sregs.cr3, vcpu.sregs.gdt.base) == (layout.PAGE_TABLES_GPA, layout.GDT_GPA)
    assert memory.read(Gpa(layout.GDT_GPA), 32) == LINUX64_GDT


def test_pvh_is_entered_without_paging_with_the_start_info(
    memory: GuestMemory, kernel_fd: int
) -> None:
    state = boot_it(memory, kernel_fd, "pvh")
    assert (state.entry_gpa, state.boot_info_gpa) == (ENTRY + 16, layout.PVH_START_INFO_GPA)
    vcpu = FakeVcpu()
    enter(vcpu, state)  # type: ignore[arg-type]  # a fake
    assert (vcpu.regs.rip, vcpu.regs.rbx) == (ENTRY + 16, layout.PVH_START_INFO_GPA)
    assert vcpu.sregs.cr0 & 1 << 31 == 0


@pytest.mark.parametrize("address", [0, layout.ZERO_PAGE_GPA, ENTRY, 3 << 30, (4 << 30) - 1])
def test_the_page_tables_map_four_gib_to_itself(
    memory: GuestMemory, kernel_fd: int, address: int
) -> None:
    boot_it(memory, kernel_fd, "linux64")
    table = layout.PAGE_TABLES_GPA
    for shift in (39, 30):
        entry = u32(memory, table + (address >> shift & 511) * 8)
        assert entry & 3 == 3
        table = entry & ~0xFFF
    leaf = u32(memory, table + (address >> 21 & 511) * 8)
    assert leaf & 0x83 == 0x83
    assert (leaf & ~0x1FFFFF) + address % (2 * MIB) == address


def test_the_command_line_ends_with_nul(memory: GuestMemory, kernel_fd: int) -> None:
    boot_it(memory, kernel_fd, "linux64")
    assert memory.read(Gpa(layout.CMDLINE_GPA), 14) == b"console=ttyS0\x00"
    assert u32(memory, layout.ZERO_PAGE_GPA + 0x228) == layout.CMDLINE_GPA


def test_the_initrd_lies_page_aligned_at_the_end_of_ram(
    memory: GuestMemory, kernel_fd: int, initrd_fd: int
) -> None:
    boot_it(memory, kernel_fd, "linux64", initrd_fd=initrd_fd)
    gpa = u32(memory, layout.ZERO_PAGE_GPA + 0x218)
    assert gpa == RAM_BYTES - 12288
    assert u32(memory, layout.ZERO_PAGE_GPA + 0x21C) == len(INITRD)
    assert memory.read(Gpa(gpa), len(INITRD)) == INITRD


def test_the_setup_header_is_kept_but_for_what_a_loader_says(
    memory: GuestMemory, kernel_fd: int
) -> None:
    raw = raw_header()
    boot_it(memory, kernel_fd, "linux64", setup_header=raw)
    page = memory.read(Gpa(layout.ZERO_PAGE_GPA), 4096)
    kept = bytearray(page[0x1F1 : 0x1F1 + len(raw)])
    kept[0x210 - 0x1F1] = raw[0x210 - 0x1F1]  # type_of_loader
    kept[0x228 - 0x1F1 : 0x22C - 0x1F1] = bytes(4)  # cmd_line_ptr
    assert bytes(kept) == raw
    assert page[0x210] == 0xFF
    assert page[0x1EF] == 0  # the sentinel: not zero means that a loader copied too much


def test_an_elf_kernel_gets_a_header_that_linux_accepts(
    memory: GuestMemory, kernel_fd: int
) -> None:
    boot_it(memory, kernel_fd, "linux64")
    page = memory.read(Gpa(layout.ZERO_PAGE_GPA), 4096)
    assert page[0x1FE:0x200] == b"\x55\xaa"
    assert page[0x202:0x206] == b"HdrS"
    assert page[0x206:0x208] == b"\x0f\x02"
    assert struct.unpack_from("<Q", page, 0x70)[0] == layout.ACPI_GPA


def test_e820_gives_ram_and_reserves_acpi_and_ecam(memory: GuestMemory, kernel_fd: int) -> None:
    boot_it(memory, kernel_fd, "linux64")
    assert e820(memory) == [
        (0, 0x9FC00, 1),
        (0x9FC00, 0x400, 2),
        (0xE0000, 0x20000, 2),
        (MIB, RAM_BYTES - MIB, 1),
        (0xE0000000, MIB, 2),
    ]


def test_ram_above_the_mmio_hole_is_in_the_map() -> None:
    assert boot_params.memory_map(4 << 30)[-1] == (4 << 30, 1 << 30, 1)


def test_the_start_info_leads_to_cmdline_initrd_rsdp_and_map(
    memory: GuestMemory, kernel_fd: int, initrd_fd: int
) -> None:
    state = boot_it(memory, kernel_fd, "pvh", initrd_fd=initrd_fd)
    info = struct.unpack("<IIIIQQQQII", memory.read(state.boot_info_gpa, 56))
    magic, version, _, modules, modlist, cmdline, rsdp, memmap, entries, _ = info
    assert (magic, version, modules) == (0x336EC578, 1, 1)
    assert (cmdline, rsdp) == (layout.CMDLINE_GPA, layout.ACPI_GPA)
    assert struct.unpack("<QQ", memory.read(Gpa(modlist), 16)) == (RAM_BYTES - 12288, len(INITRD))
    table = struct.iter_unpack("<QQII", memory.read(Gpa(memmap), entries * 24))
    assert [entry[:3] for entry in table] == list(boot_params.memory_map(RAM_BYTES))


def test_without_an_initrd_there_is_no_module(memory: GuestMemory, kernel_fd: int) -> None:
    state = boot_it(memory, kernel_fd, "pvh")
    assert u32(memory, state.boot_info_gpa + 12) == 0


def test_a_kernel_without_the_wanted_entry_is_refused(memory: GuestMemory) -> None:
    with open_bytes(elf()) as fd, pytest.raises(KernelFormatError, match="has no pvh entry"):
        boot_it(memory, fd, "pvh")


def test_a_kernel_larger_than_ram_is_refused_before_anything_is_written(
    kernel_fd: int,
) -> None:
    with GuestMemory([(Gpa(0), 16 * MIB)]) as small:
        with pytest.raises(FitError) as caught:
            boot_it(small, kernel_fd, "linux64")
        assert os.fstat(small.fd).st_blocks == 0
    assert caught.value.field == "memory_mib"
    assert "memory_mib=16" in caught.value.detail
    assert "must be at least 17" in caught.value.detail


def fit(**more: object) -> int:
    wanted: dict[str, object] = {"initrd_bytes": 0, "memory_bytes": RAM_BYTES, "cmdline": ""}
    return check_fit(PLAIN, **(wanted | more))  # type: ignore[arg-type]


def fit_error(**more: object) -> FitError:
    with pytest.raises(FitError) as caught:
        fit(**more)
    return caught.value


def test_an_initrd_that_needs_more_ram_names_how_much() -> None:
    error = fit_error(initrd_bytes=50 * MIB)
    assert (error.code, error.field) == ("initrd_too_large", "initrd")
    assert f"initrd of {50 * MIB} bytes" in error.detail
    assert "memory_mib=64 must be at least 68" in error.detail


def test_an_initrd_that_just_fits_is_accepted() -> None:
    assert fit(initrd_bytes=50 * MIB, memory_bytes=68 * MIB) == 18 * MIB


def test_an_initrd_that_no_ram_can_hold_names_the_limit() -> None:
    error = fit_error(initrd_bytes=3 << 30, memory_bytes=64 << 30)
    assert f"takes at most {(2 << 30) - 18 * MIB} bytes" in error.detail


def test_the_initrd_stays_below_the_kernels_own_limit() -> None:
    assert fit(initrd_bytes=4096, memory_bytes=8 << 30) == (2 << 30) - 4096


def test_a_header_with_a_higher_limit_lets_the_initrd_reach_three_gib() -> None:
    raw = bytearray(raw_header())
    raw[0x22C - 0x1F1 : 0x230 - 0x1F1] = b"\xff" * 4
    gpa = fit(initrd_bytes=4096, memory_bytes=8 << 30, setup_header=bytes(raw))
    assert gpa == (3 << 30) - 4096


def test_a_command_line_of_2047_bytes_is_the_longest() -> None:
    assert fit(cmdline="x" * 2047) == 0
    error = fit_error(cmdline="x" * 2048)
    assert (error.code, error.field) == ("cmdline_too_long", "cmdline")
    assert "2048 bytes" in error.detail


def test_an_older_kernels_shorter_command_line_is_honoured() -> None:
    raw = bytearray(raw_header())
    raw[0x238 - 0x1F1 : 0x23C - 0x1F1] = (255).to_bytes(4, "little")
    error = fit_error(cmdline="x" * 256, setup_header=bytes(raw))
    assert "at most 255" in error.detail


@pytest.mark.parametrize("cmdline", ["a\x00b", "größe"])
def test_a_command_line_that_is_not_ascii_text_is_refused(cmdline: str) -> None:
    assert fit_error(cmdline=cmdline).field == "cmdline"


OFFSETS = {
    "acpi_rsdp_addr": boot_params._ACPI_RSDP_ADDR,
    "ext_ramdisk_image": boot_params._EXT_RAMDISK_IMAGE,
    "ext_ramdisk_size": boot_params._EXT_RAMDISK_SIZE,
    "ext_cmd_line_ptr": boot_params._EXT_CMD_LINE_PTR,
    "e820_entries": boot_params._E820_ENTRIES,
    "e820_table": boot_params._E820_TABLE,
    "edd_mbr_sig_buffer": setup_header.HDR_START + 0x9F,
    "hdr": setup_header.HDR_START,
    "hdr.boot_flag": setup_header.HDR_BOOT_FLAG,
    "hdr.header": setup_header.HDR_MAGIC,
    "hdr.version": setup_header.HDR_VERSION,
    "hdr.type_of_loader": setup_header.HDR_TYPE_OF_LOADER,
    "hdr.loadflags": setup_header.HDR_LOADFLAGS,
    "hdr.ramdisk_image": setup_header.HDR_RAMDISK_IMAGE,
    "hdr.ramdisk_size": setup_header.HDR_RAMDISK_SIZE,
    "hdr.cmd_line_ptr": setup_header.HDR_CMD_LINE_PTR,
    "hdr.initrd_addr_max": setup_header.HDR_INITRD_ADDR_MAX,
    "hdr.kernel_alignment": setup_header.HDR_KERNEL_ALIGNMENT,
    "hdr.cmdline_size": setup_header.HDR_CMDLINE_SIZE,
    "hdr.payload_offset": 0x248,
    "hdr.payload_length": 0x24C,
}


@pytest.mark.slow
def test_every_offset_is_the_kernel_headers_own(tmp_path: Path) -> None:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is not installed")
    checks = "\n".join(
        f'_Static_assert(offsetof(struct boot_params, {name}) == {offset}, "{name}");'
        for name, offset in OFFSETS.items()
    )
    source = tmp_path / "offsets.c"
    source.write_text(f"#include <stddef.h>\n#include <asm/bootparam.h>\n{checks}\n")
    run = subprocess.run(
        [compiler, "-fsyntax-only", str(source)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_importing_boot_brings_no_unpacker_into_the_worker() -> None:
    code = "import sys, daemon.worker.boot; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"lzma", "bz2", "zstandard", "lz4", "daemon.images.bzimage", "daemon.images.importer"}
    assert not heavy & set(run.stdout.split())
