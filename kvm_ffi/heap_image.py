# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The zygote's memory as a sealed file, so that a worker can share again what it did not change.

Counting a reference writes to an object, so a fork of CPython soon owns a copy of each page that it
has as much as looked at; most of these copies end up equal to the page that they came from. A page
of a privately mapped file can be dropped and is then the file's again.
"""

from __future__ import annotations

import os

from ._kvm import ffi, lib


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


def _check(ret: int) -> int:
    if ret < 0:
        raise OSError(-ret, os.strerror(-ret))
    return ret
