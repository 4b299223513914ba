# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Jobs: work that a caller waits for, and that becomes an operation when it takes longer.

A job goes on whatever becomes of the caller. It is written down from the moment when a client is
told of it; a hosteld that finds one unfinished at its start marks it failed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, TypeVar

from pydantic import BaseModel

from api.errors import ApiError, BadRequest, Conflict, Internal, NotFound
from api.models.common import ObjectRef, Page
from api.models.resources import Operation, OperationState, Progress
from api.ports import Call, ListQuery

from . import faults
from .records import now
from .store import Statement, Store, StoreFull
from .tasks import Tasks

log = logging.getLogger(__name__)

R = TypeVar("R", bound=BaseModel | None)

MAX_LOG_LINES: Final = 200
_STOPPED: Final = ("daemon_stopped", "hosteld stopped before this was done; ask again")
_RESTARTED: Final = ("daemon_restarted", "hosteld ended before this was done; see the object")


@dataclass(eq=False)
class Job:
    """One piece of work under way.

    Attributes:
        cancelled: set when a client asked to stop; work in a thread looks at it.

    Threads: the event loop's, except progress(), note() and ``cancelled``.
    """

    kind: str
    about: ObjectRef
    may_cancel: bool
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    created_at: datetime = field(default_factory=now)
    cancelled: threading.Event = field(default_factory=threading.Event)
    seq: int = 0
    _state: OperationState = OperationState.RUNNING
    _progress: Progress | None = None
    _log: list[str] = field(default_factory=list)
    _result: BaseModel | None = None
    _error: ApiError | None = None
    _finished_at: datetime | None = None
    is_exposed: bool = False
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def progress(self, done: int, total: int | None, unit: str = "bytes") -> None:
        """Tell how far the work has come; ``unit`` is bytes or steps."""
        self._progress = Progress.model_validate({"done": done, "total": total, "unit": unit})

    def note(self, line: str) -> None:
        """Add a line to the operation's log."""
        if len(self._log) < MAX_LOG_LINES:
            self._log.append(line)

    def finish(self, result: BaseModel | None, error: ApiError | None) -> None:
        """Settle the job, the first call counts; ``done`` is set once that is written down."""
        if self._finished_at is not None:
            return
        self._finished_at = now()
        self._result, self._error = result, error
        if error is None:
            self._state = OperationState.SUCCEEDED
        elif self.cancelled.is_set() and error.code == "cancelled":
            self._state = OperationState.CANCELLED
        else:
            self._state = OperationState.FAILED

    def outcome(self) -> BaseModel | None:
        """Return the result of a settled job.

        Raises:
            ApiError: the job failed.
        """
        if self._error is not None:
            raise self._error
        return self._result

    def model(self) -> Operation:
        """Return the job as clients see it."""
        return Operation(
            id=self.id,
            kind=self.kind,
            object=self.about,
            state=self._state,
            progress=self._progress,
            result=None if self._result is None else self._result.model_dump(mode="json"),
            error=None if self._error is None else self._error.problem(),
            log=list(self._log),
            may_cancel=self.may_cancel and self._finished_at is None,
            created_at=self.created_at,
            finished_at=self._finished_at,
        )


