# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The database: one SQLite file, one writer thread, group commit.

A caller hands over a Change (statements and the events that tell of it) and waits; the writer
takes all changes that wait, runs each inside a savepoint of one transaction, and commits once. So
a hundred changes at a time cost one fsync, and one that fails does not take others with it. After
a failure for want of space nothing is left half-done, and the next change simply tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from api.models.common import ObjectRef
from api.models.resources import Event

from .schema import MIGRATIONS

log = logging.getLogger(__name__)

BUSY_TIMEOUT_MS: Final = 5_000
# Somebody else, such as a backup, may hold the database that long this many times.
BUSY_ATTEMPTS: Final = 3
# Old events go in steps, so that not every commit deletes one row.
TRIM_EVERY: Final = 512
# What SQLite says when the file system is full, read-only, or fails: SQLITE_FULL, SQLITE_READONLY,
# SQLITE_IOERR, SQLITE_CANTOPEN; the low byte of an extended code is the primary one.
_NO_SPACE_CODES: Final = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN}
)
_BUSY_CODES: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})


class StoreError(Exception):
    """The database cannot be opened; the text says what to do."""


class StoreFull(Exception):
    """A change could not be written: the state directory is full, read-only or broken."""


class StoreBusy(StoreFull):
    """Another program holds the database locked."""


