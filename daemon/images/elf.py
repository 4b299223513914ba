# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""ELF64 kernels: what to load where, and the addresses at which they can be entered.

The file comes from a client, so nothing in it is believed: every number is bounded before it is
used, and whatever is wrong ends in KernelFormatError. Light enough for a worker to import.

Source: System V ABI, chapters 4 and 5 (ELF-64 object file format); for the PVH note
xen/include/public/elfnote.h, XEN_ELFNOTE_PHYS32_ENTRY; for the 64-bit entry Linux
Documentation/arch/x86/boot.rst, section "64-bit Boot Protocol".
"""

from __future__ import annotations

import itertools
import mmap
import os
import re
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from daemon.images.errors import KernelFormatError
from daemon.worker.layout import GIB, KERNEL_MIN_GPA, LOW_RAM_LIMIT

ELF_MAGIC: Final = b"\x7fELF"
_EHDR: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR: Final = struct.Struct("<IIQQQQQQ")
_NHDR: Final = struct.Struct("<III")
_ELFCLASS32: Final = 1
_ELFCLASS64: Final = 2
_ELFDATA2LSB: Final = 1
_ET_EXEC: Final = 2
_ET_DYN: Final = 3
_EM_X86_64: Final = 62
_MACHINES: Final = {3: "32-bit x86", 40: "ARM", 183: "ARM64", 243: "RISC-V", 258: "LoongArch"}
_PT_LOAD: Final = 1
_PT_NOTE: Final = 4
_XEN_ELFNOTE_PHYS32_ENTRY: Final = 18
# Linux has 5, FreeBSD 10; a table of 65,535 would be work for nothing.
_MAX_PROGRAM_HEADERS: Final = 64
_MAX_NOTE_BYTES: Final = 64 * 1024
# A debug build of Linux with everything built in takes about 200 MiB of RAM.
MAX_LOADED_BYTES: Final = GIB
_BANNER: Final = re.compile(rb"Linux version (\d[^\n\x00]{0,511})")


class Segment(NamedTuple):
    """One PT_LOAD: bytes of the file that go to ``gpa``, and zeros up to ``memory_bytes``."""

    gpa: int
    file_offset: int
    file_bytes: int
    memory_bytes: int

    @property
    def end_gpa(self) -> int:
        """The first address after it."""
        return self.gpa + self.memory_bytes


class ElfKernel(NamedTuple):
    """A checked ELF kernel.

    Attributes:
        segments: in order of address, disjoint, between 1 MiB and the end of low RAM.
        linux64_gpa: where 64-bit code starts, or None if e_entry is no loaded physical address.
        pvh_gpa: where 32-bit PVH code starts, or None without the Xen note.
    """

    segments: tuple[Segment, ...]
    linux64_gpa: int | None
    pvh_gpa: int | None

    @property
    def end_gpa(self) -> int:
        """The first address after the last segment."""
        return self.segments[-1].end_gpa


class _ProgramHeader(NamedTuple):
    type: int
    flags: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    align: int


def parse_elf(fd: int) -> ElfKernel:
    """Check the ELF kernel in a regular file and return what to load and where to enter.

    Bytes after the ELF image are allowed: an unpacked bzImage carries its relocations there.

    Args:
        fd: open for reading; its contents are client-controlled, its offset is not used.

    Raises:
        KernelFormatError: not an x86-64 ELF executable, or one with wild headers.
        OSError: the file cannot be read.
    """
    file_bytes = os.fstat(fd).st_size
    entry, headers = _read_headers(fd, file_bytes)
    segments = _check_segments(headers, file_bytes)
    linux64_gpa = entry if _is_loaded(segments, entry) else None
    pvh_gpa = _find_pvh_entry(fd, headers, file_bytes)
    if pvh_gpa is not None and not _is_loaded(segments, pvh_gpa):
        raise KernelFormatError(f"the PVH note's entry {pvh_gpa:#x} is in no loaded segment")
    if linux64_gpa is None and pvh_gpa is None:
        raise KernelFormatError(
            f"the entry {entry:#x} is in no loaded segment, and there is no PVH note: "
            "this ELF file is not a kernel",
            offset=24,
        )
    return ElfKernel(segments, linux64_gpa, pvh_gpa)


def find_banner(fd: int) -> str | None:
    """Return the text after "Linux version " that a Linux kernel carries, or None.

    Raises:
        OSError: the file cannot be mapped.
    """
    if os.fstat(fd).st_size == 0:
        return None
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as image:
        match = _BANNER.search(image)
        return None if match is None else match[1].decode("ascii", "replace").strip()


def _read(fd: int, offset: int, length: int, what: str) -> bytes:
    data = b""
    while len(data) < length:
        piece = os.pread(fd, length - len(data), offset + len(data))
        if not piece:
            raise KernelFormatError(
                f"the file ends inside its {what}: it is truncated", offset=offset + len(data)
            )
        data += piece
    return data


def _read_headers(fd: int, file_bytes: int) -> tuple[int, list[_ProgramHeader]]:
    ident, kind, machine, _, entry, phoff, _, _, _, phentsize, phnum, _, _, _ = _EHDR.unpack(
        _read(fd, 0, _EHDR.size, "ELF header")
    )
    _check_identity(ident, kind, machine)
    if phentsize != _PHDR.size:
        raise KernelFormatError(
            f"program headers of {phentsize} bytes, must be {_PHDR.size}", offset=54
        )
    if not 1 <= phnum <= _MAX_PROGRAM_HEADERS:
        raise KernelFormatError(
            f"{phnum} program headers, must be 1..{_MAX_PROGRAM_HEADERS}", offset=56
        )
    if phoff + phnum * _PHDR.size > file_bytes:
        raise KernelFormatError(
            f"program headers at {phoff:#x} are outside the file of {file_bytes} bytes", offset=32
        )
    table = _read(fd, phoff, phnum * _PHDR.size, "program headers")
    return entry, [_ProgramHeader(*fields) for fields in _PHDR.iter_unpack(table)]


def _check_identity(ident: bytes, kind: int, machine: int) -> None:
    if ident[:4] != ELF_MAGIC:
        raise KernelFormatError("not an ELF file", offset=0)
    if ident[5] != _ELFDATA2LSB or ident[4] not in (_ELFCLASS32, _ELFCLASS64):
        raise KernelFormatError("not a little-endian ELF file", offset=4)
    if machine != _EM_X86_64 or ident[4] != _ELFCLASS64:
        name = _MACHINES.get(machine, f"machine {machine}")
        if ident[4] == _ELFCLASS32 and machine == _EM_X86_64:
            name = "x32"
        raise KernelFormatError(f"a kernel for {name}, must be for x86-64", offset=18)
    if kind not in (_ET_EXEC, _ET_DYN):
        raise KernelFormatError(
            f"ELF type {kind} is no executable: give the linked vmlinux, not an object or a core",
            offset=16,
        )


def _check_segments(headers: list[_ProgramHeader], file_bytes: int) -> tuple[Segment, ...]:
    segments = sorted(
        _check_segment(index, header, file_bytes)
        for index, header in enumerate(headers)
        if header.type == _PT_LOAD and header.memsz
    )
    if not segments:
        raise KernelFormatError("no segment to load: this ELF file is not a kernel")
    for before, after in itertools.pairwise(segments):
        if after.gpa < before.end_gpa:
            raise KernelFormatError(
                f"the segments at gpa={before.gpa:#x} and gpa={after.gpa:#x} overlap"
            )
    total = sum(segment.memory_bytes for segment in segments)
    if total > MAX_LOADED_BYTES:
        raise KernelFormatError(
            f"the segments take {total} bytes of RAM, must be at most {MAX_LOADED_BYTES}"
        )
    return tuple(segments)


def _check_segment(index: int, header: _ProgramHeader, file_bytes: int) -> Segment:
    if header.filesz > header.memsz:
        raise KernelFormatError(
            f"segment {index} has {header.filesz} bytes in the file and {header.memsz} in memory"
        )
    if header.offset + header.filesz > file_bytes:
        raise KernelFormatError(
            f"segment {index} ends at {header.offset + header.filesz:#x}, the file at "
            f"{file_bytes:#x}: it is truncated",
            offset=header.offset,
        )
    if header.paddr < KERNEL_MIN_GPA or header.paddr + header.memsz > LOW_RAM_LIMIT:
        raise KernelFormatError(
            f"segment {index} loads at {header.paddr:#x}..{header.paddr + header.memsz:#x}, "
            f"must be inside {KERNEL_MIN_GPA:#x}..{LOW_RAM_LIMIT:#x}"
        )
    return Segment(header.paddr, header.offset, header.filesz, header.memsz)


def _is_loaded(segments: tuple[Segment, ...], gpa: int) -> bool:
    # Only bytes from the file count: an entry in the BSS would run zeros.
    return any(s.gpa <= gpa < s.gpa + s.file_bytes for s in segments)


def _find_pvh_entry(fd: int, headers: list[_ProgramHeader], file_bytes: int) -> int | None:
    for header in headers:
        if header.type != _PT_NOTE or header.offset + header.filesz > file_bytes:
            continue
        data = _read(fd, header.offset, min(header.filesz, _MAX_NOTE_BYTES), "notes")
        for name, kind, desc in _notes(data, 8 if header.align == 8 else 4):
            if name == b"Xen\x00" and kind == _XEN_ELFNOTE_PHYS32_ENTRY and len(desc) in (4, 8):
                return int.from_bytes(desc, "little")
    return None


def _notes(data: bytes, align: int) -> Iterator[tuple[bytes, int, bytes]]:
    # A malformed note ends the walk and is no error: toolchains have merged notes of different
    # alignment into one segment, and the kernel still boots by its 64-bit entry.
    at = 0
    while at + _NHDR.size <= len(data):
        name_bytes, desc_bytes, kind = _NHDR.unpack_from(data, at)
        name_at = at + _NHDR.size
        desc_at = _align(name_at + name_bytes, align)
        if desc_at + desc_bytes > len(data):
            return
        yield data[name_at : name_at + name_bytes], kind, data[desc_at : desc_at + desc_bytes]
        at = _align(desc_at + desc_bytes, align)


def _align(value: int, align: int) -> int:
    return -(-value // align) * align
