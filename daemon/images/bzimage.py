# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Unpack a bzImage: its payload is the ELF kernel, packed by one of seven programs.

It is done once, on the host, so that no guest spends its boot on it. Packed bytes come from a
client: output is made in bounded pieces and never passes MAX_UNPACKED_BYTES, so a packed bomb costs
little memory and a bounded time.

Source: Linux Documentation/arch/x86/boot.rst, payload_offset; scripts/Makefile.lib for how each
format is made: all but gzip have the unpacked size appended as four bytes.
"""

from __future__ import annotations

import bz2
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Final, Protocol, cast

import lz4.block
import zstandard

from daemon.images.elf import ELF_MAGIC
from daemon.images.errors import Cancelled, KernelFormatError
from daemon.images.setup_header import HDR_LIMIT, SetupHeader

MAX_UNPACKED_BYTES: Final = 512 << 20
_PIECE_BYTES: Final = 1 << 20
# `xz` and `lzma` of a kernel use a dictionary of up to 128 MiB (scripts/xz_wrap.sh).
_LZMA_MEMORY_BYTES: Final = 192 << 20
# `zstd -22 --ultra` of a kernel uses a window of 128 MiB (scripts/Makefile.lib).
_ZSTD_WINDOW_BYTES: Final = 128 << 20
_LZ4_LEGACY_MAGIC: Final = 0x184C2102
_LZ4_BLOCK_BYTES: Final = 8 << 20
# LZ4_compressBound(8 MiB), lz4.h.
_LZ4_PACKED_LIMIT: Final = _LZ4_BLOCK_BYTES + _LZ4_BLOCK_BYTES // 255 + 16
_SIZE_TRAILER_BYTES: Final = 4


class _Unpacker(Protocol):
    """What bz2 and lzma have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Payload:
    """The packed bytes, read in order from a file whose offset is not used."""

    def __init__(self, fd: int, start: int, size_bytes: int) -> None:
        self.start = start
        self.end = start + size_bytes
        self.done_bytes = 0
        self._fd = fd

    @property
    def offset(self) -> int:
        """Where in the file the next byte is."""
        return self.start + self.done_bytes

    def read(self, size: int = -1) -> bytes:
        """Return up to ``size`` bytes (a piece if negative), none at the payload's end."""
        wanted = min(_PIECE_BYTES if size < 0 else size, self.end - self.offset)
        data = os.pread(self._fd, wanted, self.offset)
        self.done_bytes += len(data)
        return data

    def take_trailer(self) -> bytes:
        """Return the last four bytes; from now on they do not count."""
        self.end -= _SIZE_TRAILER_BYTES
        return os.pread(self._fd, _SIZE_TRAILER_BYTES, self.end)

    def read_exactly(self, size: int) -> bytes:
        """Return ``size`` bytes, or raise KernelFormatError where the payload ends."""
        data = b""
        while len(data) < size:
            piece = self.read(size - len(data))
            if not piece:
                raise _truncated(self)
            data += piece
        return data


def read_setup_header(fd: int) -> SetupHeader | None:
    """Return the setup header of a bzImage, None if the file is none.

    Raises:
        KernelFormatError: a bzImage that is too old, truncated, or contradicts itself.
        OSError: the file cannot be read.
    """
    header = SetupHeader.parse(os.pread(fd, HDR_LIMIT, 0))
    if header is None:
        return None
    file_bytes = os.fstat(fd).st_size
    end = header.payload_at + header.payload_bytes
    if end > file_bytes:
        raise KernelFormatError(
            f"the bzImage is truncated: it has {file_bytes} bytes and its header speaks of {end}; "
            "copy it again",
            offset=file_bytes,
        )
    if header.payload_bytes <= _SIZE_TRAILER_BYTES:
        raise KernelFormatError(
            f"a payload of {header.payload_bytes} bytes holds no kernel", offset=header.payload_at
        )
    return header


def unpack(
    fd: int,
    header: SetupHeader,
    write: Callable[[bytes], object],
    *,
    progress: Callable[[int, int | None], None],
    cancelled: Callable[[], bool],
) -> str:
    """Unpack the kernel of a bzImage, piece by piece, into ``write``.

    Args:
        fd: the bzImage, open for reading; client-controlled.
        header: as read_setup_header returned it.
        write: takes the next piece of the kernel, at most 8 MiB.
        progress: called with the packed bytes done and their total.
        cancelled: asked between pieces.

    Returns:
        The name of the compression; "none" for a payload that is stored as it is.

    Raises:
        KernelFormatError: the payload is truncated, corrupt, too large, or packed by lzo.
        Cancelled: ``cancelled`` said so.
        OSError: the file cannot be read, or ``write`` failed.
    """
    payload = _Payload(fd, header.payload_at, header.payload_bytes)
    compression, pieces = _open(payload)
    expected = _expected_bytes(payload, compression)
    limit = MAX_UNPACKED_BYTES if expected is None else expected
    done = 0
    for piece in pieces:
        if cancelled():
            raise Cancelled
        if done == 0 and piece and not piece.startswith(ELF_MAGIC):
            raise KernelFormatError(
                f"the {compression} payload unpacks to no ELF file", offset=payload.start
            )
        done += len(piece)
        if done > limit:
            raise _wrong_size(payload, compression, f"more than {limit}", expected)
        write(piece)
        progress(payload.done_bytes, payload.end - payload.start)
    if expected is not None and done != expected:
        raise _wrong_size(payload, compression, str(done), expected)
    return compression


