# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""At start: make the database and the processes of the host agree.

The database says what was intended, the workers say what is. Workers that belong to a VM are
adopted; what nobody wants is ended; what a killed hosteld left half-done is finished or undone.
"""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from api.errors import ApiError
from api.models.vms import VmState

from ..errors import WorkerError
from . import lifecycle, procfs, vsock
from .dirs import Layout
from .endings import judge
from .news import last_told
from .records import ReasonRecord, now
from .store import Statement, Store, StoreFull
from .tasks import Tasks
from .vm_make import VmMaker
from .vm_run import VmRunner
from .vm_table import VmEntry, VmTable, reason
from .worker_files import log_tail, read_last_words
from .workers import Ending, Worker, WorkerPool

log = logging.getLogger(__name__)

# A worker answers its status in well under a millisecond; a stopped or swapped-out one does not.
STATUS_TIMEOUT_S: Final = 3.0
PROBE_INTERVAL_S: Final = 5.0
_VM_ID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(slots=True)
class Report:
    """What was found, by name of VM; for the log and for READY's status line."""

    adopted: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)


class Reconciler:
    """Brings VMs and workers together, once, before the API is served.

    Threads: the event loop's.
    """

    def __init__(
        self,
        table: VmTable,
        runner: VmRunner,
        maker: VmMaker,
        pool: WorkerPool,
        layout: Layout,
        tasks: Tasks,
    ) -> None:
        self._table = table
        self._runner = runner
        self._maker = maker
        self._pool = pool
        self._layout = layout
        self._tasks = tasks
        self._has_rebooted = False
        self._report = Report()

    async def run(self, store: Store) -> Report:
        """Reconcile everything.

        Raises:
            StoreFull: the database cannot be read.
        """
        present = procfs.boot_id()
        rows = await store.fetch("SELECT value FROM meta WHERE key = 'boot_id'")
        self._has_rebooted = bool(rows) and rows[0][0] != present
        self._pool.backends.find()
        known = {entry.record.id for entry in self._table}
        found = {path.name for path in _ours(self._layout.runtime / "vms")}
        await asyncio.gather(
            *(self._reconcile(entry) for entry in list(self._table)),
            *(self._end_leftover(vm_id) for vm_id in found - known),
        )
        running = {entry.record.id for entry in self._table if entry.worker is not None}
        await self._pool.backends.end_all_but(running)
        self._sweep_strays(known)
        self._restore_vsocks(known)
        await _note_boot(store, present)
        return self._report

    async def _reconcile(self, entry: VmEntry) -> None:
        name, state = entry.record.name, entry.record.state
        async with entry.lock:
            known = entry.record.worker
            worker = await self._pool.find(entry.record.id, known, STATUS_TIMEOUT_S)
            if state in (VmState.CREATING, VmState.DELETING):
                await self._finish(entry, worker)
            elif state is VmState.STOPPED:
                if worker is not None:
                    # Forked for a start that was never committed.
                    await worker.quit()
                    self._report.leftovers.append(name)
                self._pool.forget(entry.record.id)
            elif worker is None:
                await self._take_note_of_death(entry)
            elif worker.status is None:
                await self._report_silence(entry, worker)
            else:
                await self._adopt(entry, worker)

    async def _finish(self, entry: VmEntry, worker: Worker | None) -> None:
        """Undo a creation, or finish a delete, that hosteld did not live to see."""
        name = entry.record.name
        try:
            if entry.record.state is VmState.CREATING:
                if worker is not None:
                    # Forked for a start that was never committed.
                    await worker.quit()
                await self._maker.roll_back(entry, None)
            else:
                entry.worker = worker
                await self._maker.finish_delete(entry, None)
        except (ApiError, StoreFull) as err:
            log.error("not finished vm=%s state=%s error=%s", name, entry.record.state, err)
            return
        log.warning("finished what was left half-done vm=%s state=%s", name, entry.record.state)
        self._report.finished.append(name)

    async def _adopt(self, entry: VmEntry, worker: Worker) -> None:
        name, status = entry.record.name, worker.status
        assert status is not None
        if status.state in ("empty", "stopped"):
            # Forked and never launched, or on its way out.
            ending = await (worker.quit() if status.state == "empty" else worker.wait_ended(5.0))
            self._pool.forget(entry.record.id)
            await self._settle_dead(entry, ending)
            return
        self._runner.watch(entry, worker)
        if entry.record.state in (VmState.STARTING, VmState.STOPPING):
            started_at = entry.record.started_at or now()
            await self._table.record(
                entry,
                entry.event("adopted"),
                state=VmState.RUNNING,
                started_at=started_at,
                worker=procfs.identify(worker.pid) if worker.is_known else None,
            )
        await self._runner.keep_up(entry)
        log.info("worker adopted vm=%s pid=%d state=%s", name, worker.pid, entry.record.state)
        self._report.adopted.append(name)

    async def _report_silence(self, entry: VmEntry, worker: Worker) -> None:
        """Keep a worker that lives and does not answer; its guest may well be running."""
        log.error("worker does not answer vm=%s pid=%d", entry.record.name, worker.pid)
        self._runner.watch(entry, worker)
        problem = "does not answer"
        if worker.unreachable is not None:
            problem = f"cannot be reached: {worker.unreachable}"
        why = reason(
            "worker_unresponsive",
            f"its worker, process {worker.pid}, lives and {problem}; it is tried again every"
            f" {PROBE_INTERVAL_S:g} s, and can be killed",
            {"pid": worker.pid},
        )
        state = entry.record.state
        if state in (VmState.STARTING, VmState.STOPPING):
            state = VmState.RUNNING
        await self._table.record(entry, entry.event("unresponsive"), state=state, reason=why)
        self._tasks.spawn(self._probe(entry, worker), "probe")
        self._report.silent.append(entry.record.name)

    async def _probe(self, entry: VmEntry, worker: Worker) -> None:
        """Ask a silent worker until it answers or ends."""
        while entry.worker is worker and not worker.ended.done():
            try:
                await worker.request("status", timeout_s=STATUS_TIMEOUT_S)
            except WorkerError as err:
                log.debug("still silent vm=%s error=%s", entry.record.name, err)
                await worker.wait_ended(PROBE_INTERVAL_S)
                continue
            async with entry.lock:
                if entry.worker is worker:
                    await self._table.record(entry, entry.event("responsive"), reason=None)
                    await self._runner.keep_up(entry)
            log.info("worker answers again vm=%s", entry.record.name)
            return

    async def _take_note_of_death(self, entry: VmEntry) -> None:
        runtime = self._layout.vm_runtime(entry.record.id)
        tail = log_tail(self._layout.vm_state(entry.record.id) / "worker.log")
        ending = Ending(None, read_last_words(runtime), tail)
        self._pool.forget(entry.record.id)
        if entry.record.state is not VmState.CRASHED:
            await self._settle_dead(entry, ending)

    async def _settle_dead(self, entry: VmEntry, ending: Ending | None) -> None:
        state, why = self._verdict(entry, ending)
        lifecycle.check_outcome(entry.record.state, state)
        code = None if why is None else why.code
        kind = "stopped" if state is VmState.STOPPED else "crashed"
        log.warning("worker had ended vm=%s state=%s reason=%s", entry.record.name, state, code)
        events, changes = last_told(entry, None if ending is None else ending.last_words)
        events.append(entry.event(kind, reason=code))
        await self._table.record(entry, *events, state=state, reason=why, **changes)
        self._report.ended.append(entry.record.name)

    def _verdict(
        self, entry: VmEntry, ending: Ending | None
    ) -> tuple[VmState, ReasonRecord | None]:
        if self._has_rebooted:
            return VmState.STOPPED, reason("host_restarted", "the host was restarted")
        if entry.record.state is VmState.STARTING:
            return VmState.STOPPED, reason(
                "start_interrupted", "hosteld ended while this VM was starting; start it again"
            )
        verdict = judge(ending or Ending(None, None, ()), was_killed=False)
        return verdict.state, verdict.reason

    async def _end_leftover(self, vm_id: str) -> None:
        """End a worker that no VM of the database stands for."""
        worker = await self._pool.find(vm_id, None, STATUS_TIMEOUT_S)
        if worker is not None:
            log.warning("worker without VM is ended id=%s pid=%d", vm_id, worker.pid)
            if await worker.quit() is None:
                log.error("worker without VM does not end id=%s pid=%d", vm_id, worker.pid)
                return
        self._pool.forget(vm_id)
        self._report.leftovers.append(vm_id)

    def _sweep_strays(self, known: set[str]) -> None:
        """Remove the logs of VMs that were never committed; what holds disks only named.

        Disks are copied after their VM is committed, so these belong to a VM that the database
        once had: it may have been restored from a backup, and they are somebody's data.
        """
        for path in _ours(self._layout.state / "vms"):
            if path.name in known:
                continue
            if (path / "disks").exists():
                log.warning("disks without VM, remove them by hand path=%s", path)
            else:
                shutil.rmtree(path, ignore_errors=True)

    def _restore_vsocks(self, known: set[str]) -> None:
        """Make the directories of sockets that a restart of the host took; remove strays."""
        for path in _ours(self._layout.runtime / "vsock"):
            if path.name not in known:
                shutil.rmtree(path, ignore_errors=True)
        for entry in self._table:
            try:
                vsock.make_directory(entry.record)
            except ApiError as err:
                log.error("no directory for vsock vm=%s error=%s", entry.record.name, err)


def _ours(directory: Path) -> Iterator[Path]:
    """Yield the directories that have the id of a VM for a name; nothing else is ours to remove."""
    for path in directory.iterdir():
        if _VM_ID.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            yield path
        else:
            log.warning("left alone, it is none of hosteld's path=%s", path)


async def _note_boot(store: Store, boot_id: str) -> None:
    statement = Statement(
        "INSERT INTO meta (key, value) VALUES ('boot_id', ?1)"
        " ON CONFLICT (key) DO UPDATE SET value = ?1",
        (boot_id,),
    )
    try:
        await store.commit(statement)
    except (StoreFull, sqlite3.Error) as err:
        log.warning("boot not noted error=%s", err)
