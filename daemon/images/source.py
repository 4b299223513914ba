# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Where an import comes from: a regular file or a block device, opened without side effects."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from daemon.images.errors import SourceError

_KINDS: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFLNK: "a symbolic link",
}


@dataclass(frozen=True, slots=True)
class Source:
    """An open file to import.

    Attributes:
        fd: open for reading; its offset is moved.
        label: how messages call it.
        size_bytes: when it was opened; never 0.
    """

    fd: int
    label: str
    size_bytes: int
    mtime_ns: int

    def read(self, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes, at least one.

        Raises:
            SourceError: it cannot be read, or has become shorter.
        """
        try:
            data = os.pread(self.fd, length, offset)
        except OSError as err:
            raise _unreadable(self.label, err) from err
        if not data:
            raise self._changed()
        return data

    def check_unchanged(self) -> None:
        """Refuse a file that somebody wrote to while it was being read.

        Raises:
            SourceError: its size or its time of modification has changed.
        """
        now = os.fstat(self.fd)
        if stat.S_ISREG(now.st_mode) and (now.st_size, now.st_mtime_ns) != (
            self.size_bytes,
            self.mtime_ns,
        ):
            raise self._changed()

    def _changed(self) -> SourceError:
        return SourceError(
            "source_changed",
            f"{self.label} changed while it was being read: stop what writes to it, and try again",
            field="path",
        )


@contextmanager
def open_source(source: str | os.PathLike[str] | int) -> Iterator[Source]:
    """Open a path, or take an open descriptor, which stays the caller's.

    Raises:
        SourceError: it is missing, unreadable, empty, or neither a file nor a block device.
    """
    if isinstance(source, int):
        yield _check(source, f"descriptor {source}")
        return
    fd = _open(os.fspath(source))
    try:
        yield _check(fd, os.fspath(source))
    finally:
        os.close(fd)


def _open(path: str) -> int:
    try:
        # O_PATH first: opening a pipe would wait, and opening some devices does something.
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            _check_kind(path, os.fstat(handle).st_mode)
            return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(handle)
    except OSError as err:
        if err.errno in (errno.ENOENT, errno.ENOTDIR):
            raise SourceError("source_missing", f"{path}: no such file", field="path") from err
        raise _unreadable(path, err) from err


def _check(fd: int, label: str) -> Source:
    try:
        info = os.fstat(fd)
        _check_kind(label, info.st_mode)
        size = info.st_size if stat.S_ISREG(info.st_mode) else os.lseek(fd, 0, os.SEEK_END)
    except OSError as err:
        raise _unreadable(label, err) from err
    if size == 0:
        raise SourceError("source_empty", f"{label} is empty", field="path")
    return Source(fd, label, size, info.st_mtime_ns)


def _check_kind(label: str, mode: int) -> None:
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        kind = _KINDS.get(stat.S_IFMT(mode), "of no known kind")
        raise SourceError(
            "source_not_a_file",
            f"{label} is {kind}, must be a regular file or a block device",
            field="path",
        )


def _unreadable(label: str, err: OSError) -> SourceError:
    return SourceError("source_unreadable", f"{label}: {err.strerror}", field="path")
