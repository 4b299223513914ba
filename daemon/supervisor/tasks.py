# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Background tasks that are neither lost nor silent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


class Tasks:
    """Keeps tasks alive, tells of those that fail, and ends them together.

    Threads: the event loop's.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._jobs: set[asyncio.Task[Any]] = set()

    def spawn(
        self, work: Coroutine[Any, Any, T], name: str, *, is_job: bool = False
    ) -> asyncio.Task[T]:
        """Run ``work`` in the background; its failure is logged.

        Args:
            work: what to run.
            name: for the log.
            is_job: finish() waits for its end.
        """
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        if is_job:
            self._jobs.add(task)
        task.add_done_callback(self._on_done)
        return task

    async def complete(self, work: Coroutine[Any, Any, T], name: str) -> T:
        """Run ``work`` to its end, also when the caller is cancelled meanwhile."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._jobs.add(task)
        self._tasks.add(task)
        task.add_done_callback(self._jobs.discard)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def finish(self, grace_s: float) -> None:
        """Wait ``grace_s`` seconds for the jobs, then cancel all that is left."""
        if self._jobs:
            await asyncio.wait(set(self._jobs), timeout=grace_s)
        left = [task for task in self._tasks if not task.done()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._jobs.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task failed task=%s", task.get_name(), exc_info=error)