def _open(payload: _Payload) -> tuple[str, Iterator[bytes]]:
    magic = payload.read_exactly(_SIZE_TRAILER_BYTES)
    payload.done_bytes = 0
    if magic[:2] in (b"\x1f\x8b", b"\x1f\x9e"):
        return "gzip", _gzip(payload)
    if magic[:3] == b"BZh":
        return "bzip2", _bz2_or_lzma(payload, "bzip2", bz2.BZ2Decompressor())
    if magic[:3] == b"\x5d\x00\x00":
        alone = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_LZMA_MEMORY_BYTES)
        return "lzma", _bz2_or_lzma(payload, "lzma", alone)
    if magic == b"\xfd7zX":
        return "xz", _bz2_or_lzma(
            payload, "xz", lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY_BYTES)
        )
    if magic == b"\x28\xb5\x2f\xfd":
        return "zstd", _zstd(payload)
    if magic == _LZ4_LEGACY_MAGIC.to_bytes(4, "little"):
        return "lz4", _lz4_legacy(payload)
    if magic == ELF_MAGIC:
        return "none", iter(payload.read, b"")
    what = "is packed by lzo" if magic == b"\x89LZO" else f"starts with {magic.hex(' ')}"
    raise KernelFormatError(
        f"the payload {what}: build the kernel with gzip, bzip2, lzma, xz, lz4 or zstd, or "
        "give its vmlinux",
        offset=payload.start,
    )


def _expected_bytes(payload: _Payload, compression: str) -> int | None:
    if compression == "none":
        return payload.end - payload.start
    if compression == "gzip":
        return None  # its own trailer, which zlib checks
    expected = int.from_bytes(payload.take_trailer(), "little")
    if not 0 < expected <= MAX_UNPACKED_BYTES:
        raise KernelFormatError(
            f"the {compression} payload's size is given as {expected} bytes, must be "
            f"1..{MAX_UNPACKED_BYTES}",
            offset=payload.end,
        )
    return expected


def _gzip(payload: _Payload) -> Iterator[bytes]:
    unpacker = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    while not unpacker.eof:
        data = unpacker.unconsumed_tail or payload.read()
        if not data:
            raise _truncated(payload)
        try:
            piece = unpacker.decompress(data, _PIECE_BYTES)
        except zlib.error as err:
            raise _corrupt(payload, "gzip", err) from err
        yield piece


def _bz2_or_lzma(payload: _Payload, name: str, unpacker: _Unpacker) -> Iterator[bytes]:
    while not unpacker.eof:
        data = payload.read() if unpacker.needs_input else b""
        if unpacker.needs_input and not data:
            raise _truncated(payload)
        try:
            piece = unpacker.decompress(data, _PIECE_BYTES)
        # bz2 says OSError for bad data; nothing here does I/O.
        except (lzma.LZMAError, OSError, ValueError) as err:
            raise _corrupt(payload, name, err) from err
        yield piece


def _zstd(payload: _Payload) -> Iterator[bytes]:
    unpacker = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
    # Of the file object it only calls read().
    source = cast("IO[bytes]", payload)
    with unpacker.stream_reader(source, closefd=False) as reader:
        while True:
            try:
                piece = reader.read(_PIECE_BYTES)
            except zstandard.ZstdError as err:
                raise _corrupt(payload, "zstd", err) from err
            if not piece:
                return
            yield piece


def _lz4_legacy(payload: _Payload) -> Iterator[bytes]:
    # lz4_Frame_format.md, "Legacy frame": the magic, then blocks of 8 MiB, each with its packed
    # size before it. The library has frames of the newer kind only, so blocks are taken one by one.
    payload.read_exactly(4)
    while payload.offset < payload.end:
        size = int.from_bytes(payload.read_exactly(4), "little")
        if size == _LZ4_LEGACY_MAGIC:
            continue
        if not 0 < size <= _LZ4_PACKED_LIMIT:
            raise _corrupt(payload, "lz4", f"a block of {size} bytes")
        block = payload.read_exactly(size)
        try:
            piece = lz4.block.decompress(block, uncompressed_size=_LZ4_BLOCK_BYTES)
        except (lz4.block.LZ4BlockError, ValueError) as err:
            raise _corrupt(payload, "lz4", err) from err
        yield piece


def _truncated(payload: _Payload) -> KernelFormatError:
    return KernelFormatError(
        "the payload ends in the middle of the packed kernel: the file is truncated or corrupt; "
        "copy it again",
        offset=payload.offset,
    )


def _corrupt(payload: _Payload, name: str, why: object) -> KernelFormatError:
    return KernelFormatError(
        f"the {name} payload is corrupt ({why}): copy the file again", offset=payload.offset
    )


def _wrong_size(
    payload: _Payload, name: str, actual: str, expected: int | None
) -> KernelFormatError:
    rule = "must be at most that" if expected is None else f"its trailer says {expected}"
    return KernelFormatError(
        f"the {name} payload unpacks to {actual} bytes, {rule}: the file is corrupt; copy it again",
        offset=payload.end,
    )
