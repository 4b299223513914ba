# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Files of the host that are a VM's persistent memory: looked at, opened, locked as disks are."""

from __future__ import annotations

import os
from typing import Final

from api.errors import ApiError, Invalid

from .disks import inspect, open_locked
from .records import DiskRecord, PmemRecord

# Linux maps persistent memory in such pieces: memremap_compat_align() in mm/memremap.c.
ALIGNMENT_BYTES: Final = 2 << 20
# Four of these, RAM and the window for PCI stay below 39 bits, which every host's CPU has.
MAX_BYTES: Final = 64 << 30


def measure(path: str, field: str, *, read_only: bool) -> int:
    """Return the size of a file that is to be persistent memory.

    Raises:
        Invalid: it cannot be that.

    Threads: any; may block on a slow file system.
    """
    return _checked(inspect(path, field, read_only=read_only).size_bytes, path, field)


def open_pmem(pmem: PmemRecord, index: int) -> int:
    """Open a file for a worker, locked, and return its descriptor; its end is its size by now.

    Raises:
        ApiError: missing, not accessible, in use, or of a size that cannot be.

    Threads: any; may block on a slow file system.
    """
    field = f"pmem.{index}.path"
    disk = DiskRecord(pmem.id, pmem.path, None, False, pmem.read_only, pmem.size_bytes)
    fd = open_locked(disk, field)
    try:
        _checked(os.lseek(fd, 0, os.SEEK_END), pmem.path, field)
    except ApiError:
        os.close(fd)
        raise
    return fd


def _checked(size_bytes: int, path: str, field: str) -> int:
    if size_bytes % ALIGNMENT_BYTES or not ALIGNMENT_BYTES <= size_bytes <= MAX_BYTES:
        raise Invalid(
            "pmem_size",
            f"{path}: {size_bytes} bytes: must be whole pieces of {ALIGNMENT_BYTES}, and"
            f" {MAX_BYTES} at most; fallocate -l SIZE makes it larger",
            field=field,
        )
    return size_bytes
