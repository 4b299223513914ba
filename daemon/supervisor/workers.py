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
import json
import logging
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .. import protocol
from ..errors import ProtocolError, WorkerError, WorkerGone
from ..protocol import MachineSpec, Status
from . import procfs
from .channel import Channel, Handlers
from .dirs import Layout
from .tasks import Tasks
from .zygotes import Forked, ZygoteClient

log = logging.getLogger(__name__)

# Status and tail of a worker that has died are small; more is not read.
MAX_LAST_WORDS_BYTES: Final = 64 * 1024
LOG_TAIL_BYTES: Final = 4096
LOG_TAIL_LINES: Final = 5
# The zygote reaps within milliseconds of the pidfd's becoming readable.
EXIT_STATUS_TIMEOUT_S: Final = 2.0
REAP_ATTEMPTS: Final = 10
REAP_INTERVAL_S: Final = 0.02
# SIGKILL works at once, unless the kernel itself hangs in a disk that does not answer.
KILL_TIMEOUT_S: Final = 15.0
QUIT_TIMEOUT_S: Final = 2.0
LISTEN_BACKLOG: Final = 8
# sockaddr_un.sun_path without its terminating NUL: unix(7).
MAX_SOCKET_PATH: Final = 107
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

    Threads: the event loop's.
    """

    def __init__(self, vm_id: str, forked: Forked, layout: Layout, pool: WorkerPool) -> None:
        self.vm_id = vm_id
        self.pid = forked.pid
        self.status: Status | None = None
        self.on_status: Callable[[Worker], None] = lambda _: None
        self._pidfd = forked.pidfd
        self._is_dying = False
        self._was_killed = False
        self._layout = layout
        self._pool = pool
        self._channel: Channel | None = None
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[Ending] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, self._on_death)

    def attach(self, sock: socket.socket) -> None:
        """Talk over a connected control socket from now on."""
        handlers = Handlers(self._on_reply, self._on_notice, self._on_hangup)
        self._channel = Channel(sock, f"worker {self.pid}", handlers)

    async def request(
        self,
        op: str,
        args: dict[str, Any] | None = None,
        fds: tuple[int, ...] = (),
        *,
        timeout_s: float,
    ) -> dict[str, Any]:
        """Ask the worker; the caller keeps ``fds``.

        Raises:
            WorkerError: refused, failed, gone or too late.
        """
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
        """Send SIGKILL; ``ended`` follows."""
        self._was_killed = True
        if not self._is_dying:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def wait_ended(self, timeout_s: float) -> Ending | None:
        """Wait for the end; None when the worker still lives after ``timeout_s``."""
        await asyncio.wait({self.ended}, timeout=timeout_s)
        return self.ended.result() if self.ended.done() else None

    async def quit(self) -> Ending | None:
        """End it in good order, or by force; None when even SIGKILL did not help in time."""
        if not self.ended.done():
            with contextlib.suppress(WorkerError):
                await self.request("quit", timeout_s=QUIT_TIMEOUT_S)
                await self.wait_ended(QUIT_TIMEOUT_S)
            self.kill()
        return await self.wait_ended(KILL_TIMEOUT_S)

    def release(self) -> None:
        """Let go of a worker that is to live on without this hosteld."""
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
        return True

    def _on_hangup(self) -> None:
        if not self.ended.done():
            log.info("worker hung up vm=%s pid=%d", self.vm_id, self.pid)

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
            sock = connect(runtime)
        except BlockingIOError:
            return self._find_by_pid(vm_id, known)  # nobody accepts: it lives, and hangs
        except OSError:
            # Nobody holds the socket, so no worker runs, unless it has not come to listen: the
            # socket listens before the fork.
            return None
        pid = await self._ask_pid(vm_id, sock, timeout_s)
        try:
            forked = None if pid is None else Forked(pid, os.pidfd_open(pid))
        except OSError:
            forked = None
        worker = self._find_by_pid(vm_id, known) if forked is None else self._adopt(vm_id, forked)
        if worker is not None:
            # An answer with the same pid after its pidfd was opened: the pidfd is the answerer's.
            with contextlib.suppress(WorkerError):
                await worker.request("status", timeout_s=timeout_s)
            if worker.status is not None and worker.status.pid != worker.pid:
                worker.release()
                worker = self._find_by_pid(vm_id, known)
        return worker

    async def _ask_pid(self, vm_id: str, sock: socket.socket, timeout_s: float) -> int | None:
        channel = Channel(sock, "a worker", _DEAF)
        try:
            message = await channel.request("status", timeout_s=timeout_s)
            return Status.decode(message.body["ok"]).pid
        except (WorkerError, ProtocolError) as err:
            log.warning("worker does not answer vm=%s error=%s", vm_id, err)
            return None
        finally:
            channel.close()

    def _adopt(self, vm_id: str, forked: Forked) -> Worker:
        worker = Worker(vm_id, forked, self._layout, self)
        try:
            worker.attach(connect(self._layout.vm_runtime(vm_id)))
        except OSError as err:
            log.warning("worker cannot be reached vm=%s error=%s", vm_id, err)
        return worker

    def _find_by_pid(self, vm_id: str, known: procfs.Identity | None) -> Worker | None:
        pidfd = None if known is None else procfs.open_if_same(known)
        if known is None or pidfd is None:
            return None
        return self._adopt(vm_id, Forked(known.pid, pidfd))

    def forget(self, vm_id: str) -> None:
        """Remove what a dead worker left in the runtime directory."""
        runtime = self._layout.vm_runtime(vm_id)
        try:
            connect(runtime).close()
        except OSError:
            # As it should be: nobody holds the socket any more.
            shutil.rmtree(runtime, ignore_errors=True)
            return
        log.error("a worker that nobody knows holds a control socket, kept path=%s", runtime)


@contextlib.contextmanager
def _short_path(directory: Path) -> Iterator[str]:
    """Yield a name of control.sock that fits sockaddr_un however deep it lies."""
    path = f"{directory}/control.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
        yield path
        return
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/control.sock"
    finally:
        os.close(fd)


def listen(runtime: Path) -> socket.socket:
    """Bind a fresh control socket; the worker inherits it, already listening.

    Raises:
        OSError: as bind(2).
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{runtime}/control.sock")  # noqa: PTH108 - see open_logs()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        with _short_path(runtime) as path:
            sock.bind(path)
        sock.listen(LISTEN_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def connect(runtime: Path) -> socket.socket:
    """Connect to a worker's control socket.

    Raises:
        OSError: as connect(2); BlockingIOError when its backlog is full.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    sock.setblocking(False)
    try:
        with _short_path(runtime) as path:
            sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


def open_logs(layout: Layout, vm_id: str, stack: contextlib.ExitStack) -> tuple[int, int, int]:
    """Open console.log, worker.log and last_words for a worker; ``stack`` closes them.

    Raises:
        OSError: no space, for one.
    """
    # Strings and not Paths: on the way of every start, Paths cost more than the system calls.
    state = str(layout.vm_state(vm_id))
    with contextlib.suppress(FileExistsError):
        os.mkdir(state, 0o700)  # noqa: PTH102
    append = os.O_RDWR | os.O_APPEND
    fds = []
    for path, flags in (
        (f"{state}/console.log", append),
        (f"{state}/worker.log", append),
        (f"{layout.vm_runtime(vm_id)}/last_words", os.O_RDWR | os.O_TRUNC),
    ):
        fds.append(os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        stack.callback(os.close, fds[-1])
    return fds[0], fds[1], fds[2]


def read_last_words(runtime: Path) -> Status | None:
    """Return the Status that a worker left, None when it left none."""
    try:
        with (runtime / "last_words").open("rb") as file:
            data = file.read(MAX_LAST_WORDS_BYTES)
        return Status.decode(json.loads(data)) if data else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ProtocolError) as err:
        log.warning("last words not understood path=%s error=%s", runtime, err)
        return None


def log_tail(path: Path) -> tuple[str, ...]:
    """Return the last lines of a worker's log."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LOG_TAIL_BYTES))
            text = file.read(LOG_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ()
    return tuple(line[:300] for line in text.splitlines()[-LOG_TAIL_LINES:])
