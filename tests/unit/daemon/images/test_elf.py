# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""ELF kernels: what is accepted, and that nothing wild gets through."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.images.elf import ElfKernel, Segment, find_banner, parse_elf
from daemon.images.errors import KernelFormatError
from tests.support.kernels import (
    BANNER,
    CODE,
    CODE_AT,
    ENTRY,
    MIB,
    elf,
    note,
    open_bytes,
    phdr,
    pvh_note,
)

# How fast the machine is decides nothing.
UNHURRIED = settings(suppress_health_check=[HealthCheck.too_slow])
SMALL = b"\xf4" * 64
SMALL_ELF = elf(body=SMALL, notes=pvh_note())


def parse(data: bytes) -> ElfKernel:
    with open_bytes(data) as fd:
        return parse_elf(fd)


def refusal(data: bytes) -> str:
    with pytest.raises(KernelFormatError) as caught:
        parse(data)
    assert caught.value.code == "kernel_format"
    return caught.value.detail


def test_a_plain_kernel_has_its_segments_and_its_64_bit_entry() -> None:
    kernel = parse(elf())
    assert kernel.segments == (Segment(ENTRY, CODE_AT, len(CODE), len(CODE) + 8192),)
    assert kernel.linux64_gpa == ENTRY
    assert kernel.pvh_gpa is None
    assert kernel.end_gpa == ENTRY + len(CODE) + 8192


def test_the_pvh_entry_comes_from_the_xen_note() -> None:
    notes = note(b"GNU\x00", 3, b"x" * 20) + pvh_note(ENTRY + 16)
    assert parse(elf(notes=notes)).pvh_gpa == ENTRY + 16


def test_a_32_bit_pvh_note_is_read_too() -> None:
    entry = note(b"Xen\x00", 18, (ENTRY + 32).to_bytes(4, "little"))
    assert parse(elf(notes=entry)).pvh_gpa == ENTRY + 32


def test_a_kernel_with_a_virtual_e_entry_has_only_its_pvh_entry() -> None:
    kernel = parse(elf(entry=0xFFFF_FFFF_8000_0000, notes=pvh_note()))
    assert (kernel.linux64_gpa, kernel.pvh_gpa) == (None, ENTRY)


def test_bytes_after_the_elf_image_are_allowed() -> None:
    assert parse(elf() + bytes(100_000)) == parse(elf())


def test_a_malformed_note_only_hides_what_follows_it() -> None:
    notes = b"\xff" * 12 + pvh_note()
    assert parse(elf(notes=notes)).pvh_gpa is None


def test_segments_come_in_order_of_address() -> None:
    high = phdr(paddr=ENTRY + 4 * MIB, filesz=16, memsz=16)
    low = phdr(filesz=16, memsz=16)
    gpas = [segment.gpa for segment in parse(elf([high, low])).segments]
    assert gpas == [ENTRY, ENTRY + 4 * MIB]


def test_an_empty_segment_is_left_out() -> None:
    empty = phdr(paddr=0, filesz=0, memsz=0)
    assert len(parse(elf([phdr(), empty])).segments) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends inside its ELF header"),
        (b"\x7fELF", "ends inside its ELF header"),
        (b"#!/bin/sh\n" * 10, "not an ELF file"),
        (elf(machine=183), "a kernel for ARM64, must be for x86-64"),
        (elf(bits=1, machine=3), "a kernel for 32-bit x86, must be for x86-64"),
        (elf(bits=1), "a kernel for x32, must be for x86-64"),
        (elf(bits=7), "not a little-endian ELF"),
        (elf(kind=1), "ELF type 1 is no executable"),
        (elf([]), "0 program headers, must be 1..64"),
        (elf([phdr()] * 65), "65 program headers, must be 1..64"),
        (elf([phdr(kind=2)]), "no segment to load"),
        (elf()[:-1], "segment 0 ends at"),
        (elf([phdr(filesz=100, memsz=99)]), "100 bytes in the file and 99 in memory"),
        (elf([phdr(paddr=MIB - 1)]), "loads at 0xfffff.."),
        (elf([phdr(paddr=0xBFFF_F000)]), "must be inside 0x100000..0xc0000000"),
        (elf([phdr(paddr=2**64 - 1)]), "must be inside"),
        (elf([phdr(offset=2**64 - 1)]), "segment 0 ends at"),
        (elf([phdr(), phdr(paddr=ENTRY + 8)]), "overlap"),
        (elf([phdr(paddr=MIB, memsz=1025 * MIB)], entry=MIB), "must be at most 1073741824"),
        (elf(entry=0), "the entry 0x0 is in no loaded segment, and there is no PVH note"),
        (elf(entry=ENTRY + len(CODE)), "is in no loaded segment"),
        (elf(notes=pvh_note(0x1000)), "the PVH note's entry 0x1000 is in no loaded segment"),
    ],
)
def test_what_is_no_x86_64_kernel_is_refused_with_the_reason(data: bytes, message: str) -> None:
    assert message in refusal(data)


def test_an_entry_table_outside_the_file_is_refused() -> None:
    data = bytearray(elf())
    data[32:40] = (2**64 - 8).to_bytes(8, "little")
    assert "are outside the file" in refusal(bytes(data))


def test_a_wrong_program_header_size_is_refused() -> None:
    data = bytearray(elf())
    data[54:56] = (32).to_bytes(2, "little")
    assert "program headers of 32 bytes" in refusal(bytes(data))


def test_the_banner_is_found() -> None:
    with open_bytes(elf()) as fd:
        assert find_banner(fd) == BANNER


def test_a_format_string_is_no_banner() -> None:
    with open_bytes(b"Linux version %s (%s)\n") as fd:
        assert find_banner(fd) is None


def test_an_empty_file_has_no_banner() -> None:
    with open_bytes(b"") as fd:
        assert find_banner(fd) is None


def accepts_or_refuses(data: bytes) -> None:
    try:
        kernel = parse(data)
    except KernelFormatError:
        return
    ends = [segment.end_gpa for segment in kernel.segments]
    assert ends == sorted(ends)
    assert min(segment.gpa for segment in kernel.segments) >= MIB
    assert all(s.file_offset + s.file_bytes <= len(data) for s in kernel.segments)


@UNHURRIED
@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_a_format_error(data: bytes) -> None:
    accepts_or_refuses(b"\x7fELF\x02\x01\x01" + data)
    accepts_or_refuses(data)


@UNHURRIED
@given(
    st.lists(st.tuples(st.integers(0, 64 + 2 * 56), st.integers(0, 255)), min_size=1, max_size=12),
    st.integers(0, len(SMALL_ELF)),
)
def test_mutated_headers_raise_nothing_but_a_format_error(
    edits: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(SMALL_ELF)
    for at, value in edits:
        data[at] = value
    accepts_or_refuses(bytes(data))
    accepts_or_refuses(bytes(data[:cut]))


@UNHURRIED
@given(st.binary(max_size=200))
def test_random_notes_raise_nothing_but_a_format_error(notes: bytes) -> None:
    accepts_or_refuses(elf(body=SMALL, notes=notes))
