# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Make files durable, with a deadline.

A file on storage that hangs (a dead server, a suspended device) keeps whoever syncs it in the
kernel, where no signal ends it. So a process of its own does that, and can be left behind. A thread
would keep hosteld from ending, and with it the lock on its directories from the next one.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from typing import Any, Final

from api.errors import HostFailure

_ERROR_BYTES: Final = 4096


class FileSyncs:
    """Syncs of files; one at a time for each path, however often it is asked for.

    Args:
        timeout_s: how long one is waited for.

    Threads: the event loop's.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._running: dict[str, asyncio.Future[str | None]] = {}

    async def sync(
        self, path: str, until: asyncio.Future[Any], *, fd: int | None = None
    ) -> str | None:
        """Have the kernel write what it holds of a file, through a descriptor of its own.

        Args:
            path: of the file.
            until: nobody waits any longer once this is done.
            fd: the file itself, where its path may be another one's by now; stays the caller's.

        Returns:
            What went wrong, or None.

        Raises:
            HostFailure: it takes too long, or ``until`` came first. It goes on; the next call with
                this path waits for its end before it begins.
        """
        loop = asyncio.get_running_loop()
        due = loop.time() + self._timeout_s
        while (earlier := self._running.get(path)) is not None:
            await self._wait(earlier, path, until, due)
        # Not the descriptor itself: a lock that is on it would last as long as the process.
        name = path if fd is None else f"/proc/{os.getpid()}/fd/{fd}"
        running = self._running[path] = _start(name)
        running.add_done_callback(lambda _: self._running.pop(path))
        await self._wait(running, path, until, due)
        return running.result()

    async def _wait(
        self,
        running: asyncio.Future[str | None],
        path: str,
        until: asyncio.Future[Any],
        due: float,
    ) -> None:
        timeout_s = max(0.0, due - asyncio.get_running_loop().time())
        waiting: set[asyncio.Future[Any]] = {running, until}
        await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await asyncio.sleep(0)  # its callback has run by then
        elif until.done():
            raise HostFailure("worker_gone", f"{path}: the VM ended while this was synced")
        else:
            raise HostFailure(
                "disk_hangs",
                f"{path}: not synced within {self._timeout_s:g} s, and the disk keeps the file that"
                " it has. Syncing goes on: if the storage is slow, ask again; if it hangs, repair"
                " it, or kill the VM",
            )


def _start(name: str) -> asyncio.Future[str | None]:
    """Start the process.

    Raises:
        OSError: it cannot be started.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[str | None] = loop.create_future()
    errors_fd = os.memfd_create("sync", os.MFD_CLOEXEC)
    try:
        child = subprocess.Popen(
            ["sync", "--data", "--", name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors_fd,
            cwd="/",
            env={"PATH": os.defpath, "LC_ALL": "C"},
            start_new_session=True,
        )
    except OSError:
        os.close(errors_fd)
        raise
    try:
        pidfd = os.pidfd_open(child.pid)
    except OSError:
        os.close(errors_fd)
        child.kill()  # not waited for: the kernel may hold it
        raise
    child.returncode = 0  # it is reaped below, and not when this object goes

    def on_end() -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(child.pid, 0)
        text = os.pread(errors_fd, _ERROR_BYTES, 0).decode(errors="replace").strip()
        os.close(errors_fd)
        # "sync: error syncing 'PATH': Input/output error"
        ended.set_result((text.rpartition(": ")[2] or f"status {status}") if status else None)

    loop.add_reader(pidfd, on_end)
    return ended