class Operations:
    """Runs jobs and remembers those that clients know of.

    Threads: the event loop's.
    """

    def __init__(self, store: Store, tasks: Tasks, kept: int) -> None:
        self._store = store
        self._tasks = tasks
        self._kept = kept
        self._running: set[Job] = set()
        self._jobs: dict[str, Job] = {}
        # Ended ones, in order of seq; the newest are last.
        self._ended: dict[str, tuple[int, Operation]] = {}
        self._next_seq = 1

    async def load(self) -> None:
        """Read the operations of earlier times; one that never ended has failed.

        Raises:
            StoreFull: the database cannot be read or written.
        """
        statements = []
        for seq, doc in await self._store.fetch("SELECT seq, doc FROM operations ORDER BY seq"):
            operation = Operation.model_validate_json(doc)
            if operation.finished_at is None:
                operation = _restarted(operation)
                statements.append(_save(seq, operation))
            self._ended[operation.id] = (seq, operation)
            self._next_seq = seq + 1
        if statements:
            await self._store.commit(*statements)

    async def run(
        self,
        job: Job,
        call: Call,
        work: Callable[[Job], Awaitable[R]],
    ) -> R | Operation:
        """Do the work; return its result, or after ``call.wait_s`` the operation that it became.

        Raises:
            ApiError: the work failed within that time.
        """
        name = f"{job.kind} {job.about.name}"
        task = self._tasks.spawn(self._drive(job, work), name, is_job=True)
        await asyncio.wait({task}, timeout=call.wait_s)
        if not task.done():
            await self._expose(job)
            return job.model()
        return job.outcome()  # type: ignore[return-value]  # what work() returned, or raised

    async def _drive(self, job: Job, work: Callable[[Job], Awaitable[R]]) -> None:
        self._running.add(job)
        try:
            job.finish(await work(job), None)
        except ApiError as err:
            job.finish(None, err)
        except asyncio.CancelledError:
            job.finish(None, Conflict(*_STOPPED))
            raise
        except Exception as err:
            # The border of a job: its client may be long gone, so the job itself must end well.
            job.finish(None, faults.translate(err, f"{job.kind} {job.about.name}"))
        finally:
            self._running.discard(job)
            try:
                if job.is_exposed:
                    await self._settle(job)
            finally:
                job.done.set()

    async def _expose(self, job: Job) -> None:
        job.is_exposed = True
        job.seq = self._next_seq
        self._next_seq += 1
        self._jobs[job.id] = job
        await self._persist(job)

    async def _settle(self, job: Job) -> None:
        await self._persist(job)
        self._jobs.pop(job.id, None)
        self._ended[job.id] = (job.seq, job.model())
        excess = len(self._ended) - self._kept
        for operation_id in list(self._ended)[: max(0, excess)]:
            del self._ended[operation_id]

    async def _persist(self, job: Job) -> None:
        try:
            await self._store.commit(
                _save(job.seq, job.model()),
                Statement(
                    "DELETE FROM operations WHERE seq <= ?", (self._next_seq - 2 * self._kept,)
                ),
            )
        except StoreFull as err:
            # The work itself goes on, or is done; only its record is at stake.
            log.warning("operation not kept id=%s error=%s", job.id, err)

    def cancel_all(self) -> None:
        """Ask all jobs to stop that can: hosteld is about to."""
        for job in self._running:
            if job.may_cancel:
                job.cancelled.set()

    # --- for clients

    def list(self, query: ListQuery) -> Page[Operation]:
        """Return operations, the newest first.

        Raises:
            BadRequest: the cursor is none of ours.
        """
        before = self._next_seq
        if query.cursor is not None:
            if not query.cursor.isdecimal() or len(query.cursor) > 18:
                raise BadRequest("cursor", f"cursor {query.cursor!r}: take it from next_cursor")
            before = int(query.cursor)
        running = [(job.seq, job.model()) for job in self._jobs.values()]
        found = sorted(
            (entry for entry in [*self._ended.values(), *running] if entry[0] < before),
            key=lambda entry: entry[0],
            reverse=True,
        )
        page = found[: query.limit]
        more = str(page[-1][0]) if len(found) > len(page) else None
        return Page[Operation](items=[operation for _, operation in page], next_cursor=more)

    async def get(self, operation_id: str, wait_s: float) -> Operation:
        """Return an operation, after its end or ``wait_s`` seconds.

        Raises:
            NotFound: there is none, or it is no longer kept.
        """
        job = self._jobs.get(operation_id)
        if job is not None:
            try:
                async with asyncio.timeout(wait_s):
                    await job.done.wait()
            except TimeoutError:
                pass
            return job.model()
        if operation_id not in self._ended:
            raise NotFound("operation_not_found", f"no operation {operation_id}")
        return self._ended[operation_id][1]

    async def cancel(self, operation_id: str, wait_s: float) -> Operation:
        """Ask an operation to stop, and wait for that up to ``wait_s`` seconds.

        Raises:
            NotFound: there is none.
            Conflict: it cannot be cancelled, or has ended.
        """
        operation = await self.get(operation_id, 0)
        if not operation.may_cancel:
            why = "has ended" if operation.finished_at is not None else "cannot be cancelled"
            raise Conflict(
                "not_cancellable",
                f"operation {operation_id} ({operation.kind}) {why}",
                state=operation.state.value,
                allowed=[],
            )
        self._jobs[operation_id].cancelled.set()
        return await self.get(operation_id, wait_s)


def _restarted(operation: Operation) -> Operation:
    error = Internal(*_RESTARTED)
    return operation.model_copy(
        update={
            "state": OperationState.FAILED,
            "error": error.problem(),
            "finished_at": now(),
            "may_cancel": False,
        }
    )


def _save(seq: int, operation: Operation) -> Statement:
    doc = json.dumps(operation.model_dump(mode="json"), separators=(",", ":"))
    return Statement(
        "INSERT INTO operations (seq, id, doc) VALUES (?1, ?2, ?3)"
        " ON CONFLICT (seq) DO UPDATE SET doc = ?3",
        (seq, operation.id, doc),
    )
