# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Disks of the host: looked at, opened, locked.

The lock is one of the open file description (F_OFD_SETLK): it goes with the descriptor to the
worker and ends with the worker, whatever becomes of hosteld. Writers exclude everyone, readers
only writers.

Source: fcntl(2), "Open file description locks".
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time
from dataclasses import dataclass
from typing import Final

from api.errors import ApiError, Conflict, HostFailure, Invalid

from .records import DiskRecord

# struct flock on x86-64: l_type, l_whence, l_start, l_len, l_pid.
_FLOCK: Final = struct.Struct("hhqqi4x")
SECTOR_BYTES: Final = 512
# _IO(0x12, 94) of <linux/fs.h>
BLKROGET: Final = 0x125E
# A worker that has just ended may hold its disks for a moment: the kernel ends its io_uring, and
# what that has under way, behind it.
LOCK_PATIENCE_S: Final = 1.0
LOCK_RETRY_S: Final = 0.01


@dataclass(frozen=True, slots=True)
class HostDisk:
    """A file or block device of the host; ``identity`` is the same for every path to it."""

    size_bytes: int
    identity: tuple[int, int]


def inspect(path: str, field: str, *, read_only: bool, is_direct: bool = False) -> HostDisk:
    """Look at a host file or block device that is to be a disk.

    Args:
        path: client-controlled, absolute.
        field: of the request, for the error.
        read_only: how the guest will see it.
        is_direct: whether it will be used past the page cache.

    Raises:
        Invalid: missing, a directory or another thing that is no disk, not accessible, empty, or
            without O_DIRECT where that is wanted.

    Threads: any; may block on a slow file system.
    """
    # O_NONBLOCK: a FIFO must not hold us; it has no effect on files and disks.
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = _open(path, flags, is_direct=is_direct)
    except OSError as err:
        raise _open_error(err, path, field) from err
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) and not stat.S_ISBLK(info.st_mode):
            raise Invalid(
                "disk_kind", f"{path}: must be a regular file or a block device", field=field
            )
        if not read_only:
            _check_writable(fd, info, path, field)
        size_bytes = os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)
    if size_bytes < SECTOR_BYTES:
        raise Invalid(
            "disk_size",
            f"{path}: {size_bytes} bytes, a disk has {SECTOR_BYTES} or more",
            field=field,
        )
    identity = (0, info.st_rdev) if stat.S_ISBLK(info.st_mode) else (info.st_dev, info.st_ino)
    return HostDisk(size_bytes, identity)


def grow(path: str, size_bytes: int) -> int:
    """Make a regular file larger and return its size; of a block device just return that.

    Raises:
        Invalid: the file, or device, would have to shrink, or the device to grow.
        ApiError: it cannot be opened.
        OSError: it cannot be grown.

    Threads: any; may block on a slow file system.
    """
    field = "size_mib"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as err:
        raise _open_error(err, path, field) from err
    try:
        present = os.lseek(fd, 0, os.SEEK_END)
        if size_bytes < present:
            raise Invalid(
                "disk_shrink",
                f"{path} has {present} bytes: a disk cannot shrink to {size_bytes}",
                field=field,
            )
        if size_bytes > present and stat.S_ISBLK(os.fstat(fd).st_mode):
            raise Invalid(
                "disk_size",
                f"{path} is a block device of {present} bytes: grow the device first",
                field=field,
            )
        if size_bytes > present:
            os.ftruncate(fd, size_bytes)
            os.fsync(fd)
    finally:
        os.close(fd)
    return size_bytes


def open_locked(disk: DiskRecord, field: str) -> int:
    """Open a disk for a worker, locked, and return its descriptor.

    Raises:
        ApiError: missing, not accessible, or in use.

    Threads: any; may block on a slow file system.
    """
    fd = open_unlocked(disk, field, exclusively=not disk.read_only)
    try:
        # It was for the open alone: io_uring takes it at its word, even on a file.
        os.set_blocking(fd, True)
        lock(fd, disk.path, field, is_shared=disk.read_only)
    except ApiError:
        os.close(fd)
        raise
    return fd


def open_unlocked(disk: DiskRecord, field: str, *, exclusively: bool = False) -> int:
    """Open a disk whose lock the caller, or its VM's worker, holds otherwise.

    Raises:
        ApiError: missing, or not accessible.

    Threads: any; may block on a slow file system.
    """
    try:
        is_block = stat.S_ISBLK(os.stat(disk.path).st_mode)  # noqa: PTH116 - open by the same string
        flags = (os.O_RDONLY if disk.read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
        # On a block device O_EXCL, without O_CREAT, means: refuse if mounted (open(2)).
        flags |= os.O_EXCL if is_block and exclusively else 0
        return _open(disk.path, flags, is_direct=disk.cache == "none")
    except OSError as err:
        raise _open_error(err, disk.path, field) from err


def lock(fd: int, path: str, field: str, *, is_shared: bool) -> None:
    """Lock a whole file through its open file description; waits a moment for it.

    Raises:
        Conflict: someone else holds it.
        HostFailure: the file system knows no locks.
    """
    kind = fcntl.F_RDLCK if is_shared else fcntl.F_WRLCK
    wanted = _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0)
    deadline = time.monotonic() + LOCK_PATIENCE_S
    try:
        while not _try_lock(fd, wanted):
            if time.monotonic() > deadline:
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, wanted)
                return
            time.sleep(LOCK_RETRY_S)
    except (BlockingIOError, PermissionError) as err:
        how = "read" if is_shared else "write"
        raise Conflict(
            "disk_in_use",
            f"{path}: cannot be locked to {how}, another VM or program uses it; stop that first,"
            " or give the disk read_only to all of them",
            field=field,
        ) from err
    except OSError as err:
        raise HostFailure("disk_lock", f"{path}: {err.strerror}", field=field) from err


def _check_writable(fd: int, info: os.stat_result, path: str, field: str) -> None:
    """Refuse a device that lets itself be opened for writing, and then fails each write."""
    if stat.S_ISBLK(info.st_mode):
        (is_read_only,) = struct.unpack("i", fcntl.ioctl(fd, BLKROGET, bytes(4)))
        if is_read_only:
            raise Invalid(
                "disk_permission",
                f"{path}: is a read-only device; give the disk read_only, or see blockdev --setrw",
                field=field,
            )


def _try_lock(fd: int, wanted: bytes) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, wanted)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _open(path: str, flags: int, *, is_direct: bool) -> int:
    """Open a file; of a file system without O_DIRECT say so.

    Raises:
        Invalid: there is no O_DIRECT here.
        OSError: as open(2).
    """
    if not is_direct:
        return os.open(path, flags)
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError as err:
        if err.errno != errno.EINVAL:
            raise
        raise Invalid(
            "disk_no_direct",
            f"{path}: its file system has no O_DIRECT, which cache=none needs; use writeback, or"
            " put it on another file system",
            field="cache",
        ) from err


def _open_error(err: OSError, path: str, field: str) -> ApiError:
    if err.errno == errno.EISDIR:
        return Invalid(
            "disk_kind", f"{path}: is a directory, must be a file or a block device", field=field
        )
    if err.errno in (errno.ENOENT, errno.ENOTDIR):
        return Invalid("disk_missing", f"{path}: no such file", field=field)
    if err.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return Invalid(
            "disk_permission",
            f"{path}: {err.strerror}; let hosteld's user (uid {os.geteuid()}) at it",
            field=field,
        )
    if err.errno == errno.EBUSY:
        return Conflict("disk_in_use", f"{path}: is mounted or in use on this host", field=field)
    return Invalid("disk_open", f"{path}: {err.strerror}", field=field)
