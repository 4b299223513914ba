# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Copy large files: sparse stays sparse, and where the file system can, no byte is copied."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import os
from collections.abc import Callable
from typing import Final

from daemon.images.errors import Cancelled
from daemon.images.extents import data_extents
from daemon.images.source import Source

Progress = Callable[[int, int | None], None]
"""Called with the bytes done and their total, None while that is not known."""
Cancel = Callable[[], bool]
"""Asked between pieces of at most PIECE_BYTES; True ends the work with Cancelled."""

PIECE_BYTES: Final = 1 << 20
_ZEROS: Final = bytes(PIECE_BYTES)
# _IOW(0x94, 9, int), <linux/fs.h>; the fcntl module has it from Python 3.13 on only.
_FICLONE: Final = 0x4004_9409
# What says that these two files cannot share blocks, or not by this call.
_CANNOT_SHARE: Final = (
    errno.EOPNOTSUPP,
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOTTY,
    errno.ENOSYS,
    errno.EPERM,
    errno.ETXTBSY,
)
_COPY_RANGE_BYTES: Final = 64 << 20


def no_progress(_done: int, _total: int | None) -> None:
    """Tell nobody."""


def never() -> bool:
    """Go on to the end."""
    return False


class SparseWriter:
    """Appends to a file and leaves holes for blocks of zeros.

    Args:
        fd: of an empty file; its offset is not used.
        block_bytes: what is looked at as one; a power of two, at most PIECE_BYTES.
    """

    def __init__(self, fd: int, block_bytes: int) -> None:
        self._fd = fd
        self._zero_block = _ZEROS[:block_bytes]
        self.size_bytes = 0

    def write(self, data: bytes) -> None:
        """Append bytes."""
        start = self._next_data(data, 0)
        while start < len(data):
            end = self._next_zeros(data, start)
            self._write_at(data, start, end)
            start = self._next_data(data, end)
        self.size_bytes += len(data)

    def skip(self, length: int) -> None:
        """Append zeros."""
        self.size_bytes += length

    def finish(self) -> None:
        """Give the file its length: a hole at the end has none of its own."""
        os.ftruncate(self._fd, self.size_bytes)

    def _block_end(self, data: bytes, at: int) -> int:
        # Blocks are those of the file, not of the piece.
        block = len(self._zero_block)
        return min(len(data), at + block - (self.size_bytes + at) % block)

    def _is_zero(self, data: bytes, at: int, end: int) -> bool:
        return data[at:end] == self._zero_block[: end - at]

    def _next_data(self, data: bytes, at: int) -> int:
        while at < len(data) and self._is_zero(data, at, end := self._block_end(data, at)):
            at = end
        return at

    def _next_zeros(self, data: bytes, at: int) -> int:
        while at < len(data) and not self._is_zero(data, at, end := self._block_end(data, at)):
            at = end
        return at

    def _write_at(self, data: bytes, start: int, end: int) -> None:
        view = memoryview(data)
        while start < end:
            start += os.pwrite(self._fd, view[start:end], self.size_bytes + start)


def reflink(source_fd: int, dest_fd: int) -> bool:
    """Make ``dest_fd`` share all blocks of ``source_fd``, if the file system can.

    Raises:
        OSError: it can, and failed.
    """
    try:
        fcntl.ioctl(dest_fd, _FICLONE, source_fd)
    except OSError as err:
        if err.errno in _CANNOT_SHARE:
            return False
        raise
    return True


def copy_hashed(
    source: Source, writer: SparseWriter, *, progress: Progress, cancelled: Cancel
) -> str:
    """Copy a source and return the sha256 of its bytes, holes as zeros.

    Raises:
        SourceError: it cannot be read, or changed meanwhile.
        Cancelled: ``cancelled`` said so.
        OSError: the copy cannot be written.
    """
    digest = _walk(source, writer, progress, cancelled)
    writer.finish()
    source.check_unchanged()
    return digest


def hash_shared(source: Source, dest_fd: int, *, progress: Progress, cancelled: Cancel) -> str:
    """Return the sha256 of a source that reflink() has copied to ``dest_fd``.

    Raises:
        SourceError: it changed before it was shared.
        Cancelled: ``cancelled`` said so.
        OSError: the copy cannot be read.
    """
    source.check_unchanged()
    # Not of the source: what is kept is what is hashed, and nobody writes to it any more.
    kept = Source(dest_fd, source.label, source.size_bytes, source.mtime_ns)
    return _walk(kept, None, progress, cancelled)


def copy_sparse(source: Source, dest_fd: int, *, progress: Progress, cancelled: Cancel) -> None:
    """Copy a source into an empty file: by sharing blocks, else in the kernel, else by hand.

    Raises:
        SourceError: it cannot be read.
        Cancelled: ``cancelled`` said so.
        OSError: the copy cannot be written.
    """
    if reflink(source.fd, dest_fd):
        return
    for start, end in data_extents(source.fd, 0, source.size_bytes):
        at = start
        while at < end:
            if cancelled():
                raise Cancelled
            at += _copy_piece(source, dest_fd, at, end - at)
            progress(at, source.size_bytes)


def _copy_piece(source: Source, dest_fd: int, at: int, length: int) -> int:
    try:
        copied = os.copy_file_range(source.fd, dest_fd, min(length, _COPY_RANGE_BYTES), at, at)
    except OSError as err:
        if err.errno not in _CANNOT_SHARE:
            raise
        copied = 0
    # 0 within a file comes from file systems that only pretend to have the call.
    return copied or os.pwrite(dest_fd, source.read(at, min(length, PIECE_BYTES)), at)


def _walk(
    source: Source, writer: SparseWriter | None, progress: Progress, cancelled: Cancel
) -> str:
    digest = hashlib.sha256()
    at = 0
    size = source.size_bytes
    # The empty extent at the end brings in the hole before it.
    for start, end in itertools.chain(data_extents(source.fd, 0, size), [(size, size)]):
        while at < end:
            if cancelled():
                raise Cancelled
            if at < start:
                piece = _ZEROS[: start - at]
                if writer:
                    writer.skip(len(piece))
            else:
                piece = source.read(at, min(PIECE_BYTES, end - at))
                if writer:
                    writer.write(piece)
            digest.update(piece)
            at += len(piece)
            progress(at, size)
    return digest.hexdigest()
