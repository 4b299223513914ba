# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Kernels of a few kilobytes for tests: ELF files, and bzImages packed in every way."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import lz4.block
import zstandard

MIB: Final = 1 << 20
ENTRY: Final = 16 * MIB
BANNER: Final = "6.1.0-test (someone@example.org) #1 SMP"
CODE_AT: Final = 4096
# Long enough that every packer makes several blocks of its own, short enough to be quick.
CODE: Final = b"\xf4Linux version " + BANNER.encode() + b"\n" + os.urandom(70_000) + bytes(300_000)
SETUP_SECTS: Final = 3


def phdr(
    kind: int = 1,
    offset: int = CODE_AT,
    paddr: int = ENTRY,
    filesz: int = len(CODE),
    memsz: int = len(CODE) + 8192,
    align: int = 4096,
) -> bytes:
    """Return one program header."""
    return struct.pack("<IIQQQQQQ", kind, 5, offset, 0, paddr, filesz, memsz, align)


def note(name: bytes, kind: int, desc: bytes) -> bytes:
    """Return one ELF note, padded to four bytes."""
    padded = [part + bytes(-len(part) % 4) for part in (name, desc)]
    return struct.pack("<III", len(name), len(desc), kind) + b"".join(padded)


def pvh_note(entry: int = ENTRY) -> bytes:
    """Return the Xen note with a 32-bit entry."""
    return note(b"Xen\x00", 18, struct.pack("<Q", entry))


def elf(
    headers: list[bytes] | None = None,
    *,
    entry: int = ENTRY,
    notes: bytes = b"",
    bits: int = 2,
    machine: int = 62,
    kind: int = 2,
    body: bytes = CODE,
) -> bytes:
    """Return an ELF file with ``body`` at CODE_AT and ``notes`` in a PT_NOTE before it."""
    table = [phdr(filesz=len(body), memsz=len(body) + 8192)] if headers is None else list(headers)
    if notes:
        table.append(phdr(4, 2048, 0, len(notes), len(notes), 4))
    ident = b"\x7fELF" + bytes([bits, 1, 1]) + bytes(9)
    head = struct.pack(
        "<16sHHIQQQIHHHHHH", ident, kind, machine, 1, entry, 64, 0, 0, 64, 56, len(table), 0, 0, 0
    ) + b"".join(table)
    return head.ljust(2048, b"\x00") + notes.ljust(CODE_AT - 2048, b"\x00") + body


def sized(packed: bytes, data: bytes) -> bytes:
    """Append the size as the kernel's build does."""
    return packed + struct.pack("<I", len(data))


def lz4_legacy(data: bytes, block_bytes: int = 8 * MIB) -> bytes:
    """Pack as ``lz4 -l`` does."""
    blocks = [
        lz4.block.compress(data[at : at + block_bytes], store_size=False)
        for at in range(0, len(data), block_bytes)
    ]
    return struct.pack("<I", 0x184C2102) + b"".join(
        struct.pack("<I", len(block)) + block for block in blocks
    )


def xz_with_bcj(data: bytes) -> bytes:
    """Pack as scripts/xz_wrap.sh does, with a smaller dictionary."""
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": MIB}]
    return lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=filters)


# As the zstd program, and so the build of a kernel, does: with a checksum.
ZSTD: Final = zstandard.ZstdCompressor(level=19, write_checksum=True)
PACKERS: Final[dict[str, Callable[[bytes], bytes]]] = {
    "gzip": lambda data: gzip.compress(data, 9),
    "bzip2": lambda data: sized(bz2.compress(data), data),
    "lzma": lambda data: sized(lzma.compress(data, lzma.FORMAT_ALONE), data),
    "xz": lambda data: sized(xz_with_bcj(data), data),
    "lz4": lambda data: sized(lz4_legacy(data), data),
    "zstd": lambda data: sized(ZSTD.compress(data), data),
    "none": lambda data: data,
}


def bzimage(
    payload: bytes,
    *,
    version: int = 0x020F,
    loadflags: int = 1,
    jump: int = 0x6A,
    payload_bytes: int | None = None,
    setup_sects: int = SETUP_SECTS,
) -> bytes:
    """Return a bzImage whose payload starts 64 bytes into its protected-mode part."""
    length = len(payload) if payload_bytes is None else payload_bytes
    image = bytearray(((setup_sects or 4) + 1) * 512)
    image[0x1F1] = setup_sects
    struct.pack_into("<H", image, 0x1FE, 0xAA55)
    image[0x200:0x202] = bytes([0xEB, jump])
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, version)
    image[0x211] = loadflags
    struct.pack_into("<I", image, 0x22C, 0x7FFF_FFFF)
    struct.pack_into("<I", image, 0x230, 0x20_0000)
    struct.pack_into("<I", image, 0x238, 2047)
    struct.pack_into("<II", image, 0x248, 64, length)
    return bytes(image) + bytes(64) + payload + bytes(512)


def payload_offset(setup_sects: int = SETUP_SECTS) -> int:
    """Return where bzimage() puts the payload."""
    return ((setup_sects or 4) + 1) * 512 + 64


@contextmanager
def open_bytes(data: bytes) -> Iterator[int]:
    """Give a descriptor of an unnamed file that holds ``data``."""
    fd = os.memfd_create("test-kernel")
    try:
        os.write(fd, data)
        yield fd
    finally:
        os.close(fd)
