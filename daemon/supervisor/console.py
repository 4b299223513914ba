# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Consoles: a log that is read and followed as a file, and input that goes to the worker.

The worker appends to console.log and punches out what is older than its last MiB, so an offset
stays good for the VM's whole life, and the first byte that is kept is where the file's data begins.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from api.errors import Conflict
from api.models.vms import VmState
from api.ports import ConsoleChunk

from . import lifecycle
from .dirs import Layout
from .inotify import POLL_S, GrowthWatcher
from .vm_run import VmRunner
from .vm_table import VmEntry

# One chunk of a follower; a message to a worker.
CHUNK_BYTES: Final = 64 * 1024
INPUT_PIECE_BYTES: Final = 32 * 1024
# A guest prints byte by byte: what comes within this time goes out together.
COALESCE_S: Final = 0.02


class Consoles:
    """Reads, follows and writes consoles.

    Threads: the event loop's.
    """

    def __init__(self, layout: Layout, runner: VmRunner) -> None:
        self._layout = layout
        self._runner = runner
        self._watcher = GrowthWatcher()

    def read(self, entry: VmEntry, offset: int, limit: int) -> ConsoleChunk:
        """Read up to ``limit`` bytes; a negative offset counts from the end."""
        return read_log(self._path(entry), offset, limit)

    async def follow(self, entry: VmEntry, offset: int) -> AsyncIterator[ConsoleChunk]:
        """Yield the log from ``offset`` on, as it grows, until the VM is gone."""
        path = self._path(entry)
        chunk = read_log(path, offset, CHUNK_BYTES)
        gone = asyncio.ensure_future(_happening(entry.gone))
        try:
            while True:
                if chunk.data:
                    yield chunk
                position = chunk.offset + len(chunk.data)
                if position >= chunk.end:
                    if gone.done():
                        return
                    await self._wait_for_growth(path, position, gone)
                chunk = read_log(path, position, CHUNK_BYTES)
        finally:
            gone.cancel()

    async def write(self, entry: VmEntry, data: bytes) -> int:
        """Type into the console and return how many bytes the guest's UART took.

        Raises:
            ApiError: the VM is not running or paused, or its worker fails.
        """
        state = entry.record.state
        if state not in (VmState.RUNNING, VmState.PAUSED, VmState.STOPPING):
            raise Conflict(
                "wrong_state",
                f"VM {entry.record.name} is {state.value}: its console takes no input",
                state=state.value,
                allowed=[action.value for action in lifecycle.allowed_actions(state)],
            )
        taken = 0
        while taken < len(data):
            piece = data[taken : taken + INPUT_PIECE_BYTES]
            args = {"data": base64.b64encode(piece).decode()}
            count = int((await self._runner.ask(entry, "console_write", args))["taken"])
            taken += count
            if count < len(piece):
                break
        return taken

    def close(self) -> None:
        """Stop watching."""
        self._watcher.close()

    def _path(self, entry: VmEntry) -> Path:
        return self._layout.vm_state(entry.record.id) / "console.log"

    async def _wait_for_growth(self, path: Path, position: int, gone: asyncio.Future[None]) -> None:
        """Return when the log is longer than ``position`` or the VM is gone."""
        with self._watcher.watch(path) as grown:
            while not gone.done() and log_size(path) <= position:
                # Not there yet, or no inotify: look now and then.
                waiting = asyncio.ensure_future(_happening(grown))
                try:
                    await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    waiting.cancel()
                if grown is not None:
                    grown.clear()
        if not gone.done():
            await asyncio.sleep(COALESCE_S)


async def _happening(event: asyncio.Event | None) -> None:
    """Wait for an event, or for the time to look again where there is none."""
    if event is None:
        await asyncio.sleep(POLL_S)
    else:
        await event.wait()


def log_size(path: Path) -> int:
    """Return the log's length, 0 while there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def read_log(path: Path, offset: int, limit: int) -> ConsoleChunk:
    """Read part of a log that may start with a hole."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return ConsoleChunk(0, b"", 0)
    try:
        end = os.fstat(fd).st_size
        start = max(0, end + offset) if offset < 0 else min(offset, end)
        start = max(start, _first_kept(fd, end))
        return ConsoleChunk(start, os.pread(fd, limit, start), end)
    finally:
        os.close(fd)


def _first_kept(fd: int, end: int) -> int:
    try:
        return os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as err:
        if err.errno == errno.ENXIO:  # nothing but a hole
            return end
        raise
