# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What a worker asks of its own process, beyond what the standard library has."""

from __future__ import annotations

import os

from ._kvm import lib


def _check(ret: int) -> None:
    if ret < 0:
        raise OSError(-ret, os.strerror(-ret))


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Free the blocks of ``length`` bytes at ``offset``; the file's size stays.

    Raises:
        OSError: EOPNOTSUPP where the file system cannot.

    Source: fallocate(2), FALLOC_FL_PUNCH_HOLE.
    """
    _check(lib.host_punch_hole(fd, offset, length))


def keep_heap_small() -> None:
    """Give free heap back, and have malloc use one arena for all threads; before the first thread.

    Source: mallopt(3), M_ARENA_MAX; malloc_trim(3).
    """
    _check(lib.host_keep_heap_small())


def drop_privileges() -> None:
    """Give up all capabilities for good, and any that an exec could bring.

    Raises:
        OSError: the kernel refused.

    Source: capabilities(7), prctl(2) PR_SET_NO_NEW_PRIVS and PR_SET_DUMPABLE.
    """
    _check(lib.host_drop_privileges())


def name_thread(name: str) -> None:
    """Name the calling thread as top and ps show it; cut to 15 bytes.

    Source: prctl(2) PR_SET_NAME.
    """
    _check(lib.host_name_thread(name.encode()[:15]))
