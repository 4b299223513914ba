# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The zygote's memory as a sealed file, so that a worker can share again what it did not change.

Counting a reference writes to an object, so a fork of CPython soon owns a copy of each page that it
has as much as looked at; most of these copies end up equal to the page that they came from. A page
of a privately mapped file can be dropped and is then the file's again.
"""

from __future__ import annotations

import os
from typing import Final

from ._kvm import ffi, lib

# Several times what the launch of a VM makes of them.
MAX_RANGES: Final = 2048


class HeapImage:
    """Turns the calling process's writable memory into such a file, for it and its forks.

    Threads: none but the caller may exist.

    Raises:
        OSError: the host has no memory for the copy, or no /proc; EBUSY when there are threads.

    Source: memfd_create(2), madvise(2) MADV_DONTNEED, Linux admin-guide/mm/pagemap.rst.
    """

    def __init__(self) -> None:
        self._raw = ffi.new("struct heap_image *")
        _check(lib.heap_image_create(self._raw))

    def attach(self) -> None:
        """Let a fork use it; before it drops its privileges, and once.

        Raises:
            OSError: it may not look into its own /proc/self.
        """
        _check(lib.heap_image_attach(self._raw))

    def learn(self) -> bytes:
        """Return which pages this fork has unshared by now, for unshare() of other forks.

        The fork has attached, and done what they will do.

        Raises:
            OSError: it may not look into its own /proc/self.
        """
        ranges = ffi.new("struct page_range[]", MAX_RANGES)
        n = _check(lib.heap_image_learn(self._raw, ranges, MAX_RANGES))
        return bytes(ffi.buffer(ranges, n * ffi.sizeof("struct page_range")))

    def give_back(self) -> int:
        """Share again what this process has not changed; returns the pages that are its own.

        Only once: a success closes what attach() opened.

        Threads: one at a time; all others stand still meanwhile, for 10 ms at most.

        Raises:
            BlockingIOError: the time was up; another call goes on.
            TimeoutError: a thread did not stand still; another call may find it otherwise.
            OSError: the kernel refused; what was not given back is as it was.
        """
        return _check(lib.heap_image_give_back(self._raw))


def unshare(learned: bytes) -> None:
    """Let a fork copy the pages of learn() at once, not by a page fault each.

    Raises:
        OSError: the kernel refused, as Linux before 5.14 does; then page faults will do it.

    Source: madvise(2), MADV_POPULATE_WRITE.
    """
    ranges = ffi.from_buffer("struct page_range[]", learned)
    _check(lib.heap_image_unshare(ranges, len(ranges)))


def _check(ret: int) -> int:
    if ret < 0:
        raise OSError(-ret, os.strerror(-ret))
    return ret
