# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The database: group commit, events, faults."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from api.models.common import ObjectRef
from api.models.resources import Event
from daemon.supervisor.store import (
    NewEvent,
    Statement,
    Store,
    StoreBusy,
    StoreError,
    StoreFailed,
    StoreFull,
)

VM = ObjectRef(kind="vm", id="1", name="a")


@asynccontextmanager
async def opened(
    path: Path, *, events_kept: int = 10_000, seen: list[Event] | None = None
) -> AsyncIterator[Store]:
    sink: list[Event] = [] if seen is None else seen
    store = Store(path / "hostel.db", events_kept=events_kept, on_events=sink.extend)
    try:
        yield store
    finally:
        await store.close()


def put(key: str, value: str = "v") -> Statement:
    return Statement("INSERT INTO meta (key, value) VALUES (?, ?)", (key, value))


def test_a_committed_change_is_there_after_reopening(tmp_path: Path) -> None:
    async def scenario() -> list[tuple[object, ...]]:
        async with opened(tmp_path) as store:
            await store.commit(put("a"), events=[NewEvent("vm.created", VM, "me", {"n": 1})])
        async with opened(tmp_path) as store:
            events = await store.events_after(0, 10)
            assert [(e.id, e.type, e.actor, e.data) for e in events] == [
                (1, "vm.created", "me", {"n": 1})
            ]
            assert store.last_event_id == 1
            return await store.fetch("SELECT key, value FROM meta")

    assert asyncio.run(scenario()) == [("a", "v")]


def test_events_are_told_in_the_order_of_their_ids(tmp_path: Path) -> None:
    async def scenario() -> None:
        seen: list[Event] = []
        async with opened(tmp_path, seen=seen) as store:

            async def one(number: int) -> None:
                await store.commit(put(str(number)), events=[NewEvent("t", VM)])

            await asyncio.gather(*(one(number) for number in range(100)))
            assert [event.id for event in seen] == list(range(1, 101))

    asyncio.run(scenario())


def test_a_refused_change_takes_no_other_with_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as store:
            results = await asyncio.gather(
                store.commit(put("a")),
                store.commit(put("b"), put("a"), events=[NewEvent("t", VM)]),
                store.commit(put("c"), events=[NewEvent("t", VM)]),
                return_exceptions=True,
            )
            assert isinstance(results[1], sqlite3.IntegrityError)
            rows = await store.fetch("SELECT key FROM meta ORDER BY key")
            assert rows == [("a",), ("c",)]
            assert len(await store.events_after(0, 10)) == 1

    asyncio.run(scenario())


def test_a_cancelled_caller_does_not_undo_its_change(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as store:
            task = asyncio.create_task(store.commit(put("a")))
            await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await store.commit(put("b"))
            assert len(await store.fetch("SELECT 1 FROM meta")) == 2

    asyncio.run(scenario())


def test_old_events_go_and_ids_are_never_used_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path, events_kept=5) as store:
            await store.commit(events=[NewEvent("t", VM) for _ in range(600)])
            assert await store.first_event_id() == 596
        async with opened(tmp_path, events_kept=5) as store:
            (event,) = await store.commit(events=[NewEvent("t", VM)])
            assert event.id == 601

    asyncio.run(scenario())


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hostel.db").write_bytes(b"not a database" * 100)

    async def scenario() -> None:
        async with opened(tmp_path):
            pass

    with pytest.raises(StoreError, match="cannot open the database"):
        asyncio.run(scenario())


def test_a_database_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "hostel.db")) as db:
        db.execute("PRAGMA user_version = 1000")

    async def scenario() -> None:
        async with opened(tmp_path):
            pass

    with pytest.raises(StoreError, match="newer version"):
        asyncio.run(scenario())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount = shutil.which("mount")
    path = tmp_path / "small"
    path.mkdir()
    if os.geteuid() != 0 or mount is None:
        pytest.skip("mounting a tmpfs needs root")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=1M", "none", path], check=False)
    if done.returncode != 0:
        pytest.skip("this process may not mount")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def test_a_full_disk_is_told_and_writing_goes_on_once_there_is_room(small_disk: Path) -> None:
    async def scenario() -> None:
        async with opened(small_disk) as store:
            await store.commit(put("before"))
            ballast = small_disk / "ballast"
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            with pytest.raises(StoreFull, match="the file system is full"):
                await store.commit(put("big", "x" * 200_000), events=[NewEvent("t", VM)])
            assert await store.fetch("SELECT key FROM meta") == [("before",)]
            ballast.unlink()
            (event,) = await store.commit(put("after"), events=[NewEvent("t", VM)])
            assert event.id == store.last_event_id
            rows = await store.fetch("SELECT key FROM meta ORDER BY key")
            assert rows == [("after",), ("before",)]

    asyncio.run(scenario())


def test_a_database_that_has_become_read_only_is_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as store:
            await store.commit(put("before"))
            # SQLite then answers SQLITE_READONLY, as it does on a file system remounted read-only.
            await store.commit(Statement("PRAGMA query_only = 1"))
            with pytest.raises(StoreFull):
                await store.commit(put("during"))
            assert await store.fetch("SELECT key FROM meta") == [("before",)]

    asyncio.run(scenario())


def test_a_database_that_another_program_holds_is_waited_for_and_then_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.supervisor.store.BUSY_TIMEOUT_MS", 1)

    async def scenario() -> None:
        async with opened(tmp_path) as store:
            with contextlib.closing(sqlite3.connect(tmp_path / "hostel.db")) as other:
                other.execute("BEGIN IMMEDIATE")
                with pytest.raises(StoreBusy, match="another program"):
                    await store.commit(put("a"))
            await store.commit(put("a"))

    asyncio.run(scenario())


def test_a_change_that_cannot_be_written_does_not_end_the_writer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as store:
            for wrong in (
                Statement("INSERT INTO meta VALUES (?, ?)", ("a", object())),
                Statement("INSERT INTO meta VALUES (?, ?)", ("a", "\ud800")),
                Statement("no SQL at all"),
            ):
                with pytest.raises(StoreFailed):
                    await store.commit(wrong)
            await store.commit(put("a"))

    asyncio.run(scenario())
