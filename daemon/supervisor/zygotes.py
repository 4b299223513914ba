# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The zygote as hosteld sees it: forks on demand, exit statuses, and a new one when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .. import protocol
from ..errors import WorkerError
from .channel import Channel, Handlers
from .tasks import Tasks

log = logging.getLogger(__name__)

FORK_TIMEOUT_S: Final = 30.0
# To import the worker takes 0.3 s here, and twenty times that on an emulated host.
HELLO_TIMEOUT_S: Final = 60.0
# A zygote that dies again and again: wait 0.1 s, 0.2 s ... and leave it after this many; then only
# a fork that is asked for tries once more.
MAX_RESTARTS: Final = 6
FIRST_BACKOFF_S: Final = 0.1
# One that lived this long has not failed to start.
SETTLED_S: Final = 10.0
# Exit statuses of workers that nobody has asked for yet.
MAX_KEPT_EXITS: Final = 4096

Respawn = Callable[[], tuple[socket.socket, int]]


@dataclass(frozen=True, slots=True)
class Forked:
    """A new worker process; the pidfd is the receiver's."""

    pid: int
    pidfd: int


class ZygoteClient:
    """Forks workers through a zygote, and replaces a zygote that has died.

    Args:
        sock: hosteld's end of the zygote's socket; owned from here on.
        pid: the zygote's process id, a child of this process.
        tasks: where the replacement runs.
        respawn: how a replacement is started.

    Threads: the event loop's.
    """

    def __init__(
        self, sock: socket.socket, pid: int, tasks: Tasks, respawn: Respawn | None = None
    ) -> None:
        self._tasks = tasks
        self._respawn = respawn or spawn_zygote
        self._exits: dict[int, asyncio.Future[int]] = {}
        self._pid = pid
        self._is_closing = False
        self._failures = 0
        self._restart: asyncio.Task[None] | None = None
        # Set by a zygote's hello, and when there will be none.
        self._greeted = asyncio.Event()
        self._attach(sock, pid)

    @property
    def pid(self) -> int:
        """Process id of the present zygote, 0 while there is none."""
        return self._pid

    async def wait_hello(self) -> None:
        """Wait until a zygote can fork, this one or one of those that replace it.

        Raises:
            WorkerError: each of them ended, or said nothing in time.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                await self._greeted.wait()
        if self._is_down or not self._greeted.is_set():
            raise WorkerError("zygote_gone", "no zygote starts; the log above says why")

    async def fork(self, vm_id: str, fds: tuple[int, ...]) -> Forked:
        """Fork a worker with the four descriptors of the protocol; the caller keeps its own.

        Raises:
            WorkerGone: the zygote died over it. It may have forked first: then a worker holds the
                listener, and nobody knows its pid.
            WorkerError: no process, or no zygote, to be had.
        """
        await self._ready()
        reply = await self._channel.request("fork", {"vm": vm_id}, fds, timeout_s=FORK_TIMEOUT_S)
        if len(reply.fds) != 1:
            protocol.close_all(reply.fds)
            raise WorkerError("protocol", "the zygote sent no pidfd")
        return Forked(int(reply.body["ok"]["pid"]), reply.fds[0])

    async def exit_status(self, pid: int, timeout_s: float) -> int | None:
        """Return the wait status of a worker that has died, None when it cannot be known."""
        future = self._exits.get(pid)
        if future is None:
            return None
        await asyncio.wait({future}, timeout=timeout_s)
        self._exits.pop(pid, None)
        return future.result() if future.done() and not future.cancelled() else None

    async def close(self) -> None:
        """End the zygote; its workers live on."""
        self._is_closing = True
        if self._restart is not None:
            self._restart.cancel()
        self._channel.close()
        await self._reap()

    async def _reap(self) -> None:
        # Forgotten first: once it is collected the pid may become another process's.
        pid, self._pid = self._pid, 0
        if pid:
            await asyncio.to_thread(_reap, pid)

    def _attach(self, sock: socket.socket, pid: int) -> None:
        self._pid = pid
        self._is_down = False
        self._born = time.monotonic()
        handlers = Handlers(self._on_reply, self._on_notice, self._on_close, _end_late)
        self._channel = Channel(sock, "the zygote", handlers)

    def _on_reply(self, op: str, reply: dict[str, Any]) -> None:
        # At once, and not when fork() goes on: the notice of this very worker's exit may be the
        # next message.
        if op == "fork" and isinstance(reply.get("pid"), int):
            self._exits[reply["pid"]] = asyncio.get_running_loop().create_future()
            while len(self._exits) > MAX_KEPT_EXITS:
                self._exits.pop(next(iter(self._exits))).cancel()

    def _on_notice(self, notice: str, data: dict[str, Any]) -> None:
        if notice == "hello":
            self._greeted.set()
        future = self._exits.get(data.get("pid", -1)) if notice == "exited" else None
        if future is not None and not future.done():
            future.set_result(int(data.get("status", 0)))

    async def _ready(self) -> None:
        """Wait for a zygote.

        Raises:
            WorkerError: none can be started.
        """
        if self._is_down:
            self._replace()
        if self._restart is not None:
            try:
                await asyncio.shield(self._restart)
            except OSError as err:
                raise WorkerError("zygote_gone", f"no zygote can be started: {err}") from err

    def _on_close(self) -> None:
        """Take note of the zygote's death; called by the channel."""
        self._is_down = True
        self._greeted.clear()
        lived_s = time.monotonic() - self._born
        self._failures = 1 if lived_s > SETTLED_S else self._failures + 1
        log.error("zygote died pid=%d lived_s=%.1f", self._pid, lived_s)
        # Nobody will tell how its workers end; whoever waits for that learns it now.
        for future in self._exits.values():
            future.cancel()
        self._exits.clear()
        if self._failures <= MAX_RESTARTS:
            self._replace()
        else:
            self._greeted.set()

    def _replace(self) -> None:
        """Start a replacement, unless one is on its way."""
        if self._restart is None and not self._is_closing:
            self._restart = self._tasks.spawn(self._run_replacement(), "zygote-restart")

    async def _run_replacement(self) -> None:
        try:
            await self._reap()
            if self._failures > 1:
                exponent = min(self._failures, MAX_RESTARTS) - 2
                await asyncio.sleep(FIRST_BACKOFF_S * 2**exponent)
            try:
                sock, pid = self._respawn()
            except OSError:
                self._greeted.set()
                raise
            self._attach(sock, pid)
            log.warning("zygote restarted pid=%d", pid)
        finally:
            self._restart = None


def spawn_zygote() -> tuple[socket.socket, int]:
    """Start a zygote as a fresh process: hosteld has grown too large to fork one off itself.

    Raises:
        OSError: no socket pair, or no process, to be had.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    root = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    env = {**os.environ, "PYTHONPATH": f"{root}:{path}" if path else root}
    with theirs:
        theirs.set_inheritable(True)
        argv = [sys.executable, "-m", "daemon.zygote", "--fd", str(theirs.fileno())]
        try:
            pid = os.posix_spawn(sys.executable, argv, env)
        except OSError:
            ours.close()
            raise
    return ours, pid


def _end_late(late: protocol.Message) -> None:
    """End a worker that was forked for someone who has stopped waiting for it."""
    for pidfd in late.fds:
        log.warning("worker forked too late, killed")
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    protocol.close_all(late.fds)


def _reap(pid: int) -> None:
    """Make sure that a zygote whose socket is closed has ended, and collect it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
