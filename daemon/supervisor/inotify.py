# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Waits for files to grow, by inotify, or by looking now and then where that is not to be had.

Source: inotify(7).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

_IN_MODIFY: Final = 0x0000_0002
_IN_IGNORED: Final = 0x0000_8000
_EVENT: Final = struct.Struct("iIII")
_READ_BYTES: Final = 64 * 1024
POLL_S: Final = 0.1


class GrowthWatcher:
    """Sets an asyncio.Event whenever a file has been written to.

    Threads: the event loop's.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiters: dict[int, set[asyncio.Event]] = {}
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._fd < 0:
            log.warning("inotify unavailable error=%s", os.strerror(ctypes.get_errno()))
        else:
            self._loop.add_reader(self._fd, self._on_readable)

    @contextlib.contextmanager
    def watch(self, path: Path) -> Iterator[asyncio.Event | None]:
        """Yield an event for a file that exists; None where it must be polled instead."""
        watch_id = -1
        if self._fd >= 0:
            watch_id = self._libc.inotify_add_watch(self._fd, os.fsencode(path), _IN_MODIFY)
        if watch_id < 0:
            yield None
            return
        event = asyncio.Event()
        # The kernel gives the same id for the same file.
        waiters = self._waiters.setdefault(watch_id, set())
        waiters.add(event)
        try:
            yield event
        finally:
            waiters.discard(event)
            if not waiters and self._waiters.get(watch_id) is waiters:
                del self._waiters[watch_id]
                self._libc.inotify_rm_watch(self._fd, watch_id)

    def close(self) -> None:
        """Stop watching."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _on_readable(self) -> None:
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return
        position = 0
        while position + _EVENT.size <= len(data):
            watch_id, mask, _, name_bytes = _EVENT.unpack_from(data, position)
            position += _EVENT.size + name_bytes
            if watch_id == -1:  # IN_Q_OVERFLOW: nobody knows what was lost
                woken = set().union(*self._waiters.values())
            elif mask & _IN_IGNORED:
                # The file has gone, and its id may be given to another one.
                woken = self._waiters.pop(watch_id, set())
            else:
                woken = self._waiters.get(watch_id, set())
            for event in woken:
                event.set()
