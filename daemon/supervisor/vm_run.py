# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What makes a VM run and stop: launch, stop, kill, pause, and keeping up with its worker.

The lock of a VM is held for the whole of each action. Kill alone does not wait for it: it asks for
the end and sends the signal, so that whoever holds the lock sees the worker end and lets go.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NoReturn

from api.errors import ApiError, Conflict, HostFailure
from api.models.vms import StopRequest, VmAction, VmState

from ..errors import WorkerError, WorkerGone
from ..protocol import MachineSpec
from . import lifecycle, procfs
from .backend_recovery import Recovery
from .config import Config
from .endings import judge
from .faults import refusal, start_failure
from .file_sync import FileSyncs
from .launch import FdBag, prepare
from .library import Library
from .news import compare, counted, last_told, take_over
from .operations import Job
from .records import ReasonRecord, VmRecord, now
from .tasks import Tasks
from .vm_table import VmEntry, VmTable, reason
from .workers import KILL_TIMEOUT_S, Ending, Worker, WorkerPool

log = logging.getLogger(__name__)

# More at once only fight for the processors: a launch is mostly computing.
LAUNCHES_PER_CPU: Final = 4
# A worker that ends closes its connection a moment before.
END_GRACE_S: Final = 1.0

_ARRIVALS: Final = {
    VmState.RUNNING: "resumed",
    VmState.PAUSED: "paused",
    VmState.CRASHED: "crashed",
}
_OPS: Final = {
    VmAction.PAUSE: "pause",
    VmAction.RESUME: "resume",
    VmAction.RESET: "reset",
    VmAction.CTRL_ALT_DEL: "ctrl_alt_del",
}


@dataclass(frozen=True, slots=True)
class Request:
    """Who wants something of a VM.

    Attributes:
        actor: for events.
        if_match: the version that the VM must have, or None.
        at_ns: CLOCK_MONOTONIC when the request came.
    """

    actor: str
    if_match: int | None
    at_ns: int


