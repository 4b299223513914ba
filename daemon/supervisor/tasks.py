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

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run ``work`` in the background; its failure is logged when nobody awaits it."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    async def finish(self, grace_s: float) -> None:
        """Wait for the tasks, then cancel what is left after ``grace_s`` seconds."""
        current = asyncio.current_task()
        if tasks := self._tasks - {current}:
            await asyncio.wait(tasks, timeout=grace_s)
        left = [task for task in self._tasks if task is not current and not task.done()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task failed task=%s", task.get_name(), exc_info=error)
