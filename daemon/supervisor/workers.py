# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Workers as hosteld sees them: spawned or adopted, asked, watched, and gone.

A worker outlives hosteld, so all that is needed to find it again lies in its runtime directory:
control.sock to talk to it, last_words to learn how it ended. When it does not talk, it is
recognised by what the database notes of it: pid, start time and boot.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from .. import protocol
from ..errors import ProtocolError, WorkerError, WorkerGone
from ..protocol import MachineSpec, Status
from . import procfs
from .backends import Backends
from .channel import Channel, Handlers
from .dirs import Layout
from .tasks import Tasks
from .worker_files import connect, listen, log_tail, open_logs, read_last_words
from .zygotes import Forked, ZygoteClient

log = logging.getLogger(__name__)

# The zygote reaps within milliseconds of the pidfd's becoming readable.
EXIT_STATUS_TIMEOUT_S: Final = 2.0
REAP_ATTEMPTS: Final = 10
REAP_INTERVAL_S: Final = 0.02
# SIGKILL works at once, unless the kernel itself hangs in a disk that does not answer.
KILL_TIMEOUT_S: Final = 15.0
QUIT_TIMEOUT_S: Final = 2.0
# A worker that hung up and lives is connected to again after 0.05 s, 0.1 s ... 5 s.
FIRST_BACKOFF_S: Final = 0.05
MAX_BACKOFF_S: Final = 5.0
# A connection that held this long was a good one.
SETTLED_S: Final = 10.0
RECONNECT_TIMEOUT_S: Final = 3.0
_DEAF: Final = Handlers(lambda *_: None, lambda *_: None, lambda: None)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a worker ended.

    Attributes:
        wait_status: as os.waitpid gives it; None when nobody knows it.
        last_words: what it left, None when it had no time to.
        log_tail: the last lines of its own log.
    """

    wait_status: int | None
    last_words: Status | None
    log_tail: tuple[str, ...]


class Worker:
    """A worker process that lives, or has just died.

    Attributes:
        status: the newest it has told, by reply or by notice, in the order of the socket.
        ended: done when the process has gone; never fails.
        is_known: hosteld forked it, or the database noted it. Of any other process there is only
            its own word for its pid, and hosteld may be root: such a pid is never sent a signal.
        unreachable: why there is no talking to it; None while there is a connection.

    Threads: the event loop's.
    """

    def __init__(
        self,
        vm_id: str,
        forked: Forked,
        layout: Layout,
        pool: WorkerPool,
        *,
        is_known: bool = True,
    ) -> None:
        self.vm_id = vm_id
        self.pid = forked.pid
        self.is_known = is_known
        self.unreachable: str | None = None
        self.status: Status | None = None
        self._told = asyncio.Event()  # set by each status, and by the end
        self.on_status: Callable[[Worker], None] = lambda _: None
        self._pidfd = forked.pidfd
        self._is_dying = False
        self._is_released = False
        self._was_killed = False
        self._layout = layout
        self._pool = pool
        self._channel: Channel | None = None
        self._attached_at = 0.0
        self._backoff_s = FIRST_BACKOFF_S
        self._reconnecting: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[Ending] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, self._on_death)

    def attach(self, sock: socket.socket) -> None:
        """Talk over a connected control socket from now on."""
        handlers = Handlers(self._on_reply, self._on_notice, self._on_hangup)
        self._channel = Channel(sock, f"worker {self.pid}", handlers)
        self._attached_at = self._loop.time()
        self.unreachable = None

    def cut_off(self, why: str) -> None:
        """Stop talking to what answers in its name; it can still be watched and killed."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self.status = None
        self.unreachable = why

    async def request(
        self,
        op: str,
        args: dict[str, Any] | None = None,
        fds: tuple[int, ...] = (),
        *,
        timeout_s: float,
    ) -> dict[str, Any]:
        """Ask the worker; the caller keeps ``fds``. A connection that comes back is waited for.

        Raises:
            WorkerError: refused, failed, gone or too late.
        """
        if self._reconnecting is not None:
            begun = self._loop.time()
            waiting_s = min(timeout_s, RECONNECT_TIMEOUT_S)
            await asyncio.wait({self._reconnecting}, timeout=waiting_s)
            timeout_s = max(0.0, timeout_s - (self._loop.time() - begun))
        return await self._ask(op, args, fds, timeout_s=timeout_s)

    async def _ask(
        self,
        op: str,
        args: dict[str, Any] | None = None,
        fds: tuple[int, ...] = (),
        *,
        timeout_s: float,
    ) -> dict[str, Any]:
        if self._channel is None:
            raise WorkerGone(f"worker {self.pid} does not answer on its control socket")
        message = await self._channel.request(op, args, fds, timeout_s=timeout_s)
        protocol.close_all(message.fds)
        ok: dict[str, Any] = message.body["ok"]
        return ok

    async def launch(self, spec: MachineSpec, fds: tuple[int, ...], *, timeout_s: float) -> None:
        """Have the machine built and started; ``status`` tells of it.

        Raises:
            WorkerError: as request().
        """
        await self.request("launch", spec.encode(), fds, timeout_s=timeout_s)

    def kill(self) -> None:
        """Send SIGKILL, or to a worker that is not known ``quit``; ``ended`` follows."""
        self._was_killed = True
        if self._is_dying:
            return
        if not self.is_known:
            self._pool.tasks.spawn(self._ask_to_quit(), f"quit {self.pid}")
        else:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def wait_ended(self, timeout_s: float) -> Ending | None:
        """Wait for the end; None when the worker still lives after ``timeout_s``."""
        await asyncio.wait({self.ended}, timeout=timeout_s)
        return self.ended.result() if self.ended.done() else None

    async def wait_status(self, claim: Callable[[Status], bool], timeout_s: float) -> bool:
        """Wait until a status fulfils ``claim``; False when none did in time, or it ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self.ended.done() and not (self.status and claim(self.status)):
                    self._told.clear()
                    await self._told.wait()
        return self.status is not None and claim(self.status)

    async def quit(self) -> Ending | None:
        """End it in good order, or by force; None when even SIGKILL did not help in time."""
        if not self.ended.done():
            await self._ask_to_quit()
            self.kill()
        return await self.wait_ended(KILL_TIMEOUT_S if self.is_known else QUIT_TIMEOUT_S)

    async def _ask_to_quit(self) -> None:
        with contextlib.suppress(WorkerError):
            await self.request("quit", timeout_s=QUIT_TIMEOUT_S)
            await self.wait_ended(QUIT_TIMEOUT_S)

    def release(self) -> None:
        """Let go of a worker that is to live on without this hosteld."""
        self._is_released = True
        if self._channel is not None:
            self._channel.close()
        if not self._is_dying:
            self._unwatch()
            os.close(self._pidfd)

    # --- what the worker tells

    def _on_reply(self, _op: str, reply: dict[str, Any]) -> None:
        if "state" in reply:
            self._take_status(reply)

    def _on_notice(self, notice: str, data: dict[str, Any]) -> None:
        if notice == "state" and self._take_status(data):
            self.on_status(self)

    def _take_status(self, data: dict[str, Any]) -> bool:
        try:
            self.status = Status.decode(data)
        except ProtocolError as err:
            log.warning("status not understood vm=%s error=%s", self.vm_id, err)
            return False
        self._told.set()
        return True

    def _on_hangup(self) -> None:
        if self._is_dying or self._is_released:
            return
        self.unreachable = "it closed its control connection"
        log.info("worker hung up vm=%s pid=%d", self.vm_id, self.pid)
        if self._loop.time() - self._attached_at > SETTLED_S:
            self._backoff_s = FIRST_BACKOFF_S
        self.reconnect()

    # --- a new connection

    def reconnect(self) -> None:
        """Connect again in the background, for as long as the worker lives and has to be asked."""
        if self._reconnecting is None:
            self._reconnecting = self._pool.tasks.spawn(self._reconnect(), f"reconnect {self.pid}")

    async def _reconnect(self) -> None:
        try:
            while self._is_wanting():
                # A worker that ends hangs up first: its end comes within this time.
                await self.wait_ended(self._backoff_s)
                self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)
                if self._is_wanting():
                    await self._reconnect_once()
        finally:
            self._reconnecting = None

    def _is_wanting(self) -> bool:
        is_connected = self._channel is not None and self._channel.is_open
        return not (is_connected or self._is_dying or self._is_released)

    async def _reconnect_once(self) -> None:
        try:
            self.attach(connect(self._layout.vm_runtime(self.vm_id)))
            await self._ask("status", timeout_s=RECONNECT_TIMEOUT_S)
        except (WorkerError, OSError) as err:
            log.debug("worker not reached vm=%s pid=%d error=%s", self.vm_id, self.pid, err)
            return
        if self.status is not None and self.status.pid != self.pid:
            self.cut_off(f"process {self.status.pid} answers in its name")
            return
        log.info("worker connected again vm=%s pid=%d", self.vm_id, self.pid)
        self.on_status(self)

    # --- its death

    def _on_death(self) -> None:
        self._is_dying = True
        self._unwatch()
        self._pool.tasks.spawn(self._collect(), f"worker-end {self.pid}")

    def _unwatch(self) -> None:
        self._loop.remove_reader(self._pidfd)

    async def _collect(self) -> None:
        if self._channel is not None:
            # Its last notices are still in the socket, and they belong before the end.
            self._channel.drain()
            self._channel.close()
        wait_status = await self._exit_status()
        os.close(self._pidfd)
        self.ended.set_result(
            Ending(
                wait_status,
                read_last_words(self._layout.vm_runtime(self.vm_id)),
                log_tail(self._layout.vm_state(self.vm_id) / "worker.log"),
            )
        )
        self._told.set()

    async def _exit_status(self) -> int | None:
        """Ask the zygote, which is its parent, or for an adopted worker the kernel."""
        status = await self._pool.zygote.exit_status(self.pid, EXIT_STATUS_TIMEOUT_S)
        # Nobody asks how a worker ended that was killed on purpose.
        attempts = 0 if self._was_killed else REAP_ATTEMPTS
        for _ in range(attempts):
            if status is not None:
                break
            # Known once its new parent has reaped it.
            status = procfs.exit_status(self._pidfd)
            if status is None:
                await asyncio.sleep(REAP_INTERVAL_S)
        return status


class WorkerPool:
    """Makes workers: by the zygote, or by finding them again.

    Threads: the event loop's.
    """

    def __init__(self, layout: Layout, zygote: ZygoteClient, tasks: Tasks) -> None:
        self.zygote = zygote
        self.tasks = tasks
        self.backends = Backends(layout)
        self._layout = layout

    async def spawn(self, vm_id: str) -> Worker:
        """Fork a worker and connect to it.

        Raises:
            WorkerError: no worker to be had.
            OSError: its files cannot be made.
        """
        try:
            return await self._spawn_once(vm_id)
        except WorkerGone:
            # The zygote died over it; a new one is coming up.
            await self._end_orphan(vm_id)
            return await self._spawn_once(vm_id)

    async def _spawn_once(self, vm_id: str) -> Worker:
        runtime = self._layout.vm_runtime(vm_id)
        runtime.mkdir(mode=0o700, exist_ok=True)
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(listen(runtime))
            fds = (listener.fileno(), *open_logs(self._layout, vm_id, stack))
            forked = await self.zygote.fork(vm_id, fds)
        worker = Worker(vm_id, forked, self._layout, self)
        try:
            worker.attach(connect(runtime))
        except OSError as err:
            worker.kill()
            raise WorkerError("spawn_failed", f"worker {forked.pid}: {err}") from err
        return worker

    async def _end_orphan(self, vm_id: str) -> None:
        """End a worker that the zygote may have forked with its last breath."""
        try:
            sock = connect(self._layout.vm_runtime(vm_id))
        except OSError:
            return
        channel = Channel(sock, "an orphan", _DEAF)
        try:
            with contextlib.suppress(WorkerError):
                await channel.request("quit", timeout_s=QUIT_TIMEOUT_S)
        finally:
            channel.close()

    async def find(
        self, vm_id: str, known: procfs.Identity | None, timeout_s: float
    ) -> Worker | None:
        """Find the worker of an earlier hosteld; None when there is none that lives.

        A worker that lives but does not answer is returned without a status: reported, not killed.

        Args:
            vm_id: of the VM.
            known: what the database notes of the worker.
            timeout_s: how long it has to answer.
        """
        runtime = self._layout.vm_runtime(vm_id)
        try:
            connect(runtime).close()
        except ConnectionRefusedError:
            # Nobody holds the socket, so no worker runs, unless it has not come to listen: the
            # socket listens before the fork.
            return None
        except OSError as err:
            # Its files may have been removed under it, or it hangs: neither ends a guest.
            return self._find_by_pid(vm_id, known, f"{runtime}/control.sock: {err.strerror}")
        worker = self._find_by_pid(vm_id, known)
        if worker is None:
            return await self._find_by_word(vm_id, timeout_s)
        with contextlib.suppress(WorkerError):
            await worker.request("status", timeout_s=timeout_s)
        if worker.status is not None and worker.status.pid != worker.pid:
            worker.cut_off(f"process {worker.status.pid} answers in its name")
        return worker

    async def _find_by_word(self, vm_id: str, timeout_s: float) -> Worker | None:
        """Take over a worker that nothing is known of but what it says itself."""
        pid = await self._ask_pid(vm_id, timeout_s)
        try:
            forked = None if pid is None else Forked(pid, os.pidfd_open(pid))
        except OSError as err:
            log.warning("worker told no pid of a process vm=%s pid=%s error=%s", vm_id, pid, err)
            forked = None
        if forked is None:
            await self._end_orphan(vm_id)
            return None
        worker = self._adopt(vm_id, forked, is_known=False)
        with contextlib.suppress(WorkerError):
            await worker.request("status", timeout_s=timeout_s)
        return worker

    async def _ask_pid(self, vm_id: str, timeout_s: float) -> int | None:
        channel: Channel | None = None
        try:
            channel = Channel(connect(self._layout.vm_runtime(vm_id)), "a worker", _DEAF)
            message = await channel.request("status", timeout_s=timeout_s)
            return Status.decode(message.body["ok"]).pid
        except (WorkerError, ProtocolError, OSError) as err:
            log.warning("worker does not answer vm=%s error=%s", vm_id, err)
            return None
        finally:
            if channel is not None:
                channel.close()

    def _adopt(self, vm_id: str, forked: Forked, *, is_known: bool) -> Worker:
        worker = Worker(vm_id, forked, self._layout, self, is_known=is_known)
        try:
            worker.attach(connect(self._layout.vm_runtime(vm_id)))
        except OSError as err:
            log.warning("worker cannot be reached vm=%s error=%s", vm_id, err)
            worker.cut_off(f"its control socket: {err.strerror}")
            worker.reconnect()
        return worker

    def _find_by_pid(
        self, vm_id: str, known: procfs.Identity | None, why: str | None = None
    ) -> Worker | None:
        pidfd = None if known is None else procfs.open_if_same(known)
        if known is None or pidfd is None:
            return None
        worker = self._adopt(vm_id, Forked(known.pid, pidfd), is_known=True)
        if why is not None and worker.unreachable is not None:
            worker.unreachable = why
        return worker

    def forget(self, vm_id: str) -> None:
        """Remove what a dead worker left: its back ends, and its part of the runtime directory."""
        self.backends.end(vm_id)
        runtime = self._layout.vm_runtime(vm_id)
        try:
            connect(runtime).close()
        except (ConnectionRefusedError, FileNotFoundError):
            # As it should be: nobody holds the socket any more.
            shutil.rmtree(runtime, ignore_errors=True)
            return
        except OSError as err:
            log.error("control socket kept path=%s error=%s", runtime, err.strerror)
            return
        log.error("a worker that nobody knows holds a control socket, kept path=%s", runtime)