class StoreFailed(StoreFull):
    """The change itself cannot be written, by a defect of hosteld; the log has the trace."""


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event that gets its id when it is committed."""

    type: str
    object: ObjectRef
    actor: str | None = None
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Statement:
    """One SQL statement with its parameters."""

    sql: str
    params: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """What is committed together, or not at all."""

    statements: tuple[Statement, ...]
    events: tuple[NewEvent, ...] = ()


@dataclass(frozen=True, slots=True)
class _Pending:
    change: Change
    future: asyncio.Future[list[Event]]


@dataclass(slots=True)
class _Outcome:
    pending: _Pending
    events: list[Event]
    error: Exception | None = None


class Store:
    """The open database.

    Args:
        path: of the database file.
        events_kept: how many events stay.
        on_events: called on the event loop with committed events, in order of id.

    Threads: the event loop's; close() ends both threads of its own.
    """

    def __init__(
        self, path: Path, *, events_kept: int, on_events: Callable[[list[Event]], None]
    ) -> None:
        self._path = path
        self._events_kept = events_kept
        self._on_events = on_events
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._db = _connect(path)
        try:
            _migrate(self._db)
            (last_id,) = self._db.execute(
                "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'events'"
            ).fetchone()
            self._last_event_id = int(last_id)
            self._reader_db = _connect(path)
        except sqlite3.Error as err:
            self._db.close()
            raise _open_error(path, err) from err
        self._untrimmed = TRIM_EVERY
        self._reader = ThreadPoolExecutor(1, "store-read")
        self._writer = threading.Thread(target=self._run, name="store-write", daemon=True)
        self._writer.start()

    @property
    def last_event_id(self) -> int:
        """Id of the newest committed event, 0 when there has been none."""
        return self._last_event_id

    async def commit(self, *statements: Statement, events: Sequence[NewEvent] = ()) -> list[Event]:
        """Write a change and return its events when both are on stable storage.

        Raises:
            StoreFull: nothing was written; the same call works once there is space again, or
                nobody else holds the database.
            sqlite3.IntegrityError: a constraint refused it; nothing was written.
        """
        future: asyncio.Future[list[Event]] = self._loop.create_future()
        self._queue.put(_Pending(Change(statements, tuple(events)), future))
        return await future

    async def fetch(self, sql: str, params: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Return rows of what is committed.

        Raises:
            StoreFull: the database cannot be read.
        """
        try:
            return await self._loop.run_in_executor(self._reader, self._fetch, sql, params)
        except sqlite3.OperationalError as err:
            raise _unwritten(self._path, err) from err

    async def events_after(self, after: int, limit: int) -> list[Event]:
        """Return up to ``limit`` events with an id above ``after``, in order.

        Raises:
            StoreFull: as fetch().
        """
        rows = await self.fetch(
            "SELECT id, doc FROM events WHERE id > ? ORDER BY id LIMIT ?", (after, limit)
        )
        return [Event.model_validate_json(f'{{"id":{row[0]},{row[1][1:]}') for row in rows]

    async def first_event_id(self) -> int:
        """Return the id of the oldest event that is still kept, or the one to come."""
        rows = await self.fetch("SELECT min(id) FROM events")
        return int(rows[0][0]) if rows[0][0] is not None else self._last_event_id + 1

    async def close(self) -> None:
        """Write what waits, then close; no commit() may follow."""
        self._queue.put(None)
        await asyncio.to_thread(self._writer.join)
        self._reader.shutdown()
        self._reader_db.close()
        self._db.close()

    def _fetch(self, sql: str, params: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        return self._reader_db.execute(sql, params).fetchall()

    # --- the writer thread

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            group, is_last = [first], False
            with contextlib.suppress(queue.Empty):
                while (more := self._queue.get_nowait()) is not None:
                    group.append(more)
                is_last = True
            outcomes = self._write_patiently(group)
            self._loop.call_soon_threadsafe(self._deliver, outcomes)
            if is_last:
                return

    def _write_patiently(self, group: list[_Pending]) -> list[_Outcome]:
        """Write a group, again while somebody else holds the database."""
        outcomes = self._write_group(group)
        for _ in range(BUSY_ATTEMPTS - 1):
            if not any(isinstance(outcome.error, StoreBusy) for outcome in outcomes):
                break
            log.warning("database held by another program path=%s", self._path)
            outcomes = self._write_group(group)
        return outcomes

    def _write_group(self, group: list[_Pending]) -> list[_Outcome]:
        outcomes = [_Outcome(pending, []) for pending in group]
        try:
            self._db.execute("BEGIN IMMEDIATE")
            if len(outcomes) == 1:
                self._apply(outcomes[0])
            else:
                for outcome in outcomes:
                    self._apply_alone(outcome)
            self._trim_events(sum(len(outcome.events) for outcome in outcomes))
            self._db.execute("COMMIT")
        except Exception as err:
            # The border of the writer thread: whatever a group does, the next one is written.
            self._roll_back()
            error = self._translate(err)
            for outcome in outcomes:
                outcome.events, outcome.error = [], error
        return outcomes

    def _roll_back(self) -> None:
        # SQLite rolls back by itself on some errors and not on others.
        try:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        except sqlite3.Error as err:
            log.error("no way back error=%s", err)

    def _apply(self, outcome: _Outcome) -> None:
        change = outcome.pending.change
        for statement in change.statements:
            self._db.execute(statement.sql, statement.params)
        outcome.events = [self._insert_event(event) for event in change.events]

    def _apply_alone(self, outcome: _Outcome) -> None:
        """Run one change of several inside a savepoint; a refused constraint is its own affair."""
        self._db.execute("SAVEPOINT change")
        try:
            self._apply(outcome)
        except sqlite3.IntegrityError as err:
            self._db.execute("ROLLBACK TO change")
            outcome.events, outcome.error = [], err
        self._db.execute("RELEASE change")

    def _insert_event(self, new: NewEvent) -> Event:
        at = datetime.now(UTC)
        doc = {
            "at": at.isoformat(),
            "type": new.type,
            "object": {"kind": new.object.kind, "id": new.object.id, "name": new.object.name},
            "actor": new.actor,
            "data": new.data,
        }
        cursor = self._db.execute("INSERT INTO events (doc) VALUES (?)", (json.dumps(doc),))
        assert cursor.lastrowid is not None
        return Event(
            id=cursor.lastrowid,
            at=at,
            type=new.type,
            object=new.object,
            actor=new.actor,
            data=new.data,
        )

    def _trim_events(self, added: int) -> None:
        self._untrimmed += added
        if self._untrimmed >= TRIM_EVERY:
            self._untrimmed = 0
            self._db.execute(
                "DELETE FROM events WHERE id <= (SELECT max(id) FROM events) - ?",
                (self._events_kept,),
            )

    def _translate(self, err: Exception) -> Exception:
        if isinstance(err, sqlite3.IntegrityError):
            return err
        code = getattr(err, "sqlite_errorcode", 0) & 0xFF
        if isinstance(err, sqlite3.Error) and code in _NO_SPACE_CODES | _BUSY_CODES:
            return _unwritten(self._path, err)
        log.error("defect: a change cannot be written", exc_info=err)
        return StoreFailed(f"{self._path}: {err}")

    # --- back on the event loop

    def _deliver(self, outcomes: list[_Outcome]) -> None:
        for outcome in outcomes:
            if outcome.pending.future.done():
                continue  # the caller was cancelled; the change stands
            if outcome.error is not None:
                outcome.pending.future.set_exception(outcome.error)
            else:
                outcome.pending.future.set_result(outcome.events)
        events = [event for outcome in outcomes for event in outcome.events]
        if events:
            self._last_event_id = events[-1].id
            # The loop runs first what the futures have made ready: whoever changed an object shows
            # the change before a follower, even one that is just looking, hears of it.
            self._loop.call_soon(self._on_events, events)


def _connect(path: Path) -> sqlite3.Connection:
    try:
        # One thread at a time uses a connection: the opener until the writer or reader starts.
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        db.execute("PRAGMA foreign_keys = ON")
    except sqlite3.Error as err:
        raise _open_error(path, err) from err
    return db


def _migrate(db: sqlite3.Connection) -> None:
    """Bring the schema to this version, one transaction a step.

    Raises:
        StoreError: the file was written by a newer version.
    """
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise StoreError(
            f"the database has schema {version}, this hosteld knows up to {len(MIGRATIONS)}: it was"
            " written by a newer version, install that one again"
        )
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        db.executescript(f"BEGIN IMMEDIATE;\n{script}\nPRAGMA user_version = {number};\nCOMMIT;")
        log.info("database migrated schema=%d", number)


def _unwritten(path: Path, err: sqlite3.Error) -> StoreFull:
    code = getattr(err, "sqlite_errorcode", 0) & 0xFF
    if code in _BUSY_CODES:
        return StoreBusy(f"{path}: another program holds it locked ({err}); try again")
    return StoreFull(describe(path, err))


def _open_error(path: Path, err: sqlite3.Error) -> StoreError:
    return StoreError(f"cannot open the database: {describe(path, err)}")


def describe(path: Path, err: Exception) -> str:
    """Return what is wrong with the state directory, and what to do."""
    try:
        info = os.statvfs(path.parent)
    except OSError as stat_err:
        return f"{path.parent}: {err}; {stat_err.strerror}"
    free_mib = info.f_bavail * info.f_frsize // (1 << 20)
    if info.f_flag & os.ST_RDONLY:
        return f"{path.parent}: the file system is read-only; mount it read-write"
    if free_mib < 1 or info.f_favail == 0:
        return f"{path.parent}: the file system is full ({free_mib} MiB free); make room"
    return f"{path}: {err} ({free_mib} MiB free); check the file system and its permissions"
