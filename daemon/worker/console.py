# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Logs that keep their end: the console's, and the worker's own."""

from __future__ import annotations

import base64
import binascii
import errno
import io
import logging
import os
from typing import Final

from kvm_ffi.host_process import punch_hole

from ..errors import ProtocolError

log = logging.getLogger(__name__)

KEEP_BYTES: Final = 1 << 20
# Punched in steps, not at every write.
_SLACK_BYTES: Final = 256 * 1024
_BLOCK_BYTES: Final = 4096


class BoundedLog:
    """Appends to a file that keeps its last KEEP_BYTES; offsets in it never change.

    What is older is punched out of the file, so a guest that prints forever holds about a MiB of
    the host's disk, and a reader's offset stays good.

    Args:
        fd: opened for appending, the caller's to close.

    Threads: one at a time.
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
        # First: the warning below may be for this very log.
        self._start = keep_from
        try:
            punch_hole(self._fd, 0, keep_from)
        except OSError as err:
            # A disk that is full, or has no holes, keeps the whole log rather than none of it.
            log.warning("log not shortened: %s", err)


class WorkerLog(io.TextIOBase):
    """A stream for logging.StreamHandler: a BoundedLog of text.

    What C prints to standard error goes past it and is counted at the next start.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._log = BoundedLog(fd)

    def write(self, text: str) -> int:
        """Append ``text``."""
        self._log.append(text.encode("utf-8", "backslashreplace"))
        return len(text)


def decode_input(text: str) -> bytes:
    """Return what is to be typed into a console.

    Raises:
        ProtocolError: not base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as err:
        raise ProtocolError(f"console_write: {err}") from err