class VmRunner:
    """Acts on VMs.

    Attributes:
        syncs: makes files of disks durable.

    Threads: the event loop's.
    """

    def __init__(
        self, config: Config, table: VmTable, pool: WorkerPool, library: Library, tasks: Tasks
    ) -> None:
        self._config = config
        self._table = table
        self._pool = pool
        self._library = library
        self._tasks = tasks
        self._recovery = Recovery(table, pool.backends, tasks)
        self.syncs = FileSyncs(config.sync_timeout_s)
        self._slots = asyncio.Semaphore(LAUNCHES_PER_CPU * (os.cpu_count() or 1))

    # --- start

    async def start(self, entry: VmEntry, request: Request) -> None:
        """Start a VM that is at rest.

        Raises:
            ApiError: its state does not allow it, something it needs is missing or in use, or the
                worker could not build the machine; then its state says why.
        """
        self._check(entry, VmAction.START, request)
        async with entry.lock:
            self._check(entry, VmAction.START, request)
            if entry.worker is not None:
                await self._end_worker(entry, entry.worker)
                entry.worker = None
            with FdBag() as bag:
                spec = await self.open_all(entry.record, request, bag)
                intend = partial(
                    self._table.commit,
                    entry,
                    state=VmState.STARTING,
                    reason=None,
                    started_at=None,
                    boot_time_us=None,
                    watchdog_expired=0,
                    worker=None,
                    disk_errors={},
                )
                await self.launch(entry, spec, bag, intend, request)

    async def open_all(self, record: VmRecord, request: Request, bag: FdBag) -> MachineSpec:
        """Open all that a VM needs into ``bag``.

        Raises:
            ApiError: as launch.prepare().
        """
        backends = self._pool.backends
        await backends.gone(record.id)
        try:
            return await prepare(
                record,
                self._library.boot(record),
                kvm_device=self._config.kvm_device,
                requested_ns=request.at_ns,
                bag=bag,
                backends=backends,
            )
        except BaseException:
            self._pool.forget(record.id)
            raise

    async def launch(
        self,
        entry: VmEntry,
        spec: MachineSpec,
        bag: FdBag,
        intend: Callable[[], Awaitable[None]],
        request: Request,
    ) -> None:
        """Fork a worker while ``intend`` commits that the VM starts, then have it run.

        The caller holds the lock.

        Raises:
            ApiError: it does not run; its state says why.
            StoreFull: ``intend`` could not be kept, and there is no worker.
        """
        entry.kill_requested = False
        async with self._slots:
            forking = self._tasks.spawn(self._pool.spawn(entry.record.id), "fork")
            try:
                await intend()
            except BaseException:
                await self._discard(entry.record.id, forking)
                raise
            try:
                worker = await forking
                self.watch(entry, worker)
                if entry.kill_requested:
                    worker.kill()
                timeout_s = self._config.launch_timeout_s
                await worker.launch(spec, tuple(bag.fds), timeout_s=timeout_s)
            except (WorkerError, OSError) as err:
                await self._fail_start(entry, err, request)
        log.info("vm started vm=%s pid=%d", entry.record.name, worker.pid)
        changes: dict[str, Any] = {
            "state": VmState.RUNNING,
            "started_at": now(),
            "worker": procfs.identify(worker.pid),
        }
        events = [entry.event("started", request.actor)]
        # A tiny guest is up before its launch is answered: one commit for both. What else the
        # worker has told waits for the lock, in _sync().
        entry.resets = 0
        boot_time_us = None if worker.status is None else worker.status.boot_time_us
        if boot_time_us is not None:
            changes["boot_time_us"] = boot_time_us
            events.append(entry.event("booted", boot_time_us=boot_time_us))
        await self._table.record(entry, *events, **changes)

    async def _discard(self, vm_id: str, forking: asyncio.Task[Worker]) -> None:
        """End a worker that nobody knows of yet."""
        try:
            worker = await asyncio.shield(forking)
        except (WorkerError, OSError) as err:
            log.debug("no worker to discard error=%s", err)
            self._pool.backends.end(vm_id)
            return
        worker.kill()
        await worker.wait_ended(KILL_TIMEOUT_S)
        self._pool.forget(worker.vm_id)

    async def _fail_start(
        self, entry: VmEntry, err: WorkerError | OSError, request: Request
    ) -> NoReturn:
        """Clean up after a launch that failed, and say so.

        Raises:
            ApiError: always.
        """
        worker, was_killed = entry.worker, entry.kill_requested
        ending: Ending | None = None
        if worker is not None:
            if isinstance(err, WorkerGone):
                ending = await worker.wait_ended(END_GRACE_S)
            if ending is None:
                worker.kill()
                ending = await worker.wait_ended(KILL_TIMEOUT_S)
        entry.kill_requested = False
        self._pool.forget(entry.record.id)
        why = reason("start_failed", f"it did not start: {err}")
        state = VmState.STOPPED
        if isinstance(err, WorkerGone) and ending is not None:
            verdict = judge(ending, was_killed=was_killed)
            state, why = verdict.state, verdict.reason or why
        log.warning("vm start failed vm=%s error=%s", entry.record.name, err)
        event = entry.event("start_failed", request.actor, code=why.code, message=why.message)
        await self._table.record(entry, event, state=state, reason=None if was_killed else why)
        entry.worker = None
        if was_killed:
            raise Conflict(
                "killed",
                f"VM {entry.record.name} was killed while it started",
                state=entry.record.state.value,
                allowed=[action.value for action in lifecycle.allowed_actions(entry.record.state)],
            ) from err
        raise start_failure(err, entry.record.name, why.message) from err

    def watch(self, entry: VmEntry, worker: Worker) -> None:
        """Make a worker a VM's own, and keep up with what it tells and how it ends."""
        entry.worker = worker
        entry.resets = None if worker.status is None else worker.status.resets
        worker.on_status = lambda _: self._spawn_sync(entry, worker)
        worker.ended.add_done_callback(
            lambda _: self._tasks.spawn(self._on_ended(entry, worker), "vm-ended")
        )
        self._recovery.check(entry, worker)  # what was lost while no hosteld looked

    # --- stop and kill

    async def stop(self, entry: VmEntry, stop: StopRequest, job: Job, request: Request) -> None:
        """Press the power button, wait, and kill if that was allowed and is needed.

        Raises:
            ApiError: its state does not allow it, or the guest runs on.
        """
        self._check(entry, VmAction.STOP, request)
        async with entry.lock:
            self._check(entry, VmAction.STOP, request)
            worker = self._worker(entry)
            event = entry.event("stopping", request.actor)
            await self._table.commit(entry, event, state=VmState.STOPPING, reason=None)
            ending, problem = await self._power_off(worker, stop.timeout_s)
            forced: ReasonRecord | None = None
            if ending is None and stop.force:
                job.note(f"{problem}; killing it")
                forced = reason("stop_forced", f"{problem}, so it was killed")
                ending = await self._kill(entry, worker)
            if ending is not None:
                await self.settle(entry, worker, ending, request.actor, asked=True, forced=forced)
                return
            await self._table.record(
                entry, entry.event("stop_failed", request.actor), state=VmState.RUNNING
            )
            await self.keep_up(entry)
            raise HostFailure(
                "stop_timeout",
                f"VM {entry.record.name}: {problem} and runs on; stop it with force, or kill it",
            )

    async def _power_off(self, worker: Worker, timeout_s: float) -> tuple[Ending | None, str]:
        """Return the worker's end, or None with what went wrong."""
        try:
            await worker.request("power_button", timeout_s=self._config.request_timeout_s)
        except WorkerError as err:
            # One that has hung up most likely ends right now.
            is_gone = isinstance(err, WorkerGone)
            ending = await worker.wait_ended(END_GRACE_S) if is_gone else None
            return ending, f"its power button cannot be pressed ({err})"
        ending = await worker.wait_ended(timeout_s)
        return ending, f"the guest did not power off within {timeout_s:g} s"

    async def kill(self, entry: VmEntry, request: Request) -> None:
        """End a VM at once, whatever it is doing.

        Raises:
            ApiError: its state does not allow it, or the kernel cannot end the process.
        """
        entry.check_version(request.if_match)
        lifecycle.check_action(entry.record.name, entry.record.state, VmAction.KILL)
        self.request_kill(entry)
        async with entry.lock:
            entry.check_present()
            await self.finish_kill(entry, request.actor)

    def request_kill(self, entry: VmEntry) -> None:
        """Send the signal now; whoever holds the lock sees the end."""
        entry.kill_requested = True
        if entry.worker is not None:
            entry.worker.kill()

    async def finish_kill(self, entry: VmEntry, actor: str) -> None:
        """Bring a VM to rest; the caller holds the lock.

        Raises:
            HostFailure: the kernel cannot end the process.
        """
        worker = entry.worker
        if worker is not None:
            ending = await self._kill(entry, worker)
            if ending is None:
                raise HostFailure(
                    "worker_unkillable",
                    f"VM {entry.record.name}: process {worker.pid} does not end by SIGKILL; the"
                    " kernel is stuck, most likely in a disk that does not answer",
                )
            await self.settle(entry, worker, ending, actor, asked=True)
        elif entry.record.state is VmState.CRASHED:
            event = entry.event("stopped", actor, reason=None)
            await self._table.record(entry, event, state=VmState.STOPPED, reason=None)
        entry.kill_requested = False

    async def _kill(self, entry: VmEntry, worker: Worker) -> Ending | None:
        entry.kill_requested = True
        worker.kill()
        return await worker.wait_ended(KILL_TIMEOUT_S)

    async def _end_worker(self, entry: VmEntry, worker: Worker) -> None:
        """End what is left of a crashed VM."""
        worker.kill()
        if await worker.wait_ended(KILL_TIMEOUT_S) is None:
            raise HostFailure(
                "worker_unkillable",
                f"VM {entry.record.name}: its old process {worker.pid} does not end by SIGKILL",
            )
        self._pool.forget(entry.record.id)

    # --- pause, resume, reset, ctrl-alt-del

    async def act(self, entry: VmEntry, action: VmAction, request: Request) -> None:
        """Do what the worker does at once.

        Raises:
            ApiError: the state does not allow it, or the worker does not do it.
        """
        self._check(entry, action, request)
        async with entry.lock:
            self._check(entry, action, request)
            await self.ask(entry, _OPS[action])
            await self.keep_up(entry, request.actor)

    async def ask(
        self,
        entry: VmEntry,
        op: str,
        args: dict[str, Any] | None = None,
        fds: tuple[int, ...] = (),
    ) -> dict[str, Any]:
        """Ask a VM's worker; when that has died, say how.

        Raises:
            ApiError: it failed, does not answer, or has died.
        """
        worker = self._worker(entry)
        try:
            return await worker.request(op, args, fds, timeout_s=self._config.request_timeout_s)
        except WorkerGone as err:
            ending = await worker.wait_ended(END_GRACE_S)
            if ending is None:
                raise HostFailure(err.code, f"VM {entry.record.name}: {err}") from err
            why = judge(ending, was_killed=entry.kill_requested).reason
            text = "it has ended" if why is None else why.message
            raise HostFailure(err.code, f"VM {entry.record.name}: {text}") from err
        except WorkerError as err:
            raise refusal(err, f"VM {entry.record.name}: {op}", entry.record.state) from err

    # --- keeping up with the worker

    def _spawn_sync(self, entry: VmEntry, worker: Worker) -> None:
        self._recovery.check(entry, worker)
        # One takes over all that was told until it runs: a chatty worker is not to fill memory.
        if not entry.sync_pending:
            entry.sync_pending = True
            self._tasks.spawn(self._sync(entry, worker), "vm-sync")

    async def _sync(self, entry: VmEntry, worker: Worker) -> None:
        async with entry.lock:
            entry.sync_pending = False
            if entry.worker is worker:
                await self.keep_up(entry)
            elif entry.worker is not None:
                self._spawn_sync(entry, entry.worker)

    async def _on_ended(self, entry: VmEntry, worker: Worker) -> None:
        async with entry.lock:
            if entry.worker is worker:
                await self.settle(entry, worker, worker.ended.result(), None)

    async def keep_up(self, entry: VmEntry, actor: str | None = None) -> None:
        """Take over what the worker has told last; the caller holds the lock.

        Args:
            entry: the VM.
            actor: who asked for what the worker tells, if someone did.
        """
        status = None if entry.worker is None else entry.worker.status
        if status is None:
            return
        for device_id in compare(entry.record, status).strays:
            self._tasks.spawn(self._pull_stray(entry, device_id), "pull-stray")
        changes, events = take_over(entry, status)
        counts, changed = counted(entry, status)
        changes |= changed
        if status.resets != entry.resets and entry.resets is not None:
            events.append(entry.event("reset", actor))
        entry.resets = status.resets
        events += counts
        if (state := changes.get("state")) is not None:
            events.append(entry.event(_ARRIVALS[state], actor))
        if (why := changes.get("reason")) is not None and why.code == "guest_panic":
            events.append(entry.event("panicked"))
        if changes or events:
            await self._table.record(entry, *events, **changes)

    async def _pull_stray(self, entry: VmEntry, device_id: str) -> None:
        """Take out a device whose attach was given up on, unless it belongs there by now."""
        async with entry.lock:
            status = None if entry.worker is None else entry.worker.status
            if status is not None and device_id in compare(entry.record, status).strays:
                with contextlib.suppress(ApiError):  # it is looked at again with the next status
                    await self.ask(entry, "detach", {"device": device_id, "force": True})

    async def settle(
        self,
        entry: VmEntry,
        worker: Worker,
        ending: Ending,
        actor: str | None,
        *,
        asked: bool = False,
        forced: ReasonRecord | None = None,
    ) -> None:
        """Take note of a worker's end; the caller holds the lock."""
        await self._keep_up_last(entry, worker, ending)
        verdict = judge(ending, was_killed=entry.kill_requested)
        entry.kill_requested = False
        self._pool.forget(entry.record.id)
        await self._pool.backends.gone(entry.record.id)  # and with them the disks' locks
        why = forced or verdict.reason
        if asked and forced is None and verdict.state is VmState.STOPPED:
            why = None
        kind = "stopped" if verdict.state is VmState.STOPPED else "crashed"
        code = None if why is None else why.code
        log.log(
            logging.INFO if kind == "stopped" else logging.WARNING,
            "vm %s vm=%s pid=%d reason=%s",
            kind,
            entry.record.name,
            worker.pid,
            code,
        )
        message = None if why is None else why.message
        events = [entry.event(kind, actor, reason=code, message=message)]
        if entry.record.state is VmState.CRASHED and verdict.state is VmState.CRASHED:
            events = []  # it was told when the guest crashed; now its remains have gone
        await self._table.record(entry, *events, state=verdict.state, reason=why, worker=None)
        # Not before: nobody may see a VM that runs without a process.
        entry.worker = None

    async def _keep_up_last(self, entry: VmEntry, worker: Worker, ending: Ending) -> None:
        """Take over what a worker has told right before its end."""
        events, changes = last_told(entry, worker.status or ending.last_words)
        if changes:
            await self._table.record(entry, *events, **changes)

    def _check(self, entry: VmEntry, action: VmAction, request: Request) -> None:
        entry.check_present()
        entry.check_version(request.if_match)
        lifecycle.check_action(entry.record.name, entry.record.state, action)

    def _worker(self, entry: VmEntry) -> Worker:
        if entry.worker is None:
            raise HostFailure("worker_gone", f"VM {entry.record.name} has no worker")
        return entry.worker
