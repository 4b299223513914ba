# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The console log: what the guest's serial port printed, with the oldest part dropped."""

from __future__ import annotations

import errno
import logging
import os
from typing import Final

from kvm_ffi.host_process import punch_hole

log = logging.getLogger(__name__)

KEEP_BYTES: Final = 1 << 20
# Punched in steps, not at every write.
_SLACK_BYTES: Final = 256 * 1024
_BLOCK_BYTES: Final = 4096


class ConsoleLog:
    """Appends to a file that keeps its last KEEP_BYTES; offsets in it never change.

    What is older is punched out of the file, so a guest that prints forever holds about a MiB of
    the host's disk, and a reader's offset stays good.

    Args:
        fd: opened for appending, the caller's to close.

    Threads: the worker's main thread only.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._end = os.fstat(fd).st_size
        self._start = max(0, self._end - KEEP_BYTES)
        self.lost_bytes = 0  # what a full disk refused

    def append(self, data: bytes) -> None:
        """Write ``data``; what the disk has no room for is counted and lost."""
        view = memoryview(data)
        while view:
            try:
                written = os.write(self._fd, view)
            except OSError as err:
                if err.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
                    raise
                self.lost_bytes += len(view)
                break
            self._end += written
            view = view[written:]
        if self._end - self._start > KEEP_BYTES + _SLACK_BYTES:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        keep_from = (self._end - KEEP_BYTES) // _BLOCK_BYTES * _BLOCK_BYTES
        try:
            punch_hole(self._fd, 0, keep_from)
        except OSError as err:
            # A disk that is full, or has no holes, keeps the whole log rather than none of it.
            log.warning("console log not shortened: %s", err)
        self._start = keep_from
