# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Jobs and the operations that they become."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from api.errors import ApiError, BadRequest, Invalid, NotFound
from api.models.common import ObjectRef
from api.models.resources import Operation, Progress
from api.ports import Call, ListQuery
from daemon.supervisor.operations import MAX_LOG_LINES, Job, Operations
from daemon.supervisor.store import Store
from daemon.supervisor.tasks import Tasks

VM = ObjectRef(kind="vm", id="1", name="a")
PATIENT = Call("test", wait_s=30.0)
HASTY = Call("test", wait_s=0.0)
RESULT = Progress(done=1, total=1, unit="steps")

Scenario = Callable[[Operations], Awaitable[None]]


def run(path: Path, scenario: Scenario, kept: int = 100) -> None:
    async def life() -> None:
        tasks = Tasks()
        store = Store(path / "hostel.db", events_kept=1000, on_events=lambda _: None)
        operations = Operations(store, tasks, kept)
        await operations.load()
        await scenario(operations)
        await tasks.finish(30)
        await store.close()

    asyncio.run(life())


def job() -> Job:
    return Job("vm.stop", VM, may_cancel=False)


async def result(_: Job) -> Progress:
    return RESULT


async def slow_result(_: Job) -> Progress:
    await asyncio.sleep(0.01)
    return RESULT


def test_work_that_ends_in_time_is_just_its_result(tmp_path: Path) -> None:
    async def scenario(operations: Operations) -> None:
        assert await operations.run(job(), PATIENT, result) == RESULT
        assert operations.list(ListQuery()).items == []

    run(tmp_path, scenario)


def test_work_that_fails_in_time_raises(tmp_path: Path) -> None:
    async def fail(_: Job) -> None:
        raise Invalid("x", "no", field="f")

    async def scenario(operations: Operations) -> None:
        with pytest.raises(Invalid, match="no"):
            await operations.run(job(), PATIENT, fail)

    run(tmp_path, scenario)


def test_a_defect_is_an_internal_error_and_not_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_: Job) -> None:
        raise ZeroDivisionError

    async def scenario(operations: Operations) -> None:
        with pytest.raises(ApiError, match="a defect of hosteld") as caught:
            await operations.run(job(), PATIENT, fail)
        assert caught.value.status == 500
        assert await operations.run(job(), PATIENT, result) == RESULT

    run(tmp_path, scenario)
    assert "ZeroDivisionError" in caplog.text


def test_work_that_takes_longer_is_an_operation_with_progress_log_and_result(
    tmp_path: Path,
) -> None:
    go = asyncio.Event()

    async def work(job: Job) -> Progress:
        job.progress(3, 10)
        job.note("half-way")
        await go.wait()
        return RESULT

    async def scenario(operations: Operations) -> None:
        operation = await operations.run(job(), Call("test", wait_s=0.01), work)
        assert isinstance(operation, Operation)
        assert operation.state.value == "running"
        assert operation.progress == Progress(done=3, total=10, unit="bytes")
        assert await operations.get(operation.id, 0) == operation
        go.set()
        done = await operations.get(operation.id, 30)
        assert (done.state.value, done.log) == ("succeeded", ["half-way"])
        assert done.result == RESULT.model_dump()
        assert done.finished_at is not None

    async def later(operations: Operations) -> None:
        (kept,) = operations.list(ListQuery()).items
        assert (kept.state.value, kept.result) == ("succeeded", RESULT.model_dump())

    run(tmp_path, scenario)
    run(tmp_path, later)


def test_the_log_of_a_job_is_bounded() -> None:
    one = job()
    for number in range(MAX_LOG_LINES * 2):
        one.note(str(number))
    assert len(one.model().log) == MAX_LOG_LINES


def test_operations_are_listed_the_newest_first_and_the_oldest_are_forgotten(
    tmp_path: Path,
) -> None:
    async def scenario(operations: Operations) -> None:
        made = []
        for _ in range(6):
            operation = await operations.run(job(), HASTY, slow_result)
            assert isinstance(operation, Operation)
            await operations.get(operation.id, 30)
            await asyncio.sleep(0.01)
            made.append(operation.id)
        page = operations.list(ListQuery(limit=2))
        assert [item.id for item in page.items] == [made[5], made[4]]
        page = operations.list(ListQuery(limit=2, cursor=page.next_cursor))
        assert [item.id for item in page.items] == [made[3], made[2]]
        assert page.next_cursor is None
        with pytest.raises(NotFound):
            await operations.get(made[0], 0)

    run(tmp_path, scenario, kept=4)


def test_a_cursor_of_ones_own_making_is_refused(tmp_path: Path) -> None:
    async def scenario(operations: Operations) -> None:
        with pytest.raises(BadRequest, match="next_cursor"):
            operations.list(ListQuery(cursor="x"))

    run(tmp_path, scenario)
